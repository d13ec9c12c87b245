"""Where zero stays zero: on tiny nets, which channels may go; and whether those that may not would change something."""
# mypy: disable-error-code="no-any-return, no-untyped-call"

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from removal_harness import Subject, check_removal, drawn, image, prepared, subject
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.models.convnext import LayerNorm2d

from fxprune.channels import removal
from fxprune.errors import PassError
from fxprune.passes import remove_channels

CHANGED = "reads it where zero has become another value"
SEVERAL = "may compute from several channels at once"


class Net(nn.Module):
    """Convolution `a` 3 -> 8, what is tested, convolution `b` -> 4; `given` are modules or parameters that it needs."""

    def __init__(
        self, between: Callable[..., Tensor], given: tuple[nn.Module | Tensor, ...] = (), inner: int = 8
    ) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(inner, 4, 1)
        self.between = between
        self.count = len(given)
        for i, one in enumerate(given):
            if isinstance(one, nn.Module | nn.Parameter):
                setattr(self, f"given{i}", one)
            else:
                self.register_buffer(f"given{i}", one)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x), *(getattr(self, f"given{i}") for i in range(self.count))))


@dataclass(frozen=True)
class Way:
    """What stands between the convolutions.

    Attributes:
        between: what is done to the output of `a`.
        given: makes the modules and parameters that it is called with.
        inner: how many channels it gives.
        units: how many units of `a` there are; where it is not 8, or 0.
        reason: fragment of the reason why none can go; empty if they can.
        harmless: the refusal is cautious: the function would have stayed.
    """

    between: Callable[..., Tensor]
    given: Callable[[], tuple[nn.Module | Tensor, ...]] = tuple
    inner: int = 8
    units: int = 8
    reason: str = ""
    harmless: bool = False

    def net(self) -> nn.Module:
        return prepared(Net(self.between, self.given(), self.inner))


def excited(x: Tensor, squeeze: nn.Module, excite: nn.Module) -> Tensor:
    return x * excite(squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


def unpooled(x: Tensor, pool: nn.Module, unpool: nn.Module) -> Tensor:
    pooled, indices = pool(x)
    return unpool(pooled, indices)


def recurrent(x: Tensor, state: Tensor, conv: nn.Module) -> Tensor:
    for _ in range(2):
        state = torch.tanh(conv(state) + x)
    return state


def tracking(norm: nn.InstanceNorm2d) -> nn.InstanceNorm2d:
    assert norm.running_mean is not None
    norm.running_mean.fill_(0.5)
    return norm


def written_later(x: Tensor, conv: nn.Module) -> Tensor:
    """A value is changed by a sum that it takes part in, and read by its earlier name."""
    before = x.relu()
    before.add_(conv(x).sigmoid())
    return before


def read_after(x: Tensor) -> Tensor:
    y = x.relu()
    y.sigmoid_()
    return y * x + y


def shuffled(x: Tensor) -> Tensor:
    b, c, h, w = x.size()
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


class Frozen(nn.Module):
    """A BatchNorm of buffers, which torch.fx computes with while it traces."""

    weight: Tensor
    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.arange(1.0, 9.0))
        self.register_buffer("bias", torch.arange(1.0, 9.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


def conv(inputs: int = 8, outputs: int = 8, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, groups=groups)


WAYS = {
    # zero stays zero
    "relu": Way(torch.relu),
    "prelu": Way(lambda x, prelu: prelu(x), lambda: (nn.PReLU(8),)),
    "one slope": Way(lambda x, prelu: prelu(x), lambda: (nn.PReLU(),)),
    "batch norm": Way(lambda x, norm: norm(x), lambda: (nn.BatchNorm2d(8),)),
    "batch norm without statistics": Way(lambda x, n: n(x), lambda: (nn.BatchNorm2d(8, track_running_stats=False),)),
    "sigmoid, batch norm": Way(lambda x, norm: norm(x.sigmoid()), lambda: (nn.BatchNorm2d(8),)),
    "buffers": Way(lambda x, w, b: x * w + b, lambda: (torch.arange(1.0, 9.0).view(8, 1, 1), torch.ones(8, 1, 1))),
    "plain batch norm times x": Way(lambda x, n: n(x) * x, lambda: (nn.BatchNorm2d(8, affine=False),)),
    "dropout": Way(lambda x, drop: drop(x), lambda: (nn.Dropout2d(0.5),)),
    "max pool": Way(lambda x: F.max_pool2d(x, 3, 1, 1)),
    "squeeze and excite": Way(excited, lambda: (conv(8, 4), conv(4, 8))),
    "gate of itself": Way(lambda x: x * x.sigmoid()),
    "sum over channels": Way(lambda x: x.sum(1, keepdim=True), inner=1),
    "norm over channels": Way(lambda x: x.norm(p=2, dim=1, keepdim=True), inner=1),
    "mean over positions": Way(lambda x: x.mean((2, 3), keepdim=True)),
    "depthwise with multiplier": Way(lambda x, c: c(x), lambda: (conv(8, 16, 8),), inner=16),
    "transposed, depthwise": Way(lambda x, up: up(x), lambda: (nn.ConvTranspose2d(8, 8, 3, 2, groups=8),)),
    "transposed, depthwise, over volumes": Way(
        lambda x, up: up(x.unflatten(2, (2, 2))).flatten(2, 3), lambda: (nn.ConvTranspose3d(8, 8, 2, 2, groups=8),)
    ),
    "transposed": Way(lambda x, up: up(x), lambda: (nn.ConvTranspose2d(8, 6, 2, 2),), inner=6),
    "constant shuffle": Way(lambda x: x.view(2, 4, 2, 4, 4).transpose(1, 2).contiguous().view(2, 8, 4, 4)),
    "dynamic shuffle": Way(shuffled),
    "shuffle module": Way(lambda x, shuffle: shuffle(x), lambda: (nn.ChannelShuffle(2),)),
    "pixel shuffle": Way(lambda x: F.pixel_shuffle(x, 2), inner=2, units=2),
    "chunk": Way(lambda x: torch.cat([x.chunk(2, 1)[0].relu(), x.chunk(2, 1)[1]], 1)),
    "uneven split, pooled": Way(lambda x: torch.cat([F.max_pool2d(x.split([3, 5], 1)[0], 3, 1, 1), x[:, 3:]], 1)),
    "same tensor twice": Way(lambda x: torch.cat([x, x], 1), inner=16),
    "padded with zero channels": Way(lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)), inner=11),
    "zeros where another is": Way(lambda x, m: torch.where(m, x, 0 * x), lambda: (torch.rand(1, 1, 4, 4) > 0.5,)),
    "sizes of positions": Way(lambda x: x.sum((2, 3), keepdim=True) / x.shape[2]),
    "values of a maximum": Way(lambda x, c: torch.max(torch.stack([x, c(x)], 4), 4).values, lambda: (conv(),)),
    "pooled with indices": Way(lambda x: F.max_pool2d(x.relu(), 2, return_indices=True)[0]),
    "pooled and laid out again": Way(unpooled, lambda: (nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2))),
    "group norm": Way(lambda x, norm: norm(x), lambda: (nn.GroupNorm(2, 8),)),
    "group norm of one group": Way(lambda x, norm: norm(x), lambda: (nn.GroupNorm(1, 8),)),
    "group norm of single channels": Way(lambda x, norm: norm(x), lambda: (nn.GroupNorm(8, 8),)),
    "group norm twice": Way(lambda x, norm, c: norm(c(norm(x).relu())), lambda: (nn.GroupNorm(4, 8), conv())),
    "layer norm": Way(lambda x, norm: norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), lambda: (nn.LayerNorm(8),)),
    "layer norm without shift": Way(
        lambda x, norm: norm(x.movedim(1, -1)).movedim(-1, 1), lambda: (nn.LayerNorm(8, bias=False),)
    ),
    "layer norm of channels first": Way(lambda x, norm: norm(x), lambda: (LayerNorm2d(8),)),
    "rms norm": Way(lambda x, norm: norm(x.movedim(1, -1)).movedim(-1, 1), lambda: (nn.RMSNorm(8, eps=1e-5),)),
    "plain instance norm": Way(lambda x, norm: norm(x), lambda: (nn.InstanceNorm2d(8),)),
    "functional instance norm": Way(F.instance_norm),
    "batch norm of the batch alone": Way(
        lambda x, norm: norm(x), lambda: (nn.BatchNorm2d(8, affine=False, track_running_stats=False),)
    ),
    "state of zeros": Way(lambda x, c: recurrent(x, x.new_zeros(x.shape[0], 8, 4, 4), c), lambda: (conv(),)),
    "state of zeros, listed": Way(
        lambda x, c: recurrent(x, torch.zeros([x.shape[0], 8, 4, 4], dtype=x.dtype), c), lambda: (conv(),)
    ),
    "state like x": Way(lambda x, c: recurrent(x, torch.zeros_like(x), c), lambda: (conv(),)),
    "state as wide as x": Way(lambda x, c: recurrent(x, x.new_zeros(x.shape), c), lambda: (conv(),)),
    "state of ones, multiplied": Way(lambda x: x * x.new_ones(x.shape[0], 8, 4, 4)),
    "joined with zeros": Way(lambda x: torch.cat([x, x.new_zeros(x.shape[0], 2, 4, 4)], 1), inner=10),
    "called twice": Way(lambda x, c: c(c(x).relu()), lambda: (conv(),)),
    # zero becomes something else
    "sigmoid": Way(torch.sigmoid, reason=CHANGED),
    "hardsigmoid": Way(F.hardsigmoid, reason=CHANGED),
    "softplus": Way(F.softplus, reason=CHANGED),
    "added constant": Way(lambda x: x + 1, reason=CHANGED),
    "plain batch norm": Way(lambda x, norm: norm(x), lambda: (nn.BatchNorm2d(8, affine=False),), reason=CHANGED),
    "alpha dropout in training": Way(lambda x, d: d(x), lambda: (nn.AlphaDropout(0.5),), reason=CHANGED),
    "padded with threes": Way(lambda x, pad: pad(x), lambda: (nn.ConstantPad2d(1, 3.0),), reason=CHANGED),
    "one where another is": Way(
        lambda x, m: torch.where(m, x, torch.exp(x)), lambda: (torch.rand(1, 1, 4, 4) > 0.5,), reason=CHANGED
    ),
    "state of zeros, written into": Way(
        lambda x: x + x.new_zeros(x.shape[0], 8, 4, 4).add_(1), reason="combines it with a value whose order is fixed"
    ),
    "state of ones": Way(lambda x: x + x.new_ones(x.shape[0], 8, 4, 4), reason=CHANGED),
    "instance norm with statistics": Way(
        lambda x, norm: norm(x), lambda: (tracking(nn.InstanceNorm2d(8, track_running_stats=True)),), reason=CHANGED
    ),
    "indices as numbers": Way(lambda x: F.max_pool2d(x, 2, return_indices=True)[1].to(x.dtype), reason=CHANGED),
    "index of a maximum": Way(
        lambda x: torch.max(torch.stack([x - 1, x + 1], 4), 4).indices.to(x.dtype), reason=CHANGED
    ),
    "sum of sigmoids": Way(lambda x: x.sigmoid().sum(1, keepdim=True), inner=1, reason=CHANGED),
    "written later": Way(written_later, lambda: (conv(),), reason="changes zero in place, under other readers"),
    "sigmoid in place": Way(read_after, reason="changes zero in place, under other readers"),
    # channels are computed with one another
    "mean over channels": Way(lambda x: x.mean(1, keepdim=True), inner=1, reason=f"mean (mean) {SEVERAL}"),
    "softmax": Way(lambda x: x.softmax(1), reason=f"softmax (softmax) {SEVERAL}"),
    "group norm without scales": Way(
        lambda x, norm: norm(x), lambda: (nn.GroupNorm(2, 8, affine=False),), reason=f"given0 (GroupNorm) {SEVERAL}"
    ),
    "group norm of what is no zero": Way(
        lambda x, norm: norm(x.sigmoid()), lambda: (nn.GroupNorm(2, 8),), reason=CHANGED
    ),
    "layer norm of what is no zero": Way(
        lambda x, norm: norm((x + 1).movedim(1, -1)).movedim(-1, 1), lambda: (nn.LayerNorm(8),), reason=CHANGED
    ),
    "layer norm without scales, multiplied": Way(
        lambda x, norm: norm(x.movedim(1, -1)).movedim(-1, 1) * x,
        lambda: (nn.LayerNorm(8, elementwise_affine=False),),
        reason=f"given0 (LayerNorm) {SEVERAL}",
    ),
    "layer norm over positions as well": Way(
        lambda x, norm: norm(x), lambda: (nn.LayerNorm([8, 4, 4]),), reason=f"given0 (LayerNorm) {SEVERAL}"
    ),
    "rms norm of its own precision": Way(
        lambda x, norm: norm(x.movedim(1, -1)).movedim(-1, 1),
        lambda: (nn.RMSNorm(8),),
        reason=f"given0 (RMSNorm) {SEVERAL}",
    ),
    "transposed with several filters a channel": Way(
        lambda x, up: up(x),
        lambda: (nn.ConvTranspose2d(8, 16, 2, groups=8),),
        inner=16,
        reason="is a grouped convolution",
    ),
    "grouped": Way(lambda x, c: c(x), lambda: (conv(8, 8, 2),), reason="is a grouped convolution, whose groups"),
    "number of channels": Way(
        lambda x: x.sum(1, keepdim=True) / x.shape[1], inner=1, reason="computes with their number"
    ),
    "unpacked number": Way(lambda x: x * x.size()[1] ** 0.5, reason="computes with their number"),
    "frozen batch norm": Way(lambda x, n: n(x), lambda: (Frozen(),)),
    # nothing is known, or nothing can be stored
    "parametrized": Way(lambda x, c: c(x), lambda: (weight_norm(conv()),), reason="has hooks or a parametrized weight"),
    "unknown operator": Way(lambda x: x.cumsum(1), reason="no rule for"),
    "spread in a view": Way(
        lambda x: x.view(2, 2, 4, 4, 4).relu().flatten(1, 2), reason="in a form that cannot lose some", harmless=True
    ),
}

each_way = pytest.mark.parametrize("name", WAYS)


def found_in(way: Way) -> Subject:
    return subject(way.net(), image())


@each_way
def test_channels_go_or_the_reason_is_told(name: str) -> None:
    way = WAYS[name]
    found = found_in(way)
    units = int((found.units.layers["a"].writes >= 0).sum())
    if way.reason:
        assert units == 0
        assert way.reason in found.units.fixed["a"]
    else:
        assert "a" not in found.units.fixed
        assert len(set(found.units.layers["a"].writes.tolist())) == way.units
        for seed in range(2):
            check_removal(found, drawn(found.units, seed))


@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if way.reason and not way.harmless])
def test_control_what_is_refused_would_change_the_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (removal, remove_channels):
        monkeypatch.setattr(module, "irremovable", lambda *_: {})
    found = found_in(WAYS[name])
    if not found.units.count:
        return  # told apart by the analysis itself, whose tests these are not
    with pytest.raises((AssertionError, PassError, RuntimeError, IndexError, AttributeError)):
        check_removal(found, drawn(found.units, 0))
