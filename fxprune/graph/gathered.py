"""Convolutions in a user's own module that read, or give, their channels in another order than the code around them
sees.

The class of a layer is changed in place, so that every reference to it (a plain list, several parents) sees the same
object, and its parameters keep their names. What other code sees of it is what it was: `in_channels` counts what it is
given, `weight` and `bias` stand in the order in which filters are given, so that code that checks sizes, scales filters
or folds BatchNorm into them is right. Code that builds a convolution anew would forget the gathers; it needs `groups`,
so there is no such attribute: it fails and says why.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.graph.convolutions import Convolution, channel_dim


class GatheredLayer(nn.Module):
    """What the kinds of gathered layers have in common; mixed into the class of the layer.

    Attributes:
        read_index: which channels of the input the layer reads, in its own order; None if all as they come.
        give_index: at which position of its own result each channel that it gives stands; None if as they come.
        filter_index: which of the filters, as `weight` has them, the layer computes at each position: the inverse of
            `give_index`.
        channel_dim: dimension of the channels, counted from the end.
        computed_groups: number of groups of the convolution between the gathers.
    """

    read_index: Tensor | None
    give_index: Tensor | None
    filter_index: Tensor | None
    channel_dim: int
    computed_groups: int

    def __getattr__(self, name: str) -> Any:
        if name == "groups":
            raise AttributeError(
                f"{type(self).__name__} has gathers that fxprune put into it, and no `groups`: a convolution built "
                "from its attributes would forget them; copy the layer with copy.deepcopy"
            )
        return super().__getattr__(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        base = type(self).__mro__[type(self).__mro__.index(GatheredLayer) + 1]
        return _blank, (base,), self.__dict__

    def extra_repr(self) -> str:
        weight, parts = self.weight, []
        assert isinstance(weight, Tensor)
        if self.read_index is not None:
            parts.append(f"reads {self.read_index.numel()} channels by read_index")
        parts.append(f"gives {weight.shape[0]}{' in the order of give_index' if self.give_index is not None else ''}")
        names = ("kernel_size", "stride", "padding", "computed_groups")
        return ", ".join([*parts, *(f"{name}={getattr(self, name)}" for name in names)])


class _Plain(GatheredLayer):
    """The forward of torch's own convolutions between the gathers. TorchScript compiles it."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        read, filters, give = self.read_index, self.filter_index, self.give_index
        if read is not None:
            input = torch.index_select(input, self.channel_dim, read)
        if filters is not None:
            weight = torch.index_select(weight, 0, filters)
            if bias is not None:
                bias = torch.index_select(bias, 0, filters)
        output = self._conv_forward(input, weight, bias)
        if give is not None:
            output = torch.index_select(output, self.channel_dim, give)
        return output


def _constants(base: type[Convolution]) -> list[str]:
    """What TorchScript looks for."""
    return [*(name for name in base.__constants__ if name != "groups"), "computed_groups", "channel_dim"]


class GatheredConv1d(_Plain, nn.Conv1d):
    """A `Conv1d` with gathers in it."""

    __constants__ = _constants(nn.Conv1d)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,)
        return F.conv1d(input, weight, bias, self.stride, padding, self.dilation, self.computed_groups)


class GatheredConv2d(_Plain, nn.Conv2d):
    """A `Conv2d` with gathers in it."""

    __constants__ = _constants(nn.Conv2d)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        return F.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.computed_groups)


class GatheredConv3d(_Plain, nn.Conv3d):
    """A `Conv3d` with gathers in it."""

    __constants__ = _constants(nn.Conv3d)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0, 0)
        return F.conv3d(input, weight, bias, self.stride, padding, self.dilation, self.computed_groups)


class _Around(GatheredLayer):
    """Gathers around a layer with a forward of its own, which finds its filters in the order in which it computes them
    under their usual names, and `groups`.
    """

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        read, filters, give = self.read_index, self.filter_index, self.give_index
        if read is not None:
            input = torch.index_select(input, self.channel_dim, read)
        within: dict[str, Any] = {"groups": self.computed_groups}
        if filters is not None:
            stored = {name: tensor for name, tensor in self._parameters.items() if tensor is not None}
            within |= {name: torch.index_select(tensor, 0, filters) for name, tensor in stored.items()}
        attributes = vars(self)  # found before parameters
        attributes.update(within)
        try:
            output = super().forward(input, *args, **kwargs)
        finally:
            for name in within:
                del attributes[name]
        return output if give is None else torch.index_select(output, self.channel_dim, give)


_KINDS: dict[type[nn.Module], type[GatheredLayer]] = {
    nn.Conv1d: GatheredConv1d,
    nn.Conv2d: GatheredConv2d,
    nn.Conv3d: GatheredConv3d,
}


def put_gathers_into(layer: nn.Module, read: Tensor | None, give: Tensor | None, channels: int) -> None:
    """Make a convolution read and give its channels through gathers, in place.

    Args:
        layer: a convolution; its weight and groups are those that follow `read`, with filters in the order in which
            they shall be given.
        read: positions of the channels to read, `(A,)`.
        give: position of each given channel in the result of the layer, a permutation `(O,)`; for convolutions that
            are not transposed.
        channels: how many it is given.
    """
    assert isinstance(layer, Convolution)
    attributes = vars(layer)
    attributes["channel_dim"], attributes["computed_groups"] = channel_dim(layer), attributes.pop("groups")
    layer.in_channels = channels
    layer.register_buffer("read_index", read)
    layer.register_buffer("give_index", give)
    layer.register_buffer("filter_index", None if give is None else give.argsort())
    layer.__class__ = gathered_kind(type(layer))  # type: ignore[assignment]  # a subclass of both


def gathered_kind(base: type[nn.Module]) -> type[GatheredLayer]:
    """The class of gathered layers for a class of convolutions, always the same."""
    if base not in _KINDS:
        about = {"__module__": __name__, "__doc__": base.__doc__}
        _KINDS[base] = type(f"Gathered{base.__name__}", (_Around, base), about)
    return _KINDS[base]


def _blank(base: type[nn.Module]) -> GatheredLayer:
    """What unpickling fills."""
    kind = gathered_kind(base)
    return kind.__new__(kind)
