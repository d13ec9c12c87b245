"""Where and when a measurement was made, to stand beside its numbers."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

# Instructions that decide how fast a convolution can be, by their names in /proc/cpuinfo.
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve")


def environment() -> dict[str, Any]:
    """Return versions, CPU and CUDA device, threads, load, commit and date of this process, ready for JSON."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(Path(__file__).parents[1]),
        "fxprune": _version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": importlib.metadata.version("torchvision"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpuinfo("model name") or platform.processor() or "unknown",
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in _flags()],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load": [round(average, 2) for average in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "onednn": _onednn(),
        "threads": torch.get_num_threads(),
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,  # type: ignore[no-untyped-call]
    }


def has_vnni() -> bool:
    """Whether the processor multiplies bytes into 32 bits at once (AVX-512 VNNI, AVX-VNNI, Arm's dot product)."""
    return not {"avx512_vnni", "avx_vnni", "asimddp"}.isdisjoint(_flags())


def _flags() -> set[str]:
    """What the first core can do, as Linux names it."""
    return set((_cpuinfo("flags") or _cpuinfo("Features") or "").split())


def _cpuinfo(field: str) -> str | None:
    """What Linux says of the first core; None elsewhere."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith(field):
                return line.partition(":")[2].strip()
    return None


def _onednn() -> str | None:
    """Version of the library that runs convolutions on the CPU; None if torch was built without it."""
    found = re.search(r"MKL-DNN v([0-9.]+)", torch.__config__.show())
    return found.group(1) if found else None


def _version() -> str:
    """Of the package that runs, which need not be the one that is installed."""
    version: str = sys.modules["fxprune"].__version__  # not imported: everything else here may import this module
    return version


def _commit(root: Path) -> str | None:
    """The commit of the checkout `root`, with `+` if it has changes; None if it is none, such as a `site-packages` that
    happens to lie in the checkout of something else.
    """
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=root, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
