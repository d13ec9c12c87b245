"""Changes of calibration images that do not change what is on them, so that a few hundred go further."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.calibration.batches import Batch
from fxprune.errors import CalibrationError, PlanError, near_matches
from fxprune.graph.containers import tensors_in

Augment: TypeAlias = str | Callable[[Any], Any]

SHIFT = 8
"""Images are shifted by up to this part of their sides: 4 of 32 pixels, as in He et al., Deep Residual Learning for
Image Recognition (2016), section 4.2."""


def flip(images: Tensor) -> Tensor:
    """Mirror each of the images `(N, C, H, W)`, left to right, with probability 1/2."""
    mirrored = torch.rand(len(images)) < 0.5
    return torch.where(mirrored.to(images.device)[:, None, None, None], images.flip(3), images)


def crop(images: Tensor) -> Tensor:
    """Shift each of the images `(N, C, H, W)` by up to an eighth of its sides; zeros move in, for normalized images the
    mean colour.
    """
    count, _, height, width = images.shape
    down, right = height // SHIFT, width // SHIFT
    padded = F.pad(images, (right, right, down, down))
    tops, lefts = torch.randint(2 * down + 1, (count,)).tolist(), torch.randint(2 * right + 1, (count,)).tolist()
    cut = [
        image[:, top : top + height, left : left + width] for image, top, left in zip(padded, tops, lefts, strict=True)
    ]
    return torch.stack(cut)


AUGMENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": flip,
    "crop": crop,
    "flip+crop": lambda images: crop(flip(images)),
}


def check_augment(augment: object) -> None:
    """See that it is None, a name in `AUGMENTATIONS` or a function.

    Raises:
        PlanError: it is not.
    """
    if augment is None or callable(augment) or (isinstance(augment, str) and augment in AUGMENTATIONS):
        return
    close = near_matches(augment, AUGMENTATIONS) if isinstance(augment, str) else ""
    names = ", ".join(map(repr, AUGMENTATIONS))
    raise PlanError(f"augment is {augment!r}{close}; it must be one of {names}, or a function of a batch")


def augmented(batch: Batch, augment: Augment | None, seed: int) -> Batch:
    """A changed copy of the arguments of forward. A function gets what forward gets: the tensor if that is all, else
    the tuple of arguments. Whatever torch draws in it depends on `seed` alone.

    Raises:
        CalibrationError: the function fails, changes shapes or types, or gives NaN; or a named one is to change
            something else than images.
    """
    if augment is None:
        return batch
    one = len(batch) == 1
    given: Any = batch[0] if one else batch
    if isinstance(augment, str) and not (one and isinstance(given, Tensor) and given.dim() == 4):
        raise CalibrationError(
            f"augment={augment!r} is for networks that read one tensor of images (N, C, H, W); pass a function that "
            "changes a tuple of arguments, or leave augment out"
        )
    change: Callable[[Any], Any] = AUGMENTATIONS[augment] if isinstance(augment, str) else augment
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        try:
            changed = change(given)
        except Exception as error:  # the user's function
            raise CalibrationError(f"augment fails on a batch: {error}; repair it, or leave it out") from error
    result: Batch = (changed,) if one else changed
    before, after = _kinds(batch), _kinds(result)
    if before != after:
        raise CalibrationError(
            f"augment gives {_told(after)} for a batch of {_told(before)}; it must keep shapes and types"
        )
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors_in(result)):
        raise CalibrationError("augment gives NaN or infinity; repair it, or leave it out")
    return result


def _kinds(batch: object) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(tensor.shape), tensor.dtype) for tensor in tensors_in(batch)]


def _told(kinds: list[tuple[tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(f"{str(dtype).removeprefix('torch.')} {shape}" for shape, dtype in kinds) or "no tensor"
