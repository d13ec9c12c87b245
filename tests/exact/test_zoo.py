"""Every net of the zoo, compiled: the same function as the dense masked model, and all of it grouped that must be."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from equality import (
    MasksPerSample,
    assert_bitwise_equal,
    assert_same_function,
    masked_by_hand,
    randomize,
    small_integers,
)
from products_harness import in_turns, one_in
from torch import Tensor, nn
from zoo import CASES, Case, Inputs

import fxprune
from fxprune.exact.record import record_of
from fxprune.graph.convolutions import Convolution, convolutions
from fxprune.graph.layers import ChannelGather
from fxprune.plans import PrunePlan
from fxprune.vocabulary import FormChoice

FORMS = ("partition", "overlap")
RATIOS = (0.5, 0.75)

# By default every net in the combination that `test_gathers_that_remain` reads too, and every sixth in another.
PRODUCT = [
    *in_turns(CASES, RATIOS[:1], FORMS[:1]),
    *in_turns(CASES, RATIOS[:1], FORMS[1:], step=12),
    *in_turns(CASES, RATIOS[1:], FORMS, start=1, step=12),
]

BY_NAME = {case.name: case for case in CASES}


@dataclass
class Made:
    """A net of the zoo, its compiled form, and the dense masked net that this must equal."""

    model: nn.Module
    pruned: torch.fx.GraphModule
    masked: nn.Module
    plan: PrunePlan

    def __post_init__(self) -> None:
        self._states = [copy.deepcopy(net.state_dict()) for net in (self.pruned, self.masked)]

    def restored(self) -> Made:
        """The same, without what tests did to the weights and statistics."""
        for net, state in zip((self.pruned, self.masked), self._states, strict=True):
            net.load_state_dict(state)
        return self


@cache
def _made(name: str, ratio: float, form: FormChoice, with_inputs: bool) -> Made:
    case = BY_NAME[name]
    model = randomize(case.build().double()).eval()
    before = copy.deepcopy(model.state_dict())
    inputs = case.inputs() if with_inputs else None
    pruned = fxprune.compile(model, ratio, form=form, example_inputs=inputs, verify=False)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} of the user's model has changed"
    plan = record_of(pruned).plan
    return Made(model, pruned, masked_by_hand(model, plan), plan)


def made(case: Case, ratio: float = 0.5, form: FormChoice = "partition", with_inputs: bool = True) -> Made:
    """What several tests look at, compiled once."""
    return _made(case.name, ratio, form, with_inputs).restored()


# --- what the compiler must reach -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case, ratio, form", PRODUCT)
def test_same_function_and_as_much_grouped_as_declared(case: Case, ratio: float, form: FormChoice) -> None:
    net = made(case, ratio, form)
    assert len(net.plan.layers) == case.grouped
    for name, kernels in net.plan.layers.items():
        weight = net.masked.get_parameter(f"{name}.weight")
        zeros = 1 - int(weight.count_nonzero()) / weight.numel()
        assert zeros == pytest.approx(kernels.ratio), f"{name}: the mask removes another share than the plan says"
        assert abs(kernels.ratio - ratio) <= 0.5 / kernels.in_channels, f"{name}: reaches ratio {kernels.ratio}"
    rows = {layer.name: layer for layer in fxprune.report(net.pruned).layers}
    assert rows.keys() == convolutions(net.masked).keys()
    assert {name for name, layer in rows.items() if layer.form == "dense"} == set(case.skipped)
    assert {layer.form for name, layer in rows.items() if name not in case.skipped} <= {form}
    for name, fragment in case.skipped.items():
        assert fragment in rows[name].reason
    assert_same_function(net.pruned, net.masked, case.inputs())


@pytest.mark.parametrize("case", [case for case in CASES if case.gathers is not None], ids=lambda case: case.name)
def test_gathers_that_remain(case: Case) -> None:
    pruned = made(case).pruned
    left = [gather.name for gather in fxprune.report(pruned).gathers]
    assert len(left) == sum(isinstance(module, ChannelGather) for module in pruned.modules())
    assert len(left) == case.gathers, f"these remain: {', '.join(left)}"


@pytest.mark.parametrize("case, form", in_turns([case for case in CASES if case.integer], FORMS, step=5))
def test_integers_are_equal_bit_by_bit(case: Case, form: FormChoice) -> None:
    inputs = tuple((2 * x).round() for x in case.inputs())
    model = small_integers(case.build().double()).eval()
    pruned = fxprune.compile(model, 0.5, form=form, example_inputs=inputs, verify=False)
    plan = record_of(pruned).plan
    assert len(plan.layers) == case.grouped
    assert_bitwise_equal(pruned, masked_by_hand(model, plan), inputs)


@pytest.mark.parametrize("case", one_in(12, CASES))
def test_without_example_inputs(case: Case) -> None:
    net = made(case, with_inputs=False)
    assert len(net.plan.layers) == case.grouped
    assert_same_function(net.pruned, net.masked, case.inputs())


def test_the_plan_in_the_record_is_that_of_make_plan() -> None:
    for case in CASES[::24]:
        net = made(case)
        assert net.plan == fxprune.make_plan(net.model, 0.5, form="partition", example_inputs=case.inputs())


# --- would a mistake be seen? ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case, ratio, form", in_turns(CASES, RATIOS, FORMS, step=6))
def test_every_shift_of_filters_or_indices_is_seen(case: Case, ratio: float, form: FormChoice) -> None:
    net = made(case, ratio, form)
    pruned, masked = net.pruned, net.masked
    assert not differ(pruned, masked, case.inputs())
    seen = 0
    for name, tensors in ordered_tensors(pruned):
        shift(tensors, 1)
        assert differ(pruned, masked, case.inputs()), f"{name}: shifted by one, and nothing shows"
        shift(tensors, -1)
        seen += 1
    assert not differ(pruned, masked, case.inputs())
    assert seen >= case.grouped


def ordered_tensors(pruned: torch.fx.GraphModule) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """The filters (with their biases) of each grouped convolution, and the index of each gather."""
    for name, module in pruned.named_modules():
        if isinstance(module, Convolution) and module.groups > 1:
            yield name, (module.weight,) if module.bias is None else (module.weight, module.bias)
        elif isinstance(module, ChannelGather) and torch.unique(module.index).numel() > 1:
            yield name, (module.index,)


@torch.no_grad()
def shift(tensors: tuple[Tensor, ...], by: int) -> None:
    for tensor in tensors:
        tensor.copy_(tensor.roll(by, 0))


def differ(
    actual: nn.Module, reference: nn.Module, inputs: Inputs, modes: tuple[str, ...] = ("eval",), bitwise: bool = False
) -> bool:
    try:
        if bitwise:
            assert_bitwise_equal(actual, reference, inputs)
        else:
            assert_same_function(actual, reference, inputs, modes)
    except AssertionError:
        return True
    return False


# --- the comparison itself ------------------------------------------------------------------------------------------


class Affine(nn.Module):
    """Conv, BatchNorm, dropout: enough to go wrong in every way that the comparison must see."""

    def __init__(self, dropout_in_training: bool = True, constant: float = 1.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.dropout_in_training = dropout_in_training
        self.constant = constant

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x)) * self.constant
        return nn.functional.dropout(y, 0.5, self.training and self.dropout_in_training)


def affine(dropout_in_training: bool = True, constant: float = 1.0) -> Affine:
    net = Affine(dropout_in_training, constant).double()
    randomize(net)
    return net


def test_comparison_accepts_a_copy() -> None:
    assert not differ(affine(), affine(), CASES[0].inputs(), modes=("eval", "train"))


def test_comparison_sees_a_baked_training_flag() -> None:
    inputs = CASES[0].inputs()
    assert not differ(affine(dropout_in_training=False), affine(), inputs)
    assert differ(affine(dropout_in_training=False), affine(), inputs, modes=("eval", "train"))


def test_comparison_sees_statistics_that_move_in_the_wrong_order() -> None:
    wrong = affine()

    def reverse_update(norm: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        if norm.training:
            assert isinstance(norm, nn.BatchNorm2d)
            assert norm.running_mean is not None
            norm.running_mean.copy_(norm.running_mean.flip(0))

    wrong.norm.register_forward_hook(reverse_update)
    assert not differ(wrong, affine(), CASES[0].inputs())
    assert differ(wrong, affine(), CASES[0].inputs(), modes=("eval", "train"))


@pytest.mark.parametrize("constant", [0.0, float("nan"), float("inf")])
def test_comparison_refuses_an_empty_reference(constant: float) -> None:
    assert differ(affine(constant=constant), affine(constant=constant), CASES[0].inputs())


def test_comparison_of_bits_sees_the_last_one() -> None:
    inputs = tuple((2 * x).round() for x in CASES[0].inputs())
    off_by_one_bit = small_integers(affine(constant=1 + 2**-52))
    assert not differ(small_integers(affine()), small_integers(affine()), inputs, bitwise=True)
    assert differ(off_by_one_bit, small_integers(affine()), inputs, bitwise=True)


def test_masks_are_drawn_per_sample() -> None:
    with MasksPerSample():
        dropped = nn.functional.dropout(torch.ones(64, 8, 3), 0.5, training=True)
    assert set(torch.unique(dropped).tolist()) == {0.0, 2.0}
    assert all(torch.unique(sample).numel() == 1 for sample in dropped)
