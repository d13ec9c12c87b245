"""What the tests of other libraries' networks share: running them on any inputs, and comparing all that they give."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from networks import Wild, run
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

import fxprune
from fxprune.exact.record import record_of
from fxprune.graph.containers import tensors_in
from fxprune.vocabulary import Granularity

TOLERANCE = 1e-9
"""How far float64 may be from the masked model, as a share of the largest value of the same output."""
RATIO = 0.5
AS_MODULE: dict[str, Any] = {"output": "module"}
"""What is asked for: the user's own class with smaller layers."""


@dataclass(frozen=True)
class Compiled:
    """A network, compiled.

    Attributes:
        dense: the user's model.
        masked: a copy in which all that the plan drops is zero: what the result must equal.
        pruned: the result.
    """

    dense: nn.Module
    masked: nn.Module
    pruned: nn.Module


def compiled(model: nn.Module, inputs: Any, granularity: Granularity) -> Compiled:
    """Compile a model into its own class."""
    pruned = fxprune.compile(model, RATIO, example_inputs=inputs, granularity=granularity, **AS_MODULE)
    return Compiled(model, fxprune.mask(model, record_of(pruned).plan), pruned)


def compiled_network(network: Wild, granularity: Granularity) -> Compiled:
    """Compile a network on the first of its examples."""
    return compiled(network.build(), network.inputs(*network.first), granularity)


# --- running --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def exactly() -> Iterator[None]:
    """Arithmetic in float64, factories without a type included, and the same random numbers each time."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng(devices=()), torch.no_grad():
            torch.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(before)


def in_float64(model: nn.Module, inputs: Any, batch_statistics: bool = False) -> Any:
    """What a copy of a model gives in float64.

    Args:
        model: any model; it is not touched.
        inputs: see `run`.
        batch_statistics: put the BatchNorm layers, and nothing else, into training mode: networks that want targets in
            training, or draw random numbers, run all the same.
    """
    own = copy.deepcopy(model).double().eval()
    for module in own.modules():
        if batch_statistics and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    with exactly():
        return run(own, tree_map(_double, inputs))


def _double(value: Any) -> Any:
    return value.double() if _is_float(value) else value


def conv_macs(model: nn.Module, inputs: Any) -> int:
    """Multiplications in all convolutions of one run, in modules or not, of any dimension."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(model, inputs)
    counts = counter.get_flop_counts()["Global"]
    return sum(int(count) for operator, count in counts.items() if "convolution" in str(operator)) // 2


# --- comparing ------------------------------------------------------------------------------------------------------


def assert_same(actual: Any, reference: Any) -> None:
    """See that two outputs are of the same types, all the way down, and that all tensors in them agree.

    Raises:
        AssertionError: they differ, or the reference says nothing.
    """
    assert structure(actual) == structure(reference)
    ours, theirs = tensors_in(actual), tensors_in(reference)
    assert len(ours) == len(theirs) > 0
    assert any(tensor.numel() and bool(tensor.min() < tensor.max()) for tensor in theirs), "the reference is constant"
    for number, (found, expected) in enumerate(zip(ours, theirs, strict=True)):
        where = f"tensor {number} of shape {tuple(expected.shape)}"
        assert found.dtype == expected.dtype, where
        assert found.shape == expected.shape, where
        if not expected.is_floating_point():
            assert torch.equal(found, expected), f"{where}: {int((found != expected).sum())} values differ"
        elif expected.numel():
            assert expected.isfinite().all(), f"{where}: the reference is not finite"
            largest, difference = float(expected.abs().max()), float((found - expected).abs().max())
            assert difference <= TOLERANCE * largest, f"{where}: differs by {difference:.1e} at {largest:.1e}"


def structure(value: Any) -> Any:
    """Types and keys of a value, all the way down."""
    if isinstance(value, Mapping):
        return type(value), {key: structure(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [structure(part) for part in value]
    return type(value)


def sensitivity(model: nn.Module, inputs: Any) -> float:
    """How far the outputs of a model move if another input is given, as a share of the largest value: of the output
    that moves most.
    """
    one = tensors_in(in_float64(model, inputs))
    other = tensors_in(in_float64(model, tree_map(lambda x: x.flip(-1) if _is_float(x) else x, inputs)))
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if _is_float(a) and a.numel() and a.shape == b.shape]
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def differs(actual: Any, reference: Any) -> bool:
    """Whether `assert_same` objects."""
    try:
        assert_same(actual, reference)
    except AssertionError:
        return True
    return False
