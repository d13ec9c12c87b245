"""The compiled kernel of `fxprune.inference.kernels.native`: reads any choice of channels at the speed of a dense
convolution.
"""

import torch
from torch import Tensor

from fxprune.graph.fused import FusedConv2d
from fxprune.inference.engines.engine import Engine
from fxprune.inference.kernels import native


class NativeConv2d(native.NativeModule, Engine):
    """`fxprune_native::conv2d`, float32 on the CPU."""

    name = "native"

    weights: Tensor
    bias: Tensor
    panels: Tensor
    index: Tensor
    places: Tensor

    def __init__(self, conv: FusedConv2d, memory_format: torch.memory_format) -> None:
        super().__init__(conv, memory_format)
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding
        self.dilation, self.channels = conv.dilation, conv.channels
        self.minimum, self.maximum = conv.minimum, conv.maximum
        weight, index = native.by_address(conv.weight, conv.reads())
        self.channels_last = memory_format == torch.channels_last
        packed = native.pack(weight, conv.bias, conv.groups, self.channels_last)
        order = torch.arange(conv.out_channels) if conv.order is None else conv.order
        self.register_buffer("weights", packed.weights)
        self.register_buffer("bias", packed.bias)
        self.register_buffer("panels", packed.panels)
        self.register_buffer("index", index.to(torch.int32).contiguous())
        self.register_buffer("places", order.argsort().to(torch.int32))

    @classmethod
    def obstacle(cls, conv: FusedConv2d, memory_format: torch.memory_format) -> str:
        if reason := native.unsuited(conv.weight):
            return reason
        if conv.groups == conv.channels > 1 and memory_format == torch.channels_last:
            return "one filter a group leaves the registers of the compiled kernel empty in channels_last"
        return native.obstacle()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.fxprune_native.conv2d(
            x, self.weights, self.bias, self.panels, self.index, self.places, residual,
            self.kernel_size, self.stride, self.padding, self.dilation, self.channels, self.minimum, self.maximum,
            self.channels_last,
        )  # fmt: skip
        return y
