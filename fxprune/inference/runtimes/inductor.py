"""TorchInductor, the compiler of PyTorch, with frozen weights: `.pt2`."""

import copy
import shutil
import threading
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import AccelerationError
from fxprune.files import write_whole
from fxprune.graph.editing import calls
from fxprune.graph.fused import FusedConv2d
from fxprune.graph.values import first_line
from fxprune.inference.forking import check_fork, forks
from fxprune.inference.runtimes.calls import Flat, TensorSpec
from fxprune.inference.runtimes.model import Program, Run, RuntimeModel
from fxprune.inference.runtimes.plain_layers import in_plain_layers
from fxprune.inference.runtimes.runtime import Network, Runtime, gathers_in


class InductorProgram(Program):
    """A network that is compiled for the number of images of the example; others run it as it is.

    Args:
        network: takes and gives tensors one after another.
        specs: what the inputs are.
    """

    runtime = "inductor"
    suffixes = (".pt2",)

    def __init__(self, network: nn.Module, specs: Sequence[TensorSpec]) -> None:
        super().__init__()
        self.network, self.specs = network, tuple(specs)
        self.shapes = [spec.shape for spec in specs]
        self.forks = forks()

    def load(self, threads: int) -> Run:
        return _Compiled(_sharing_tensors(self.network), self.shapes, self.forks)

    def write(self, path: Path) -> None:
        with warnings.catch_warnings(), torch.no_grad(), torch._inductor.config.patch(freezing=True):
            warnings.simplefilter("ignore")  # the exporter warns of deprecated parts of its own
            try:
                program = exported(self.network, self.specs)
                write_whole(path, lambda partial: _package(program, partial))
            except OSError:
                raise
            except Exception as error:  # a compiler raises whatever its many parts do
                raise AccelerationError(f"Inductor cannot compile ahead of time: {first_line(error)}") from error


class _Compiled:
    """What runs a network: compiled, at the first call that fits, for inputs of some shapes, and as it is for others.

    Args:
        network: nobody else's, but for its tensors.
        shapes: of the inputs.
        forks: how often the process had been forked when it was made.
    """

    def __init__(self, network: nn.Module, shapes: Sequence[tuple[int, ...]], forks: int) -> None:
        self.network, self.shapes, self.forks = network, list(shapes), forks
        self.compiled: Callable[..., Sequence[Tensor]] | None = None
        self.lock = threading.Lock()

    @torch.no_grad()
    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        check_fork(self.forks)
        given = [in_format(tensor) for tensor in tensors]
        if [tuple(tensor.shape) for tensor in given] != self.shapes:
            return list(self.network(*given))
        if self.compiled is None:
            with self.lock:
                self.compiled = self.compiled or frozen(self.network, given)
        return list(self.compiled(*given))


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
            program = InductorProgram(in_plain_layers(Flat(graph, network.call)), network.call.specs)
            name = f"{'pruned' if is_pruned else 'dense'} {self.name}"
            built[name] = RuntimeModel(program, network.call, (), is_pruned, gathers_in(graph))
        return built


def frozen(network: nn.Module, given: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """A network, compiled for inputs of these shapes with its weights as constants, which oneDNN packs once.

    As an option of `torch.compile` freezing comes too late (2.15): the weights are inputs of the compiled graph by then
    and nothing is packed. So it is set for all while the first call compiles.

    Raises:
        AccelerationError: it cannot be compiled.
    """
    compiled: Callable[..., Sequence[Tensor]] = torch.compile(with_own_code(network), dynamic=False, fullgraph=True)
    with warnings.catch_warnings(), torch._inductor.config.patch(freezing=True):
        warnings.simplefilter("ignore")  # the compiler warns of parts of its own
        try:
            compiled(*given)
        except Exception as error:  # it raises whatever its many parts do
            raise AccelerationError(f"Inductor cannot compile the network: {first_line(error)}") from error
    return compiled


def with_own_code(network: nn.Module) -> Callable[..., Sequence[Tensor]]:
    """A function that calls a network, with a code object of its own: Dynamo keeps what it compiled by code object,
    looks through all of it at each call, and takes 8 at most, over all networks whose forward is the same.
    """

    def forward(*tensors: Tensor) -> Sequence[Tensor]:
        found: Sequence[Tensor] = network(*tensors)
        return found

    return types.FunctionType(
        forward.__code__.replace(), forward.__globals__, forward.__name__, None, forward.__closure__
    )


def exported(network: nn.Module, specs: Sequence[TensorSpec]) -> torch.export.ExportedProgram:
    """A network whose forward takes `*tensors` as an exported program; the number of images stays free where it is."""
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} if spec.batched else {} for spec in specs)
    sizes = [(2, *spec.shape[1:]) if spec.batched else spec.shape for spec in specs]
    examples = tuple(torch.zeros(size, dtype=spec.dtype) for size, spec in zip(sizes, specs, strict=True))
    return torch.export.export(network, examples, dynamic_shapes=(shapes,))


def _sharing_tensors(network: nn.Module) -> nn.Module:
    """A copy for the compiler, which keeps what it makes of a module by the module, with the same weights."""
    tensors = (*network.parameters(), *network.buffers())
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})


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
