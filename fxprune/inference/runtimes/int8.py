"""int8 after pruning: a network in ONNX Runtime, OpenVINO or PyTorch with weights and activations of eight bits.

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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fxprune.calibration.agreement import hold_out, measure_agreement
from fxprune.calibration.batches import Calibration, read_batches
from fxprune.environment import has_vnni
from fxprune.errors import AccelerationError, CalibrationError, PoorAgreementWarning
from fxprune.inference.runtimes.inductor import InductorProgram
from fxprune.inference.runtimes.model import Program, RuntimeModel
from fxprune.inference.runtimes.onnx_based import as_arrays, refused
from fxprune.inference.runtimes.onnxruntime import OnnxRuntimeProgram
from fxprune.inference.runtimes.openvino import OpenVinoProgram, core_of
from fxprune.inference.runtimes.pt2e import by_torchao

QUANTIZATION = "quantization"
"""Key of `RuntimeModel.meta` under which an int8 model keeps its agreement with the float one."""


def quantize(model: RuntimeModel, calibration: Calibration) -> RuntimeModel:
    """Return the int8 form of a model that was accelerated for ONNX Runtime, OpenVINO or Inductor.

        fast = fxprune.accelerate(pruned, x, runtime="onnxruntime")
        small = fxprune.quantize(fast, images)
        print(small.meta["quantization"])  # agreement with `fast` on images that were held out
        small.save("model.int8.onnx")

    Args:
        model: what `fxprune.accelerate(runtime="onnxruntime" | "openvino" | "inductor")` returned. It is not changed.
        calibration: some hundred inputs without labels, as for `fxprune.compile`: a tensor `(N, ...)`, a `DataLoader`
            or any iterable of batches. An eighth is held out to judge by.

    Returns:
        A `RuntimeModel` that is called and saved as `model` is.

    Raises:
        AccelerationError: the model is no such one, or the tool is not installed or cannot take the network.
        CalibrationError: there are too few inputs, or they do not fit the model.

    Warns:
        PoorAgreementWarning: it agrees with the float model on less than 90 % of the inputs that were held out.
    """
    if not isinstance(model, RuntimeModel) or type(model.program) not in _TOOLS:
        found = getattr(model, "runtime", type(model).__name__)
        raise AccelerationError(
            f"{found} has no int8 form here; pass what fxprune.accelerate(model, x, runtime='onnxruntime'), 'openvino' "
            "or 'inductor' returned"
        )
    names = [spec.name for spec in model.call.specs]
    batches = read_batches(calibration, len(names), names)
    try:
        parts = hold_out(batches)
        if parts is None:
            raise CalibrationError(
                f"{len(batches)} batches cannot be divided; ranges are measured on some inputs and judged by others: "
                "pass some hundred"
            )
        fitted = [model.call.tensors(batch, {}) for batch in parts[0]]
    except AccelerationError as error:
        raise CalibrationError(f"a calibration batch does not fit the model: {error}") from error
    with _quiet():
        program = _TOOLS[type(model.program)](model.program, names, fitted)
    small = RuntimeModel(program, model.call, model.layers, model.is_pruned, model.gathers)
    agreement = measure_agreement(model, small, parts[1], lambda network, batch: network(*batch), held_out=True)
    small.meta[QUANTIZATION] = agreement
    if agreement is not None and agreement.is_poor:
        warnings.warn(
            f"int8: {agreement}; calibrate with more images, or deploy the float model",
            PoorAgreementWarning,
            stacklevel=2,
        )
    return small


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

    def read(self, core: Any) -> Any:
        """The model, as OpenVINO has it."""
        return core.read_model(self.model, self.weights)


class OnnxRuntimeInt8Program(OnnxRuntimeProgram):
    """A session on a graph with quantizing and dequantizing nodes, which ONNX Runtime fuses."""

    runtime = "onnxruntime, int8"


def _by_onnxruntime(program: OnnxRuntimeProgram, names: Sequence[str], batches: Sequence[list[Tensor]]) -> Program:
    """QDQ, weights by channel. Without VNNI instructions products of 8 bits saturate in 16, and weights get 7 bits, as
    the manual of ONNX Runtime advises ("Quantize ONNX models", When to use reduce-range and per-channel).
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
            quant_pre_process(str(given), str(ready), skip_symbolic_shape=True)
            quantize_static(
                str(ready),
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


def _by_nncf(program: OpenVinoProgram, names: Sequence[str], batches: Sequence[list[Tensor]]) -> Program:
    if importlib.util.find_spec("nncf") is None:
        raise AccelerationError("NNCF, which quantizes for OpenVINO, is not installed; pip install 'fxprune[int8]'")
    import nncf
    import openvino

    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "made.xml"
        try:
            model = program.read(core_of(os.getpid()))
            data = nncf.Dataset([as_arrays(tensors) for tensors in batches])
            openvino.save_model(nncf.quantize(model, data, subset_size=len(batches)), str(made), compress_to_fp16=False)
        except Exception as error:  # as above
            raise refused("NNCF", error) from error
        return OpenVinoInt8Program(made.read_bytes(), made.with_suffix(".bin").read_bytes())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the tools say of their progress and of parts of their own."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


_TOOLS: Mapping[type[Program], Any] = {
    OnnxRuntimeProgram: _by_onnxruntime,
    OpenVinoProgram: _by_nncf,
    InductorProgram: by_torchao,
}
