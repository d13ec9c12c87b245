"""How long a comparison will take: measured on a few steps of its training, and told before it begins."""

from __future__ import annotations

import copy
import math
import time
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from fxprune.training.data.sources import Data
    from fxprune.training.recipe import Recipe

STEPS = 3
"""That are measured, after one that warms up; the shortest counts."""


def training_seconds(
    model: nn.Module, data: Data, recipe: Recipe, images: int | None = None, device: str = "cpu"
) -> float:
    """What training a network will take, in seconds, as its steps take now in float32; evaluation is not counted.

    Args:
        model: the network; it is not changed.
        data: the images.
        recipe: how it is trained.
        images: how many of them an epoch has; None for all.
        device: on which it is trained.
    """
    count = data.train_count if images is None else images
    steps = recipe.epochs * math.ceil(count / recipe.batch)
    if not steps:
        return 0.0
    trained = copy.deepcopy(model).to(device).train()
    teacher = copy.deepcopy(model).to(device).eval() if recipe.distill_weight else None
    optimizer = recipe.optimizer(trained)
    positions = torch.arange(min(recipe.batch, data.train_count))
    best = math.inf
    with torch.random.fork_rng():
        for step in range(min(steps, STEPS + 1)):
            began = time.perf_counter()
            inputs, labels = data.training_batch(positions, 0)
            inputs, labels = inputs.to(device), labels.to(device)
            with torch.no_grad():
                taught = None if teacher is None else teacher(inputs)
            optimizer.zero_grad()
            (recipe.loss(trained(inputs), labels, taught) / len(labels)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()
            if step or steps == 1:
                best = min(best, time.perf_counter() - began)
    return best * steps
