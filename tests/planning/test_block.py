"""Plans in aligned blocks of channels, and plans for a kind of device: blocks are whole, well chosen, and paid for in
the open; layers that do not divide into them are pruned all the same and noted.
"""

import copy
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from equality import assert_same_function, masked_by_hand, randomize
from hypothesis import given
from hypothesis import strategies as st
from products_harness import examples, fewer, in_turns
from reconstruction_harness import problem
from torch import Tensor, nn
from zoo import CASES, Case

import fxprune
from fxprune import GroupedKernels, PlanError, PrunePlan
from fxprune.exact.record import record_of
from fxprune.methods import Clustering, Matrix, cocluster
from fxprune.methods.cocluster import in_blocks
from fxprune.methods.reconstruction import kernel_energy, reconstruction
from fxprune.planning import Request
from fxprune.plans import Form
from fxprune.plans.shapes import Shape, choose_shape, kept_channels
from fxprune.vocabulary import FormChoice

FORMS: tuple[Form, ...] = ("partition", "overlap")
NO_BLOCKS = "channels are kept one by one, not in aligned blocks: "


def in_whole_blocks(kept: tuple[tuple[int, ...], ...], block: int) -> bool:
    """Whether each set holds, with a channel, all that share its block."""
    return all(
        {c for first in row for c in range(first - first % block, first - first % block + block)} == set(row)
        for row in kept
    )


def totals_of(importance: Matrix, clustering: Clustering) -> Matrix:
    """Importance `(n, C)` of the channels to each group."""
    totals: Matrix = importance[np.array(clustering.out_order).reshape(len(clustering.kept), -1)].sum(1)
    return totals


def weight_kept(importance: Matrix, clustering: Clustering) -> float:
    return float(np.take_along_axis(totals_of(importance, clustering), np.array(clustering.kept), 1).sum())


class Net(nn.Module):
    """A stem of 16 and four convolutions of 64 channels, of 40 filters that do not divide by 16, and of 64 again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.first, self.norm = nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.second = nn.Conv2d(64, 40, 1)
        self.third = nn.Conv2d(40, 64, 3, padding=1)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(self.stem(x).relu())).relu()
        y: Tensor = self.head(self.third(self.second(x).relu()).mean((2, 3)))
        return y


X = torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net() -> nn.Module:
    return randomize(Net()).eval()


# --- plans of every net of the zoo ----------------------------------------------------------------------------------


def runs() -> Iterator[object]:
    """Each net with blocks of 4 or 8, in one form or the other; by default every sixth net."""
    for number, case in enumerate(CASES):
        block, form = (4, 8)[number // 3 % 2], FORMS[number // 6 % 2]
        mark = [pytest.mark.slow] if number % 6 else []
        yield pytest.param(case, block, form, id=f"{case.name}-{block}-{form}", marks=mark)


@pytest.mark.parametrize("case, block, form", list(runs()))
def test_kept_sets_are_whole_blocks_or_noted(case: Case, block: int, form: FormChoice) -> None:
    model = case.build().double()
    plan = fxprune.make_plan(model, 0.5, form=form, block=block, example_inputs=case.inputs())
    assert len(plan.layers) == case.grouped  # nothing stays dense for the sake of blocks
    for name, kernels in plan.layers.items():
        aligned = name not in plan.notes
        assert kernels.block == (block if aligned else 1)
        assert in_whole_blocks(kernels.kept, kernels.block)
        assert (kernels.block_cost is not None) == aligned
        assert kernels.form in (form, "partition")  # few blocks that no group shares with another are a partition too
        per_group = kernels.in_channels // kernels.groups
        divides = (per_group if form == "partition" else kernels.in_channels) % block == 0
        assert aligned == (divides and (form == "partition" or kernels.in_channels > block))
    assert plan == fxprune.make_plan(model, 0.5, form=form, block=block, example_inputs=case.inputs())
    assert PrunePlan.from_json(plan.to_json()) == plan
    plan.check(model)


def test_most_layers_of_the_zoo_are_aligned() -> None:
    plans = [fxprune.make_plan(case.build(), 0.5, form="overlap", block=8) for case in CASES[:12]]
    layers = sum(len(plan.layers) for plan in plans)
    assert sum(len(plan.notes) for plan in plans) < 0.2 * layers


@pytest.mark.parametrize("case, form", in_turns(CASES[::12], FORMS, step=2))
def test_the_rewritten_net_is_exact(case: Case, form: FormChoice) -> None:
    model = randomize(case.build().double()).eval()
    pruned = fxprune.compile(model, 0.5, form=form, block=8, example_inputs=case.inputs(), verify=False)
    plan = fxprune.make_plan(model, 0.5, form=form, block=8, example_inputs=case.inputs())
    assert_same_function(pruned, masked_by_hand(model, plan), case.inputs())


@pytest.mark.parametrize("form", fewer(FORMS, ["overlap"]))
def test_with_calibration_too(net: nn.Module, form: FormChoice) -> None:
    plan = fxprune.make_plan(net, 0.5, form=form, block=4, calibration=X)
    assert plan.method == "reconstruction"
    assert not plan.notes
    assert all(k.block == 4 and in_whole_blocks(k.kept, 4) for k in plan.layers.values())
    assert all(k.block_cost is not None and 0 <= k.block_cost < 0.5 for k in plan.layers.values())
    assert plan == record_of(fxprune.compile(net, 0.5, form=form, block=4, calibration=X, verify=True)).plan


@pytest.mark.parametrize("variety, calibrated", in_turns(["pairs", "soft"], [False, True]))
def test_with_variety_too(net: nn.Module, variety: str, calibrated: bool) -> None:
    options: dict[str, Any] = {"variety": variety, "form": "overlap", "calibration": X if calibrated else None}
    plan = fxprune.make_plan(net, 0.5, block=8, **options)
    assert not plan.notes
    for kernels in plan.layers.values():
        assert kernels.block == 8
        assert kernels.redundancy is not None
        assert kernels.block_cost is not None
    one_group = {"groups": 1, **options}
    aligned, single = (fxprune.make_plan(net, 0.5, block=block, **one_group).layers["first"] for block in (8, 1))
    assert aligned.redundancy == single.redundancy  # of channels, as without blocks
    assert aligned.kept != single.kept


def test_a_block_of_one_changes_nothing(net: nn.Module) -> None:
    plan = fxprune.make_plan(net, 0.6, block=1)
    assert plan == fxprune.make_plan(net, 0.6)
    assert {k.block_cost for k in plan.layers.values()} == {None}
    assert "block" not in str(plan)
    assert plan.layers["first"].kept_channels == 26
    assert fxprune.make_plan(net, 0.6, block=8).layers["first"].kept_channels == 24


# --- the choice -----------------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple[Matrix, int, int, int, Form]:
    groups, width, block = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    share = draw(st.integers(1, 4))
    form = draw(st.sampled_from(FORMS))
    blocks = share * groups if form == "partition" else draw(st.integers(share, 8))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    importance = generator.standard_normal((groups * width, blocks * block)) ** 2
    return importance, groups, share * block, block, form


@given(problems())
@examples(80)
def test_blocks_are_co_clustered_as_channels_are(case: tuple[Matrix, int, int, int, Form]) -> None:
    importance, groups, kept, block, form = case
    found = cocluster(importance, groups, kept, form, block=block)
    kernels = GroupedKernels(found.out_order, found.kept, importance.shape[1], 0.5, block=block)
    assert in_whole_blocks(kernels.kept, block)
    assert kernels.kept_channels == kept
    units = cocluster(in_blocks(importance, block), groups, kept // block, form)
    assert found.out_order == units.out_order
    assert [row[::block] for row in found.kept] == [tuple(block * b for b in row) for row in units.kept]
    assert weight_kept(importance, found) == pytest.approx(found.history[-1], rel=1e-12)


@given(problems(), st.integers(0, 2**32))
@examples(80)
def test_no_random_choice_of_blocks_keeps_more(case: tuple[Matrix, int, int, int, Form], seed: int) -> None:
    importance, groups, kept, block, form = case
    found = cocluster(importance, groups, kept, form, block=block)
    totals = in_blocks(totals_of(importance, found), block)
    generator = np.random.default_rng(seed)
    if form == "partition":
        drawn = generator.permutation(totals.shape[1]).reshape(groups, -1)
    else:
        drawn = np.stack([generator.permutation(totals.shape[1])[: kept // block] for _ in range(groups)])
    assert np.take_along_axis(totals, drawn, 1).sum() <= weight_kept(importance, found) * (1 + 1e-9)


def test_control_a_choice_of_the_lightest_blocks_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("fxprune.methods.cocluster")  # the function hides the module of its name
    importance = np.random.default_rng(0).standard_normal((16, 32)) ** 2
    good = weight_kept(importance, cocluster(importance, 1, 16, block=4))
    right = module.choose_channels
    monkeypatch.setattr(module, "choose_channels", lambda totals, *rest: right(-totals, *rest))
    assert weight_kept(importance, cocluster(importance, 1, 16, block=4)) < 0.9 * good


@pytest.mark.parametrize("form", FORMS)
def test_planted_blocks_cost_nothing_and_others_do(form: Form) -> None:
    generator = np.random.default_rng(3)
    owner = generator.permutation(np.arange(8) % 2).repeat(4)  # of 32 channels in blocks of 4
    importance = (generator.permutation(np.arange(16) % 2)[:, None] == owner) + 0.1 * generator.random((16, 32))
    found = cocluster(importance, 2, 16, form, block=4)
    assert found.block_cost == 0
    assert found.kept == cocluster(importance, 2, 16, form).kept
    shuffled = cocluster(importance[:, generator.permutation(32)], 2, 16, form, block=4)
    assert shuffled.block_cost is not None
    assert shuffled.block_cost > 0.1


def test_the_cost_of_overlapping_blocks_by_its_definition() -> None:
    importance = np.random.default_rng(1).standard_normal((24, 40)) ** 2
    found = cocluster(importance, 3, 16, block=8)
    free = np.sort(totals_of(importance, found), axis=1)[:, -16:].sum()
    assert found.block_cost == pytest.approx(1 - weight_kept(importance, found) / free)


@pytest.mark.parametrize("kept, block", [(12, 8), (16, 5), (16, 32)])
def test_blocks_must_divide(kept: int, block: int) -> None:
    with pytest.raises(PlanError, match=f"{kept} of 40 channels cannot be kept in blocks of {block}"):
        cocluster(np.ones((4, 40)), 2, kept, block=block)


@pytest.mark.parametrize("form, area", in_turns(FORMS, [1, 4]))
def test_reconstruction_chooses_blocks_for_the_error(form: Form, area: int) -> None:
    better, costs = 0, []
    for seed in range(6):
        given = problem(8, 16, area, seed)
        moments = given.weight, given.gram, given.cross, given.energy
        found = reconstruction(*moments, 2, 8, form, block=4)
        assert in_whole_blocks(found.kept, 4)
        assert GroupedKernels(found.out_order, found.kept, 16, 0.5, block=4).form in (form, "partition")
        assert -found.history[-1] == pytest.approx(given.error(found), rel=1e-6)
        assert found.block_cost is not None
        costs.append(found.block_cost)
        start = cocluster(kernel_energy(given.weight, given.gram), 2, 8, form, block=4)
        assert given.error(found) <= given.error(start) * (1 + 1e-9)
        better += given.error(found) < 0.99 * given.error(start)
    assert better >= 2
    assert max(costs) > 0


# --- layers that do not divide, and budgets -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "channels, arguments, expected",
    [
        (64, {"ratio": 0.5}, Shape("partition", 2, 32, 8)),
        (64, {"ratio": 0.6}, Shape("overlap", 4, 24, 8)),  # 25.6
        (64, {"ratio": 0.99}, Shape("overlap", 4, 8, 8)),  # at least one block
        (24, {"ratio": 0.5, "form": "overlap"}, Shape("overlap", 4, 16, 8)),  # 1.5 blocks: half up
        (48, {"ratio": 0.75}, Shape("partition", 4, 12, 1, "12 channels a group do not divide into blocks of 8")),
        (60, {"ratio": 0.6}, Shape("overlap", 4, 24, 1, "60 channels do not divide into blocks of 8")),
        (16, {"ratio": 0.2}, Shape("overlap", 4, 13, 1, "ratio 0.2 of 16 channels removes no blocks of 8")),
        (8, {"ratio": 0.6}, Shape("overlap", 4, 3, 1, "ratio 0.6 of 8 channels removes no blocks of 8")),
    ],
)
def test_shapes_in_blocks(channels: int, arguments: dict[str, Any], expected: Shape) -> None:
    note = NO_BLOCKS + expected.note if expected.note else ""
    assert choose_shape(64, channels, block=8, **arguments) == expected._replace(note=note)


@pytest.mark.parametrize(
    "channels, ratio, kept, unit",
    [(64, 0.6, 32, 32), (48, 0.6, 16, 16), (40, 0.6, 16, 8), (32, 0.6, 16, 16), (16, 0.6, 8, 8), (60, 0.6, 24, 1)],
)
def test_blocks_that_do_not_fit_are_halved(channels: int, ratio: float, kept: int, unit: int) -> None:
    shape = choose_shape(64, channels, ratio, form="overlap", block=32)
    assert shape[2:4] == (kept, unit)
    assert (unit == 32) == (not shape[4])


@given(st.integers(1, 40), st.floats(0, 1, exclude_max=True), st.integers(1, 9))
def test_the_nearest_number_of_blocks_is_kept(blocks: int, ratio: float, block: int) -> None:
    kept = kept_channels(blocks * block, ratio, block)
    assert kept % block == 0
    assert block <= kept <= blocks * block
    assert abs(kept - (1 - ratio) * blocks * block) <= block / 2 + 1e-6 or kept == block


def test_a_layer_that_does_not_divide_is_pruned_and_noted(net: nn.Module) -> None:
    plan = fxprune.make_plan(net, 0.6, block=16)
    assert list(plan.layers) == ["first", "second", "third"]
    assert plan.notes == {"third": "channels are kept in blocks of 8: 40 channels do not divide into blocks of 16"}
    assert [k.block for k in plan.layers.values()] == [16, 16, 8]
    assert f"note: third: {plan.notes['third']}" in str(plan).splitlines()
    pruned = fxprune.compile(net, 0.6, block=16, example_inputs=X)
    assert f"third: {plan.notes['third']}" in fxprune.report(pruned).notes
    # Alone it is planned as it would be with the shorter ones.
    assert plan.layers["third"] == fxprune.make_plan(net, 0.6, block=8).layers["third"]


@pytest.mark.parametrize("cost, share", in_turns(["macs", "params"], [0.5, 0.7]))
def test_budgets_are_met_in_blocks(net: nn.Module, cost: str, share: float) -> None:
    pruned = fxprune.compile(net, **{cost: share}, block=8, example_inputs=X)  # type: ignore[arg-type]  # by name
    report = fxprune.report(pruned)
    assert report.notes == ()
    dense, left = getattr(report, f"{cost}_dense"), getattr(report, f"{cost}_pruned")
    assert left / dense == pytest.approx(share, rel=0.012)
    assert any(layer.block_cost is not None for layer in report.layers)


def test_a_budget_that_blocks_are_too_coarse_for(net: nn.Module) -> None:
    fxprune.make_plan(net, macs=0.8, ignore=("second", "third"), example_inputs=X)
    with pytest.raises(PlanError, match="cannot be met within 1% by removing blocks of 32 channels"):
        fxprune.make_plan(net, macs=0.8, ignore=("second", "third"), block=32, example_inputs=X)


# --- plans for a kind of device -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "filters, target, groups",
    [
        *[(filters, target, 8) for filters in (128, 512, 1024) for target in (None, "cpu")],
        *[(512, "cuda", 8), (256, "cuda", 4), (128, "cuda", 2), (320, "cuda", 4), (192, "cuda", 2)],
        *[(64, "cuda", 2), (96, "cuda", 2), (32, "cuda", 1), (48, "cuda", 1), (16, "cuda", 1)],
        *[(64, "cpu", 4), (32, "cpu", 2), (16, "cpu", 2)],
    ],
)
def test_automatic_groups_suit_the_target(filters: int, target: str | None, groups: int) -> None:
    assert choose_shape(filters, 64, 0.6, target=target) == Shape("overlap", groups, 26)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_target_leaves_form_and_explicit_groups_alone(target: str) -> None:
    assert choose_shape(64, 64, 0.75, target=target) == Shape("partition", 4, 16)
    assert choose_shape(64, 64, 0.6, 8, target=target) == Shape("overlap", 8, 26)
    assert choose_shape(17, 64, 0.6, target=target) == "17 filters do not divide into 2 groups"


@pytest.mark.parametrize(
    "block, target, method, expected",
    [
        (None, None, "auto", 1),
        (None, "cpu", "auto", 1),
        (None, "cuda", "auto", 16),
        (None, "cuda", "tmi", 1),
        (1, "cuda", "auto", 1),
        (4, "cuda", "auto", 4),
        (1, None, "srgkp", 1),
        (16, None, "cocluster", 16),
    ],
)
def test_blocks_by_default(block: int | None, target: str | None, method: str, expected: int) -> None:
    assert Request(block=block, target=target, method=method, snapshots=[{}]).effective_block == expected  # type: ignore[arg-type]


def test_a_plan_for_cuda_has_wide_groups_and_blocks_of_16(net: nn.Module) -> None:
    plan = fxprune.make_plan(net, 0.6, target="cuda")
    assert [(k.groups, k.block) for k in plan.layers.values()] == [(2, 16), (1, 16), (2, 8)]
    assert set(plan.notes) == {"third"}
    assert plan.notes["third"] == "channels are kept in blocks of 8: 40 channels do not divide into blocks of 16"
    assert plan == fxprune.make_plan(net, 0.6, target="cuda")
    assert fxprune.make_plan(net, 0.6, target="cpu") == fxprune.make_plan(net, 0.6)
    masked = fxprune.mask(net, plan)
    fxprune.verify(fxprune.rewrite(masked, plan, X), masked, X)
    table = fxprune.measure_sensitivity(net, target="cuda", example_inputs=X)
    assert [layer.groups for layer in table.layers] == [2, 1, 2]


def test_a_published_method_keeps_its_channels_and_says_so(net: nn.Module) -> None:
    plan = fxprune.make_plan(net, 0.6, method="srgkp", target="cuda")
    assert set(plan.notes) == set(plan.layers)
    assert plan.notes["first"] == "method 'srgkp' keeps channels one by one, not in aligned blocks"
    assert not fxprune.make_plan(net, 0.6, method="srgkp", target="cuda", block=1).notes


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"block": 0}, "block is 0; it must be a positive integer, such as 8, or None for what suits the target"),
        ({"block": -8}, "block is -8;"),
        ({"block": 8.0}, "block is 8.0;"),
        ({"block": True}, "block is True;"),
        ({"block": "8"}, "block is '8';"),
        ({"target": "gpu"}, "target is 'gpu' (near: 'cpu'); it must be one of 'cpu', 'cuda'"),
        ({"target": "cudo"}, "target is 'cudo' (near: 'cuda', 'cpu'); it must be"),
        ({"block": 8, "method": "srgkp"}, "method 'srgkp' chooses channels one by one; leave block out, or use 'coclu"),
        ({"block": 8, "method": "tmi", "snapshots": [{}]}, "method 'tmi' chooses channels one by one; leave block out"),
        ({"block": 0, "macs": 0.5}, "block is 0;"),
        ({"target": "gpu", "macs": 0.5}, "target is 'gpu'"),
    ],
)
def test_illegal_blocks_and_targets_are_refused(net: nn.Module, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        fxprune.make_plan(net, example_inputs=X, **arguments)


# --- the plan as data, the report, files, the command line ----------------------------------------------------------

ALIGNED: Mapping[str, Any] = {"kept": ((0, 1, 4, 5), (2, 3, 4, 5)), "in_channels": 6, "asked_ratio": 0.5, "block": 2}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kept": ((0, 1, 4, 5), (1, 2, 4, 5))}, "the channels of group 1 are no union of blocks of 2 that start at"),
        ({"kept": ((0, 1, 2, 4), (2, 3, 4, 5))}, "the channels of group 0 are no union of blocks of 2"),
        ({"kept": ((0, 1, 4), (2, 3, 4))}, "the channels of group 0 are no union of blocks of 2"),
        ({"in_channels": 7}, "7 channels do not divide into blocks of 2; use block=1"),
        ({"block": 4}, "6 channels do not divide into blocks of 4"),
        ({"block": 0}, "block is 0; it must be a positive integer"),
        ({"block": 1.0}, "block is 1.0; it must be a positive integer"),
        ({"block_cost": 1.5}, "block_cost is 1.5; it must be a number in [0, 1]"),
        ({"block_cost": "0"}, "block_cost is '0'"),
    ],
)
def test_kernels_that_are_not_what_they_claim(changes: dict[str, Any], message: str) -> None:
    GroupedKernels((0, 1), **ALIGNED)
    with pytest.raises(PlanError, match=re.escape(message)):
        GroupedKernels((0, 1), **{**ALIGNED, **changes})


def test_the_text_of_a_plan_names_blocks_and_their_cost() -> None:
    kernels = GroupedKernels((0, 1), **ALIGNED, block_cost=0.034)
    assert "each keeps 4 of 6 channels in blocks of 2 (ratio 0.3333)" in str(kernels)
    lines = str(PrunePlan({"conv": kernels})).splitlines()
    assert re.search(r"ratio \(asked\) +blocks \(cost\)$", lines[2])
    assert re.search(r"0\.3333 \(0\.5\) +2 \(3\.4 %\)$", lines[3])


def test_plans_of_earlier_versions_still_load(net: nn.Module) -> None:
    plan = fxprune.make_plan(net, 0.5)
    data = json.loads(plan.to_json())
    del data["notes"]
    for layer in data["layers"].values():
        del layer["block"], layer["block_cost"]
    assert PrunePlan.from_json(json.dumps(data)) == plan


def test_notes_are_about_planned_layers_and_constant(net: nn.Module) -> None:
    with pytest.raises(PlanError, match="notes: 'stem' is no planned layer"):
        PrunePlan({}, {"stem": "why"}, notes={"stem": "what"})
    with pytest.raises(PlanError, match="notes: 'first' maps to a int"):
        PrunePlan({}, notes={"first": 1})  # type: ignore[dict-item]
    plan = fxprune.make_plan(net, block=16)
    assert plan.notes
    assert copy.deepcopy(plan) == plan
    with pytest.raises(TypeError):
        plan.notes["first"] = "other"  # type: ignore[index]


def test_the_report_shows_the_cost(net: nn.Module, tmp_path: Path) -> None:
    pruned = fxprune.compile(net, 0.6, block=8, example_inputs=X)
    report = fxprune.report(pruned)
    costs = {layer.name: layer.block_cost for layer in report.layers}
    plan = fxprune.make_plan(net, 0.6, block=8, example_inputs=X)
    assert costs == {"stem": None} | {name: kernels.block_cost for name, kernels in plan.layers.items()}
    assert all(cost is not None and 0 < cost < 0.3 for name, cost in costs.items() if name != "stem")
    header, *lines = str(report).splitlines()[5:]
    assert header.endswith("block cost")
    first = next(line for line in lines if line.startswith("first"))
    assert first.endswith(f"{100 * (costs['first'] or 0):.1f} %")
    assert "block cost" not in str(fxprune.report(fxprune.compile(net, 0.6, example_inputs=X)))
    fxprune.save(pruned, tmp_path / "net.pt")
    assert fxprune.report(fxprune.load(tmp_path / "net.pt", net)).to_dict()["layers"] == report.to_dict()["layers"]
