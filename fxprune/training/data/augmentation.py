"""Random variations of training images that are a function of numbers given, never of what was drawn before.

So a run that is resumed, or shared by several processes, sees the images of one that was not.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

AREA = (0.08, 1.0)
"""Share of the image that a random crop covers, as in Szegedy et al., Going Deeper with Convolutions (2015), section 6;
`RandomResizedCrop` of torchvision has the same numbers."""
ASPECT = (3 / 4, 4 / 3)
"""Width to height of a random crop; the same source."""
TRIES = 10
"""Crops that do not fit into the image, before the largest centred one is taken; torchvision's number."""

ORDER, VARIATION = 0, 1
"""What a generator is for; the first number of its path."""

Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""


def generator(seed: int, *path: int) -> torch.Generator:
    """A generator of its own for each seed and each path of non-negative numbers: a purpose, an epoch."""
    state = np.random.SeedSequence(seed, spawn_key=path).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def shift_and_flip(pixels: Tensor, corners: Tensor, flips: Tensor, shift: int) -> Tensor:
    """Crop each image out of itself with `shift` pixels of zeros around, and mirror some.

    Args:
        pixels: `(B, C, H, W)`, of any type.
        corners: top and left of each crop in the padded image, int64 `(B, 2)`, each from 0 to `2 * shift`.
        flips: which are mirrored left to right, bool `(B,)`.
        shift: in pixels.

    Returns:
        Of the shape and type of `pixels`.
    """
    height, width = pixels.shape[2:]
    # Every place of every crop is a view, (B, C, 2 * shift + 1, 2 * shift + 1, H, W); only those asked for are copied.
    places = F.pad(pixels, [shift] * 4).unfold(2, height, 1).unfold(3, width, 1)
    cropped = places[torch.arange(len(pixels)), :, corners[:, 0], corners[:, 1]]
    cropped[flips] = cropped[flips].flip(3)
    return cropped


def random_box(height: int, width: int, draw: torch.Generator) -> Box:
    """The crop that torchvision's `RandomResizedCrop` takes of an image, drawn from a generator of the caller's."""
    aspects = (math.log(ASPECT[0]), math.log(ASPECT[1]))
    for _ in range(TRIES):
        area = height * width * torch.empty(1).uniform_(*AREA, generator=draw).item()
        aspect = torch.exp(torch.empty(1).uniform_(*aspects, generator=draw)).item()
        wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < high <= height:
            top = int(torch.randint(0, height - high + 1, (1,), generator=draw))
            left = int(torch.randint(0, width - wide + 1, (1,), generator=draw))
            return top, left, high, wide
    wide = min(width, round(height * ASPECT[1]))
    high = min(height, round(width / ASPECT[0]))
    return (height - high) // 2, (width - wide) // 2, high, wide
