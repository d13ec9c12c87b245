"""Blocks that a plan keeps are still blocks when the convolution reads them, whatever the passes reordered."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from equality import assert_same_function, masked_by_hand, randomize
from hypothesis import given
from hypothesis import strategies as st
from passes_harness import check_pass, gather, image, prepared, reasons, show
from products_harness import examples, fewer, in_turns
from torch import Tensor, fx, nn
from zoo import CASES, Case

import fxprune
from fxprune import GroupedKernels, PrunePlan
from fxprune.channels.orders import Read, alignment
from fxprune.exact.pipeline import default_pipeline
from fxprune.graph.editing import Outcome, calls
from fxprune.graph.fused import FusedConv2d
from fxprune.graph.layers import ChannelGather
from fxprune.graph.tracing import trace
from fxprune.graph.values import CarriedValues
from fxprune.inference.kernels.gather_conv import aligned_block
from fxprune.models import load_model
from fxprune.passes import (
    AbsorbGathers,
    AlignWindows,
    FoldBatchNorm,
    FuseConvs,
    MergeGathers,
    SinkGathers,
    align_windows,
    merge_gathers,
    sink_gathers,
)
from fxprune.vocabulary import FormChoice

META = (image().to("meta"),)


def fused(pruned: fx.GraphModule, *inputs: Tensor, block: int) -> fx.GraphModule:
    FoldBatchNorm()(pruned.eval())
    FuseConvs(tuple(x.to("meta") for x in inputs), block=block)(pruned)
    pruned.recompile()
    return pruned


def misaligned(gm: fx.GraphModule, plan: PrunePlan) -> dict[str, int]:
    """Planned layers that do not read aligned blocks as planned, and what they read."""
    found = {}
    for node, conv in calls(gm, FusedConv2d):
        name = str(node.target).removesuffix("_fused")
        if name in plan.layers:
            block = plan.layers[name].block
            if (reached := alignment(conv.reads().flatten().numpy(), block)) < block:
                found[name] = reached
    return found


@pytest.fixture
def without_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes as they are for plans without blocks."""
    monkeypatch.setattr(math, "lcm", lambda *_: 1)


# --- alignment of an index --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "index, expected",
    [
        ([*range(8, 16), *range(0, 8)], 8),
        ([*range(8, 12), *range(0, 4)], 4),
        ([*range(8, 14), *range(0, 2)], 2),
        ([*range(4, 12)], 4),  # starts between two multiples of 8
        ([*range(1, 9)], 1),
        ([0, 1, 2, 3, 5, 4, 6, 7], 1),
        ([*range(24)], 8),
        ([*range(12)], 4),
        ([*range(8), *range(8)], 8),
    ],
)
def test_alignment(index: list[int], expected: int) -> None:
    assert alignment(np.array(index), 8) == expected
    assert alignment(np.array(index), 1) == 1
    assert alignment(np.array(index), 24) in (expected, 3 * expected)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.sampled_from([1, 2, 3, 4, 6, 8]), st.integers(0, 7))
def test_alignment_is_the_largest_block_that_fits(starts: list[int], length: int, shift: int) -> None:
    index = np.concatenate([np.arange(length) + start * length + shift for start in starts])

    def fits(block: int) -> bool:
        if index.size % block:
            return False
        rows = index.reshape(-1, block)
        return bool((rows[:, 0] % block == 0).all() and (rows == rows[:, :1] + np.arange(block)).all())

    assert alignment(index, 24) == max(block for block in range(1, 25) if 24 % block == 0 and fits(block))


# --- whole networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case, form", in_turns(CASES[::3], ["partition", "overlap"], step=4))
def test_the_zoo_reads_the_blocks_of_the_plan(case: Case, form: FormChoice) -> None:
    model = randomize(case.build().double()).eval()
    plan = fxprune.make_plan(model, 0.5, form=form, block=4, example_inputs=case.inputs())
    masked = masked_by_hand(model, plan)
    pruned = fxprune.rewrite(masked, plan, example_inputs=case.inputs())
    assert_same_function(pruned, masked, case.inputs())
    gm = fused(pruned, *case.inputs(), block=4)
    assert misaligned(gm, plan) == {}
    assert_same_function(gm, masked, case.inputs(), modes=("eval",))


def test_control_the_zoo_would_not_without_the_rule(without_rule: None) -> None:
    torn = 0
    for case in CASES[::12]:
        model = randomize(case.build().double()).eval()
        plan = fxprune.make_plan(model, 0.5, form="overlap", block=4, example_inputs=case.inputs())
        pruned = fxprune.rewrite(masked_by_hand(model, plan), plan, example_inputs=case.inputs())
        torn += bool(misaligned(fused(pruned, *case.inputs(), block=4), plan))
    assert torn >= 2


@pytest.mark.parametrize("ratio", fewer([0.5, 0.6], [0.6]))
def test_resnet18_reads_blocks_of_eight_and_gathers_nothing_on_its_own(ratio: float) -> None:
    model, x = load_model("resnet18"), torch.zeros(1, 3, 64, 64)
    plan = fxprune.make_plan(model, ratio, target="cuda", block=8, example_inputs=x)
    assert {kernels.block for kernels in plan.layers.values()} == {8}
    gm = fused(fxprune.rewrite(fxprune.mask(model, plan), plan, example_inputs=x), x, block=8)
    convs = {str(node.target).removesuffix("_fused"): conv for node, conv in calls(gm, FusedConv2d)}
    blocks = {name: aligned_block(convs[name].reads().flatten(), convs[name].weight.shape[1]) for name in plan.layers}
    assert len(blocks) == 19
    assert min(blocks.values()) >= 8
    kinds = {type(module) for _, module in calls(gm, nn.Module)}
    assert kinds.isdisjoint({ChannelGather, nn.BatchNorm2d, nn.ReLU})


def test_control_resnet18_would_read_single_channels_without_the_rule(without_rule: None) -> None:
    model, x = load_model("resnet18"), torch.zeros(1, 3, 64, 64)
    plan = fxprune.make_plan(model, 0.6, target="cuda", block=8, example_inputs=x)
    gm = fused(fxprune.rewrite(fxprune.mask(model, plan), plan, example_inputs=x), x, block=8)
    assert set(misaligned(gm, plan).values()) <= {1, 2}
    assert len(misaligned(gm, plan)) == 19


# --- which passes the plan asks for -----------------------------------------------------------------------------------


def plan_of(*blocks: int) -> PrunePlan:
    kernels = {
        f"layer{i}": GroupedKernels(tuple(range(4)), (tuple(range(block)),) * 2, 4 * block, 0.75, block=block)
        for i, block in enumerate(blocks)
    }
    return PrunePlan(kernels)


@pytest.mark.parametrize("blocks, expected", [((), 1), ((1, 1), 1), ((8, 1), 8), ((4, 6), 12)])
def test_the_passes_know_the_blocks_of_the_plan(blocks: tuple[int, ...], expected: int) -> None:
    passes = default_pipeline(plan_of(*blocks), CarriedValues(META))
    assert {p.block for p in passes if isinstance(p, SinkGathers | MergeGathers | AlignWindows)} == {expected}
    if expected == 1:
        assert passes[1:] == (
            MergeGathers(), SinkGathers(CarriedValues(META)), MergeGathers(), AbsorbGathers(),
            AlignWindows(CarriedValues(META)), AbsorbGathers(), MergeGathers(),
        )  # fmt: skip


# --- single passes ----------------------------------------------------------------------------------------------------

SINGLE = (3, 1, 7, 0, 4, 6, 2, 5)  # tears every block of two apart
WHOLE = (4, 5, 0, 1, 6, 7, 2, 3)  # moves blocks of two
KEPT = (2, 3, 6, 7, 4, 5, 2, 3)  # two groups of two blocks each


class Net(nn.Module):
    """`c` of two groups, the gather `restore`, what `body` puts between, the gather `kept`, and `d` of two groups."""

    def __init__(self, restore: tuple[int, ...], body: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(4, 8, 1, groups=2), nn.Conv2d(8, 4, 1, groups=2)
        self.restore, self.kept = gather(restore, 8), gather(KEPT, 8)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.d(self.kept(self.body(self.restore(self.c(x)))))
        return y


APART = "x -> c -> restore -> relu -> kept -> d -> output"


def test_sinking_leaves_single_channels_to_the_convolution_that_writes_them() -> None:
    gm, outcome = check_pass(SinkGathers(CarriedValues(META), block=2), prepared(Net(SINGLE)), image(), after=APART)
    assert reasons(outcome) == {"restore": "it would tear apart the blocks of 2 channels that kept reads"}
    assert alignment(gm.get_buffer("kept.index").numpy(), 8) == 2


class Sunk:
    """Sink, then merge what meets."""

    def __init__(self, block: int) -> None:
        self.block = block

    def __call__(self, gm: fx.GraphModule) -> Outcome:
        outcome = SinkGathers(CarriedValues(META), self.block)(gm)
        MergeGathers(self.block)(gm)
        return outcome


@pytest.mark.parametrize("restore, block", [(WHOLE, 2), (SINGLE, 1)], ids=["whole blocks", "no blocks"])
def test_sinking_serves_what_moves_whole_blocks(restore: tuple[int, ...], block: int) -> None:
    after = "x -> c -> relu -> kept -> d -> output"
    gm, _ = check_pass(Sunk(block), prepared(Net(restore)), image(), after=after)
    assert alignment(gm.get_buffer("kept.index").numpy(), 2) == block


def test_control_without_the_check_of_wishes_blocks_fall_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink_gathers, "_what_breaks", lambda *_: "")
    gm = trace(prepared(Net(SINGLE)), image()).module
    SinkGathers(CarriedValues(META), block=2)(gm)
    MergeGathers()(gm)
    assert show(gm) == "x -> c -> relu -> kept -> d -> output"
    assert alignment(gm.get_buffer("kept.index").numpy(), 2) == 1


def test_merging_keeps_blocks_apart_from_single_channels() -> None:
    net = prepared(Net(SINGLE, body=lambda x: x))
    after = "x -> c -> restore -> kept -> d -> output"
    gm, outcome = check_pass(MergeGathers(block=2), net, image(), after=after)
    assert reasons(outcome) == {"kept": "after restore its blocks of 2 channels would fall apart"}
    convs = {str(node.target): conv for node, conv in calls(fused(gm, image(), block=2), FusedConv2d)}
    order, index = convs["c_fused"].order, convs["d_fused"].index
    assert order is not None
    assert index is not None
    assert (order.tolist(), index.tolist()) == (list(SINGLE), list(KEPT))


@pytest.mark.parametrize("restore, block", [(WHOLE, 2), (SINGLE, 1)], ids=["whole blocks", "no blocks"])
def test_merging_composes_what_moves_whole_blocks(restore: tuple[int, ...], block: int) -> None:
    net = prepared(Net(restore, body=lambda x: x))
    gm, outcome = check_pass(MergeGathers(block), net, image(), after="x -> c -> kept -> d -> output")
    assert outcome.skipped == ()
    assert alignment(gm.get_buffer("kept.index").numpy(), 2) == block


def test_control_without_the_check_of_indices_they_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_gathers, "feeds_convolution", lambda *_: False)
    gm = trace(prepared(Net(SINGLE, body=lambda x: x)), image()).module
    MergeGathers(block=2)(gm)
    assert show(gm) == "x -> c -> kept -> d -> output"


# --- windows of blocks ------------------------------------------------------------------------------------------------


class Windows(nn.Module):
    """A grouped convolution whose filters `restore` scatters, and one that reads random halves of it in blocks of 4."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        blocks = [torch.randperm(8, generator=generator)[:4].sort()[0] for _ in range(2)]
        kept = (torch.cat(blocks)[:, None] * 4 + torch.arange(4)).flatten().tolist()
        self.c, self.d = nn.Conv2d(4, 32, 1, groups=2), nn.Conv2d(32, 4, 1, groups=2)
        self.restore, self.kept = gather(torch.randperm(32, generator=generator).tolist(), 32), gather(kept, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.d(self.kept(self.restore(self.c(x)).relu()))
        return y


class Aligned:
    """Give the spaces another order, and store it in the layers."""

    def __call__(self, gm: fx.GraphModule) -> Outcome:
        outcome = AlignWindows(CarriedValues(META), block=4)(gm)
        AbsorbGathers()(gm)
        return outcome


@examples(20, derandomize=True)
@given(st.integers(0, 1000))
def test_windows_are_made_of_whole_blocks(seed: int) -> None:
    net = prepared(Windows(seed))
    after = "x -> c -> restore -> relu -> kept -> d -> output"
    gm, _ = check_pass(Aligned(), net, image(), after=after)
    index = gm.get_buffer("kept.index")
    assert alignment(index.numpy(), 4) == 4
    assert [align_windows.runs(part) for part in index.chunk(2)] == [1, 1]
    order = gm.get_buffer("restore.index")
    before = net.get_buffer("restore.index")
    assert align_windows.runs(order) < align_windows.runs(before)  # filters stand in the order of their channels


def test_control_windows_without_the_rule_tear_blocks_apart() -> None:
    torn = 0
    for seed in range(5):
        gm = trace(prepared(Windows(seed)), image()).module
        AlignWindows(CarriedValues(META))(gm)
        torn += alignment(gm.get_buffer("kept.index").numpy(), 4) < 4
    assert torn == 5


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "control"])
def test_an_order_that_tears_blocks_apart_is_not_chosen(checked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is tried and however it is valued, the check comes last."""
    monkeypatch.setattr(align_windows, "_by_gray_code", lambda sets, last: np.roll(np.arange(len(sets)), 1))
    monkeypatch.setattr(align_windows, "_total_runs", lambda _, moved: -int((moved != np.arange(moved.size)).sum()))
    if not checked:
        monkeypatch.setattr(Read, "stays_aligned", lambda *_: True)
    gm = trace(prepared(Windows(0)), image()).module
    assert AlignWindows(CarriedValues(META), block=4)(gm).rewritten
    assert (alignment(gm.get_buffer("kept.index").numpy(), 4) == 4) == checked


# --- a permutation between two convolutions ---------------------------------------------------------------------------


class Adjacent(nn.Module):
    """Two grouped convolutions with nothing but a permutation between."""

    def __init__(self, index: tuple[int, ...]) -> None:
        super().__init__()
        self.c, self.g, self.d = nn.Conv2d(4, 8, 1, groups=2), gather(index, 8), nn.Conv2d(8, 4, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.d(self.g(self.c(x)))
        return y


@pytest.mark.parametrize(
    "index, block, writes",
    [(SINGLE, 2, True), (WHOLE, 2, False), (SINGLE, 1, False)],
    ids=["single channels", "whole blocks", "no blocks"],
)
def test_fusing_gives_single_channels_to_the_convolution_that_writes_them(
    index: tuple[int, ...], block: int, writes: bool
) -> None:
    gm, _ = check_pass(
        FuseConvs(META, block=block),
        prepared(Adjacent(index)),
        image(),
        after="x -> c_fused -> d_fused -> output",
        modes=("eval",),
    )
    written, read = (gm.get_submodule(name) for name in ("c_fused", "d_fused"))
    assert isinstance(written, FusedConv2d)
    assert isinstance(read, FusedConv2d)
    assert (written.order is not None, read.index is not None) == (writes, not writes)
    assert alignment(read.reads().flatten().numpy(), block) == block
