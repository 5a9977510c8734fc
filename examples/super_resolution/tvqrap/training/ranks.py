"""Training on one process or on several: what one has to know of the others.

``python train.py`` is one process. ``torchrun --nproc-per-node N train.py`` starts N of them, which
all run the same program and find each other by what torchrun put into their environment. Code that
uses ``Ranks`` never asks which of the two it is.
"""

import dataclasses
import datetime
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tvqrap.cli import INTERRUPTED, UserError

# How long a process waits for another: that may be writing a checkpoint or reading its photos.
PATIENCE = datetime.timedelta(minutes=10)
# What gloo says, in a plain RuntimeError, when it waits in vain; nccl has a class for its errors.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed",
        "Timed out waiting", "timeout caused pair closure")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Ranks:
    """One of the processes that train together.

    Attributes:
        rank: The number of this process, from 0.
        count: How many there are.
        device: Where this process computes.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def parallel(self, module: nn.Module) -> nn.Module:
        """Returns a module whose gradients are averaged over the processes in the backward pass.

        Every parameter that requires gradients must get one in every backward pass. Buffers are
        left alone: rules compute them jointly, and normalization of a batch is each process's own.
        """
        if self.count == 1:
            return module
        devices = None if self.device.index is None else [self.device]
        return DistributedDataParallel(module, device_ids=devices, forward_sync_buffers=False)

    def any(self, *flags: bool) -> list[bool]:
        """Tells, for each flag, whether it is set on any process; all of them must ask."""
        if self.count == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.uint8, device=self.device)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return raised.bool().tolist()

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum over the processes; all of them must ask."""
        values = values.clone()
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.count > 1:
            dist.barrier()


def accumulating(module: nn.Module) -> AbstractContextManager[None]:
    """Where gradients are summed without being averaged over the processes yet."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


@contextmanager
def join_ranks(device: torch.device) -> Iterator[Ranks]:
    """Joins the processes that torchrun has started; without it, this one is the only one.

    Args:
        device: Where to compute; each process of a machine takes the GPU of its own number.

    Yields:
        This process, on its device.

    Raises:
        UserError: If there are fewer GPUs than processes, or another process has gone. What goes
            wrong on a process that is not the first is said with its number.
    """
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield Ranks(device=device)
        return
    ranks = _join(device)
    try:
        yield ranks
    except KeyboardInterrupt:
        if ranks.is_first:
            raise
        sys.exit(INTERRUPTED)  # the first says it
    except (UserError, RuntimeError) as error:
        reason = str(error) if isinstance(error, UserError) else _why_lost(error)
        if reason is None:
            raise
        raise UserError(reason if ranks.is_first else f"process {ranks.rank}: {reason}") from error
    dist.destroy_process_group()


def _join(device: torch.device) -> Ranks:
    if device.type != "cuda":
        dist.init_process_group("gloo", timeout=PATIENCE)
        return Ranks(dist.get_rank(), dist.get_world_size(), device)
    local, available = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= available:
        raise UserError(
            f"process {local} of this machine has no GPU, there are {available}; start fewer "
            "with --nproc-per-node, or pass --device cpu"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", timeout=PATIENCE, device_id=device)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def _why_lost(error: RuntimeError) -> str | None:
    """What to say where ``error`` is that of a collective in which another process is missing."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    if not isinstance(error, dist.DistError) and not any(word in reason for word in LOST):
        return None
    return (
        "another process has gone, see what it said, or was killed; continue with --resume "
        f"({reason})"
    )
