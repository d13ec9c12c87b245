"""Whether calibration data look like what a network was trained on, as far as its first BatchNorm remembers that.

Images that were scaled or normalized otherwise fit any network by their shape, and the refit would follow them without
a word: what it is told is that the dense network is right about them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxprune.calibration.batches import Batch, rows_of, samples_in
from fxprune.calibration.misfits import Call
from fxprune.errors import UnlikeTrainingWarning, warn_user
from fxprune.graph.copying import copied

UNLIKE = 0.5
"""Kullback-Leibler divergence, in nats, of what a channel gives from what it gave in training, both taken for normal
distributions; the median of the channels counts. Measured with MobileNetV2, EfficientNet-lite0 (photos) and ResNet-20
(CIFAR-10): 0.05 to 0.08 for 16 images prepared rightly, up to 0.33 for one alone, 0.06 to 0.09 with red and blue
exchanged; 0.73 to 1.4 for images in 0..1 that should be normalized, 0.6 for -1..1 in place of it, 1.2 to 5.9 for images
normalized twice, 0.6 to 3.5 for black ones, thousands for 0..255. Noise with the right mean and variance passes."""
LIKE = UNLIKE / 2
"""A preparation that leaves less than that is named."""
SAMPLES = 16
"""That are looked at."""
VALUES = 32
"""Of each channel, below which nothing is said: its variance is not known."""


@dataclass(frozen=True)
class Likeness:
    """What the first BatchNorm reads, compared with what it read in training; medians of its channels.

    Attributes:
        name: of the BatchNorm.
        divergence: see `UNLIKE`.
        variance: as a share of that in training.
        shift: of the mean, in standard deviations of the training.
    """

    name: str
    divergence: float
    variance: float
    shift: float


def warn_if_unlike(model: nn.Module, batches: Sequence[Batch], call: Call) -> None:
    """Warn of calibration data that do not look like what a network was trained on. Nothing is said of a network whose
    BatchNorm, if there is one, never saw any data.

    Args:
        model: of the user; a copy is called.
        batches: the calibration data, which fit it.
        call: see `Call`.

    Warns:
        UnlikeTrainingWarning: they do not, with what was found, and a preparation of images that would.
    """
    if not any(_remembers(module) for module in model.modules()):
        return
    copy, batch = copied(model).eval(), batches[0]
    if (size := samples_in(batch)) is not None:
        batch = rows_of(batch, range(min(size, SAMPLES)))
    found = likeness(copy, batch, call)
    if found is None or found.divergence < UNLIKE:
        return
    trials = {text: likeness(copy, changed, call) for text, changed in _preparations(batch)}
    divergences = {text: trial.divergence for text, trial in trials.items() if trial is not None}
    best = min(divergences, key=divergences.__getitem__, default="")
    way_out = f"{best} would" if best and divergences[best] < LIKE else "prepare them as for evaluation"
    warn_user(
        f"the calibration data do not look like what the network was trained on; {way_out}. What reaches {found.name}, "
        f"its first BatchNorm, has {_number(found.variance)} times the variance that it had in training, and means "
        f"{_number(found.shift)} standard deviations away (medians of its channels). Agreement with the dense network "
        "cannot tell: on such data that is wrong, too",
        UnlikeTrainingWarning,
    )


def likeness(model: nn.Module, batch: Batch, call: Call) -> Likeness | None:
    """How like the training data a batch is; None where no BatchNorm tells.

    Args:
        model: in evaluation; hooks are put into it.
        batch: some samples.
        call: see `Call`.
    """
    found: list[Likeness] = []

    def compare(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if not found and (seen := _compared(name, norm, inputs[0])) is not None:
                found.append(seen)
            raise _Reached

        return hook

    hooks = [m.register_forward_pre_hook(compare(name)) for name, m in model.named_modules() if _remembers(m)]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            call(model, batch)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


class _Reached(Exception):
    """The first BatchNorm has its input: what follows need not be computed."""


def _remembers(module: nn.Module) -> bool:
    """Whether it is a BatchNorm, frozen or not, that has seen data."""
    mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor) or isinstance(module, _BY_INSTANCE):
        return False
    return bool((mean != 0).any() or (variance != 1).any())


_BY_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
"""Their variances are those of single samples."""


def _compared(name: str, norm: nn.Module, x: Tensor) -> Likeness | None:
    mean, trained = norm.get_buffer("running_mean").float(), norm.get_buffer("running_var").float()
    if x.dim() < 2 or x.shape[1] != len(mean) or x.numel() < VALUES * len(mean):
        return None
    values, eps = x.float().transpose(0, 1).flatten(1), float(getattr(norm, "eps", 0.0))
    variance = (values.var(1, correction=0) + eps) / (trained + eps)
    shift = (values.mean(1) - mean).abs() / (trained + eps).sqrt()
    divergence = (variance + shift.square() - 1 - variance.log()) / 2
    return Likeness(name, *(float(each.median()) for each in (divergence, variance, shift)))


def _preparations(batch: Batch) -> Iterator[tuple[str, Batch]]:
    """What images may lack, in words, and a batch of them that has it."""
    if len(batch) != 1 or not isinstance(batch[0], Tensor) or batch[0].dim() != 4 or batch[0].shape[1] not in (1, 3):
        return
    from fxprune.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD  # torchvision comes with it

    x = batch[0]
    for text, unit in (("images", x), ("images / 255", x / 255)):
        if unit is not x:
            yield text, (unit,)
        yield f"2 * {text} - 1", (2 * unit - 1,)
        if x.shape[1] == len(IMAGENET_MEAN):
            mean, std = (x.new_tensor(each).view(-1, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
            yield f"({text} - mean) / std with mean {IMAGENET_MEAN} and std {IMAGENET_STD}", ((unit - mean) / std,)
            if unit is x:
                yield f"images * std + mean, undoing mean {IMAGENET_MEAN} and std {IMAGENET_STD},", (x * std + mean,)


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
