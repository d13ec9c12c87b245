"""The machine of `clock_harness`, on which runtimes take what the convolutions of their ONNX models compute."""

from collections.abc import Callable, Sequence

import pytest
from clock_harness import Clock
from torch import Tensor

from fxprune.inference.runtimes.onnx_based import OnnxProgram


class OnnxClock(Clock):
    """The same machine, on which a call of a program takes what the convolutions of its ONNX model compute."""

    def __init__(self, price: Callable[[bytes], float] | None = None) -> None:
        super().__init__()
        self.macs = 0.0
        self.runs = self.loaded = 0
        self.price = price or macs_of

    def seconds(self, call: Callable[[], object]) -> float:
        before = self.macs, self.runs
        of_modules = super().seconds(call)
        if self.runs == before[1]:
            return of_modules
        return self.busy * (1e-9 * (self.macs - before[0]) + 1e-6 * (self.runs - before[1]))

    def watch(self, patch: pytest.MonkeyPatch, program: type[OnnxProgram]) -> None:
        """Count what programs of a runtime compute."""
        load = program.load

        def counted(self_: OnnxProgram, threads: int) -> Callable[[Sequence[Tensor]], list[Tensor]]:
            run, macs = load(self_, threads), self.price(self_.model)
            self.loaded += 1

            def running(tensors: Sequence[Tensor]) -> list[Tensor]:
                self.macs += macs * len(tensors[0])
                self.runs += 1
                return run(tensors)

            return running

        patch.setattr(program, "load", counted)


def macs_of(serialized: bytes, weigh: Callable[[int, bool], float] = lambda groups, is_int8: 1.0) -> float:
    """Of the convolutions of an ONNX model, one image, each times what its number of groups and its type weigh."""
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(serialized))
    sizes = {initial.name: list(initial.dims) for initial in model.graph.initializer}
    values = (*model.graph.value_info, *model.graph.output)
    shapes = {value.name: [size.dim_value for size in value.type.tensor_type.shape.dim] for value in values}
    scaled = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    total = 0.0
    for node in model.graph.node:
        if node.op_type == "Conv":
            weight = scaled.get(node.input[1], node.input[1])
            filters, channels, height, width = sizes[weight]
            (groups,) = (attribute.i for attribute in node.attribute if attribute.name == "group")
            rows, columns = shapes[node.output[0]][2:]
            assert rows > 0
            weighed = weigh(groups, weight != node.input[1])
            total += weighed * filters * channels * height * width * rows * columns
    return total
