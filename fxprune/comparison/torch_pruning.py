"""Whole channels removed by Torch-Pruning, another library (Fang et al. 2023, DepGraph), at equal MACs.

Its scores are taken as its users get them. Read in version 1.6.1, they are not quite those of the papers:

- `magnitude`: the sum of squares of the weights of a channel, averaged over all layers that lose it, both those that
  write and those that read it, and the scales of BatchNorm.
- `fpgm`: He et al. 2019 (section 3) sum the distances of a filter from the others of its layer. Here distances are
  those between squared weights, so that a filter and its negative are the same, and columns of the layers that read
  the channel count as much as filters.
- `taylor`: Molchanov et al. 2019 (section 3) square weight times gradient batch by batch, or sum it over a filter
  before the square. Here the gradient is that of the mean loss, its products with the weights are summed as absolute
  numbers, and scales of BatchNorm, the gates of the paper, are left out (the case compares with the function for
  GroupNorm).
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.calibration.subject import Subject
from fxprune.channels.units import STAYS
from fxprune.comparison.extras import ComparisonError, require
from fxprune.comparison.layer_calls import count_macs, last_layer
from fxprune.errors import PlanError
from fxprune.graph.convolutions import convolutions
from fxprune.planning.filters import removable_of
from fxprune.plans import PrunePlan

Importance = Literal["magnitude", "fpgm", "taylor"]
Batches = Sequence[tuple[Tensor, Tensor]]
"""Inputs, `(N, C, H, W)`, and their labels, int64 `(N,)`."""

MACS_TOLERANCE = 0.01
"""How near, relative to the target, the search for a channel ratio of equal MACs goes before it stops."""
MACS_STEPS = 12


@dataclass(frozen=True)
class Narrowed:
    """A network without some channels.

    Attributes:
        network: a smaller copy of the dense one.
        removed: the filters that went, by the name of their convolution, ascending.
    """

    network: nn.Module
    removed: Mapping[str, tuple[int, ...]]


def prune_channels(
    model: nn.Module,
    inputs: Tensor,
    macs: int,
    importance: Importance = "magnitude",
    batches: Batches = (),
    round_to: int = 1,
) -> Narrowed:
    """A copy of `model` with about `macs` MACs, found by bisection of the ratio of channels, the same in all layers.

    Where the MACs leap over the target, because many layers lose their next channels at one ratio, what is bisected
    then is how many layers, from the input on, are behind the leap; where one layer leaps too far, with all that are
    tied to it, it stays and the search goes on with those after it.

    Args:
        model: in evaluation mode, on the device of `inputs`; its last layer keeps its outputs.
        inputs: `(N, C, H, W)`.
        macs: multiply-accumulates of one image to come near to.
        importance: what Torch-Pruning removes channels by.
        batches: for `"taylor"`, what the gradient of the mean cross entropy is taken on.
        round_to: channels that remain are a multiple of it; with more than 1, narrow networks may come no nearer to
            `macs` than a few percent.

    Returns:
        The network that came nearest; count its MACs.

    Raises:
        PlanError: `"taylor"` without batches, or another importance.
        ComparisonError: Torch-Pruning is not installed.
    """
    score = _importance(importance)
    gradients = _gradients(model, batches) if importance == "taylor" else {}
    best, best_gap = Narrowed(model, {}), math.inf

    def is_large(low: float, high: float, behind: Sequence[int]) -> bool:
        nonlocal best, best_gap
        pruned = _prune(model, inputs, score, gradients, round_to, low, high, behind)
        found = count_macs(pruned.network, inputs)
        if abs(found / macs - 1) < best_gap:
            best, best_gap = pruned, abs(found / macs - 1)
        return found > macs

    low, high = 0.0, 1.0
    for _ in range(MACS_STEPS):
        share = (low + high) / 2
        low, high = (share, high) if is_large(share, share, ()) else (low, share)
        if best_gap <= MACS_TOLERANCE:
            return best
    behind: list[int] = []
    ahead = list(range(sum(1 for _ in _layers(model))))
    while ahead and best_gap > MACS_TOLERANCE:
        few, many = 0, len(ahead)
        while many - few > 1 and best_gap > MACS_TOLERANCE:
            middle = (few + many) // 2
            few, many = (middle, many) if is_large(low, high, behind + ahead[:middle]) else (few, middle)
        behind, ahead = behind + ahead[:few], ahead[many:]
    return best


def as_plan(model: nn.Module, removed: Mapping[str, tuple[int, ...]], inputs: Tensor) -> PrunePlan:
    """The plan of fxprune without the same filters, so that what is left can be refitted and recovered.

    Args:
        model: the dense network.
        removed: see `Narrowed`.
        inputs: `(N, C, H, W)`.

    Raises:
        ComparisonError: fxprune removes other channels together than Torch-Pruning did, which (1.6.1) ties channels of
            the same number where zeros were padded before them, as in the shortcuts of some ResNets for CIFAR.
        PlanError: the model has no convolution, or shapes that cannot be found.
    """
    removable = removable_of(Subject(model, inputs, None))
    chosen = np.zeros(removable.units.count, dtype=np.bool_)
    for name, positions in removed.items():
        units = removable.units.layers[name].writes[list(positions)]
        chosen[units[units != STAYS]] = True
    goes = removable.removed(chosen)
    for name in convolutions(model):
        planned = goes[name].outputs if name in goes else ()
        if planned != removed.get(name, ()):
            raise ComparisonError(f"{name}: Torch-Pruning ties its filters to others than fxprune does")
    return PrunePlan({}, removed=goes)


def _importance(name: Importance) -> Callable[..., Any]:
    require("torch_pruning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        from torch_pruning import importance

    found: dict[str, Callable[..., Any]] = {
        "magnitude": importance.GroupMagnitudeImportance(p=2),
        "fpgm": importance.FPGMImportance(),
        "taylor": importance.GroupTaylorImportance(),
    }
    if name not in found:
        raise PlanError(f"importance {name!r}: must be one of {', '.join(found)}")
    return found[name]


def _gradients(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """Of the mean cross entropy over all images, by parameter; zero where the loss does not depend on one.

    Raises:
        PlanError: there are no batches.
    """
    if not batches:
        raise PlanError("taylor: has no labelled images to take gradients on; pass batches of inputs and labels")
    copied = copy.deepcopy(model).eval().requires_grad_(True)
    named = dict(copied.named_parameters())
    total = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    images = sum(len(labels) for _, labels in batches)
    with torch.enable_grad():
        for inputs, labels in batches:
            loss = F.cross_entropy(copied(inputs), labels, reduction="sum") / images
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            for name, gradient in zip(named, found, strict=True):
                if gradient is not None:
                    total[name] += gradient
    return total


def _prune(
    model: nn.Module,
    inputs: Tensor,
    score: Callable[..., Any],
    gradients: Mapping[str, Tensor],
    round_to: int,
    low: float,
    high: float,
    behind: Sequence[int],
) -> Narrowed:
    """Remove a share of channels from a copy: `high` of the layers of the numbers `behind`, `low` of the others."""
    pruned = copy.deepcopy(model)
    layers = list(_layers(pruned))
    for name, gradient in gradients.items():
        pruned.get_parameter(name).grad = gradient.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operators it does not know
        import torch_pruning

        pruner = torch_pruning.pruner.MagnitudePruner(
            pruned,
            inputs[:1],
            importance=score,
            pruning_ratio=low,
            pruning_ratio_dict={layers[number]: high for number in behind},
            ignored_layers=[last_layer(pruned, inputs)],
            round_to=round_to,
        )
        kept = {name: np.arange(conv.out_channels) for name, conv in convolutions(pruned).items()}
        names = {pruned.get_submodule(name): name for name in kept}
        for group in pruner.step(interactive=True):
            for dependency, positions in group:  # among the channels that are still there
                narrower = names.get(dependency.target.module)
                if narrower is not None and pruner.DG.is_out_channel_pruning_fn(dependency.handler):
                    kept[narrower] = np.delete(kept[narrower], positions)
            group.prune()
    pruned.zero_grad()
    gone = {name: np.setdiff1d(np.arange(conv.out_channels), kept[name]) for name, conv in convolutions(model).items()}
    return Narrowed(pruned, {name: tuple(places.tolist()) for name, places in gone.items() if places.size})


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear))
