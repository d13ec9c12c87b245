"""The residual branches of a network: what is computed beside a stream, and added to it.

In `stream + branch(stream)` the branch can go as a whole where it ends in a layer that gives a constant once its weight
is zero: a normalization gives its shift, a convolution its bias. So a network without some of its branches is the
network in which the weights of their last layers are zero.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from fxprune.channels.operators import METHODS, function_rule, rule_for
from fxprune.channels.rules import elementwise
from fxprune.graph.convolutions import Convolution, has_own_forward
from fxprune.graph.editing import BATCH_NORMS, call_sites, called_module, first_reader, is_addition, label, read_by_name
from fxprune.graph.memory import Memory
from fxprune.graph.tracing import is_hooked
from fxprune.plans.eligibility import parameters_of_several_modules


@dataclass(frozen=True)
class Branch:
    """A branch, by its nodes.

    Attributes:
        stream: what it reads, and what it is added to.
        nodes: all that is computed for it up to its last layer, in graph order.
        tail: what follows that layer, entry by entry: activation, dropout, stochastic depth.
        sum: the addition.
    """

    stream: fx.Node
    nodes: tuple[fx.Node, ...]
    tail: tuple[fx.Node, ...]
    sum: fx.Node

    @property
    def end(self) -> fx.Node:
        """Calls its last layer."""
        return self.nodes[-1]

    @property
    def name(self) -> str:
        """The module path of the layer at its end, by which a plan names the branch."""
        return str(self.end.target)

    @property
    def modules(self) -> tuple[str, ...]:
        """The module paths of its layers, in graph order."""
        return tuple(dict.fromkeys(str(node.target) for node in self.nodes if node.op == "call_module"))


def residual_branches(gm: fx.GraphModule, values: Mapping[fx.Node, Any]) -> tuple[dict[str, Branch], dict[str, str]]:
    """The branches that can go, by name, in graph order; and those that cannot, with the reason.

    Args:
        gm: a traced network.
        values: what its nodes give; a branch whose shape is not known stays.
    """
    found: dict[str, Branch] = {}
    refused: dict[str, str] = {}
    memory, sites, named = Memory(gm), call_sites(gm), read_by_name(gm)
    shared = parameters_of_several_modules(gm)
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    for branch in _candidates(gm, position):
        reason = _obstacle(gm, branch, values, memory, sites)
        if not reason:
            tensors = list(called_module(gm, branch.end).parameters(recurse=False))
            if any(id(tensor) in shared for tensor in tensors) or first_reader(tensors, named):
                reason = "the layer at its end shares its parameters"
        if reason:
            refused[label(branch.end)] = reason
        else:
            found[branch.name] = branch
    return found, refused


def _gives_its_bias(end: nn.Module) -> bool:
    """Whether a layer gives its bias, or zero, if its weight is zero; of subclasses those that only normalize."""
    if isinstance(end, Convolution):
        return not has_own_forward(type(end))
    idle = all(isinstance(child, nn.Identity) for child in end.children())
    return type(end) in BATCH_NORMS or (rule_for(end) is not None and idle)


def _candidates(gm: fx.GraphModule, position: Mapping[fx.Node, int]) -> Iterator[Branch]:
    """All that has the shape of a branch: computed from one value alone, for the sum with it alone."""
    for node in gm.graph.nodes:
        if not is_addition(node) or not all(isinstance(term, fx.Node) for term in node.args):
            continue
        for term, stream in (node.args, node.args[::-1]):
            body = _only_for(term, node, stream)
            sources = {source for inner in body for source in inner.all_input_nodes} - body
            if body and sources == {stream}:
                tail = _tail(gm, term, body)
                before = sorted(body.difference(tail), key=position.__getitem__)
                yield Branch(stream, tuple(before), tuple(reversed(tail)), node)
                break


def _tail(gm: fx.GraphModule, term: fx.Node, body: set[fx.Node]) -> list[fx.Node]:
    """What stands between the last layer of a branch and its end, backwards, with the parameters and flags of that."""
    found: list[fx.Node] = []
    while _is_pointwise(gm, term):
        given = [source for source in term.all_input_nodes if not source.all_input_nodes]
        computed = [source for source in term.all_input_nodes if source.all_input_nodes]
        if len(computed) != 1 or computed[0] not in body:
            break
        found += [term, *(source for source in given if source in body)]
        (term,) = computed
    return found


def _is_pointwise(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node treats each entry alone."""
    if node.op == "call_module":
        return rule_for(called_module(gm, node)) is elementwise
    return (node.op == "call_function" and function_rule(node.target) is elementwise) or (
        node.op == "call_method" and METHODS.get(str(node.target)) is elementwise
    )


def _only_for(term: fx.Node, reader: fx.Node, stream: fx.Node) -> set[fx.Node]:
    """The nodes behind `stream` whose values serve `term` alone, which serves `reader` alone."""
    body: set[fx.Node] = set()
    pending = [term]
    while pending:
        node = pending.pop()
        if (
            node not in body
            and node is not stream
            and node.op != "placeholder"
            and body.union((reader,)).issuperset(node.users)
        ):
            body.add(node)
            pending += node.all_input_nodes  # one whose other readers come later is asked again by them
    return body


def _obstacle(
    gm: fx.GraphModule,
    branch: Branch,
    values: Mapping[fx.Node, Any],
    memory: Memory,
    sites: Mapping[nn.Module, list[fx.Node]],
) -> str:
    """Why a branch cannot go, or `""`."""
    end = called_module(gm, branch.end) if branch.end.op == "call_module" else None
    if not isinstance(end, (*BATCH_NORMS, Convolution)):
        what = branch.end.target if end is None else type(end).__name__
        return f"it ends in {what}, not in a convolution or BatchNorm"
    if not _gives_its_bias(end):
        return f"it ends in a {type(end).__name__}, which computes its own forward"
    if is_hooked(end) or "forward" in vars(end) or not isinstance(end._parameters.get("weight"), Tensor):
        return "the layer at its end has no weight of its own, or hooks"
    shapes = [getattr(values.get(node), "shape", None) for node in (branch.stream, branch.sum, branch.end)]
    if None in shapes:
        return "its shape is not known"
    if len(set(shapes)) > 1:
        return "it is added to a stream of another shape"
    inside = set(branch.nodes)
    for node in branch.nodes:
        module = called_module(gm, node) if node.op == "call_module" else None
        keeps = module is end or (module is not None and next(module.buffers(), None) is not None)
        if module is not None and keeps and not inside.issuperset(sites[module]):
            return f"its layer {node.target} is called elsewhere too"
    kind = getattr(branch.sum.target, "__name__", branch.sum.target)
    writes_into_stream = kind in ("iadd", "add_") and branch.sum.args[0] is branch.stream
    if writes_into_stream or memory.changes(branch.stream, branch.stream, [branch.sum]):
        return "something is written into the stream in place"
    return ""
