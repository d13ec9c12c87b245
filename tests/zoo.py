"""The zoo: tiny nets, one per feature of a graph that a channel rewrite can get wrong.

Most nets share a frame, so that only the feature differs: a stem 3 -> 16, the feature, a 1x1 head to 10 channels that
keeps the positions (a pooled head would hide what happens in space). The class docstring says why the net is here;
the decorator `feature` declares what the compiler must reach on it.
"""
# nn.Module.__call__ is typed to return Any, and some methods of Tensor not at all; each net would need a cast.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import StochasticDepth

Inputs = tuple[Tensor, ...]
N = TypeVar("N", bound=nn.Module)

# Fragments of the reasons for which a convolution stays dense.
FEW_IN = "too few input channels"
FEW_OUT = "too few filters"
GROUPED = "grouped already"
DEPTHWISE = "depthwise already"
STEM = {"stem": FEW_IN}
FRAME = {**STEM, "head": FEW_OUT}


@dataclass(frozen=True)
class Case:
    """One net of the zoo and what the compiler must reach on it.

    Attributes:
        name: the class name of the net.
        build: makes the net, in training mode, with torch's own initialisation.
        inputs: makes the example inputs: float64, batch of 2, the same at every call.
        grouped: how many `Conv2d` modules must be grouped at ratio 0.5, in either form.
        gathers: how many `ChannelGather` must remain at ratio 0.5 in partition form; None where not declared.
        skipped: every other `Conv2d` by module name, with a fragment of the reason for which it stays dense.
        integer: whether the net maps small integers to exactly representable numbers in evaluation mode.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    grouped: int
    gathers: int | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)
    integer: bool = False


_cases: list[Case] = []


def image() -> Inputs:
    """One batch of RGB images, (2, 3, 8, 8)."""
    return (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64),)


def feature_map() -> Inputs:
    """One feature map that is wide enough for an eligible convolution to read it, (2, 16, 8, 8)."""
    return (torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64),)


def image_and_feature_map() -> Inputs:
    """An image (2, 3, 8, 8) and a feature map (2, 16, 8, 8)."""
    return image() + feature_map()


def feature(
    grouped: int,
    *,
    gathers: int | None = None,
    skipped: Mapping[str, str] = FRAME,
    also_skipped: Mapping[str, str] | None = None,
    integer: bool = False,
    inputs: Callable[[], Inputs] = image,
) -> Callable[[type[N]], type[N]]:
    """Enter a net into `CASES`; `also_skipped` adds to the stem and the head of the frame."""

    def enter(net: type[N]) -> type[N]:
        left_dense = {**skipped, **(also_skipped or {})}
        _cases.append(Case(net.__name__, net, inputs, grouped, gathers, left_dense, integer))
        return net

    return enter


def conv3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution with bias that keeps the image size at stride 1."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1)


class Net(nn.Module):
    """The frame: stem 3 -> 16, `body` 16 -> `width`, head `width` -> 10."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = conv3(3, 16)
        self.head = nn.Conv2d(width, 10, 1)

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x).relu()))


class Between(Net):
    """The frame with `feature` between two convolutions: 16 -> `wide`, feature, `inner` -> 16."""

    def __init__(self, inner: int = 32, wide: int = 32) -> None:
        super().__init__()
        self.first = conv3(16, wide)
        self.second = conv3(inner, 16)

    def feature(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def body(self, x: Tensor) -> Tensor:
        return self.second(self.feature(self.first(x)))


# --- convolutions of every kind -------------------------------------------------------------------------------------


@feature(grouped=2, gathers=1, integer=True)
class Plain(Between):
    """Conv, BatchNorm, ReLU, conv: the base line."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(32)

    def feature(self, x: Tensor) -> Tensor:
        return self.norm(x).relu()


@feature(grouped=2, gathers=1, integer=True)
class NoNorm(Between):
    """Bias and ReLU only: the bias must follow its filter."""

    def feature(self, x: Tensor) -> Tensor:
        return x.relu()


@feature(grouped=2, gathers=1, integer=True)
class NoBias(Between):
    """A convolution whose bias is None."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(16, 32, 3, padding=1, bias=False)

    def feature(self, x: Tensor) -> Tensor:
        return x.relu()


@feature(grouped=3, gathers=2, integer=True)
class Pointwise(Net):
    """1x1 convolutions, wide inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(16, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 1, bias=False), nn.ReLU(), nn.Conv2d(64, 16, 1)
        )

    def body(self, x: Tensor) -> Tensor:
        return self.layers(x)


@feature(grouped=3, gathers=2, integer=True)
class StridedAndDilated(Net):
    """Stride, dilation and a rectangular kernel must survive the change of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.dilated = nn.Conv2d(32, 32, 3, padding=2, dilation=2)
        self.rectangular = nn.Conv2d(32, 16, (1, 5), stride=(1, 2), padding=(0, 2))

    def body(self, x: Tensor) -> Tensor:
        return self.rectangular(self.dilated(self.strided(x).relu()).relu())


@feature(grouped=3, gathers=2, integer=True)
class PaddingModes(Net):
    """padding_mode reflect, circular and padding='same': torch pads in the forward of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.reflect = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")
        self.circular = nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular")
        self.same = nn.Conv2d(16, 16, (3, 5), padding="same")

    def body(self, x: Tensor) -> Tensor:
        return self.same(self.circular(self.reflect(x).relu()).relu())


@feature(grouped=2, gathers=1, also_skipped={"spare": "never calls it"}, integer=True)
class UnusedConv(Between):
    """A convolution that the module owns but never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = conv3(32, 32)

    def feature(self, x: Tensor) -> Tensor:
        return x.relu()


@feature(grouped=1, gathers=0, also_skipped={"first": "17 filters"}, integer=True)
class PrimeWidth(Net):
    """17 filters form no equal groups in either form; 17 channels form none in partition form."""

    def __init__(self) -> None:
        super().__init__()
        self.first = conv3(16, 17)
        self.narrow = nn.Linear(17, 16)
        self.second = conv3(16, 16)

    def body(self, x: Tensor) -> Tensor:
        return self.second(self.narrow(self.first(x).relu().movedim(1, -1)).movedim(-1, 1))


@feature(grouped=2, gathers=2, also_skipped={"middle": GROUPED}, integer=True)
class GroupedConv(Between):
    """The user's own grouped convolution, 1 < groups < channels: an order is free only inside a group."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Conv2d(32, 32, 3, padding=1, groups=4)

    def feature(self, x: Tensor) -> Tensor:
        return self.middle(x.relu()).relu()


@feature(grouped=2, gathers=1, also_skipped={"depthwise": DEPTHWISE}, integer=True)
class Depthwise(Between):
    """A depthwise convolution passes the order of channels through."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)

    def feature(self, x: Tensor) -> Tensor:
        return self.depthwise(x).relu()


@feature(grouped=2, gathers=1, also_skipped={"depthwise": DEPTHWISE}, integer=True)
class DepthwiseMultiplier(Between):
    """Depthwise with two filters per channel: each channel becomes a pair that moves together."""

    def __init__(self) -> None:
        super().__init__(inner=64)
        self.depthwise = nn.Conv2d(32, 64, 3, padding=1, groups=32)

    def feature(self, x: Tensor) -> Tensor:
        return self.depthwise(x.relu())


@feature(grouped=3, gathers=2, integer=True)
class TransposedConv(Between):
    """ConvTranspose2d keeps its input channels in dimension 0 of the weight, grouped or not."""

    def __init__(self) -> None:
        super().__init__(inner=24)
        self.up = nn.ConvTranspose2d(32, 24, 2, stride=2)

    def feature(self, x: Tensor) -> Tensor:
        return self.up(x.relu())


@feature(grouped=2, gathers=2, also_skipped={"up": GROUPED}, integer=True)
class TransposedGroupedConv(Between):
    """ConvTranspose2d with groups=2."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(32, 32, 2, stride=2, groups=2)

    def feature(self, x: Tensor) -> Tensor:
        return self.up(x.relu()).relu()


@feature(grouped=2, gathers=1, also_skipped={"up": DEPTHWISE}, integer=True)
class TransposedDepthwise(Between):
    """A depthwise ConvTranspose2d, as networks for segmentation enlarge: it passes the order of channels through."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(32, 32, 4, stride=2, padding=1, groups=32)

    def feature(self, x: Tensor) -> Tensor:
        return self.up(x.relu())


@feature(grouped=2, gathers=2, also_skipped={"normed": "parametri"})
class WeightNorm(Between):
    """A parametrised weight is computed from others at every call: nothing can be stored in it."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = weight_norm(conv3(32, 32))

    def feature(self, x: Tensor) -> Tensor:
        return self.normed(x.relu()).relu()


class StandardizedConv2d(nn.Conv2d):
    """Weight standardisation: the forward does not use the stored weight as it is."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding)


@feature(grouped=2, gathers=2, also_skipped={"standardized": "StandardizedConv2d"})
class ConvSubclass(Between):
    """A subclass of Conv2d with its own forward: pruned kernels would not be zero kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.standardized = StandardizedConv2d(32, 32, 3, padding=1)

    def feature(self, x: Tensor) -> Tensor:
        return self.standardized(x.relu()).relu()


@feature(grouped=2, gathers=2, integer=True)
class FunctionalConv(Between):
    """F.conv2d on a parameter: a convolution without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32, 3, 3))

    def feature(self, x: Tensor) -> Tensor:
        return F.conv2d(x.relu(), self.weight, padding=1).relu()


@feature(grouped=3, gathers=2, integer=True)
class Conv1dOverPixels(Between):
    """Conv1d on the flattened image reads the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(32, 32, 3, padding=1)

    def feature(self, x: Tensor) -> Tensor:
        return self.line(x.flatten(2).relu()).relu().unflatten(2, (8, 8))


def sequence() -> Inputs:
    """One batch of sequences, (2, 3, 16)."""
    return (torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64),)


def volume() -> Inputs:
    """One batch of volumes, (2, 3, 4, 6, 6)."""
    return (torch.randn(2, 3, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64),)


@feature(grouped=4, gathers=4, integer=True, inputs=sequence)
class OverSequences(nn.Module):
    """Conv1d, BatchNorm1d and ConvTranspose1d with stride, dilation and output padding, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 16, 3, padding=1)
        self.first, self.norm = nn.Conv1d(16, 32, 3, padding=2, dilation=2, bias=False), nn.BatchNorm1d(32)
        self.second = nn.Conv1d(32, 32, 3, padding="same", padding_mode="circular")
        self.down = nn.Conv1d(32, 16, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose1d(16, 32, 3, stride=2, padding=2, output_padding=1, dilation=2)
        self.head = nn.Conv1d(32, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.norm(self.first(self.stem(x).relu())).relu()
        deep = self.second(wide) + wide
        return self.head(self.up(self.down(deep).relu()).relu())


@feature(grouped=4, gathers=4, integer=True, inputs=volume)
class OverVolumes(nn.Module):
    """Conv3d, BatchNorm3d and ConvTranspose3d, a residual and pooling over volumes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 16, 3, padding=1)
        self.first, self.norm = nn.Conv3d(16, 32, (1, 3, 3), padding=(0, 1, 1), bias=False), nn.BatchNorm3d(32)
        self.second = nn.Conv3d(32, 32, (3, 1, 1), padding=(1, 0, 0))
        self.down = nn.Conv3d(32, 16, 1)
        self.up = nn.ConvTranspose3d(16, 32, 2, stride=2)
        self.head = nn.Conv3d(32, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.norm(self.first(self.stem(x).relu())).relu()
        deep = F.max_pool3d(self.second(wide) + wide, 2)
        return self.head(self.up(self.down(deep).relu()).relu())


# --- modules and parameters used more than once ---------------------------------------------------------------------


@feature(grouped=2, gathers=2, integer=True)
class SharedConvTwoInputs(Net):
    """One convolution at two sites with different inputs, whose results are added."""

    def __init__(self) -> None:
        super().__init__()
        self.other = conv3(16, 16)
        self.shared = conv3(16, 16)

    def body(self, x: Tensor) -> Tensor:
        return self.shared(x) + self.shared(self.other(x).relu())


@feature(grouped=1, gathers=1, integer=True)
class SharedConvInARow(Net):
    """The same convolution twice in a row: its outputs are its own inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = conv3(16, 16)

    def body(self, x: Tensor) -> Tensor:
        return self.shared(self.shared(x).relu()).relu()


@feature(grouped=3, gathers=3, integer=True)
class SharedConvTwoReaders(Net):
    """One convolution at two sites whose results different convolutions read."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = conv3(16, 32)
        self.left = conv3(32, 16)
        self.right = conv3(32, 16)

    def body(self, x: Tensor) -> Tensor:
        return self.left(self.shared(x).relu()) + self.right(self.shared(-x).relu())


@feature(grouped=1, gathers=0, also_skipped={"first": "shares its weight", "second": "shares its weight"}, integer=True)
class TiedWeights(Net):
    """Two convolution modules that own one weight: pruning one must not change the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = conv3(16, 16)
        self.second = conv3(16, 16)
        self.second.weight = self.first.weight
        self.third = conv3(16, 16)

    def body(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).relu()).relu())


@feature(grouped=3, gathers=3, integer=True)
class SharedNorm(Net):
    """One BatchNorm after two convolutions: both must leave in one order."""

    def __init__(self) -> None:
        super().__init__()
        self.left = conv3(16, 32)
        self.right = conv3(16, 32)
        self.norm = nn.BatchNorm2d(32)
        self.last = conv3(32, 16)

    def body(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.left(x)).relu() - self.norm(self.right(x)).relu())


@feature(grouped=3, gathers=3, integer=True)
class SharedPReLU(Net):
    """One per-channel PReLU on values of two unrelated convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.left = conv3(16, 16)
        self.right = conv3(16, 16)
        self.prelu = nn.PReLU(16)
        self.last = conv3(32, 16)

    def body(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.prelu(self.left(x)), self.prelu(self.right(x))], 1))


@feature(grouped=4, gathers=3, integer=True)
class ModuleLoop(Net):
    """A loop over a ModuleList with two lists walked together."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv3(16, 16) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(4))

    def body(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x)).relu()
        return x


# --- joins ----------------------------------------------------------------------------------------------------------


@feature(grouped=2, gathers=2, integer=True)
class ResidualAdd(Net):
    """The basic block: the second convolution must leave in the order of the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv3(16, 32)
        self.norm1 = nn.BatchNorm2d(32)
        self.conv2 = conv3(32, 16)
        self.norm2 = nn.BatchNorm2d(16)

    def body(self, x: Tensor) -> Tensor:
        return (x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()


@feature(grouped=1, gathers=1, integer=True)
class ResidualSharedConv(Net):
    """A residual add around one convolution that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv3(16, 16)

    def body(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu()
        return y + self.conv(y)


@feature(grouped=17, gathers=24)  # its sums outgrow exact integers
class ResidualChain(Net):
    """Eight blocks on one stream: sixteen convolutions and one order."""

    def __init__(self) -> None:
        super().__init__(width=32)
        self.widen = nn.Conv2d(16, 32, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(32, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 1)) for _ in range(8)
        )

    def body(self, x: Tensor) -> Tensor:
        x = self.widen(x)
        for block in self.blocks:
            x = x + block(x)
        return x


@feature(grouped=4, gathers=4, integer=True)
class Downsample(Net):
    """The strided block with a projection on its shortcut, and a reader behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv3(16, 32, stride=2)
        self.conv2 = conv3(32, 32)
        self.project = nn.Conv2d(16, 32, 1, stride=2, bias=False)
        self.last = conv3(32, 16)

    def body(self, x: Tensor) -> Tensor:
        return self.last((self.conv2(self.conv1(x).relu()) + self.project(x)).relu())


@feature(grouped=2, gathers=2, integer=True)
class InPlaceAdd(Net):
    """`x += y` on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = conv3(16, 16)
        self.second = conv3(16, 16)

    def body(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y += self.second(x).relu()
        return y


@feature(grouped=3, gathers=3, integer=True)
class Arithmetic(Net):
    """Differences, products and scalars on either side of a join."""

    def __init__(self) -> None:
        super().__init__()
        self.left = conv3(16, 32)
        self.right = conv3(16, 32)
        self.last = conv3(32, 16)

    def body(self, x: Tensor) -> Tensor:
        left, right = self.left(x), self.right(x)
        return self.last(torch.sub(2 * left, right, alpha=3) * (1 - right.abs()))


@feature(grouped=3, gathers=3, integer=True)
class MaximumAndWhere(Net):
    """torch.maximum and torch.where join their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.left = conv3(16, 32)
        self.right = conv3(16, 32)
        self.last = conv3(32, 16)

    def body(self, x: Tensor) -> Tensor:
        left, right = self.left(x), self.right(x)
        return self.last(torch.maximum(left, right) + torch.where(left > 0, right, 2 * left))


@feature(grouped=3, gathers=2, integer=True)
class Concat(Net):
    """Concatenation of two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.left = conv3(16, 16)
        self.right = conv3(16, 24)
        self.last = conv3(40, 16)

    def body(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.left(x).relu(), self.right(x)], dim=1))


@feature(grouped=5, gathers=6, integer=True)
class AddOfConcats(Net):
    """The sum of two different concatenations: their seams do not meet."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv3(16, 16)
        self.b = conv3(16, 32)
        self.c = conv3(16, 24)
        self.d = conv3(16, 24)
        self.last = conv3(48, 16)

    def body(self, x: Tensor) -> Tensor:
        left = torch.cat([self.a(x), self.b(x)], 1)
        right = torch.cat([self.c(x), self.d(x)], 1)
        return self.last((left + right).relu())


@feature(grouped=2, gathers=1, integer=True)
class ConcatWithRelu(Between):
    """cat([x, relu(x)]): a channel and its rectified copy are two channels of one source."""

    def __init__(self) -> None:
        super().__init__(inner=64)

    def feature(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.relu()], 1)


@feature(grouped=3, gathers=2, integer=True)
class DenseBlock(Net):
    """Each layer reads the concatenation of all before it through a BatchNorm of its own."""

    def __init__(self) -> None:
        super().__init__(width=64)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), conv3(width, 16)) for width in (16, 32, 48)
        )

    def body(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


@feature(grouped=6, gathers=5, integer=True)
class UNet(Net):
    """Encoder, ConvTranspose decoder, skip connection by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.encode1 = conv3(16, 16)
        self.encode2 = conv3(16, 32)
        self.bottom = conv3(32, 32)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.decode1 = conv3(32, 16)
        self.decode2 = conv3(16, 16)

    def body(self, x: Tensor) -> Tensor:
        skip = self.encode1(x).relu()
        deep = self.bottom(self.encode2(F.max_pool2d(skip, 2)).relu()).relu()
        return self.decode2(self.decode1(torch.cat([self.up(deep), skip], 1)).relu())


@feature(grouped=5, gathers=6, integer=True)
class HighAndLowResolution(Net):
    """HRNet: two resolutions exchange by strided convolutions and upsampled 1x1 ones."""

    def __init__(self) -> None:
        super().__init__(width=48)
        self.high = conv3(16, 16)
        self.low = conv3(16, 32, stride=2)
        self.low_to_high = nn.Conv2d(32, 16, 1)
        self.high_to_low = conv3(16, 32, stride=2)
        self.mix = nn.Conv2d(32, 32, 1)

    def body(self, x: Tensor) -> Tensor:
        high, low = self.high(x).relu(), self.low(x).relu()
        fused_high = (high + F.interpolate(self.low_to_high(low), scale_factor=2.0)).relu()
        fused_low = (low + self.high_to_low(high)).relu()
        return torch.cat([fused_high, F.interpolate(self.mix(fused_low), size=x.shape[2:])], 1)


@feature(grouped=3, gathers=3, integer=True)
class StackAndSum(Net):
    """Branches stacked on a new dimension and summed over it."""

    def __init__(self) -> None:
        super().__init__()
        self.left = conv3(16, 32)
        self.right = conv3(16, 32)
        self.last = conv3(32, 16)

    def body(self, x: Tensor) -> Tensor:
        return self.last(torch.stack([self.left(x), self.right(x)], dim=1).sum(dim=1).relu())


@feature(grouped=3, gathers=3)
class SelectiveKernel(Net):
    """Branches stacked, weighted by a softmax over the branches, summed (SKNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.left = conv3(16, 32)
        self.right = conv3(16, 32)
        self.select = nn.Linear(32, 64)
        self.last = conv3(32, 16)

    def body(self, x: Tensor) -> Tensor:
        branches = torch.stack([self.left(x), self.right(x)], 1)
        weights = self.select(branches.sum(1).mean((2, 3))).view(-1, 2, 32, 1, 1).softmax(1)
        return self.last((branches * weights).sum(1))


# --- slices and movement of channels --------------------------------------------------------------------------------


@feature(grouped=4, gathers=3, integer=True)
class Chunk(Net):
    """Two halves of one convolution with different readers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = conv3(16, 32)
        self.left = conv3(16, 16)
        self.right = conv3(16, 16)
        self.last = conv3(16, 16)

    def body(self, x: Tensor) -> Tensor:
        left, right = self.first(x).chunk(2, 1)
        return self.last((self.left(left) - self.right(right)).relu())


@feature(grouped=4, gathers=3, integer=True)
class C2f(Net):
    """YOLOv8: chunk, a chain on the second half, everything concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(16, 32, 1)
        self.chain = nn.ModuleList(conv3(16, 16) for _ in range(2))
        self.leave = nn.Conv2d(64, 16, 1)

    def body(self, x: Tensor) -> Tensor:
        passed, changed = self.enter(x).relu().chunk(2, dim=1)
        parts = [passed, changed]
        for conv in self.chain:
            parts.append(conv(parts[-1]).relu())
        return self.leave(torch.cat(parts, dim=1))


@feature(grouped=2, gathers=2, integer=True)
class Slice(Between):
    """x[:, :8] is treated otherwise than x[:, 8:]."""

    def feature(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :8].relu(), x[:, 8:]], 1)


@feature(grouped=2, gathers=2, integer=True)
class SteppedSlice(Between):
    """x[:, ::2] and a negative start: slices that do not cut at one place."""

    def __init__(self) -> None:
        super().__init__(inner=28)

    def feature(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, ::2].relu(), x[:, -12:]], 1)


@feature(grouped=3, gathers=2, integer=True)
class UnevenSplit(Net):
    """split with sizes 8 and 24: only the larger part meets an eligible convolution."""

    def __init__(self) -> None:
        super().__init__(width=24)
        self.first = conv3(16, 32)
        self.inner = conv3(24, 24)
        self.last = conv3(32, 24)

    def body(self, x: Tensor) -> Tensor:
        small, large = self.first(x).split([8, 24], dim=1)
        return self.last(torch.cat([self.inner(large).relu(), small], 1))


@feature(grouped=2, gathers=1, integer=True)
class Unbind(Between):
    """unbind over a dimension that a view has cut out of the channels."""

    def __init__(self) -> None:
        super().__init__(inner=16)

    def feature(self, x: Tensor) -> Tensor:
        left, right = x.unflatten(1, (2, 16)).unbind(1)
        return left.relu() - right


@feature(grouped=2, gathers=2)
class GatedHalves(Between):
    """cat([a.relu(), b.sigmoid()]) after chunk: the halves may be shuffled, never exchanged."""

    def feature(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return torch.cat([left.relu(), right.sigmoid()], 1)


@feature(grouped=2, gathers=1)
class GatedLinearUnit(Between):
    """F.glu multiplies one half by the gate of the other."""

    def __init__(self) -> None:
        super().__init__(inner=16)

    def feature(self, x: Tensor) -> Tensor:
        return F.glu(x, dim=1)


@feature(grouped=2, gathers=2, integer=True)
class HalvesRolledApart(Between):
    """One half rolls left, the other right: equal operators, different functions."""

    def feature(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return torch.cat([torch.roll(x[:, :half], 1, 3), torch.roll(x[:, half:], -1, 3)], 1)


@feature(grouped=4, gathers=3, also_skipped={"narrow": FEW_IN}, integer=True)
class Res2NetChain(Net):
    """Chunks of one convolution enter a chain one after another: each has its own role."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(16, 72, 1)
        self.steps = nn.ModuleList(conv3(16, 16) for _ in range(2))
        self.narrow = nn.Conv2d(8, 8, 1)
        self.leave = nn.Conv2d(72, 16, 1)

    def body(self, x: Tensor) -> Tensor:
        parts = torch.split(self.enter(x).relu(), 16, dim=1)
        states = [parts[0], parts[1]]
        for i, conv in enumerate(self.steps):
            states.append(conv(states[-1] + parts[2 + i]).relu())
        return self.leave(torch.cat([*states, self.narrow(parts[4])], 1))


@feature(grouped=2, gathers=1, integer=True)
class ChannelShuffle(Between):
    """View, transpose, reshape with the sizes read from the value."""

    def feature(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.relu().reshape(b, 4, c // 4, h, w).transpose(1, 2).reshape(b, c, h, w)


@feature(grouped=2, gathers=0, integer=True)
class ChannelShuffleModule(Between):
    """torch's own nn.ChannelShuffle; it hands each group of the reader as many channels of each group of the writer as
    the plan asks for, so that orders inside the groups suffice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shuffle = nn.ChannelShuffle(2)

    def feature(self, x: Tensor) -> Tensor:
        return self.shuffle(x.relu())


@feature(grouped=2, gathers=2, integer=True)
class ShuffledTwins(Between):
    """cat([x, x]) shuffled so that the twins land at an odd distance."""

    def __init__(self) -> None:
        super().__init__(inner=64)

    def feature(self, x: Tensor) -> Tensor:
        twins = torch.cat([x, x], 1)
        return torch.cat([twins[:, 5:], twins[:, :5].relu()], 1).unflatten(1, (4, 16)).transpose(1, 2).flatten(1, 2)


@feature(grouped=3, gathers=2, also_skipped={"depthwise": DEPTHWISE}, integer=True)
class ShuffleNetUnit(Net):
    """ShuffleNet v2: one half passes, the other is transformed, both are shuffled; then again by the reader."""

    def __init__(self) -> None:
        super().__init__(width=32)
        self.widen = nn.Conv2d(16, 32, 1)
        self.expand = nn.Conv2d(16, 16, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm2 = nn.BatchNorm2d(16)
        self.project = nn.Conv2d(16, 16, 1)

    def body(self, x: Tensor) -> Tensor:
        passed, changed = self.widen(x).chunk(2, dim=1)
        changed = self.norm2(self.depthwise(self.norm1(self.expand(changed)).relu()))
        out = torch.cat((passed, self.project(changed).relu()), dim=1)
        b, c, h, w = out.size()
        return out.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)


@feature(grouped=2, gathers=2, integer=True)
class PixelShuffle(Between):
    """Four channels become one of twice the size."""

    def __init__(self) -> None:
        super().__init__(inner=16, wide=64)
        self.shuffle = nn.PixelShuffle(2)

    def feature(self, x: Tensor) -> Tensor:
        return self.shuffle(x.relu())


@feature(grouped=2, gathers=1, integer=True)
class PixelUnshuffle(Between):
    """One channel becomes four of half the size."""

    def __init__(self) -> None:
        super().__init__(inner=128)

    def feature(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x.relu(), 2)


@feature(grouped=1, gathers=0, also_skipped={"focus": FEW_IN}, integer=True)
class Focus(Net):
    """YOLOv5: four phases of the image concatenated; then a slice in space."""

    def __init__(self) -> None:
        super().__init__()
        self.focus = conv3(12, 16)
        self.last = conv3(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        phases = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        y = self.stem(x).relu()[:, :, ::2, ::2]
        return self.head(self.last(self.focus(torch.cat(phases, 1)).relu() + y))


@feature(grouped=2, gathers=2, integer=True)
class ChannelPad(Net):
    """The CIFAR option-A shortcut: strided slice, zero channels added before and after."""

    def __init__(self) -> None:
        super().__init__(width=32)
        self.conv1 = conv3(16, 32, stride=2)
        self.conv2 = conv3(32, 32)

    def body(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
        return (shortcut + self.conv2(self.conv1(x).relu())).relu()


@feature(grouped=2, gathers=1, integer=True)
class ChannelPadBetween(Between):
    """Zero channels added to a permutable value."""

    def __init__(self) -> None:
        super().__init__(inner=40)

    def feature(self, x: Tensor) -> Tensor:
        return F.pad(x.relu(), (0, 0, 0, 0, 3, 5))


@feature(grouped=2, gathers=2, integer=True)
class ChannelRoll(Between):
    """torch.roll and torch.flip over the channels."""

    def feature(self, x: Tensor) -> Tensor:
        return torch.flip(torch.roll(x, 3, dims=1), [1]).relu() + x


@feature(grouped=2, gathers=2, integer=True)
class ChannelRepeat(Between):
    """repeat and repeat_interleave copy channels in different patterns."""

    def __init__(self) -> None:
        super().__init__(inner=128)

    def feature(self, x: Tensor) -> Tensor:
        return torch.cat([x.repeat(1, 2, 1, 1), x.relu().repeat_interleave(2, dim=1)], 1)


@feature(grouped=2, gathers=2, integer=True)
class OwnIndex(Between):
    """The user's own index_select, with a repeated channel, and an index in square brackets."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__(inner=24)
        self.register_buffer("index", torch.tensor([3, 30, 3, 7, 12, 1, 20, 21, *range(8, 24)]))

    def feature(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.index).relu() + x[:, self.index]


# --- space ----------------------------------------------------------------------------------------------------------


@feature(grouped=4, gathers=3, integer=True)
class Pools(Net):
    """Max, average and adaptive pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv3(16, 16) for _ in range(4))
        self.max = nn.MaxPool2d(3, stride=1, padding=1)
        self.average = nn.AvgPool2d(2)
        self.adaptive = nn.AdaptiveAvgPool2d(2)

    def body(self, x: Tensor) -> Tensor:
        x = self.max(self.convs[0](x))
        x = self.average(self.convs[1](x).relu())
        x = self.convs[3](F.adaptive_max_pool2d(self.convs[2](x), (3, 2)))
        return self.adaptive(F.pad(x, (1, 1, 1, 0)))


@feature(grouped=3, gathers=2)
class Interpolate(Net):
    """Nearest, bilinear and nn.Upsample."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv3(16, 16) for _ in range(3))
        self.up = nn.Upsample(scale_factor=2)

    def body(self, x: Tensor) -> Tensor:
        x = F.interpolate(self.convs[0](x), scale_factor=2.0, mode="nearest")
        x = F.interpolate(self.convs[1](x), size=(5, 5), mode="bilinear", align_corners=False)
        return self.convs[2](self.up(x))


@feature(grouped=2, gathers=1, integer=True)
class SpatialPad(Between):
    """Padding of space by a constant that is not zero, and by a module."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ReflectionPad2d(1)

    def feature(self, x: Tensor) -> Tensor:
        return self.pad(F.pad(x, (1, 0, 2, 1), value=3.0))


class FlatNet(nn.Module):
    """The frame of the nets that end in a linear layer: 16 -> 32 channels at 4x4, `flat`, linear -> 10."""

    def __init__(self, features: int = 32 * 4 * 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.last = conv3(16, 32)
        self.head = nn.Linear(features, 10)

    def flat(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flat(self.last(self.stem(x).relu()).relu()))


@feature(grouped=1, gathers=0, skipped=STEM, integer=True)
class FlattenLinear(FlatNet):
    """Flatten 4x4 to linear: sixteen features a channel."""

    def flat(self, x: Tensor) -> Tensor:
        return torch.flatten(x, 1)


@feature(grouped=1, gathers=0, skipped=STEM, integer=True)
class ViewLinear(FlatNet):
    """x.view(x.size(0), -1), the flatten of older code."""

    def flat(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), -1)


@feature(grouped=1, gathers=0, skipped=STEM, integer=True)
class PermuteFlattenLinear(FlatNet):
    """Channels last, then flatten: the features of a channel lie 32 apart."""

    def flat(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


@feature(grouped=1, gathers=0, skipped=STEM, integer=True)
class PooledLinear(FlatNet):
    """The classification head: global average pooling, flatten, linear."""

    def __init__(self) -> None:
        super().__init__(features=32)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def flat(self, x: Tensor) -> Tensor:
        return torch.flatten(self.pool(x), 1)


@feature(grouped=1, gathers=0, skipped=STEM, integer=True)
class HiddenLinear(FlatNet):
    """Two linear layers behind pooling over the two image dimensions; linear over the last dimension of four."""

    def __init__(self) -> None:
        super().__init__(features=24)
        self.tokens = nn.Linear(32, 32)
        self.hidden = nn.Linear(32, 24)

    def flat(self, x: Tensor) -> Tensor:
        return self.hidden(self.tokens(x.permute(0, 2, 3, 1)).relu().mean((1, 2))).relu()


# --- norms and channel-wise parameters ------------------------------------------------------------------------------


@feature(grouped=2, gathers=1, integer=True)
class PlainBatchNorms(Between):
    """BatchNorm without affine parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(32, affine=False)

    def feature(self, x: Tensor) -> Tensor:
        return self.norm(x).relu()


@feature(grouped=2, gathers=1)
class BatchNormWithoutStatistics(Between):
    """BatchNorm without running statistics uses those of the batch in both modes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(32, track_running_stats=False)

    def feature(self, x: Tensor) -> Tensor:
        return self.norm(x).relu()


@feature(grouped=2, gathers=1, integer=True)
class PreActivation(Between):
    """BatchNorm and ReLU before the convolution, on a value that is also the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(32)

    def feature(self, x: Tensor) -> Tensor:
        return self.norm(x).relu() + x


@feature(grouped=2, gathers=2)
class GroupNorm(Between):
    """GroupNorm(4): an order is free inside each group, and groups may move as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, 32)

    def feature(self, x: Tensor) -> Tensor:
        return self.norm(x).relu()


@feature(grouped=2, gathers=1)
class InstanceNorm(Between):
    """InstanceNorm with affine parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(32, affine=True)

    def feature(self, x: Tensor) -> Tensor:
        return self.norm(x).relu()


@feature(grouped=2, gathers=1)
class PlainInstanceNorm(Between):
    """InstanceNorm as it comes, without parameters: a zero channel stays zero."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(32)

    def feature(self, x: Tensor) -> Tensor:
        return self.norm(x).relu()


@feature(grouped=3, gathers=3, integer=True)
class SegNet(Between):
    """Pooling that also gives indices, by which the result is laid out again."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        self.middle = conv3(32, 32)

    def feature(self, x: Tensor) -> Tensor:
        pooled, indices = self.pool(x.relu())
        return self.unpool(self.middle(pooled).relu(), indices)


@feature(grouped=4, gathers=4, integer=True)
class MaxoutValues(Between):
    """The larger of two branches, read as `.values`."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv3(32, 32), conv3(32, 32)

    def feature(self, x: Tensor) -> Tensor:
        return torch.max(torch.stack([self.left(x.relu()), self.right(x.relu())], 4), 4).values


@feature(grouped=3, gathers=3)
class RecurrentFromZeros(Between):
    """A recurrent cell whose state begins at zero, with its number of channels written into forward."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = conv3(32, 32)

    def feature(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 32, x.shape[2], x.shape[3])
        for _ in range(2):
            state = torch.tanh(self.cell(state) + x)
        return state


@feature(grouped=2, gathers=1, also_skipped={"depthwise": DEPTHWISE})
class ConvNeXtBlock(Between):
    """Depthwise, permute, LayerNorm over channels, two linears, layer scale, permute back, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.norm = nn.LayerNorm(32, eps=1e-6)
        self.expand = nn.Linear(32, 64)
        self.project = nn.Linear(64, 32)
        self.gamma = nn.Parameter(torch.full((32,), 1e-6))

    def feature(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.project(F.gelu(self.expand(y)))).permute(0, 3, 1, 2)


@feature(grouped=2, gathers=1)
class ChannelLayerNorm(Between):
    """LayerNorm2d: a subclass of LayerNorm that permutes inside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = LayerNorm2d(32)

    def feature(self, x: Tensor) -> Tensor:
        return self.norm(x).relu()


@feature(grouped=2, gathers=1)
class ImageLayerNorm(Between):
    """LayerNorm over channels and space: its affine parameters have three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm([32, 8, 8])

    def feature(self, x: Tensor) -> Tensor:
        return self.norm(x).relu()


@feature(grouped=2, gathers=2)
class LocalResponseNorm(Between):
    """LRN reads neighbouring channels: their order counts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LocalResponseNorm(3, alpha=1.0)

    def feature(self, x: Tensor) -> Tensor:
        return self.norm(x)


@feature(grouped=2, gathers=1)
class Normalize(Between):
    """F.normalize over channels, scaled by a per-channel parameter (SSD)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(32))

    def feature(self, x: Tensor) -> Tensor:
        return self.scale.view(1, -1, 1, 1) * F.normalize(x)


@feature(grouped=2, gathers=1, integer=True)
class PReLU(Between):
    """One slope per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.prelu = nn.PReLU(32)

    def feature(self, x: Tensor) -> Tensor:
        return self.prelu(x)


@feature(grouped=2, gathers=1, integer=True)
class PReLUOneSlope(Between):
    """One slope for all channels: nothing to permute."""

    def __init__(self) -> None:
        super().__init__()
        self.prelu = nn.PReLU()

    def feature(self, x: Tensor) -> Tensor:
        return self.prelu(x)


@feature(grouped=2, gathers=2, integer=True)
class LayerScale(Net):
    """A residual branch times a parameter (C, 1, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = conv3(16, 32)
        self.second = conv3(32, 16)
        self.gamma = nn.Parameter(1e-6 * torch.ones(16, 1, 1))

    def body(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu()) * self.gamma


@feature(grouped=2, gathers=1, integer=True)
class PositionEmbedding(Between):
    """A parameter (1, C, H, W) is added, and one (1, 1, H, W) that all channels share."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(1, 32, 8, 8))
        self.common = nn.Parameter(torch.randn(1, 1, 8, 8))

    def feature(self, x: Tensor) -> Tensor:
        return (x + self.own).relu() * self.common


@feature(grouped=3, gathers=3, integer=True)
class SharedScale(Net):
    """One per-channel parameter scales two unrelated values, once through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.left = conv3(16, 16)
        self.right = conv3(16, 16)
        self.scale = nn.Parameter(torch.ones(16))
        self.last = conv3(32, 16)

    def body(self, x: Tensor) -> Tensor:
        left = self.left(x) * self.scale.view(1, 16, 1, 1)
        right = self.right(x) + self.scale[None, :, None, None]
        return self.last(torch.cat([left, right], 1).relu())


@feature(grouped=2, gathers=1, integer=True)
class ChannelBuffer(Between):
    """A per-channel constant in a buffer (ReZero masks, pixel means)."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.randn(32, 1, 1))

    def feature(self, x: Tensor) -> Tensor:
        return (x - self.offset).relu()


# --- activations, dropout, in-place operators -----------------------------------------------------------------------


@feature(grouped=2, gathers=1)
class Sigmoid(Between):
    """f(0) is not 0: pruned is not absent."""

    def feature(self, x: Tensor) -> Tensor:
        return x.sigmoid()


@feature(grouped=4, gathers=3)
class Activations(Net):
    """Modules, functions and methods of the common activations."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv3(16, 16) for _ in range(4))
        self.swish = nn.SiLU(inplace=True)
        self.hard = nn.Hardswish()

    def body(self, x: Tensor) -> Tensor:
        x = self.swish(self.convs[0](x))
        x = F.leaky_relu(self.hard(self.convs[1](x)), 0.1)
        x = torch.clamp(torch.tanh(self.convs[2](x)), min=-0.5)
        return F.gelu(self.convs[3](x))


@feature(grouped=3, gathers=2)
class DropoutModules(Net):
    """Dropout and Dropout2d modules: random in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv3(16, 16) for _ in range(3))
        self.dropout = nn.Dropout(0.3)
        self.dropout2d = nn.Dropout2d(0.3)

    def body(self, x: Tensor) -> Tensor:
        return self.convs[2](self.dropout2d(self.convs[1](self.dropout(self.convs[0](x)).relu())))


@feature(grouped=2, gathers=1)
class FunctionalDropout(Between):
    """F.dropout(x, p, self.training): tracing must not bake the mode in."""

    def feature(self, x: Tensor) -> Tensor:
        return F.dropout(x.relu(), 0.3, self.training)


@feature(grouped=2, gathers=1)
class FunctionalDropoutKeyword(Between):
    """F.dropout2d with training as a keyword."""

    def feature(self, x: Tensor) -> Tensor:
        return F.dropout2d(x.relu(), p=0.3, training=self.training)


@feature(grouped=2, gathers=2)
class StochasticDepthBlock(Net):
    """torchvision's StochasticDepth calls a wrapped function with self.training."""

    def __init__(self) -> None:
        super().__init__()
        self.first = conv3(16, 32)
        self.second = conv3(32, 16)
        self.drop = StochasticDepth(0.5, "row")

    def body(self, x: Tensor) -> Tensor:
        return x + self.drop(self.second(self.first(x).relu()))


class DropPath(nn.Module):
    """Stochastic depth as many repositories write it, with a return that depends on the mode."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.7) / 0.7


@feature(grouped=2, gathers=2)
class DropPathBlock(Net):
    """A user's DropPath: control flow on self.training."""

    def __init__(self) -> None:
        super().__init__()
        self.first = conv3(16, 32)
        self.second = conv3(32, 16)
        self.drop = DropPath()

    def body(self, x: Tensor) -> Tensor:
        return x + self.drop(self.second(self.first(x).relu()))


@feature(grouped=3, gathers=3, integer=True)
class InPlaceReluReadLater(Net):
    """ReLU(inplace=True) on a value that is read again: both readers see the rectified one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = conv3(16, 32)
        self.left = conv3(32, 16)
        self.right = conv3(32, 16)
        self.relu = nn.ReLU(inplace=True)

    def body(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.left(self.relu(y)) + self.right(y)


@feature(grouped=2, gathers=1, integer=True)
class InPlaceFunctionalRelu(Between):
    """F.relu(x, True), the flag given by position, and its argument read again."""

    def feature(self, x: Tensor) -> Tensor:
        return F.relu(x, True) * 2 - x


@feature(grouped=2, gathers=1, integer=True)
class InPlaceUnusedResult(Between):
    """y.mul_(g) whose result nobody uses: dead code only at first sight."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(32, 1, 1))

    def feature(self, x: Tensor) -> Tensor:
        y = x.relu()
        y.mul_(self.gain)
        y.add_(1.0)
        return y


# --- gates ----------------------------------------------------------------------------------------------------------


@feature(grouped=2, gathers=1, also_skipped={"squeeze": FEW_OUT, "excite": FEW_IN})
class SqueezeExcite(Between):
    """SE with 1x1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(32, 8, 1)
        self.excite = nn.Conv2d(8, 32, 1)

    def feature(self, x: Tensor) -> Tensor:
        gate = F.adaptive_avg_pool2d(x, 1)
        return x * self.excite(self.squeeze(gate).relu()).sigmoid()


@feature(grouped=2, gathers=1)
class SqueezeExciteLinear(Between):
    """SE with linear layers, a view and expand_as."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 32), nn.Sigmoid())

    def feature(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        gate = self.gate(x.mean((2, 3)).view(b, c)).view(b, c, 1, 1)
        return x * gate.expand_as(x)


@feature(grouped=4, gathers=4)
class SqueezeExciteWide(Between):
    """SE whose own convolutions are eligible."""

    def __init__(self) -> None:
        super().__init__(inner=64, wide=64)
        self.squeeze = nn.Conv2d(64, 16, 1)
        self.excite = nn.Conv2d(16, 64, 1)

    def feature(self, x: Tensor) -> Tensor:
        return x.mul(self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid())


@feature(grouped=2, gathers=2, also_skipped={"over_channels": FEW_IN})
class EfficientChannelAttention(Between):
    """ECA convolves over neighbouring channels: their order counts."""

    def __init__(self) -> None:
        super().__init__()
        self.over_channels = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def feature(self, x: Tensor) -> Tensor:
        gate = self.over_channels(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1)
        return x * gate.sigmoid()


@feature(grouped=2, gathers=1, also_skipped={"gate": FEW_IN})
class SpatialAttention(Between):
    """CBAM: mean and maximum over channels do not see their order."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(2, 1, 3, padding=1)

    def feature(self, x: Tensor) -> Tensor:
        pooled = torch.cat([torch.mean(x, dim=1, keepdim=True), torch.max(x, dim=1, keepdim=True)[0]], dim=1)
        return x * self.gate(pooled).sigmoid()


@feature(grouped=2, gathers=1, integer=True)
class MaxOverChannels(Between):
    """amax over channels, broadcast back."""

    def feature(self, x: Tensor) -> Tensor:
        return x - x.amax(1, keepdim=True)


@feature(grouped=2, gathers=1)
class SoftmaxOverChannels(Between):
    """softmax over channels permutes with them."""

    def feature(self, x: Tensor) -> Tensor:
        return x.softmax(dim=1)


@feature(grouped=2, gathers=1)
class GlobalResponseNorm(Between):
    """ConvNeXt v2: norms over space, divided by their mean over channels; torch.addcmul with parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(32))
        self.bias = nn.Parameter(torch.zeros(32))

    def feature(self, x: Tensor) -> Tensor:
        size = x.norm(p=2, dim=(2, 3), keepdim=True)
        scaled = x * (size / (size.mean(dim=1, keepdim=True) + 1e-6))
        return x + torch.addcmul(self.bias.view(1, -1, 1, 1), self.weight.view(1, -1, 1, 1), scaled)


@feature(grouped=3, gathers=3, also_skipped={"depthwise": DEPTHWISE}, integer=True)
class InvertedResidual(Net):
    """MobileNet: expand, depthwise, project, add; the reader of the stream comes after."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(16, 64, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(64)
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False)
        self.norm2 = nn.BatchNorm2d(64)
        self.project = nn.Conv2d(64, 16, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(16)
        self.last = conv3(16, 16)

    def body(self, x: Tensor) -> Tensor:
        y = F.relu6(self.norm2(self.depthwise(F.relu6(self.norm1(self.expand(x))))))
        return self.last(x + self.norm3(self.project(y)))


# --- operators that mix channels without a rule, attention ----------------------------------------------------------


@feature(grouped=2, gathers=2, integer=True)
class CumulativeSum(Between):
    """torch.cumsum over channels: an operator that looks element-wise and is not."""

    def feature(self, x: Tensor) -> Tensor:
        return torch.cumsum(x, dim=1)


@feature(grouped=2, gathers=2, integer=True)
class SortOverChannels(Between):
    """torch.sort over channels returns values and indices; the channels keep their weights beside it."""

    def feature(self, x: Tensor) -> Tensor:
        values, order = torch.sort(x, dim=1)
        return values + x * (order % 2)


@feature(grouped=2, gathers=2)
class MatmulAttention(Between):
    """Attention over positions by matmul, from eligible 1x1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(32, 16)
        self.key = nn.Linear(32, 16)

    def feature(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        scores = torch.matmul(self.query(tokens), self.key(tokens).transpose(-2, -1)) * 0.1
        mixed = scores.softmax(dim=-1) @ tokens
        return mixed.transpose(1, 2).reshape(x.shape)


@feature(grouped=5, gathers=8)
class NonLocalBlock(Between):
    """Queries, keys and values by 1x1 convolutions; the channels of query and key are contracted."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Conv2d(32, 16, 1)
        self.key = nn.Conv2d(32, 16, 1)
        self.value = nn.Conv2d(32, 32, 1)

    def feature(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        scores = torch.bmm(self.query(x).flatten(2).transpose(1, 2), self.key(x).flatten(2)) * 0.1
        mixed = torch.bmm(self.value(x).view(b, c, h * w), scores.softmax(-1).transpose(1, 2))
        return x + mixed.view(b, c, h, w)


@feature(grouped=3, gathers=3)
class MultiHeadAttention(Net):
    """Query, key and value cut from one 1x1 convolution into four heads; scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first = conv3(16, 32)
        self.qkv = nn.Conv2d(32, 96, 1)
        self.last = conv3(32, 16)

    def body(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        q, k, v = self.qkv(self.first(x)).reshape(b, 3, 4, 8, h * w).transpose(-2, -1).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.last(mixed.transpose(-2, -1).reshape(b, 32, h, w))


@feature(grouped=2, gathers=2, integer=True)
class Einsum(Between):
    """einsum with a parameter over channels is a linear layer in disguise."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(32, 32))

    def feature(self, x: Tensor) -> Tensor:
        return torch.einsum("bchw,dc->bdhw", x.relu(), self.mixing)


@feature(grouped=2, gathers=2)
class OpaqueAttention(Between):
    """nn.MultiheadAttention is a leaf without a rule, with a tuple as its result."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def feature(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).reshape(x.shape) + x


@feature(grouped=2, gathers=2)
class OpaqueRecurrence(Between):
    """nn.LSTM along the width of the image, as text recognition has it."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(32, 32, batch_first=True)

    def feature(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(x.mean(2).permute(0, 2, 1))
        return x + states.permute(0, 2, 1).unsqueeze(2)


# --- inputs and outputs of the model --------------------------------------------------------------------------------


@feature(grouped=2, gathers=3, skipped={}, integer=True, inputs=feature_map)
class ConvFromInputToOutput(nn.Module):
    """The orders of the model's input and output are the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = conv3(16, 32)
        self.last = conv3(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


@feature(grouped=1, gathers=2, skipped={}, integer=True, inputs=feature_map)
class SingleConv(nn.Module):
    """One convolution is the whole model."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv3(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@feature(grouped=2, gathers=3, skipped=STEM, integer=True, inputs=image_and_feature_map)
class TwoInputs(nn.Module):
    """A second input joins the stream in the user's order."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv3(3, 16)
        self.first = conv3(16, 16)
        self.last = conv3(16, 16)

    def forward(self, image: Tensor, features: Tensor) -> Tensor:
        return self.last((self.first(self.stem(image).relu()) + features).relu())


@feature(grouped=2, gathers=3, integer=True)
class TupleOutput(Net):
    """Logits and the features behind them, as a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.first = conv3(16, 32)
        self.second = conv3(32, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:  # type: ignore[override]  # the point of the net
        shallow = self.first(self.stem(x)).relu()
        deep = self.second(shallow)
        return self.head(deep), [shallow, deep]


@feature(grouped=2, gathers=2, integer=True)
class DictOutput(Net):
    """Features by name, as detection backbones return them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = conv3(16, 32)
        self.second = conv3(32, 16)

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]  # the point of the net
        features = self.second(self.first(self.stem(x)).relu())
        return {"logits": self.head(features), "features": features}


@feature(grouped=2, gathers=1, integer=True)
class DefaultArgument(Between):
    """A forward with a default that is no tensor."""

    def feature(self, x: Tensor) -> Tensor:
        return x.relu()

    def forward(self, x: Tensor, gain: float = 2.0) -> Tensor:
        return super().forward(x) * gain


CASES: tuple[Case, ...] = tuple(_cases)
