"""Write a compiled model in the formats of other runtimes: TorchScript and ONNX."""

import importlib.util
import io
import os
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fxprune.errors import FxpruneError, StorageError
from fxprune.files import write_whole
from fxprune.graph.examples import Inputs, as_inputs
from fxprune.inference.runtimes.openvino import hide_permutations

# What torch.jit says of any GraphModule: that the format is deprecated (since torch 2.10), and that it does not like an
# annotation in GraphModule.__init__. Who asks for the format by name need not be told.
TORCHSCRIPT_WARNINGS = (
    r"`torch\.jit\.\w+` is (deprecated|not supported in Python 3\.14\+)",
    "The TorchScript type system doesn't support instance-level annotations",
)


def save_torchscript(model: nn.Module, path: str | os.PathLike[str]) -> torch.jit.ScriptModule:
    """Script `model`, save it, and return what `torch.jit.load` makes of the file.

    Raises:
        FxpruneError: TorchScript cannot compile the forward of a user's own module.
        StorageError: the file cannot be written.
    """
    with warnings.catch_warnings():
        for message in TORCHSCRIPT_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        try:
            scripted = torch.jit.script(model)
        except Exception as error:  # it raises whatever its parser does
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise FxpruneError(
                f"TorchScript cannot compile {type(model).__name__} ({first}); export it with torch.export or ONNX, or "
                "compile with output='graph' if it can be traced"
            ) from error
        _write(path, lambda partial: torch.jit.save(scripted, partial))
        loaded: torch.jit.ScriptModule = torch.jit.load(path)  # type: ignore[no-untyped-call]
    return loaded


def save_onnx(model: nn.Module, inputs: Inputs, path: str | os.PathLike[str]) -> None:
    """Export `model` to one ONNX file whose batch size, the first dimension of each input, is free.

    Args:
        model: whatever `torch.export` takes.
        inputs: arguments of forward, see `fxprune.compile`: a tensor, a tuple by position, or a dict by name.
        path: of the file.

    Permutations of channels that remain have a second axis for a moment, so that OpenVINO computes them rightly, see
    `fxprune.inference.runtimes.openvino.hide_permutations`.

    Raises:
        FxpruneError: onnx or onnxscript is not installed, or the exporter cannot express the model.
        TraceError: forward takes an argument by name only.
        StorageError: the file cannot be written.
    """
    check_onnx()
    arguments, batch = as_inputs(inputs, model), torch.export.Dim("batch")
    free = tree_map(lambda leaf: {0: batch} if isinstance(leaf, Tensor) and leaf.dim() else None, arguments)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter warns of deprecated parts of its own
        try:
            program = torch.onnx.export(
                model,
                arguments,
                dynamo=True,
                dynamic_shapes=free,
                verbose=False,
            )
        except Exception as error:  # it wraps whatever torch.export raises, over pages
            said = str(error).rpartition("## Exception summary")[2].strip()
            first = next(iter(said.splitlines()), type(error).__name__)
            raise FxpruneError(
                f"ONNX: the exporter cannot express {type(model).__name__} ({first}); torch.export.export(model, "
                "inputs) says more"
            ) from error
        assert program is not None
        exported = program.model_proto
        hide_permutations(exported)  # who reads the file is not known
        _write(path, lambda partial: partial.write_bytes(exported.SerializeToString()))


def check_onnx() -> None:
    """See that ONNX files can be written here.

    Raises:
        FxpruneError: onnx or onnxscript is not installed.
    """
    absent = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if absent:
        raise FxpruneError(f"ONNX export: {' and '.join(absent)} not installed; pip install 'fxprune[onnx]'")


def _write(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    target = Path(path)
    try:
        write_whole(target, write)
    except (OSError, RuntimeError) as error:
        raise StorageError(f"{target} cannot be written: {error}; choose another place") from error
