"""Where two models that should be equal differ first: by numbers that do not depend on the order of channels, for the
nodes of a graph, or for the innermost modules of a user's own.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from fxprune.errors import FxpruneError
from fxprune.exact.precision import Precision
from fxprune.graph.examples import Example
from fxprune.graph.tracing import trace

Summary: TypeAlias = tuple[float, ...]


def first_difference(pruned: nn.Module, masked: nn.Module, inputs: Example, mode: str, precision: Precision) -> str:
    """Name the first node, or module, of `pruned` whose values, in any order, are not those of its namesake in the
    masked model.
    """
    is_graph = isinstance(pruned, fx.GraphModule)
    summaries, what = (_of_nodes, "node") if is_graph else (_of_modules, "module")
    try:
        reference = trace(masked, inputs.args).module if is_graph else masked
        right = {place: summary for place, summary, _ in _run(reference, summaries, inputs, mode, precision)}
        for place, summary, target in _run(pruned, summaries, inputs, mode, precision):
            if place in right and not _alike(summary, right[place]):
                return f"the first {what} that differs is {place[0]} ({target})"
    except (FxpruneError, RuntimeError) as error:
        return f"the place could not be found ({error})"
    return f"no {what} differs in its set of values, so channels are out of order"


Found: TypeAlias = list[tuple[tuple[str, int], Summary, str]]
"""For each value: what gave it, and at which of its calls; the summary; and what that is."""


def _run(
    model: nn.Module, summaries: Callable[[nn.Module, Example], Found], inputs: Example, mode: str, precision: Precision
) -> Iterator[tuple[tuple[str, int], Summary, str]]:
    found, _ = precision(model, inputs, mode, summaries)
    yield from found


def _of_nodes(gm: nn.Module, inputs: Example) -> Found:
    found: Found = []

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor) and value.is_floating_point():
                found.append(((n.name, 0), _summary(value), str(n.target)))
            return value

    assert isinstance(gm, fx.GraphModule)
    Watching(gm).run(*inputs.args)
    return found


def _of_modules(model: nn.Module, inputs: Example) -> Found:
    found: Found = []
    calls: dict[str, int] = {}

    def watch(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, value: Any) -> None:
            calls[path] = calls.get(path, -1) + 1
            if isinstance(value, Tensor) and value.is_floating_point():
                found.append(((path, calls[path]), _summary(value), type(module).__name__))

        return hook

    for path, module in model.named_modules():
        if path and not isinstance(module, torch.jit.ScriptModule) and not any(True for _ in module.children()):
            module.register_forward_hook(watch(path))
    inputs.call(model)
    return found


def _summary(value: Tensor) -> Summary:
    """Sums of powers. The number of elements is none of them: removed channels are zero."""
    v = value.double()
    return float(v.sum()), float(v.abs().sum()), float(v.pow(2).sum()), float(v.pow(3).sum())


def _alike(a: Summary, b: Summary) -> bool:
    scale = max(*(abs(x) for x in b), 1e-300)
    return all(abs(x - y) <= 1e-9 * scale for x, y in zip(a, b, strict=True))
