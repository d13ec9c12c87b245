"""compile with calibration data, end to end: the weights that are found, that the graph computes what they do, and what
is left alone.
"""
# nn.Module.__call__ is typed to return Any; each net would need a cast.
# mypy: disable-error-code="no-any-return"

import copy
import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from calibration_harness import Batches, batches, case_of
from equality import assert_same_function, masked_by_hand, outputs, randomize
from models import ENTRIES, Entry, build, eligible
from products_harness import fewer, in_turns
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from zoo import CASES, Case

import fxprune
from fxprune.calibration.refitting import FITS, LayerFit
from fxprune.exact.record import record_of
from fxprune.plans import PrunePlan
from fxprune.vocabulary import FormChoice

# A convolution at several sites is masked and not refitted. In these nets little or nothing else is pruned.
ONLY_SHARED = {"SharedConvInARow", "ResidualSharedConv"}
MOSTLY_SHARED = {"SharedConvTwoInputs"}
# Linear algebra on more than a thousand inputs of each filter.
WIDE = {"ChannelRepeat", "OpaqueRecurrence", "PixelUnshuffle"}


def fits_of(masked: nn.Module) -> dict[str, LayerFit]:
    fits: dict[str, LayerFit] = getattr(masked, FITS)
    return fits


def called_once(model: nn.Module, plan: PrunePlan, inputs: Sequence[Tensor]) -> set[str]:
    """The planned convolutions that one forward pass calls once."""
    calls: Counter[str] = Counter()
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name in plan.layers
    ]
    outputs(model, inputs, "eval")
    for hook in hooks:
        hook.remove()
    return {name for name, count in calls.items() if count == 1}


def output_error(model: nn.Module, dense: nn.Module, data: Batches) -> float:
    """Squared error of the outputs, relative to their variance over the samples."""
    error = variance = 0.0
    for batch in data:
        for ours, theirs in zip(outputs(model, batch, "eval"), outputs(dense, batch, "eval"), strict=True):
            error += float((ours - theirs).double().square().sum())
            variance += float((theirs - theirs.mean(0)).double().square().sum())
    return error / variance


def assert_bitwise(actual: nn.Module, expected: nn.Module) -> None:
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), f"{key} differs"


# --- every net of the zoo -------------------------------------------------------------------------------------------


def runs() -> Iterator[object]:
    """By default every tenth net and the exceptions, each in one form, in turns."""
    for number, case in enumerate(CASES):
        for turn, form in enumerate(("partition", "overlap")):
            few = number % 10 != 0 and case.name not in ONLY_SHARED | MOSTLY_SHARED
            slow = few or number // 10 % 2 != turn or case.name in WIDE
            yield pytest.param(case, form, marks=[pytest.mark.slow] * slow, id=f"{case.name}-{form}")


@pytest.mark.parametrize("case, form", list(runs()))
def test_a_calibrated_net_is_exact_and_refitted(case: Case, form: FormChoice) -> None:
    model = randomize(case.build().double()).eval()
    data = batches(case)
    before, data_before = copy.deepcopy(model.state_dict()), copy.deepcopy(data)
    pruned = fxprune.compile(model, 0.5, form=form, calibration=data, verify=False)
    plan = record_of(pruned).plan
    masked = fxprune.mask(model, plan, data)

    assert not hasattr(model, FITS)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for batch, batch_before in zip(data, data_before, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(batch, batch_before, strict=True))

    # compile found the weights that mask finds, bit by bit, and none of them is in a kernel that the plan drops.
    assert len(plan.layers) == case.grouped
    assert_bitwise(pruned, fxprune.rewrite(masked, plan, tuple(x[:2] for x in data[0])))
    assert_bitwise(masked, masked_by_hand(masked, plan))

    fits = fits_of(masked)
    assert set(fits) == called_once(model, plan, data[0])
    assert_only_fits_changed(masked, fxprune.mask(model, plan), fits)
    errors = {layer.name: layer.error for layer in fxprune.report(pruned).layers if layer.error is not None}
    assert errors == {name: fit.refitted for name, fit in fits.items()}
    assert all(0 <= fit.refitted <= fit.masked for fit in fits.values())
    assert ("error" in str(fxprune.report(pruned))) == bool(fits)

    error, unrefitted = output_error(masked, model, data), output_error(fxprune.mask(model, plan), model, data)
    if case.name in ONLY_SHARED:
        assert not fits
        assert error == unrefitted
    else:
        assert error != unrefitted
        assert error < unrefitted or case.name in MOSTLY_SHARED
    assert_same_function(pruned, masked, case.inputs())  # trains both for a step


def assert_only_fits_changed(masked: nn.Module, unrefitted: nn.Module, fits: dict[str, LayerFit]) -> None:
    """A refit touches the weights and biases of refitted layers, and means of BatchNorm."""
    legal = {f"{name}.{kind}" for name in fits for kind in ("weight", "bias")}
    before = unrefitted.state_dict()
    changed = {key for key, value in masked.state_dict().items() if not torch.equal(value, before[key])}
    assert {f"{name}.weight" for name in fits} <= changed
    assert not {key for key in changed - legal if not key.endswith(".running_mean")}


def test_most_nets_are_not_among_the_exceptions() -> None:
    names = {case.name for case in CASES}
    assert ONLY_SHARED | MOSTLY_SHARED | WIDE < names
    assert len(ONLY_SHARED | MOSTLY_SHARED) <= 3


@pytest.mark.parametrize(
    "name",
    fewer(["Plain", "ResidualAdd", "DenseBlock", "TwoInputs", "SharedConvTwoReaders"], ["ResidualAdd", "TwoInputs"]),
)
def test_make_plan_and_mask_are_the_first_steps_of_compile(name: str) -> None:
    case = case_of(name)
    model = randomize(case.build().double()).eval()
    data = batches(case)
    pruned = fxprune.compile(model, 0.6, calibration=data)
    plan = fxprune.make_plan(model, 0.6, calibration=data)
    assert plan == record_of(pruned).plan
    assert_bitwise(pruned, fxprune.rewrite(fxprune.mask(model, plan, data), plan, tuple(x[:2] for x in data[0])))
    # The data matter: other images, other weights.
    other = fxprune.mask(model, plan, [tuple(2 * x + 1 for x in batch) for batch in data])
    with pytest.raises(AssertionError, match="differs"):
        assert_bitwise(pruned, fxprune.rewrite(other, plan, tuple(x[:2] for x in data[0])))


def test_masks_alone_are_not_what_compile_with_calibration_computes() -> None:
    case = case_of("Plain")
    model = randomize(case.build().double()).eval()
    pruned = fxprune.compile(model, calibration=batches(case))
    with pytest.raises(AssertionError, match=r"max \|difference\|"):
        assert_same_function(pruned, fxprune.mask(model, record_of(pruned).plan), case.inputs())
    with pytest.raises(fxprune.VerificationError):
        fxprune.verify(pruned, fxprune.mask(model, record_of(pruned).plan), case.inputs())


# --- types, modes, kinds of data ------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A residual block without biases between norms, of which one reads no convolution, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.before = nn.BatchNorm2d(16)
        self.conv1 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 16, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(self.stem(x).relu())
        y = self.norm2(self.conv2(self.dropout(self.norm1(self.conv1(x)).relu())))
        return self.head((x + y).relu().mean((2, 3)))


def images(count: int = 12, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize(
    "dtype, form", in_turns([torch.float16, torch.bfloat16, torch.float64], ["partition", "overlap"])
)
def test_other_floating_types(dtype: torch.dtype, form: FormChoice) -> None:
    model = randomize(Residual()).to(dtype).eval()
    data = images(dtype=dtype)
    pruned = fxprune.compile(model, form=form, calibration=data)
    plan = record_of(pruned).plan
    masked = fxprune.mask(model, plan, data)
    assert {p.dtype for p in pruned.parameters()} == {p.dtype for p in masked.parameters()} == {dtype}
    assert set(fits_of(masked)) == {"conv1", "conv2"}
    error, unrefitted = (
        output_error(m.double(), copy.deepcopy(model).double(), [(data.double(),)])
        for m in (masked, fxprune.mask(model, plan))
    )
    assert error < 0.5 * unrefitted
    assert_same_function(pruned.double(), masked, (data.double(),))


def test_a_model_in_training_stays_there_and_is_calibrated_as_in_evaluation() -> None:
    model = randomize(Residual()).train()
    data = images()
    plan = fxprune.make_plan(model, calibration=data)
    masked = fxprune.mask(model, plan, data)
    pruned = fxprune.compile(model, calibration=data)
    for network in (model, masked, pruned):
        assert {module.training for module in network.modules()} == {True}
    # Neither dropout nor statistics of a batch came in.
    still = copy.deepcopy(model).eval()
    assert fxprune.make_plan(still, calibration=data) == plan == record_of(pruned).plan
    assert_bitwise(masked, fxprune.mask(still, plan, data))


def test_only_the_means_of_norms_behind_refitted_convolutions_move() -> None:
    model = randomize(Residual()).train()
    masked = fxprune.mask(model, fxprune.make_plan(model, calibration=images()), images())
    before = model.state_dict()
    changed = {key for key, value in masked.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"conv1.weight", "conv2.weight", "norm1.running_mean", "norm2.running_mean"}


def test_data_of_every_kind_say_the_same() -> None:
    model = randomize(Residual()).eval()
    data = images()
    labels = torch.arange(len(data))
    expected = record_of(fxprune.compile(model, calibration=[data[:5], data[5:10], data[10:]])).plan
    kinds: dict[str, Any] = {
        "loader with labels": DataLoader(TensorDataset(data, labels), batch_size=5),
        "loader without": DataLoader(TensorDataset(data), batch_size=5),
        "generator": (batch for batch in torch.split(data, 5)),
        "generator of pairs": ((batch, None) for batch in torch.split(data, 5)),
        "tuple of lists": tuple([batch] for batch in torch.split(data, 5)),
    }
    for kind, calibration in kinds.items():
        pruned = fxprune.compile(model, calibration=calibration)
        assert record_of(pruned).plan == expected, kind
        assert_bitwise(pruned, fxprune.rewrite(fxprune.mask(model, expected, torch.split(data, 5)), expected, data[:2]))


def test_one_tensor_is_split_into_batches() -> None:
    model = randomize(Residual()).eval()
    data = images(40)
    whole = fxprune.compile(model, calibration=data)
    assert_bitwise(whole, fxprune.compile(model, calibration=[data[:32], data[32:]]))


def test_random_state_and_gradient_mode_are_left_alone() -> None:
    model = randomize(Residual())
    loader = DataLoader(TensorDataset(images()), batch_size=4)
    state = torch.get_rng_state()
    pruned = fxprune.compile(model, calibration=loader)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert all(parameter.requires_grad for parameter in pruned.parameters())
    pruned(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())


# --- what hardly varies ---------------------------------------------------------------------------------------------


class NearlyConstant(nn.Module):
    """Convolutions on a pooled image, whose values vary by a millionth of what they are."""

    def __init__(self, variation: float = 1e-6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 1)
        self.conv1 = nn.Conv2d(32, 32, 1)
        self.conv2 = nn.Conv2d(32, 32, 1)
        self.head = nn.Conv2d(32, 4, 1)
        self.variation = variation

    def forward(self, x: Tensor) -> Tensor:
        pooled = 1 + self.variation * self.stem(x).relu().mean((2, 3), keepdim=True)
        return self.head(self.conv2(self.conv1(pooled).relu()).relu())


@pytest.mark.parametrize("variation, count", in_turns([1.0, 1e-3, 1e-6, 0.0], [4, 64]))
def test_weights_stay_in_range_where_the_input_hardly_varies(variation: float, count: int) -> None:
    # Means are taken off in float32: what rounding leaves of them must not be taken for signal.
    model = NearlyConstant(variation).eval()
    plan = fxprune.make_plan(model, calibration=images(count))
    masked = fxprune.mask(model, plan, images(count))
    for name in ("conv1", "conv2"):
        growth = masked.get_parameter(f"{name}.weight").abs().max() / model.get_parameter(f"{name}.weight").abs().max()
        assert growth < 5
    if variation:
        held_out = [(images(128)[64:],)]
        assert output_error(masked, model, held_out) < output_error(fxprune.mask(model, plan), model, held_out)


# --- networks of torchvision and timm -------------------------------------------------------------------------------


@pytest.fixture
def memory_returned() -> Iterator[None]:
    yield
    gc.collect()


@torch.no_grad()
def settled(model: nn.Module, data: Tensor) -> nn.Module:
    """Give the norms the statistics of the data: in a deep net with random ones the signal fades to a constant, and a
    refit to what little varies amplifies rounding.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    model.train()(data)
    return model.eval()


@pytest.mark.slow
@pytest.mark.usefixtures("memory_returned")
@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.fast], ids=str)
def test_a_network_of_a_library_is_exact_and_refitted(entry: Entry) -> None:
    if entry.source == "timm":
        pytest.importorskip("timm", reason="timm is not installed")
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(4, 3, entry.size, entry.size, generator=generator, dtype=torch.float64)
    model = settled(build(entry), data)
    pruned = fxprune.compile(model, calibration=data, method="cocluster", verify=False)
    plan = record_of(pruned).plan
    assert set(plan.layers) == eligible(model, 0.5, "overlap", entry.dense)
    masked = fxprune.mask(model, plan, data)
    assert set(fits_of(masked)) == called_once(model, plan, (data,))
    assert_same_function(pruned, masked, (data[:2],), entry.modes)
