"""What follows a convolution in the graph, as far as a refit can make use of it: BatchNorm, addition, rectifier."""

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxprune.graph.editing import BATCH_NORMS, call_sites, called_module, is_addition
from fxprune.graph.memory import Memory

Bounds = tuple[float, float]

_RECTIFIERS: dict[object, Bounds] = {
    nn.ReLU: (0.0, math.inf),
    F.relu: (0.0, math.inf),
    torch.relu: (0.0, math.inf),
    "relu": (0.0, math.inf),
    "relu_": (0.0, math.inf),
    nn.ReLU6: (0.0, 6.0),
    F.relu6: (0.0, 6.0),
}


@dataclass(frozen=True)
class Following:
    """The chain `convolution, BatchNorm, addition, rectifier`; each but the first may be absent.

    Attributes:
        norm: module name of the BatchNorm that alone reads the convolution.
        other: node that is added to the result.
        bounds: of the rectifier that alone reads the sum; outside them its derivative is zero.
        frozen: nodes of the scale and of the shift of each channel, where `norm` is a BatchNorm that the graph has
            inlined (torchvision's `FrozenBatchNorm2d`).
    """

    norm: str | None = None
    other: str | None = None
    bounds: Bounds | None = None
    frozen: tuple[str, str] | None = None

    def without_other(self) -> "Following":
        """The same if the other branch is not known: what comes after the addition is then of no use either."""
        return replace(self, other=None, bounds=None) if self.other else self


def follow(gm: fx.GraphModule, node: fx.Node) -> Following:
    """Find what follows the convolution or linear layer `node`, as long as each result has one reader.

    The BatchNorm behind a linear layer counts as unknown: in a sequence it would count positions, not channels.
    """
    following, conv = Following(), node
    reader = _only_reader(node)
    if reader is not None and _is_norm(gm, reader):
        if isinstance(called_module(gm, node), nn.Linear):
            return following
        following = replace(following, norm=str(reader.target))
        node, reader = reader, _only_reader(reader)
    elif reader is not None and (inlined := _frozen_norm(gm, node, reader)) is not None:
        name, scale, shift = inlined
        following = replace(following, norm=name, frozen=(scale.name, shift.name))
        (node,) = reader.users
        reader = _only_reader(node)
    while reader is not None and _passes_through(gm, reader):
        node, reader = reader, _only_reader(reader)
    if reader is not None and is_addition(reader):
        other = next((term for term in reader.args if term is not node), None)
        if not isinstance(other, fx.Node) or Memory(gm).changes(other, conv, [reader]):
            return following
        following = replace(following, other=other.name)
        node, reader = reader, _only_reader(reader)
    bounds = _rectifier(gm, reader)
    return following if bounds is None else replace(following, bounds=bounds)


def end_of(gm: fx.GraphModule, node: fx.Node, following: Following) -> fx.Node:
    """The last node before a rectifier of what follows a layer: itself, its BatchNorm, or the addition."""
    if following.frozen is not None:
        (shift,) = (n for n in gm.graph.nodes if n.name == following.frozen[1])
        (node,) = shift.users
    elif following.norm is not None:
        (node,) = node.users
    if following.other is not None:
        (node,) = node.users
        while _passes_through(gm, node):
            (node,) = node.users
    return node


def _passes_through(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node calls a module without tensors that in evaluation mode, in which networks are refitted, gives back
    what it is given: dropout, stochastic depth, also as repositories write them.
    """
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    module = gm.get_submodule(str(node.target))
    if isinstance(module, (nn.Identity, nn.modules.dropout._DropoutNd)):
        return True
    if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
        return False
    training, probe = module.training, torch.arange(36.0).view(2, 2, 3, 3) - 18
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            given = probe.clone()  # in which a rectifier in place would show
            return module.eval()(given) is given and torch.equal(given, probe)
    except Exception:  # whatever a module does that wants other inputs
        return False
    finally:
        module.train(training)


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_norm(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    norm = gm.get_submodule(str(node.target))
    return type(norm) in BATCH_NORMS and norm.running_mean is not None and len(call_sites(gm)[norm]) == 1


def _frozen_norm(gm: fx.GraphModule, conv: fx.Node, product: fx.Node) -> tuple[str, fx.Node, fx.Node] | None:
    """The name of an inlined BatchNorm that a convolution is read by, `conv * scale + (bias - mean * scale)`, and the
    nodes of both constants. To move the intercept into its mean is right for just that function, so it is evaluated.
    """
    total = _only_reader(product)
    if not _is_product(product) or total is None or not is_addition(total):
        return None
    scale, shift = (
        next((term for term in node.args if term is not own), None) for node, own in ((product, conv), (total, product))
    )
    if not isinstance(scale, fx.Node) or not isinstance(shift, fx.Node):
        return None
    read = _attributes_behind(shift)
    names = {target.rpartition(".")[0] for target in read or ()}
    if len(names) != 1 or not {"bias", "running_mean"} <= {target.rpartition(".")[2] for target in read or ()}:
        return None
    (name,) = names
    bias, mean = (gm.get_buffer(f"{name}.{buffer}") for buffer in ("bias", "running_mean"))
    factor, constant = (_constant(gm, node) for node in (scale, shift))
    if factor is None or constant is None or len({x.numel() for x in (factor, constant, mean)}) != 1:
        return None
    return (name, scale, shift) if torch.allclose(constant.flatten(), bias - mean * factor.flatten()) else None


def _attributes_behind(node: fx.Node) -> set[str] | None:
    """The attributes that a node is computed from; None if there is anything else."""
    found: set[str] = set()
    pending = [node]
    while pending:
        node = pending.pop()
        if node.op == "get_attr":
            found.add(str(node.target))
        elif node.op == "placeholder" or not node.all_input_nodes:
            return None
        pending += node.all_input_nodes
    return found


def _constant(gm: fx.GraphModule, node: fx.Node) -> torch.Tensor | None:
    """The value of a node that is computed from buffers alone."""
    if _attributes_behind(node) is None:
        return None
    known: dict[fx.Node, Any] = {}
    interpreter = fx.Interpreter(gm)
    interpreter.env = known
    position = {other: i for i, other in enumerate(gm.graph.nodes)}
    needed, pending = {node}, [node]
    while pending:
        needed.update(sources := pending.pop().all_input_nodes)
        pending += sources
    with torch.no_grad():
        for source in sorted(needed, key=lambda other: position[other]):
            known[source] = interpreter.run_node(source)
    value = known[node]
    return value if isinstance(value, torch.Tensor) else None


def _is_product(node: fx.Node) -> bool:
    """Whether a node multiplies two values and does nothing else."""
    named = node.op == "call_method" and node.target == "mul"
    return (named or node.target in (operator.mul, torch.mul)) and len(node.args) == 2 and not node.kwargs


def _rectifier(gm: fx.GraphModule, node: fx.Node | None) -> Bounds | None:
    if node is None:
        return None
    kind = type(gm.get_submodule(str(node.target))) if node.op == "call_module" else node.target
    return _RECTIFIERS.get(kind)
