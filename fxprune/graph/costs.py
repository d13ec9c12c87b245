"""What the layers of a graph cost: parameters and multiply-accumulates."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.graph.containers import convert_tensors, tensors_in
from fxprune.graph.contexts import undisturbed
from fxprune.graph.convolutions import Convolution
from fxprune.graph.copying import share_tensors
from fxprune.graph.editing import RUN, calls

LAYERS = Convolution | nn.Linear


def layer_costs(gm: fx.GraphModule, values: Mapping[fx.Node, Any]) -> dict[str, tuple[int, int | None]]:
    """Parameters, and MACs of one image over all calls (None if shapes are unknown), of each convolution and linear
    layer, by module path; those inside modules that stay whole too. Of a recording the first run counts.
    """
    params: dict[str, int] = {}
    macs: dict[str, int | None] = {}
    batch = batch_size(gm, values)
    for node, module in calls(gm, nn.Module):
        for name, layer, count in _called_layers(node, module, values):
            count = count if node.meta.get(RUN, 0) == 0 else 0
            params[name] = sum(p.numel() for p in layer.parameters())
            macs[name] = known_sum((macs.get(name, 0), None if count is None else count // batch))
    return {name: (params[name], macs[name]) for name in params}


def _called_layers(
    node: fx.Node, module: nn.Module, values: Mapping[fx.Node, Any]
) -> Iterator[tuple[str, nn.Module, int | None]]:
    """The layers that a call runs, with their MACs."""
    name = str(node.target)
    if isinstance(module, LAYERS):
        source, value = values.get(next(iter(node.all_input_nodes), node)), values.get(node)
        yield name, module, _macs(module, source, value)
        return
    inside = {path: layer for path, layer in module.named_modules() if isinstance(layer, LAYERS)}
    if not inside:
        return
    counts = _run_inside(node, module, values)
    for path, layer in inside.items():
        yield f"{name}.{path}", layer, None if counts is None else counts.get(path, 0)


def _run_inside(node: fx.Node, module: nn.Module, values: Mapping[fx.Node, Any]) -> dict[str, int] | None:
    """MACs of the layers inside a module that stays whole, by running a copy of it on what the call gives it; None if
    it does not run on numbers made up.
    """
    if any(source not in values for source in node.all_input_nodes):
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: values[source])
    for device in ("meta", "cpu"):  # one that reads data needs some

        def convert(tensor: Tensor, device: str = device) -> Tensor:
            blank = tensor.to("meta") if device == "meta" else torch.ones_like(tensor, device=device)
            return nn.Parameter(blank, requires_grad=False) if isinstance(tensor, nn.Parameter) else blank

        counts: dict[str, int] = {}
        copied = share_tensors(module, convert).eval()
        for path, layer in copied.named_modules():
            if isinstance(layer, LAYERS):
                layer.register_forward_hook(_counting(path, counts))
        try:
            with undisturbed():
                copied(*convert_tensors(args, convert), **convert_tensors(kwargs, convert))
        except Exception:  # user code may raise anything
            continue
        return counts
    return None


def _counting(path: str, counts: dict[str, int]) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def count(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        counts[path] = counts.get(path, 0) + (_macs(layer, inputs[0] if inputs else None, output) or 0)

    return count


def total_macs(costs: Mapping[str, tuple[int, int | None]]) -> int | None:
    """MACs of all layers for one image; None if a shape is unknown."""
    return known_sum(macs for _, macs in costs.values())


def known_sum(counts: Iterable[int | None]) -> int | None:
    """The sum; None if a summand is."""
    total = 0
    for count in counts:
        if count is None:
            return None
        total += count
    return total


def _macs(layer: nn.Module, source: Any, value: Any) -> int | None:
    """Multiply-accumulates of one call, over the whole batch; None if its shapes are unknown."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    meets = source if isinstance(layer, nn.modules.conv._ConvTransposeNd) else value
    return meets.numel() * math.prod(weight.shape[1:]) if isinstance(meets, Tensor) else None


def batch_size(gm: fx.GraphModule, values: Mapping[fx.Node, Any]) -> int:
    """Number of samples in the inputs that the values were found for; 1 if no input has a batch dimension, or a
    convolution reads one image without it.
    """
    for node, conv in calls(gm, Convolution):
        read = values.get(next(iter(node.all_input_nodes), node))
        if isinstance(read, Tensor) and read.dim() == len(conv.kernel_size) + 1:
            return 1
    placeholders = [values.get(node) for node in gm.graph.nodes if node.op == "placeholder"]
    tensors = [leaf for leaf in tensors_in(placeholders) if leaf.dim() > 1]
    return max(1, tensors[0].shape[0]) if tensors else 1
