"""Every net of the zoo, compiled: the same function as the dense masked model, and all of it grouped that must be."""

import copy
from collections.abc import Iterator

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
from torch import Tensor, nn
from zoo import CASES, Case, Inputs

import fxprune
from fxprune.graph.layers import ChannelGather
from fxprune.plans import PrunePlan

FORMS = ("partition", "overlap")
RATIOS = (0.5, 0.75)

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def dense(case: Case) -> nn.Module:
    return randomize(case.build().double()).eval()


def compiled(
    model: nn.Module, inputs: Inputs | None, ratio: float = 0.5, form: str = "partition"
) -> tuple[torch.fx.GraphModule, nn.Module, PrunePlan]:
    """The compiled model, the dense masked one it must equal, and the plan of both."""
    plan = fxprune.make_plan(model, ratio, form=form, example_inputs=inputs)
    pruned = fxprune.compile(model, ratio, form=form, example_inputs=inputs, verify=False)
    return pruned, masked_by_hand(model, plan), plan


# --- what the compiler must reach -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("form", FORMS)
@each_case
def test_same_function_and_as_much_grouped_as_declared(case: Case, form: str, ratio: float) -> None:
    model = dense(case)
    before = copy.deepcopy(model.state_dict())
    pruned, masked, plan = compiled(model, case.inputs(), ratio, form)
    assert_same_function(pruned, masked, case.inputs())

    assert len(plan.layers) == case.grouped
    for name, kernels in plan.layers.items():
        weight = masked.get_parameter(f"{name}.weight")
        zeros = 1 - int(weight.count_nonzero()) / weight.numel()
        assert zeros == pytest.approx(kernels.ratio), f"{name}: the mask removes another share than the plan says"
        assert abs(kernels.ratio - ratio) <= 0.5 / kernels.in_channels, f"{name}: reaches ratio {kernels.ratio}"
    layers = {layer.name: layer for layer in fxprune.report(pruned).layers}
    assert {name for name, layer in layers.items() if layer.form == "dense"} == set(case.skipped)
    assert {layer.form for name, layer in layers.items() if name not in case.skipped} <= {form}
    for name, fragment in case.skipped.items():
        assert fragment in layers[name].reason
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} of the user's model has changed"


@each_case
def test_gathers_that_remain(case: Case) -> None:
    if case.gathers is None:
        pytest.skip("the number of gathers is not declared")
    pruned, _, _ = compiled(dense(case), case.inputs())
    left = [gather.name for gather in fxprune.report(pruned).gathers]
    assert len(left) == sum(isinstance(module, ChannelGather) for module in pruned.modules())
    assert len(left) == case.gathers, f"these remain: {', '.join(left)}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", [case for case in CASES if case.integer], ids=lambda case: case.name)
def test_integers_are_equal_bit_by_bit(case: Case, form: str) -> None:
    inputs = tuple((2 * x).round() for x in case.inputs())
    pruned, masked, plan = compiled(small_integers(case.build().double()).eval(), inputs, form=form)
    assert len(plan.layers) == case.grouped
    assert_bitwise_equal(pruned, masked, inputs)


@each_case
def test_without_example_inputs(case: Case) -> None:
    pruned, masked, plan = compiled(dense(case), None)
    assert len(plan.layers) == case.grouped
    assert_same_function(pruned, masked, case.inputs())


# --- would a mistake be seen? ---------------------------------------------------------------------------------------


@each_case
def test_every_shift_of_filters_or_indices_is_seen(case: Case) -> None:
    pruned, masked, _ = compiled(dense(case), case.inputs())
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
        if isinstance(module, nn.Conv2d) and module.groups > 1:
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
