"""Max pooling of the compiled kernel, in place of PyTorch's, which finds the places of the largest values as well."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxprune.inference.kernels import native


class NativeMaxPool2d(native.NativeModule):
    """`fxprune_native::max_pool2d`, float32 on the CPU; what it was not made for goes to PyTorch's.

    Args:
        pool: with a floor for the size of its result, and without indices.
    """

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.kernel_size, self.padding, self.dilation = (
            _pair(pool.kernel_size),
            _pair(pool.padding),
            _pair(pool.dilation),
        )
        self.stride = _pair(pool.stride)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.dtype != torch.float32 or x.device.type != "cpu":
            return F.max_pool2d(x, self.kernel_size, self.stride, self.padding, self.dilation)
        y: Tensor = torch.ops.fxprune_native.max_pool2d(x, self.kernel_size, self.stride, self.padding, self.dilation)
        return y


def use_native_pools(gm: fx.GraphModule) -> None:
    """Let the compiled kernel do the max poolings of a graph that it can do, where it works at all."""
    if native.obstacle():
        return
    for node in list(gm.graph.nodes):
        pool = _pool_of(gm, node)
        if pool is None or pool.ceil_mode or pool.return_indices:
            continue
        path = f"{node.name}_native"
        gm.add_submodule(path, NativeMaxPool2d(pool))
        with gm.graph.inserting_after(node):
            node.replace_all_uses_with(gm.graph.call_module(path, (node.all_input_nodes[0],)))
        gm.graph.erase_node(node)
    gm.delete_all_unused_submodules()


def _pool_of(gm: fx.GraphModule, node: fx.Node) -> nn.MaxPool2d | None:
    """The pooling that a node is, if it is one with fixed sizes."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return module if type(module) is nn.MaxPool2d else None
    if node.op != "call_function" or node.target not in _FUNCTIONS or len(node.all_input_nodes) != 1:
        return None
    given: dict[str, Any] = dict(zip(_ARGUMENTS, node.args, strict=False))
    given.update(node.kwargs)
    del given["input"]
    return nn.MaxPool2d(**given)


_FUNCTIONS = (F.max_pool2d, torch.max_pool2d)
_ARGUMENTS = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
"""Of `torch.nn.functional.max_pool2d`, in order."""


def _pair(value: int | Sequence[int]) -> list[int]:
    return [int(value)] * 2 if isinstance(value, int) else [int(n) for n in value]
