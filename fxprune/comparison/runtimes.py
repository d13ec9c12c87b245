"""What runs a network that races: eager PyTorch, its compilers, the form of `fxprune.accelerate`, and the runtimes in
which people deploy.
"""

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fxprune
from fxprune.comparison.rivals import Network
from fxprune.inference.cuda_graphs import captured
from fxprune.inference.runtimes import TorchModel
from fxprune.inference.runtimes.precisions import BFLOAT16, LESS_PRECISE, runtime_in
from fxprune.vocabulary import GraphRuntime

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

Call = Callable[[], Any]


@dataclass(frozen=True)
class Runtime:
    """A way to run a network.

    Attributes:
        build: makes of a module in its place, type and layout, and its input, what is then called again and again.
        folds: it folds BatchNorm and picks the layout itself.
        cuda: it needs a CUDA device.
        deploys: the runtime of `fxprune.accelerate` that it is, which must be installed; empty for none.
    """

    build: Callable[[nn.Module, Tensor], Call]
    folds: bool = False
    cuda: bool = False
    deploys: str = ""

    def obstacle(self, device: str, dtype: str) -> str:
        """Why it cannot run networks there in that type, with the way out; empty if it can."""
        if self.cuda and device == "cpu":
            return "there are no CUDA graphs on the CPU; leave it out, or --device cuda"
        if not self.deploys:
            return ""
        if self.deploys in LESS_PRECISE.get(dtype, {}):
            return runtime_in(self.deploys, dtype).obstacle(torch.device(device), torch.float32)
        return runtime_in(self.deploys, None).obstacle(torch.device(device), getattr(torch, dtype))


def _eager(module: nn.Module, inputs: Tensor) -> Call:
    return lambda: module(inputs)


def _compiled(module: nn.Module, inputs: Tensor) -> Call:
    # Freezing makes weights constants that may be laid out beforehand: the best this runtime has.
    run = torch.compile(module, dynamic=False, options={"freezing": True})
    return lambda: run(inputs)


def _scripted(module: nn.Module, inputs: Tensor) -> Call:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated upstream since torch 2.10, and still used
        run = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.script(module)))
    return lambda: run(inputs)


def _accelerated(module: nn.Module, inputs: Tensor) -> Call:
    return _eager(fxprune.accelerate(module, inputs), inputs)


def _accelerated_scripted(module: nn.Module, inputs: Tensor) -> Call:
    return _eager(TorchModel(fxprune.accelerate(module, inputs), scripted=True), inputs)


def _deployed(name: GraphRuntime, module: nn.Module, inputs: Tensor) -> Call:
    if inputs.dtype == torch.bfloat16:  # the runtime computes in it; what it takes and gives is float32
        module, inputs = module.float(), inputs.float()
        return _eager(fxprune.accelerate(module, inputs, runtime=name, precision=BFLOAT16), inputs)
    return _eager(fxprune.accelerate(module, inputs, runtime=name), inputs)


def _graphed(module: nn.Module, inputs: Tensor) -> Call:
    """A CUDA graph of the eager calls; it writes the same output each time."""
    return captured(_eager(module, inputs))


def _max_autotuned(module: nn.Module, inputs: Tensor) -> Call:
    """All that TorchInductor has: its templates and its choice among libraries, in a CUDA graph.

    The graph is captured here and not by `mode="max-autotune"`, which copies the input in each call.
    """
    run = torch.compile(module, dynamic=False, mode="max-autotune-no-cudagraphs")
    return captured(lambda: run(inputs))


def _accelerated_graphed(module: nn.Module, inputs: Tensor) -> Call:
    return _graphed(fxprune.accelerate(module, inputs), inputs)


DEPLOYED: tuple[GraphRuntime, ...] = ("onnxruntime", "openvino")
RUNTIMES: dict[str, Runtime] = {
    "eager": Runtime(_eager),
    "compile": Runtime(_compiled),
    "script": Runtime(_scripted),
    "accelerate": Runtime(_accelerated, folds=True),
    "accelerate+script": Runtime(_accelerated_scripted, folds=True),
    "cudagraph": Runtime(_graphed, cuda=True),
    "max-autotune+cudagraph": Runtime(_max_autotuned, cuda=True),
    "accelerate+cudagraph": Runtime(_accelerated_graphed, folds=True, cuda=True),
    **{name: Runtime(functools.partial(_deployed, name), folds=True, deploys=name) for name in DEPLOYED},
}


def prepare(network: Network, runtime: Runtime, layout: str | None, inputs: Tensor) -> Call:
    """Return what runs `network` on `inputs`, in their type and on their device.

    Args:
        network: one that could be made; it is not changed.
        runtime: what runs it.
        layout: one of `LAYOUTS`, or None if the runtime picks it.
        inputs: `(N, C, H, W)`.
    """
    source = network.module if runtime.folds else network.folded
    assert source is not None
    module = copy.deepcopy(source).to(device=inputs.device, dtype=inputs.dtype)
    module.requires_grad_(False)
    if layout is not None:
        module = module.to(memory_format=LAYOUTS[layout])
        inputs = inputs.contiguous(memory_format=LAYOUTS[layout])
    return runtime.build(module, inputs)
