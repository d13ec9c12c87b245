"""Copies of module trees: their tensors shared, converted, or made their own."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from fxprune.errors import TraceError
from fxprune.graph.containers import tensors_in


def share_tensors(model: nn.Module, convert: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """Copy the module tree of `model` but not its parameters and buffers, which are shared, or replaced by
    `convert(tensor)`. Tensors that modules keep as plain attributes (a grid of positions, say) are copied, or converted
    too.
    """
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = tensor if convert is None else convert(tensor)
    for tensor in _kept_beside(model):
        if id(tensor) not in memo:
            leaf = tensor if tensor.is_leaf else tensor.detach()
            memo[id(tensor)] = leaf.clone() if convert is None else convert(leaf)
    for module in model.modules():
        # A module is a dozen registers of hooks, nearly all empty: `deepcopy` would spend most of its time on these.
        memo |= {id(value): type(value)() for value in vars(module).values() if type(value) in _REGISTERS and not value}
    try:
        return copy.deepcopy(model, memo)
    except Exception as cause:
        raise TraceError(
            f"{type(model).__name__} cannot be copied with copy.deepcopy ({cause}); "
            "remove what blocks the copy (a legacy weight_norm hook, "
            "an open file, a lock) and try again"
        ) from cause


def _kept_beside(model: nn.Module) -> list[Tensor]:
    """Tensors in plain attributes of modules."""
    kept = [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if name not in _NOT_KEPT
        and value is not None
        and type(value) not in _SIMPLE
        and not (type(value) in _EMPTY and not value)
    ]
    return tensors_in(kept)


RECORD_ATTRIBUTE = "fxprune_record"
"""Attribute under which a user's own module keeps the record of its compilation."""

# After the first three no state: two of a GraphModule, large, and the record.
_NOT_KEPT = ("_parameters", "_buffers", "_modules", "_graph", "meta", RECORD_ATTRIBUTE)
_SIMPLE = (bool, int, float, str)
_EMPTY = (dict, OrderedDict, list, tuple, set)
_REGISTERS = (dict, OrderedDict)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by path, also those that a state dict leaves out or that a tie gives two paths."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def standing_for(old: Tensor, data: Tensor) -> Tensor:
    """What to store in place of `old`: `data`, as a parameter if `old` is one."""
    return nn.Parameter(data, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else data


def copied(model: nn.Module) -> nn.Module:
    """A copy of a model that shares nothing with it: what `copy.deepcopy` would give, if it did not refuse tensors that
    were computed and kept as attributes (old hooks of `weight_norm`, `torch.nn.utils.prune`).
    """
    return share_tensors(model, lambda tensor: copy.deepcopy(tensor) if tensor.is_leaf else tensor.detach().clone())


def own_tensors(gm: fx.GraphModule, masked: nn.Module) -> None:
    """Give `gm` its own copy of every tensor that it still shares with the masked model, one copy for each, so that
    ties stay.
    """
    shared = {id(t) for t in (*masked.parameters(), *masked.buffers())}
    copies: dict[int, Tensor] = {}
    for module in gm.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None or id(tensor) not in shared:
                    continue
                if id(tensor) not in copies:
                    copies[id(tensor)] = standing_for(tensor, tensor.detach().clone())
                store[name] = copies[id(tensor)]  # type: ignore[assignment]  # a parameter replaces a parameter
