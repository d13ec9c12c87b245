"""Which filters go: by definition on small cases, within the budget on real shapes, nested, and blind to numbering."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from products_harness import examples
from torch import Tensor, nn
from torch.nn import functional

import fxprune.planning.selection
import fxprune.planning.unit_scores
from fxprune.channels.units import STAYS, ChannelUnits, Chosen, UnitLayer, Units
from fxprune.criteria import CRITERIA, Evidence, Taylor, kernel_scores, resolve
from fxprune.criteria.variety import VARIETIES, Array, Variety, cosine_similarity, elimination_order
from fxprune.errors import PlanError
from fxprune.methods import Labels
from fxprune.planning.requests import Request
from fxprune.planning.selection import FLOOR, _Products, _Steps, _Widths, random_units
from fxprune.planning.unit_scores import unit_scores, varied
from fxprune.plans.shapes import kept_channels
from fxprune.vocabulary import Scope

SCOPES: tuple[Scope, ...] = ("local", "global")


def choose_units(units: ChannelUnits, scores: Array, *, gone: Chosen | None = None, **asked: Any) -> Chosen:
    """What is chosen if this is asked for; any number may stay unless it is said."""
    request = Request(granularity="filter", **{"round_to": 1, **asked})
    return fxprune.planning.selection.choose_units(units, scores, request, gone)


class Shapes:
    """Writes down the units of a network by hand."""

    def __init__(self, **spaces: int) -> None:
        self.sizes = spaces
        ends = np.cumsum(list(spaces.values()))
        self.units = {name: np.arange(end - spaces[name], end) for name, end in zip(spaces, ends, strict=True)}
        self.layers: dict[str, UnitLayer] = {}

    def layer(
        self, name: str, reads: str | int, writes: str | int, taps: int = 9, side: int = 1, prunable: bool = True
    ) -> None:
        """A layer between two spaces, or between numbers of channels that stay."""
        ends = [self.units[end] if isinstance(end, str) else np.full(end, STAYS) for end in (writes, reads)]
        params = len(ends[0]) * len(ends[1]) * taps
        self.layers[name] = UnitLayer(ends[0], ends[1], params * side**2, params, prunable)

    def done(self) -> ChannelUnits:
        sizes = list(self.sizes.values())
        return ChannelUnits(np.repeat(np.arange(len(sizes)), sizes), tuple(self.sizes), self.layers, {})


def vgg16() -> ChannelUnits:
    """VGG-16 for images of 32 x 32: thirteen convolutions, each a space of its own, and a linear layer."""
    widths = [64, 64, 128, 128, 256, 256, 256, *[512] * 6]
    sides = [32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2]
    net = Shapes(**{f"conv{i}": width for i, width in enumerate(widths)})
    for i, side in enumerate(sides):
        net.layer(f"conv{i}", f"conv{i - 1}" if i else 3, f"conv{i}", side=side)
    net.layer("fc", "conv12", 10, taps=1, prunable=False)
    return net.done()


def resnet(blocks: int, width: int = 16) -> ChannelUnits:
    """ResNet for CIFAR with 1x1 shortcuts: three residual streams, and in each block a space of its own."""
    streams = {f"stream{s}": width << s for s in range(3)}
    inner = {f"{s}.{b}.conv1": width << s for s in range(3) for b in range(blocks)}
    net = Shapes(**streams, **inner)
    net.layer("stem", 3, "stream0", side=32)
    for s, b in itertools.product(range(3), range(blocks)):
        entry = f"stream{max(0, s - 1)}" if b == 0 else f"stream{s}"
        net.layer(f"{s}.{b}.conv1", entry, f"{s}.{b}.conv1", side=32 >> s)
        net.layer(f"{s}.{b}.conv2", f"{s}.{b}.conv1", f"stream{s}", side=32 >> s)
        if b == 0 and s:
            net.layer(f"{s}.{b}.shortcut", entry, f"stream{s}", taps=1, side=32 >> s)
    net.layer("fc", "stream2", 10, taps=1, prunable=False)
    return net.done()


NETS = {"vgg16": vgg16(), "resnet20": resnet(3), "resnet56": resnet(9), "resnet18": resnet(2, 64)}


def some_units(seed: int, spaces: int = 3, most: int = 6) -> ChannelUnits:
    """Units of no particular network: layers that write or read any of them, several, or some that stay."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, most + 1, spaces)
    count = int(sizes.sum())
    layers = {}
    for i in range(spaces + 2):
        writes, reads = (generator.integers(-1, count, generator.integers(1, 9)) for _ in range(2))
        macs, params = (int(number) for number in generator.integers(1, 1000, 2))
        layers[f"layer{i}"] = UnitLayer(writes, None if i == 1 else reads, macs, params, prunable=True)
    return ChannelUnits(np.repeat(np.arange(spaces), sizes), tuple(f"space{i}" for i in range(spaces)), layers, {})


def some_scores(units: ChannelUnits, seed: int = 0, tied: bool = False) -> Array:
    scores = np.random.default_rng(seed).random(units.count) + 0.1
    return np.floor(4 * scores) if tied else scores


def sizes_of(units: ChannelUnits) -> Labels:
    return np.bincount(units.space, minlength=len(units.names))


def counts(units: ChannelUnits, removed: Chosen) -> list[int]:
    """How many units of each space are removed."""
    return [int(removed[units.space == space].sum()) for space in range(len(units.names))]


def lowest_first(units: ChannelUnits, scores: Array, space: int) -> list[int]:
    members = np.flatnonzero(units.space == space).tolist()
    return sorted(members, key=lambda unit: (float(scores[unit]), -unit))


def removes_the_lowest(units: ChannelUnits, scores: Array, removed: Chosen) -> bool:
    """Whether no unit of a space stays that should have gone before one that went."""
    return all(
        set(lowest_first(units, scores, space)[:count])
        == set(np.flatnonzero(removed & (units.space == space)).tolist())
        for space, count in enumerate(counts(units, removed))
    )


# --- scores ---------------------------------------------------------------------------------------------------------


class Coupled(nn.Module):
    """`first` and `second` are added, `wide` has two filters for each of its units, `free` filters stay."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(3, 6, 1)
        self.wide = nn.Conv2d(6, 8, 2)
        self.free = nn.Conv2d(8, 5, 1)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.free(self.wide(functional.relu(self.first(x) + self.second(x))))
        return output


def coupled_units() -> ChannelUnits:
    sum_units, wide_units = np.array([3, 0, 1, 5, 4, 2]), np.array([6, 7, 8, 6, 7, 8, STAYS, STAYS])
    stays = np.full(3, STAYS)
    layers = {
        "first": UnitLayer(sum_units, stays, 162, 162, prunable=True),
        "second": UnitLayer(sum_units, stays, 18, 18, prunable=True),
        "wide": UnitLayer(wide_units, sum_units, 192, 192, prunable=True),
        "free": UnitLayer(np.full(5, STAYS), wide_units, 40, 40, prunable=False),
    }
    return ChannelUnits(np.repeat([0, 1], [6, 3]), ("first", "wide"), layers, {"free": "it is the output"})


def per_unit(units: ChannelUnits, filters: Mapping[str, Tensor]) -> list[float]:
    """Sum of the scores of filters over each unit, one by one."""
    totals = [0.0] * units.count
    for name, scores in filters.items():
        for unit, score in zip(units.layers[name].writes.tolist(), scores.tolist(), strict=True):
            if unit != STAYS:
                totals[unit] += score
    return totals


def prunable_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: model.get_parameter(f"{name}.weight").detach().double() for name in ("first", "second", "wide")}


def bound(criterion: object, model: nn.Module, earlier: nn.Module | None = None) -> Array:
    moments = {"first": torch.arange(3.0), "second": torch.ones(3), "wide": torch.arange(6.0)}
    state = None if earlier is None else earlier.state_dict()
    name, score = resolve(criterion, Evidence(model, state, moments))
    return unit_scores(model, coupled_units(), score, name)


def test_scores_of_coupled_filters_add_up() -> None:
    model, units = Coupled(), coupled_units()
    weights = prunable_weights(model)
    norms = {name: weight.abs().sum((1, 2, 3)) for name, weight in weights.items()}
    energies = {name: weight.square().sum((1, 2, 3)) for name, weight in weights.items()}
    np.testing.assert_allclose(bound("l1", model), per_unit(units, norms), rtol=1e-12)
    np.testing.assert_allclose(bound("l2", model), per_unit(units, energies), rtol=1e-12)
    alone = per_unit(units, {name: norms[name] for name in ("first", "wide")})  # control: without the coupled layer
    assert not np.allclose(bound("l1", model), alone)


def test_criteria_with_evidence_at_filter_level() -> None:
    model, earlier, units = Coupled(), Coupled(1), coupled_units()
    weights, before = prunable_weights(model), prunable_weights(earlier)
    moved = {name: (weights[name] - before[name]).abs().sum((1, 2, 3)) for name in weights}
    np.testing.assert_allclose(bound("movement", model, earlier), per_unit(units, moved), rtol=1e-12)
    grown = {name: (weights[name].abs() - before[name].abs()).sum((1, 2, 3)) for name in weights}
    offset = bound("magnitude_increase", model, earlier) - per_unit(units, grown)
    for space in range(2):  # one offset for a space, so its order is that of the signed sums
        assert np.ptp(offset[units.space == space]) < 1e-10
    moments = {"first": torch.arange(3.0), "second": torch.ones(3), "wide": torch.arange(6.0)}
    energy = {
        name: torch.einsum("ocij,c->o", weight.square(), moments[name].double()) for name, weight in weights.items()
    }
    np.testing.assert_allclose(bound("activation", model), per_unit(units, energy), rtol=1e-12)


def test_taylor_is_the_sum_of_the_squared_changes_of_the_loss() -> None:
    model, units = Coupled().double(), coupled_units()
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(4, 3, 5, 5, generator=generator, dtype=torch.float64), torch.zeros(4, 5, 4, 4).double()
    functional.mse_loss(model(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
    expected = {}
    for name, weight in prunable_weights(model).items():
        gradient = model.get_parameter(f"{name}.weight").grad
        assert gradient is not None
        expected[name] = (weight * gradient).square().sum((1, 2, 3))
    np.testing.assert_allclose(
        bound(Taylor(functional.mse_loss, [batch]), model), per_unit(units, expected), rtol=1e-10
    )


def test_random_scores_depend_on_the_seed_only() -> None:
    model, units = Coupled(), coupled_units()
    found = [unit_scores(model, units, CRITERIA["random"].bind(Evidence(seed=seed)), "random") for seed in (0, 0, 1)]
    assert found[0].tolist() == found[1].tolist() != found[2].tolist()


def test_masked_filters_score_zero_whatever_the_criterion() -> None:
    model, earlier = Coupled(), Coupled(1)
    with torch.no_grad():
        for layer, filter in ((model.first, 0), (model.second, 0), (model.wide, 1), (model.wide, 4), (model.first, 2)):
            layer.weight[filter] = 0
    for criterion in CRITERIA:
        scores = bound(criterion, model, earlier)
        assert scores[[3, 7]].tolist() == [0, 0]
        assert (np.delete(scores, [3, 7]) > 0).all()  # unit 1 lost one of its two filters only
    _, score = resolve("movement", Evidence(model, earlier.state_dict()))
    assert kernel_scores("first", model.first, score, "movement")[0].min() > 0  # control: the bare criterion


# --- variety --------------------------------------------------------------------------------------------------------


def twins(seed: int) -> tuple[Array, Labels]:
    """32 filters and their directions: 8 strong ones with three noisy copies of each, and 8 weak ones on their own."""
    generator = np.random.default_rng(seed)
    which = generator.permutation(np.concatenate([np.repeat(np.arange(8), 3), np.arange(8, 16)]))
    filters = generator.standard_normal((16, 64))[which] + 0.1 * generator.standard_normal((32, 64))
    filters[which >= 8] *= 0.3
    return filters, which


def two_layers(filters: Array) -> tuple[nn.Module, ChannelUnits]:
    """Two coupled convolutions that hold half of each filter; the second has the units in the other order."""
    units = len(filters)
    model = nn.ModuleDict({"a": nn.Conv2d(8, units, 2), "b": nn.Conv2d(8, units, 2)})
    halves = filters[:, :32], filters[::-1, 32:].copy()
    for name, half in zip(model, halves, strict=True):
        model.get_parameter(f"{name}.weight").data = torch.from_numpy(half).reshape(units, 8, 2, 2)
    stays = np.full(8, STAYS)
    layers = {
        name: UnitLayer(writes, stays, 1, 1, prunable=True)
        for name, writes in (("a", np.arange(units)), ("b", np.arange(units)[::-1].copy()))
    }
    return model, ChannelUnits(np.zeros(units, np.int64), ("a",), layers, {})


def l2(model: nn.Module, units: ChannelUnits) -> Array:
    return unit_scores(model, units, CRITERIA["l2"].bind(Evidence()), "l2")


@pytest.mark.parametrize("variety", [*VARIETIES.values(), Variety("pairs", threshold=0.5)])
@pytest.mark.parametrize("seed", range(3))
def test_twins_go_and_rare_filters_stay(variety: Variety, seed: int) -> None:
    filters, which = twins(seed)
    model, units = two_layers(filters)
    scores = l2(model, units)
    bare = choose_units(units, scores, ratio=0.5)
    assert set(which[~bare].tolist()) <= set(range(8))  # control: the bare criterion keeps twins only
    reordered, (report,) = varied(model, units, scores, variety, bare)
    kept = ~choose_units(units, reordered, ratio=0.5)
    assert kept.sum() == 16
    assert len(set(which[kept].tolist())) == 16
    assert report.moved == (kept & bare).sum() >= 8
    assert report.before > 0.7
    assert report.after < 0.5


def test_coupled_filters_are_compared_as_one_row() -> None:
    filters = np.random.default_rng(0).standard_normal((12, 64))
    filters[1, :32] = 2 * filters[0, :32]  # alike in one layer, opposite in the other
    filters[1, 32:] = -2 * filters[0, 32:]
    model, units = two_layers(filters)
    scores = l2(model, units)
    pure = VARIETIES["pairs-pure"]
    order = elimination_order(cosine_similarity(filters), scores, pure)
    reordered, _ = varied(model, units, scores, pure, np.zeros(12, np.bool_))
    assert np.argsort(reordered).tolist() == order.tolist()
    alone = replace(units, layers={"a": units.layers["a"]})  # control: one layer of the two
    assert np.argsort(varied(model, alone, scores, pure, np.zeros(12, np.bool_))[0]).tolist() != order.tolist()


def test_all_filters_of_a_unit_are_in_its_row() -> None:
    model, units = Coupled().double(), coupled_units()
    rows = fxprune.planning.unit_scores._rows(model, units, np.array([6, 7, 8]))
    expected = model.wide.weight.detach().flatten(1).numpy()
    energy = np.square(rows).sum()
    assert energy == pytest.approx(np.square(expected[:6]).sum())  # the last two filters stay
    np.testing.assert_allclose(rows @ rows.T, expected[:3] @ expected[:3].T + expected[3:6] @ expected[3:6].T)


@pytest.mark.parametrize("variety", VARIETIES.values(), ids=VARIETIES)
@pytest.mark.parametrize("criterion", ["l1", "l2", "movement", "random", "magnitude_increase"])
def test_global_counts_are_those_of_the_bare_criterion(criterion: str, variety: Variety) -> None:
    model, earlier, units = Coupled(), Coupled(1), coupled_units()
    scores = bound(criterion, model, earlier)
    for ratio in (0.2, 0.4, 0.6, 0.75):
        bare = choose_units(units, scores, ratio=ratio, scope="global")
        reordered, reports = varied(model, units, scores, variety, bare)
        removed = choose_units(units, reordered, ratio=ratio, scope="global")
        assert counts(units, removed) == counts(units, bare)
        assert [report.moved for report in reports] == counts(units, removed & ~bare)


def test_functional_similarity_is_refused() -> None:
    model, units = Coupled(), coupled_units()
    nothing = np.zeros(units.count, np.bool_)
    with pytest.raises(PlanError, match=r"'functional' is for kernels.*use similarity='cosine'"):
        varied(model, units, bound("l2", model), Variety(similarity="functional"), nothing)
    assert varied(model, units, bound("l2", model), Variety(similarity="cosine"), nothing)[0].min() > 0


# --- ratios ---------------------------------------------------------------------------------------------------------


def local_by_definition(units: ChannelUnits, scores: Array, ratio: float, round_to: int, gone: Chosen) -> set[int]:
    removed: set[int] = set(np.flatnonzero(gone).tolist())
    for space, size in enumerate(sizes_of(units).tolist()):
        members = lowest_first(units, scores, space)
        members.sort(key=lambda unit: not gone[unit])
        there = sum(not gone[unit] for unit in members)
        levels = {size, *range(round_to, size + 1, round_to)}
        legal = [level for level in levels if level <= there] or [there]
        kept = min(legal, key=lambda level: (round(abs(level - (1 - ratio) * size), 9), -level))
        removed |= set(members[: size - kept])
    return removed


def global_by_definition(units: ChannelUnits, scores: Array, ratio: float) -> set[int]:
    """The lowest of all, over the mean of its space, again and again; of equal ones that of the fullest space."""
    sizes = sizes_of(units).tolist()
    left = [lowest_first(units, scores, space) for space in range(len(sizes))]
    means = [float(scores[members].mean()) or 1.0 for members in left]
    removed: set[int] = set()
    while len(removed) < units.count - kept_channels(units.count, ratio):
        able = [space for space, size in enumerate(sizes) if len(left[space]) > max(1, math.ceil(FLOOR * size))]
        space = min(
            able,
            key=lambda s: (
                float(scores[left[s][0]] / means[s]),
                (sizes[s] - len(left[s]) + 0.5) / sizes[s],
                -s,
            ),
        )
        removed.add(left[space].pop(0))
    return removed


@given(st.integers(0, 2**32), st.floats(0, 0.99), st.integers(1, 4), st.booleans(), st.booleans())
@examples(80)
def test_a_local_ratio_is_met_as_defined(seed: int, ratio: float, round_to: int, tied: bool, later: bool) -> None:
    units = some_units(seed, most=11)
    scores = some_scores(units, seed, tied)
    gone = np.zeros(units.count, np.bool_)
    if later:  # any units, as long as one of each space is left
        gone = np.random.default_rng(seed).random(units.count) < 0.3
        gone[np.unique(units.space, return_index=True)[1]] = False
    removed = choose_units(units, scores, ratio=ratio, round_to=round_to, gone=gone)
    assert set(np.flatnonzero(removed).tolist()) == local_by_definition(units, scores, ratio, round_to, gone)
    if round_to == 1 and not later:
        kept = [kept_channels(int(size), ratio) for size in sizes_of(units)]
        assert counts(units, ~removed) == kept  # as kernels are counted


@given(st.integers(0, 2**32), st.floats(0, 0.5), st.booleans())
@examples(80)
def test_a_global_ratio_is_met_as_defined(seed: int, ratio: float, tied: bool) -> None:
    units = some_units(seed, spaces=4, most=40)
    scores = some_scores(units, seed, tied)
    removed = choose_units(units, scores, ratio=ratio, scope="global")
    assert set(np.flatnonzero(removed).tolist()) == global_by_definition(units, scores, ratio)


def test_a_global_ranking_compares_what_is_above_the_mean_of_its_space(monkeypatch: pytest.MonkeyPatch) -> None:
    units = some_units(0, spaces=4, most=40)
    scores = some_scores(units)
    scaled = scores * np.array([1.0, 1e3, 1e-3, 7.0])[units.space]

    def same() -> bool:
        found = [choose_units(units, case, ratio=0.4, scope="global").tolist() for case in (scores, scaled)]
        return bool(found[0] == found[1])

    assert same()
    monkeypatch.setattr(fxprune.planning.selection, "_means", lambda space, sizes, scores: np.ones(len(scores)))
    assert not same()


def test_a_global_ranking_leaves_a_share_of_each_space() -> None:
    units = NETS["vgg16"]
    scores = some_scores(units)
    weak = np.flatnonzero(units.space == 7)
    scores[weak] = 0
    scores[weak[0]] = 1e9  # all others of the space are far below its mean
    removed = choose_units(units, scores, ratio=0.2, scope="global")
    assert counts(units, removed)[7] == 512 - 32
    assert removed.sum() == units.count - kept_channels(units.count, 0.2)
    with pytest.raises(
        PlanError, match=r"ratio=0.95 cannot be reached.* leaves 0.0625 of each.*largest ratio is 0.9375"
    ):
        choose_units(units, scores, ratio=0.95, scope="global")
    assert choose_units(units, scores, ratio=0.9375, scope="global").sum() == units.count * 15 / 16


def test_unless_it_is_said_multiples_of_4_stay_where_there_are_enough() -> None:
    shapes = Shapes(few=15, some=16, odd=30, many=64)
    for name, reads in (("some", "few"), ("odd", "some"), ("many", "odd")):
        shapes.layer(name, reads, name)
    units = shapes.done()
    for ratio in (0.1, 0.3, 0.5, 0.7):
        kept = sizes_of(units) - counts(units, choose_units(units, some_scores(units), ratio=ratio, round_to=None))
        by_ones = sizes_of(units) - counts(units, choose_units(units, some_scores(units), ratio=ratio))
        assert kept[0] == by_ones[0]
        assert ((kept % 4 == 0) | (kept == sizes_of(units)))[1:].all()
        assert (np.abs(kept - by_ones) <= 2).all()


@pytest.mark.parametrize("round_to", [1, 4, 8])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("net", NETS)
def test_a_larger_ratio_removes_a_superset(net: str, scope: Scope, round_to: int) -> None:
    units = NETS[net]
    scores = some_scores(units, tied=True)
    before = np.zeros(units.count, np.bool_)
    for ratio in (0.0, 0.13, 0.3, 0.31, 0.5, 0.7, 0.75):
        removed = choose_units(units, scores, ratio=ratio, scope=scope, round_to=round_to)
        assert (before <= removed).all()
        assert (removed == choose_units(units, scores, ratio=ratio, scope=scope, round_to=round_to, gone=before)).all()
        assert (removed == choose_units(units, scores, ratio=0.0, scope=scope, round_to=round_to, gone=removed)).all()
        assert removes_the_lowest(units, scores, removed)
        kept = np.array(counts(units, ~removed))
        assert ((kept % round_to == 0) | (kept == sizes_of(units))).all()
        assert abs(removed.mean() - ratio) < 0.26 / (1 if round_to > 1 else 8)
        before = removed
    other = choose_units(units, some_scores(units, 1), ratio=0.9375, scope="local")
    assert not (before <= other).all()  # control: other scores


def test_units_that_are_gone_stay_so_although_they_score_high() -> None:
    units = NETS["resnet20"]
    scores = some_scores(units)
    gone = np.zeros(units.count, np.bool_)
    gone[np.argsort(scores)[-9:]] = True
    for scope in SCOPES:
        targets: list[dict[str, Any]] = [{"ratio": 0.3}, {"macs": 0.5}, {"params": 0.6}]
        for target in targets:
            removed = choose_units(units, scores, scope=scope, gone=gone, **target)
            assert (gone <= removed).all()
            assert not (gone & choose_units(units, scores, scope=scope, **target)).any()  # control
            if "ratio" in target:
                assert removed.mean() == pytest.approx(0.3, abs=0.02)
        assert (choose_units(units, scores, macs=0.99, scope=scope, gone=gone) == gone).all()


def test_patterns_stand_for_the_spaces_of_their_layers() -> None:
    units = replace(NETS["resnet20"], fixed={"head": "it is the output"})
    scores = some_scores(units)
    removed = choose_units(units, scores, ratio={"0.1": 0.25, "1.*.conv1": 0.5, "0.*.conv1": 0.75, "head": 0.5})
    found = {name: count for name, count in zip(units.names, counts(units, removed), strict=True) if count}
    assert found == {"0.0.conv1": 12, "0.1.conv1": 4, "0.2.conv1": 12, "stream0": 4} | {
        f"1.{block}.conv1": 16 for block in range(3)
    }
    assert not choose_units(units, scores, ratio={"stem": 0.0, "0": 0.0}).any()
    with pytest.raises(PlanError, match=r"stem is to lose 0 and 0.0.conv2 0.5, but .* go together; give both the same"):
        choose_units(units, scores, ratio={"stem": 0.0, "0": 0.5})
    with pytest.raises(PlanError, match=r"pattern '1.0.conv' matches no convolution of the model \(near: '1.0.conv"):
        choose_units(units, scores, ratio={"1.0.conv": 0.5})
    with pytest.raises(PlanError, match="maps patterns to shares, but scope='global'"):
        choose_units(units, scores, ratio={"stem": 0.5}, scope="global")


def renumbered(units: ChannelUnits, seed: int) -> tuple[ChannelUnits, Units]:
    """The same units in another order inside each space, and the new number of each."""
    generator = np.random.default_rng(seed)
    new = np.concatenate([generator.permutation(np.flatnonzero(units.space == s)) for s in range(len(units.names))])
    table = np.append(new, STAYS)
    layers = {
        name: replace(layer, writes=table[layer.writes], reads=None if layer.reads is None else table[layer.reads])
        for name, layer in units.layers.items()
    }
    return replace(units, layers=layers), new


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("target", [{"ratio": 0.4}, {"macs": 0.5}, {"params": 0.5}])
@pytest.mark.parametrize("seed", range(3))
def test_the_numbering_does_not_matter(seed: int, target: dict[str, Any], scope: Scope) -> None:
    for units in (NETS["resnet20"], some_units(seed, 4, 30)):
        scores = some_scores(units, seed)
        other, new = renumbered(units, seed)
        moved = np.empty(units.count)
        moved[new] = scores
        removed = choose_units(units, scores, scope=scope, **target)
        assert removed.any()
        assert (choose_units(other, moved, scope=scope, **target)[new] == removed).all()
        assert not (choose_units(other, scores, scope=scope, **target)[new] == removed).all()  # control


# --- budgets --------------------------------------------------------------------------------------------------------


def spent(units: ChannelUnits, removed: Chosen, cost: str) -> float:
    """Share of the cost that remains."""
    count = units.macs if cost == "macs" else units.params
    return count(~removed) / count(np.ones(units.count, np.bool_))


@pytest.mark.parametrize("cost", ["macs", "params"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("net", NETS)
def test_budgets_are_met(net: str, scope: Scope, cost: str) -> None:
    units = NETS[net]
    scores = some_scores(units)
    for share in (0.9, 0.7, 0.57, 0.5, 0.3, 0.1):
        asked: dict[str, Any] = {"scope": scope, cost: share}
        removed = choose_units(units, scores, **asked)
        assert abs(spent(units, removed, cost) / share - 1) < 0.003
        assert removes_the_lowest(units, scores, removed)
        if scope == "local":  # one ratio for all spaces, but for single units
            removed_share = np.array(counts(units, removed)) / sizes_of(units)
            assert (np.abs(removed_share - np.median(removed_share)) * sizes_of(units) < 3).all()


def test_control_without_single_units_a_budget_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Steps, "next", lambda steps, taken: np.empty(0, np.intp))
    units = NETS["resnet20"]
    scores = some_scores(units)
    missed = [
        spent(units, choose_units(units, scores, macs=share), "macs") / share - 1 for share in (0.9, 0.7, 0.5, 0.3, 0.1)
    ]
    assert max(missed) > 0.01


@given(st.integers(0, 2**32), st.floats(0.05, 1), st.sampled_from(SCOPES), st.integers(1, 3))
@examples(80)
def test_a_budget_is_met_as_well_as_by_any_ratio(seed: int, share: float, scope: Scope, round_to: int) -> None:
    units = some_units(seed)
    scores = some_scores(units, seed)
    steps = _Steps.make(
        units,
        sizes_of(units),
        scores,
        np.zeros(units.count, np.bool_),
        Request(granularity="filter", scope=scope, round_to=round_to),
    )
    ranked = []
    for count in range(len(steps.ranking) + 1):
        removed = np.zeros(units.count, np.bool_)
        removed[steps.order] = np.repeat(steps.beginning(count), steps.size)
        ranked.append(spent(units, removed, "params"))
    if min(ranked) > share * 1.01:
        with pytest.raises(PlanError, match=f"{min(ranked):.4g} remains; ask for more than that"):
            choose_units(units, scores, params=share, scope=scope, round_to=round_to)
        return
    removed = choose_units(units, scores, params=share, scope=scope, round_to=round_to)
    found = spent(units, removed, "params")
    assert removes_the_lowest(units, scores, removed)
    below = [value for value in ranked if value <= share]
    assert abs(found / share - 1) <= 0.01 + 1e-9 or (found <= share and found >= max(below) - 1e-9)


def test_a_budget_in_multiples() -> None:
    for net, share in (("resnet20", 0.5), ("resnet56", 0.43), ("resnet18", 0.5), ("vgg16", 0.3)):
        units = NETS[net]
        for scope in SCOPES:
            removed = choose_units(units, some_scores(units), macs=share, scope=scope, round_to=8)
            kept = np.array(counts(units, ~removed))
            assert (kept % 8 == 0).all()
            assert 0.8 * share < spent(units, removed, "macs") <= 1.01 * share


def test_a_budget_that_needs_nothing_and_one_that_needs_too_much() -> None:
    units = NETS["resnet20"]
    scores = some_scores(units)
    assert not choose_units(units, scores, macs=1.0).any()
    assert not choose_units(units, scores, params=1.0, scope="global").any()
    with pytest.raises(PlanError, match=r"macs=0.001 cannot be reached .* the 12 channel spaces .* 0.0\d+ remains"):
        choose_units(units, scores, macs=0.001)
    nothing = ChannelUnits(np.empty(0, np.int64), (), units.layers, {"stem": "why"})
    stay = {name: replace(layer, writes=np.full(1, STAYS), reads=None) for name, layer in units.layers.items()}
    nothing = replace(nothing, layers=stay)
    assert choose_units(nothing, np.empty(0), ratio=0.5).tolist() == []
    assert choose_units(nothing, np.empty(0), ratio=0.5, scope="global").tolist() == []
    with pytest.raises(PlanError, match=r"macs=0.5 .* 1 remains; .* \(1 convolutions stay whole\)"):
        choose_units(nothing, np.empty(0), macs=0.5)


@given(st.integers(0, 2**32), st.integers(1, 3))
@examples(40)
def test_costs_of_many_choices_are_those_of_the_network(seed: int, round_to: int) -> None:
    units = some_units(seed, 4, 9)
    generator = np.random.default_rng(seed)
    gone = generator.random(units.count) < 0.2
    steps = _Steps.make(
        units, sizes_of(units), some_scores(units, seed), gone, Request(round_to=round_to, granularity="filter")
    )
    costs = _Products(units, _Widths(units, steps, gone), "macs")

    def exact(taken: Chosen) -> float:
        removed = gone.copy()
        removed[steps.order] |= np.repeat(taken, steps.size)
        return units.macs(~removed)

    def toggled(*which: int) -> Chosen:
        changed = taken.copy()
        changed[list(which)] ^= True
        return changed

    taken = generator.random(len(steps.size)) < 0.5
    back, more = np.flatnonzero(taken), np.flatnonzero(~taken)
    each = more.tolist()
    assert costs.of(taken) == pytest.approx(exact(taken), abs=1e-6)
    np.testing.assert_allclose(costs.without(taken, more), np.array([exact(toggled(e)) for e in each]), atol=1e-6)
    expected = np.array([[exact(toggled(b, m)) for m in each] for b in back.tolist()]).reshape(len(back), len(more))
    np.testing.assert_allclose(costs.swapped(taken, back, more), expected, atol=1e-6)


# --- random tickets, and what is refused ----------------------------------------------------------------------------


def test_random_units_are_as_many_of_each_space() -> None:
    units = NETS["resnet56"]
    scores = some_scores(units)
    removed = choose_units(units, scores, ratio=0.5, scope="global")
    state = str(np.random.get_state())
    drawn = random_units(units, removed, 3)
    assert counts(units, drawn) == counts(units, removed)
    assert not (drawn == removed).all()
    assert (drawn == random_units(units, removed, 3)).all()
    assert not (drawn == random_units(units, removed, 4)).all()
    more = choose_units(units, scores, ratio=0.7, scope="global")
    assert (drawn <= random_units(units, more, 3)).all()
    assert not (drawn <= random_units(units, more, 4)).all()  # control: another seed is not nested
    often = sum(random_units(units, removed, seed).astype(float) for seed in range(200)) / 200
    expected = (np.array(counts(units, removed)) / sizes_of(units))[units.space]
    assert np.abs(often - expected).max() < 0.2  # every unit of a space is as likely: six standard errors
    assert str(np.random.get_state()) == state


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"ratio": 0.5, "macs": 0.5}, "ratio=0.5 is what each layer loses, and macs=0.5 what may remain"),
        ({"ratio": 1.0}, r"ratio.* 1.0"),
        ({"ratio": {"stem": -0.1}}, r"stem: .*-0.1"),
        ({"macs": 0.0}, r"macs is 0.0; it must be a share in \(0, 1\]"),
        ({"params": 1.5}, r"params is 1.5; it must be a share in \(0, 1\]"),
        ({"ratio": 0.5, "scope": "layer"}, "scope is 'layer'; it must be 'local' or 'global'"),
        ({"ratio": 0.5, "round_to": 0}, "round_to is 0; it must be an integer, 1 or more"),
        ({"ratio": 0.5, "round_to": True}, "round_to is True"),
        ({"ratio": 0.5, "scores": np.ones(3)}, r"scores has shape \(3,\); there must be one for each of the 448 units"),
        ({"ratio": 0.5, "gone": np.zeros(3, np.bool_)}, r"gone has shape \(3,\)"),
        ({"ratio": 0.5, "scores": np.full(448, np.nan)}, "scores are negative, NaN or infinite"),
        ({"ratio": 0.5, "scores": np.full(448, -1.0)}, "scores are negative, NaN or infinite"),
        ({"ratio": 0.5, "gone": np.arange(448) < 16}, "stream0: all of its filters are gone; one of each"),
    ],
)
def test_wrong_arguments_are_refused(wrong: dict[str, object], message: str) -> None:
    units = NETS["resnet20"]
    arguments: dict[str, Any] = {"scores": some_scores(units)} | wrong
    with pytest.raises(PlanError, match=message):
        choose_units(units, **arguments)


def test_unknown_macs_are_refused_and_parameters_still_count() -> None:
    units = NETS["resnet20"]
    layers = {name: replace(layer, macs=None) for name, layer in units.layers.items()}
    unknown = replace(units, layers=layers)
    with pytest.raises(PlanError, match="macs: the shapes of the model are not known; pass example_inputs, or use"):
        choose_units(unknown, some_scores(units), macs=0.5)
    assert spent(unknown, choose_units(unknown, some_scores(units), params=0.5), "params") == pytest.approx(0.5, 0.01)
