"""Normalisations over channels of which some are gone, though not from the statistics.

A channel that is zero counts in the mean and variance of a GroupNorm or LayerNorm: without it these would be others.
With n entries of which n' are left, and the others zero,

    mean = sum(x) / n,    var = (sum((x - mean)^2) + (n - n') * mean^2) / n,

sums over what is left, are those of all n. Scale and shift of a channel that is gone are zero, so that nothing is
missing behind the normalisation either.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn


class NormWithZeros(nn.Module):
    """The part that both have: scale, shift, and how many channels the statistics count.

    Args:
        weight: scale of each channel that is left, `(C,)`.
        bias: shift, `(C,)` or None.
        channels: channels that a mean is taken over, with those that are gone.
        eps: added to the variance.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, channels: int, eps: float) -> None:
        super().__init__()
        self.channels = channels
        self.eps = eps
        self.weight = weight
        self.register_parameter("bias", bias)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()} channels left, eps={self.eps}"


class GroupNormWithZeros(NormWithZeros):
    """GroupNorm over `(N, C, *space)`.

    Args:
        group: `(C,)` int64, the group of each channel that is left; the buffer `group`.
        groups: how many there were.
        weight, bias, channels, eps: see `NormWithZeros`; `channels` is of one group.

    >>> norm = GroupNormWithZeros(torch.tensor([0, 1]), 2, nn.Parameter(torch.ones(2)), None, channels=2, eps=0.0)
    >>> norm(torch.tensor([[2.0, 4.0]])).detach()  # the mean of 2 and 0 is 1, and so is their deviation
    tensor([[1., 1.]])
    """

    group: Tensor

    def __init__(
        self,
        group: Tensor,
        groups: int,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        channels: int,
        eps: float,
    ) -> None:
        super().__init__(weight, bias, channels, eps)
        self.groups = groups
        self.register_buffer("group", group)

    def forward(self, input: Tensor) -> Tensor:
        x = _wide(input).reshape(input.shape[0], input.shape[1], -1)  # (N, C, positions)
        positions = x.shape[2]
        count = self.channels * positions
        # Products and sums, and no matrix product: those are rounded to TF32 or half precision where the user says so.
        inside = (torch.arange(self.groups, device=x.device).unsqueeze(1) == self.group).to(x.dtype)  # (groups, C)
        mean = (x.sum(2).unsqueeze(1) * inside).sum(2) / count  # (N, groups)
        spread = x - mean.index_select(1, self.group).unsqueeze(2)
        squares = (spread.square().sum(2).unsqueeze(1) * inside).sum(2)
        missing = (self.channels - inside.sum(1)) * positions
        scale = torch.rsqrt((squares + missing * mean.square()) / count + self.eps).index_select(1, self.group)
        y = spread * (scale * self.weight).unsqueeze(2)
        bias = self.bias
        if bias is not None:
            y = y + bias.unsqueeze(1)
        return y.to(self.weight.dtype).reshape(input.shape)


class LayerNormWithZeros(NormWithZeros):
    """LayerNorm or RMSNorm over the channels at each position.

    Args:
        dim: the dimension of the channels, counted from the end.
        centered: whether the mean is taken off; RMSNorm leaves it.
        weight, bias, channels, eps: see `NormWithZeros`.

    >>> norm = LayerNormWithZeros(-1, True, nn.Parameter(torch.ones(1)), None, channels=2, eps=0.0)
    >>> norm(torch.tensor([[2.0]])).detach()
    tensor([[1.]])
    """

    def __init__(
        self, dim: int, centered: bool, weight: nn.Parameter, bias: nn.Parameter | None, channels: int, eps: float
    ) -> None:
        super().__init__(weight, bias, channels, eps)
        self.dim = dim
        self.centered = centered
        self.shape = [-1] + [1] * (-1 - dim)  # of scale and shift

    def forward(self, input: Tensor) -> Tensor:
        x = _wide(input)
        if self.centered:
            mean = x.sum(self.dim, keepdim=True) / self.channels
            x = x - mean
            squares = x.square().sum(self.dim, keepdim=True)
            squares = squares + (self.channels - x.shape[self.dim]) * mean.square()
        else:
            squares = x.square().sum(self.dim, keepdim=True)
        y = x * torch.rsqrt(squares / self.channels + self.eps) * self.weight.view(self.shape)
        bias = self.bias
        if bias is not None:
            y = y + bias.view(self.shape)
        return y.to(self.weight.dtype)


def _wide(x: Tensor) -> Tensor:
    """At least in single precision, as torch's own take their statistics."""
    if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
        return x.float()
    return x


class NormKind(NamedTuple):
    """How a class normalises: in groups, or at each position along `dim`, the mean taken off or not."""

    dim: int
    grouped: bool = False
    centered: bool = True


# By qualified class name, so that libraries need not be imported.
KINDS: Mapping[str, NormKind] = MappingProxyType(
    {
        "torch.nn.modules.normalization.GroupNorm": NormKind(1, grouped=True),
        "torch.nn.modules.normalization.LayerNorm": NormKind(-1),
        "torch.nn.modules.normalization.RMSNorm": NormKind(-1, centered=False),
        "torchvision.models.convnext.LayerNorm2d": NormKind(-3),
        "timm.layers.norm.GroupNorm": NormKind(1, grouped=True),
        "timm.layers.norm.GroupNorm1": NormKind(1, grouped=True),
        "timm.layers.norm.LayerNorm": NormKind(-1),
        "timm.layers.norm.LayerNorm2d": NormKind(-3),
    }
)


def norm_kind(module: nn.Module) -> NormKind | None:
    """How a normalisation over channels computes, if it can do without channels that are zero: it has one scale for
    each, which is zero for those that go, and its own class or one that it keeps the forward of is known.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not isinstance(getattr(module, "eps", None), float):
        return None
    if "forward" in vars(module):
        return None  # replaced
    if isinstance(module, GroupNormWithZeros):
        return NormKind(1, grouped=True)
    if isinstance(module, LayerNormWithZeros):
        return NormKind(module.dim, centered=module.centered)
    for cls in type(module).__mro__:
        kind = KINDS.get(f"{cls.__module__}.{cls.__qualname__}")
        if kind is not None:
            return kind if getattr(type(module), "forward", None) is getattr(cls, "forward", None) else None
    return None


def with_zeros(norm: nn.Module, kind: NormKind, kept: Tensor, channels: int) -> NormWithZeros:
    """What a normalisation becomes whose parameters have lost entries already.

    Args:
        norm: it; its scale and shift, which hold the channels that are left, are shared with the result.
        kind: what `norm_kind` gave.
        kept: `(C',)` int64, the positions of the channels that are left among those that it had.
        channels: how many it had.
    """
    weight, bias = norm.weight, getattr(norm, "bias", None)
    assert isinstance(weight, nn.Parameter)
    assert bias is None or isinstance(bias, nn.Parameter)
    assert isinstance(norm.eps, float)
    new: NormWithZeros
    if isinstance(norm, NormWithZeros):
        channels = norm.channels
    if not kind.grouped:
        new = LayerNormWithZeros(kind.dim, kind.centered, weight, bias, channels, norm.eps)
    elif isinstance(norm, GroupNormWithZeros):
        group = norm.group[kept.to(norm.group.device)]
        new = GroupNormWithZeros(group, norm.groups, weight, bias, channels, norm.eps)
    else:
        groups = norm.num_groups
        assert isinstance(groups, int)
        size = channels // groups
        new = GroupNormWithZeros((kept // size).to(weight.device), groups, weight, bias, size, norm.eps)
    return new.train(norm.training)
