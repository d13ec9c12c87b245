"""Data that the command line reads: pictures, tensors, arrays, or what a function of the user's gives."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxprune.cli import values
from fxprune.cli.options import size_of
from fxprune.cli.output import shows_progress
from fxprune.errors import CalibrationError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fxprune.calibration.pictures import Gallery

PICTURES = 512
"""To calibrate with, and to look at the result with, at most: more do not help, and take their time."""
FEW = 32
"""With fewer pictures none are held back."""
HELD_BACK = 1 / 4
"""Of the pictures, to look at the result with."""
DATA_HELP = (
    "a folder of pictures (any depth; JPEG, PNG, WebP); or inputs (N, ...) as the model reads them, normalized, in a "
    ".pt, .npy or .npz file, or from module:callable"
)


@dataclass(frozen=True)
class Inputs:
    """What a network is calibrated with, and what it is looked at with.

    Attributes:
        calibration: `(N, ...)` float32.
        held_out: the same, not to be calibrated with; None if there is nothing.
        labels: int64, of `held_out`; None if they are not known.
        source: where the labels come from.
        told: what was read and how, in words.
    """

    calibration: Tensor
    held_out: Tensor | None = None
    labels: Tensor | None = None
    source: str = ""
    told: str = ""


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add how pictures are read."""
    add = parser.add_argument_group("pictures (default: as the weights want them)").add_argument
    add("--mean", type=values.numbers, metavar="R,G,B", help="of pixels in [0, 1], to subtract")
    add("--std", type=values.numbers, metavar="R,G,B", help="to divide by")
    add("--labels", metavar="names|FILE", help="classes of the pictures: the numbers that their names begin with, or a "
        "file of lines name,class or JSON (default: the folders that they are in, if these are classes)")  # fmt: skip
    add("--pictures", type=values.count, default=PICTURES, metavar="N", help="at most so many (default: %(default)s)")


def add_calibration(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Add what to calibrate with, and how pictures are read."""
    parser.add_argument_group("calibration").add_argument(
        "--calibration",
        type=Path,
        metavar="DATA",
        help=f"a few hundred typical inputs without labels, on which the kept weights are refitted: {DATA_HELP}{more}",
    )
    add_data_options(parser)


def inputs_for(model: nn.Module, options: argparse.Namespace) -> Inputs | None:
    """What `--calibration` names; None if it is not given. Of a folder of pictures a part is held back.

    Raises:
        CalibrationError: it cannot be read, or holds something else.
    """
    path: Path | None = options.calibration
    if path is None:
        return None
    if not path.is_dir():
        return Inputs(_tensor(path), told=f"calibration: {path}")
    from fxprune.calibration.pictures import find_pictures

    gallery = find_pictures(path)
    count = len(gallery)
    held = min(int(count * HELD_BACK), options.pictures) if count >= FEW else 0
    rest, looked_at = gallery.drawn(count - held, options.seed)
    drawn, _ = rest.drawn(min(len(rest), options.pictures), options.seed)
    calibration, _, _, how = read_pictures(drawn, model, options, labelled=False)
    told = f"calibration: {len(drawn)} of {count} pictures in {path}, {how}"
    if not held:
        return Inputs(calibration, told=f"{told}; with fewer than {FEW} the refit judges by some of these")
    held_out, labels, source, _ = read_pictures(looked_at, model, options)
    return Inputs(calibration, held_out, labels, source, told)


def read_pictures(
    gallery: Gallery, model: nn.Module, options: argparse.Namespace, labelled: bool = True
) -> tuple[Tensor, Tensor | None, str, str]:
    """Pictures as a model wants them, `(N, C, H, W)`, their labels `(N,)` if there are some, where these come from, and
    how the pictures were read.
    """
    import torch

    from fxprune.calibration.pictures import with_labels
    from fxprune.models import categories_of, preprocessing_of
    from fxprune.training.data.pictures import NORMALIZATIONS

    shape = size_of(model, options)
    preprocessing = preprocessing_of(options.model, model, options.weights, shape)
    known = NORMALIZATIONS.get(options.model)
    mean, std = options.mean, options.std
    if known is not None and mean is None and std is None:
        mean, std = known.mean, known.std
    size = None if options.size is None else (shape[-2], shape[-1])
    preprocessing = preprocessing.changed(size=size, mean=mean, std=std)
    pixels = gallery.read(preprocessing, progress=shows_progress(options))
    if not labelled:
        return pixels, None, "", str(preprocessing)
    with torch.no_grad():
        scores: Any = model(pixels[:1])
    classes = scores.shape[1] if isinstance(scores, torch.Tensor) and scores.dim() == 2 else 0
    gallery = with_labels(gallery, options.labels, classes, categories_of(options.model)) if classes else gallery
    labels = None if gallery.labels is None else torch.tensor(gallery.labels)
    return pixels, labels, gallery.source, str(preprocessing)


def _tensor(path: Path) -> Tensor:
    """Inputs in a file, or what a function gives, `(N, ...)` float32."""
    import numpy as np
    import torch

    if ":" in str(path) and not path.exists():
        from fxprune.models.by_name import call_by_name

        return _checked(path, _collected(path, call_by_name(str(path))))
    opener = {".npy": "numpy.load", ".npz": "numpy.load"}.get(path.suffix, "torch.load(weights_only=True)")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                content: Any = torch.from_numpy(arrays[_only_inputs(path, list(arrays.files))])
        elif path.suffix == ".npy":
            content = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except CalibrationError:
        raise
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # foreign bytes: UnpicklingError, ValueError, EOFError, ...
        raise CalibrationError(f"{path}: is no file that {opener} opens; save one tensor or array (N, ...)") from error
    return _checked(path, content)


def _only_inputs(path: Path, names: list[str]) -> str:
    """Which array of a file has the inputs."""
    found = [name for name in ("images", "x", "inputs", "calibration", "pixel_values") if name in names] or names
    if len(found) != 1 and found[0] not in ("images", "x", "inputs", "calibration", "pixel_values"):
        raise CalibrationError(f"{path}: holds {', '.join(names)}; call the array of the inputs 'images'")
    return found[0]


def _collected(path: Path, given: Any) -> Any:
    """One tensor of what a function gave: a tensor, or batches, of which labels are left out."""
    import torch

    from fxprune.calibration.batches import read_batches

    if isinstance(given, torch.Tensor) or isinstance(given, str | Mapping):
        return given
    batches = [batch[0] for batch in read_batches(given, 1, ("pixel_values",))]
    if len({batch.shape[1:] for batch in batches}) != 1:
        raise CalibrationError(f"{path}: gives batches of different sizes; here they must be of one, so resize them")
    return torch.cat(batches)


def _checked(path: Path, content: Any) -> Tensor:
    import torch

    if not isinstance(content, torch.Tensor):
        raise CalibrationError(f"{path}: holds a {type(content).__name__}; save one tensor or array (N, ...)")
    if not content.is_floating_point():
        raise CalibrationError(
            f"{path}: holds {str(content.dtype).removeprefix('torch.')}; save the inputs as the model reads them, "
            "floating-point and normalized"
        )
    if content.dim() < 2 or not content.numel():
        raise CalibrationError(f"{path}: has shape {tuple(content.shape)}; it must hold at least one input, (N, ...)")
    return content.detach().float()
