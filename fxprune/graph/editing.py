"""What a rewrite pass is: a frozen dataclass whose fields are its options, called with a program, answering with an
outcome.
"""

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import fx, nn

from fxprune.graph.containers import holds_tensor
from fxprune.graph.copying import standing_for, tensors_of
from fxprune.graph.layers import ChannelGather

M = TypeVar("M", bound=nn.Module)

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

KEPT_BECAUSE = "fxprune_kept_because"
"""Key of `node.meta` under which a pass leaves the reason why a gather stays, for the report."""
RUN = "fxprune_run"
"""Key of `node.meta` with the number of the run that a recorder wrote the node in; 0 where it is absent."""
CODE = "fxprune_code"
"""Key of `node.meta` with the line of the user's code that a recorder saw making the node."""


@dataclass(frozen=True)
class Skip:
    """A place that a pass left alone.

    Attributes:
        node: name of the graph node.
        reason: why, in words a user can act on.
    """

    node: str
    reason: str


@dataclass(frozen=True)
class Outcome:
    """What a pass did: the nodes it rewrote, and the places it left with their reasons."""

    rewritten: tuple[str, ...] = ()
    skipped: tuple[Skip, ...] = ()


class Pass(Protocol):
    """A rewrite: changes the graph module in place, keeps the function it computes, and says what it did."""

    def __call__(self, gm: fx.GraphModule) -> Outcome: ...


def tensor_sources(node: fx.Node, values: Mapping[fx.Node, Any]) -> list[fx.Node]:
    """The nodes that give `node` its tensors, in order; `values` are what nodes give."""
    return [source for source in node.all_input_nodes if holds_tensor(values.get(source))]


def calls(gm: fx.GraphModule, kind: type[M]) -> Iterator[tuple[fx.Node, M]]:
    """Yield every node that calls a module of type `kind`, with the module, in graph order. The graph may change
    meanwhile.
    """
    for node in list(gm.graph.nodes):
        if node.op == "call_module":
            module = called_module(gm, node)
            if isinstance(module, kind):
                yield node, module


def called_module(gm: fx.GraphModule, node: fx.Node) -> nn.Module:
    """The module that a `call_module` node calls.

    Passes ask this for every node, many times; `get_submodule` does the same at ten times the cost.

    Raises:
        AttributeError: there is none at this path.
    """
    module: Any = gm
    for part in str(node.target).split("."):
        module = module._modules.get(part)
        if module is None:
            return gm.get_submodule(str(node.target))  # whose message says what is missing
    assert isinstance(module, nn.Module)
    return module


def is_addition(node: fx.Node) -> bool:
    """Whether a node adds two values and does nothing else."""
    named = node.op == "call_method" and node.target in ("add", "add_")
    return (named or (node.op == "call_function" and node.target in _ADDITIONS)) and (
        len(node.args) == 2 and not node.kwargs
    )


def label(node: fx.Node) -> str:
    """What a user would call a node: the path of the module that it calls, or its operation and the module whose
    forward has it.
    """
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack")
    owner = str(next(reversed(stack.values()))[0]) if stack else ""
    code = f" ({node.meta[CODE]})" if node.meta.get(CODE) else ""
    return (f"{node.name} in {owner}" if owner else node.name) + code


def call_sites(gm: fx.GraphModule) -> dict[nn.Module, list[fx.Node]]:
    """Return the nodes that call each module: a module is not a node, it may be called several times."""
    sites: dict[nn.Module, list[fx.Node]] = {}
    for node, module in calls(gm, nn.Module):
        sites.setdefault(module, []).append(node)
    return sites


def new_gather(gm: fx.GraphModule, source: fx.Node, gather: ChannelGather, name: str) -> fx.Node:
    """Add a gather that reads `source`, at the insertion point of the graph; `name` is a module path, made unique."""
    path = new_path(gm, name)
    gm.add_submodule(path, gather.train(gm.training))
    node = gm.graph.call_module(path, (source,))
    node.meta[RUN] = source.meta.get(RUN, 0)
    return node


def new_path(gm: fx.GraphModule, name: str) -> str:
    """Return a module path that is not taken: `name`, or else `name_2` and so on."""
    path, n = name, 1
    while _exists(gm, path):
        n += 1
        path = f"{name}_{n}"
    return path


def gather_before(gm: fx.GraphModule, node: fx.Node, gather: ChannelGather) -> None:
    """Make the first input of `node` pass through a gather."""
    source = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(source, fx.Node)
    with gm.graph.inserting_before(node):
        new = new_gather(gm, source, gather, f"{node.target}_in")
    if node.args:
        node.args = (new, *node.args[1:])
    else:
        node.kwargs = {**node.kwargs, "input": new}


def gather_after(gm: fx.GraphModule, node: fx.Node, gather: ChannelGather) -> None:
    """Make all users of `node` read it through a gather."""
    with gm.graph.inserting_after(node):
        new = new_gather(gm, node, gather, f"{node.target}_out")
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def erase_gather(
    gm: fx.GraphModule, node: fx.Node, replacement: fx.Node, sites: Mapping[nn.Module, list[fx.Node]]
) -> None:
    """Replace a gather by another value and forget its module if no other node calls it by the same path.

    Args:
        gm: the graph.
        node: calls the gather.
        replacement: what is read in its place.
        sites: what `call_sites` found; kept up to date.
    """
    target, others = str(node.target), sites[called_module(gm, node)]
    others.remove(node)
    node.replace_all_uses_with(replacement)
    gm.graph.erase_node(node)
    if not any(other.target == target for other in others):
        gm.delete_submodule(target)


class Tensors:
    """The parameters and buffers of a module tree by identity, so that a tensor is replaced everywhere it stands and
    tied ones stay tied.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._places: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for module in gm.modules():
            for store in (module._parameters, module._buffers):
                for name, tensor in store.items():
                    self._places.setdefault(id(tensor), []).append((store, name))

    def replace(self, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Put `new` in place of `old`, as a parameter if `old` is one, and return what was stored. `old` itself is not
        changed.
        """
        stored = standing_for(old, new)
        places = self._places.pop(id(old))
        for store, name in places:
            store[name] = stored
        self._places[id(stored)] = places
        return stored


def read_by_name(gm: fx.GraphModule) -> dict[int, str]:
    """Tensors that the graph reads itself (`get_attr`), beside the layers that own them: `id` to the name of the node.
    Whoever stores such a tensor in another order or shape changes what that node reads. Nodes that ask only for the
    device or dtype do not count.
    """
    named = tensors_of(gm)
    return {
        id(named[str(node.target)]): node.name
        for node in gm.graph.nodes
        if node.op == "get_attr"
        and str(node.target) in named
        and not all(user.target is getattr and user.args[1] in ("device", "dtype") for user in node.users)
    }


def first_reader(tensors: Iterable[torch.Tensor], named: Mapping[int, str]) -> str | None:
    """Return the node that reads one of `tensors` itself, as `read_by_name` found it; None if there is none."""
    return next((named[id(tensor)] for tensor in tensors if id(tensor) in named), None)


def _exists(gm: fx.GraphModule, path: str) -> bool:
    holder: Any = gm
    for part in path.split("."):
        if not hasattr(holder, part):
            return False
        holder = getattr(holder, part)
    return True


_ADDITIONS = frozenset((operator.add, operator.iadd, torch.add))
