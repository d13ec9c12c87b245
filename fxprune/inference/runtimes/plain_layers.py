"""A fused convolution as the modules of PyTorch that it is made of.

Compilers and quantizers look for these: TorchInductor makes one call of `nn.Conv2d`, add and `nn.ReLU`, not of a
convolution and a clamp, and the quantizer of torchao finds convolutions by the module that they came from.
"""

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from fxprune.graph.editing import calls
from fxprune.graph.fused import FusedConv2d
from fxprune.inference.runtimes.calls import Flat


class PlainLayers(nn.Module):
    """What `FusedConv2d` computes: `act(order(conv(x[:, index])) + residual)`.

    Args:
        fused: its weights are copied.
    """

    index: Tensor | None
    order: Tensor | None

    def __init__(self, fused: FusedConv2d) -> None:
        super().__init__()
        channels = fused.weight.shape[1] * fused.groups
        kernel, stride, padding, dilation = map(_pair, (fused.kernel_size, fused.stride, fused.padding, fused.dilation))
        self.conv = nn.Conv2d(
            channels, fused.out_channels, kernel, stride, padding, dilation, fused.groups,
            bias=fused.bias is not None, dtype=fused.weight.dtype,
        )  # fmt: skip
        self.conv.weight.data.copy_(fused.weight)
        if self.conv.bias is not None and fused.bias is not None:
            self.conv.bias.data.copy_(fused.bias)
        self.register_buffer("index", fused.index)
        self.register_buffer("order", fused.order)
        self.act = _activation(fused.minimum, fused.maximum)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.index is not None:
            x = x.index_select(1, self.index)
        y: Tensor = self.conv(x)
        if self.order is not None:
            y = y.index_select(1, self.order)
        if residual is not None:
            y = y + residual
        bounded: Tensor = self.act(y)
        return bounded


class _Bounds(nn.Module):
    """One bound, or two in the wrong order, which `nn.Hardtanh` refuses."""

    def __init__(self, minimum: float | None, maximum: float | None) -> None:
        super().__init__()
        self.minimum, self.maximum = minimum, maximum

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(self.minimum, self.maximum)


def in_plain_layers(network: Flat) -> Flat:
    """A copy of a network, without gradients, in which all fused convolutions are plain."""
    plain = copy.deepcopy(network)
    graph = plain.network
    for node, fused in list(calls(graph, FusedConv2d)):
        parent, _, child = str(node.target).rpartition(".")
        setattr(graph.get_submodule(parent), child, PlainLayers(fused))
    return plain.eval().requires_grad_(False)


def _pair(sizes: Sequence[int]) -> tuple[int, int]:
    height, width = sizes
    return height, width


def _activation(minimum: float | None, maximum: float | None) -> nn.Module:
    if minimum is None and maximum is None:
        return nn.Identity()
    if minimum == 0 and maximum is None:
        return nn.ReLU()
    if minimum == 0 and maximum == 6:
        return nn.ReLU6()
    if minimum is not None and maximum is not None and minimum < maximum:
        return nn.Hardtanh(minimum, maximum)
    return _Bounds(minimum, maximum)
