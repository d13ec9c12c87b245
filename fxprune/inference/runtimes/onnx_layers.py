"""The forms of one fused convolution as ONNX nodes.

A convolution that was pruned has three, which compute the same:

- *grouped*: `Gather` of the channels that the groups read, one `Conv` with groups.
- *split*: for each group its channels (`Split` where they follow each other, else `Gather`), a `Conv` without groups,
  and a `Concat` of the results: runtimes have their best kernels for dense convolutions.
- *dense*: one `Conv` over all channels with zeros for what is gone: best where groups are narrow.

Order of the output, residual and activation follow. A convolution that was not pruned is dense as it is; if it reads
its channels in another order, its weights are put into that order instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxprune.graph.fused import FusedConv2d

GROUPED, SPLIT, DENSE = "pruned grouped", "pruned split", "dense conv"

OPSET = 18
IR_VERSION = 10
"""Of all ONNX files of fxprune: what runtimes since 2024 read."""


def forms_of(conv: FusedConv2d) -> tuple[str, ...]:
    """The forms that a convolution has."""
    if not conv.dense_groups:
        return (DENSE,)
    return (GROUPED, SPLIT, DENSE) if conv.groups > 1 else (GROUPED, DENSE)


@dataclass
class Nodes:
    """ONNX nodes of one layer, as they are made.

    Attributes:
        prefix: of the names of all values in them.
        nodes, constants: in order.
    """

    prefix: str
    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)

    def constant(self, name: str, value: Tensor | Sequence[float]) -> str:
        """Name of a new constant: a tensor, or a float as a scalar."""
        from onnx import numpy_helper

        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value, np.float32)
        self.constants.append(
            numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), self._name(name))
        )
        return self._name(name)

    def add(self, kind: str, inputs: Sequence[str], name: str, outputs: int = 1, **attributes: Any) -> list[str]:
        """Append a node, and return the names of its outputs."""
        from onnx import helper

        made = [self._name(name if outputs == 1 else f"{name}_{i}") for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), made, name=self._name(name), **attributes))
        return made

    def _name(self, name: str) -> str:
        return f"{self.prefix}_{name}"


def layer_nodes(conv: FusedConv2d, form: str, prefix: str, inputs: Sequence[str], output: str) -> Nodes:
    """A fused convolution in one of its forms.

    Args:
        conv: on any device.
        form: one of `forms_of(conv)`.
        prefix: of all new names.
        inputs: names of the input and, if it adds one, of the residual.
        output: name of the result.
    """
    if form == DENSE and (conv.dense_groups or _permutes(conv)):
        conv = conv.dense()
    made = Nodes(prefix)
    x = inputs[0]
    y = _split(made, conv, x) if form == SPLIT else _whole(made, conv, x)
    if conv.order is not None:
        (y,) = made.add("Gather", [y, made.constant("order", conv.order)], "ordered", axis=1)
    if len(inputs) > 1:
        (y,) = made.add("Add", [y, inputs[1]], "sum")
    if conv.minimum == 0 and conv.maximum is None:
        (y,) = made.add("Relu", [y], "relu")
    elif conv.minimum is not None or conv.maximum is not None:
        bounds = [
            "" if bound is None else made.constant(name, [bound])
            for name, bound in (("minimum", conv.minimum), ("maximum", conv.maximum))
        ]
        (y,) = made.add("Clip", [y, *bounds], "clip")
    made.nodes[-1].output[0] = output
    return made


def _permutes(conv: FusedConv2d) -> bool:
    """Whether it has no groups and reads all its channels once, in another order, which its weights can take in."""
    if conv.groups != 1 or conv.index is None:
        return False
    return conv.index.sort().values.tolist() == list(range(conv.channels))


def _whole(made: Nodes, conv: FusedConv2d, x: str) -> str:
    """One convolution, grouped or not."""
    if conv.index is not None:
        (x,) = made.add("Gather", [x, made.constant("index", conv.index)], "gathered", axis=1)
    return _conv(made, conv, x, conv.weight, conv.bias, "conv", conv.groups)


def _split(made: Nodes, conv: FusedConv2d, x: str) -> str:
    """A convolution without groups for each group."""
    reads = conv.reads()
    if torch.equal(reads.flatten().cpu(), torch.arange(conv.channels)):
        parts = made.add("Split", [x], "part", outputs=conv.groups, axis=1, num_outputs=conv.groups)
    else:
        parts = [
            made.add("Gather", [x, made.constant(f"index_{group}", channels)], f"part_{group}", axis=1)[0]
            for group, channels in enumerate(reads)
        ]
    weights = conv.weight.chunk(conv.groups)
    biases = [None] * conv.groups if conv.bias is None else conv.bias.chunk(conv.groups)
    results = [
        _conv(made, conv, part, weight, bias, f"conv_{group}", 1)
        for group, (part, weight, bias) in enumerate(zip(parts, weights, biases, strict=True))
    ]
    return made.add("Concat", results, "joined", axis=1)[0]


def _conv(made: Nodes, conv: FusedConv2d, x: str, weight: Tensor, bias: Tensor | None, name: str, groups: int) -> str:
    operands = [x, made.constant(f"{name}_weight", weight)]
    if bias is not None:
        operands.append(made.constant(f"{name}_bias", bias))
    return made.add(
        "Conv",
        operands,
        name,
        kernel_shape=conv.kernel_size,
        strides=conv.stride,
        pads=conv.padding * 2,
        dilations=conv.dilation,
        group=groups,
    )[0]
