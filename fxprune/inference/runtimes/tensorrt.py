"""TensorRT: not yet. What it would need is said; nothing is done that could not be tried."""

import importlib.util

import torch

from fxprune.inference.runtimes.runtime import Runtime


class TensorRt(Runtime):
    """TensorRT, which fxprune does not run."""

    name = "tensorrt"

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str:
        absent = importlib.util.find_spec("tensorrt") is None
        install = "pip install tensorrt, then " if absent else ""
        return (
            "fxprune does not run it yet; export the compiled model with fxprune.exports.save_onnx (pip install "
            f"'fxprune[onnx]'), {install}build the engine with trtexec --onnx=FILE"
        )
