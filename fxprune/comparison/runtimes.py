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
from fxprune.inference.runtimes import OTHERS

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
        if self.deploys:
            return OTHERS[self.deploys].obstacle(torch.device(device), getattr(torch, dtype))
        return ""


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


def _deployed(name: str, module: nn.Module, inputs: Tensor) -> Call:
    return _eager(fxprune.accelerate(module, inputs, runtime=name), inputs)


def _graphed(module: nn.Module, inputs: Tensor) -> Call:
    """A CUDA graph of the eager calls; it writes the same output each time."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # before a capture libraries must have made their choices, on another stream
        for _ in range(3):
            module(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = module(inputs)

    def replay() -> Any:
        graph.replay()
        return output

    return replay


def _accelerated_graphed(module: nn.Module, inputs: Tensor) -> Call:
    return _graphed(fxprune.accelerate(module, inputs), inputs)


RUNTIMES = {
    "eager": Runtime(_eager),
    "compile": Runtime(_compiled),
    "script": Runtime(_scripted),
    "accelerate": Runtime(_accelerated, folds=True),
    "cudagraph": Runtime(_graphed, cuda=True),
    "accelerate+cudagraph": Runtime(_accelerated_graphed, folds=True, cuda=True),
    **{
        name: Runtime(functools.partial(_deployed, name), folds=True, deploys=name)
        for name in ("onnxruntime", "openvino")
    },
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
