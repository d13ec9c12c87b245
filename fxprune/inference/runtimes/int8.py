"""int8 after pruning: a network in ONNX Runtime, OpenVINO or PyTorch with weights and activations of eight bits."""

from collections.abc import Sequence

from torch import Tensor, nn

from fxprune.calibration.agreement import hold_out, measure_agreement
from fxprune.calibration.batches import Batch, Calibration, read_batches
from fxprune.errors import AccelerationError, CalibrationError, PoorAgreementWarning, warn_user
from fxprune.inference.runtimes.calls import CallForm
from fxprune.inference.runtimes.int8_tools import TOOLS, quiet
from fxprune.inference.runtimes.model import RuntimeModel

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
    if not isinstance(model, RuntimeModel) or type(model.program) not in TOOLS:
        found = getattr(model, "runtime", type(model).__name__)
        raise AccelerationError(
            f"{found} has no int8 form here; pass what fxprune.accelerate(model, x, runtime='onnxruntime'), 'openvino' "
            "or 'inductor' returned, in float32"
        )
    names = [spec.name for spec in model.call.specs]
    fitted, held = divided(read_batches(calibration, len(names), names), model.call)
    with quiet():
        program = TOOLS[type(model.program)](model.program, names, fitted)
    small = RuntimeModel(program, model.call, model.layers, model.is_pruned, model.gathers)
    tell_agreement(small, model, held)
    return small


def divided(batches: Sequence[Batch], call: CallForm) -> tuple[list[list[Tensor]], list[Batch]]:
    """What ranges are measured on, as lists of tensors, and what is held out to judge by.

    Raises:
        CalibrationError: there are too few inputs, or they do not fit the model.
    """
    parts = hold_out(batches)
    if parts is None:
        raise CalibrationError(
            f"{len(batches)} batches cannot be divided; ranges are measured on some inputs and judged by others: "
            "pass some hundred"
        )
    try:
        return [call.tensors(batch, {}) for batch in parts[0]], parts[1]
    except AccelerationError as error:
        raise CalibrationError(f"a calibration batch does not fit the model: {error}") from error


def tell_agreement(small: RuntimeModel, model: nn.Module, held: Sequence[Batch]) -> None:
    """Keep how far an int8 model agrees with the float one on inputs that were held out, and warn if that is poor."""
    agreement = measure_agreement(model, small, held, lambda network, batch: network(*batch), held_out=True)
    small.meta[QUANTIZATION] = agreement
    if agreement is not None and agreement.is_poor:
        warn_user(f"int8: {agreement}; calibrate with more images, or deploy the float model", PoorAgreementWarning)
