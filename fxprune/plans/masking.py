"""The entries of a model's parameters that a plan keeps, and how the others are made zero."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from fxprune.errors import PlanError
from fxprune.graph.convolutions import Convolution, conv_at, filter_dim, kernels_of, oriented
from fxprune.graph.copying import copied, tensors_of
from fxprune.plans import PrunePlan, RemovedChannels


def kept_entries(model: nn.Module, plan: PrunePlan) -> dict[str, Tensor]:
    """Which entries of which parameters stay when `plan` is applied to the dense `model`.

    Args:
        model: the model as planned, on any device. It is only read.
        plan: what to drop.

    Returns:
        name of each parameter (or buffer) that loses something to a bool tensor of its shape, on its device; True: the
        entry stays.

    Raises:
        PlanError: the plan was made for another model.
    """
    plan.check(model)
    kept = entries_without_removed(model, plan) | entries_without_branches(model, plan)
    for name in plan.layers:
        conv = conv_at(model, name)
        weight = kernels_of(conv)
        mask = kernels_that_stay(plan, name, *weight.shape[:2])
        mask[:, list(plan.removed.get(name, _NOTHING).inputs)] = True  # zero times anything: they go with their writer
        stays = oriented(mask.to(weight.device).view(*mask.shape, *[1] * (weight.dim() - 2)).expand(weight.shape), conv)
        kept[f"{name}.weight"] = stays & kept[f"{name}.weight"] if f"{name}.weight" in kept else stays.contiguous()
    return kept


def kernels_that_stay(plan: PrunePlan, name: str, filters: int, channels: int) -> Tensor:
    """Which kernels of a layer are left of it, `(filters, channels)` bool."""
    removed = plan.removed.get(name, _NOTHING)
    stays = torch.zeros(filters, channels, dtype=torch.bool)
    rows, columns = remaining(filters, removed.outputs), remaining(channels, removed.inputs)
    stays[rows[:, None], columns] = plan.layers[name].mask() if name in plan.layers else True
    return stays


def entries_without_removed(model: nn.Module, plan: PrunePlan) -> dict[str, Tensor]:
    """The same for the channels alone that `plan` removes as a whole: what makes these channels zero stays not.

    Filters and their biases, entries of depthwise convolutions, scales and shifts of normalisations, entries of buffers
    that the model reads itself (the parameters of a frozen normalisation). The weights that would read the channels
    are left: they are multiplied by zero.
    """
    kept = {}
    parameters = tensors_of(model)
    for name, channels in plan.removed.items():
        outputs = list(channels.outputs)
        if name in parameters:
            stays = torch.ones_like(parameters[name], dtype=torch.bool)
            stays.view(-1)[outputs] = False
            kept[name] = stays
            continue
        module = model.get_submodule(name)
        dim = filter_dim(module) if isinstance(module, Convolution) else 0
        for attribute in ("weight", "bias"):
            parameter = getattr(module, attribute, None)
            if isinstance(parameter, Tensor) and outputs:
                stays = torch.ones_like(parameter, dtype=torch.bool)
                stays.transpose(0, dim if attribute == "weight" else 0)[outputs] = False
                kept[f"{name}.{attribute}"] = stays
    return kept


def entries_without_branches(model: nn.Module, plan: PrunePlan) -> dict[str, Tensor]:
    """The same for the branches alone that `plan` removes: the weight of the layer that ends one."""
    tensors = tensors_of(model)
    weights = (f"{name}.weight" for name in plan.branches)
    return {name: torch.zeros_like(tensors[name], dtype=torch.bool) for name in weights}


def remaining(size: int, removed: Collection[int]) -> Tensor:
    """The positions of `0..size - 1` that are not `removed`, ascending."""
    stays = torch.ones(size, dtype=torch.bool)
    stays[list(removed)] = False
    return stays.nonzero().flatten()


@torch.no_grad()
def zero_pruned(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Make the entries that do not stay exactly zero, in place, also those that are NaN or infinite.

    Args:
        model: the model.
        kept: what `kept_entries` gave for it.

    Raises:
        PlanError: the model has no parameter of a name in `kept`, or one of another shape.
    """
    parameters = tensors_of(model)
    for name, stays in kept.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != stays.shape:
            found = "has no such parameter" if parameter is None else f"has {tuple(parameter.shape)}"
            raise PlanError(
                f"{name}: the mask is for a parameter {tuple(stays.shape)}, the model {found}; parameters that are "
                "computed (parametrized) or sharded cannot be masked in place"
            )
        parameter.masked_fill_(~stays.to(parameter.device), 0)  # a product would keep NaN


def masked_copy(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """A copy of the model in which all that `plan` drops is zero.

    Raises:
        PlanError: the plan was made for another model.
    """
    masked = copied(model)
    zero_pruned(masked, kept_entries(model, plan))
    return masked


_NOTHING = RemovedChannels()
