"""What the layers of a network are called with: shapes, and the work that they make of them."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.graph.convolutions import Convolution


def count_macs(module: nn.Module, inputs: Tensor) -> int:
    """Multiply-accumulates of one image over all convolutions and linear layers that are called as modules."""
    total = 0

    def add(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        nonlocal total
        weight = layer.get_parameter("weight")
        places = x.numel() if isinstance(layer, nn.modules.conv._ConvTransposeNd) else y.numel()
        total += places * math.prod(weight.shape[1:])

    with watching(module, add, Convolution | nn.Linear), torch.no_grad():
        module(inputs[:1])
    return total


def input_shapes(module: nn.Module, inputs: Tensor, kinds: Any) -> dict[str, tuple[int, ...]]:
    """Shape of the input of each layer of these classes, by module path, of a layer called twice the last."""
    shapes: dict[str, tuple[int, ...]] = {}
    with (
        watching(module, lambda name, layer, x, y: shapes.update({name: tuple(x.shape)}), kinds),
        torch.no_grad(),
    ):
        module(inputs)
    return shapes


@contextlib.contextmanager
def watching(module: nn.Module, see: Callable[[str, nn.Module, Tensor, Tensor], None], kinds: Any) -> Iterator[None]:
    """Call `see(name, layer, input, output)` after each call of a layer of these classes."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda layer, x, y: see(name, layer, x[0], y)

    handles = [
        layer.register_forward_hook(hook(name)) for name, layer in module.named_modules() if isinstance(layer, kinds)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def last_layer(model: nn.Module, inputs: Tensor) -> nn.Module:
    """The convolution or linear layer that gives the classes, which must keep them all."""
    called: list[nn.Module] = []
    with watching(model, lambda name, layer, x, y: called.append(layer), Convolution | nn.Linear), torch.no_grad():
        model(inputs[:1])
    return called[-1]
