"""ONNX Runtime on the CPU: `.onnx`."""

import functools
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxprune.files import write_whole
from fxprune.inference.runtimes.model import Run
from fxprune.inference.runtimes.onnx_based import OnnxBased, OnnxProgram, as_arrays, refused


class OnnxRuntimeProgram(OnnxProgram):
    """A session of ONNX Runtime; sessions may be run by several threads."""

    runtime = "onnxruntime"
    suffixes = (".onnx",)

    @staticmethod
    def version() -> str:
        return str(_library().__version__)

    def load(self, threads: int) -> Run:
        ort = _library()
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3  # it warns of what it optimizes
        # Else its threads go on spinning after a run, and take the cores from whatever runs next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            session = ort.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common base
            raise refused("ONNX Runtime", error) from error
        return functools.partial(_run, session, [given.name for given in session.get_inputs()])

    def write(self, path: Path) -> None:
        write_whole(path, lambda partial: partial.write_bytes(self.model))


class OnnxRuntime(OnnxBased):
    """ONNX Runtime."""

    name = "onnxruntime"
    packages = ("onnx", "onnxscript", "onnxruntime")
    extra = "fxprune[onnx]"
    program: ClassVar[type[OnnxProgram]] = OnnxRuntimeProgram


def _library() -> Any:
    return importlib.import_module("onnxruntime")


def _run(session: Any, names: Sequence[str], tensors: Sequence[Tensor]) -> list[Tensor]:
    results = session.run(None, dict(zip(names, as_arrays(tensors), strict=True)))
    return [torch.from_numpy(result) for result in results]
