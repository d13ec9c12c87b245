"""Measured times of single layers, remembered in memory and in a file, so that nothing is timed twice on a machine.

The time of a layer is its shortest round: other work on the machine only ever adds to it. Where the shortest came only
once, all rounds may have been disturbed, and the layer races again. On CUDA it is that of a replayed CUDA graph: a
layer of a small batch takes less than its launch from Python, which would hide it.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from fxprune.files import write_whole
from fxprune.inference.cache import cache_directory, make_cache_directory
from fxprune.inference.cuda_graphs import captured
from fxprune.inference.kernels.native import processor, source_digest
from fxprune.inference.race import race

ROUNDS = 9
WARMUP = 2
TURN_SECONDS = 2e-3  # a turn lasts about as long: the clock and the caches of a single short call say little
RACES = 6  # of `ROUNDS` each, at most
ALIKE, WITHIN = 3, 0.05  # so many of the shortest rounds are this near to each other, or the layer races again
CAPTURED_CALLS = 10  # in one CUDA graph: to launch that costs some microseconds too


class Stopwatch:
    """Seconds of calls, by a key that says what was called.

    Args:
        device: where the calls run.
        remember: read and write the file in the cache folder; without it times are kept for this object only.
    """

    def __init__(self, device: torch.device, remember: bool = True) -> None:
        self.device = device
        self.path = cache_directory() / f"times-{_machine(device)}.json" if remember else None
        self._seconds: dict[str, float] = _read(self.path) if self.path else {}
        self._is_new = False

    def times(self, keys: Iterable[str]) -> dict[str, float] | None:
        """Seconds of `keys`; None unless all were timed before: only times of one race can be compared."""
        keys = tuple(keys)
        return {key: self._seconds[key] for key in keys} if all(key in self._seconds for key in keys) else None

    def race(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Time all of `calls`, by key, side by side, and return their seconds."""
        times = 1
        if self.device.type == "cuda":
            calls, times = {key: captured(call, CAPTURED_CALLS) for key, call in calls.items()}, CAPTURED_CALLS
        rounds: dict[str, list[float]] = {key: [] for key in calls}
        left = dict(calls)
        for _ in range(RACES):
            timings = race(left, rounds=ROUNDS, warmup=WARMUP, device=self.device, min_seconds=TURN_SECONDS)
            for key, timing in timings.items():
                rounds[key] += timing.seconds
            left = {key: call for key, call in left.items() if not _repeats(rounds[key])}
            if not left:
                break
        seconds = {key: min(found) / times for key, found in rounds.items()}
        self._seconds.update(seconds)
        self._is_new = True
        return seconds

    def save(self) -> None:
        """Write the file, if there is anything new. A folder that cannot be written to costs only time."""
        if self.path is None or not self._is_new:
            return
        try:
            make_cache_directory()
            text = json.dumps({**_read(self.path), **self._seconds})
            write_whole(self.path, lambda partial: partial.write_text(text, encoding="utf-8"))
        except OSError:
            return
        self._is_new = False


def _repeats(seconds: Sequence[float]) -> bool:
    """Whether the shortest of some rounds came more than once."""
    shortest = sorted(seconds)[: min(ALIKE, ROUNDS)]
    return shortest[-1] <= shortest[0] * (1 + WITHIN)


def _machine(device: torch.device) -> str:
    """What a time depends on beside the layer, as part of a file name."""
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}-graphs"  # 0.1 timed calls with their launches
    else:
        name = f"{processor()}-{torch.get_num_threads()}"
    parts = (device.type, name, f"torch{torch.__version__}", source_digest())
    return "".join(c if c.isalnum() else "-" for c in "-".join(parts))


def _read(path: Path) -> dict[str, float]:
    """The times in a file; none if it is absent or damaged."""
    try:
        times = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(times, dict):
        return {}
    return {str(key): float(t) for key, t in times.items() if isinstance(t, float) and t > 0}
