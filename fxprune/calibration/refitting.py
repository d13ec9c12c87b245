"""Refit: re-solve the kept weights of a pruned layer so that, fed by the pruned network, it gives what the dense one
gave.

Layer by layer in graph order, each by least squares in closed form, without labels and without gradients:

- *Ridge least squares* toward the dense weights (He, Zhang, Sun, "Channel Pruning for Accelerating Very Deep Neural
  Networks", ICCV 2017, section 3.1, refit all channels of a layer; here each group has its own columns).
- *Intercept*: the mean of the error goes into the bias, or into the running mean of the BatchNorm that follows.
- *The sum is the target*: a layer that feeds an addition is fitted to the dense sum minus what the other branch now
  gives, so that it also repairs the error that a residual stream carries (the same paper, section 3.3, "multi-branch").
- *The rectifier forgives*: where a ReLU follows and the dense network is cut off, it does not matter how far below the
  threshold the pruned one is. The one-sided least squares problem is convex; it is solved by majorization: replace the
  targets there by the present answer, solve with the same Gram matrix, repeat, with Nesterov's momentum. (Zhang, Zou,
  He, Sun, "Accelerating Very Deep Convolutional Networks for Classification and Detection", TPAMI 2016, section 3.2,
  treat the same loss by relaxation.)
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.calibration.batches import Batch
from fxprune.calibration.effort import FULL, ROUNDS, Effort
from fxprune.calibration.following import Bounds, Following, follow
from fxprune.calibration.held_out import choose_ridge
from fxprune.calibration.least_squares import Part, Problem, bundles, columns_of, problem_of, pull_of
from fxprune.calibration.lockstep import Lockstep
from fxprune.calibration.samples import Samples, column_means, draw
from fxprune.calibration.stages import Run
from fxprune.graph.convolutions import Layer, kernels_of, layer_at
from fxprune.graph.editing import call_sites
from fxprune.plans import GroupedKernels

ENOUGH = 1e-3
"""Relative gain of a round of the one-sided problem below which there are no more."""


@dataclass(frozen=True)
class LayerFit:
    """How well a pruned layer follows the dense one.

    Attributes:
        rows: positions of the calibration data that were used.
        masked: mean squared error of the output with the dense weights, masked, relative to the variance of the target.
        refitted: the same with the weights of least squares, before a rectifier that follows allows to do better.
        ridge: the pull toward the dense weights, relative to the mean square of what the layer reads.
    """

    rows: int
    masked: float
    refitted: float
    ridge: float


FITS = "fxprune_fits"
"""Attribute of a masked model under which the fit of each layer is kept for the report."""

Choose = Callable[[str, Any, Samples], GroupedKernels]  # the layer, as whichever class the function is written for
"""Decides, when its turn comes, how a layer is grouped: name, dense layer, samples of its input and target."""

Kept = Callable[[str, Any, Samples], Sequence[Part]]
"""The same as outputs and columns of the flattened weight that stay; all else becomes zero."""

Follow = Callable[[fx.GraphModule, fx.Node], Following]
"""Finds what the fit of a convolution takes account of beside its own output."""


def reconstruct(
    dense: fx.GraphModule,
    pruned: fx.GraphModule,
    batches: Sequence[Batch],
    layers: Collection[str],
    choose: Choose,
    *,
    follow: Follow = follow,
    seed: int = 0,
    effort: Effort = FULL,
    progress: bool | Run = False,
) -> tuple[dict[str, GroupedKernels], dict[str, LayerFit]]:
    """Prune and refit convolutions and linear layers of a network one after the other, in graph order.

    Args:
        choose: how each is grouped. The others are those of `refit_layers`.

    Raises:
        CalibrationError: see there.
    """
    chosen: dict[str, GroupedKernels] = {}

    def kept(name: str, layer: Layer, samples: Samples) -> list[Part]:
        kernels = chosen[name] = choose(name, layer, samples)
        return parts_of(kernels, kernels_of(layer))

    fits = refit_layers(
        dense, pruned, batches, layers, kept, follow=follow, seed=seed, effort=effort, progress=progress
    )
    return chosen, fits


def refit_layers(
    dense: fx.GraphModule,
    pruned: fx.GraphModule,
    batches: Sequence[Batch],
    layers: Collection[str],
    kept: Kept,
    *,
    follow: Follow = follow,
    seed: int = 0,
    effort: Effort = FULL,
    progress: bool | Run = False,
) -> dict[str, LayerFit]:
    """Refit convolutions and linear layers of a network one after the other, in graph order.

    Args:
        dense: the reference, traced.
        pruned: a trace of a copy of the same model, which may have been trained since. Weights, biases and BatchNorm
            means of it are changed in place.
        batches: arguments of forward.
        layers: names of these. One that is called several times is pruned, but not refitted.
        kept: what stays of each.
        follow: what comes after a convolution and is fitted with it; `Following()` makes plain least squares of it.
        seed: of the sampled positions.
        effort: how much is spent on each.
        progress: show a bar on stderr.

    Raises:
        CalibrationError: the data do not fit the model, or a layer's values are not finite.
    """
    sites = [nodes for nodes in call_sites(dense).values() if str(nodes[0].target) in layers]
    stops = frozenset(node.name for nodes in sites for node in nodes)
    fits: dict[str, LayerFit] = {}
    with torch.no_grad(), Lockstep(dense, pruned, batches, progress=progress) as networks:
        for node, *more in sites:
            name = str(node.target)
            original, layer = layer_at(dense, name), layer_at(pruned, name)
            weight = kernels_of(layer)  # a view: written in place
            following = Following() if more else follow(dense, node)
            if following.other and not networks.can_look_ahead(node.name, following.other, stops):
                following = following.without_other()
            samples = draw(name, node.name, original, following, networks.pause_before(node.name), seed, effort.rows)
            parts = kept(name, original, samples)
            if more:
                weight.copy_(_only(parts, weight))
                continue
            solution = solve(weight, parts, samples, following.bounds, effort.ridges.get(name), effort.rounds)
            fits[name] = solution.fit
            weight.copy_(solution.weight)
            if layer.bias is not None:
                layer.bias.copy_(solution.intercept)
            elif following.norm is not None:
                mean = pruned.get_submodule(following.norm).running_mean
                assert isinstance(mean, Tensor)
                mean.sub_(solution.intercept)
    return fits


def parts_of(kernels: GroupedKernels, weight: Tensor) -> list[Part]:
    """The outputs and columns of each group of a layer with a weight `(O, C, *kernel)`."""
    return columns_of(kernels.out_order, kernels.kept, weight[0, 0].numel(), weight.device)


def _only(parts: Sequence[Part], weight: Tensor) -> Tensor:
    """The weight, zero where it is in no part."""
    flat, masked = weight.flatten(1), torch.zeros_like(weight.flatten(1))
    for outputs, columns in parts:
        masked[outputs[:, None], columns] = flat[outputs[:, None], columns]
    return masked.view_as(weight)


@dataclass(frozen=True)
class Solution:
    """New weight `(O, C, *kernel)` and intercept `(O,)`, float64, and how well they fit."""

    weight: Tensor
    intercept: Tensor
    fit: LayerFit


def solve(
    weight: Tensor,
    parts: Sequence[Part],
    samples: Samples,
    bounds: Bounds | None = None,
    ridge: float | None = None,
    rounds: int = ROUNDS,
) -> Solution:
    """Solve one layer.

    Args:
        weight: `(O, C, *kernel)` toward which it is pulled.
        parts: which outputs and columns stay.
        samples: what the layer reads and should give.
        bounds: of the rectifier that reads the result.
        ridge: the pull toward the dense weights if it is known, else the one that suits the samples.
        rounds: of the one-sided problem at most.
    """
    prior = weight.detach().double().flatten(1)
    if ridge is None:
        ridge = choose_ridge(samples, parts, prior)
    pull = pull_of(samples.mean_square, ridge)
    moments = samples.moments() if any(len(columns) <= samples.rows for _, columns in parts) else None
    new, mean = torch.zeros_like(prior), samples.target_mean.clone()
    masked = refitted = 0.0
    for bundle in bundles(parts, samples.rows):  # one after the other: there is memory for the rows and factors of one
        problem = problem_of(samples, moments, bundle, prior, pull)
        outputs, columns = problem.outputs, problem.columns
        best = problem.solve()
        masked += problem.error(problem.prior())
        refitted += problem.error(best)
        if bounds is not None:
            best, mean[outputs] = _one_sided(problem, best, samples.of(outputs), bounds, rounds)
        new[outputs[:, None], columns] = problem.weights(best)
    fitted = torch.cat([outputs for outputs, _ in parts]) if parts else torch.zeros(0, dtype=torch.long)
    energy = float(column_means(samples.of(fitted).centered_targets(), Tensor.square).sum())
    masked, refitted = (error / energy if energy > 0 else 0.0 for error in (masked, refitted))
    fit = LayerFit(samples.rows, masked, refitted, ridge)
    return Solution(new.view_as(weight), mean - new @ samples.input_mean, fit)


def _one_sided(problem: Problem, start: Tensor, samples: Samples, bounds: Bounds, rounds: int) -> tuple[Tensor, Tensor]:
    """Minimize the error that a rectifier lets through, from the coefficients of least squares on. Returns the best
    coefficients, and the mean of the answer `(o,)`.

    The targets of each round are the answer and what it misses, so only the latter has to be solved for.
    """
    wanted = _Rectified(samples, bounds)
    best = ahead = start, samples.target_mean
    momentum, before = 1.0, float("inf")
    for _ in range(rounds):
        wanted.loss = 0.0
        missed, drift = problem.follow(*ahead, wanted.missing)
        if wanted.loss > before * (1 - ENOUGH):
            if momentum == 1.0:
                break
            momentum, ahead = 1.0, best  # overshot, or slow: once more without momentum
            continue
        new = problem.step(ahead[0], missed), ahead[1] + drift
        step = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        rate = (momentum - 1) / step
        ahead = new[0] + rate * (new[0] - best[0]), new[1] + rate * (new[1] - best[1])
        best, momentum, before = new, step, wanted.loss
    return best


class _Rectified:
    """What a rectifier should read, in units of the targets, and which errors it forgives.

    Attributes:
        loss: squared error of all answers since it was set to 0.
    """

    def __init__(self, samples: Samples, bounds: Bounds) -> None:
        scale, (low, high) = torch.where(samples.scale == 0, 1, samples.scale), bounds
        reads = torch.addcmul(samples.offset, samples.targets, scale)
        # Where it is cut off, the answer may be as far beyond as it likes: no error of that sign is seen.
        rising, below, above = scale > 0, reads <= low, reads >= high
        self._most = _limit(torch.where(rising, below, above), math.inf)
        self._least = _limit(torch.where(rising, above, below), -math.inf)
        self._wanted, self.loss = reads.clamp_(low, high).sub_(samples.offset).div_(scale), 0.0

    def missing(self, answer: Tensor, rows: slice) -> Tensor:
        """What an answer misses, `(n, o)`; it is written over."""
        missing = torch.sub(self._wanted[rows], answer, out=answer)
        if self._most is not None:
            torch.minimum(missing, self._most[rows], out=missing)
        if self._least is not None:
            torch.maximum(missing, self._least[rows], out=missing)
        flat = missing.flatten()
        self.loss += float(torch.dot(flat, flat))
        return missing


def _limit(forgiven: Tensor, beyond: float) -> Tensor | None:
    """0 where errors beyond it are forgiven; None where none are."""
    return torch.zeros_like(forgiven, dtype=torch.float32).masked_fill_(~forgiven, beyond) if forgiven.any() else None
