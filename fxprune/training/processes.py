"""One process, or several that share each batch: what a training loop must know of its group.

Several are started by `torchrun --nproc-per-node N -m fxprune train ...` and talk through gloo on the CPU and NCCL
on CUDA, which is untested here. Each has its own BatchNorm statistics over its share of a batch; those of process 0
are kept. `torch.nn.SyncBatchNorm` would share them, on CUDA only.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fxprune.errors import FxpruneError

# Process 0 plans and evaluates alone, and the others wait. A process that dies is noticed at once, by its connections.
PATIENCE = timedelta(hours=2)


class GroupError(FxpruneError):
    """Another process of the group is gone."""


@dataclass(frozen=True)
class Group:
    """The processes that train one network.

    Attributes:
        rank: number of this one.
        size: how many there are.
        device: where this one computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # immutable

    @property
    def first(self) -> bool:
        """Whether this is the process that plans, evaluates and writes."""
        return self.rank == 0

    def share(self, positions: Tensor) -> tuple[Tensor, bool]:
        """This process's part of the images of a batch, and whether it counts.

        The parts are disjoint and cover the batch. Where there are fewer images than processes, those without one get
        the first all the same, for every process must take part in every exchange; theirs does not count.
        """
        mine = positions.tensor_split(self.size)[self.rank]
        return (mine, True) if len(mine) else (positions[:1], False)

    def sum(self, *numbers: float | Tensor) -> list[float]:
        """Each number, summed over all processes, in float64."""
        total = torch.stack([torch.as_tensor(number).detach().double().to(self.device) for number in numbers])
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def from_first(self, text: str | None) -> str | None:
        """What process 0 passed."""
        box = [text]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def parallel(self, model: nn.Module) -> nn.Module:
        """`model` so that each backward averages the gradients over all processes. Weights are taken from process 0."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)


@contextmanager
def joined(device: str) -> Iterator[Group]:
    """Join the group that torchrun has started, or be alone.

    Args:
        device: `"cpu"` or `"cuda"`; with several processes each takes the device of its local rank.

    Raises:
        GroupError: another process ended while this one waited for it.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Group(device=torch.device(device))
        return
    here = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Group(dist.get_rank(), dist.get_world_size(), here)
    except RuntimeError as error:
        # Gloo has no exception of its own, only words of its own.
        if not isinstance(error, dist.DistError) and not re.search("gloo|Connection (closed|reset)", str(error)):
            raise
        raise GroupError(
            f"process {dist.get_rank()} of {size}: another one has ended; what was saved last stays, --resume goes on "
            "from there with any number of processes"
        ) from error
    finally:
        dist.destroy_process_group()
