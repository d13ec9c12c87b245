"""What can compute a whole network beside plain PyTorch.

`runtime` says what a runtime is, `model` what it makes: a module that is called as the network is (`calls`). Two read
ONNX (`onnx_based`), which is made once (`onnx_graphs`) and filled with the forms of each layer (`onnx_layers`).
`contest` builds a network in all that are here, `precisions` says which compute in less than float32.
"""

from fxprune.inference.runtimes.inductor import Inductor
from fxprune.inference.runtimes.model import RuntimeModel
from fxprune.inference.runtimes.onnxruntime import OnnxRuntime
from fxprune.inference.runtimes.openvino import OpenVino
from fxprune.inference.runtimes.runtime import Runtime
from fxprune.inference.runtimes.tensorrt import TensorRt
from fxprune.inference.runtimes.torch_model import TorchModel

__all__ = ["AUTO", "OTHERS", "RUNTIMES", "TORCH", "Runtime", "RuntimeModel", "TorchModel"]

TORCH, AUTO = "torch", "auto"
OTHERS: dict[str, Runtime] = {runtime.name: runtime for runtime in (Inductor(), OnnxRuntime(), OpenVino(), TensorRt())}
"""Runtimes beside plain PyTorch, by name."""
RUNTIMES = (AUTO, TORCH, *OTHERS)
"""What `fxprune.accelerate` takes."""
