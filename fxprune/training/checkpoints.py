"""Files of a training run that appear whole or not at all, and are known to be whole when they are read."""

import hashlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxprune.errors import FxpruneError
from fxprune.files import write_whole

FORMAT = "fxprune-training"
VERSION = 1


class CheckpointError(FxpruneError):
    """A file of a training run cannot be written, cannot be read, or belongs to another run."""


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a file of the run, whole or not at all, see `fxprune.files.write_whole`.

    Raises:
        CheckpointError: the file cannot be written; the old one is untouched.
    """
    try:
        write_whole(path, write)
    except (OSError, RuntimeError) as error:
        kept = "; the file of before is untouched" if path.exists() else ""
        raise CheckpointError(
            f"{path}: cannot be written: {error}{kept}; make room or choose another --output, then go on with --resume"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        CheckpointError: see `write_file`.
    """
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write nested dicts, lists, tensors, numbers and strings, with a digest of them all.

    Raises:
        CheckpointError: see `write_file`.
    """
    whole = {"format": FORMAT, "version": VERSION, "digest": _digest(content), "content": dict(content)}
    write_file(path, lambda partial: torch.save(whole, partial))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, on the CPU, with `torch.load(weights_only=True)`.

    Raises:
        CheckpointError: the file is truncated, altered, foreign or of another version.
    """
    try:
        file = io.BytesIO(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        whole = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler runs on foreign bytes: UnpicklingError, RuntimeError, EOFError, ...
        raise CheckpointError(f"{path}: truncated, or no checkpoint of a training; {_START_AGAIN}") from error
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise CheckpointError(f"{path}: no checkpoint of a training; {_START_AGAIN}")
    if whole.get("version") != VERSION:
        raise CheckpointError(f"{path}: has version {whole.get('version')!r}, this one reads {VERSION}; {_START_AGAIN}")
    content = whole.get("content")
    if not isinstance(content, dict) or whole.get("digest") != _digest(content):
        raise CheckpointError(f"{path}: altered, its checksum does not match; {_START_AGAIN}")
    return content


_START_AGAIN = "start again with another --output, or remove the file and start without --resume"


def check_settings(path: Path, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """See that a checkpoint belongs to the run that was asked for.

    Raises:
        CheckpointError: it does not; the message names the settings that differ.
    """
    differing = [
        f"{name} {saved.get(name)!r} there, {given.get(name)!r} here"
        for name in {**saved, **given}
        if saved.get(name) != given.get(name)
    ]
    if differing:
        raise CheckpointError(
            f"{path}: of a run with other settings: {'; '.join(differing)}; resume with its settings, "
            "or choose another --output"
        )


def fingerprint(path: Path) -> str:
    """Name and content of a file, for settings: `resnet20.th sha256:0123456789abcdef`.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return f"{path.name} sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _digest(content: object) -> str:
    digest = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                digest.update(f"{key!r}:".encode())
                add(item)
        elif isinstance(value, list | tuple):
            digest.update(f"[{len(value)}]".encode())
            for item in value:
                add(item)
        elif isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())

    add(content)
    return digest.hexdigest()
