"""PyTorch's own convolution, gather, add and clamp, one after another: runs everywhere."""

import torch
from torch import Tensor

from fxprune.graph.fused import FusedConv2d
from fxprune.inference.engines.engine import Engine


class LibraryConv2d(Engine):
    """`F.conv2d` with the weight in the memory format of the graph."""

    name = "library"

    def __init__(self, conv: FusedConv2d, memory_format: torch.memory_format) -> None:
        super().__init__(conv, memory_format)
        self.conv = conv.copy()
        self.conv.weight = conv.weight.clone(memory_format=memory_format)

    @classmethod
    def obstacle(cls, conv: FusedConv2d, memory_format: torch.memory_format) -> str:
        return ""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = self.conv(x, residual)
        return y
