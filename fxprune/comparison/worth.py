"""Is a pruned network worth it for its time? It and the dense one, as fast as they get, in the runtimes at hand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.inference.acceleration import accelerate
from fxprune.inference.race import race
from fxprune.inference.runtimes import OTHERS, TORCH
from fxprune.vocabulary import RuntimeName

GRAPH_RUNTIMES = ("onnxruntime", "openvino")
"""That are quick to ask; what PyTorch makes of a network is asked where neither is installed."""
MIN_SECONDS = 0.02
"""Of a turn of the race."""
NOISE = 0.03
"""A network that is less than this much faster is not."""


@dataclass(frozen=True)
class Worth:
    """Times of two networks. `str()` is a sentence, and what should be known of the runtimes.

    Attributes:
        dense, pruned: shortest time of one call, in seconds, by runtime.
        batch, threads: of a call.
        models: the pruned network in each runtime, to be written.
        remarks: of the runtimes.
    """

    dense: Mapping[str, float]
    pruned: Mapping[str, float]
    batch: int
    threads: int
    models: Mapping[str, Any] = field(default_factory=dict, repr=False)
    remarks: tuple[str, ...] = ()

    @property
    def best_dense(self) -> str:
        """The runtime in which the dense network is fastest."""
        return min(self.dense, key=self.dense.__getitem__)

    @property
    def best(self) -> str:
        """The runtime in which the pruned network is fastest."""
        return min(self.pruned, key=self.pruned.__getitem__)

    @property
    def ratio(self) -> float:
        """Best dense time over best pruned time: how many times as fast."""
        return self.dense[self.best_dense] / self.pruned[self.best]

    @property
    def is_faster(self) -> bool:
        """Whether the pruned network is faster than the dense one, by more than noise."""
        return self.ratio > 1 + NOISE

    def to_dict(self) -> dict[str, Any]:
        """Return it as dicts and numbers."""
        return {
            "dense": dict(self.dense), "pruned": dict(self.pruned), "batch": self.batch, "threads": self.threads,
            "ratio": self.ratio, "is_faster": self.is_faster,
        }  # fmt: skip

    def __str__(self) -> str:
        dense = f"{1e3 * self.dense[self.best_dense]:.2f} ms in {self.best_dense}"
        pruned = f"{1e3 * self.pruned[self.best]:.2f} ms in {self.best}"
        where = f"best of {', '.join(self.dense)}; batch {self.batch}, threads: {self.threads}"
        said = f"{self.ratio:.2f} times as fast: pruned {pruned}, dense {dense} ({where})"
        if not self.is_faster:
            said = (
                f"not worth pruning for time here: dense {dense}, pruned {pruned} ({where}); "
                "prune more, plan for time with --latency, or keep the dense network"
            )
        return "\n".join((said, *self.remarks))


def measure_worth(
    dense: nn.Module,
    pruned: nn.Module,
    inputs: Tensor,
    runtimes: Sequence[RuntimeName] = (),
    rounds: int = 15,
    progress: bool = False,
) -> Worth:
    """Time a pruned network against the one that it was made from, each accelerated, all in one race.

    Args:
        dense, pruned: on one device, of one type; they are not changed.
        inputs: `(N, ...)`, a batch as it is deployed.
        runtimes: see `fxprune.accelerate`; none for those of `GRAPH_RUNTIMES` that are installed, else PyTorch.
        rounds: turns of each.
        progress: show bars on stderr.

    Raises:
        AccelerationError, TraceError: one of them cannot be accelerated.
    """
    chosen = runtimes or usual_runtimes(inputs)
    accelerated = {
        (name, what): accelerate(network, inputs, runtime=name, progress=progress)
        for name in chosen
        for what, network in (("dense", dense), ("pruned", pruned))
    }
    with torch.inference_mode():
        timings = race(
            {f"{what} {name}": partial(network, inputs) for (name, what), network in accelerated.items()},
            rounds=rounds,
            device=inputs.device,
            min_seconds=MIN_SECONDS,
            progress="comparing" if progress else None,
        )
    dense_times, times = (
        {str(name): timings[f"{what} {name}"].fastest for name in chosen} for what in ("dense", "pruned")
    )
    models = {str(name): network for (name, what), network in accelerated.items() if what == "pruned"}
    remarks = tuple(OTHERS[name].remark() for name in chosen if name in OTHERS)
    return Worth(
        dense_times, times, len(inputs), torch.get_num_threads(), models=models, remarks=tuple(filter(None, remarks))
    )


def usual_runtimes(inputs: Tensor) -> tuple[RuntimeName, ...]:
    """Those that are asked if nobody says which."""
    found = tuple(name for name in GRAPH_RUNTIMES if not OTHERS[name].obstacle(inputs.device, inputs.dtype))
    return found or (TORCH,)  # type: ignore[return-value]
