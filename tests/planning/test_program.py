"""What a choice of the program means: what it counts is what the compiled network has, whatever is chosen."""
# nn.Module.__call__ is typed to return Any; each net would need a cast.
# mypy: disable-error-code="no-any-return"

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import PlanError
from fxprune.calibration.agreement import Agreement
from fxprune.calibration.judging import Judge
from fxprune.calibration.subject import Subject
from fxprune.channels.branches import residual_branches
from fxprune.planning.filters import FilterPlanner, removable_of, removed_units
from fxprune.planning.kernels import sensitivity_of, ways_to_spend
from fxprune.planning.latency.grid import LayerGrid
from fxprune.planning.latency.table import LatencyTable
from fxprune.planning.program.integer_program import GAP, Choice, IntegerProgram
from fxprune.planning.program.interaction import STEEPEST, slopes
from fxprune.planning.program.kernel_ways import kernel_ways
from fxprune.planning.program.planner import Alone, Before, ProgramPlanner, Solved
from fxprune.planning.program.selected_plans import SelectedPlans
from fxprune.planning.program.terms import Kernels, KernelWay, Losses, NetworkTerms, widths_of
from fxprune.planning.requests import Request
from fxprune.planning.sensitivity import LayerSensitivity, Sensitivity


def block(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, channels, 1), nn.BatchNorm2d(channels),
    )  # fmt: skip


class Residual(nn.Module):
    """Two blocks that can go, and one with a projection, which cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.first, self.second, self.wider = block(32, 48), block(32, 32), block(64, 32)
        self.project = nn.Conv2d(32, 64, 1, stride=2)
        self.into = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.first(x)).relu()
        x = (x + self.second(x)).relu()
        x = (self.project(x) + self.into(x)).relu()
        return self.head((x + self.wider(x)).mean((2, 3)))


class Concat(nn.Module):
    """A layer that reads two spaces and an input that stays, and one whose result is split."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(16, 48, 1)
        self.mixed = nn.Conv2d(96, 64, 1)
        self.left, self.right = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.repeat(1, 6, 1, 1)[:, :16]
        y = self.mixed(torch.cat([self.one(x).relu(), self.two(x), x], 1)).relu()
        left, right = y.chunk(2, 1)
        return torch.cat([self.left(left), self.right(right)], 1).mean((2, 3))


class Depthwise(nn.Module):
    """An inverted residual, whose middle has a filter for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.expand, self.norm = nn.Conv2d(24, 96, 1, bias=False), nn.BatchNorm2d(96)
        self.middle = nn.Conv2d(96, 96, 3, padding=1, groups=96)
        self.project = nn.Conv2d(96, 24, 1)
        self.head = nn.Linear(24 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.project(self.middle(self.norm(self.expand(x)).relu()).relu())
        return self.head(x.flatten(1))


NETS: list[Callable[[], nn.Module]] = [Residual, Concat, Depthwise]


def image(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(1))


class Case:
    """The choices of one network, with losses that are made up."""

    def __init__(self, make: Callable[[], nn.Module], **asked: Any) -> None:
        torch.manual_seed(0)
        self.model = make().eval()
        self.subject = Subject(self.model, image(), None)
        usual: dict[str, Any] = {"granularity": "auto", "macs": 0.5, "params": 0.5}
        self.filters, self.of_kernels = Request(**(usual | asked)).parts()
        self.removable = removable_of(self.subject)
        self.sensitivity = sensitivity_of(self.subject, self.of_kernels)
        units = self.removable.units
        draw = np.random.default_rng(0)
        order = np.lexsort((draw.random(units.count), units.space))
        sizes = np.bincount(units.space, minlength=len(units.names)).tolist()
        spaces = [draw.uniform(0.2, 2) * (1 - np.arange(1, size + 1) / size) ** 2 for size in sizes]
        found, _ = residual_branches(self.subject.trace.module, self.subject.trace.values)
        self.branches = {name: branch.modules for name, branch in found.items()}
        self.losses = Losses(
            order,
            spaces,
            kernel_ways(self.subject, self.of_kernels, self.sensitivity, {}, 1.0),
            {name: float(draw.uniform(0.05, 0.4)) for name in self.branches},
        )

    def terms(self, losses: Losses | None = None, table: LatencyTable | None = None) -> NetworkTerms:
        shares = self.filters.shares
        network = self.subject.trace.module
        return NetworkTerms(network, self.removable, losses or self.losses, self.branches, shares, table=table)

    def counted(self, terms: NetworkTerms, choice: Choice) -> tuple[float, float]:
        """The shares of MACs and parameters of the network that is compiled by a choice."""
        names = [layer.name for layer in self.sensitivity.layers]
        plans = SelectedPlans(self.subject, self.filters, self.of_kernels, self.removable, self.branches, names)
        plan = plans.from_weights(terms.selected(choice))
        masked = fxprune.mask(self.model, plan)
        small = fxprune.rewrite(masked, plan, image())
        fxprune.verify(small, masked, image(4))
        report = fxprune.report(small)
        assert report.macs_dense is not None
        assert report.macs_pruned is not None
        params = [sum(p.numel() for p in network.parameters()) for network in (small, self.model)]
        return report.macs_pruned / report.macs_dense, params[0] / params[1]


def drawn(program: IntegerProgram, seed: int, goes: bool) -> Choice:
    """Any legal choice."""
    draw = np.random.default_rng(seed)
    gone = frozenset(int(place) for place in range(len(program.branches)) if goes and draw.random() < 0.5)
    widths = tuple(
        None if gone.intersection(space.branches) else int(draw.integers(len(space.losses))) for space in program.spaces
    )
    ways: dict[str, int] = {}
    for part in program.parts:
        if gone.intersection(part.branches):
            continue
        open_ = [
            way
            for way in range(part.ways)
            if np.isfinite(program.loss(Choice(widths, {part.name: way})) if not gone else _loss(part, widths, way))
        ]
        ways[part.name] = int(draw.choice(open_))
    return Choice(widths, ways, gone)


def _loss(part: Any, widths: tuple[int | None, ...], way: int) -> float:
    places = [[0 if side is None else widths[side] for side in (term.reads, term.writes)] for term in part.terms]
    return float(sum(term.losses[(*place, way)] for term, place in zip(part.terms, places, strict=True)))


@pytest.mark.parametrize("make", NETS)
def test_what_it_counts_is_what_the_network_has(make: Callable[[], nn.Module]) -> None:
    case = Case(make)
    terms = case.terms()
    program = terms.program()
    exact = make is not Concat  # there a ratio of several spaces is rounded to channels of their sum
    grouped = narrowed = shallower = 0
    for seed in range(6):
        choice = drawn(program, seed, goes=seed % 2 == 1)
        macs, params = case.counted(terms, choice)
        rounding = 1e-9 if exact else 0.03
        assert program.costs(choice) == pytest.approx([macs, params], rel=rounding)
        selected = terms.selected(choice)
        grouped += len(selected.ratios)
        narrowed += int(selected.removed.sum())
        shallower += len(selected.branches)
    assert grouped  # control: there was something to count
    assert narrowed
    assert bool(shallower) == (make is not Concat)
    whole = Choice((0,) * len(program.spaces), {part.name: 0 for part in program.parts})
    assert program.costs(whole) == pytest.approx([1.0, 1.0])
    assert program.loss(whole) == 0


@pytest.mark.parametrize("make", NETS)
def test_the_budgets_are_kept_by_the_network(make: Callable[[], nn.Module]) -> None:
    case = Case(make, macs=0.6, params=0.7)
    terms = case.terms(replace(case.losses, branches={}))
    choice = terms.program().solved()
    assert choice is not None
    found = np.array(case.counted(terms, choice)) / [0.6, 0.7]
    assert found.max() <= 1 + (1e-9 if make is not Concat else 0.03)
    assert found.max() > 0.97  # and used


def test_mixing_wins() -> None:
    """Losses that grow ever faster: a bit of each costs less than much of one."""
    case = Case(Residual, macs=0.4, params=None)
    kernels = kernel_ways(case.subject, case.of_kernels, case.sensitivity, {}, 0.1)
    none = [np.where(np.arange(len(losses)) == len(losses) - 1, 0.0, 1e3) for losses in case.losses.spaces]

    def least(**changes: Any) -> float:
        program = case.terms(replace(case.losses, **({"kernels": kernels} | changes))).program()
        choice = program.solved()
        assert choice is not None
        return program.loss(choice)

    together = least()
    alone = {"filters": least(kernels={}, branches={}), "kernels": least(spaces=none, branches={})}
    assert together < 0.9 * min(alone.values())
    assert together <= least(branches={}) * (1 + GAP) < min(alone.values())


def test_nothing_can_go_in_a_space() -> None:
    case = Case(Residual, macs=0.6, params=None)
    terms = case.terms(replace(case.losses, kernels={}, branches={}))
    program = terms.program()
    costly = [replace(space, losses=np.where(np.arange(len(space.losses)), np.inf, 0.0)) for space in program.spaces]
    stuck = replace(program, spaces=[costly[0], *program.spaces[1:]])
    free, choice = program.solved(), stuck.solved()
    assert free is not None
    assert choice is not None
    assert free.widths[0] != 0  # control
    assert choice.widths[0] == 0
    assert stuck.least(0) > program.least(0)


def test_groups_suit_the_filters_that_stay() -> None:
    way = KernelWay(0.5, "overlap", {8: 1.0, 4: 1.5, 2: 2.0})
    kernels = Kernels((way,), least_group=2)
    assert [kernels.groups(0, filters) for filters in (64, 24, 20, 18, 15)] == [8, 8, 4, 2, None]
    assert kernels.kept(0, 16, 32) == 0.5
    assert kernels.kept(0, 8, 32) is None  # it would stay dense: too few filters
    assert kernels.kept(0, 32, 15) is None


@pytest.mark.parametrize(
    "size, round_to, lanes", [(16, 1, 1), (64, 4, 1), (512, 1, 16), (3, 1, 1), (96, 32, 8), (8, 16, 1)]
)
def test_widths_are_whole_steps(size: int, round_to: int, lanes: int) -> None:
    widths = widths_of(size, 8, round_to, lanes)
    assert widths[0] == size
    assert list(widths) == sorted(set(widths), reverse=True)
    assert all(width % round_to == 0 and 1 <= width < size for width in widths[1:])
    assert len(widths) <= 10


# --- two choices in one layer -----------------------------------------------------------------------------------------


def layer(name: str, damage: float, groups: int = 2) -> LayerSensitivity:
    return LayerSensitivity(name, groups, 100, 100, tuple(damage * (1 - k / 8) for k in range(1, 9)))


def test_the_interaction_is_that_of_the_narrower_network() -> None:
    dense = Sensitivity((layer("a", 0.1), layer("b", 0.1), layer("c", 0.1), layer("d", 0.1, 4)), 400, 400)
    narrow = Sensitivity((layer("a", 0.05), layer("b", 0.9), layer("d", 0.4)), 200, 200)
    found = slopes(dense, narrow, {"a": 0.75, "b": 0.75, "c": 0.5, "d": 0.5})
    assert found["a"] == pytest.approx((0.5 - 1) / 0.25, rel=0.1) or found["a"] == -1.0  # never below no loss
    assert found["b"] == STEEPEST
    assert found["c"] == found["d"] == pytest.approx(np.median([found["a"], found["b"]]))  # not measured alike
    assert slopes(dense, dense, {}) == dict.fromkeys("abcd", 0.0)


def test_it_changes_what_kernels_lose_where_inputs_go() -> None:
    case = Case(Residual, macs=0.5, params=None)
    plain = case.terms().program()
    steep = {name: replace(kernels, slope=2.0) for name, kernels in case.losses.kernels.items()}
    program = case.terms(replace(case.losses, kernels=steep)).program()
    for part, other in zip(plain.parts, program.parts, strict=True):
        for term, changed in zip(part.terms, other.terms, strict=True):
            if part.ways > 1:
                np.testing.assert_allclose(term.losses[0], changed.losses[0])  # with all inputs it is the same
                last = term.losses[-1][np.isfinite(term.losses[-1])]
                now = changed.losses[-1][np.isfinite(term.losses[-1])]
                assert (now >= last).all()
                assert (now > last).any() or not last.any()


# --- times ------------------------------------------------------------------------------------------------------------


def test_times_are_those_of_the_table() -> None:
    case = Case(Residual, macs=None, params=None, latency=0.5, target="cpu")
    grids = tuple(
        LayerGrid(name, (conv.in_channels // 2, conv.in_channels), (conv.out_channels // 2, conv.out_channels),
                  ((1.0, 2.0), (3.0, 5.0)))
        for name, conv in case.model.named_modules() if isinstance(conv, nn.Conv2d) and name != "stem"
    )  # fmt: skip
    table = LatencyTable(
        "cpu", "float32", "own", ((2, 3, 4, 4),), 5.0 * len(grids) + 7.0, 5.0 * len(grids) + 7.0, (), grids=grids
    )
    terms = case.terms(replace(case.losses, kernels={}), table)
    program = terms.program()
    whole = Choice((0,) * len(program.spaces), {part.name: 0 for part in program.parts})
    assert program.costs(whole) == pytest.approx([1.0])
    half = tuple(next(i for i, kept in enumerate(widths) if 2 * kept == widths[0]) for widths in terms.widths)
    for seed in range(4):
        chosen = tuple(np.random.default_rng(seed).choice([0, place]) for place in half)
        choice = Choice(chosen, whole.ways)
        removed = terms.selected(choice).removed
        stays = np.append(~removed, True)
        expected = 7.0
        for grid in grids:
            layer = case.removable.units.layers[grid.name]
            assert layer.reads is not None
            expected += float(grid.at(np.array(stays[layer.reads].mean()), np.array(stays[layer.writes].mean())))
        assert program.costs(choice)[0] == pytest.approx(expected / table.seconds)


# --- one scale --------------------------------------------------------------------------------------------------------


def data(count: int = 48) -> Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(2))


def solved(of_kernels: float, of_filters: float, **asked: Any) -> Solved:
    """What the program chooses where either kind alone came so far from the dense network."""
    torch.manual_seed(0)
    subject = Subject(Residual().eval(), None, data())
    usual: dict[str, Any] = {"granularity": "auto", "macs": 0.5, "method": "cocluster"}
    filters, kernels = Request(**(usual | asked)).parts()
    sensitivity, planner = sensitivity_of(subject, kernels), FilterPlanner(subject)
    (way, ratios), *_ = ways_to_spend(subject, replace(kernels, sensitivity=sensitivity))[0].items()
    plan = next(iter(planner.plans(filters).values()))
    near, far = (Agreement(1.0, 8, True, True, distance) for distance in (of_kernels, of_filters))
    before = Before(Alone(way, ratios, near), Alone("global", plan, far), None, sensitivity, planner, None)
    return ProgramPlanner(subject, Judge(subject), filters, kernels, before).solved()


def test_the_kind_that_does_better_alone_goes_first() -> None:
    kernels, filters = solved(0.001, 0.9), solved(0.9, 0.001)
    assert kernels.kernels is not None
    assert filters.whole is not None
    assert filters.kernels is None
    gone = [0 if s.whole is None else sum(len(r.outputs) for r in s.whole.removed.values()) for s in (kernels, filters)]
    assert gone[0] < gone[1] / 2


def test_filters_go_in_the_order_of_another_criterion() -> None:
    torch.manual_seed(0)
    subject = Subject(Residual().eval(), None, data())
    request, _ = Request(granularity="auto", macs=0.5, criterion="l1").parts()
    planner = FilterPlanner(subject)
    plan = next(iter(planner.plans(request, "global").values()))
    removable, found = planner.sensitivity(request, plan)
    units, gone = removable.units, removed_units(removable, plan)
    assert gone.any()
    for space, name in enumerate(units.names):
        mine = found.order[units.space[found.order] == space]
        assert sorted(mine) == np.flatnonzero(units.space == space).tolist()
        first = gone[mine]
        assert first.tolist() == sorted(first.tolist(), reverse=True)  # what it removed goes first
        damage = found.table.layers[space].damage
        assert found.table.layers[space].name == name
        assert list(damage) == sorted(damage, reverse=True)
    ours = planner.sensitivity(replace(request, criterion=None), None)[1]
    assert not np.array_equal(ours.order, found.order)  # control


# --- whole plans ------------------------------------------------------------------------------------------------------


def test_a_users_own_module_loses_filters_and_kernels_but_no_branches() -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    options: dict[str, Any] = {"macs": 0.5, "granularity": "auto", "calibration": data(), "method": "cocluster"}
    small = fxprune.compile(model, output="module", verify=True, **options)
    assert type(small) is type(model) or isinstance(small, Residual)
    notes = fxprune.report(small).notes
    assert any(note.startswith("one program: ") and "branches" not in note for note in notes)
    assert any("branches: they go from a graph only" in note for note in notes)


def test_an_infeasible_budget_says_how_near_one_comes() -> None:
    case = Case(Residual, macs=0.001, params=None)
    program = case.terms().program()
    assert program.solved() is None
    least = program.least(0)
    assert 0.001 < least < 0.2
    assert program.within(np.array([least * 1.001])).solved() is not None
    with pytest.raises(
        PlanError, match=r"one program: macs=0\.001 cannot be met by filters, kernels and branches together"
    ):
        fxprune.make_plan(
            case.model, macs=0.001, granularity="auto", calibration=data(32), method="cocluster", criterion="l2"
        )
