"""train.py with models that train in milliseconds, for processes that tests start.

Each argument is a command line; all are run one after the other by the same processes, which must
agree on all weights in the end.
"""

import os
import shlex
import sys
from pathlib import Path

import torch
from torch import nn

import train
from tests.distributed.ranks import same_on_all_ranks
from tests.examples.test_model import CONFIGS
from tvqrap.cli import UserError, run
from tvqrap.models.presets import PRESETS
from tvqrap.training.options import parse_options
from tvqrap.training.ranks import join_ranks
from tvqrap.training.trainer import Trainer

SCRIPT = str(Path(__file__))
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(
        [str(Path(train.__file__).parent), str(Path(__file__).parents[2])]
    ),
}
PIDS = "LITTLE_TRAIN_PIDS"  # names the folder where processes leave their numbers
BLIND = "LITTLE_TRAIN_BLIND"  # number of the process that cannot read photos from step 3 on
LITTLE = {"tiny": CONFIGS["lowres"], "small": CONFIGS["regressed"], "paper": CONFIGS["paper"]}


class AgreeingTrainer(Trainer):
    def _read(self, batches):
        if self.done == 3 and os.environ.get(BLIND) == str(self.ranks.rank):
            batches = blinded()
        return super()._read(batches)

    def run(self):
        super().run()
        for part in self.update.state_parts().values():
            for parameter in part.parameters() if isinstance(part, nn.Module) else ():
                same_on_all_ranks(parameter.detach())


def blinded():
    raise UserError("no photo can be read")
    yield


def main():
    torch.set_num_threads(1)
    PRESETS.update(LITTLE)
    train.Trainer = AgreeingTrainer
    with join_ranks(torch.device("cpu")) as ranks:
        if folder := os.environ.get(PIDS):
            (Path(folder) / f"{ranks.rank}.pid").write_text(str(os.getpid()))
        for line in sys.argv[1:]:
            train.train(parse_options("", shlex.split(line)), ranks)


if __name__ == "__main__":
    sys.exit(run(main))
