"""The entries of a model's parameters that a plan keeps, and how the others are made zero."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fxprune.errors import PlanError
from fxprune.plans import PrunePlan


def kept_entries(model: nn.Module, plan: PrunePlan) -> dict[str, Tensor]:
    """Which entries of which parameters stay when `plan` is applied to the dense `model`.

    Args:
        model: the model as planned, on any device. It is only read.
        plan: what to drop.

    Returns:
        name of each parameter that loses something to a bool tensor of its shape, on its device; True: the entry stays.

    Raises:
        PlanError: the plan was made for another model.
    """
    plan.check(model)
    kept = {}
    for name, kernels in plan.layers.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        stays = kernels.mask().to(weight.device)
        kept[f"{name}.weight"] = stays[:, :, None, None].expand(weight.shape).contiguous()
    return kept


@torch.no_grad()
def zero_pruned(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Make the entries that do not stay exactly zero, in place, also those that are NaN or infinite.

    Args:
        model: the model.
        kept: what `kept_entries` gave for it.

    Raises:
        PlanError: the model has no parameter of a name in `kept`, or one of another shape.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, stays in kept.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != stays.shape:
            found = "has no such parameter" if parameter is None else f"has {tuple(parameter.shape)}"
            raise PlanError(
                f"{name}: the mask is for a parameter {tuple(stays.shape)}, the model {found}; parameters that are "
                "computed (parametrized) or sharded cannot be masked in place"
            )
        parameter.masked_fill_(~stays.to(parameter.device), 0)  # a product would keep NaN
