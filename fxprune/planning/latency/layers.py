"""How long one convolution takes with all that is fused into it, in PyTorch or in another runtime.

A time depends on shapes, not on numbers, so it is that of random weights. In a runtime a layer is timed as a model of
its own, between two convolutions that pass each channel on (`fxprune.inference.runtimes.onnx_graphs.single_layer`);
what these take, and the call, is timed as well and taken off.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fxprune.errors import PlanError
from fxprune.graph.fused import FusedConv2d
from fxprune.inference.acceleration import FORMATS
from fxprune.inference.engines import ENGINES
from fxprune.inference.forms import Form, form_calls, form_key
from fxprune.inference.runtimes import AUTO, OTHERS, TORCH
from fxprune.inference.runtimes.onnx_based import OnnxBased
from fxprune.inference.runtimes.onnx_layers import DENSE, GROUPED, SPLIT
from fxprune.inference.runtimes.precisions import precision_obstacle, runtime_in
from fxprune.inference.stopwatch import Stopwatch

LEAST = 0.05
"""Share of what was timed that a layer takes at least, whatever its neighbours take: noise must not leave nothing."""


@dataclass(frozen=True)
class Variant:
    """A convolution as it is or may become.

    Attributes:
        conv: with all that is fused into it.
        shapes: of its input and, if it adds one, of the residual.
        is_grouped: whether kernels of it went.
    """

    conv: FusedConv2d
    shapes: list[torch.Size]
    is_grouped: bool = False


class Timekeeper(Protocol):
    """One way to run layers."""

    def keys(self, variant: Variant) -> list[str]:
        """Names of all that has to be timed."""

    def calls(self, variant: Variant) -> dict[str, Callable[[], object]]:
        """The same, as calls."""

    def seconds(self, variant: Variant, timed: Mapping[str, float]) -> float:
        """Of the layer, in its fastest form."""


@dataclass(frozen=True)
class InTorch:
    """PyTorch, each layer in its fastest engine.

    Attributes:
        memory_format: a key of `fxprune.inference.acceleration.FORMATS`.
    """

    memory_format: str

    def keys(self, variant: Variant) -> list[str]:
        """A name for each engine that can compute it."""
        return list(self._forms(variant))

    def calls(self, variant: Variant) -> dict[str, Callable[[], object]]:
        """The layer in each engine."""
        return form_calls(self._forms(variant), variant.conv, variant.shapes, FORMATS[self.memory_format])

    def seconds(self, variant: Variant, timed: Mapping[str, float]) -> float:
        """Of the fastest engine."""
        return min(timed[key] for key in self._forms(variant))

    def _forms(self, variant: Variant) -> dict[str, Form]:
        conv, memory_format = variant.conv, FORMATS[self.memory_format]
        forms = (Form(engine, not variant.is_grouped) for engine in ENGINES if not engine.obstacle(conv, memory_format))
        return {form_key(form, conv, variant.shapes, memory_format): form for form in forms}


@dataclass(frozen=True)
class InRuntime:
    """A runtime that reads ONNX."""

    runtime: OnnxBased

    def keys(self, variant: Variant) -> list[str]:
        """A name for each form, and for the neighbours that each has."""
        return [*self._forms(variant), *(key for key, *_ in self._neighbours(variant))]

    def calls(self, variant: Variant) -> dict[str, Callable[[], object]]:
        """The layer between neighbours in each form, and these alone."""
        forms = self._forms(variant).items()
        calls = {key: self.runtime.layer_call(variant.conv, form, variant.shapes) for key, form in forms}
        neighbours = self._neighbours(variant)
        return calls | {key: self.runtime.neighbours_call(shape, count) for key, shape, count in neighbours}

    def seconds(self, variant: Variant, timed: Mapping[str, float]) -> float:
        """Of the fastest form without the neighbours."""
        whole = self.whole(variant, timed)
        before, after, two_after = (timed[key] for key, *_ in self._neighbours(variant))
        others = before + (two_after - after) * len(variant.shapes)  # one behind it, one before the residual
        return max(LEAST * whole, whole - others)

    def whole(self, variant: Variant, timed: Mapping[str, float]) -> float:
        """The same with the neighbours, and the call."""
        return min(timed[key] for key in self._forms(variant))

    def _forms(self, variant: Variant) -> dict[str, str]:
        forms = (GROUPED, SPLIT) if variant.is_grouped else (DENSE,)
        return {self.runtime.layer_key(variant.conv, form, variant.shapes): form for form in forms}

    def _neighbours(self, variant: Variant) -> list[tuple[str, tuple[int, ...], int]]:
        """One of the shape of the input; one, and two, of that of the output: a key, the shape, and how many."""
        given = tuple(variant.shapes[0])
        asked = ((given, 1), (variant.conv.result_shape(given), 1), (variant.conv.result_shape(given), 2))
        return [(self.runtime.neighbours_key(shape, count), shape, count) for shape, count in asked]


def layers_in(runtime: str, precision: str | None) -> OnnxBased | None:
    """What single layers are timed in; None is PyTorch.

    Raises:
        PlanError: they cannot be; the message says why, and what to do.
    """
    check_timed(runtime, precision)
    found = runtime_in(runtime, precision) if runtime in OTHERS else None
    return found if isinstance(found, OnnxBased) else None


def check_precision(runtime: str, precision: str | None) -> None:
    """See that a network can be planned for a precision in a runtime.

    Raises:
        PlanError: there is no such precision, or the runtime has none.
    """
    if precision is not None and (reason := precision_obstacle(runtime, precision)):
        raise PlanError(reason)


def check_timed(runtime: str, precision: str | None = None) -> None:
    """See that single layers can be timed in a runtime, so that it can be planned for.

    Raises:
        PlanError: they cannot; the message says why, and what to do.
    """
    check_precision(runtime, precision)
    if runtime == TORCH or isinstance(OTHERS.get(runtime), OnnxBased):
        return
    reason = _UNTIMED.get(runtime, "fxprune does not time layers in it")
    raise PlanError(f"latency for runtime={runtime!r}: {reason}")


_UNTIMED = {
    AUTO: "a table of times is of one runtime; name one, or plan for one and accelerate(..., runtime='auto')",
    "inductor": "it compiles whole graphs, and to compile each layer in each form would take hours; plan for "
    "runtime='torch', and accelerate(..., runtime='inductor') what comes of it",
    "tensorrt": "fxprune does not run it; plan for target='cuda' without a runtime, and export with "
    "fxprune.exports.save_onnx",
}


def timed(variants: Sequence[Variant], keepers: Sequence[Timekeeper], stopwatch: Stopwatch) -> list[list[float]]:
    """Seconds of each variant, for each timekeeper: all in one race, unless they are known."""
    keys = [key for keeper in keepers for variant in variants for key in keeper.keys(variant)]
    seconds = stopwatch.times(keys)
    if seconds is None:
        calls: dict[str, Callable[[], object]] = {}
        for keeper in keepers:
            for variant in variants:
                if any(key not in calls for key in keeper.keys(variant)):
                    calls |= keeper.calls(variant)
        seconds = stopwatch.race(calls)
    return [[keeper.seconds(variant, seconds) for variant in variants] for keeper in keepers]
