"""How much a layer suffers as it is pruned: the error of a refit, on images that it was not fitted to.

With a few hundred rows for thousands of inputs any layer could be fitted from a few of its channels, and would do badly
on the next image. So one half of the images is fitted, and the other one predicted, each in turn.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from fxprune.calibration.following import Bounds
from fxprune.calibration.held_out import choose_ridge, held_out_errors, regularized
from fxprune.calibration.least_squares import columns_of
from fxprune.calibration.samples import Samples
from fxprune.methods import Matrix
from fxprune.methods.reconstruction import LARGE, elimination_order

LEAST_SIGNAL = 1e-6
"""Where less than this is left of the signal, all is lost; a damage of 1 and more has a logarithm all the same."""
# Shares of its channels with which a layer is fitted, and those with which one above LARGE is, for time.
SHARES = tuple(part / 16 for part in range(1, 16))
FEW_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
NOISE = 1e-10
"""Variance relative to the mean square that is rounding in float32: what the layer gives is constant."""
TINY = torch.finfo(torch.float32).tiny
PROBES = 4
"""Groups that stand for a layer, spread over it: each takes an elimination and two factors of its own."""


def damage_path(weight: Tensor, samples: Samples, groups: int, seed: int = 0, bounds: Bounds | None = None) -> Matrix:
    """The squared error of the output if each group keeps `1` to `C` channels, relative to the variance of what the
    next layer reads: `(C,)`, interpolated between `SHARES` of the channels.

    Args:
        weight: `(O, C, *kernel)` of the dense layer.
        samples: of it, in the dense network.
        groups: `n`, a divisor of `O`.
        seed: of the clustering.
        bounds: of the rectifier that reads the result, see `error_weights`.
    """
    channels, area, prior = weight.shape[1], weight[0, 0].numel(), weight.detach().double().flatten(1)
    half = max(1, channels // 2)
    gram, cross, _ = regularized(samples, weight, groups, half, seed)
    filters, order = elimination_order(weight, gram, cross, groups, seed, PROBES)
    parts = columns_of(filters, order[:, ::-1].copy(), area, prior.device)  # the last to go first
    ridge = choose_ridge(samples, [(outputs, columns[: half * area]) for outputs, columns in parts], prior)
    weights = error_weights(samples, bounds)
    signal = weights * samples.energy()
    seen = float(signal[torch.cat([outputs for outputs, _ in parts])].sum() / signal.sum().clamp(min=TINY))
    if seen > LEAST_SIGNAL:  # what the probes lose stands for all
        weights /= seen

    def damages(counts: Sequence[int]) -> list[float]:
        errors = held_out_errors(samples, parts, prior, ridge, [kept * area for kept in counts])
        return (errors @ weights).tolist()

    return interpolated(channels, channels * area, damages)


def loss_of(damage: float) -> float:
    """Minus the logarithm of what a damage leaves of the signal."""
    return -math.log(max(1 - damage, LEAST_SIGNAL))


def error_weights(samples: Samples, bounds: Bounds | None) -> Tensor:
    """What a squared error of each output counts, `(O,)` float64, so that they add up relative to the variance of what
    the next layer reads.

    Where a rectifier with `bounds` reads the result, the next layer reads what it lets through: the variance is that of
    the clipped values, and an error counts in the share of positions where the filter is not cut off. Before a ReLU6
    most of the variance may be far outside (MobileNetV2: an expansion whose loss of half of its channels ruins the
    network looked harmless, 3 %).
    """
    read = samples.targets * samples.scale + samples.offset
    weights = samples.scale.double().square()
    if bounds is not None:
        weights *= ((read > bounds[0]) & (read < bounds[1])).double().mean(0)
        read = read.clamp(*bounds)
    signal, rounding = float(read.var(0, correction=0).sum()), NOISE * float(read.square().mean(0).sum())
    return weights / max(signal, rounding, TINY)


def interpolated(channels: int, inputs: int, damages: Callable[[Sequence[int]], Sequence[float]]) -> Matrix:
    """The damage with `1` to `channels` channels, `(C,)`, from what it is with a few numbers of them; none with all.

    Args:
        channels: how many there are.
        inputs: of the layer that reads them; above `LARGE` there are fewer points.
        damages: with so many of them, which rise.
    """
    shares = FEW_SHARES if inputs > LARGE else SHARES
    counts = sorted({1, *(max(1, round(share * channels)) for share in shares)} - {channels})
    path: Matrix = PchipInterpolator([*counts, channels], [*damages(counts), 0.0])(np.arange(1, channels + 1))
    path[-1] = 0.0  # up to rounding it is
    return path
