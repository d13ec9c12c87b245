"""The two modules a compiled model may contain that torch lacks. Both script, export and go to ONNX."""

import torch
from torch import Tensor, nn


class ChannelGather(nn.Module):
    """Reorder, repeat or drop the channels of a tensor: `y = x.index_select(dim, index)`.

    Args:
        index: positions to read, shape `(A,)`, integer; kept as the int64 buffer `index`.
        in_channels: number of channels of the input.
        dim: the channel dimension of the input; the output has `A` channels there. The passes count it from the end.

    `index_select` and not `x[:, index]`: the latter exports to ONNX as `GatherND` between two transposes.

    >>> ChannelGather(torch.tensor([2, 0]), 3)(torch.arange(3.0).reshape(1, 3, 1, 1)).flatten().tolist()
    [2.0, 0.0]
    """

    index: Tensor
    __jit_unused_properties__ = ("is_identity", "is_permutation")  # for passes, not for TorchScript

    def __init__(self, index: Tensor, in_channels: int, dim: int = 1) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.dim = dim
        self.register_buffer("index", index.to(torch.int64))

    def forward(self, input: Tensor) -> Tensor:
        return torch.index_select(input, self.dim, self.index)

    def extra_repr(self) -> str:
        return f"{self.in_channels} -> {self.index.numel()} channels, dim={self.dim}"

    @property
    def is_permutation(self) -> bool:
        """Whether every channel is read exactly once."""
        return self.index.numel() == self.in_channels and bool(
            (self.index.bincount(minlength=self.in_channels) == 1).all()
        )

    @property
    def is_identity(self) -> bool:
        """Whether the output is the input."""
        return self.index.numel() == self.in_channels and torch.equal(
            self.index, torch.arange(self.in_channels, device=self.index.device)
        )


class TrainingFlag(nn.Module):
    """Return `self.training`, so that a traced call such as `F.dropout(x, training=...)` follows `.train()` and
    `.eval()`.
    """

    def forward(self) -> bool:
        return self.training
