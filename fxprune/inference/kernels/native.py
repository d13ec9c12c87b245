"""The compiled CPU kernel: built once with the system's C++ compiler, kept in a cache, optional.

Where there is no compiler, or the result fails its own test, `obstacle()` says so and everything else works without.
`CXX` names the compiler, `FXPRUNE_NATIVE=0` turns it off; the folder is that of `fxprune.inference.cache`. What others
could have put there is not loaded.
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.errors import KernelError
from fxprune.inference import instructions
from fxprune.inference.cache import cache_directory, distrust, make_cache_directory

SOURCES = ("native_channels_last.cpp", "native_contiguous.cpp", "native_channelwise.cpp", "native_ops.cpp")
HEADERS = ("native_conv.h", "native_vectors.h")
FLAGS = ("-O3", "-march=native", "-fPIC", "-shared", "-std=c++20", "-fopenmp")
SECONDS = 300  # a build takes about ten
TOLERANCE = 1e-4


class Packed(NamedTuple):
    """Weights in the order in which the kernel reads them.

    Attributes:
        weights: for each panel `(taps, k, width)`, or `(k, taps, width)` unless channels_last, one after another,
            float32.
        bias: for each panel `(width,)`, one after another, float32.
        panels: `(P, 7)` int64, the fields of `fxprune::Panel` in native_conv.h.
    """

    weights: Tensor
    bias: Tensor
    panels: Tensor


class NativeModule(nn.Module):
    """What calls the compiled kernel."""

    @torch.jit.unused
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load the kernel in a process that unpickles a model.

        Raises:
            KernelError: it cannot be built there.
        """
        load()
        super().__setstate__(state)  # type: ignore[no-untyped-call]


def unsuited(weight: Tensor) -> str:
    """Why the compiled kernel does not take such a weight; empty if it does."""
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        return ""
    return f"the compiled kernel is for float32 on the CPU, not {weight.dtype} on {weight.device.type}"


@functools.cache
def obstacle() -> str:
    """Why the compiled kernel cannot be used here; empty if it can. Builds it at the first call."""
    if os.environ.get("FXPRUNE_NATIVE", "1") == "0":
        return "FXPRUNE_NATIVE=0 turns the compiled kernel off"
    try:
        load()
    except KernelError as error:
        return str(error)
    return ""


@functools.cache
def load() -> None:
    """Build the kernel unless a build is cached, and register `torch.ops.fxprune_native`.

    Raises:
        KernelError: no compiler, a failed build, or a kernel that fails its test.
    """
    library = build()
    try:
        if not hasattr(torch.ops.fxprune_native, "conv2d"):  # another build would kill the process as it registers
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise KernelError(f"the compiled kernel {library.name} cannot be loaded: {error}; delete it") from error
    if not (gap := _test()) <= TOLERANCE:
        raise KernelError(f"the compiled kernel is wrong by {gap:.1e} on this processor; it is not used")
    torch.library.register_fake("fxprune_native::conv2d")(_fake_conv2d)
    torch.library.register_fake("fxprune_native::depthwise_conv2d")(_fake_depthwise_conv2d)
    torch.library.register_fake("fxprune_native::max_pool2d")(_fake_max_pool2d)


def build() -> Path:
    """Compile the kernel for this processor and this torch, unless the cache has it, and return the library.

    Raises:
        KernelError: there is no compiler, or it fails; the message ends with what it said. Or the folder, or the
            library in it, is somebody else's, or others may write it.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if not compiler:
        raise KernelError("no C++ compiler for the compiled kernel; install g++ or clang++, or set CXX")
    here = Path(__file__).parent
    torch_root = Path(torch.__file__).parent
    flags = (
        *FLAGS,
        *instructions.FLAGS[instructions.forced_isa()],
        f"-I{torch_root}/include",
        f"-I{torch_root}/include/torch/csrc/api/include",
    )
    libraries = (f"-L{torch_root}/lib", "-lc10", "-ltorch_cpu")
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    made_of = " ".join((compiler, *flags, abi, torch.__version__, processor(), source_digest()))
    folder, name = cache_directory(), f"native-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"
    try:
        for path in (make_cache_directory(), *folder.glob(f"{name}-*.so")):
            if reason := distrust(path):
                raise KernelError(
                    f"the compiled kernel is not loaded: {reason}; remove it, or set FXPRUNE_CACHE to a folder that "
                    "only you may write"
                )
            if path != folder and _is_whole(path):
                return path
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "native.so"
            inputs = [str(here / name) for name in SOURCES]
            command = [*compiler.split(), *flags, abi, *inputs, "-o", str(made), *libraries]
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
            if done.returncode != 0:
                said = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise KernelError(f"{compiler} cannot build the compiled kernel: {said}")
            made.chmod(0o700)
            target = folder / f"{name}-{_digest(made)}.so"
            os.replace(made, target)  # whole or not at all, also if several processes build at once
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(
            f"the compiled kernel cannot be built with {compiler} in {folder}: {error}; set CXX or FXPRUNE_CACHE"
        ) from error
    return target


@functools.cache
def source_digest() -> str:
    """Name of this version of the kernel: eight hexadecimal digits."""
    here = Path(__file__).parent
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in SOURCES + HEADERS)).hexdigest()[:8]


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:16]


def _is_whole(library: Path) -> bool:
    """Whether a cached library is what was built, as its name says: loading a truncated one kills the process."""
    try:
        return library.stem.endswith(_digest(library))
    except OSError:
        return False


def pack(weight: Tensor, bias: Tensor | None, groups: int, channels_last: bool = True) -> Packed:
    """Cut the filters of each group into panels that fill the registers.

    Args:
        weight: `(O, k, kh, kw)` float32.
        bias: `(O,)` or None.
        groups: number of groups.
        channels_last: the memory format of the kernel that is to read them.
    """
    width = weight.shape[0] // groups
    rows = weight.flatten(2).permute(2, 1, 0) if channels_last else weight.flatten(2).permute(1, 2, 0)
    panels, weights, biases = [], [], []
    offset = bias_offset = 0
    for group in range(groups):
        first, stop = group * width, (group + 1) * width
        while first < stop:
            lanes, vectors = _registers(stop - first) if channels_last else (_power_of_two(stop - first), 1)
            taken = min(stop - first, lanes * vectors)
            panel = weight.new_zeros(*rows.shape[:2], lanes * vectors)
            panel[:, :, :taken] = rows[:, :, first : first + taken]
            shift = weight.new_zeros(lanes * vectors)
            if bias is not None:
                shift[:taken] = bias[first : first + taken]
            panels.append((group, first, taken, lanes, vectors, offset, bias_offset))
            weights.append(panel.flatten())
            biases.append(shift)
            offset, bias_offset, first = offset + panel.numel(), bias_offset + shift.numel(), first + taken
    return Packed(torch.cat(weights), torch.cat(biases), torch.tensor(panels))


def by_address(weight: Tensor, reads: Tensor) -> tuple[Tensor, Tensor]:
    """Let each group read its channels in ascending order, for the sake of the caches: weight `(O, k, kh, kw)` and
    channels `(groups, k)` in that order.
    """
    ascending, order = reads.sort(dim=1)
    columns = order.repeat_interleave(weight.shape[0] // reads.shape[0], dim=0)
    return weight.gather(1, columns[:, :, None, None].expand_as(weight)), ascending


def _registers(filters: int) -> tuple[int, int]:
    """Lanes and number of the registers for the next panel of a group that has `filters` left."""
    widest = int(torch.ops.fxprune_native.widest_lanes())
    if filters > widest:
        return widest, 2
    lanes = widest
    while lanes > 4 and filters <= lanes // 2:
        lanes //= 2
    return lanes, 1


def _power_of_two(filters: int) -> int:
    """The largest power of two that is no more than `filters`, nor than a panel has."""
    return min(int(torch.ops.fxprune_native.most_filters()), 1 << (filters.bit_length() - 1))


def processor() -> str:
    """Name for the kind of processor, for caches that machines may share: its architecture, and a digest of its model
    and instruction sets, on which `-march=native` depends, and the one it shall stay within.

    Raises:
        KernelError: `FXPRUNE_ISA` is not legal.
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else [platform.processor()]
    telling = ("model name", "flags", "Features", "CPU part")
    described = "\n".join(sorted({line for line in lines if line.startswith(telling)}))
    name = f"{platform.machine()}-{hashlib.sha256(described.encode()).hexdigest()[:8]}"
    return "-".join(filter(None, (name, instructions.forced_isa())))


def _fake_conv2d(
    input: Tensor, weights: Tensor, bias: Tensor, panels: Tensor, index: Tensor, out: Tensor, residual: Tensor | None,
    kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], channels: int,
    minimum: float | None, maximum: float | None, channels_last: bool = True,
) -> Tensor:  # fmt: skip
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return _fake_result(input, out.shape[0], kernel, stride, padding, dilation, memory_format)


def _fake_depthwise_conv2d(
    input: Tensor, weights: Tensor, bias: Tensor | None, residual: Tensor | None,
    kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
    minimum: float | None, maximum: float | None,
) -> Tensor:  # fmt: skip
    return _fake_result(input, input.shape[1], kernel, stride, padding, dilation, torch.channels_last)


def _fake_max_pool2d(
    input: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    return _fake_result(input, input.shape[1], kernel, stride, padding, dilation, torch.channels_last)


def _fake_result(
    input: Tensor, channels: int, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
    memory_format: torch.memory_format,
) -> Tensor:  # fmt: skip
    size = [(input.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    return input.new_empty((input.shape[0], channels, *size)).contiguous(memory_format=memory_format)


def _test() -> float:
    """Largest error on small convolutions with everything in them, relative to the largest output."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((2, 6, 9, 17), (36, 4, 3, 3), (36,)))
    index = torch.stack([torch.randperm(6, generator=generator)[:4] for _ in range(2)])
    places = torch.randperm(36, generator=generator)
    expected = F.conv2d(x[:, index.flatten()], weight, bias, 1, 1, 1, 2)[:, places.argsort()]
    residual = torch.randn(expected.shape, generator=generator)
    expected = (expected + residual).clamp(0, 6)
    gaps = []
    for channels_last in (True, False):
        packed = pack(weight, bias, 2, channels_last)
        found = torch.ops.fxprune_native.conv2d(
            x, packed.weights, packed.bias, packed.panels, index.int(), places.int(), residual,
            [3, 3], [1, 1], [1, 1], [1, 1], 6, 0.0, 6.0, channels_last,
        )  # fmt: skip
        gaps.append(_gap(found, expected))
    filters = torch.randn(6, 1, 3, 3, generator=generator)
    expected = F.conv2d(x, filters, bias[:6], 1, 1, 1, 6).clamp(0, 6)
    found = torch.ops.fxprune_native.depthwise_conv2d(
        x, filters.flatten(1).t().contiguous(), bias[:6], None, [3, 3], [1, 1], [1, 1], [1, 1], 0.0, 6.0
    )
    pooled = torch.ops.fxprune_native.max_pool2d(x, [3, 3], [2, 2], [1, 1], [1, 1])
    return max(*gaps, _gap(found, expected), _gap(pooled, F.max_pool2d(x, 3, 2, 1)))


def _gap(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
