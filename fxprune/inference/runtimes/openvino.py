"""OpenVINO on the CPU: its intermediate representation, `.xml` with the weights beside it in `.bin`."""

import ctypes
import functools
import importlib
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from fxprune.inference.runtimes.model import Run
from fxprune.inference.runtimes.onnx_based import OnnxBased, OnnxProgram, as_arrays, refused
from fxprune.inference.runtimes.onnx_graphs import drop_unread

MOST_SIZES = 8
"""Numbers of images for which a model is compiled; with a free one OpenVINO makes slower code. More share that."""


class OpenVinoProgram(OnnxProgram):
    """A model of OpenVINO, compiled for each number of images that is used."""

    runtime = "openvino"
    suffixes = (".xml",)
    computes_in = "f32"  # the default is bfloat16 where the processor has it

    @classmethod
    def of(cls, model: Any) -> Self:
        """The program of an ONNX model, whose permutations of channels OpenVINO will not take for its own to move."""
        hide_permutations(model)
        return super().of(model)

    @staticmethod
    def version() -> str:
        return str(_library().__version__)

    def load(self, threads: int) -> Run:
        try:
            core = core_of(os.getpid())
            return _Compiled(core, functools.partial(core.read_model, *self.parts()), threads, self.computes_in)
        except Exception as error:  # its exceptions have no common base
            raise refused("OpenVINO", error) from error

    def read(self, core: Any) -> Any:
        """The model, as OpenVINO has it."""
        return core.read_model(*self.parts())

    def parts(self) -> tuple[bytes, ...]:
        """What it is read from."""
        return (self.model,)

    def write(self, path: Path) -> None:
        library = _library()
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:  # whole or not at all
            made = Path(scratch) / path.name
            library.save_model(self.read(core_of(os.getpid())), str(made), compress_to_fp16=False)
            os.replace(made.with_suffix(".bin"), path.with_suffix(".bin"))
            os.replace(made, path)


class OpenVinoBfloat16Program(OpenVinoProgram):
    """The same, computed in bfloat16: weights and what it takes and gives are float32."""

    runtime = "openvino, bfloat16"
    computes_in = "bf16"


class OpenVino(OnnxBased):
    """OpenVINO."""

    name = "openvino"
    packages = ("onnx", "onnxscript", "openvino")
    extra = "fxprune[openvino]"
    program: ClassVar[type[OnnxProgram]] = OpenVinoProgram

    def remark(self) -> str:
        if not prefers_bfloat16():
            return ""
        return (
            "OpenVINO is held to float32, as the model is; by default it computes in bfloat16 on this processor, which "
            "is faster and less exact: precision='bfloat16' does that"
        )


class OpenVinoBfloat16(OpenVino):
    """OpenVINO in bfloat16, the default of its own on processors that have it."""

    name = "openvino bfloat16"
    program = OpenVinoBfloat16Program

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str:
        reason = super().obstacle(device, dtype)
        if not reason and not has_bfloat16():
            return "this processor has no instructions for bfloat16; leave precision out"
        return reason

    def remark(self) -> str:
        return ""


class _Compiled:
    """What runs a model for inputs of any size that it takes.

    Args:
        core: what compiles.
        read: gives the model anew; it is not kept, for it holds all weights, which what is compiled has as well.
        threads: to run with.
        computes_in: the type, `"f32"` or `"bf16"`.
    """

    def __init__(self, core: Any, read: Callable[[], Any], threads: int, computes_in: str) -> None:
        self.core, self.read = core, read
        self.compiled: dict[tuple[tuple[int, ...], ...], Any] = {}
        read()  # that it cannot be read is to be known now
        self.options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": computes_in,
        }
        self.lock = threading.Lock()
        self.requests: dict[tuple[int, Any], Any] = {}  # of each thread: a request serves one at a time

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        mine = threading.get_ident(), shapes
        request = self.requests.get(mine)
        if request is None:
            with self.lock:
                request = self.requests[mine] = self._compiled(shapes).create_infer_request()
        results = request.infer(as_arrays(tensors), share_inputs=True, share_outputs=False)
        return [torch.from_numpy(results[place]) for place in range(len(results))]

    def _compiled(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        """The model for inputs of these shapes, or, if there are too many already, for any."""
        if shapes not in self.compiled and len(self.compiled) >= MOST_SIZES:
            shapes = ()
        if shapes not in self.compiled:
            model = self.read()
            if shapes:
                model.reshape(dict(zip(model.inputs, shapes, strict=True)))
            self.compiled[shapes] = self.core.compile_model(model, "CPU", self.options)
        return self.compiled[shapes]


def hide_permutations(model: Any) -> None:
    """Give each permutation of channels a second axis, and take that off again, in place.

    OpenVINO (2026.4) moves a Gather of all channels into the weights of a dense convolution that reads it, also behind
    a ReLU or a depthwise convolution, as it does where a picture is to be BGR; but it permutes the weights by the order
    itself, not by its inverse, so that the network computes something else unless the order is its own inverse. It does
    not see through a change of the rank.
    """
    from onnx import helper, numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        model.graph.node.append(node)
        if node.op_type != "Gather" or node.input[1] not in constants or [a.i for a in node.attribute] != [1]:
            continue
        order = numpy_helper.to_array(constants[node.input[1]])
        if order.ndim != 1 or sorted(order.tolist()) != list(range(len(order))):
            continue
        name = node.output[0]
        made = model.graph.node[-1]
        made.input[1], made.output[0] = f"{name}_order", f"{name}_deep"
        model.graph.initializer.append(numpy_helper.from_array(order[None], f"{name}_order"))
        model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), f"{name}_axis"))
        model.graph.node.append(helper.make_node("Squeeze", [f"{name}_deep", f"{name}_axis"], [name]))
    drop_unread(model)


def has_bfloat16() -> bool:
    """Whether OpenVINO finds instructions for bfloat16 in the processor: AVX-512, or AMX."""
    return "BF16" in core_of(os.getpid()).get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def prefers_bfloat16() -> bool:
    """Whether that is what OpenVINO computes float32 models in here if nobody says otherwise."""
    default = core_of(os.getpid()).get_property("CPU", "INFERENCE_PRECISION_HINT")
    return bool(default == _library().Type.bf16)


@functools.cache
def core_of(process: int) -> Any:
    """The one core of a process, which never ends.

    Each core installs a stack for signal handlers as it compiles, and puts back the one before as it ends: of several
    that do not end in reverse order a stack remains that is gone, and the next signal kills the process (2026.4). In a
    forked process the parent's core would wait for threads that are not there.
    """
    core = _library().Core()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(core))
    return core


def _library() -> Any:
    return importlib.import_module("openvino")
