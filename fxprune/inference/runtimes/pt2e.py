"""int8 in PyTorch itself: an exported graph, torchao's quantizer for x86 processors, TorchInductor.

The road is that of PyTorch 2 export quantization ("PyTorch 2 Export Quantization with X86 Backend through Inductor" in
the tutorials of torchao): export, prepare with observers, calibrate, convert, compile with frozen weights. What comes
of it computes convolutions and linear layers in oneDNN on 8 bits, grouped ones as well; gathers are done in float32.
"""

import importlib
import importlib.util
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.environment import has_vnni
from fxprune.errors import AccelerationError
from fxprune.inference.runtimes.inductor import InductorProgram, exported, in_format
from fxprune.inference.runtimes.onnx_based import refused

QUANTIZER = "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer"
"""Importing it registers the operators of a quantized graph, and teaches Inductor to fuse them."""


class InductorInt8Program(InductorProgram):
    """A converted graph. It is kept as `torch.export.save` writes it: a graph module of quantized operators has no
    pickle.
    """

    runtime = "inductor, int8"

    def __getstate__(self) -> dict[str, Any]:
        kept = io.BytesIO()
        torch.export.save(exported(self.network, self.specs), kept)
        return {**super().__getstate__(), "network": kept.getvalue()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        importlib.import_module(QUANTIZER)
        network = torch.export.load(io.BytesIO(state["network"])).module()
        super().__setstate__({**state, "network": _Starred(network)})


def by_torchao(
    program: InductorProgram, names: Sequence[str], batches: Sequence[Sequence[Tensor]]
) -> InductorInt8Program:
    """Weights by channel, activations by tensor. Without VNNI instructions weights get 7 bits, as products would
    saturate.

    Raises:
        AccelerationError: torchao is not installed, or cannot take the network.
    """
    if importlib.util.find_spec("torchao") is None:
        raise AccelerationError("torchao, which quantizes for PyTorch, is not installed; pip install 'fxprune[int8]'")
    quantize, recipe = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e"), _recipe()
    try:
        prepared = quantize.prepare_pt2e(exported(program.network, program.specs).module(), recipe)
        with torch.no_grad():
            for tensors in batches:
                prepared(*map(in_format, tensors))
        converted: nn.Module = quantize.convert_pt2e(prepared)
    except Exception as error:  # whatever the tool does with a network it does not know
        raise refused("torchao", error) from error
    return InductorInt8Program(_Starred(converted), program.specs)


class _Starred(nn.Module):
    """An exported graph, which names its inputs, with a forward that takes any number of them, as `Flat` does."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network(*tensors))


def _recipe() -> Any:
    x86 = importlib.import_module(QUANTIZER)
    wanted = x86.get_default_x86_inductor_quantization_config(reduce_range=not has_vnni())
    return x86.X86InductorQuantizer().set_global(wanted)
