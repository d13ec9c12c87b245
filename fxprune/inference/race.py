"""How long does it take? Several ways to do one thing, timed side by side.

The ways take turns, round by round, so that whatever else the machine does meanwhile hits all of them alike. Ratios are
taken within a round, and then their median: a slow minute cancels.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Timing:
    """Times of one way, in seconds, a round each; rounds of different ways with the same number were neighbours."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over the rounds, in seconds."""
        return statistics.median(self.seconds)

    @property
    def fastest(self) -> float:
        """Shortest round, in seconds: what the thing takes where nothing else disturbs it."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """Distance between the first and the third quartile, in seconds; 0 for fewer than two rounds."""
        if len(self.seconds) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return third - first

    def relative_to(self, other: "Timing") -> float:
        """Median over the rounds of this time divided by the other's in the same round."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True))


def race(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    min_seconds: float = 0.0,
    progress: str | None = None,
) -> dict[str, Timing]:
    """Time each variant once a round.

    Args:
        variants: what to call, without arguments, by name.
        rounds: how many times everybody gets a turn.
        warmup: calls of each variant beforehand that are not counted.
        device: on CUDA a call is timed by events on the current stream, elsewhere by the monotonic clock.
        min_seconds: short calls are repeated within a turn until about this much time has passed, and the mean counts;
            0 calls once.
        progress: label of a bar on stderr; none if absent.

    Raises:
        ValueError: `rounds` is less than 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; at least 1 is needed to have a time")
    clock = _cuda_seconds if torch.device(device).type == "cuda" else _cpu_seconds
    repeats = {}
    for name, call in variants.items():
        for _ in range(warmup):
            call()
        once = clock(call, 1) if min_seconds else 1.0
        repeats[name] = max(1, round(min_seconds / once)) if min_seconds else 1
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for turn in tqdm(range(rounds), desc=progress, disable=progress is None, leave=False):
        first = turn % max(1, len(order))  # whoever follows the largest finds the coldest cache: let that be everybody
        for name in order[first:] + order[:first]:
            seconds[name].append(clock(variants[name], repeats[name]))
    return {name: Timing(tuple(times)) for name, times in seconds.items()}


def _cpu_seconds(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _cuda_seconds(call: Callable[[], object], repeats: int) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    stop.synchronize()
    milliseconds: float = start.elapsed_time(stop)
    return milliseconds / 1e3 / repeats
