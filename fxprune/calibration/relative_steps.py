"""Gradient steps in units of what they change, so that no learning rate has to be found.

In evaluation mode nothing takes the scale of a layer back, as BatchNorm does in training: a step that is small for one
layer ruins another. So Adam (Kingma & Ba, ICLR 2015) moves

- each weight by a share of the root mean square of its filter, as You et al., Large Batch Training of Convolutional
  Networks (LARS, 2017), have it for layers; or by a share of how much what the filter gives varies, if that is less: a
  filter that takes differences of large values gives little, and is changed much by little (the first depthwise layer
  of MobileNetV2 alone makes three quarters of the damage of a random relative change of all);
- without moving the mean of what a filter gives, which is left to the bias: behind a rectifier all inputs are positive,
  and steps of all weights would add up in it (Schraudolph, Centering Neural Network Gradient Factors, 1998).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxprune.calibration.following import follow
from fxprune.graph.convolutions import Convolution
from fxprune.graph.costs import LAYERS
from fxprune.graph.editing import call_sites

WARM_UP = 0.1
"""Share of the time in which steps grow to their full size; then they shrink to nothing along a cosine (Loshchilov &
Hutter, SGDR, ICLR 2017)."""
BETAS = (0.9, 0.99)
"""Of the averages of gradients and of their squares."""


@dataclass(frozen=True)
class Shift:
    """Where the mean of what a filter reads goes: into the bias, or into that of the BatchNorm that follows.

    Attributes:
        bias: `(O,)`.
        mean: of what each weight of a filter reads, broadcast to the shape of the weight.
        norm: the BatchNorm, if the bias is of one.
    """

    bias: nn.Parameter
    mean: Tensor
    norm: _BatchNorm | None = None

    def gain(self) -> Tensor:
        """By how much the bias changes what a change of the output changes: `(O,)`."""
        if self.norm is None:
            return torch.ones_like(self.bias)
        assert self.norm.running_var is not None
        scale = (self.norm.running_var + self.norm.eps).rsqrt()
        return scale if self.norm.weight is None else scale * self.norm.weight


class Weight:
    """A parameter in training, with Adam's averages, and the unit of its steps.

    Args:
        value: the parameter.
        unit: size of a whole step, broadcast to its shape; zero where it must not move.
        shift: takes back what a step does to the mean of the output.
    """

    def __init__(self, value: nn.Parameter, unit: Tensor, shift: Shift | None = None) -> None:
        self.value, self.unit, self.shift = value, unit, shift
        self.mean, self.square, self.count = torch.zeros_like(unit), torch.zeros_like(unit), 0

    @torch.no_grad()
    def move(self, rate: float) -> None:
        """Make a step against the gradient, if there is one that is finite."""
        gradient, shift = self.value.grad, self.shift
        if gradient is None or not torch.isfinite(gradient).all():
            return
        per_filter = (-1, *[1] * (self.value.dim() - 1))
        if shift is not None and shift.bias.grad is not None:
            gradient = gradient - (shift.bias.grad * shift.gain()).view(per_filter) * shift.mean
        self.count += 1
        gradient = torch.where(self.unit == 0, 0, gradient)
        self.mean.lerp_(gradient, 1 - BETAS[0])
        self.square.lerp_(gradient.square(), 1 - BETAS[1])
        mean, square = self.mean / (1 - BETAS[0] ** self.count), self.square / (1 - BETAS[1] ** self.count)
        step = -rate * self.unit * mean / square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()
        self.value.add_(step)
        if shift is not None:
            shift.bias.sub_(shift.gain() * (step * shift.mean).flatten(1).sum(1))

    @torch.no_grad()
    def restart(self, value: Tensor) -> None:
        """Take a value, and forget the averages."""
        self.value.copy_(value)
        self.mean.zero_()
        self.square.zero_()
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        """What changes."""
        return {"value": self.value.detach(), "mean": self.mean, "square": self.square, "count": self.count}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""
        for name in ("value", "mean", "square"):
            getattr(self, name).copy_(state[name])
        self.count = state["count"]


def weights_of(network: fx.GraphModule, kept: Mapping[int, Tensor], run: Callable[[], object]) -> dict[str, Weight]:
    """The parameters of a network that are trained, by name.

    Args:
        network: traced, in evaluation mode.
        kept: `id` of a parameter to the entries that may move; one that is absent may move as a whole.
        run: runs the network once, so that it can be measured what its layers read and give.
    """
    layers = {path: module for path, module in network.named_modules() if isinstance(module, LAYERS | _NORMS)}
    measured: dict[nn.Module, tuple[Moments, Moments]] = {}

    def measure(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        axis = output.dim() - 1 if isinstance(module, nn.Linear) else 1
        measured[module] = _moments(inputs[0], axis), _moments(output, axis)

    hooks = [module.register_forward_hook(measure) for module in layers.values()]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    norms = _norms_behind(network)
    found: dict[str, Weight] = {}
    for path, module in layers.items():
        if module not in measured:  # behind the last block end
            continue
        reads, gives = measured[module]
        shift = None if isinstance(module, _NORMS) else _shift(module, norms.get(path), reads.mean)
        units = _units(module, kept, reads if shift is None else replace(reads, mean=0 * reads.mean), gives)
        for name, unit in units.items():
            value = getattr(module, name)
            if not any(value is other.value for other in found.values()):
                found[f"{path}.{name}"] = Weight(value, unit, shift if name == "weight" else None)
    return found


def _norms_behind(network: fx.GraphModule) -> dict[str, _BatchNorm]:
    """The BatchNorm that alone reads a convolution, by the path of the convolution, where each is called once."""
    found = {}
    for nodes in call_sites(network).values():
        norm = follow(network, nodes[0]).norm if len(nodes) == 1 else None
        if norm is not None:
            module = network.get_submodule(norm)
            assert isinstance(module, _BatchNorm)
            found[str(nodes[0].target)] = module
    return found


def _shift(module: nn.Module, norm: _BatchNorm | None, mean: Tensor) -> Shift | None:
    """Where the mean of what a layer reads can go; None where there is no place for it."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(module, Convolution) and module.transposed:
        return None
    means = _by_filter(mean, weight).view(*weight.shape[:2], *[1] * (weight.dim() - 2))
    if isinstance(module.bias, nn.Parameter):
        return Shift(module.bias, means)
    return None if norm is None or norm.bias is None else Shift(norm.bias, means, norm)


def _by_filter(values: Tensor, weight: Tensor) -> Tensor:
    """`(C,)` of what a layer reads, as each filter of `weight` has it: `(O, C / groups)`."""
    filters, inputs = weight.shape[:2]
    return values.view(-1, inputs).repeat_interleave(filters * inputs // len(values), 0)


@dataclass(frozen=True)
class Moments:
    """Mean and variance `(C,)` of channels, in float32 at least."""

    mean: Tensor
    variance: Tensor


_NORMS = nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm


@torch.no_grad()
def _units(module: nn.Module, kept: Mapping[int, Tensor], reads: Moments, gives: Moments) -> dict[str, Tensor]:
    """The unit of the steps of a layer's parameters.

    The weights of a filter are in units of their root mean square, or of the size at which independent changes of them
    would change what the filter gives by as much as that varies, whichever is less. A filter that takes differences of
    large inputs has large weights and gives little.

    Args:
        module: a convolution, a linear layer or a normalization.
        kept: see `weights_of`.
        reads: of what it reads.
        gives: of what it gives.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    units: dict[str, Tensor] = {}
    if isinstance(module, _NORMS):
        if isinstance(weight, nn.Parameter):
            units["weight"] = weight.detach().abs()
        if isinstance(bias, nn.Parameter):
            units["bias"] = torch.ones_like(bias) if weight is None else weight.detach().abs()
    elif isinstance(weight, nn.Parameter):
        stays = kept.get(id(weight), torch.ones_like(weight, dtype=torch.bool))
        if isinstance(module, Convolution) and module.transposed:  # its filters are not its rows
            units["weight"] = torch.where(stays, weight, 0).square().mean().sqrt() * stays
        else:
            rows = stays.flatten(2).sum(2) if weight.dim() > 2 else stays  # (O, C / groups)
            read = _by_filter(reads.variance + reads.mean.square(), weight)
            size = (torch.where(stays, weight, 0).flatten(1).square().sum(1) / rows.sum(1).clamp(min=1)).sqrt()
            energy = (rows * read).sum(1).clamp(min=torch.finfo(size.dtype).tiny)
            unit = torch.minimum(size, gives.variance.sqrt() / energy.sqrt())
            units["weight"] = unit.view(-1, *[1] * (weight.dim() - 1)) * stays
        if isinstance(bias, nn.Parameter):
            units["bias"] = gives.variance.sqrt()
    for name, unit in units.items():
        entries = kept.get(id(getattr(module, name)))
        if entries is not None:
            units[name] = unit * entries
    return units


def _moments(value: Tensor, axis: int) -> Moments:
    precise = value.to(torch.promote_types(value.dtype, torch.float32))
    variance, mean = torch.var_mean(precise, [other for other in range(value.dim()) if other != axis], correction=0)
    return Moments(mean, variance)


def schedule(done: float) -> float:
    """The size of a step, as a share of the largest one."""
    if done < WARM_UP:
        return done / WARM_UP
    return (1 + math.cos(math.pi * min(1.0, (done - WARM_UP) / (1 - WARM_UP)))) / 2
