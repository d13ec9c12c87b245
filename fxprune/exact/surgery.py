"""What was done to the layers of a user's own module, as data: enough to do it again to a fresh model, without running
it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import StorageError
from fxprune.exact.operating import COUNTS, become
from fxprune.graph.copying import copied, standing_for, tensors_of
from fxprune.graph.gathered import GatheredLayer, put_gathers_into
from fxprune.graph.norms import GroupNormWithZeros, LayerNormWithZeros, NormWithZeros

Surgery = Mapping[str, Mapping[str, Any]]
"""For each changed layer, by path: `counts` of its attributes, `shapes` of its tensors, and the number of channels that
it `reads` and `gives` through gathers; or the `norm` that it became. JSON-able.
"""

_NORM_NUMBERS = ("channels", "eps", "groups", "dim", "centered")


def describe(model: nn.Module, result: nn.Module) -> dict[str, dict[str, Any]]:
    """What makes `result` of `model`; both have the same modules at the same paths."""
    found: dict[str, dict[str, Any]] = {}
    modules = dict(model.named_modules())
    for path, layer in result.named_modules():
        before = modules[path]
        if isinstance(layer, NormWithZeros) and type(layer) is not type(before):
            numbers = {name: vars(layer)[name] for name in _NORM_NUMBERS if name in vars(layer)}
            found[path] = {"norm": {**numbers, "left": layer.weight.numel(), "shifts": layer.bias is not None}}
            continue
        counts = {name: vars(layer)[name] for name in COUNTS if name in vars(layer)}
        known = dict(_tensors(before))
        change: dict[str, Any] = {
            "counts": {name: value for name, value in counts.items() if vars(before).get(name) != value},
            "shapes": {
                name: list(tensor.shape)
                for name, tensor in _tensors(layer)
                if name in known and known[name].shape != tensor.shape
            },
        }
        if isinstance(layer, GatheredLayer):
            change["counts"]["groups"] = layer.computed_groups
            for name, index in (("reads", layer.read_index), ("gives", layer.give_index)):
                change[name] = None if index is None else index.numel()
        if any(change.values()):
            found[path] = change
    return found


@torch.no_grad()
def repeat(model: nn.Module, surgery: Surgery, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` whose layers are changed in the same way, with other values in all its tensors.

    Args:
        model: of the architecture that the surgery was made on. It is not changed.
        surgery: see `Surgery`.
        state: every parameter and buffer by path, see `tensors_of`.

    Raises:
        StorageError: they do not fit the model.
    """
    result = copied(model)
    modules = dict(result.named_modules())
    renewed: dict[int, Tensor] = {}
    for path, change in surgery.items():
        if path not in modules:
            raise StorageError(f"there is no {path} in {type(model).__name__}; build it as it was when it was compiled")
        layer = modules[path]
        if "norm" in change:
            become(layer, _blank_norm(layer, **change["norm"]))
            continue
        for name, value in change["counts"].items():
            setattr(layer, name, tuple(value) if isinstance(value, list) else value)
        for name, shape in change["shapes"].items():
            store: dict[str, Any] = layer._parameters if name in layer._parameters else layer._buffers
            old = store.get(name)
            if old is None:
                raise StorageError(f"{path} of {type(model).__name__} has no {name}; build the model as it was")
            if id(old) not in renewed:
                blank = torch.zeros(shape, dtype=old.dtype, device=old.device)
                renewed[id(old)] = standing_for(old, blank)
            store[name] = renewed[id(old)]
        read, give = (_blank_order(change.get(name), layer) for name in ("reads", "gives"))
        if read is not None or give is not None:
            put_gathers_into(layer, read, give, layer.in_channels)
    own = tensors_of(result)
    wrong = sorted(own.keys() ^ state.keys()) or sorted(n for n in own if own[n].shape != state[n].shape)
    if wrong:
        raise StorageError(f"{wrong[0]} differs from that of {type(model).__name__}; build the model as it was")
    for name, tensor in own.items():
        tensor.copy_(state[name])
    return result


def _blank_norm(norm: nn.Module, left: int, shifts: bool, **numbers: Any) -> NormWithZeros:
    """What a normalisation became, without its values."""
    scale = norm.weight
    assert isinstance(scale, nn.Parameter)
    weight, bias = (nn.Parameter(scale.new_zeros(left), scale.requires_grad) for _ in range(2))
    if "groups" in numbers:
        group = torch.zeros(left, dtype=torch.int64, device=scale.device)
        return GroupNormWithZeros(group=group, weight=weight, bias=bias if shifts else None, **numbers)
    return LayerNormWithZeros(weight=weight, bias=bias if shifts else None, **numbers)


def _tensors(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for store in (layer._parameters, layer._buffers):
        yield from ((name, tensor) for name, tensor in store.items() if tensor is not None)


def _blank_order(size: int | None, layer: nn.Module) -> Tensor | None:
    return None if size is None else torch.arange(size, device=next(layer.parameters()).device)
