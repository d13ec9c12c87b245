"""What follows a convolution in the graph, as far as a refit can make use of it: BatchNorm, addition, rectifier."""

import math
from dataclasses import dataclass, replace

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
    """

    norm: str | None = None
    other: str | None = None
    bounds: Bounds | None = None

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
    if reader is not None and is_addition(reader):
        other = next((term for term in reader.args if term is not node), None)
        if not isinstance(other, fx.Node) or Memory(gm).changes(other, conv, [reader]):
            return following
        following = replace(following, other=other.name)
        node, reader = reader, _only_reader(reader)
    bounds = _rectifier(gm, reader)
    return following if bounds is None else replace(following, bounds=bounds)


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_norm(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    norm = gm.get_submodule(str(node.target))
    return type(norm) in BATCH_NORMS and norm.running_mean is not None and len(call_sites(gm)[norm]) == 1


def _rectifier(gm: fx.GraphModule, node: fx.Node | None) -> Bounds | None:
    if node is None:
        return None
    kind = type(gm.get_submodule(str(node.target))) if node.op == "call_module" else node.target
    return _RECTIFIERS.get(kind)
