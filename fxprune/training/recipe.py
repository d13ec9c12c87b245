"""How a network is trained: optimizer, learning rate, loss. Nothing here knows of data, epochs or files."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fxprune.errors import FxpruneError

if TYPE_CHECKING:  # the command line asks for the defaults, and should not wait for torch
    import torch
    from torch import Tensor, nn


class RecipeError(FxpruneError):
    """A setting of the training is not legal."""


def _constant(step: int, steps: int) -> float:
    return 1.0


def _step(step: int, steps: int) -> float:
    """A tenth after each third: epochs 100 and 200 of 300, as TMI-GKP (Zhong et al., 2022) fine-tunes on CIFAR-10."""
    return 0.1 ** (3 * step // steps)


def _cosine(step: int, steps: int) -> float:
    """Half a cosine from 1 to 0 (Loshchilov and Hutter, SGDR, 2017, equation 5, without restarts)."""
    return _between(1.0, 0.0, step / steps)


def _one_cycle(step: int, steps: int) -> float:
    """Up from 1/25 over the first 30 % of the steps, down to 1/250,000 in the last (Smith and Topin, Super-Convergence,
    2018, with the constants of torch's OneCycleLR; momentum is left alone).
    """
    peak, last = 0.3 * steps - 1, steps - 1
    if step <= peak:
        return _between(1 / 25, 1.0, step / peak) if peak > 0 else 1.0
    return _between(1.0, 1 / 25e4, (step - peak) / (last - peak)) if last > peak else 1.0


def _between(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "constant": _constant,
    "step": _step,
    "cosine": _cosine,
    "onecycle": _one_cycle,
}
"""Name to the factor of the learning rate, in (0, 1], at step `0..steps - 1` of `steps`."""


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are the fine-tuning of TMI-GKP on CIFAR-10, but for the number of epochs, there 300.

    Args:
        epochs: passes over the training images.
        lr: the largest learning rate.
        batch: images of one step, over all processes.
        momentum, weight_decay, nesterov: of SGD; all parameters decay, as in the papers.
        schedule: a name in `SCHEDULES`; it spans the steps after the warmup.
        warmup: epochs in which the rate rises linearly from nearly 0.
        label_smoothing: in [0, 1), see `torch.nn.functional.cross_entropy`.
        distill_weight: share of the loss, in [0, 1], that compares with a teacher instead of the labels.
        distill_temperature: what both logits are divided by in that share.

    Raises:
        RecipeError: a value is out of its range.
    """

    epochs: int
    lr: float = 0.01
    batch: int = 64
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    schedule: str = "step"
    warmup: int = 0
    label_smoothing: float = 0.0
    distill_weight: float = 0.0
    distill_temperature: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        rules: tuple[tuple[str, bool, str], ...] = (
            ("epochs", self.epochs >= 0, "at least 0"),
            ("lr", 0 < self.lr < math.inf, "positive"),
            ("batch", self.batch >= 1, "at least 1"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0"),
            ("nesterov", not self.nesterov or self.momentum > 0, "False where momentum is 0"),
            ("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            ("warmup", 0 <= self.warmup <= self.epochs, "at least 0 and at most the number of epochs"),
            ("warmup", not self.warmup or self.schedule != "onecycle", "0 for onecycle, which begins with its own"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("distill_weight", 0 <= self.distill_weight <= 1, "in [0, 1]"),
            ("distill_temperature", 0 < self.distill_temperature < math.inf, "positive"),
        )
        for name, legal, rule in rules:
            if not legal:
                raise RecipeError(f"{name} is {getattr(self, name)!r}; it must be {rule}")

    def optimizer(self, model: nn.Module) -> torch.optim.SGD:
        """SGD over all parameters of `model` that require a gradient."""
        import torch

        return torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad],
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The rate of step `0, 1, ...` of the whole training: a function of nothing else, so it needs no saving."""
        warmup, steps = self.warmup * steps_per_epoch, self.epochs * steps_per_epoch
        if step < warmup:
            return self.lr * (step + 1) / warmup
        return self.lr * SCHEDULES[self.schedule](step - warmup, steps - warmup)

    def loss(self, logits: Tensor, labels: Tensor, taught: Tensor | None = None) -> Tensor:
        """The loss summed over the images, float32.

        With a teacher it is `(1 - w) * cross entropy + w * T^2 * KL(teacher / T || student / T)`: Hinton, Vinyals and
        Dean, Distilling the Knowledge in a Neural Network (2015), section 2. `T^2` keeps the two gradients in
        proportion as T changes.

        Args:
            logits: `(N, classes)`, of the network that learns.
            labels: `(N,)` int64.
            taught: `(N, classes)`, logits of the teacher.
        """
        import torch.nn.functional as F

        hard = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=self.label_smoothing)
        if taught is None or not self.distill_weight:
            return hard
        temperature = self.distill_temperature
        ours, theirs = (F.log_softmax(scores.float() / temperature, dim=1) for scores in (logits, taught))
        soft = F.kl_div(ours, theirs, reduction="sum", log_target=True) * temperature**2
        return (1 - self.distill_weight) * hard + self.distill_weight * soft
