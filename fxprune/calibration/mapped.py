"""Tensors that live in temporary files, mapped into memory: the system drops their pages when it needs the room."""

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from fxprune.errors import CalibrationError


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor lives in a file."""
    return tensor.untyped_storage().filename is not None


def mapped(tensor: Tensor, folder: str | None = None) -> Tensor:
    """A copy in a file, which is gone with the tensor.

    Args:
        tensor: on any device; the copy is on the CPU, in the same order in memory, for operators may round otherwise in
            another one.
        folder: where the file is; by default where temporary files are (`TMPDIR`).

    Raises:
        CalibrationError: the disk cannot hold it.
    """
    with tempfile.NamedTemporaryFile(prefix="fxprune-", dir=folder, delete=False) as file:
        path = Path(file.name)
        try:
            _reserve(file.fileno(), path.parent, tensor.numel() * tensor.element_size())
        except CalibrationError:
            path.unlink()
            raise
    kept = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
    path.unlink()  # the mapping keeps the contents until the tensor goes
    return kept.as_strided(tensor.shape, torch.empty_like(tensor, device="meta").stride()).copy_(tensor)


def _reserve(file: int, folder: Path, size: int) -> None:
    """See that the disk can hold the file: writing to the mapping of one that it cannot hold kills the process."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        raise CalibrationError(
            f"{folder} cannot hold {size} more bytes of calibration data and intermediate values: {error.strerror}; "
            "calibrate with fewer images, or set TMPDIR to a folder on a larger disk"
        ) from error
