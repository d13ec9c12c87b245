"""Record a model while it really runs on its examples, in evaluation and in training mode, as one graph.

What symbolic tracing refuses (branches, loops over shapes, containers, code that reads data) runs here as it runs for
the user. The graph is true of these runs: what else the model may do is for its own code to decide, so a recording is
the ground for operating on the user's module, not for replacing its forward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.errors import TraceError
from fxprune.graph.containers import convert_tensors, tensors_in
from fxprune.graph.contexts import undisturbed
from fxprune.graph.copying import share_tensors, standing_for, tensors_of
from fxprune.graph.editing import CODE, RUN
from fxprune.graph.examples import Example
from fxprune.graph.recorder import CONVOLUTIONS, Recorder
from fxprune.graph.tracing import Trace, check_is_model
from fxprune.graph.values import first_line

MODES = ("eval", "train")


class RecordedGraph(fx.GraphModule):
    """A graph that is interpreted and never printed as code, for its arguments may be any Python objects."""

    def recompile(self) -> Any:
        """Nothing to do: there is no code."""
        return None

    def forward(self, *args: Any) -> Any:
        """Run the nodes in turn."""
        return fx.Interpreter(self, garbage_collect_values=True).run(*args)


def like(module: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """The modules of a graph module with another graph; one that is recorded is interpreted too."""
    kind = RecordedGraph if isinstance(module, RecordedGraph) else fx.GraphModule
    return kind(module, graph)


class RunError(TraceError):
    """A model does not run on an example.

    Attributes:
        cause: what it said.
        steps: names of the nodes that were recorded before.
    """

    def __init__(self, model: nn.Module, example: Example, cause: str, steps: frozenset[str]) -> None:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in example.tensors)
        super().__init__(f"{type(model).__name__} does not run on example inputs of shape {shapes}: {cause}")
        self.cause, self.steps = cause, steps


@dataclass(frozen=True)
class Recording(Trace):
    """A model as it was seen running: a trace whose graph computes, from the tensors of all runs in turn, the tensors
    of all results in turn.

    Attributes:
        layers: the whole module tree, in which convolutions with a forward of their own that only pads and convolves
            are plain ones. Parameters are shared with the model.
        results: what each run returned.
        runs: example and mode of each run.
        examples: what was asked for; a run in training mode may have had two samples in place of one.
    """

    layers: nn.Module = field(default_factory=nn.Module)
    results: tuple[Any, ...] = ()
    runs: tuple[tuple[Example, str], ...] = ()
    examples: tuple[Example, ...] = ()


def record(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    modes: Sequence[str] = MODES,
    whole: Callable[[nn.Module], bool] = lambda module: False,
) -> Recording:
    """Run a model on examples and write down what it does.

    Args:
        model: any module; it is not changed. Each run has a copy of its own.
        examples: arguments of forward, on the device of the model.
        modes: in which modes to run. Training mode may need other arguments than evaluation; where it does not run, a
            note says so.
        whole: whether a layer with a forward of its own is one node.

    Raises:
        RunError: the model does not run on an example.
    """
    check_is_model(model)
    recorder, changed = Recorder(whole), set[str]()
    runs: list[tuple[Example, str]] = []
    results: list[Any] = []
    outputs: list[fx.Node] = []
    notes: list[str] = []
    for mode in modes:
        for example in examples:
            try:
                given, result, found = _run(recorder, model, example, mode, changed)
            except RunError as error:
                if mode == "eval" or len(modes) == 1:
                    raise
                notes.append(f"training mode was not recorded, for the model does not run in it: {error.cause}")
                continue
            runs.append((given, mode))
            results.append(convert_tensors(result, Tensor.detach))
            outputs += found
    recorder.graph.output((*outputs, *recorder.written))
    own = tensors_of(model)
    written = {id(own[name]) for name in changed}
    layers = share_tensors(model, lambda tensor: _cloned(tensor) if id(tensor) in written else tensor)
    for path, settings in recorder.padded.items():
        conv: Any = layers.get_submodule(path)
        conv.__class__ = CONVOLUTIONS[f"conv{len(conv.kernel_size)}d"]
        vars(conv).update(settings)
    module = RecordedGraph(layers, recorder.graph, class_name=type(model).__name__)
    for part in module.modules():
        part.training = False
    reads = dict.fromkeys(node.meta[CODE] for node in recorder.reads if node.meta.get(CODE))
    if reads:
        notes.append(f"forward looks at data, and what it found in the example decided: {', '.join(reads)}")
    return Recording(
        module=module,
        values=recorder.values,
        inputs=tuple(recorder.values[n] for n in recorder.graph.nodes if n.op == "placeholder" and n.meta[RUN] == 0),
        probed=False,
        opaque={},
        modes=tuple(mode for mode in modes if any(ran == mode for _, ran in runs)),
        notes=tuple(dict.fromkeys(notes)),
        layers=layers,
        results=tuple(results),
        runs=tuple(runs),
        examples=tuple(examples),
    )


def _run(
    recorder: Recorder, model: nn.Module, example: Example, mode: str, changed: set[str]
) -> tuple[Example, Any, list[fx.Node]]:
    """One run: the example as it was given to forward, what it returned, and the nodes of all that can be seen of it.
    Names of parameters and buffers that it changed, be it behind autograd's back, are added to `changed`.

    In training mode a batch of one is taken twice where batch statistics need it.
    """
    candidates = [example]
    if mode == "train" and (twice := doubled(example)) is not None:
        candidates.append(twice)
    failure: RunError | None = None
    for given in candidates:
        copied = share_tensors(model, _cloned)
        copied.train(mode == "train")
        called = convert_tensors(given, lambda tensor: tensor.detach().clone())  # forward may write into them
        try:
            with undisturbed(), recorder.run(copied, called.tensors):
                result = called.call(copied)
        except Exception as error:  # user code may raise anything
            steps = frozenset(node.name for node in recorder.graph.nodes)
            failure = failure or RunError(model, given, first_line(error), steps)
            failure.__cause__ = error
            recorder.forget_run()
            continue
        seen = [recorder.node_of(tensor) for tensor in tensors_in(result)]
        seen += dict.fromkeys(recorder.node_of(tensor) for tensor in recorder.kept_by(copied))
        after = tensors_of(copied)
        changed |= {n for n, t in tensors_of(model).items() if n not in after or not _is_unchanged(after[n], t)}
        return given, result, seen
    assert failure is not None
    raise failure


def _cloned(tensor: Tensor) -> Tensor:
    return standing_for(tensor, tensor.detach().clone())


def _is_unchanged(now: Tensor, before: Tensor) -> bool:
    """Whether a tensor is what it was; NaN is what it was."""
    if now.shape != before.shape or now.dtype != before.dtype:
        return False
    return bool(((now == before) | ((now != now) & (before != before))).all())


def doubled(example: Example) -> Example | None:
    """Two samples in place of one; None if there are more, or no batch."""
    tensors = example.tensors
    if not tensors or not all(tensor.dim() > 1 and tensor.shape[0] == 1 for tensor in tensors):
        return None
    return convert_tensors(example, lambda tensor: torch.cat([tensor, tensor.flip(-1)]))
