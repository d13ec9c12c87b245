"""The kinds of convolution there are: plain and transposed, over one, two or three dimensions of space.

Who prunes convolutions asks here which modules are some, and how their weights lie: `(O, C, *kernel)` in a plain one,
`(C, O, *kernel)` in a transposed one.
"""

import copy
from typing import TypeAlias

from torch import Tensor, nn

Convolution: TypeAlias = nn.modules.conv._ConvNd
"""`Conv1d`, `Conv2d`, `Conv3d` and their transposed forms, with all subclasses."""

Layer: TypeAlias = Convolution | nn.Linear
"""What reads channels with weights: a linear layer is a convolution whose kernels have no extent."""

PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The classes that are not transposed."""


def convolutions(model: nn.Module) -> dict[str, Convolution]:
    """Every convolution of a model by module path, in model order; one that has several names by the first."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Convolution)}


def conv_at(model: nn.Module, name: str) -> Convolution:
    """The convolution at a module path, which is known to be one."""
    conv = model.get_submodule(name)
    assert isinstance(conv, Convolution)
    return conv


def layer_at(model: nn.Module, name: str) -> Layer:
    """The convolution or linear layer at a module path, which is known to be one."""
    layer = model.get_submodule(name)
    assert isinstance(layer, Layer)
    return layer


def torch_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of torch that a class of convolutions is, or is derived from."""
    return next(base for base in kind.__mro__ if base.__module__ == nn.modules.conv.__name__)


def has_own_forward(kind: type[nn.Module]) -> bool:
    """Whether a class of convolutions computes something around, or in place of, what torch's own does."""
    base = torch_class(kind)
    return any(getattr(kind, name, None) is not getattr(base, name, None) for name in ("forward", "_conv_forward"))


def channel_dim(conv: Convolution) -> int:
    """The dimension of the channels in what a convolution reads and gives, counted from the end, so that an image
    without a batch has it too.
    """
    return -1 - len(conv.kernel_size)


def is_depthwise(conv: Convolution) -> bool:
    """Whether each filter reads one input channel, and the filters of a channel stand side by side in the first
    dimension of the weight.
    """
    return conv.groups == conv.in_channels > 1 and (not conv.transposed or conv.out_channels == conv.in_channels)


def filter_dim(conv: Convolution) -> int:
    """The dimension of the weight that counts filters, inside groups if it is the second."""
    return 1 if conv.transposed and not is_depthwise(conv) else 0


def kernels_of(conv: Layer) -> Tensor:
    """The weight of a convolution of one group as `(O, C, *kernel)`, whatever its kind: a view of it, not detached.
    That of a linear layer is `(O, C)`.
    """
    return oriented(conv.weight, conv)


def oriented(weight: Tensor, conv: Layer) -> Tensor:
    """A tensor that lies as the weight of a convolution does, as `(O, C, *kernel)`, or one of those as the weight does:
    a view. It is its own inverse.
    """
    return weight.transpose(0, 1) if isinstance(conv, Convolution) and conv.transposed else weight


def filters_first(conv: Convolution) -> Convolution:
    """The convolution itself if its weight is `(O, C, *kernel)`; else a stand-in with a view of the weight that is so,
    for functions that look at `conv.weight`.
    """
    if not conv.transposed:
        return conv
    standing = copy.copy(conv)
    standing._parameters = dict(conv._parameters)
    standing.transposed = False
    standing.weight = nn.Parameter(kernels_of(conv).detach(), requires_grad=False)
    return standing
