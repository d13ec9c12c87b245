"""TorchInductor, the compiler of PyTorch, with frozen weights: `.pt2`."""

import copy
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.errors import AccelerationError
from fxprune.files import write_whole
from fxprune.graph.editing import calls
from fxprune.graph.fused import FusedConv2d
from fxprune.graph.values import first_line
from fxprune.inference.forking import check_fork, forks
from fxprune.inference.runtimes.calls import CallForm, Flat
from fxprune.inference.runtimes.model import Program, Run, RuntimeModel
from fxprune.inference.runtimes.runtime import Network, Runtime, gathers_in


class InductorProgram(Program):
    """A graph that is compiled for the number of images of the example; others run it as it is.

    Args:
        graph: with fused convolutions in their plain form.
        call: how it is called.
    """

    runtime = "inductor"
    suffixes = (".pt2",)

    def __init__(self, graph: fx.GraphModule, call: CallForm) -> None:
        super().__init__()
        self.network = Flat(graph, call).eval().requires_grad_(False)
        self.shapes = [spec.shape for spec in call.specs]
        self.forks = forks()

    def load(self, threads: int) -> Run:
        plain = copy.deepcopy(self.network)
        compiled = torch.compile(plain, dynamic=False, fullgraph=True, options={"freezing": True})

        @torch.no_grad()
        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            check_fork(self.forks)
            given = [in_format(tensor) for tensor in tensors]
            if [tuple(tensor.shape) for tensor in given] != self.shapes:
                return list(plain(*given))
            try:
                return list(compiled(*given))
            except Exception as error:  # at the first call it compiles, and raises whatever its many parts do
                raise AccelerationError(f"Inductor cannot compile the network: {first_line(error)}") from error

        return run

    def write(self, path: Path) -> None:
        call = self.network.call
        batch = torch.export.Dim("batch")
        shapes = tuple({0: batch} if spec.batched else {} for spec in call.specs)
        sizes = [(2, *spec.shape[1:]) if spec.batched else spec.shape for spec in call.specs]
        tensors = tuple(torch.zeros(size, dtype=spec.dtype) for size, spec in zip(sizes, call.specs, strict=True))
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter warns of deprecated parts of its own
            try:
                exported = torch.export.export(self.network, tensors, dynamic_shapes=(shapes,))
                write_whole(path, lambda partial: _package(exported, partial))
            except OSError:
                raise
            except Exception as error:  # a compiler raises whatever its many parts do
                raise AccelerationError(f"Inductor cannot compile ahead of time: {first_line(error)}") from error


class Inductor(Runtime):
    """TorchInductor."""

    name = "inductor"

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str:
        if not any(map(shutil.which, ("g++", "clang++", "c++"))):
            return "it needs a C++ compiler; install g++ or clang++"
        if device.type != "cpu":
            return super().obstacle(device, dtype)
        return ""

    def build(self, network: Network) -> dict[str, RuntimeModel]:
        built = {}
        for is_pruned in (False, True) if network.is_pruned else (False,):
            graph = copy.deepcopy(network.graph)
            for node, conv in list(calls(graph, FusedConv2d)):
                if conv.dense_groups and not is_pruned:
                    parent, _, child = str(node.target).rpartition(".")
                    setattr(graph.get_submodule(parent), child, conv.dense().eval())
            program = InductorProgram(graph, network.call)
            name = f"{'pruned' if is_pruned else 'dense'} {self.name}"
            built[name] = RuntimeModel(program, network.call, (), is_pruned, gathers_in(graph))
        return built


def in_format(tensor: Tensor) -> Tensor:
    """The tensor without its history, images in channels_last: what Inductor's convolutions are fastest in."""
    tensor = tensor.detach()
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor.contiguous()


def _package(exported: Any, path: Path) -> None:
    """Compile ahead of time."""
    scratch = path.with_suffix(".pt2")  # it insists on the name
    try:
        torch._inductor.aoti_compile_and_package(exported, package_path=str(scratch))
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
