"""A convolution with everything around it that can be done in the same sweep over memory. For inference only."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FusedConv2d(nn.Module):
    """`clamp(scatter(conv2d(x[:, index])) + residual, minimum, maximum)`: gather, grouped convolution, order of the
    output channels, residual add and activation. This is the plain form, which runs everywhere; the engines of
    `fxprune.inference.engines` compute the same faster.

    Args:
        conv: the convolution, zero padding given as numbers. Its weight `(O, k, kh, kw)` and bias are copied as
            buffers: nothing here learns.
        channels: `C`, the channels of the input.

    Attributes:
        index: `(groups * k,)` int64: the input channels that the groups read, group after group; None for all of them
            in order.
        order: `(O,)` int64: the filter that is written to each output channel; None for all of them in order.
        minimum, maximum: bounds of the result: (0, None) is ReLU, (0, 6) ReLU6, None no bound.
        dense_groups: groups of the convolution before it was pruned, if it was; None otherwise.
    """

    weight: Tensor
    bias: Tensor | None
    index: Tensor | None
    order: Tensor | None

    def __init__(self, conv: nn.Conv2d, channels: int) -> None:
        super().__init__()
        assert not isinstance(conv.padding, str)
        self.channels = channels
        self.out_channels = conv.out_channels
        self.kernel_size = [int(n) for n in conv.kernel_size]
        self.stride = [int(n) for n in conv.stride]
        self.padding = [int(n) for n in conv.padding]
        self.dilation = [int(n) for n in conv.dilation]
        self.groups = conv.groups
        self.minimum: float | None = None
        self.maximum: float | None = None
        self.dense_groups: int | None = None
        self.register_buffer("weight", conv.weight.detach().clone())
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().clone())
        self.register_buffer("index", None)
        self.register_buffer("order", None)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        index, order = self.index, self.order  # TorchScript refines locals, not attributes
        if index is not None:
            x = gather_channels(x, index)
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return finish(y, order, residual, self.minimum, self.maximum)

    def extra_repr(self) -> str:
        parts = [f"{self.channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        parts += [f"groups={self.groups}"] if self.groups > 1 else []
        parts += [f"reads {self.index.numel()} gathered channels"] if self.index is not None else []
        parts += ["reorders its output"] if self.order is not None else []
        return ", ".join(parts)

    def reads(self) -> Tensor:
        """`(groups, k)` int64: the input channels that each group reads."""
        index = torch.arange(self.channels, device=self.weight.device) if self.index is None else self.index
        return index.reshape(self.groups, -1)

    def result_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of the result for an input of a shape `(N, C, H, W)`."""
        pixels = [
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, padding, dilation, stride in zip(
                shape[2:], self.kernel_size, self.padding, self.dilation, self.stride, strict=True
            )
        ]
        return (shape[0], self.out_channels, *pixels)

    def copy(self) -> "FusedConv2d":
        """A copy that shares no tensors with this one."""
        return copy.deepcopy(self)

    def dense(self) -> "FusedConv2d":
        """The same function as one convolution with `dense_groups` groups, without gathers: what the layer was before
        it was pruned, with zeros for what is gone.
        """
        groups = self.dense_groups or 1
        filters, channels = self.out_channels // groups, self.channels // groups
        order = torch.arange(self.out_channels, device=self.weight.device) if self.order is None else self.order
        weight = self.weight.new_zeros(self.out_channels, channels, *self.kernel_size)
        columns = self.reads().repeat_interleave(self.out_channels // self.groups, dim=0)[order]
        rows = torch.arange(self.out_channels, device=weight.device)
        columns = columns - (rows // filters * channels)[:, None]
        weight.index_put_((rows[:, None], columns), self.weight[order], accumulate=True)
        plain = self.copy()
        plain.groups, plain.weight, plain.index, plain.order = groups, weight, None, None
        if self.bias is not None:
            plain.bias = self.bias[order]
        return plain


def gather_channels(x: Tensor, index: Tensor) -> Tensor:
    """`x.index_select(1, index)` in the memory format of `x` `(N, C, H, W)`; the operator itself loses channels_last,
    and whoever reads the result has to convert it.
    """
    if x.is_contiguous():
        return x.index_select(1, index)
    return x.permute(0, 2, 3, 1).index_select(3, index).permute(0, 3, 1, 2)


def finish(
    y: Tensor, order: Tensor | None, residual: Tensor | None, minimum: float | None, maximum: float | None
) -> Tensor:
    """What follows a convolution that does not do it itself: order, residual, bounds. It writes into `y`."""
    if order is not None:
        y = gather_channels(y, order)
    if residual is not None:
        y += residual
    if minimum is not None or maximum is not None:
        y = torch.clamp_(y, minimum, maximum)
    return y
