"""What a piece of work costs: seconds, and peak memory."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def timed(work: Callable[[], T], clock: Callable[[], float] = time.perf_counter) -> tuple[float, T]:
    """Seconds by `clock`, and what the work gives."""
    start = clock()
    result = work()
    return clock() - start, result


def with_peak(work: Callable[[], T]) -> tuple[T, float | None]:
    """What the work gives, and the peak of the resident set above its level before, in MB (10^6 bytes); None where the
    system does not tell it.
    """
    before = reset_peak_mb()
    result = work()
    return result, None if before is None else peak_mb() - before


def reset_peak_mb() -> float | None:
    """Set the kernel's high-water mark of resident memory to the present level, and return it; None where it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    except OSError:
        return None
    return _status_mb("VmRSS")


def peak_mb() -> float:
    """The peak of resident memory since that, which the system has to have allowed."""
    return _status_mb("VmHWM")


def _status_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise LookupError(f"/proc/self/status has no {field}")
