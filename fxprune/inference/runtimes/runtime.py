"""What a runtime is: something that computes a whole network."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxprune.graph.editing import calls
from fxprune.graph.fused import FusedConv2d
from fxprune.graph.layers import ChannelGather
from fxprune.inference.forms import operand_shapes
from fxprune.inference.runtimes.calls import CallForm
from fxprune.inference.runtimes.model import RuntimeModel
from fxprune.inference.runtimes.onnx_graphs import skeleton
from fxprune.inference.stopwatch import Stopwatch


@dataclass(frozen=True)
class Network:
    """What is to be built.

    Attributes:
        graph: fused, see `fxprune.inference.fused_graph`.
        inputs: arguments of forward, of the sizes to be fast for.
        stopwatch: what times the ways to compute a layer.
        progress: show bars on stderr.
        batches: typical inputs as lists of tensors, if it is to compute in integers.
    """

    graph: fx.GraphModule
    inputs: tuple[Any, ...]
    stopwatch: Stopwatch
    progress: bool = False
    batches: Sequence[Sequence[Tensor]] = ()

    @cached_property
    def call(self) -> CallForm:
        """How it is called.

        Raises:
            AccelerationError: not with tensors.
        """
        return CallForm.of(self.graph, self.inputs)

    @property
    def ranges(self) -> Sequence[Sequence[Tensor]]:
        """What ranges of activations are measured on: the batches, or the example where only times count."""
        return self.batches or [self.call.tensors(self.inputs, {})]

    @cached_property
    def onnx(self) -> Any:
        """It as an `onnx.ModelProto` without its convolutions, see `fxprune.inference.runtimes.onnx_graphs`.

        Raises:
            AccelerationError: it cannot be exported.
        """
        return skeleton(self.graph, self.call, self.inputs)

    @cached_property
    def shapes(self) -> Mapping[str, list[torch.Size]]:
        """Shapes of the operands of its convolutions, by node."""
        return operand_shapes(self.graph, self.inputs)

    @cached_property
    def is_pruned(self) -> bool:
        """Whether a layer has another form than its dense one."""
        return any(conv.dense_groups for _, conv in calls(self.graph, FusedConv2d))


def gathers_in(graph: fx.GraphModule) -> int:
    """How many gathers of channels a graph does, alone or in a convolution."""
    convs = [conv for _, conv in calls(graph, FusedConv2d)]
    return sum((conv.index is not None) + (conv.order is not None) for conv in convs) + len(
        list(calls(graph, ChannelGather))
    )


class Runtime:
    """Something that computes a whole network.

    Attributes:
        name: what users call it.
        packages: what must be installed, by the name that is imported.
        extra: what `pip install` needs to bring them.
    """

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why it cannot be used here for networks on that device in that type, with what to install; empty if it
        can.
        """
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if absent:
            return f"{' and '.join(absent)} not installed; pip install '{self.extra}'"
        if device.type != "cpu":
            return f"fxprune runs it on the CPU only, and the model is on {device.type}"
        if dtype != torch.float32:
            return (
                f"fxprune takes float32 models there, and this one is {str(dtype).removeprefix('torch.')}; pass it and "
                "its inputs in float32, as they were before a conversion"
            )
        return ""

    def remark(self) -> str:
        """What users should know of how it computes a network here; empty if there is nothing."""
        return ""

    def build(self, network: Network) -> dict[str, RuntimeModel]:
        """The network in this runtime: `"dense NAME"`, and `"pruned NAME"` if layers of it are pruned.

        Raises:
            AccelerationError: the runtime cannot take it.
        """
        raise NotImplementedError
