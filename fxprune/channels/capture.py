"""Capture a model for what follows: as a traced graph, or as a recording of what it did on its examples.

A traced graph can replace the model; it is right where forward takes one way whatever it is given. A recording is right
for any model that runs, and serves to operate on the user's own module. Where both exist they are two witnesses, and
what they disagree on decides.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from torch import nn

from fxprune.channels.operators import rule_for
from fxprune.errors import PlanError, TraceError, near_matches
from fxprune.graph.examples import Example, in_order
from fxprune.graph.gathered import GatheredLayer
from fxprune.graph.recording import MODES, Recording, RunError, record
from fxprune.graph.tracing import Trace, trace
from fxprune.graph.witness import disagreement
from fxprune.vocabulary import Output


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
        output: what is asked for. `"auto"` traces, and records where a part with layers cannot be traced, or the
            recording says otherwise.

    Raises:
        TraceError: the model cannot be traced, or does not run on an example, or there is none.
    """
    if any(isinstance(layer, GatheredLayer) for layer in model.modules()):
        raise TraceError(
            f"{type(model).__name__} is a result of fxprune, with gathers inside its layers; pass the model that it "
            "was made from"
        )
    if output == "module":
        if not examples:
            raise TraceError("output='module' records the model while it runs, so it needs inputs; pass example_inputs")
        return recorded(model, examples)
    if not examples or any(tensor.is_meta for tensor in (*examples[0].tensors, *model.parameters())):
        return trace(model, in_order(examples[0], model) if examples else None)
    try:
        traced = trace(model, in_order(examples[0], model), partial=output == "graph")
    except TraceError as error:
        if output == "graph":
            raise
        return _because(recorded(model, examples), str(error))
    try:
        recording = recorded(model, examples)
    except RunError as error:
        return _noted(traced, f"the trace could not be compared with a run of the model: {error.cause}")
    said = disagreement(traced, recording, _is_known)
    if not said:
        return traced
    if output == "graph":
        return _noted(traced, f"{said}; output='module' follows the model")
    return _because(recording, said)


def recorded(model: nn.Module, examples: Sequence[Example], modes: Sequence[str] = MODES) -> Recording:
    """Record a model as the channel analysis wants to see it."""
    return record(model, examples, modes=modes, whole=_is_known)


def _is_known(layer: nn.Module) -> bool:
    return rule_for(layer) is not None


def _noted(captured: Trace, note: str) -> Trace:
    return replace(captured, notes=(*captured.notes, note))


def _because(recording: Recording, reason: str) -> Trace:
    return _noted(recording, f"the result is the model's own module, not a graph: {reason}")
