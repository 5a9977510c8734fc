"""Training in one process or in several.

``python train.py`` is one process; ``torchrun --nproc-per-node N train.py`` starts N processes of
the same program. Code that uses ``Ranks`` is the same for both.
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

# How long a process waits for another, which may be writing a checkpoint or reading photos.
PATIENCE = datetime.timedelta(minutes=10)
# Messages of gloo's RuntimeError when another process is gone; nccl has an error class for this.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed",
        "Timed out waiting", "timeout caused pair closure")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Ranks:
    """One of the processes that train together.

    Attributes:
        rank: Number of this process, from 0.
        count: Number of processes.
        device: Device of this process.
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

        Every parameter that requires a gradient must get one in every backward pass. Buffers are
        not synchronized: rules update them jointly, and batch normalization is per process.
        """
        if self.count == 1:
            return module
        devices = None if self.device.index is None else [self.device]
        return DistributedDataParallel(module, device_ids=devices, forward_sync_buffers=False)

    def any(self, *flags: bool) -> list[bool]:
        """Returns for each flag whether it is set on any process; all processes must call this."""
        if self.count == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.uint8, device=self.device)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return raised.bool().tolist()

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum over the processes; all processes must call this."""
        values = values.clone()
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def gather(self, values: list[str]) -> list[str]:
        """Returns the strings of all processes, in their order; all processes must call this."""
        if self.count == 1:
            return values
        parts: list[list[str]] = [[] for _ in range(self.count)]
        dist.all_gather_object(parts, values)
        return [value for part in parts for value in part]

    def wait(self) -> None:
        """Waits until all processes have called this."""
        if self.count > 1:
            dist.barrier()


def accumulating(module: nn.Module) -> AbstractContextManager[None]:
    """Returns a context in which gradients are accumulated without synchronization."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


@contextmanager
def join_ranks(device: torch.device) -> Iterator[Ranks]:
    """Joins the processes that torchrun has started; without torchrun there is only this one.

    Args:
        device: Device to use; with CUDA, each process of a machine takes the GPU of its local rank.

    Yields:
        This process, on its device.

    Raises:
        UserError: If there are fewer GPUs than processes, or another process is gone. Messages of
            processes other than the first start with their number.
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
        sys.exit(INTERRUPTED)  # the first process prints the message
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
            f"process {local} of this machine has no GPU, there are only {available}; pass a "
            "smaller --nproc-per-node, or --device cpu"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", timeout=PATIENCE, device_id=device)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def _why_lost(error: RuntimeError) -> str | None:
    """Returns the message if ``error`` means that another process is gone, else None."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    if not isinstance(error, dist.DistError) and not any(word in reason for word in LOST):
        return None
    return (
        "another process has gone; see its message, or it was killed; continue with --resume "
        f"({reason})"
    )
