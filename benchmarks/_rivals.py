"""The networks that race, what runs them, and the check that they still compute what they should.

A network is dense, pruned by fxprune, or pruned by Torch-Pruning (Fang et al. 2023, DepGraph) to as many MACs. All are
in evaluation mode, and every runtime gets them with BatchNorm folded, so that none is slow for want of that.
"""

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

import fxprune
from benchmarks._layer_calls import count_macs
from benchmarks._torch_pruning import Batches, Importance, prune_channels
from fxprune.exact import verification
from fxprune.graph.tracing import trace
from fxprune.passes import FoldBatchNorm

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
RIVALS = ("dense", "torch-pruning")

ROUND_TO = 8
"""Where speed counts, Torch-Pruning keeps a multiple of this many channels, as its documentation advises."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Largest difference from the oracle in float32, relative to its largest output, by the type a network runs in: two to
ten times what the dense ResNet-50 shows (7e-6, 1e-2, 5e-2, random weights). For networks that amplify rounding more
than that, see `limit_of`."""
TF32_TOLERANCE = 3e-2
"""The same for float32 on CUDA, whose convolutions may round their factors to as many bits as float16 has."""
NOISE_MARGIN = 10
"""Rounding strikes in every layer: so many times the response to that of the input alone."""
LARGEST_LIMIT = 0.5
"""Beyond it nothing could be told from anything else."""


@dataclass(frozen=True)
class Network:
    """A network that races.

    Attributes:
        name: `"dense"`, `"fxprune"` or `"torch-pruning"`.
        ratio: that fxprune was asked for; of torch-pruning, that of the network whose MACs it matches; None of dense.
        macs: of one image, over convolutions and linear layers; None if there is no network.
        module: in float32 on the CPU; None if it could not be made.
        folded: the same with BatchNorm folded into the convolutions before it.
        oracle: computes what it must compute.
        error: why it could not be made.
    """

    name: str
    ratio: float | None
    macs: int | None = None
    module: nn.Module | None = None
    folded: nn.Module | None = None
    oracle: nn.Module | None = None
    error: str = ""


def dense_network(model: nn.Module, inputs: Tensor) -> Network:
    """The network as it is."""
    return Network("dense", None, count_macs(model, inputs), model, folded(model, inputs), model)


def fxprune_network(
    model: nn.Module, inputs: Tensor, ratio: float, options: Mapping[str, Any], random_weights: bool = True
) -> Network:
    """The network that fxprune makes; its oracle is the masked model.

    Args:
        model: the dense one.
        inputs: `(N, C, H, W)` float32.
        ratio: share of kernel groups to prune.
        options: of `fxprune.make_plan`.
        random_weights: whether statistics of activations mean nothing yet, see `settle`.

    Raises:
        FxpruneError: it cannot be planned or compiled.
    """
    plan = fxprune.make_plan(model, ratio, example_inputs=inputs, **options)
    masked = fxprune.mask(model, plan).eval()
    if random_weights:
        settle(masked, inputs)
    pruned = fxprune.rewrite(masked, plan, inputs).eval()
    return Network("fxprune", ratio, count_macs(pruned, inputs), pruned, folded(pruned, inputs), masked)


def torch_pruning_network(
    model: nn.Module,
    inputs: Tensor,
    ratio: float,
    macs: int,
    random_weights: bool = True,
    importance: Importance = "magnitude",
    batches: Batches = (),
    round_to: int = ROUND_TO,
) -> Network:
    """The network that Torch-Pruning makes with about `macs` MACs, see `benchmarks._torch_pruning.prune_channels`.

    Narrow networks, of which it keeps multiples of 8 channels, may come no nearer than a few percent; the MACs reached
    are in the result. Where it crashes the result says so.
    """
    try:
        pruned = prune_channels(model, inputs, macs, importance, batches, round_to)
        if random_weights:
            settle(pruned, inputs)
        return Network("torch-pruning", ratio, count_macs(pruned, inputs), pruned, folded(pruned, inputs), pruned)
    except Exception as error:  # whatever another library does with a network it does not know is a result
        return Network("torch-pruning", ratio, error=describe(error))


def settle(model: nn.Module, inputs: Tensor) -> None:
    """Set the statistics of every BatchNorm of `model`, in place, so that it scales `inputs` to unit power.

    With random weights and initial statistics the numbers grow or fade from layer to layer until they overflow in half
    precision, or are so small that processors take their slow path. Means stay 0: what trained weights have learnt to
    keep, centring by a mere few images takes away, and rounding errors grow in what is left (ResNet-50 in bfloat16 was
    off by a quarter of its largest output).
    """

    def scale(norm: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0]
        norm.get_buffer("running_mean").zero_()
        norm.get_buffer("running_var").copy_(x.square().transpose(0, 1).flatten(1).mean(1))

    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    handles = [norm.register_forward_pre_hook(scale) for norm in norms if norm.running_mean is not None]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()


def folded(module: nn.Module, inputs: Tensor) -> nn.Module:
    """A traced copy of `module`, with BatchNorm folded where it follows a convolution.

    Raises:
        TraceError: it cannot be traced.
    """
    copied = copy.deepcopy(module)
    gm = copied if isinstance(copied, fx.GraphModule) else trace(copied, inputs).module
    with torch.no_grad():
        FoldBatchNorm()(gm)
    gm.recompile()
    return gm.eval()


Call = Callable[[], Any]


@dataclass(frozen=True)
class Runtime:
    """A way to run a network.

    Attributes:
        build: makes of a module in its place, type and layout, and its input, what is then called again and again.
        folds: it folds BatchNorm and picks the layout itself.
        cuda: it needs a CUDA device.
    """

    build: Callable[[nn.Module, Tensor], Call]
    folds: bool = False
    cuda: bool = False


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


def limit_of(oracle: nn.Module, expected: Any, inputs: Tensor) -> float:
    """How far a network that runs on `inputs`, in their type, may be from its oracle, as a share of the largest output.

    It is the tolerance of the type, or more for a network that amplifies rounding: `NOISE_MARGIN` times what the oracle
    makes, in float32, of a relative noise on its input as large as the steps of the type.

    Args:
        oracle: on the device of `inputs`, float32.
        expected: what it gives for `inputs.float()`.
        inputs: `(N, C, H, W)`.
    """
    rough = inputs.is_cuda and inputs.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    step = torch.finfo(torch.float16 if rough else inputs.dtype).eps
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(1)).to(inputs.device)
    response = difference(oracle(inputs.float() * (1 + step * noise)), expected)
    return max(TF32_TOLERANCE if rough else TOLERANCE[inputs.dtype], min(NOISE_MARGIN * response, LARGEST_LIMIT))


def difference(found: Any, expected: Any) -> float:
    """Largest difference of two outputs as a share of the largest expected number; infinite if one is not finite.

    Raises:
        VerificationError: they do not have the same shapes.
    """
    mine, theirs = _tensors(found), _tensors(expected)
    if not all(bool(tensor.isfinite().all()) for tensor in (*mine, *theirs)):
        return math.inf
    return verification.difference(mine, theirs)[1]


def _tensors(output: Any) -> list[Tensor]:
    return [leaf.detach().float().cpu() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def describe(error: Exception) -> str:
    """The kind of an error and the first lines of its message, in one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:300]
