"""Runtimes that compute a float32 network in less than float32."""

from collections.abc import Mapping
from typing import Literal, get_args

from fxprune.inference.runtimes import OTHERS
from fxprune.inference.runtimes.int8_tools import IN_INTEGERS
from fxprune.inference.runtimes.onnx_based import OnnxBased
from fxprune.inference.runtimes.openvino import OpenVinoBfloat16
from fxprune.inference.runtimes.runtime import Runtime
from fxprune.vocabulary import Precision

INT8: Literal["int8"] = "int8"
BFLOAT16: Literal["bfloat16"] = "bfloat16"
LESS_PRECISE: Mapping[str, Mapping[str, OnnxBased]] = {INT8: IN_INTEGERS, BFLOAT16: {"openvino": OpenVinoBfloat16()}}
"""By precision and the name of the runtime in float32."""

INSTEAD = {
    INT8: "fxprune.quantize(fxprune.accelerate(pruned, x, runtime='inductor'), images)",
    BFLOAT16: "fxprune.accelerate(copy.deepcopy(pruned).bfloat16(), x.bfloat16())",
}
"""How it goes in PyTorch."""


def precision_obstacle(runtime: str, precision: str) -> str:
    """Why there is no such precision, or not in a runtime; empty if there is, here or elsewhere."""
    if precision not in get_args(Precision):
        known = " or ".join(map(repr, get_args(Precision)))
        return f"precision is {precision!r}; it must be {known}, or None for that of the model"
    if runtime in LESS_PRECISE[precision]:
        return ""
    known = " or ".join(map(repr, LESS_PRECISE[precision]))
    return (
        f"precision={precision!r} is for runtime={known}, and the network shall run in {runtime!r}; name "
        f"{'one of them' if ' or ' in known else 'it'}. In PyTorch: {INSTEAD[precision]}"
    )


def runtime_in(name: str, precision: str | None) -> Runtime:
    """What computes a network in a runtime, in a precision that it has; None is float32."""
    return OTHERS[name] if precision is None else LESS_PRECISE[precision][name]
