"""The ways to compute one convolution, and their times."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from tqdm import tqdm

from fxprune.graph.editing import calls
from fxprune.graph.fused import FusedConv2d
from fxprune.inference.engines import ENGINES, Engine
from fxprune.inference.kernels.gather_conv import aligned_block
from fxprune.inference.reporting import LayerChoice
from fxprune.inference.stopwatch import Stopwatch

Choices = dict[str, LayerChoice]
"""The choice for each fused convolution, by the name of its node."""


@dataclass(frozen=True)
class Form:
    """One way to compute a convolution: an engine, on the pruned weights or on the dense ones with zeros."""

    engine: type[Engine]
    is_dense: bool

    def __str__(self) -> str:
        return f"{'dense' if self.is_dense else 'pruned'} {self.engine.name}"

    def build(self, conv: FusedConv2d, memory_format: torch.memory_format) -> Engine:
        return self.engine(conv.dense() if self.is_dense and conv.dense_groups else conv, memory_format)


def all_forms() -> Iterator[Form]:
    """Every engine, on pruned and on dense weights."""
    return (Form(engine, is_dense) for is_dense in (False, True) for engine in ENGINES)


def time_forms(
    graph: fx.GraphModule,
    operands: Mapping[str, list[torch.Size]],
    memory_format: torch.memory_format,
    stopwatch: Stopwatch,
    bar: "tqdm[Any]",
) -> Choices:
    """Time every form of every fused convolution at the shapes of its operands, and choose the fastest."""
    found: Choices = {}
    for node, conv in calls(graph, FusedConv2d):
        shapes = operands[node.name]
        forms: dict[str, Form] = {}
        obstacles: dict[str, str] = {}
        for form in all_forms():
            if not form.is_dense and not conv.dense_groups:
                continue  # what was not pruned has dense forms only
            if reason := form.engine.obstacle(conv, memory_format):
                obstacles[form.engine.name] = reason
            else:
                forms[form_key(form, conv, shapes, memory_format)] = form
        timed = stopwatch.times(forms) or stopwatch.race(form_calls(forms, conv, shapes, memory_format))
        seconds = {str(form): timed[key] for key, form in forms.items()}
        name = str(node.target).removesuffix("_fused")
        chosen = min(seconds, key=seconds.__getitem__)
        found[node.name] = LayerChoice(name, tuple(shapes[0]), chosen, seconds, obstacles)
        bar.update()
    return found


def operand_shapes(graph: fx.GraphModule, inputs: tuple[Any, ...]) -> dict[str, list[torch.Size]]:
    """Shapes of the input, and of the residual if there is one, of each fused convolution, by name of its node."""
    shapes: dict[str, list[torch.Size]] = {}
    handles = [
        conv.register_forward_pre_hook(
            lambda _, operands, name=node.name: shapes.update({name: [operand.shape for operand in operands]})
        )
        for node, conv in calls(graph, FusedConv2d)
    ]
    graph(*inputs)
    for handle in handles:
        handle.remove()
    return shapes


def form_calls(
    forms: Mapping[str, Form], conv: FusedConv2d, shapes: list[torch.Size], memory_format: torch.memory_format
) -> dict[str, Callable[[], object]]:
    """A call of each form on random inputs, by key."""
    device = conv.weight.device
    generator = torch.Generator(device).manual_seed(0)
    operands = [
        torch.randn(shape, generator=generator, device=device).to(conv.weight).contiguous(memory_format=memory_format)
        for shape in shapes
    ]
    return {key: functools.partial(form.build(conv, memory_format), *operands) for key, form in forms.items()}


def form_key(form: Form, conv: FusedConv2d, shapes: list[torch.Size], memory_format: torch.memory_format) -> str:
    """All that the time of a form depends on, but for the machine."""
    parts = (
        form, list(conv.weight.shape), conv.groups, conv.stride, conv.padding, conv.dilation, conv.bias is not None,
        0 if conv.index is None else aligned_block(conv.index, conv.weight.shape[1]), conv.order is not None,
        conv.minimum, conv.maximum, [list(s) for s in shapes],
        str(conv.weight.dtype), str(memory_format),
    )  # fmt: skip
    return " ".join(map(str, parts))
