"""What each node of a graph gives, found on meta tensors, so that it costs next to nothing, or else by a real run."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.errors import TraceError
from fxprune.graph.containers import convert_tensors, tensors_in
from fxprune.graph.contexts import undisturbed
from fxprune.graph.convolutions import Convolution
from fxprune.graph.copying import share_tensors
from fxprune.graph.editing import called_module
from fxprune.graph.layers import ChannelGather

# Spatial sizes tried, in this order, when no example is given: ImageNet, CIFAR, MNIST, then whatever fits the
# classifier.
PROBE_SIZES = (224, 32, 28, 64, 96, 128, 256, 299, 384, 512, 16, 8)


def first_line(error: Exception) -> str:
    """The first sentence of an error message, for torch explains at length."""
    return str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__


class _ValueInterpreter(fx.Interpreter):
    """Runs a graph node by node and keeps what every value is like: as long as it is on the meta device, the value."""

    def __init__(self, module: nn.Module, graph: fx.Graph, is_real: bool) -> None:
        super().__init__(module, garbage_collect_values=is_real, graph=graph)
        self.values: dict[fx.Node, Any] = {}
        self._is_real = is_real

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n] = convert_tensors(value, lambda tensor: tensor.detach().to("meta")) if self._is_real else value
        return value

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # Wrapped functions (swin's window attention) change the lists they are given; fx hands out immutable ones.
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        thawed = _thaw((args, kwargs))
        return thawed[0], thawed[1]


def _thaw(argument: Any) -> Any:
    if isinstance(argument, dict):
        return {key: _thaw(value) for key, value in argument.items()}
    if isinstance(argument, list):
        return [_thaw(value) for value in argument]
    if type(argument) is tuple:
        return tuple(_thaw(value) for value in argument)
    return argument


def propagate(module: fx.GraphModule, examples: tuple[Any, ...] | None) -> tuple[dict[fx.Node, Any], tuple[Any, ...]]:
    """Values of all nodes, from the example or from the first probe that fits, and the inputs used: meta tensors, or
    real ones where forward reads data or does not run on the meta device.
    """
    if examples is None:
        for probe in _probes(module):
            values, error = meta_values(module, (probe,))
            if error is None:
                return values, (probe,)
        return {}, ()
    inputs = convert_tensors(examples, lambda tensor: tensor.to("meta").detach())
    values, error = meta_values(module, inputs)
    if error is None:
        return values, inputs
    inputs = convert_tensors(examples, lambda tensor: tensor.detach().clone())
    values, error = meta_values(module, inputs)
    if error is not None and not _needs_data(error):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(inputs))
        raise TraceError(f"the model does not run on example inputs of shape {shapes}: {first_line(error)}") from error
    return values, inputs


def _needs_data(error: Exception) -> bool:
    """Whether a run on meta tensors ended because it asked for their data: a size or a branch depends on values."""
    return isinstance(error, NotImplementedError) or "on meta tensors" in str(error)


def meta_values(module: fx.GraphModule, inputs: tuple[Any, ...]) -> tuple[dict[fx.Node, Any], Exception | None]:
    """Run `module` on copies of its tensors; return the value of each node reached, with meta tensors in place of
    tensors, and the error that ended the run, if any.

    Args:
        module: the graph, which is not changed.
        inputs: arguments of forward. If their tensors are on the meta device, so is the run, and costs nothing.
    """
    is_real = any(not tensor.is_meta for tensor in tensors_in(inputs))

    def convert(tensor: Tensor) -> Tensor:
        copied = tensor.detach().clone() if is_real else tensor.detach().to("meta")
        return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied

    tree = nn.Module()  # the modules alone: copying the graph as well would take most of the time
    tree._modules, tree._parameters, tree._buffers = module._modules, module._parameters, module._buffers
    interpreter = _ValueInterpreter(share_tensors(tree, convert).eval(), module.graph, is_real)
    try:
        with undisturbed():
            interpreter.run(*convert_tensors(inputs, lambda tensor: tensor.clone()))
    except Exception as error:  # user code may raise anything; the caller decides what it means
        return interpreter.values, error
    return interpreter.values, None


@dataclass
class CarriedValues:
    """What the nodes of a graph give, carried from pass to pass, so that a pipeline runs the graph once and not once a
    pass.

    The passes move channels: they add gathers, and what every other node gives keeps its shape and type. So only the
    values of new gathers are found, from what they read. A graph with any other node that was not there before is run
    as a whole.

    Attributes:
        inputs: arguments of forward as meta tensors; nothing is known without them.
        known: what nodes gave so far.
    """

    inputs: tuple[Any, ...]
    known: Mapping[fx.Node, Any] = field(default_factory=dict, repr=False, compare=False)
    _seen: set[fx.Node] = field(init=False, repr=False, compare=False)  # also those whose value a run did not find

    def __post_init__(self) -> None:
        self._seen = set(self.known)

    def of(self, gm: fx.GraphModule) -> Mapping[fx.Node, Any]:
        """The value of each node of `gm`; a node whose value is unknown is absent."""
        if not self.inputs:
            return {}
        fresh = [node for node in gm.graph.nodes if node not in self._seen and node.op != "output"]
        if all(node.op == "call_module" and isinstance(called_module(gm, node), ChannelGather) for node in fresh):
            values = {node: self.known[node] for node in gm.graph.nodes if node in self.known}
            for node in fresh:  # in graph order, so that what it reads is known if it can be
                source, gather = values.get(node.all_input_nodes[0]), called_module(gm, node)
                if isinstance(source, Tensor) and isinstance(gather, ChannelGather):
                    values[node] = source.index_select(gather.dim, gather.index.to("meta"))
        else:
            values, _ = meta_values(gm, self.inputs)
        self.known, self._seen = values, set(gm.graph.nodes)
        return values

    def forget(self) -> None:
        """Begin anew: from now on nodes give other shapes."""
        self.known, self._seen = {}, set()


def _probes(module: fx.GraphModule) -> Iterator[Tensor]:
    """Plausible inputs for a module with a single tensor input, two samples each."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    layers = [module.get_submodule(node.target) for node in module.graph.nodes if node.op == "call_module"]
    first = next((m for m in layers if isinstance(m, Convolution | nn.Linear)), None)
    if len(placeholders) != 1 or first is None:
        return
    dtype = first.weight.dtype
    if isinstance(first, nn.Linear):
        yield torch.empty(2, first.in_features, dtype=dtype, device="meta")
        return
    for size in PROBE_SIZES:
        yield torch.empty(2, first.in_channels, *(size,) * len(first.kernel_size), dtype=dtype, device="meta")
