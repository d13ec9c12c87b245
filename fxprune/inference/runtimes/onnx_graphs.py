"""Whole networks, and single layers, as ONNX models.

PyTorch exports the network once, with a hole in place of each fused convolution (`skeleton`). The holes are then filled
with the layers in whatever form (`filled`), so that every choice costs milliseconds. The batch size stays free;
BatchNorm is folded already; a mean over pixels becomes the pooling that runtimes know.
"""

import copy
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.errors import AccelerationError
from fxprune.graph.editing import calls
from fxprune.graph.fused import FusedConv2d
from fxprune.graph.values import first_line
from fxprune.inference.runtimes.calls import CallForm, Flat
from fxprune.inference.runtimes.onnx_layers import DENSE, IR_VERSION, OPSET, Nodes, layer_nodes

DOMAIN = "fxprune"
HOLE = "Layer"
FLOAT = 1
"""float32, as `onnx.TensorProto` numbers types."""


class _Hole(nn.Module):
    """Stands for a fused convolution while the network is exported."""

    def __init__(self, name: str, conv: FusedConv2d) -> None:
        super().__init__()
        self.name, self.result_shape = name, conv.result_shape

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{HOLE}",
            (x,) if residual is None else (x, residual),
            attrs={"layer": self.name},
            dtype=x.dtype,
            shape=self.result_shape(x.shape),
            version=1,
        )


@torch.no_grad()
def skeleton(graph: fx.GraphModule, call: CallForm, inputs: tuple[Any, ...]) -> Any:
    """The network as an `onnx.ModelProto` whose fused convolutions are holes, named like their graph nodes.

    Raises:
        AccelerationError: it cannot be exported.
    """
    hollow = copy.deepcopy(graph)
    for node, conv in list(calls(hollow, FusedConv2d)):
        parent, _, child = str(node.target).rpartition(".")
        setattr(hollow.get_submodule(parent), child, _Hole(node.name, conv))
    tensors = call.tensors(inputs, {})
    if call.has_free_batch:
        tensors = call.resized(tensors, 2)  # an exporter takes a size of one for a constant
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter warns of deprecated parts of its own
        try:
            program = torch.onnx.export(
                Flat(hollow, call).eval(),
                tuple(tensors),
                dynamo=True,
                input_names=[spec.name for spec in call.specs],
                output_names=_result_names(call),
                dynamic_shapes=(tuple({0: batch} if spec.batched else {} for spec in call.specs),),
                opset_version=OPSET,
                verbose=False,
            )
            assert program is not None
            model = program.model_proto
        except Exception as error:  # the exporter raises whatever its many parts do
            raise AccelerationError(f"the network cannot be exported to ONNX: {first_line(_root(error))}") from error
    model.ir_version = min(model.ir_version, IR_VERSION)
    _pool_by_name(model)
    return model


def filled(hollow: Any, layers: Mapping[str, tuple[FusedConv2d, str]]) -> Any:
    """A copy of a skeleton with layers in its holes: by name the convolution and its form."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(hollow)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        if node.domain != DOMAIN:
            model.graph.node.append(node)
            continue
        name = node.attribute[0].s.decode()
        conv, form = layers[name]
        made = layer_nodes(conv, form, f"{name}_{node.output[0]}", list(node.input), node.output[0])
        model.graph.node.extend(made.nodes)
        model.graph.initializer.extend(made.constants)
    kept = [imported for imported in model.opset_import if imported.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    return model


def single_layer(conv: FusedConv2d, form: str, shapes: Sequence[Sequence[int]]) -> Any:
    """A model of one layer between convolutions that only pass each channel on.

    Runtimes keep results of convolutions in layouts of their own, and what the layer costs includes getting out of them
    and back where its form needs that; hence the neighbours. They are the same for all forms of a layer.

    Args:
        conv: the layer.
        form: one of its forms.
        shapes: `(N, C, H, W)` of its input and, if it adds one, of the residual.
    """
    names = ["input", "residual"][: len(shapes)]
    made = [
        layer_nodes(_passing(shape[1]), DENSE, f"before_{name}", [name], f"{name}_passed")
        for name, shape in zip(names, shapes, strict=True)
    ]
    made.append(layer_nodes(conv, form, "layer", [f"{name}_passed" for name in names], "result"))
    made.append(layer_nodes(_passing(conv.out_channels), DENSE, "after", ["result"], "output"))
    return _model(made, dict(zip(names, shapes, strict=True)))


def passing_on(shape: Sequence[int], count: int) -> Any:
    """A model of `count` such neighbours in a row, for an input of a shape `(N, C, H, W)`."""
    names = ["input", *(f"passed_{place}" for place in range(1, count)), "output"]
    made = [
        layer_nodes(_passing(shape[1]), DENSE, f"pass_{place}", [names[place]], names[place + 1])
        for place in range(count)
    ]
    return _model(made, {"input": shape})


def _model(made: Sequence[Nodes], inputs: Mapping[str, Sequence[int]]) -> Any:
    """A model of layers, one behind the other; the last gives `output`."""
    from onnx import helper

    graph = helper.make_graph(
        [node for layer in made for node in layer.nodes],
        "layer",
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("output", FLOAT, None)],
        [constant for layer in made for constant in layer.constants],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def _passing(channels: int) -> FusedConv2d:
    """A 1x1 convolution of each channel by itself; not an identity, which a runtime might drop."""
    conv = nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
    nn.init.constant_(conv.weight, 0.5)
    return FusedConv2d(conv, channels)


def _root(error: Exception) -> Exception:
    """What it all began with."""
    return _root(error.__cause__) if isinstance(error.__cause__, Exception) else error


def _result_names(call: CallForm) -> list[str]:
    """A name for each result that is a tensor: `output`, or numbered."""
    count = sum(isinstance(part, int) for part in call.outputs)
    return ["output"] if count == 1 else [f"output_{number}" for number in range(count)]


def _pool_by_name(model: Any) -> None:
    """ReduceMean over height and width, which keeps both as 1, is GlobalAveragePool: that has a kernel in every layout
    of a runtime.
    """
    from onnx import helper, numpy_helper

    ranks = {
        value.name: len(value.type.tensor_type.shape.dim) for value in (*model.graph.value_info, *model.graph.input)
    }
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "ReduceMean" or len(node.input) < 2 or ranks.get(node.input[0]) != 4:
            continue
        flags = {attribute.name: attribute.i for attribute in node.attribute}
        axes = constants.get(node.input[1])
        if axes is None or not flags.get("keepdims", 1):
            continue
        if sorted(axis % 4 for axis in numpy_helper.to_array(axes).tolist()) == [2, 3]:
            node.CopyFrom(helper.make_node("GlobalAveragePool", node.input[:1], node.output, name=node.name))
    drop_unread(model)


def _reads(graph: Any) -> Iterator[str]:
    """Names of what the nodes of a graph read, those within branches and loops as well."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
                yield from _reads(inner)


def drop_unread(model: Any) -> None:
    """Take out constants that no node reads any more, in place; runtimes and their tools warn of them."""
    read = {*_reads(model.graph), *(result.name for result in model.graph.output)}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in read]:
        model.graph.initializer.remove(tensor)
