"""fxprune.verify: it must see every difference, name the place, and leave both models as they are."""

import copy
from collections.abc import Callable

import pytest
import torch
from equality import randomize
from torch import Tensor, nn

import fxprune
from fxprune.errors import VerificationError
from fxprune.exact import verification
from fxprune.exact.verification import Verification, difference, verify

X = torch.randn(3, 16, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.Conv2d(32, 16, 1)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.norm(self.first(x)).relu()) * self.scale
        return y


def models(net: nn.Module | None = None) -> tuple[torch.fx.GraphModule, nn.Module]:
    """A compiled model and its oracle."""
    model = randomize(net or Net()).eval()
    plan = fxprune.make_plan(model, example_inputs=X)
    masked = fxprune.mask(model, plan)
    return fxprune.rewrite(masked, plan, X), masked


@torch.no_grad()
def perturb(model: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
    tensor = {**dict(model.named_parameters()), **dict(model.named_buffers())}[name]
    tensor.copy_(change(tensor.clone()))


# --- equal models ---------------------------------------------------------------------------------------------------


def test_equal_models_pass_in_both_modes() -> None:
    result = verify(*models(), X)
    assert result.modes == ("eval", "train")
    assert 0 <= result.max_abs < 1e-12
    assert 0 <= result.max_rel < 1e-12
    assert "equal in eval and train mode" in str(result)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_types_are_compared_in_float64(dtype: torch.dtype) -> None:
    model = randomize(Net()).eval().to(dtype)
    plan = fxprune.make_plan(model, example_inputs=X.to(dtype))
    masked = fxprune.mask(model, plan)
    pruned = fxprune.rewrite(masked, plan, X.to(dtype))
    assert verify(pruned, masked, X.to(dtype)).max_rel < 1e-12
    perturb(pruned, "second.weight", lambda w: w * 1.01)
    with pytest.raises(VerificationError):
        verify(pruned, masked, X.to(dtype))


def test_a_batch_of_one_is_enough() -> None:
    pruned, masked = models()
    assert verify(pruned, masked, X[:1]).modes == ("eval", "train")
    pooled, oracle = (nn.Sequential(nn.AdaptiveAvgPool2d(1), model) for model in (pruned, masked))
    verify(pooled, oracle, X[:1])  # one sample of one pixel has no batch statistics


@pytest.mark.parametrize("modes", [("eval",), ("train",)])
def test_modes_can_be_chosen(modes: tuple[str, ...]) -> None:
    assert verify(*models(), X, modes=modes).modes == modes


def test_neither_model_changes() -> None:
    pruned, masked = models()
    masked.train()
    masked.get_submodule("norm").eval()
    pruned.get_parameter("first.bias").requires_grad_(False)
    before = [state(model) for model in (pruned, masked)]
    copies = copy.deepcopy((pruned.state_dict(), masked.state_dict()))
    inputs = X.clone()
    verify(pruned, masked, inputs)
    assert [state(model) for model in (pruned, masked)] == before
    for ours, theirs in zip((pruned.state_dict(), masked.state_dict()), copies, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(inputs, X)


def state(model: nn.Module) -> tuple[object, ...]:
    """All that a check could leave behind: modes, gradients, types, identity of tensors, hooks."""
    return (
        {name: module.training for name, module in model.named_modules()},
        {name: (p.requires_grad, p.dtype, id(p), p.grad is None) for name, p in model.named_parameters()},
        {name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in model.named_modules()},
    )


# --- different models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["first", "second"])
def test_names_the_first_node_that_differs(name: str) -> None:
    pruned, masked = models()
    perturb(pruned, f"{name}.weight", lambda w: w.index_put((torch.tensor(0), torch.tensor(0)), w[0, 0] + 0.1))
    with pytest.raises(
        VerificationError, match=rf"differ in eval mode by .*first node that differs is {name} \({name}"
    ):
        verify(pruned, masked, X)


@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
def test_sees_statistics_in_another_order(buffer: str) -> None:
    pruned, masked = models()
    perturb(pruned, f"norm.{buffer}", lambda b: b.roll(1))
    with pytest.raises(VerificationError, match="first node that differs is norm"):
        verify(pruned, masked, X)


def test_sees_channels_out_of_order() -> None:
    model, masked = nn.Sequential(nn.Conv2d(16, 16, 1)), nn.Sequential(nn.Conv2d(16, 16, 1))
    masked.load_state_dict(model.state_dict())
    swapped = torch.fx.symbolic_trace(nn.Sequential(model, nn.ChannelShuffle(4)))
    with pytest.raises(VerificationError, match="channels are out of order"):
        verify(swapped, masked, X)


def test_sees_statistics_that_only_training_changes() -> None:
    """Momentum shows in no output, only in the statistics after a step."""
    pruned, masked = models()
    norm = pruned.get_submodule("norm")
    assert isinstance(norm, nn.BatchNorm2d)
    norm.momentum = 0.2
    verify(pruned, masked, X, modes=("eval",))
    with pytest.raises(VerificationError, match=r"norm\.running_mean differs after a step in training mode"):
        verify(pruned, masked, X)


class DoubledInTraining(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (2.0 if self.training else 1.0)


def test_sees_a_difference_in_training_only() -> None:
    pruned, masked = models()
    norm = DoubledInTraining(32).eval()
    norm.load_state_dict(pruned.get_submodule("norm").state_dict())
    pruned.add_module("norm", norm)
    verify(pruned, masked, X, modes=("eval",))
    with pytest.raises(VerificationError, match="differ in train mode"):
        verify(pruned, masked, X)


def test_constant_inputs_are_replaced_by_noise() -> None:
    """On zeros only the biases count, and these agree."""
    pruned, masked = models()
    perturb(pruned, "first.weight", lambda w: w.flip(2))
    zeros = torch.zeros_like(X)
    masked_out, pruned_out = masked(zeros)[:, :, 3, 3], pruned(zeros)[:, :, 3, 3]
    assert torch.allclose(masked_out, pruned_out, atol=1e-5), "the control needs models that agree on zeros"
    for constant in (zeros, torch.ones_like(X)):
        with pytest.raises(VerificationError):
            verify(pruned, masked, constant)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sees_values_that_are_not_finite(value: float) -> None:
    pruned, masked = models()
    perturb(pruned, "second.bias", lambda b: b.index_fill(0, torch.tensor(0), value))
    with pytest.raises(VerificationError, match="differ in eval mode by inf"):
        verify(pruned, masked, X)


def test_refuses_outputs_without_a_finite_value() -> None:
    pruned, masked = models(Net(scale=float("nan")))
    with pytest.raises(VerificationError, match="no finite value"):
        verify(pruned, masked, X)


def test_opposite_infinities_differ() -> None:
    assert difference([torch.tensor([1.0, -torch.inf])], [torch.tensor([1.0, torch.inf])])[1] == torch.inf
    assert difference([torch.tensor([1.0, torch.inf])], [torch.tensor([1.0, torch.inf])])[1] == 0


class Outputs(nn.Module):
    def __init__(self, net: nn.Module, shape: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.net, self.shape = net, shape

    def forward(self, x: Tensor) -> object:
        return self.shape(self.net(x))


@pytest.mark.parametrize(
    "shape",
    [lambda y: (y, y), lambda y: y[:, :8], lambda y: y[:, :, :3], lambda y: ()],
    ids=["two", "fewer channels", "smaller", "none"],
)
def test_sees_another_structure_of_the_output(shape: Callable[[Tensor], object]) -> None:
    pruned, masked = models()
    with pytest.raises(VerificationError, match=r"outputs have shapes .*do not belong together"):
        verify(Outputs(pruned, shape), masked, X)


def test_structured_outputs_are_compared_leaf_by_leaf() -> None:
    pruned, masked = models()
    same = Outputs(pruned, lambda y: {"a": y, "b": [y * 2]}), Outputs(masked, lambda y: {"a": y, "b": [y * 2]})
    verify(*same, X)
    with pytest.raises(VerificationError):
        verify(same[0], Outputs(masked, lambda y: {"a": y, "b": [y * 2.001]}), X)


# --- tolerances -----------------------------------------------------------------------------------------------------


class Amplified(nn.Module):
    """sin(factor * y): what rounding moves in y moves the output `factor` times as far."""

    def __init__(self, net: nn.Module, factor: float) -> None:
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return torch.sin(y * self.factor)


class Reversed(nn.Module):
    """The same convolution, summed the other way round: it differs by rounding only."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = copy.deepcopy(conv)
        self.conv.weight.data = conv.weight.data.flip(1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x.flip(1))
        return y


def test_a_model_that_amplifies_rounding_is_measured() -> None:
    conv = nn.Conv2d(16, 16, 3)
    right = Amplified(conv, 1e7)
    result = verify(Amplified(Reversed(conv), 1e7), right, X, modes=("eval",))
    assert result.max_rel > verification.TOLERANCE, "the control needs a model that amplifies"
    wrong = Reversed(conv)
    wrong.conv.weight.data *= 1 + 1e-6
    with pytest.raises(VerificationError):
        verify(Amplified(wrong, 1e7), right, X, modes=("eval",))


def test_a_model_too_chaotic_to_compare_is_no_excuse() -> None:
    conv = nn.Conv2d(16, 16, 3)
    with pytest.raises(VerificationError, match="limit 1e-03"):
        verify(Amplified(nn.Conv2d(16, 16, 3), 1e15), Amplified(conv, 1e15), X, modes=("eval",))


def test_the_tolerance_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    pruned, masked = models()
    perturb(pruned, "second.weight", lambda w: w * (1 + 1e-6))
    with pytest.raises(VerificationError, match=r"limit 1e-10"):
        verify(pruned, masked, X)
    monkeypatch.setattr(verification, "TOLERANCE", 1e-4)
    assert isinstance(verify(pruned, masked, X), Verification)


@pytest.mark.parametrize(
    "found, expected, result",
    [
        ([1.0, 2.0], [1.0, 2.0], (0.0, 0.0)),
        ([1.0, 2.5], [1.0, 2.0], (0.5, 0.25)),
        ([0.0, 0.0], [0.0, 0.0], (0.0, 0.0)),
        ([0.0, 1e-3], [0.0, 0.0], (1e-3, float("inf"))),
        ([float("nan"), 2.0], [float("nan"), 2.0], (0.0, 0.0)),
        ([float("nan"), 2.0], [1.0, 2.0], (float("inf"), float("inf"))),
        ([], [], (0.0, 0.0)),
    ],
)
def test_difference(found: list[float], expected: list[float], result: tuple[float, float]) -> None:
    tensors = [torch.tensor(found, dtype=torch.float64)], [torch.tensor(expected, dtype=torch.float64)]
    assert difference(*tensors) == result
