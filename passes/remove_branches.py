"""s + f(s) == s + c, if the last layer of f has a weight of zero: then it gives its bias, whatever it reads.

A BatchNorm with scale zero gives its shift in both modes, a convolution with weight zero its bias, or nothing where it
has none.

1. Every branch that the plan names loses its layers; the bias of the last one stays, under its name, as a parameter
   that trains as before.
2. The addition adds that, or vanishes; in a graph that writes in place it becomes a copy then, for the stream may have
   other readers.
Left alone: nothing that the plan names. An error: a weight that is not zero, and a branch that cannot go, with the
reason (`fxprune.channels.branches`).
"""

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxprune.channels.branches import Branch, residual_branches
from fxprune.errors import PassError
from fxprune.graph.editing import Outcome, called_module
from fxprune.graph.memory import is_mutating
from fxprune.graph.values import CarriedValues
from fxprune.plans import PrunePlan


@dataclass(frozen=True)
class RemoveBranches:
    """Take the branches that `plan` removes out of the graph.

    Attributes:
        plan: what to remove.
        values: what the nodes give, to know shapes.
    """

    plan: PrunePlan
    values: CarriedValues

    def __call__(self, gm: fx.GraphModule) -> Outcome:
        values = self.values.of(gm)
        found, refused = residual_branches(gm, values)
        for name in self.plan.branches:
            if name not in found:
                why = refused.get(name, "the graph has no residual branch that ends there")
                raise PassError(f"{name}: the branch that the plan removes cannot go: {why}; make the plan anew")
            count = int(called_module(gm, found[name].end).get_parameter("weight").count_nonzero())
            if count:
                raise PassError(
                    f"{name}: {count} weights of a branch that the plan removes are not zero; rewrite the model that "
                    "fxprune.mask returns"
                )
        writes = any(is_mutating(gm, node) for node in gm.graph.nodes)
        replaced: dict[fx.Node, fx.Node] = {}
        for name in self.plan.branches:
            value = values[found[name].end]
            assert isinstance(value, Tensor)
            stream = found[name].stream
            replaced[found[name].sum] = _remove(gm, found[name], replaced.get(stream, stream), value.dim() - 2, writes)
        gm.delete_all_unused_submodules()
        self.values.forget()
        return Outcome(tuple(self.plan.branches))


def _remove(gm: fx.GraphModule, branch: Branch, stream: fx.Node, trailing: int, writes: bool) -> fx.Node:
    """Take one branch out; `trailing` is the number of dimensions behind the channels. Returns what the sum is now."""
    bias = called_module(gm, branch.end)._parameters.get("bias")
    if bias is None and not branch.tail:
        with gm.graph.inserting_before(branch.sum):
            result = gm.graph.call_function(torch.clone, (stream,)) if writes else stream
    else:
        constant = _constant(gm, branch, stream, bias, trailing)
        branch.end.replace_all_uses_with(constant)
        with gm.graph.inserting_before(branch.sum):
            term = next(term for term in branch.sum.args if term is not stream)
            result = gm.graph.call_function(operator.add, (stream, constant if term is branch.end else term))
            result.meta = dict(branch.sum.meta)
    branch.sum.replace_all_uses_with(result)
    for node in (branch.sum, *reversed(branch.nodes)):
        gm.graph.erase_node(node)
    return result


def _constant(gm: fx.GraphModule, branch: Branch, stream: fx.Node, bias: nn.Parameter | None, trailing: int) -> fx.Node:
    """What the last layer gives: its bias for all positions, or a zero. Memory of its own, if what follows writes into
    it; of the shape of the stream, if what follows drops by sample or position.
    """
    draws = any(_draws(gm, node) for node in branch.tail)
    with gm.graph.inserting_before(branch.end):
        if bias is None:
            return gm.graph.call_function(torch.zeros_like, (stream,))
        holder = nn.Module()
        holder.register_parameter("bias", bias)
        parent, _, child = branch.name.rpartition(".")
        setattr(gm.get_submodule(parent), child, holder.train(gm.training))
        constant = gm.graph.get_attr(f"{branch.name}.bias")
        if trailing:
            constant = gm.graph.call_method("reshape", (constant, -1, *[1] * trailing))
        if draws:
            constant = gm.graph.call_method("expand_as", (constant, stream))
        if any(is_mutating(gm, node) for node in branch.tail):
            constant = gm.graph.call_function(torch.clone, (constant,))
    return constant


def _draws(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node may draw random numbers: dropout and its kin."""
    what = type(called_module(gm, node)).__name__ if node.op == "call_module" else str(node.target)
    return any(word in what.lower() for word in ("drop", "stochastic", "rrelu"))
