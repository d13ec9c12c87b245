"""bn(conv(x, W, b)) == conv(x, s * W, s * (b - mean) + beta), s = gamma / sqrt(var + eps), with stored statistics
(evaluation mode).

W (O, C, *kernel), over two or three dimensions; b, gamma, beta, mean, var, s (O,). Missing b, gamma, beta count as 0,
1, 0 (Jacob et al. 2018, section 3.2, has the formula).

1. A plain convolution read by one BatchNorm with stored statistics, both called once, becomes one convolution.
2. A gather that permutes channels may stand between them: bn(gather(y, p)) == gather(bn'(y), p), where bn' has its
   parameters and statistics in the order of y. The gather stays.
Left alone, with a reason: shared layers, a convolution with other readers, a BatchNorm without stored statistics,
transposed convolutions and those over sequences, subclasses, hooks, parameters that the graph reads by name as well.
The result no longer learns batch statistics: it is exact in evaluation mode only, so the default pipeline leaves this
pass out.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

from fxprune.graph.convolutions import Convolution, channel_dim
from fxprune.graph.editing import Outcome, Skip, call_sites, called_module, calls, first_reader, read_by_name
from fxprune.graph.layers import ChannelGather
from fxprune.graph.tracing import is_hooked

C = TypeVar("C", bound=Convolution)

PAIRS = {nn.BatchNorm2d: nn.Conv2d, nn.BatchNorm3d: nn.Conv3d}
"""Norms that refuse what their convolution gives for an image without a batch; BatchNorm1d takes it for a batch."""


@dataclass(frozen=True)
class FoldBatchNorm:
    """Fold each BatchNorm into the convolution before it. Exact in evaluation mode."""

    def __call__(self, gm: fx.GraphModule) -> Outcome:
        rewritten = []
        skipped = []
        sites, named = call_sites(gm), read_by_name(gm)
        for node, norm in calls(gm, nn.modules.batchnorm._BatchNorm):
            reason = _why_not(gm, node, norm, sites, named)
            if reason:
                skipped.append(Skip(node.name, reason))
                continue
            source, order = _producer(gm, node)
            conv = called_module(gm, source)
            assert isinstance(conv, Convolution)
            parent, _, child = str(source.target).rpartition(".")
            setattr(gm.get_submodule(parent), child, folded(conv, norm, order))
            node.replace_all_uses_with(node.all_input_nodes[0])
            gm.graph.erase_node(node)
            gm.delete_submodule(str(node.target))
            rewritten.append(source.name)
        return Outcome(tuple(rewritten), tuple(skipped))


def folded(conv: C, norm: nn.modules.batchnorm._BatchNorm, order: Tensor | None = None) -> C:
    """Return a convolution that equals `norm(conv(x))` in evaluation mode.

    Args:
        conv: the convolution.
        norm: the BatchNorm that reads it, with stored statistics.
        order: `(O,)` int64: the filter that each channel of `norm` comes from; None for all of them in order.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps) * (1 if norm.weight is None else norm.weight.detach())
    shift = (0 if norm.bias is None else norm.bias.detach()) - norm.running_mean * scale
    if order is not None:
        scale, shift = scale[order.argsort()], shift[order.argsort()]
    shifted = shift if conv.bias is None else conv.bias.detach() * scale + shift
    fused = copy.copy(conv)
    fused._parameters = dict(conv._parameters)
    fused.weight = nn.Parameter(
        conv.weight.detach() * scale.view(-1, *[1] * (conv.weight.dim() - 1)), requires_grad=conv.weight.requires_grad
    )
    fused.bias = nn.Parameter(shifted, requires_grad=conv.weight.requires_grad)
    return fused


def _producer(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, Tensor | None]:
    """What a BatchNorm normalises, and the order in which it reads the channels if a gather permutes them."""
    source = node.all_input_nodes[0]
    if source.op != "call_module" or not isinstance(gather := called_module(gm, source), ChannelGather):
        return source, None
    before = source.all_input_nodes[0]
    conv = called_module(gm, before) if before.op == "call_module" else None
    if not isinstance(conv, Convolution) or gather.dim not in (1, channel_dim(conv)):
        return source, None
    if not gather.is_permutation or len(source.users) > 1:
        return source, None
    return before, gather.index


def _why_not(
    gm: fx.GraphModule,
    node: fx.Node,
    norm: nn.modules.batchnorm._BatchNorm,
    sites: Mapping[nn.Module, Sequence[fx.Node]],
    named: Mapping[int, str],
) -> str:
    source, _ = _producer(gm, node)
    if type(norm) not in PAIRS:
        return f"{type(norm).__name__} is no BatchNorm2d or BatchNorm3d"
    if norm.running_mean is None:
        return "no stored statistics: it normalises by the batch also in evaluation"
    if source.op != "call_module" or type(conv := called_module(gm, source)) is not PAIRS[type(norm)]:
        return "its input is not a plain convolution"
    if len(source.users) > 1:
        return "the convolution has other readers"
    if len(sites[conv]) > 1 or len(sites[norm]) > 1:
        return "a shared module cannot be specialised"
    if is_hooked(conv) or is_hooked(norm):
        return "it has hooks, or its convolution has; they would see other values"
    tensors = [*conv.parameters(), *norm.parameters(), *norm.buffers()]
    if reader := first_reader(tensors, named):
        return f"{reader} reads a parameter of it or of its convolution"
    if conv.weight.dtype != norm.running_mean.dtype:
        return f"weights are {conv.weight.dtype}, statistics {norm.running_mean.dtype}"
    return ""
