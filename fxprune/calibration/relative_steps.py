"""Gradient steps whose size is a share of what they move, so that no learning rate has to be found.

Adam (Kingma & Ba, ICLR 2015) in units of each filter. In evaluation mode nothing takes the scale of a layer back, as
BatchNorm does in training: a step that is small for one layer ruins another. A share of the weights of a filter changes
what it computes by about that share, whatever its scale. You et al., Large Batch Training of Convolutional Networks
(LARS, 2017), have it so for layers.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

WARM_UP = 0.1
"""Share of the time in which steps grow to their full size; then they shrink to nothing along a cosine (Loshchilov &
Hutter, SGDR, ICLR 2017)."""
BETAS = (0.9, 0.99)
"""Of the averages of gradients and of their squares."""


class Weight:
    """A parameter in training, with Adam's averages, and the unit of its steps.

    Args:
        value: the parameter.
        unit: size of a whole step, broadcast to its shape; zero where it must not move.
    """

    def __init__(self, value: nn.Parameter, unit: Tensor) -> None:
        self.value, self.unit = value, unit
        self.mean, self.square, self.count = torch.zeros_like(unit), torch.zeros_like(unit), 0

    @torch.no_grad()
    def move(self, rate: float) -> None:
        """Make a step against the gradient, if there is one that is finite."""
        gradient = self.value.grad
        if gradient is None or not torch.isfinite(gradient).all():
            return
        self.count += 1
        gradient = torch.where(self.unit == 0, 0, gradient)
        self.mean.lerp_(gradient, 1 - BETAS[0])
        self.square.lerp_(gradient.square(), 1 - BETAS[1])
        mean, square = self.mean / (1 - BETAS[0] ** self.count), self.square / (1 - BETAS[1] ** self.count)
        tiny = torch.finfo(square.dtype).tiny
        self.value.addcmul_(self.unit, mean / square.clamp(min=tiny).sqrt(), value=-rate)

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


def weights_of(network: fx.GraphModule, kept: Mapping[int, Tensor]) -> dict[str, Weight]:
    """The parameters of a network that are trained, by name."""
    found: dict[str, Weight] = {}
    used = {str(node.target) for node in network.graph.nodes if node.op == "call_module"}
    for path, module in network.named_modules(remove_duplicate=False):
        if not any(path == target or path.startswith(f"{target}.") for target in used):
            continue  # behind the last block end
        if not isinstance(module, nn.modules.conv._ConvNd | nn.Linear | _NORMS):
            continue
        units = _units(module, kept)
        for name, unit in units.items():
            value = getattr(module, name)
            if not any(value is other.value for other in found.values()):
                found[f"{path}.{name}"] = Weight(value, unit)
    return found


_NORMS = nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm


@torch.no_grad()
def _units(module: nn.Module, kept: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """The unit of the steps of a layer's parameters: for a filter the root mean square of its kept weights, for a scale
    its size, for a shift the size of what it shifts, were all that the layer reads of size 1.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    units: dict[str, Tensor] = {}
    if isinstance(module, _NORMS):
        scale = None if weight is None else weight.detach().abs()
        if isinstance(weight, nn.Parameter) and scale is not None:
            units["weight"] = scale
        if isinstance(bias, nn.Parameter):
            units["bias"] = torch.ones_like(bias) if scale is None else scale.clone()
    elif isinstance(weight, nn.Parameter):
        stays = kept.get(id(weight), torch.ones_like(weight, dtype=torch.bool))
        transposed = isinstance(module, nn.modules.conv._ConvNd) and module.transposed
        others = None if transposed else tuple(range(1, weight.dim()))  # its filters are not its rows
        squares = torch.where(stays, weight, 0).square().sum(others, keepdim=True)
        size = (squares / stays.sum(others, keepdim=True).clamp(min=1)).sqrt()
        units["weight"] = size * stays
        if isinstance(bias, nn.Parameter):
            units["bias"] = squares.sqrt().flatten().expand_as(bias).clone()
    for name, unit in units.items():
        entries = kept.get(id(getattr(module, name)))
        if entries is not None:
            units[name] = unit * entries
    return units


def schedule(done: float) -> float:
    """The size of a step, as a share of the largest one."""
    if done < WARM_UP:
        return done / WARM_UP
    return (1 + math.cos(math.pi * min(1.0, (done - WARM_UP) / (1 - WARM_UP)))) / 2
