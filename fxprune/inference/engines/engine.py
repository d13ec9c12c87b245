"""What an engine is."""

from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from fxprune.errors import AccelerationError
from fxprune.graph.fused import FusedConv2d


class Engine(nn.Module):
    """One fused convolution, made ready for one device, type and memory format.

    Called with the input `(N, C, H, W)` and, if the layer adds one, the residual `(N, O, H', W')`.

    Args:
        conv: what to compute. Its tensors are copied or packed, not shared.
        memory_format: `torch.contiguous_format` or `torch.channels_last`; the format of input and output.
    """

    name: ClassVar[str]

    def __init__(self, conv: FusedConv2d, memory_format: torch.memory_format) -> None:
        super().__init__()

    @classmethod
    def obstacle(cls, conv: FusedConv2d, memory_format: torch.memory_format) -> str:
        """Why this engine cannot compute `conv`; empty if it can."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Refuse to move: packed weights and timed choices are good for one device and type only.

        Raises:
            AccelerationError: `fn` changes device or type.
        """
        for tensor in (*self.parameters(), *self.buffers()):
            probe = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            moved = fn(probe)
            if (moved.device, moved.dtype) != (probe.device, probe.dtype):
                raise AccelerationError(
                    f"this model was accelerated for {probe.dtype} on {probe.device}, and cannot become {moved.dtype} "
                    f"on {moved.device}; move the model that fxprune.compile returned, and accelerate it there"
                )
        return self
