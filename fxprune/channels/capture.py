"""Capture a model for what follows: as a traced graph, or as a recording of what it did on its examples.

A traced graph can replace the model; it is right where forward takes one way whatever it is given. A recording is right
for any model that runs, and serves to operate on the user's own module. Where both exist they are two witnesses, and
what they disagree on decides.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeAlias, get_args

from torch import nn

from fxprune.channels.operators import rule_for
from fxprune.errors import PlanError, TraceError, near_matches
from fxprune.graph.examples import Example, in_order
from fxprune.graph.recording import MODES, Recording, record
from fxprune.graph.tracing import Trace, trace
from fxprune.graph.witness import disagreement

Output: TypeAlias = Literal["auto", "graph", "module"]
"""What a compilation gives: a `GraphModule`, the user's own module with smaller layers, or whichever is right."""


def check_output(output: str) -> None:
    """See that a name is one of `Output`.

    Raises:
        PlanError: it is not.
    """
    names = get_args(Output)
    if output not in names:
        raise PlanError(f"output={output!r} is not known{near_matches(output, names)}; use one of {', '.join(names)}")


def capture(model: nn.Module, examples: Sequence[Example], output: Output) -> Trace:
    """Trace or record a model; a `Recording` is returned where the result has to be a module.

    Args:
        model: any module; it is not changed.
        examples: arguments of forward, on the device of the model; none leaves nothing but the symbolic trace.
        output: what is asked for. `"auto"` traces, and records where the model cannot be traced, parts with layers
            cannot, or the recording says otherwise.

    Raises:
        TraceError: the model cannot be traced, or does not run on an example, or there is none.
    """
    if output == "module":
        if not examples:
            raise TraceError("output='module' records the model while it runs, so it needs inputs; pass example_inputs")
        return recorded(model, examples)
    if not examples or not all(map(_is_real, examples)):
        return trace(model, in_order(examples[0], model) if examples else None)
    try:
        traced = trace(model, in_order(examples[0], model))
    except TraceError as error:
        if output == "graph":
            raise
        return _because(recorded(model, examples), str(error))
    recording = recorded(model, examples)
    whole = sorted(path for path in traced.opaque if _holds_layers(traced.module.get_submodule(path)))
    if whole and output == "auto":
        return _because(recording, f"{whole[0]}: {traced.opaque[whole[0]]}")
    said = disagreement(traced, recording, _is_known)
    if not said:
        return traced
    if output == "graph":
        return replace(traced, notes=(*traced.notes, f"{said}; output='module' follows the model"))
    return _because(recording, said)


def recorded(model: nn.Module, examples: Sequence[Example], modes: Sequence[str] = MODES) -> Recording:
    """Record a model as the channel analysis wants to see it."""
    return record(model, examples, modes=modes, whole=_is_known)


def _is_known(layer: nn.Module) -> bool:
    return rule_for(layer) is not None


def _because(recording: Recording, reason: str) -> Recording:
    return replace(recording, notes=(*recording.notes, f"the result is the model's own module, not a graph: {reason}"))


def _is_real(example: Example) -> bool:
    return not any(tensor.is_meta for tensor in example.tensors)


def _holds_layers(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.modules.conv._ConvNd | nn.Linear) for inner in module.modules())
