"""Small networks with the habits of those that people deploy, none of which symbolic tracing takes: six that stand for
libraries, and many that are made to break a recorder.
"""

import collections
import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def block(inputs: int, outputs: int, stride: int = 1, size: int = 3) -> nn.Sequential:
    """Convolution, BatchNorm, rectifier."""
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


# --- six that stand for libraries -------------------------------------------------------------------------------------


class Split(nn.Module):
    """A block that splits its channels in halves of a number that it keeps, and lists what comes of one."""

    def __init__(self, channels: int, by_size: bool) -> None:
        super().__init__()
        self.width, self.by_size = channels // 2, by_size
        self.first, self.last = block(channels, channels, size=1), block(3 * channels // 2, channels, size=1)
        self.inner = nn.ModuleList([block(channels // 2, channels // 2)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        parts = list(y.split((self.width, self.width), 1) if self.by_size else y.chunk(2, 1))
        parts.extend(layer(parts[-1]) for layer in self.inner)
        out: Tensor = self.last(torch.cat(parts, 1))
        return out


class Detector(nn.Module):
    """Layers in a list that read each other's results by number, anchors kept as an attribute, and in training mode
    another kind of result.
    """

    def __init__(self) -> None:
        super().__init__()
        layers = [block(3, 32, 2), Split(32, False), block(32, 64, 2), Split(64, True), nn.Upsample(scale_factor=2)]
        self.layers = nn.ModuleList([*layers, block(96, 32)])
        self.froms: tuple[Any, ...] = (-1, -1, -1, -1, -1, (-1, 1))
        self.heads = nn.ModuleList([nn.Conv2d(64, 21, 1), nn.Conv2d(32, 21, 1)])
        self.anchors = torch.empty(0)
        self.shape: torch.Size | None = None

    def forward(self, x: Tensor) -> Any:
        kept: list[Tensor] = []
        for layer, source in zip(self.layers, self.froms, strict=True):
            x = layer(x if source == -1 else torch.cat([x if s == -1 else kept[s] for s in source], 1))
            kept.append(x)
        levels = [head(kept[i]) for head, i in zip(self.heads, (3, 5), strict=True)]
        if self.training:
            return levels
        if self.shape != x.shape:
            self.shape = x.shape
            self.anchors = torch.cat([torch.arange(f.shape[-1] * f.shape[-2]) for f in levels]).to(x.dtype)
        flat = torch.cat([f.view(len(f), 21, -1) for f in levels], 2)
        boxes, scores = flat[:, :16], flat[:, 16:]
        bins = boxes.view(len(x), 4, 4, -1).transpose(2, 1).softmax(1)
        return torch.cat([bins.sum(2) + self.anchors, scores.sigmoid()], 1), levels


class Output(collections.OrderedDict[str, Any]):
    """A dict whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Classifier(nn.Module):
    """Arguments by name, flags, and results of its own class."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([block(3, 32, 2), block(32, 64, 2), block(64, 64)])
        self.head = nn.Linear(64, 7)

    def forward(
        self, pixel_values: Tensor | None = None, *, hidden: bool = False, labels: Tensor | None = None
    ) -> Output:
        if pixel_values is None:
            raise ValueError("pixel_values, please")
        states: tuple[Tensor, ...] = ()
        x = pixel_values
        for stage in self.stages:
            x = stage(x)
            states = (*states, x) if hidden else states
        logits = self.head(x.mean((2, 3)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return Output({k: v for k, v in {"loss": loss, "logits": logits, "states": states}.items() if v is not None})


class SamePad(nn.Conv2d):
    """A convolution whose forward pads as much as the size of its input asks for."""

    def forward(self, input: Tensor) -> Tensor:
        h, w = input.shape[-2:]
        need = [
            max((math.ceil(n / s) - 1) * s + k - n, 0)
            for n, s, k in zip((h, w), self.stride, self.kernel_size, strict=True)
        ]
        input = F.pad(input, [need[1] // 2, need[1] - need[1] // 2, need[0] // 2, need[0] - need[0] // 2])
        return F.conv2d(input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Padded(nn.Module):
    """A segmentation network with such convolutions, a check of the size, and a result of the size of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = SamePad(3, 32, 3, 2), SamePad(32, 64, 3, 2), SamePad(64, 32, 3)
        self.norm, self.mask = nn.BatchNorm2d(64), nn.Conv2d(32, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 4 or x.shape[-2] % 4:
            raise RuntimeError("sizes must be multiples of 4")
        y = self.c(self.norm(self.b(self.a(x).relu())).relu())
        return F.interpolate(self.mask(y), size=x.shape[-2:], mode="bilinear", align_corners=False)


@dataclasses.dataclass
class Sample:
    """What a step of a diffusion gives."""

    sample: Tensor


class Diffusion(nn.Module):
    """A network that is told a time, which may be a number, and joins what it left out on the way down."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.down, self.middle = nn.Conv2d(3, 32, 3, padding=1), block(32, 64, 2), block(64, 64)
        self.time, self.up, self.out = nn.Linear(16, 64), block(96, 32), nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: Tensor, time: Any, guide: dict[str, Tensor] | None = None, return_dict: bool = True) -> Any:
        if not torch.is_tensor(time):
            time = torch.tensor([time], dtype=x.dtype)
        angles = time.reshape(-1, 1).to(x.dtype) * torch.exp(-torch.arange(8, dtype=x.dtype))
        told = self.time(torch.cat([angles.sin(), angles.cos()], 1))[:, :, None, None]
        first = self.inner(x)
        y = self.middle(self.down(first) + told)
        if guide is not None:
            y = y + guide["added"]
        y = self.out(self.up(torch.cat([F.interpolate(y, scale_factor=2.0), first], 1)))
        return Sample(y) if return_dict else (y,)


class TwoStage(nn.Module):
    """A loop over images of which each gives as many places as its data say, and a second network that looks there."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.score = nn.Sequential(block(3, 32, 2), block(32, 64), block(64, 64)), nn.Conv2d(64, 1, 1)
        self.box = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4))

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        features = self.body(torch.stack(images))
        found = []
        for feature, score in zip(features, self.score(features), strict=True):
            flat = score.flatten()
            places = flat.topk(4 if flat.mean() > 0 else 3).indices
            found.append({"boxes": self.box(feature.flatten(1)[:, places].t()), "scores": flat[places]})
        return found


@dataclasses.dataclass(frozen=True)
class Kind:
    """A network with inputs.

    Attributes:
        make: builds it.
        inputs: its example for a batch and a size.
        grouped: how many convolutions are grouped at ratio 0.5.
        shorter: how many lose filters or input channels.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], Any]
    grouped: int
    shorter: int


def image(batch: int = 2, size: int = 16) -> Tensor:
    """A batch of images, the same in every call."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch * size))


LIBRARIES: dict[str, Kind] = {
    "detector": Kind(Detector, image, 8, 10),
    "classifier": Kind(Classifier, lambda b, n: {"pixel_values": image(b, n), "hidden": True}, 2, 0),
    "padded": Kind(Padded, image, 2, 4),
    "diffusion": Kind(Diffusion, lambda b, n: (image(b, n), 3, {"added": image(b, n // 2)[:, :1]}), 3, 5),
    "two stages": Kind(TwoStage, lambda b, n: (list(image(b, n)),), 2, 3),
}


# --- made to break a recorder -----------------------------------------------------------------------------------------


class Base(nn.Module):
    """Three convolutions and a classifier; what comes between the second and the third is the trap."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fc = block(3, 32), block(32, 64), block(64, 64), nn.Linear(64, 10)
        self.plain = torch.rand(64) + 0.5
        self.register_buffer("mean", torch.zeros(64))
        self.register_buffer("table", torch.rand(64) + 0.5)
        self.scale, self.head = nn.Parameter(torch.rand(1, 64, 1, 1) + 0.5), nn.Conv2d(32, 5, 1)

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Any:
        x = self.middle(self.b(self.a(x)))
        return self.fc(self.c(x).mean((2, 3)))


class PlainAttribute(Base):
    def middle(self, x: Tensor) -> Tensor:
        return x * self.plain.to(x.dtype).view(1, -1, 1, 1)


class BufferScales(Base):
    def middle(self, x: Tensor) -> Tensor:
        return x * self.get_buffer("table").view(1, -1, 1, 1) * self.scale


class ThroughNumpy(Base):
    def middle(self, x: Tensor) -> Tensor:
        weights = torch.from_numpy(x.detach().numpy().mean((0, 2, 3))).to(x.dtype)
        return x * torch.arange(64, dtype=x.dtype).view(1, -1, 1, 1) * weights.view(1, -1, 1, 1)


class SortsChannels(Base):
    def middle(self, x: Tensor) -> Tensor:
        return x[:, x.mean((0, 2, 3)).argsort()]


class MoreInTraining(Base):
    def forward(self, x: Tensor) -> Any:
        first = self.a(x)
        y = self.fc(self.c(self.b(first)).mean((2, 3)))
        return (y, self.head(first)[:, :, ::2], first[:, :7]) if self.training else y


class KeepsResult(Base):
    def middle(self, x: Tensor) -> Tensor:
        self.last = x
        return x


class CallsThrice(Base):
    def forward(self, x: Tensor) -> Any:
        x = self.b(self.a(x))
        y = self.c(x).mean((2, 3)) + self.c(F.max_pool2d(x, 2)).mean((2, 3)) + self.c(x * self.scale).amax((2, 3))
        return self.fc(y)


class WritesItems(Base):
    def middle(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, ::2] = x[:, 1::2]
        y[:, 1::2] += 2 * x[:, ::2]
        return y


class MovingMean(Base):
    def middle(self, x: Tensor) -> Tensor:
        mean = self.get_buffer("mean")
        mean.mul_(0.9).add_(x.detach().mean((0, 2, 3)))
        return x * mean.view(1, -1, 1, 1)


class Cumulated(torch.autograd.Function):
    """A function whose forward is not seen by the torch API."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.cumsum(1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.flip(1).cumsum(1).flip(1)


class OwnFunction(Base):
    def middle(self, x: Tensor) -> Tensor:
        y: Tensor = Cumulated.apply(x)
        return y


class LoopsOverChannels(Base):
    def middle(self, x: Tensor) -> Tensor:
        return torch.stack([channel * i for i, channel in enumerate(x.unbind(1))], 1)


class LoopsOverSamples(Base):
    def middle(self, x: Tensor) -> Tensor:
        total = torch.zeros(())
        for i, sample in enumerate(x):
            total = total + sample * (i + 1)
        return total[None] + x


class BranchesOnData(Base):
    def middle(self, x: Tensor) -> Tensor:
        return x if x[0, 3].mean() > 1e9 else torch.cat([x[:, 32:], x[:, :32]], 1)


class SharesWeight(Base):
    def forward(self, x: Tensor) -> Any:
        x = self.b(self.a(x))
        back = F.conv_transpose2d(self.c[0](x), self.c.get_parameter("0.weight"), padding=1)
        return self.fc((back + x).mean((2, 3)))


class LayersInPlainList(Base):
    def __init__(self) -> None:
        super().__init__()
        self.sequence = [self.a[0], self.a[1], self.b[0], self.c[0]]

    def forward(self, x: Tensor) -> Any:
        for layer in self.sequence:
            x = layer(x)
        return self.fc(x.mean((2, 3)))


class SetsData(Base):
    def middle(self, x: Tensor) -> Tensor:
        x.data = x.data * self.scale.data
        return x


class TreatsHalves(Base):
    def middle(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :40].relu_(), x[:, 40:].sigmoid()], 1)


class Autocast(Base):
    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.b(self.a(x))
        return self.fc(self.c(y.to(x.dtype)).mean((2, 3)))


TRAPS: tuple[type[Base], ...] = (
    PlainAttribute, BufferScales, ThroughNumpy, SortsChannels, MoreInTraining, KeepsResult, CallsThrice, WritesItems,
    MovingMean, OwnFunction, LoopsOverChannels, LoopsOverSamples, BranchesOnData, SharesWeight, LayersInPlainList,
    SetsData, TreatsHalves, Autocast,
)  # fmt: skip


def draw(make: Callable[[], nn.Module]) -> Any:
    """A network in evaluation mode with BatchNorm statistics that are not trivial, the same in every call."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = make()
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
                layer.running_mean.normal_(0, 0.2)
                layer.running_var.uniform_(0.5, 1.5)
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, 0, 0.2)
    return copy.deepcopy(model).eval()
