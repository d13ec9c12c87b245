"""How what a convolution loses by its kernels changes where filters before it are gone: measured, not assumed.

The sensitivity of kernels is measured once more on a network in which each channel space keeps about three quarters of
its units, refitted. For each convolution the sum of its losses at a few ratios, relative to that in the dense network,
says how steeply they change with the share of its inputs that stays.

What was found (ResNet-20, 1,024 images): at three quarters of the inputs the losses of single layers at equal ratios
are 0.75 to 0.95 of those in the dense network; on networks with filters by a global ranking (256 images, 70 and 85 % of
the multiply-accumulates, layers with as many groups in both) 0.76 to 1.17, mostly 0.9 to 1.05. What the line does not
see is the network: with the same errors in single layers the probabilities of one that had lost a quarter of its
filters moved 4 to 21 times as far as those of the dense one, which are saturated on images that it was trained on.
"""

from collections.abc import Mapping

import numpy as np

from fxprune.calibration.damage import loss_of
from fxprune.planning.sensitivity import Sensitivity

WIDTH = 3 / 4
"""About the share of its units that each space of the narrower network keeps."""
RATIOS = (1 / 4, 1 / 2, 3 / 4)
"""Where losses are compared."""
STEEPEST = 4.0
"""A loss rises by no more than this times the share of the inputs that goes, and never falls below none."""


def slopes(dense: Sensitivity, narrow: Sensitivity, inputs: Mapping[str, float]) -> dict[str, float]:
    """The slope of each layer of the dense network, see `fxprune.planning.program.terms`.

    Layers that lost no inputs, or have another number of groups in the narrower network, take the median of the others;
    none where there are no others.

    Args:
        dense: sensitivity of kernels in the dense network.
        narrow: the same in one with fewer filters.
        inputs: the share of its inputs that each layer has in the latter.
    """
    after = {layer.name: layer for layer in narrow.layers}
    found: dict[str, float] = {}
    for layer in dense.layers:
        other, left = after.get(layer.name), inputs.get(layer.name, 1.0)
        if other is None or other.groups != layer.groups or left >= 1:
            continue
        before, now = (sum(loss_of(each.at(ratio)) for ratio in RATIOS) for each in (layer, other))
        if before > 0:
            found[layer.name] = float(np.clip((now / before - 1) / (1 - left), -1.0, STEEPEST))
    usual = float(np.median(list(found.values()))) if found else 0.0
    return {layer.name: found.get(layer.name, usual) for layer in dense.layers}
