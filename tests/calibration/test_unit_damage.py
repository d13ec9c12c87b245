"""What readers lose with the channels of a space: against least squares by hand, and the order against common sense."""
# nn.Module.__call__ is typed to return Any; each net would need a cast.
# mypy: disable-error-code="no-any-return"

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.calibration.damage import loss_of
from fxprune.calibration.held_out import RIDGES
from fxprune.calibration.survey import measured
from fxprune.calibration.unit_damage import Reader, StiffReader, space_damage
from fxprune.graph.convolutions import Layer
from fxprune.graph.tracing import trace
from fxprune.planning import lossy
from fxprune.plans import eligibility
from fxprune.plans.eligibility import MOST_FEATURES, refittable_linears
from fxprune.plans.masking import masked_copy


class Net(nn.Module):
    """Two readers of what `stem` writes: a convolution and a linear layer, and a classifier of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.reader = nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(8, 5)
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x).relu()
        return self.head(x.mean((2, 3))), self.last(self.reader(x).mean((2, 3)))


def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().double().eval()


def images(count: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64)


def reader_of(model: nn.Module, data: Tensor, name: str) -> Reader:
    graph = trace(model, data).module
    found = measured(graph, [(data,)], [name], lambda _, layer, samples, bounds: Reader.of(layer, samples, bounds))
    reader, share = found[name]
    assert share == 1
    return reader


def test_the_loss_of_a_linear_reader_is_that_of_least_squares_on_the_other_half() -> None:
    model, data = net(), images(2048)
    reader = reader_of(model, data, "head")
    order, losses = space_damage([(reader, np.arange(8))], 8, np.zeros(0, dtype=np.intp))
    assert sorted(order) == list(range(8))
    with torch.no_grad():
        features = model.stem(data).relu().mean((2, 3))
        wanted = model.head(features)
    assert losses[-1] == 0
    assert (np.diff(losses) <= 0).all()
    variance = float(wanted.var(0, correction=0).sum())
    for kept in (1, 4, 6):
        columns = features[:, order[8 - kept :].copy()]
        design = torch.cat([columns, torch.ones(2048, 1, dtype=torch.float64)], 1)
        total = 0.0
        for seen, unseen in ((slice(1024), slice(1024, None)), (slice(1024, None), slice(1024))):
            weights = torch.linalg.lstsq(design[seen], wanted[seen]).solution
            total += float((design[unseen] @ weights - wanted[unseen]).square().mean(0).sum()) / 2
        assert losses[kept - 1] == pytest.approx(loss_of(total / variance), rel=0.02)


def test_a_double_goes_first_although_its_weights_are_the_largest() -> None:
    model, data = net(), images(1024)
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(model.stem, name)[5] = 2 * getattr(model.stem, name)[2]
        model.reader.weight[:, [2, 5]] *= 10
    readers = [(reader_of(model, data, name), np.arange(8)) for name in ("reader", "head")]
    order, losses = space_damage(readers, 8, np.zeros(0, dtype=np.intp))
    assert order[0] in (2, 5)
    assert order[-1] in (2, 5)  # and then the other one is the dearest
    assert losses[6] < 1e-3 < losses[5] / 10


def test_what_is_gone_goes_first_and_counts() -> None:
    readers = [(reader_of(net(), images(), "reader"), np.arange(8))]
    free, _ = space_damage(readers, 8, np.zeros(0, dtype=np.intp))
    dear = free[-2:]
    order, losses = space_damage(readers, 8, dear)
    assert list(order[:2]) == list(dear)
    assert sorted(order) == list(range(8))
    assert losses[5] > space_damage(readers, 8, free[:2])[1][5]


def test_channels_of_other_spaces_stay() -> None:
    reader = reader_of(net(), images(), "reader")
    owner = np.array([0, -1, 1, -1, 2, -1, 3, -1])
    order, losses = space_damage([(reader, owner)], 4, np.zeros(0, dtype=np.intp))
    assert sorted(order) == [0, 1, 2, 3]
    whole = space_damage([(reader, np.arange(8))], 8, np.zeros(0, dtype=np.intp))[1]
    assert losses[0] < whole[0]


def test_where_no_reader_is_known_all_units_matter_alike() -> None:
    order, losses = space_damage([], 4, np.array([1]))
    assert list(order) == [1, 3, 2, 0]
    np.testing.assert_allclose(np.exp(-losses), [0.25, 0.5, 0.75, 1])


def test_what_a_reader_loses_that_no_refit_changes_adds_up() -> None:
    model, data = net(), images(2048)
    graph = trace(model, data).module
    ((reader, _),) = measured(
        graph, [(data,)], ["head"], lambda _, layer, samples, bounds: StiffReader.of(layer, samples, bounds)
    ).values()
    order, losses = space_damage([(reader, np.arange(8))], 8, np.zeros(0, dtype=np.intp))
    with torch.no_grad():
        features = model.stem(data).relu().mean((2, 3))
        variance = float(model.head(features).var(0, correction=0).sum())
        costs = (model.head.weight.square().sum(0) * features.var(0, correction=0) / variance).numpy()
    assert list(order) == list(np.argsort(costs))
    for kept in (2, 6):
        assert losses[kept - 1] == pytest.approx(loss_of(float(costs[order[: 8 - kept]].sum())), rel=1e-3)
    assert space_damage([(reader.weighed(0.5), np.arange(8))], 8, np.zeros(0, dtype=np.intp))[1][4] < losses[4]


class Wide(nn.Module):
    """A linear layer over all positions, which hardly looks at some channels; these are written loudly."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).relu().flatten(1))


def test_a_layer_too_wide_to_be_refitted_still_says_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Wide().eval()
    with torch.no_grad():
        model.stem.weight[:3] *= 4
        model.head.weight.view(4, 8, 64)[:, :3] = 1e-4
    monkeypatch.setattr(eligibility, "MOST_FEATURES", 100)
    assert not refittable_linears(model, trace(model, images().float()))
    options: dict[str, Any] = {"granularity": "filter", "calibration": images().float()}
    assert fxprune.make_plan(model, 3 / 8, **options).removed["stem"].outputs == (0, 1, 2)
    assert fxprune.make_plan(model, 3 / 8, criterion="l2", **options).removed["stem"].outputs != (0, 1, 2)


class Single(nn.Module):
    """All images at once: the linear layer gives no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).relu().mean((0, 2, 3)))


def test_a_linear_layer_without_a_batch_is_read_all_the_same() -> None:
    singles = list(images().float().split(1))  # type: ignore[no-untyped-call]
    plan = fxprune.make_plan(Single().eval(), 0.25, granularity="filter", calibration=singles)
    assert len(plan.removed["stem"].outputs) == 2


def test_few_images_do_not_make_units_look_harmless() -> None:
    """Twelve rows fit anything from eight channels; the other half says what that is worth."""
    model, few = net(), images(12)
    losses = space_damage([(reader_of(model, few, "head"), np.arange(8))], 8, np.zeros(0, dtype=np.intp))[1]
    many = space_damage([(reader_of(model, images(2048), "head"), np.arange(8))], 8, np.zeros(0, dtype=np.intp))[1]
    assert losses[3] > 0.2 * many[3]


def test_an_error_counts_by_the_share_of_a_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = reader_of(net(), images(), "reader")
    whole = space_damage([(reader, np.arange(8))], 8, np.zeros(0, dtype=np.intp))[1]
    part = space_damage([(reader.weighed(0.25), np.arange(8))], 8, np.zeros(0, dtype=np.intp))[1]
    assert 1 - math.exp(-part[3]) == pytest.approx((1 - math.exp(-whole[3])) / 4)


# --- linear layers are refitted too --------------------------------------------------------------------------------


def distance(model: nn.Module, other: nn.Module, data: Tensor) -> float:
    with torch.no_grad():
        return sum(float((a - b).square().sum()) for a, b in zip(model(data), other(data), strict=True))


def test_a_linear_layer_behind_removed_channels_is_refitted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = net(), images(256)
    plan = fxprune.make_plan(model, 0.5, granularity="filter", calibration=data)
    assert plan.criterion == "reconstruction"
    masked = fxprune.mask(model, plan, data)
    assert isinstance(masked, Net)
    assert not torch.equal(masked.head.weight, model.head.weight)
    assert not torch.equal(masked.head.bias, model.head.bias)
    monkeypatch.setattr(lossy, "refittable_linears", lambda *_: {})
    control = fxprune.mask(model, plan, data)
    assert isinstance(control, Net)
    assert torch.equal(control.head.weight, model.head.weight)
    assert (
        distance(model, masked, data)
        < 0.8 * distance(model, control, data)
        < distance(model, masked_copy(model, plan), data)
    )
    fxprune.verify(fxprune.rewrite(masked, plan, data[:2]), masked, data[:2])


class Sequence(nn.Module):
    """Linear layers over the channels of positions, the last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.mix = nn.Linear(8, 5)
        self.norm = nn.BatchNorm1d(64)  # of positions, not of channels

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.mix(self.stem(x).relu().flatten(2).transpose(1, 2)))


def test_a_linear_layer_over_positions_is_refitted_and_a_norm_of_positions_left_alone() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Sequence().double().eval()
    data = images()
    assert set(refittable_linears(model, trace(model, data))) == {"mix"}
    plan = fxprune.make_plan(model, 0.5, granularity="filter", calibration=data)
    masked = fxprune.mask(model, plan, data)
    assert isinstance(masked, Sequence)
    assert torch.equal(masked.norm.running_mean, model.norm.running_mean)  # type: ignore[arg-type]
    with torch.no_grad():
        wanted, bare, refitted = (network(data) for network in (model, masked_copy(model, plan), masked))
    assert float((refitted - wanted).square().sum()) < 0.8 * float((bare - wanted).square().sum())


class Tied(nn.Module):
    """A linear layer whose weight is also read by name, one of a subclass, one that is too wide."""

    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.named = nn.Linear(8, 8)
        self.own = self.Own(8, 8)
        self.wide = nn.Linear(8 * 1024, 2)
        self.plain = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.own(self.named(x.mean((2, 3)))) @ self.named.weight
        return self.plain(y).sum(1) + self.wide(x.flatten(1)).sum(1)


def test_linear_layers_that_cannot_be_solved_anew() -> None:
    model = Tied().eval()
    assert model.wide.in_features > MOST_FEATURES
    assert set(refittable_linears(model, trace(model, torch.zeros(2, 3, 32, 32)))) == {"plain"}


def test_readers_are_measured_once_each_and_by_nobody_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    measured_layers: list[str] = []
    of = Reader.of

    def counting(layer: Layer, *rest: Any) -> Reader:
        measured_layers.append(type(layer).__name__)
        return of(layer, *rest)

    monkeypatch.setattr(Reader, "of", counting)
    fxprune.make_plan(net(), macs=0.5, granularity="filter", calibration=images())
    assert measured_layers == ["Linear", "Conv2d", "Linear"]


def test_the_weakest_pull_suits_many_rows() -> None:
    assert reader_of(net(), images(2048), "head").rows >= 64 * 8
    assert RIDGES[0] < 0.01


def test_a_reader_of_which_all_is_gone_has_lost_all_but_no_more() -> None:
    """Two layers read one half of a space each; the second hardly counts, so its half goes first, to the last unit."""
    model, data = net(), images(1024)
    first = np.array([0, 1, 2, 3, -1, -1, -1, -1])
    second = np.array([4, 5, 6, 7, -1, -1, -1, -1])
    head = reader_of(model, data, "head")
    order, losses = space_damage([(head, first), (head.weighed(0.01), second)], 8, np.zeros(0, dtype=np.intp))
    assert set(order[:4]) == {4, 5, 6, 7}
    assert 0 < losses[3] < 0.01 < losses[0]
    assert np.isfinite(losses).all()
