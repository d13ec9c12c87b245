"""The networks that race: dense, pruned by fxprune, and with as many MACs left by whole filters of fxprune or of
Torch-Pruning (Fang et al. 2023, DepGraph). All are in evaluation mode, and each is there with BatchNorm folded too, so
that none is slow for want of that.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.comparison.layer_calls import count_macs
from fxprune.comparison.torch_pruning import Batches, Importance, prune_channels
from fxprune.graph.tracing import trace
from fxprune.passes import FoldBatchNorm

RIVALS = ("dense", "filters", "torch-pruning")

ROUND_TO = 8
"""Where speed counts, multiples of this many channels are kept, as Torch-Pruning's documentation advises."""


@dataclass(frozen=True)
class Network:
    """A network that races.

    Attributes:
        name: `"dense"`, `"fxprune"`, `"fxprune filters"`, `"torch-pruning"`, or the file that it was saved in.
        ratio: that fxprune was asked for; of filters, that of the network whose MACs they match; None of dense and of
            saved ones.
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


def saved_network(model: nn.Module, inputs: Tensor, path: Path) -> Network:
    """The network in a file that `fxprune.save` wrote; its oracle is the network itself, as it was checked before.

    Args:
        model: the dense one.
        inputs: `(N, C, H, W)` float32.
        path: the file.

    Raises:
        FxpruneError: it is no such file, it was made from another model, or the network cannot be traced.
    """
    network = fxprune.load(path, model).eval()
    return Network(str(path), None, count_macs(network, inputs), network, folded(network, inputs), network)


def fxprune_network(
    model: nn.Module, inputs: Tensor, ratio: float | None, options: Mapping[str, Any], random_weights: bool = True
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
    return _made("fxprune", model, inputs, ratio, plan, random_weights)


def filters_network(
    model: nn.Module, inputs: Tensor, ratio: float, macs: int, options: Mapping[str, Any], random_weights: bool = True
) -> Network:
    """The network that fxprune makes with about `macs` MACs by whole filters, of which it keeps multiples of 8. Where
    so few cannot be reached the result says so.

    Args:
        model, inputs, random_weights: see `fxprune_network`.
        ratio: of the network whose MACs it matches.
        macs: of one image.
        options: of `fxprune.make_plan`, those of kernels left aside.
    """
    share = macs / count_macs(model, inputs)
    own = {name: value for name, value in options.items() if name in ("target", "seed", "ignore")}
    try:
        plan = fxprune.make_plan(
            model, macs=share, granularity="filter", round_to=ROUND_TO, example_inputs=inputs, **own
        )
        return _made("fxprune filters", model, inputs, ratio, plan, random_weights)
    except fxprune.PlanError as error:
        return Network("fxprune filters", ratio, error=describe(error))


def _made(
    name: str, model: nn.Module, inputs: Tensor, ratio: float | None, plan: fxprune.PrunePlan, random_weights: bool
) -> Network:
    """The network that a plan leaves."""
    masked = fxprune.mask(model, plan).eval()
    if random_weights:
        settle(masked, inputs)
    pruned = fxprune.rewrite(masked, plan, inputs).eval()
    return Network(name, ratio, count_macs(pruned, inputs), pruned, folded(pruned, inputs), masked)


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
    """The network that Torch-Pruning makes with about `macs` MACs, see `prune_channels`.

    Narrow networks, of which it keeps multiples of 8 channels, may come no nearer than a few percent; the MACs reached
    are in the result. Where it crashes the result says so.
    """
    try:
        pruned = prune_channels(model, inputs, macs, importance, batches, round_to).network
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


def describe(error: Exception) -> str:
    """The kind of an error and the first lines of its message, in one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:300]
