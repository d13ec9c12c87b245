"""AlignWindows: the gathers that remain read few windows, and the function stays."""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from equality import randomize
from passes_harness import check_pass, gather, image, prepared
from products_harness import one_in
from torch import Tensor, fx, nn
from zoo import CASES, Case

import fxprune
from fxprune.channels import Blocks, ChannelAnalysis
from fxprune.channels.atoms import Array
from fxprune.exact.pipeline import default_pipeline, run
from fxprune.exact.verification import difference, evaluate
from fxprune.graph.editing import Outcome
from fxprune.graph.examples import Example
from fxprune.graph.layers import ChannelGather
from fxprune.graph.tracing import trace
from fxprune.graph.values import CarriedValues
from fxprune.models import load_model
from fxprune.passes import AbsorbGathers, AlignWindows, MergeGathers, align_windows
from fxprune.passes.align_windows import runs
from fxprune.plans import GroupedKernels, PrunePlan
from fxprune.vocabulary import FormChoice


class AlignAndAbsorb:
    """What the pipeline does from here on: the new orders go into the layers."""

    def __init__(self, *inputs: Tensor) -> None:
        self.inputs = tuple(x.to("meta") for x in inputs)

    def __call__(self, gm: fx.GraphModule) -> Outcome:
        outcome = AlignWindows(CarriedValues(self.inputs))(gm)
        AbsorbGathers()(gm)
        MergeGathers()(gm)
        return outcome


class Net(nn.Module):
    """`before`, a ReLU, the gather `g`, `after`; `before` is dense or grouped, `after` has the groups of the gather."""

    def __init__(self, index: list[int], channels: int, groups: int, groups_before: int = 1) -> None:
        super().__init__()
        self.before = nn.Conv2d(4, channels, 1, groups=groups_before)
        self.g = gather(index, channels)
        self.after = nn.Conv2d(len(index), 2 * groups, 3, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(self.g(self.before(x).relu()))
        return y


def indices(gm: nn.Module) -> list[Tensor]:
    return [module.index for module in gm.modules() if isinstance(module, ChannelGather)]


def total_runs(gm: nn.Module) -> int:
    return sum(runs(index) for index in indices(gm))


def halves(groups: int, channels: int, seed: int = 0) -> list[int]:
    """The index of a gather for `groups` groups that each read a random half of the channels."""
    generator = torch.Generator().manual_seed(seed)
    kept = [torch.randperm(channels, generator=generator)[: channels // 2].sort()[0] for _ in range(groups)]
    return [int(c) for c in torch.cat(kept)]


@pytest.mark.parametrize(
    "index, expected",
    [([], 0), ([3], 1), ([0, 1, 2], 1), ([2, 1, 0], 3), ([0, 1, 1, 2], 2), ([4, 5, 0, 1, 2, 7], 3)],
)
def test_runs(index: list[int], expected: int) -> None:
    assert runs(torch.tensor(index)) == expected


# --- few windows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_two_groups_read_one_window_each(seed: int) -> None:
    net = prepared(Net(halves(2, 16, seed), 16, groups=2))
    assert total_runs(net) > 4
    gm, outcome = check_pass(AlignAndAbsorb(image()), net, image(), after="x -> before -> relu -> g -> after -> output")
    assert [runs(part) for part in gm.get_buffer("g.index").chunk(2)] == [1, 1]
    assert set(outcome.rewritten) == {"before", "g", "after"}


def test_four_groups_read_two_windows_each_even_if_all_combinations_occur() -> None:
    """Channel c is read by the groups whose bit is set in c: the index of no group is contiguous anywhere."""
    index = [c for g in range(4) for c in range(16) if c >> g & 1]
    net = prepared(Net(index, 16, groups=4))
    gm, _ = check_pass(AlignAndAbsorb(image()), net, image(), after="x -> before -> relu -> g -> after -> output")
    assert sum(runs(part) for part in gm.get_buffer("g.index").chunk(4)) == 8
    assert total_runs(net) == 16 - 1  # group 0 ends where group 3 does, at 15; the first of group 3 follows none


def test_filters_stay_in_their_group() -> None:
    """A grouped layer before the gather cannot send a filter to another group: its groups are ordered one by one."""
    net = prepared(Net(halves(2, 16), 16, groups=2, groups_before=2))
    gm, _ = check_pass(AlignAndAbsorb(image()), net, image(), after="x -> before -> relu -> g -> after -> output")
    assert total_runs(gm) < total_runs(net)
    for ours, theirs in zip(
        gm.get_parameter("before.weight").chunk(2), net.get_parameter("before.weight").chunk(2), strict=True
    ):
        assert torch.equal(ours.flatten().sort()[0], theirs.flatten().sort()[0])


@pytest.mark.slow
def test_every_3x3_of_a_bottleneck_resnet_reads_two_windows() -> None:
    model, x = load_model("resnet50"), torch.zeros(1, 3, 64, 64)
    ratio = {
        name: 0.5 if module.kernel_size == (3, 3) else 0.0
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    pruned = fxprune.compile(model, ratio, groups=2, form="overlap", example_inputs=x, verify=False)
    assert [tuple(map(runs, index.chunk(2))) for index in indices(pruned)] == [(1, 1)] * 16


# --- gathers that vanish ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "index, after",
    [
        ([2, 0, 1, 3, 5, 7, 4, 6], "x -> before -> relu -> after -> output"),  # inside the groups of both
        ([2, 4, 0, 6, 3, 5, 1, 7], "x -> before -> relu -> g -> after -> output"),  # two of each to each: no block fits
    ],
    ids=["inside", "across"],
)
def test_a_permutation_inside_the_groups_of_either_side_vanishes(index: list[int], after: str) -> None:
    check_pass(AlignAndAbsorb(image()), prepared(Net(index, 8, groups=2, groups_before=2)), image(), after=after)


def test_orders_inside_the_groups_of_both_sides_meet_halfway() -> None:
    """Two groups of six before, three of four after: the middle one reads from both, so neither side alone can make
    the gather the identity.
    """
    net = prepared(Net([5, 0, 3, 1, 8, 2, 11, 4, 6, 7, 9, 10], 12, groups=3, groups_before=2))
    gm, _ = check_pass(AbsorbGathers(), net, image(), after="x -> before -> relu -> g -> after -> output")
    assert len(indices(gm)) == 1
    check_pass(AlignAndAbsorb(image()), net, image(), after="x -> before -> relu -> after -> output")


# --- what is left alone -----------------------------------------------------------------------------------------------


def test_left_alone_without_shapes_or_gathers() -> None:
    gm = trace(prepared(Net(halves(2, 16), 16, groups=2)), image()).module
    assert AlignWindows(CarriedValues(()))(gm) == Outcome()
    dense = trace(prepared(nn.Conv2d(4, 4, 1)), image()).module
    assert AlignWindows(CarriedValues((image().to("meta"),)))(dense) == Outcome()


def test_left_alone_where_the_input_fixes_the_order() -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g, self.after = gather([0, 2, 1, 3], 4), nn.Conv2d(4, 4, 1, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.after(self.g(x))
            return y

    check_pass(AlignAndAbsorb(image()), prepared(Direct()), image(), after="x -> g -> after -> output")


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "control"])
def test_a_layer_whose_weight_is_read_by_name_keeps_its_order(monkeypatch: pytest.MonkeyPatch, guarded: bool) -> None:
    """Storing another order is refused there: a gather beside it would cost more than it saves."""

    class Named(Net):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x) * torch.cumsum(self.before.weight, 0).std()
            return y

    if not guarded:
        monkeypatch.setattr(align_windows, "_movable", lambda gm, analysis: analysis.blocks)
    net = prepared(Named(halves(2, 16), 16, groups=2))
    gm = trace(net, image()).module
    AlignAndAbsorb(image())(gm)
    assert len(indices(gm)) == (1 if guarded else 2)
    assert (
        difference(
            evaluate(gm, Example((image(),)), "eval").tensors, evaluate(net, Example((image(),)), "eval").tensors
        )[1]
        <= 1e-10
    )


def test_a_gather_called_twice_gets_an_index_for_each_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 16, 1), nn.Conv2d(4, 16, 1)
            self.g = gather(halves(2, 16), 16)
            self.c, self.d = nn.Conv2d(16, 4, 1, groups=2), nn.Conv2d(16, 4, 1, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.c(self.g(self.a(x))) + self.d(self.g(self.b(x).relu()))
            return y

    gm, _ = check_pass(
        AlignAndAbsorb(image()),
        prepared(Twice()),
        image(),
        after="""x -> a -> g -> c
                 x -> b -> relu -> g_1 -> d
                 c, d -> add -> output""",
    )
    assert [runs(index) for index in indices(gm)] == [2, 2]


# --- on the whole zoo -------------------------------------------------------------------------------------------------


def before_aligning(case: Case, form: FormChoice) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    model = randomize(case.build().double()).eval()
    plan = fxprune.make_plan(model, 0.5, form=form, example_inputs=case.inputs())
    traced = trace(fxprune.mask(model, plan), case.inputs())
    passes = default_pipeline(plan, CarriedValues(traced.inputs, traced.values))
    run(traced.module, passes[: [type(p) for p in passes].index(AlignWindows)], traced.inputs)
    return traced.module, traced.inputs


@pytest.mark.parametrize("case", one_in(8, CASES, start=1))
def test_runs_and_gathers_never_grow_and_the_function_stays(case: Case) -> None:
    gm, meta = before_aligning(case, "overlap")
    expected = evaluate(gm, Example(case.inputs()), "eval").tensors
    runs_before, gathers_before = total_runs(gm), len(indices(gm))
    run(gm, (AlignAndAbsorb(*meta),), meta)
    assert difference(evaluate(gm, Example(case.inputs()), "eval").tensors, expected)[1] <= 1e-10
    assert total_runs(gm) <= runs_before
    assert len(indices(gm)) <= gathers_before


def test_control_the_zoo_has_runs_to_save() -> None:
    gm, meta = before_aligning(next(case for case in CASES if case.name == "Plain"), "overlap")
    before = total_runs(gm)
    run(gm, (AlignAndAbsorb(*meta),), meta)
    assert total_runs(gm) < before / 2


def test_random_chains_of_overlapping_plans() -> None:
    """Residual streams with several readers, whose wishes conflict: in total the runs fall, the function stays."""

    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(4, 16, 1)
            self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.stem(x)
            for first, second in zip(self.convs[::2], self.convs[1::2], strict=True):
                y = y + second(first(y).relu())
            return y.exp()

    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        layers = {
            f"convs.{i}": GroupedKernels(
                tuple(torch.randperm(16, generator=generator).tolist()),
                tuple(tuple(part) for part in np.reshape(halves(4, 16, 10 * seed + i), (4, 8)).tolist()),
                16,
                asked_ratio=0.5,
            )
            for i in range(4)
        }
        plan = PrunePlan(layers)
        masked = fxprune.mask(prepared(Stream()), plan)
        inputs = (image().to("meta"),)
        short, whole = trace(masked, image()).module, trace(masked, image()).module
        run(short, default_pipeline(plan, CarriedValues(inputs))[:5], inputs)
        run(whole, default_pipeline(plan, CarriedValues(inputs)), inputs)
        assert total_runs(whole) < 0.8 * total_runs(short)
        expected = evaluate(masked, Example((image(),)), "eval").tensors
        assert difference(evaluate(whole, Example((image(),)), "eval").tensors, expected)[1] <= 1e-10


# --- controls ---------------------------------------------------------------------------------------------------------


def nothing(*_: object) -> Iterator[str]:
    return iter(())


def inverse(gm: fx.GraphModule, reads: list[align_windows._Read], moved: Array) -> Iterator[str]:
    return reindex(gm, reads, np.argsort(moved))


reindex = align_windows._reindex


@pytest.mark.parametrize(
    "name, broken",
    [("_reindex", nothing), ("reorder", nothing), ("_reindex", inverse)],
    ids=["index not changed", "layers not changed", "the wrong way round"],
)
def test_control_what_breaks_the_permutation_is_seen(
    monkeypatch: pytest.MonkeyPatch, name: str, broken: Callable[..., object]
) -> None:
    monkeypatch.setattr(align_windows, name, broken)
    with pytest.raises(AssertionError, match=r"max .difference"):
        check_pass(
            AlignAndAbsorb(image()),
            prepared(Net(halves(2, 16), 16, groups=2)),
            image(),
            after="x -> before -> relu -> g -> after -> output",
        )


def test_control_filters_that_change_groups_would_need_another_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the blocks of the analysis the windows are perfect and the layers cannot follow."""
    right = align_windows._movable

    def one_block(gm: fx.GraphModule, analysis: ChannelAnalysis) -> Blocks:
        blocks = right(gm, analysis)
        blocks.block_of[blocks.block_of >= 0] = 0
        return blocks

    monkeypatch.setattr(align_windows, "_movable", one_block)
    net = prepared(Net(halves(2, 16), 16, groups=2, groups_before=2))
    with pytest.raises((AssertionError, fxprune.FxpruneError)):
        check_pass(AlignAndAbsorb(image()), net, image(), after="x -> before -> relu -> g -> after -> output")


def test_both_paths_beat_the_order_in_which_channels_come() -> None:
    """The claim of the module about four and eight groups, on random halves of 256 channels."""
    generator = np.random.default_rng(0)

    def windows(choose: Callable[[align_windows.Sets, align_windows.Sets], Array], groups: int) -> float:
        sets = np.stack([generator.permutation(256) < 128 for _ in range(groups)], axis=1)
        ordered = sets[choose(sets, np.zeros(groups, dtype=bool))]
        return sum(runs(torch.from_numpy(np.flatnonzero(column))) for column in ordered.T) / groups

    assert windows(align_windows._by_gray_code, 4) == 2
    assert windows(align_windows._by_nearest, 8) < windows(align_windows._by_gray_code, 8) < 16
    for choose, groups in itertools.product((align_windows._by_gray_code, align_windows._by_nearest), (2, 4, 8)):
        assert windows(choose, groups) < windows(align_windows._as_they_come, groups) / 4
