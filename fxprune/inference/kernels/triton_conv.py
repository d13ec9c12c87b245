"""The fused convolution on CUDA: an implicit GEMM over channels_last, in Triton.

A program computes `BM` output pixels times `BN` filters of one group. It walks over the taps of the kernel and over the
kept channels, `BK` at a time, multiplies (BM, BK) gathered inputs by (BK, BN) weights on the tensor cores and sums in
float32. The gather costs no pass over memory: the index only moves the addresses of loads that are made anyway, and the
places of the filters those of stores. Bias, residual and clamp are applied to the sum in registers, before its one
rounding.

Implicit GEMM: Chetlur et al., "cuDNN: Efficient Primitives for Deep Learning", 2014, section 3. Filters that share
their kept inputs: Tan et al., "Accelerating Sparse Convolution with Column Vector-Wise Sparsity",
NeurIPS 2022.

Importing this needs no Triton; `missing` says what else `convolve` needs.
"""

import contextlib
import inspect
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxprune.errors import KernelError

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch ships it on Linux with CUDA only
    triton = None

# Tensor cores multiply bfloat16 and TF32 from here on (CUDA C++ Programming Guide, "Tensor Core input type support").
CAPABILITY = (8, 0)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Flattening taps and channels into one loop is what lets loads run ahead across taps, but with 8 warps Triton has made
# wrong code of such loops (pytorch#173068); with 4 it has not.
WARPS = 4
STAGES = 3  # steps loaded ahead and the one that is multiplied; 4 and 5 gained nothing on an H200
TUNING_MILLISECONDS = 3  # each tile is timed for ten times as long


class Tile(NamedTuple):
    """What one program computes at a time: output pixels, filters, kept channels a step, and steps loaded ahead."""

    BM: int
    BN: int
    BK: int
    stages: int

    @property
    def settings(self) -> dict[str, int]:
        """Arguments of the kernel."""
        return {"BM": self.BM, "BN": self.BN, "BK": self.BK, "num_stages": self.stages, "num_warps": WARPS}


def tiles(pixels: int, filters: int, kept: int, dtype: torch.dtype) -> list[Tile]:
    """Tiles worth timing for a convolution.

    wgmma reads both operands from shared memory, so that tiles narrower than 64 filters starve it; wider ones than a
    group has filters multiply by nothing. Of 24 tiles of ten layers of ResNets (batch 32, H200) one of these was the
    fastest or at most 3 % behind it, but for 512 filters a group in a 1x1 layer (15 %).

    Args:
        pixels: output pixels of the batch, `N * OH * OW`.
        filters: of one group.
        kept: input channels of one group.
        dtype: of the operands; 64 channels of 2 bytes or 32 of 4 fill the 128 bytes that shared memory swizzles.
    """
    widest = min(128, max(16, _power_of_two_from(filters)))
    deepest = min(32 if dtype == torch.float32 else 64, max(16, _power_of_two_from(kept)))
    shapes = [(64, widest)] + ([(128, widest)] if pixels > 64 else [])
    if widest == 128 and pixels > 64:
        shapes.append((128, 64))
    return [Tile(BM, BN, deepest, STAGES) for BM, BN in shapes]


def missing(device: torch.device) -> str:
    """What a device lacks to run `convolve`, as the end of a sentence; empty if it lacks nothing."""
    if device.type != "cuda":
        return f"the Triton kernel is for CUDA devices, not for {device.type!r}"
    if triton is None:
        return "Triton is not installed; `pip install triton`"
    if torch.version.cuda is None:
        return "this PyTorch is not built for CUDA, on which alone the Triton kernel was tried"
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        return f"compute capability {found[0]}.{found[1]} is below {CAPABILITY[0]}.{CAPABILITY[1]}"
    return ""


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    places: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    block: int,
    minimum: float | None,
    maximum: float | None,
    *,
    tile: Tile | None = None,
    wide: bool | None = None,
) -> None:
    """Write `clamp(y + residual, minimum, maximum)` to `out`, where `y[:, places] = conv2d(x[:, index], weight, bias,
    ...)`.

    The arguments are those of `fxprune.inference.kernels.gather_conv2d`, checked by it; nothing is read back from
    the device.
    float32 is multiplied as TF32 where `torch.nn.functional.conv2d` would.

    Args:
        x: shape (N, C, H, W), channels_last, of a type in `DTYPES`.
        weight: shape (O, kept, kh, kw), any strides; fastest as `fxprune.inference.kernels.gather_conv.pack` leaves it.
        bias: shape (O,).
        index: shape (groups * kept,), int16, int32 or int64, each below C, which is not checked. int16 is the fastest:
            Triton moves loads of 4 bytes or more through shared memory, and then waits in every step for all that it
            has loaded ahead (on an H200, 32 images, float16, blocks of 8: 18 % less time for 3x3 layers of 512 channels
            of 7x7, nothing for 128 channels of 28x28).
        places: the channel of `out` that each filter is written to, shape (O,), int32 or int64, all of them once,
            which is not checked; none if they are in order.
        residual: shape of `out`, channels_last.
        out: shape (N, O, OH, OW), channels_last, not empty.
        stride, padding, dilation: for height and width.
        groups: number of groups of filters.
        block: length of the aligned runs in `index`.
        minimum, maximum: bounds of the output, none if absent.
        tile: instead of the fastest, which the first call with a new shape finds by timing.
        wide: whether offsets take 64 bits; by default where a tensor has 2**31 elements or more.

    Raises:
        KernelError: the shape is new while a CUDA graph is captured, where nothing can be timed.
    """
    pixels, filters, kept = out.shape[0] * out.shape[2] * out.shape[3], weight.shape[0] // groups, weight.shape[1]
    interpreted = not isinstance(_kernel, triton.JITFunction)
    arguments: dict[str, Any] = {
        "x": x, "weight": weight, "bias": bias, "index": index, "places": places, "residual": residual,
        "out": out, "pixels": pixels, "height": x.shape[2], "width": x.shape[3], "out_height": out.shape[2],
        "out_width": out.shape[3], "channels": x.shape[1], "filters": filters, "groups": groups,
        "weight_o": weight.stride(0), "weight_k": weight.stride(1), "weight_h": weight.stride(2),
        "weight_w": weight.stride(3), "pixel_class": _power_of_two_from(pixels),
        "KH": weight.shape[2], "KW": weight.shape[3], "SH": stride[0], "SW": stride[1], "PH": padding[0],
        "PW": padding[1], "DH": dilation[0], "DW": dilation[1], "KEPT": kept, "BLOCK": block,
        "MINIMUM": minimum, "MAXIMUM": maximum,
        "CHANNELS_UNIT": _unit(x.shape[1]), "FILTERS_UNIT": _unit(filters),
        "UNIT_O": _unit(weight.stride(0)), "UNIT_K": _unit(weight.stride(1)), "UNIT_H": _unit(weight.stride(2)),
        "UNIT_W": _unit(weight.stride(3)),
        "WIDE": max(x.numel(), weight.numel(), out.numel()) >= 2**31 if wide is None else wide,
        "PRECISION": _precision(x.dtype),
        # Triton's interpreter would multiply the bit patterns of bfloat16.
        "UPCAST": interpreted and x.dtype == torch.bfloat16,
    }  # fmt: skip

    def grid(chosen: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(pixels, chosen["BM"]) * groups * triton.cdiv(filters, chosen["BN"]),)

    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        if tile is not None:
            _kernel[grid](**arguments, **tile.settings)
            return
        types = [None if tensor is None else tensor.dtype for tensor in (x, bias, index, places, residual)]
        key = (*(arguments[name] for name in KEY), *types, x.device)
        if key not in _tuned:
            if torch.cuda.is_current_stream_capturing():
                raise KernelError(
                    f"gather_conv2d: the tile for {tuple(x.shape)} -> {tuple(out.shape)} is not chosen yet, and "
                    "nothing can be timed while a CUDA graph is captured; run the model once before the capture"
                )
            _compile_side_by_side(arguments, tiles(pixels, filters, kept, x.dtype))
        _tuned_kernel[grid](**arguments)
        _tuned.add(key)  # not before: what could not be tuned is new the next time, too


def _compile_side_by_side(arguments: dict[str, Any], chosen: Sequence[Tile]) -> None:
    """Compile the kernel for several tiles at once, each on a core: one alone takes about a second."""
    if not hasattr(triton, "AsyncCompileMode"):  # since Triton 3.4
        return
    with ThreadPoolExecutor(min(len(chosen), os.cpu_count() or 1)) as pool, triton.AsyncCompileMode(pool):
        for tile in chosen:
            _kernel.warmup(**arguments, grid=(1,), **tile.settings)


def _precision(dtype: torch.dtype) -> str:
    """How `tl.dot` shall multiply float32: as cuDNN is told to."""
    if dtype != torch.float32:
        return "ieee"
    settings = getattr(torch.backends.cudnn, "conv", None)  # since torch 2.9, which refuses to mix both interfaces
    allowed = torch.backends.cudnn.allow_tf32 if settings is None else settings.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def _power_of_two_from(number: int) -> int:
    """The least power of two that is not below a number."""
    return 1 << max(0, number - 1).bit_length()


def _unit(*numbers: int) -> int:
    """The largest power of two, up to 16, that divides all numbers: how far loads of such strides can be vectors."""
    return math.gcd(16, *numbers)


# --- the kernel -----------------------------------------------------------------------------------------------------

# What the best tile depends on, beside the types of the operands.
KEY = ("pixel_class", "filters", "KEPT", "groups", "KH", "KW", "SH", "SW", "DH", "DW", "BLOCK", "PRECISION")
_tuned: set[tuple[Any, ...]] = set()

if triton is not None:

    @triton.jit(do_not_specialize=["pixel_class"])  # type: ignore[untyped-decorator]  # Triton is untyped
    def _kernel(  # type: ignore[no-untyped-def]  # annotations would be read by Triton as types of its own
        x, weight, bias, index, places, residual, out,
        pixels, height, width, out_height, out_width, channels, filters, groups,
        weight_o, weight_k, weight_h, weight_w, pixel_class,
        KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
        DH: tl.constexpr, DW: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr, MINIMUM: tl.constexpr,
        MAXIMUM: tl.constexpr, CHANNELS_UNIT: tl.constexpr, FILTERS_UNIT: tl.constexpr, UNIT_O: tl.constexpr,
        UNIT_K: tl.constexpr, UNIT_H: tl.constexpr, UNIT_W: tl.constexpr,
        WIDE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ):  # fmt: skip
        # Triton knows of an argument whether 16 divides it; 8 is what 16-byte loads of 2-byte types need. Rounding to a
        # unit changes nothing and tells it so.
        channels = channels // CHANNELS_UNIT * CHANNELS_UNIT
        filters = filters // FILTERS_UNIT * FILTERS_UNIT
        weight_o = weight_o // UNIT_O * UNIT_O
        weight_k = weight_k // UNIT_K * UNIT_K
        weight_h = weight_h // UNIT_H * UNIT_H
        weight_w = weight_w // UNIT_W * UNIT_W

        # Neighbouring programs read the same pixels for other filters, and find them in the L2 cache.
        strips = tl.cdiv(filters, BN)
        program = tl.program_id(0)
        group = program % (groups * strips) // strips
        strip = program % strips
        first = program // (groups * strips)
        if WIDE:
            first = first.to(tl.int64)
        pixel = first * BM + tl.arange(0, BM)
        exists = pixel < pixels
        column = pixel % out_width * SW - PW
        row = pixel // out_width % out_height * SH - PH
        image = pixel // (out_width * out_height)
        member = strip * BN + tl.arange(0, BN)  # number of a filter within its group
        filter = group * filters + member
        if WIDE:
            filter = filter.to(tl.int64)

        total = tl.zeros((BM, BN), dtype=tl.float32)
        steps: tl.constexpr = (KEPT + BK - 1) // BK
        for step in range(KH * KW * steps):
            tap = step // steps
            start = step % steps * BK
            k = start + tl.arange(0, BK)
            if BLOCK >= BK:  # the whole step lies in one run
                channel = tl.multiple_of(tl.load(index + group * KEPT + start).to(tl.int32), BK) + tl.arange(0, BK)
            elif BLOCK > 1:
                run = tl.load(index + group * KEPT + k // BLOCK * BLOCK, mask=k < KEPT, other=0).to(tl.int32)
                channel = tl.max_contiguous(tl.multiple_of(run + k % BLOCK, BLOCK), BLOCK)
            else:
                channel = tl.load(index + group * KEPT + k, mask=k < KEPT, other=0).to(tl.int32)
            y = row + tap // KW * DH
            z = column + tap % KW * DW
            inside = exists & (y >= 0) & (y < height) & (z >= 0) & (z < width)
            offset = ((image * height + y) * width + z) * channels
            a = tl.load(x + offset[:, None] + channel[None, :], mask=inside[:, None] & (k < KEPT)[None, :], other=0.0)
            offset = tap // KW * weight_h + tap % KW * weight_w + k[:, None] * weight_k + filter[None, :] * weight_o
            b = tl.load(weight + offset, mask=(k < KEPT)[:, None] & (member < filters)[None, :], other=0.0)
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            total = tl.dot(a, b, total, input_precision=PRECISION)

        if bias is not None:
            total += tl.load(bias + filter, mask=member < filters, other=0.0).to(tl.float32)[None, :]
        target = filter
        if places is not None:
            target = tl.load(places + filter, mask=member < filters, other=0).to(filter.dtype)
        offset = pixel[:, None] * (groups * filters) + target[None, :]
        valid = exists[:, None] & (member < filters)[None, :]
        if residual is not None:
            total += tl.load(residual + offset, mask=valid, other=0.0).to(tl.float32)
        # Not tl.maximum, which makes a number of NaN; torch.relu and torch.clamp keep it.
        if MINIMUM is not None:
            total = tl.where(total < MINIMUM, MINIMUM, total)
        if MAXIMUM is not None:
            total = tl.where(total > MAXIMUM, MAXIMUM, total)
        tl.store(out + offset, total.to(out.dtype.element_ty), mask=valid)

    def _worthwhile(configs: list[Any], named: dict[str, Any], **arguments: Any) -> list[Any]:
        """The configurations of `tiles` for the arguments of a call."""
        given = {**named, **arguments}
        chosen = tiles(given["pixels"], given["filters"], given["KEPT"], given["x"].dtype)
        return [c for c in configs if Tile(c.kwargs["BM"], c.kwargs["BN"], c.kwargs["BK"], c.num_stages) in chosen]

    def _kernel_milliseconds(call: Callable[[], object], quantiles: Sequence[float]) -> Any:
        """Times of a call replayed from a CUDA graph: of the kernel alone, without the launch from Python."""
        return triton.testing.do_bench_cudagraph(call, rep=TUNING_MILLISECONDS, quantiles=quantiles)

    def _known_to(function: Callable[..., object], **options: Any) -> dict[str, Any]:
        """Those of the options that this version of the function has."""
        return {name: value for name, value in options.items() if name in inspect.signature(function).parameters}

    _tuned_kernel = triton.autotune(
        [
            triton.Config({"BM": BM, "BN": BN, "BK": BK}, num_warps=WARPS, num_stages=STAGES)
            for BM in (64, 128)
            for BN in (16, 32, 64, 128)
            for BK in (16, 32, 64)
        ],
        key=list(KEY),
        prune_configs_by={"early_config_prune": _worthwhile},
        **_known_to(
            triton.autotune,
            cache_results=True,  # on disk beside the compiled kernels (since Triton 3.4)
            do_bench=_kernel_milliseconds,
        ),
    )(_kernel)
