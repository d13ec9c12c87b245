"""Calibration data: a few batches of inputs without labels, read once."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fxprune.calibration.mapped import is_mapped, mapped
from fxprune.errors import CalibrationError
from fxprune.graph.containers import convert_tensors, tensors_in

Calibration: TypeAlias = Tensor | Iterable[Any]
Batch: TypeAlias = tuple[Any, ...]

PICTURES = ("pixel_values", "image", "images", "img", "imgs")
"""What loaders call the entry of a batch that forward reads, whatever forward calls it (Hugging Face, MONAI)."""
MEMORY = 4 * 2**30
"""Bytes of batches from loaders and generators that are kept in memory."""
BATCH_SIZE = 32
"""Images at a time where the calibration data is one tensor."""


def read_batches(calibration: Calibration, arguments: int = 1, names: Sequence[str] = ()) -> list[Batch]:
    """Read calibration data to its end.

    Networks pass over the data several times, so all of it is kept: what was in memory stays there, and what a loader
    or generator gives beyond `MEMORY` bytes goes to temporary files (`fxprune.calibration.mapped`).

    Args:
        calibration: a tensor `(N, ...)`, which is split into batches, or any iterable of batches, such as a
            `DataLoader`. A batch is a tensor, a sequence that begins with the arguments of forward, or a mapping that
            has them by name, or has pictures under one of `PICTURES` where forward takes nothing else; what else is
            there, such as labels, is ignored.
        arguments: how many arguments forward takes.
        names: theirs, in order; a mapping needs them.

    Returns:
        The arguments of each batch. Tensors are those of `calibration`, not copies, but for those in files.

    Raises:
        CalibrationError: there is no batch, a batch is empty, has too few arguments or no tensor, or holds NaN or
            infinity.
    """
    if isinstance(calibration, Tensor):
        if calibration.dim() < 2:
            raise CalibrationError(
                f"calibration is a tensor of shape {tuple(calibration.shape)}; the first dimension must count samples"
            )
        calibration = torch.split(calibration, BATCH_SIZE)
    if isinstance(calibration, (str, bytes, Mapping)) or not isinstance(calibration, Iterable):
        raise CalibrationError(
            f"calibration is a {type(calibration).__name__}; it must be a tensor or an iterable of batches, such as "
            "DataLoader(data, batch_size=32)"
        )
    # Drawing from a loader advances the global generator, even where nothing is shuffled.
    with torch.random.fork_rng(devices=[]):
        read = (_arguments(f"calibration batch {i}", batch, arguments, names) for i, batch in enumerate(calibration))
        batches = list(read if isinstance(calibration, Sequence) else _within_memory(read))
    if not batches:
        raise CalibrationError("calibration holds no batch; pass at least one (an iterator can be read only once)")
    return batches


def samples_in(batch: Batch) -> int | None:
    """How many samples a batch has, if all its tensors agree on that."""
    sizes = {tensor.shape[:1] for tensor in tensors_in(batch)}
    return sizes.pop()[0] if len(sizes) == 1 and torch.Size() not in sizes else None


def rows_of(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some samples of a batch, by number; in a file if the batch is."""

    def picked(tensor: Tensor) -> Tensor:
        some = tensor[list(rows)]
        return mapped(some) if is_mapped(tensor) else some

    return convert_tensors(batch, picked)


def _within_memory(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same, in files from `MEMORY` bytes on."""
    held = 0
    for batch in batches:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(batch))
        if held + size > MEMORY:
            batch = convert_tensors(batch, mapped)
        else:
            held += size
        yield batch


def _renamed(batch: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any]:
    """The pictures of a batch under the name that forward has for them, if that is all it takes and they are one."""
    found = [key for key in PICTURES if isinstance(batch.get(key), Tensor)]
    if len(names) != 1 or names[0] in batch or len(found) != 1:
        return batch
    return {names[0]: batch[found[0]]}


def _arguments(what: str, batch: object, arguments: int, names: Sequence[str]) -> Batch:
    if isinstance(batch, Tensor):
        batch = (batch,)
    if isinstance(batch, Mapping) and names:
        batch = _renamed(batch, names)
        if missing := [name for name in names if name not in batch]:
            raise CalibrationError(
                f"{what} has {', '.join(map(repr, batch))}, but forward takes {missing[0]!r}; rename the entry, "
                "or pass example_inputs with the names that the batches have"
            )
        batch = tuple(batch[name] for name in names)
    if not isinstance(batch, Sequence) or isinstance(batch, (str, bytes)):
        raise CalibrationError(
            f"{what} is a {type(batch).__name__}; it must be a tensor, or a tuple that begins with one, or a dict of "
            f"forward's arguments by name{_ARRAY if hasattr(batch, '__array__') else ''}"
        )
    if len(batch) < arguments:
        raise CalibrationError(f"{what} has {len(batch)} entries, but forward takes {arguments} arguments")
    tensors = [leaf for leaf in tree_leaves(tuple(batch[:arguments])) if isinstance(leaf, Tensor)]
    if arguments and not tensors:
        raise CalibrationError(f"{what} holds no tensor; it must be a tensor, or a tuple that begins with one")
    for tensor in tensors:
        if not tensor.numel():
            raise CalibrationError(f"{what} is empty: its shape is {tuple(tensor.shape)}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CalibrationError(f"{what} holds NaN or infinity; drop or repair these samples")
    return tuple(batch[:arguments])


_ARRAY = "; torch.from_numpy makes a tensor of an array"
