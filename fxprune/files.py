"""State dicts from files, as training scripts leave them."""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fxprune.errors import StorageError

# Keys under which training scripts put the state dict beside the epoch, the loss and so on.
WRAPPERS = ("state_dict", "model_state_dict")
# What nn.DataParallel puts before every name.
PARALLEL_PREFIX = "module."


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the state dict in a file, on the CPU, with `torch.load(weights_only=True)`.

    Raises:
        StorageError: the file cannot be read, is no file of tensors, or holds no state dict.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # the unpickler runs on foreign bytes: UnpicklingError, KeyError, EOFError, ...
        raise StorageError(f"{path}: not a file of tensors that torch.load(weights_only=True) opens") from error
    state = unwrap(content)
    if state is None:
        raise StorageError(f"{path}: holds no state dict; save one with torch.save(model.state_dict(), path)")
    return state


def unwrap(content: object) -> dict[str, Tensor] | None:
    """The state dict that `content` is, or has under one of `WRAPPERS`; None if there is none."""
    if isinstance(content, Mapping):
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        return None
    return {str(key): value for key, value in content.items()}


def without_parallel_prefix(state: dict[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Remove the prefix `module.` of `nn.DataParallel`, unless a model with parameters of these `names` has it too."""
    if any(name.startswith(PARALLEL_PREFIX) for name in names):
        return state
    return {key.removeprefix(PARALLEL_PREFIX): value for key, value in state.items()}
