"""A file of a network, run where there is nothing but its runtime and numpy."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

ALONE = """
import sys
sys.modules["torch"] = sys.modules["fxprune"] = None
import numpy
import {module}
x = numpy.load("x.npy")
{run}
numpy.save("y.npy", y)
try:
    import torch
except ImportError:
    print("alone", y.shape)
"""
ONNX_RUN = """
session = onnxruntime.InferenceSession({file!r}, providers=["CPUExecutionProvider"])
y, = session.run(None, {{session.get_inputs()[0].name: x}})
"""
OPENVINO_RUN = 'y = openvino.Core().compile_model({file!r}, "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})(x)[0]'
RUN = {"onnxruntime": ONNX_RUN, "openvino": OPENVINO_RUN}
SUFFIX = {"onnxruntime": ".onnx", "openvino": ".xml"}


def run_alone(runtime: str, file: Path, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What the network in `file` gives for `x` in a process that can import neither torch nor fxprune."""
    folder = file.parent
    np.save(folder / "x.npy", x)
    program = ALONE.format(module=runtime, run=RUN[runtime].format(file=file.name))
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    y: npt.NDArray[np.float32] = np.load(folder / "y.npy")
    assert done.stdout.strip() == f"alone {y.shape}"
    return y
