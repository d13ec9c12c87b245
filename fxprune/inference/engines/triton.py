"""The fused CUDA kernel, `fxprune::gather_conv2d`."""

import torch
from torch import Tensor

from fxprune.graph.fused import FusedConv2d
from fxprune.inference.engines.engine import Engine
from fxprune.inference.kernels import gather_conv


class TritonConv2d(Engine):
    """An implicit GEMM over the channels that each group keeps, channels_last."""

    name = "triton"

    weight: Tensor
    bias: Tensor | None
    index: Tensor
    places: Tensor | None

    def __init__(self, conv: FusedConv2d, memory_format: torch.memory_format) -> None:
        super().__init__(conv, memory_format)
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.minimum, self.maximum = conv.minimum, conv.maximum
        reads = conv.reads().flatten()
        self.block = gather_conv.aligned_block(reads, conv.weight.shape[1])
        self.register_buffer("weight", gather_conv.pack(conv.weight))
        self.register_buffer("bias", conv.bias)
        self.register_buffer("index", gather_conv.pack_index(reads, conv.channels))
        places = None if conv.order is None else conv.order.argsort().to(torch.int32)
        self.register_buffer("places", places)

    @classmethod
    def obstacle(cls, conv: FusedConv2d, memory_format: torch.memory_format) -> str:
        if conv.weight.device.type != "cuda":
            return f"the Triton kernel runs on CUDA, not on {conv.weight.device.type}"
        if memory_format != torch.channels_last:
            return "the Triton kernel is for channels_last"
        if conv.groups == conv.channels > 1:
            return "one channel a group leaves the tiles of the Triton kernel empty"
        if conv.index is None and conv.order is None and conv.groups == 1:
            return "nothing to gather, and cuDNN is as fast: the Triton kernel is for pruned layers"
        return gather_conv.obstacle(conv.weight.device)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.fxprune.gather_conv2d(
            x, self.weight, self.bias, self.index, self.places, residual, self.stride, self.padding, self.dilation,
            self.groups, self.block, self.minimum, self.maximum,
        )  # fmt: skip
        return y
