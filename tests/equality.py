"""Do two models compute the same function? Independent of `fxprune.mask` and `fxprune.verify`, to judge them by."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxprune.plans import PrunePlan

# What float64 may differ by, as a share of the largest reference value.
RELATIVE = 1e-10
# A model that amplifies rounding may differ by more: by a multiple of what it makes of noise of this relative size in
# its input. The factor stands for the layers, each of which rounds anew while the noise enters only once.
NOISE = 1e-15
AMPLIFICATION = 100
# Beyond this share the model is too chaotic for the comparison to mean anything.
LARGEST = 1e-6


# --- weights from which every mistake shows -------------------------------------------------------------------------


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter and every BatchNorm statistic anew, in place: no zeros, no ones, no two channels alike.

    Matrices and kernels are normal with variance 1 / fan-in; vectors are 0.25 to 1.25 with a random sign.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in _floating(model):
        if tensor.dim() >= 2 and isinstance(tensor, nn.Parameter):
            drawn = torch.randn(tensor.shape, generator=generator) * tensor[0].numel() ** -0.5
        elif isinstance(tensor, nn.Parameter) or name.endswith("running_mean"):
            drawn = torch.rand(tensor.shape, generator=generator) + 0.25
            drawn = torch.where(torch.rand(tensor.shape, generator=generator) < 0.5, -drawn, drawn)
        elif name.endswith("running_var"):
            drawn = torch.rand(tensor.shape, generator=generator) + 0.5
        else:
            continue  # a constant of the model, such as an index or a blur kernel
        tensor.copy_(drawn)
    return model


@torch.no_grad()
def small_integers(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw integers from -2 to 2 for every parameter, in place, and BatchNorm statistics that keep arithmetic exact.

    With eps 0 and variances 1 and 4, evaluation multiplies by 1 or 1/2: float64 then rounds nowhere, in any order.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps = 0.0
    for name, tensor in _floating(model):
        if name.endswith("running_var"):
            tensor.copy_(4 ** torch.randint(0, 2, tensor.shape, generator=generator))
        elif tensor.dim() >= 2 and isinstance(tensor, nn.Parameter):
            tensor.copy_(torch.randint(-2, 3, tensor.shape, generator=generator))
        elif isinstance(tensor, nn.Parameter) or name.endswith("running_mean"):
            drawn = torch.randint(1, 3, tensor.shape, generator=generator)
            tensor.copy_(torch.where(torch.rand(tensor.shape, generator=generator) < 0.5, -drawn, drawn))
        else:
            tensor.mul_(2).round_()
    return model


def _floating(model: nn.Module) -> list[tuple[str, Tensor]]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return [(name, tensor) for name, tensor in named if tensor.is_floating_point()]


# --- the oracle -----------------------------------------------------------------------------------------------------


def masked_by_hand(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """A copy of the dense model in which the kernels that the plan drops are zero, read from the raw plan."""
    masked = copy.deepcopy(model)
    for name, kernels in plan.layers.items():
        conv = masked.get_submodule(name)
        assert isinstance(conv, nn.modules.conv._ConvNd)
        weight = conv.weight.data.transpose(0, 1) if conv.transposed else conv.weight.data  # (O, C, *kernel)
        keep = torch.zeros(weight.shape[:2], dtype=weight.dtype)
        width = weight.shape[0] // len(kernels.kept)
        for group, channels in enumerate(kernels.kept):
            filters = torch.tensor(kernels.out_order[group * width : (group + 1) * width])
            keep[filters[:, None], torch.tensor(channels)] = 1
        weight.mul_(keep.view(*keep.shape, *[1] * (weight.dim() - 2)))
    return masked


# --- the comparison -------------------------------------------------------------------------------------------------


class MasksPerSample(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves the base class untyped
    """Draws a dropout mask once per sample, not per element, so that it does not depend on the order of channels.

    The first sample is never dropped: a batch of which nothing is left would say nothing.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # see above

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bernoulli_.float:
            mask, probability = args[0], args[1] if len(args) > 1 else 0.5
            drawn = torch.rand(mask.shape[0], *[1] * (mask.dim() - 1)) < probability
            drawn[0] = True
            return mask.copy_(drawn.expand_as(mask))
        return func(*args, **(kwargs or {}))


def assert_same_function(
    actual: nn.Module, reference: nn.Module, inputs: Sequence[Tensor], modes: Sequence[str] = ("eval", "train")
) -> None:
    """See that two models agree in evaluation, in training, and in evaluation after that training step.

    The last catches running statistics that were updated in the wrong order. The models are left in evaluation mode,
    with the statistics that the step gave them.

    Raises:
        AssertionError: an output differs, or is so degenerate that agreement means nothing.
    """
    steps = [*modes, "eval"] if "train" in modes else modes
    for number, mode in enumerate(steps):
        step = "eval after train" if "train" in steps[:number] else mode
        before = copy.deepcopy(reference) if mode == "train" else reference  # the step moves the running statistics
        expected = outputs(reference, inputs, mode)
        found = outputs(actual, inputs, mode)
        assert len(found) == len(expected), f"{step}: {len(found)} outputs instead of {len(expected)}"
        for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            where = f"{step}: output {i} of shape {tuple(theirs.shape)}"
            assert ours.shape == theirs.shape, f"{where}: has shape {tuple(ours.shape)}"
            assert ours.dtype == theirs.dtype, f"{where}: has type {ours.dtype} instead of {theirs.dtype}"
            assert_informative(theirs, where, batch=len(inputs[0]))
            scale, difference = float(theirs.abs().max()), float((ours - theirs).abs().max())
            if difference <= RELATIVE * scale:
                continue
            allowed = AMPLIFICATION * response_to_noise(before, inputs, mode)[i]
            assert allowed <= LARGEST * scale, f"{where}: the model amplifies noise too much to be compared ({allowed})"
            assert difference <= allowed, (
                f"{where}: max |difference| {difference:.2e} at max |reference| {scale:.2e}; "
                f"allowed is {max(RELATIVE * scale, allowed):.2e}"
            )


def assert_bitwise_equal(actual: nn.Module, reference: nn.Module, inputs: Sequence[Tensor]) -> None:
    """See that two models of small integers give the same bits in evaluation mode."""
    expected, found = outputs(reference, inputs, "eval"), outputs(actual, inputs, "eval")
    assert len(found) == len(expected)
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert_informative(theirs, f"output {i}", batch=len(inputs[0]))
        assert float(theirs.abs().max()) < 2**40, f"output {i}: sums of this size may have been rounded"
        assert torch.equal(ours, theirs), f"output {i}: {int((ours != theirs).sum())} of {theirs.numel()} values differ"


def assert_informative(output: Tensor, where: str, batch: int) -> None:
    """See that an output is finite, not constant, and that the samples of the batch differ."""
    assert torch.isfinite(output).all(), f"{where}: the reference is not finite"
    assert output.numel() == 1 or output.min() < output.max(), f"{where}: the reference is constant"
    if output.dim() and len(output) == batch > 1:
        assert not torch.equal(output[0], output[1]), f"{where}: the reference does not depend on the input"


@torch.no_grad()
def outputs(model: nn.Module, inputs: Sequence[Tensor], mode: str) -> list[Tensor]:
    """Every tensor in the result of one call, whatever holds it."""
    model.train(mode == "train")
    with torch.random.fork_rng(devices=()), MasksPerSample():
        torch.manual_seed(0)
        result = model(*(x.clone() for x in inputs))
    model.eval()
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def response_to_noise(model: nn.Module, inputs: Sequence[Tensor], mode: str) -> list[float]:
    """How far each output of a model moves when its inputs carry relative noise of size `NOISE`."""
    generator = torch.Generator().manual_seed(0)
    noisy = [x + x * NOISE * torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in inputs]
    clean, moved = (outputs(copy.deepcopy(model), x, mode) for x in (inputs, noisy))
    return [float((a - b).abs().max()) for a, b in zip(clean, moved, strict=True)]
