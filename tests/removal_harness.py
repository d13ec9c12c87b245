"""Remove whole channels from a small net, and check that the result is the net with these channels at zero."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from equality import assert_same_function, randomize
from torch import Tensor, fx, nn

from fxprune.channels.removal import Removable, find_removable
from fxprune.channels.units import ChannelUnits, Chosen
from fxprune.graph.costs import layer_costs
from fxprune.graph.tracing import Trace, trace
from fxprune.graph.values import CarriedValues, meta_values
from fxprune.passes import RemoveChannels
from fxprune.plans import PrunePlan


def prepared(net: nn.Module) -> nn.Module:
    """The net in float64, in evaluation mode, with weights from which every mistake shows."""
    return randomize(net.double()).eval()


def image(channels: int = 3, size: int = 4) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@dataclass(frozen=True)
class Subject:
    """A net, traced, and what can be removed from it."""

    net: nn.Module
    inputs: tuple[Tensor, ...]
    traced: Trace
    found: Removable

    @property
    def units(self) -> ChannelUnits:
        return self.found.units

    def plan(self, goes: Chosen) -> PrunePlan:
        return PrunePlan.from_json(PrunePlan({}, removed=self.found.removed(goes)).to_json())


def subject(net: nn.Module, *inputs: Tensor, ignore: Sequence[str] = ()) -> Subject:
    traced = trace(net, inputs)
    costs = layer_costs(traced.module, traced.values)
    return Subject(net, inputs, traced, find_removable(traced.module, traced.values, costs, ignore))


def spaces(units: ChannelUnits) -> str:
    """The channel spaces with how many units each has: `a 8, b 4`."""
    sizes = np.bincount(units.space, minlength=len(units.names)).tolist()
    return ", ".join(f"{name} {size}" for name, size in zip(units.names, sizes, strict=True))


def drawn(units: ChannelUnits, seed: int, share: float = 0.5) -> Chosen:
    """About a `share` of the units, at random: at least one of each space, and never all."""
    generator = np.random.default_rng(seed)
    goes: Chosen = generator.random(units.count) < share
    for space in range(len(units.names)):
        first, last = generator.permutation(np.flatnonzero(units.space == space))[[0, -1]]
        goes[first], goes[last] = True, False
    return goes


def all_but_one(units: ChannelUnits, seed: int) -> Chosen:
    """All units of one space but one, and few of the others."""
    generator = np.random.default_rng(seed)
    goes = drawn(units, seed, 0.1)
    mine = generator.permutation(np.flatnonzero(units.space == generator.integers(len(units.names))))
    goes[mine[1:]], goes[mine[0]] = True, False
    return goes


def half_of_each(units: ChannelUnits, *, last: bool) -> Chosen:
    """The first or the last half of each space: what lies side by side goes together."""
    goes = np.zeros(units.count, dtype=np.bool_)
    for space in range(len(units.names)):
        mine = np.flatnonzero(units.space == space)
        goes[mine[len(mine) // 2 :] if last else mine[: len(mine) // 2]] = True
    return goes


@torch.no_grad()
def zeroed(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """A copy of the model in which all that gives a removed channel its value is zero, read from the raw plan."""
    masked = copy.deepcopy(model)
    tensors = {**dict(masked.named_parameters(remove_duplicate=False)), **dict(masked.named_buffers())}
    for name, channels in plan.removed.items():
        if name in tensors:
            tensors[name].view(-1)[list(channels.outputs)] = 0
            continue
        module = masked.get_submodule(name)
        for attribute in ("weight", "bias"):
            tensor = getattr(module, attribute, None)
            if tensor is not None:
                depthwise = getattr(module, "groups", 1) > 1
                transposed = attribute == "weight" and getattr(module, "transposed", False) and not depthwise
                (tensor.movedim(1, 0) if transposed else tensor)[list(channels.outputs)] = 0
    return masked


def without(found: Subject, plan: PrunePlan) -> fx.GraphModule:
    """The graph of the net with the channels at zero, and then taken out of it."""
    gm = zeroed(found.traced.module, plan)
    assert isinstance(gm, fx.GraphModule)
    outcome = RemoveChannels(plan, CarriedValues(found.traced.inputs))(gm)
    assert set(plan.removed) <= set(outcome.rewritten)
    gm.graph.lint()
    gm.recompile()
    return gm


def check_removal(found: Subject, goes: Chosen, modes: Sequence[str] = ("eval", "train")) -> fx.GraphModule:
    """Remove units from a net and return the smaller one.

    Raises:
        AssertionError: it computes something else than the net with zeros, or costs another number of operations.
    """
    plan = found.plan(goes)
    gm = without(found, plan)
    costs = layer_costs(gm, meta_values(gm, found.traced.inputs)[0])
    assert sum(macs or 0 for _, macs in costs.values()) == round(found.units.macs(~goes))
    assert_same_function(copy.deepcopy(gm), zeroed(found.net, plan), found.inputs, modes)
    return gm
