"""The fused convolution as an operator of PyTorch: gather, grouped conv2d, bias, order of the output channels, residual
and clamp in one step.

`torch.ops.fxprune.gather_conv2d` runs eagerly, under `torch.compile`, `torch.export` and CUDA graphs, and has
gradients. On CUDA it is one Triton kernel (`fxprune.inference.kernels.triton_conv`) for float16, bfloat16 and float32;
for everything else it is the composition of plain operators that defines it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.errors import KernelError
from fxprune.inference.kernels import triton_conv

NAME = "fxprune::gather_conv2d"
# Lengths of aligned runs that kernels make use of. 8 channels of 2 bytes are the 16 bytes of the widest load; with 64 a
# whole step of the kernel reads one run.
BLOCKS = (64, 32, 16, 8, 1)
INDEX_TYPES = (torch.int16, torch.int32, torch.int64)


def gather_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    places: Tensor | None = None,
    residual: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    block: int = 1,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Tensor:
    """`clamp(y + residual, minimum, maximum)`, where `y[:, places] = conv2d(x.index_select(1, index), weight, bias,
    ..., groups)`, fused.

    All tensors live on one device, all but `index` and `places` have one floating type. The gradient is 0 where the
    output is at a bound, as that of ReLU and ReLU6.

    Args:
        x: shape (N, C, H, W), any layout; one other than channels_last is copied first.
        weight: shape (O, kept, kh, kw), any strides; `pack` gives the fastest.
        bias: shape (O,) or none.
        index: channels of `x` that the groups read, kept ones for each, shape (groups * kept,), int16 (the fastest on
            CUDA, see `pack_index`), int32 or int64. On CUDA they are not checked, for that would wait for the device.
        places: the output channel that each filter is written to, all of them once, shape (O,), int32 or int64, or
            none if they are in order: the inverse of `FusedConv2d.order`, taken once and not in every call. On CUDA it
            is not checked.
        residual: added to the convolution, shape of the output, or none.
        stride, padding, dilation: for height and width, as those of `conv2d`; padding is with zeros.
        groups: number of groups, a divisor of O.
        block: `index` consists of runs of so many consecutive channels, each starting at a multiple of it: the
            `aligned_block` of the index, or a smaller one of `BLOCKS`. On CUDA it is not checked.
        minimum, maximum: bounds of the output; 0 and none are ReLU, 0 and 6 ReLU6.

    Returns:
        Shape (N, O, OH, OW), always channels_last.

    Raises:
        KernelError: the arguments do not fit together.

    >>> x, weight = torch.arange(4.0).reshape(1, 4, 1, 1), torch.ones(2, 1, 1, 1)
    >>> gather_conv2d(x, weight, None, torch.tensor([3, 1]), groups=2, maximum=2.5).flatten().tolist()
    [2.5, 1.0]
    >>> gather_conv2d(x, weight, None, torch.tensor([3, 1]), torch.tensor([1, 0]), groups=2).flatten().tolist()
    [1.0, 3.0]
    """
    y: Tensor = torch.ops.fxprune.gather_conv2d(
        x, weight, bias, index, places, residual, stride, padding, dilation, groups, block, minimum, maximum
    )
    return y


def pack(weight: Tensor) -> Tensor:
    """The same weight (O, kept, kh, kw) laid out in memory as the CUDA kernel reads it fastest.

    That is (kh, kw, kept, O), and (kh, kw, O, kept) for float32: tensor cores take TF32 with the summed dimension
    innermost only (PTX ISA, wgmma.mma_async, transpose modifiers), and loads that transpose are 4 bytes wide, not 16.
    """
    if weight.dtype == torch.float32:
        return weight.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def pack_index(index: Tensor, channels: int) -> Tensor:
    """The same index in the type that the CUDA kernel reads fastest: int16, or int32 where that is too short.

    Args:
        index: any shape, integer.
        channels: of the input; each number in the index is below it.
    """
    return index.to(torch.int16 if channels <= 2**15 else torch.int32)


def aligned_block(index: Tensor, kept: int) -> int:
    """The longest of `BLOCKS` of which an index is made, no run reaching from one group into the next.

    Reads the index, which on CUDA waits for the device.

    Args:
        index: shape (groups * kept,), integer.
        kept: channels that each group reads.

    >>> aligned_block(torch.tensor([*range(16, 32), *range(0, 16)]), kept=16)
    16
    >>> aligned_block(torch.tensor([*range(16, 32), *range(1, 17)]), kept=16)
    1
    """
    for block in BLOCKS:
        if kept % block:
            continue
        runs = index.reshape(-1, block)
        starts = runs[:, :1]
        if bool((starts % block == 0).all()) and bool((runs - starts == torch.arange(block, device=runs.device)).all()):
            return block
    return 1


def obstacle(device: torch.device | str) -> str:
    """Why `gather_conv2d` has no kernel of its own on a device and runs as several operators; empty if it has one."""
    return _obstacle(torch.device(device))


@functools.cache
def _obstacle(device: torch.device) -> str:
    return triton_conv.missing(device)


# --- the operator ---------------------------------------------------------------------------------------------------

torch.library.define(
    NAME,
    "(Tensor x, Tensor weight, Tensor? bias, Tensor index, Tensor? places, Tensor? residual, int[2] stride, "
    "int[2] padding, int[2] dilation, int groups, int block, float? minimum, float? maximum) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _out_shape(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, places: Tensor | None, residual: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, block: int,
) -> tuple[int, int, int, int]:  # fmt: skip
    """Shape of the output, once the arguments have been found to fit together by what is known without reading them."""
    if x.dim() != 4 or weight.dim() != 4:
        raise KernelError(
            f"gather_conv2d: input and weight have shapes {tuple(x.shape)} and {tuple(weight.shape)}; pass (N, C, H, "
            "W) and (filters, kept, height, width)"
        )
    filters, kept, kh, kw = weight.shape
    if min(*stride, *dilation, groups) < 1 or min(padding) < 0:
        raise KernelError(
            f"gather_conv2d: stride {list(stride)}, dilation {list(dilation)}, groups {groups}, padding {list(padding)}"
            "; the first three start at 1 and padding at 0"
        )
    if filters % groups or min(filters, kept, kh, kw) < 1:
        raise KernelError(
            f"gather_conv2d: a weight of shape {tuple(weight.shape)} in {groups} groups; it must not be empty, and its "
            f"{filters} filters must divide into the groups"
        )
    if index.dtype not in INDEX_TYPES or index.shape != (groups * kept,):
        raise KernelError(
            f"gather_conv2d: the index has type {index.dtype} and shape {tuple(index.shape)}; {groups} groups of "
            f"{kept} channels need ({groups * kept},) integers, int16, int32 or int64"
        )
    if block not in BLOCKS or kept % block:
        raise KernelError(
            f"gather_conv2d: block is {block}, and a group keeps {kept} channels; use a divisor of them among "
            f"{', '.join(map(str, reversed(BLOCKS)))}"
        )
    out = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    if min(x.shape[2:]) < 1 or min(out) < 1:
        raise KernelError(
            f"gather_conv2d: an image of {x.shape[2]} x {x.shape[3]} is smaller than the kernel of {kh} x {kw} with "
            f"dilation {list(dilation)}, even with padding {list(padding)}; pass larger images"
        )
    shape = (x.shape[0], filters, out[0], out[1])
    if bias is not None and bias.shape != (filters,):
        raise KernelError(f"gather_conv2d: a bias of shape {tuple(bias.shape)} for {filters} filters; pass one each")
    if places is not None and (places.dtype not in (torch.int32, torch.int64) or places.shape != (filters,)):
        raise KernelError(
            f"gather_conv2d: the places have type {places.dtype} and shape {tuple(places.shape)}; {filters} "
            f"filters need ({filters},) integers, int32 or int64"
        )
    if residual is not None and residual.shape != shape:
        raise KernelError(
            f"gather_conv2d: a residual of shape {tuple(residual.shape)} for an output of shape {shape}; pass that"
        )
    floats = {"weight": weight, "bias": bias, "residual": residual}
    for name, tensor in {**floats, "index": index, "places": places}.items():
        if tensor is not None and tensor.device != x.device:
            raise KernelError(f"gather_conv2d: {name} is on {tensor.device}, the input on {x.device}; move one of them")
        if tensor is not None and name in floats and tensor.dtype != x.dtype:
            raise KernelError(f"gather_conv2d: {name} is {tensor.dtype}, the input {x.dtype}; convert one of them")
    return shape


def _composition(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, places: Tensor | None, residual: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, block: int,
    minimum: float | None, maximum: float | None,
) -> Tensor:  # fmt: skip
    _out_shape(x, weight, bias, index, places, residual, stride, padding, dilation, groups, block)
    if block > 1 and index.device.type == "cpu" and aligned_block(index, weight.shape[1]) < block:
        raise KernelError(
            f"gather_conv2d: the index is not made of aligned runs of {block} channels; its block is "
            f"{aligned_block(index, weight.shape[1])}"
        )
    if places is not None and places.device.type == "cpu" and not _is_permutation(places):
        raise KernelError("gather_conv2d: the places do not name each output channel once; pass order.argsort()")
    y = F.conv2d(_gather(x, index), weight, bias, stride, padding, dilation, groups)
    if places is not None:
        y = _gather(y, places.argsort())
    if residual is not None:
        y = y + residual
    if minimum is not None or maximum is not None:
        y = y.clamp(minimum, maximum)
    return y.contiguous(memory_format=torch.channels_last)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """`x.index_select(1, index)`, channels_last."""
    index = index if index.dtype in (torch.int32, torch.int64) else index.int()
    return x.permute(0, 2, 3, 1).index_select(3, index).permute(0, 3, 1, 2)


def _is_permutation(places: Tensor) -> bool:
    return torch.equal(places.sort().values, torch.arange(len(places), dtype=places.dtype))


def _cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, places: Tensor | None, residual: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, block: int,
    minimum: float | None, maximum: float | None,
) -> Tensor:  # fmt: skip
    options = (stride, padding, dilation, groups, block, minimum, maximum)
    if x.dtype not in triton_conv.DTYPES or _obstacle(x.device):
        return _composition(x, weight, bias, index, places, residual, *options)
    y = _fake(x, weight, bias, index, places, residual, *options)
    if y.numel():
        x = x.contiguous(memory_format=torch.channels_last)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        bias, index = None if bias is None else bias.contiguous(), index.contiguous()
        places = None if places is None else places.contiguous()
        triton_conv.convolve(x, weight, bias, index, places, residual, y, *options)
    return y


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, places: Tensor | None, residual: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, block: int,
    minimum: float | None, maximum: float | None,
) -> Tensor:  # fmt: skip
    """An output that nothing has been written to yet."""
    shape = _out_shape(x, weight, bias, index, places, residual, stride, padding, dilation, groups, block)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, index, places, _, ctx.stride, ctx.padding, ctx.dilation, ctx.groups, _, *bounds = inputs
    ctx.minimum, ctx.maximum = bounds
    ctx.bias_shape = None if bias is None else list(bias.shape)
    clamped = ctx.minimum is not None or ctx.maximum is not None
    ctx.save_for_backward(x, weight, index, places, output if clamped else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, index, places, output = ctx.saved_tensors
    if ctx.minimum is not None:
        grad = grad.masked_fill(output <= ctx.minimum, 0.0)
    if ctx.maximum is not None:
        grad = grad.masked_fill(output >= ctx.maximum, 0.0)
    needs_x, needs_weight, needs_bias, _, _, needs_residual = ctx.needs_input_grad[:6]
    of_filters = grad if places is None else _gather(grad, places)
    of_gathered, of_weight, of_bias = torch.ops.aten.convolution_backward(
        of_filters, _gather(x, index), weight, ctx.bias_shape, ctx.stride, ctx.padding, ctx.dilation, False, [0, 0],
        ctx.groups, [needs_x, needs_weight, needs_bias],
    )  # fmt: skip
    of_x = torch.zeros_like(x).index_add(1, index.int(), of_gathered) if needs_x else None
    return of_x, of_weight, of_bias, None, None, grad if needs_residual else None, *[None] * 7


torch.library.impl(NAME, "default", _composition)
torch.library.impl(NAME, "CUDA", _cuda)
torch.library.register_fake(NAME, _fake)
torch.library.register_autograd(NAME, _backward, setup_context=_keep_for_backward)
