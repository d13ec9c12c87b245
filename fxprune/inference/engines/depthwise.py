"""The compiled depthwise convolution of `fxprune.inference.kernels.native`, which costs little to call."""

import torch
from torch import Tensor

from fxprune.graph.fused import FusedConv2d
from fxprune.inference.engines.engine import Engine
from fxprune.inference.kernels import native


class NativeDepthwiseConv2d(native.NativeModule, Engine):
    """`fxprune_native::depthwise_conv2d`, float32 on the CPU, channels_last."""

    name = "depthwise"

    weights: Tensor
    bias: Tensor | None

    def __init__(self, conv: FusedConv2d, memory_format: torch.memory_format) -> None:
        super().__init__(conv, memory_format)
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding
        self.dilation, self.minimum, self.maximum = conv.dilation, conv.minimum, conv.maximum
        self.register_buffer("weights", conv.weight.flatten(1).t().contiguous())
        self.register_buffer("bias", conv.bias)

    @classmethod
    def obstacle(cls, conv: FusedConv2d, memory_format: torch.memory_format) -> str:
        if reason := native.unsuited(conv.weight):
            return reason
        if not conv.groups == conv.channels == conv.out_channels:
            return "it is for one filter a channel"
        if memory_format != torch.channels_last:
            return "it is for channels_last"
        if conv.index is not None or conv.order is not None:
            return "it reads and writes all channels in order"
        return native.obstacle()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.fxprune_native.depthwise_conv2d(
            x, self.weights, self.bias, residual, self.kernel_size, self.stride, self.padding, self.dilation,
            self.minimum, self.maximum,
        )  # fmt: skip
        return y
