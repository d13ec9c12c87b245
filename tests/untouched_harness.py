"""Is a model bit for bit what it was? All that it holds, taken before and compared after."""

from typing import Any

import torch
from torch import Tensor, nn

from fxprune.graph.containers import tensors_in


def snapshot(model: nn.Module) -> list[tuple[str, Any]]:
    """All that a model holds: its tensors by identity and content, everything else by how it prints."""
    found: list[tuple[str, Any]] = []
    for path, module in model.named_modules():
        for store in ("_parameters", "_buffers"):
            for name, tensor in vars(module)[store].items():
                value = (
                    None
                    if tensor is None
                    else (id(tensor), tensor.dtype, tensor.requires_grad, tensor.detach().clone())
                )
                found.append((f"{path}.{name}", value))
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                found.append((f"{path}.{name}", (repr(value), [tensor.clone() for tensor in tensors_in(value)])))
    return found


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left.nan_to_num(), right.nan_to_num())
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)
