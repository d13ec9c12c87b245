"""What the runtimes that read ONNX have in common: each layer in the form that is fastest there, by timing it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from tqdm import tqdm

from fxprune.errors import AccelerationError
from fxprune.graph.editing import calls
from fxprune.graph.fused import FusedConv2d
from fxprune.inference.forms import form_key
from fxprune.inference.instructions import forced_isa
from fxprune.inference.reporting import LayerChoice
from fxprune.inference.runtimes.model import Program, RuntimeModel
from fxprune.inference.runtimes.onnx_graphs import filled, passing_on, single_layer
from fxprune.inference.runtimes.onnx_layers import DENSE, GROUPED, forms_of
from fxprune.inference.runtimes.runtime import Network, Runtime


class OnnxBased(Runtime):
    """A runtime that reads ONNX.

    Attributes:
        program: makes a program of a serialized ONNX model.
    """

    program: ClassVar[type["OnnxProgram"]]

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str:
        if isa := forced_isa():
            return f"fxprune cannot keep it within FXPRUNE_ISA={isa}; unset that"
        if not hasattr(torch.onnx, "ops"):
            return f"it needs torch 2.8 or newer, and this is {torch.__version__}; pip install -U torch"
        return super().obstacle(device, dtype)

    def build(self, network: Network) -> dict[str, RuntimeModel]:
        found = [
            (node.name, conv, self._choice(network, node.name, str(node.target).removesuffix("_fused"), conv))
            for node, conv in tqdm(
                list(calls(network.graph, FusedConv2d)),
                desc=f"timing in {self.name}",
                disable=not network.progress,
                leave=False,
            )
        ]
        wanted = {f"dense {self.name}": [DENSE for _ in found]}
        if network.is_pruned:
            # What is best layer by layer, and, as layers have neighbours, all layers grouped: the race decides.
            wanted[f"pruned {self.name}"] = [choice.chosen for _, _, choice in found]
            wanted[f"pruned {self.name} grouped"] = [GROUPED if conv.dense_groups else DENSE for _, conv, _ in found]
        built: dict[str, RuntimeModel] = {}
        seen: list[list[str]] = []
        for name, forms in wanted.items():
            if forms in seen:
                continue
            seen.append(forms)
            layers = {node: (conv, form) for (node, conv, _), form in zip(found, forms, strict=True)}
            model = filled(network.onnx, layers)
            gathers = sum(node.op_type == "Gather" for node in model.graph.node)
            program = self.made(model, network.ranges, fine=True)
            choices = tuple(choice.of(form) for (_, _, choice), form in zip(found, forms, strict=True))
            built[name] = RuntimeModel(program, network.call, choices, not name.startswith("dense"), gathers)
        return built

    def made(self, model: Any, batches: Sequence[Sequence[Tensor]], fine: bool) -> "OnnxProgram":
        """The program of an `onnx.ModelProto`, which may be changed.

        Args:
            model: of a network or of one layer.
            batches: typical inputs, for runtimes that quantize.
            fine: whether numbers count, not the time alone.
        """
        return self.program.of(model)

    def _choice(self, network: Network, node: str, name: str, conv: FusedConv2d) -> LayerChoice:
        """Time the forms of a layer."""
        shapes = network.shapes[node]
        keys = {self.layer_key(conv, form, shapes): form for form in forms_of(conv)}
        timed = network.stopwatch.times(keys)
        if timed is None:
            timed = network.stopwatch.race({key: self.layer_call(conv, form, shapes) for key, form in keys.items()})
        seconds = {form: timed[key] for key, form in keys.items()}
        return LayerChoice(name, tuple(shapes[0]), min(seconds, key=seconds.__getitem__), seconds, {})

    def layer_key(self, conv: FusedConv2d, form: str, shapes: Sequence[torch.Size]) -> str:
        """All that the time of a layer between neighbours depends on, but for the machine."""
        key = form_key(form, conv, list(shapes), torch.contiguous_format)  # type: ignore[arg-type]  # only its name counts
        return f"{self.name} {self.program.version()} {key}"

    def layer_call(self, conv: FusedConv2d, form: str, shapes: Sequence[Sequence[int]]) -> Callable[[], object]:
        """A call of a layer, between neighbours, on random inputs."""
        return self._call(single_layer(conv, form, shapes), shapes)

    def neighbours_key(self, shape: Sequence[int], count: int) -> str:
        """All that the time of neighbours alone depends on, but for the machine."""
        return f"{self.name} {self.program.version()} {count} neighbours {list(shape)}"

    def neighbours_call(self, shape: Sequence[int], count: int) -> Callable[[], object]:
        """A call of so many neighbours in a row: what a layer between them takes is the difference."""
        return self._call(passing_on(shape, count), [shape])

    def _call(self, model: Any, shapes: Sequence[Sequence[int]]) -> Callable[[], object]:
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(tuple(shape), generator=generator) for shape in shapes]
        run = self.made(model, [inputs], fine=False).load(torch.get_num_threads())
        return functools.partial(run, inputs)


class OnnxProgram(Program):
    """A program made of an ONNX model.

    Args:
        model: serialized.
    """

    def __init__(self, model: bytes) -> None:
        super().__init__()
        self.model = model

    @classmethod
    def of(cls, model: Any) -> Self:
        """The program of an `onnx.ModelProto`, which may be changed."""
        return cls(model.SerializeToString())

    @staticmethod
    def version() -> str:
        """Of the runtime: measured times hold for it alone."""
        raise NotImplementedError


def as_arrays(tensors: Sequence[Tensor]) -> list[Any]:
    """NumPy arrays of tensors, without a copy where they are contiguous."""
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


def refused(runtime: str, error: Exception) -> AccelerationError:
    """What a runtime said of a network, as an error of ours."""
    said = " ".join(str(error).split())[:300] or type(error).__name__
    return AccelerationError(f"{runtime} cannot take the network: {said}")
