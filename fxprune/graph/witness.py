"""Whether a traced graph does what the model does: both are recorded on the same runs and compared node by node."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.graph.containers import tensors_in
from fxprune.graph.editing import RUN, label
from fxprune.graph.recording import Recording, record
from fxprune.graph.tracing import Trace


def disagreement(traced: Trace, recording: Recording, whole: Callable[[nn.Module], bool]) -> str:
    """Where a trace does something else than the model was seen doing, in words; empty if nowhere.

    What depends on the inputs must be the same operators with the same arguments in the same order, and the results
    must be equal bit by bit and of the same types. `whole` is what the recording was made with.
    """
    for number, (example, mode) in enumerate(recording.runs):
        try:
            twin = record(traced.module, [example], modes=(mode,), whole=whole)
        except Exception as error:
            return f"in {mode} mode the trace does not run where the model does ({error})"
        pairs = zip(_steps(recording, number), _steps(twin, 0), strict=False)
        for (node, step), (_, other) in pairs:
            if step != other:
                return f"in {mode} mode the trace does something else than the model at {label(node)}"
        mine, theirs = recording.results[number], twin.results[0]
        if kind_of(mine) != kind_of(theirs):
            return f"the model returns a {kind_of(mine)}, the trace a {kind_of(theirs)}"
        if not _equal(tensors_in(mine), tensors_in(theirs)):
            return f"in {mode} mode the trace gives other numbers than the model"
    return ""


def kind_of(value: Any) -> str:
    """What an output is called, where that matters: a class of the user's own or a plain container."""
    if isinstance(value, Tensor):
        return "tensor"
    if type(value).__module__ in ("builtins", "collections") or type(value).__module__.startswith("torch.fx"):
        return "dict" if isinstance(value, Mapping) else "sequence"  # fx makes lists of some tuples
    return type(value).__qualname__


def _steps(recording: Recording, run: int) -> list[tuple[fx.Node, str]]:
    """The nodes of a run that depend on its inputs, each as text in which nodes are numbers."""
    place: dict[fx.Node, int] = {}
    found = []
    for node in recording.module.graph.nodes:
        if node.meta.get(RUN) != run:
            continue
        if node.op == "placeholder":
            place[node] = len(place)
        elif any(source in place for source in node.all_input_nodes):
            arguments = fx.node.map_arg((node.args, node.kwargs), lambda source: f"%{place.get(source, '')}")
            place[node] = len(place)
            found.append((node, f"{_name(node)} {arguments}"))
    return found


def _name(node: fx.Node) -> str:
    """What a node calls; `x += y` is written in several ways."""
    if node.op == "call_module":
        return str(node.target)
    name = str(getattr(node.target, "__name__", node.target))
    return name.strip("_").removeprefix("i") if name.startswith("__") else name.rstrip("_")


def _equal(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(mine) == len(theirs) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(mine, theirs, strict=True)
    )
