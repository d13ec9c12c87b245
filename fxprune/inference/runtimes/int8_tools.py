"""What makes integers of a program: the tool of each runtime, and runtimes in which every network is quantized.

Static quantization: ranges of activations are measured on calibration images, weights are scaled filter by filter
(Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR
2018). The tools are those of the runtimes: `onnxruntime.quantization`, NNCF, and torchao for Inductor.
"""

import contextlib
import importlib.util
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from fxprune.environment import has_vnni
from fxprune.errors import AccelerationError
from fxprune.inference.runtimes.inductor import InductorProgram
from fxprune.inference.runtimes.model import Program
from fxprune.inference.runtimes.onnx_based import OnnxBased, OnnxProgram, as_arrays, refused
from fxprune.inference.runtimes.onnxruntime import OnnxRuntime, OnnxRuntimeProgram
from fxprune.inference.runtimes.openvino import OpenVino, OpenVinoProgram, core_of
from fxprune.inference.runtimes.pt2e import by_torchao

Tool: TypeAlias = Callable[[Any, Sequence[str], Sequence[Sequence[Tensor]]], Program]
"""Makes a program in integers of one in float32, of the names of its inputs and of batches of these."""


class OpenVinoInt8Program(OpenVinoProgram):
    """A quantized model of OpenVINO, in its own representation.

    Args:
        model: its structure, XML.
        weights: its constants.
    """

    runtime = "openvino, int8"

    def __init__(self, model: bytes, weights: bytes) -> None:
        super().__init__(model)
        self.weights = weights

    def parts(self) -> tuple[bytes, ...]:
        """Structure and constants."""
        return self.model, self.weights


class OnnxRuntimeInt8Program(OnnxRuntimeProgram):
    """A session on a graph with quantizing and dequantizing nodes, which ONNX Runtime fuses."""

    runtime = "onnxruntime, int8"


def by_onnxruntime(
    program: OnnxRuntimeProgram, names: Sequence[str], batches: Sequence[Sequence[Tensor]], fine: bool = True
) -> OnnxRuntimeInt8Program:
    """QDQ, weights by channel. Without VNNI instructions products of 8 bits saturate in 16, and weights get 7 bits, as
    the manual of ONNX Runtime advises ("Quantize ONNX models", When to use reduce-range and per-channel). Without
    `fine` the graph is taken as it is, where nothing in it has to be folded first.

    Raises:
        AccelerationError: it cannot take the network.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    feeds = iter([dict(zip(names, as_arrays(tensors), strict=True)) for tensors in batches])

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # the package has no types
        def get_next(self) -> Mapping[str, Any] | None:
            return next(feeds, None)

    with tempfile.TemporaryDirectory() as scratch:
        given, ready, made = (Path(scratch) / f"{name}.onnx" for name in ("given", "ready", "made"))
        given.write_bytes(program.model)
        try:
            if fine:
                quant_pre_process(str(given), str(ready), skip_symbolic_shape=True)
            quantize_static(
                str(ready if fine else given),
                str(made),
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=not has_vnni(),
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        except Exception as error:  # whatever the tool does with a network it does not know
            raise refused("onnxruntime.quantization", error) from error
        return OnnxRuntimeInt8Program(made.read_bytes())


def by_nncf(
    program: OpenVinoProgram, names: Sequence[str], batches: Sequence[Sequence[Tensor]], fine: bool = True
) -> OpenVinoInt8Program:
    """NNCF; without `fine` biases are not corrected for the error of the weights, which takes most of its time.

    Raises:
        AccelerationError: NNCF is not installed, or cannot take the network.
    """
    if importlib.util.find_spec("nncf") is None:
        raise AccelerationError("NNCF, which quantizes for OpenVINO, is not installed; pip install 'fxprune[int8]'")
    import nncf
    import openvino

    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "made.xml"
        try:
            model = program.read(core_of(os.getpid()))
            data = nncf.Dataset([as_arrays(tensors) for tensors in batches])
            found = nncf.quantize(
                model,
                data,
                subset_size=len(batches),
                advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=not fine),
            )
            openvino.save_model(found, str(made), compress_to_fp16=False)
        except Exception as error:  # as above
            raise refused("NNCF", error) from error
        return OpenVinoInt8Program(made.read_bytes(), made.with_suffix(".bin").read_bytes())


class _InIntegers(OnnxBased):
    """A runtime in which every program, of a network or of a single layer, is quantized."""

    tool: ClassVar[Callable[..., OnnxProgram]]
    quantizers: ClassVar[tuple[str, ...]] = ()

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str:
        absent = [name for name in self.quantizers if importlib.util.find_spec(name) is None]
        if absent:
            return f"{' and '.join(absent)} not installed; pip install 'fxprune[int8]'"
        return super().obstacle(device, dtype)

    def made(self, model: Any, batches: Sequence[Sequence[Tensor]], fine: bool) -> OnnxProgram:
        program = super().made(model, batches, fine)
        names = [given.name for given in model.graph.input]
        with quiet():
            return type(self).tool(program, names, batches, fine)


class OnnxRuntimeInt8(_InIntegers, OnnxRuntime):
    """ONNX Runtime in integers."""

    name = "onnxruntime int8"
    tool = by_onnxruntime


class OpenVinoInt8(_InIntegers, OpenVino):
    """OpenVINO in integers."""

    name = "openvino int8"
    quantizers = ("nncf",)
    tool = by_nncf


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep back what the tools say of their progress and of parts of their own."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


TOOLS: Mapping[type[Program], Tool] = {
    OnnxRuntimeProgram: by_onnxruntime,
    OpenVinoProgram: by_nncf,
    InductorProgram: by_torchao,
}
"""By the type of what they quantize."""
IN_INTEGERS: Mapping[str, OnnxBased] = {"onnxruntime": OnnxRuntimeInt8(), "openvino": OpenVinoInt8()}
"""Runtimes in integers, by the name of that in float32."""
