"""What a rewrite pass is: a frozen dataclass whose fields are its options, called with a program, answering with an outcome."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import fx, nn

from fxprune.layers import ChannelGather

M = TypeVar("M", bound=nn.Module)


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


def calls(gm: fx.GraphModule, kind: type[M]) -> Iterator[tuple[fx.Node, M]]:
    """Yield every node that calls a module of type `kind`, with the module, in graph order. The graph may change meanwhile."""
    for node in list(gm.graph.nodes):
        if node.op == "call_module":
            module = gm.get_submodule(node.target)
            if isinstance(module, kind):
                yield node, module


def call_sites(gm: fx.GraphModule, module: nn.Module) -> list[fx.Node]:
    """Return the nodes that call `module`: a module is not a node, it may be called several times."""
    return [node for node, other in calls(gm, type(module)) if other is module]


def new_gather(gm: fx.GraphModule, source: fx.Node, index: torch.Tensor, dim: int, name: str) -> fx.Node:
    """Add a ChannelGather that reads `source`, at the insertion point of the graph; `name` is a module path, made unique."""
    path, n = name, 1
    while _exists(gm, path):
        n += 1
        path = f"{name}_{n}"
    gm.add_submodule(path, ChannelGather(index, dim))
    return gm.graph.call_module(path, (source,))


def gather_before(gm: fx.GraphModule, node: fx.Node, index: torch.Tensor, dim: int) -> fx.Node:
    """Make the first input of `node` pass through a gather."""
    source = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(source, fx.Node)
    with gm.graph.inserting_before(node):
        gather = new_gather(gm, source, index, dim, f"{node.target}_in")
    if node.args:
        node.args = (gather, *node.args[1:])
    else:
        node.kwargs = {**node.kwargs, "input": gather}
    return gather


def gather_after(gm: fx.GraphModule, node: fx.Node, index: torch.Tensor, dim: int) -> fx.Node:
    """Make all users of `node` read it through a gather."""
    with gm.graph.inserting_after(node):
        gather = new_gather(gm, node, index, dim, f"{node.target}_out")
    node.replace_all_uses_with(gather, delete_user_cb=lambda user: user is not gather)
    return gather


def is_identity(index: torch.Tensor) -> bool:
    """Whether a gather index of shape `(A,)` is 0, 1, ..., A - 1."""
    return torch.equal(index, torch.arange(index.numel(), device=index.device))


def erase_gather(gm: fx.GraphModule, node: fx.Node, replacement: fx.Node) -> None:
    """Replace a gather by another value and forget its module if no other node calls it."""
    target = node.target
    node.replace_all_uses_with(replacement)
    gm.graph.erase_node(node)
    if not any(other.op == "call_module" and other.target == target for other in gm.graph.nodes):
        gm.delete_submodule(str(target))


def set_module(gm: fx.GraphModule, path: str, module: nn.Module) -> None:
    """Put `module` at every path where the module now at `path` stands, so that a shared module stays shared."""
    old = gm.get_submodule(path)
    for other, candidate in list(gm.named_modules(remove_duplicate=False)):
        if candidate is old:
            parent, _, child = other.rpartition(".")
            setattr(gm.get_submodule(parent), child, module)


def _exists(gm: fx.GraphModule, path: str) -> bool:
    holder: Any = gm
    for part in path.split("."):
        if not hasattr(holder, part):
            return False
        holder = getattr(holder, part)
    return True


RewriteHook = Callable[[fx.GraphModule, Pass, Outcome], None]
