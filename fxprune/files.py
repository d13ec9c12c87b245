"""Files: state dicts as training scripts leave them, and files that appear whole or not at all."""

import argparse
import importlib.util
import json
import os
import re
import secrets
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxprune.errors import StorageError

# Keys under which training scripts put the state dict beside the epoch, the loss and so on: averaged weights first, as
# timm's own loader takes them.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
# What wrappers put before every name: nn.DataParallel, torch.compile, Lightning.
PREFIXES = ("module.", "_orig_mod.", "model.")
# What averaged weights of torch.optim.swa_utils count beside them.
COUNTERS = ("n_averaged",)


def check_writable(path: Path, *, new_folder: bool = True) -> None:
    """See that a file can be written, before the work that is to fill it.

    Args:
        path: of the file.
        new_folder: its folder may be absent, as it will be made.

    Raises:
        StorageError: it cannot; the message says why and what to do.
    """
    if path.is_dir():
        raise StorageError(f"{path} is a folder; name a file in it, such as {path / 'pruned.pt'}")
    if path.exists() and not path.is_file():
        raise StorageError(f"{path} is a device or pipe and no file; name another")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise StorageError(f"{path} cannot be written: {parent} is a file, not a folder; choose another place")
    if parent != path.absolute().parent and not new_folder:
        raise StorageError(f"{path} cannot be written: the folder {path.parent} does not exist; make it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise StorageError(f"{path} cannot be written: no permission to write in {parent}; choose another place")


def check_folder(path: Path) -> None:
    """See that files can be written in a folder that may be absent as yet.

    Raises:
        StorageError: they cannot.
    """
    if path.exists() and not path.is_dir():
        raise StorageError(f"{path} is a file; name a folder, which is made if it does not exist")
    check_writable(path / "file")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then rename it: whatever happens, `path` is the old file or the new one.

    Raises:
        StorageError: `path` is a folder, or anything but a file that can be written.
        OSError, RuntimeError: the file cannot be written (torch reports a full disk as RuntimeError). Nothing is left
            behind; the caller knows what the file is for, and says so.
    """
    check_writable(path, new_folder=False)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON record, whole or not at all; its folder is made if absent.

    Raises:
        StorageError: it cannot be written.
    """
    check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2) + "\n"
    try:
        write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}; choose another place") from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the state dict in a file, on the CPU: of safetensors, or with `torch.load(weights_only=True)`.

    Raises:
        StorageError: the file cannot be read, is no file of tensors, or holds no state dict.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # in which training scripts put their options
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # the unpickler runs on foreign bytes: UnpicklingError, KeyError, EOFError, ...
        if found := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
            raise StorageError(
                f"{path}: holds a pickled {found[1]} and not tensors alone; opening it would run its code. Where it "
                "was made, save the weights instead: torch.save(model.state_dict(), path)"
            ) from error
        raise StorageError(f"{path}: not a file of tensors that torch.load(weights_only=True) opens") from error
    state = unwrap(content)
    if state is None:
        raise StorageError(f"{path}: holds no state dict; save one with torch.save(model.state_dict(), path)")
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if importlib.util.find_spec("safetensors") is None:
        raise StorageError(f"{path}: needs the package safetensors; pip install 'fxprune[safetensors]'")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path}: cannot be read: {error}") from error


def unwrap(content: object) -> dict[str, Tensor] | None:
    """The state dict that `content` is, or has under one of `WRAPPERS`; None if there is none."""
    if isinstance(content, Mapping):
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        return None
    return {str(key): value for key, value in content.items()}


def without_prefix(state: dict[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Remove what wrappers put before names and count beside them, unless a model with parameters of these `names` has
    it too. Prefixes of wrappers in wrappers go one after the other.
    """
    own = set(names)
    state = {name: value for name, value in state.items() if name in own or name not in COUNTERS}
    for _ in PREFIXES:
        for prefix in PREFIXES:
            if not any(name.startswith(prefix) for name in own) and all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state
