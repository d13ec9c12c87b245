"""`FXPRUNE_ISA=avx2`: stay within the instructions of other machines, to measure here what is fast there.

It holds for all that PyTorch computes: its own loops, oneDNN, and the compiled kernel. The first two read a variable of
theirs when they are first used, so it is set as this module is imported, which `import fxprune` does. Runtimes without
such a variable are left out of races then.
"""

import os
import platform

from fxprune.errors import KernelError

FLAGS = {"": (), "avx2": ("-mno-avx512f",)}
"""What a compiler that would use all instructions is told, by the value of the variable."""


def forced_isa() -> str:
    """The instruction set to stay within; empty for all that the processor has.

    Raises:
        KernelError: the variable has another value, or this processor is of another kind.
    """
    isa = os.environ.get("FXPRUNE_ISA", "")
    if isa not in FLAGS:
        raise KernelError(f"FXPRUNE_ISA is {isa!r}; it must be 'avx2', or unset for all that the processor has")
    if isa and platform.machine().lower() not in ("x86_64", "amd64"):
        raise KernelError(f"FXPRUNE_ISA is {isa!r}, and this processor is {platform.machine()}; unset it")
    return isa


if os.environ.get("FXPRUNE_ISA") == "avx2":
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
    os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")
