"""conv(x) == gather(grouped_conv(gather(x, kept)), inverse(out_order)), if the kernels that the plan drops are zero.

x (N, C, *space); W (O, C, *kernel), over one, two or three dimensions; n groups of d = O / n filters that keep k
channels each. The grouped weight is (O, k, *kernel): row j of group g is filter out_order[g * d + j], its column i is
channel kept[g][i]. A transposed convolution holds W as (C, O, *kernel) and its grouped form as (n * k, d, *kernel): row
i of group g is channel kept[g][i]. Stride, padding, padding mode, output padding, dilation and bias are those of the
dense convolution.

1. A convolution of the plan is replaced at all its call sites, so a shared module stays shared.
2. A gather whose index is the identity is not inserted.
Left alone: nothing that the plan names. A kernel that the plan drops but that is not zero is an error, for the result
would be wrong; so is a weight that the graph reads by name as well.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxprune.errors import PassError
from fxprune.graph.convolutions import Convolution, channel_dim, kernels_of
from fxprune.graph.editing import Outcome, call_sites, first_reader, gather_after, gather_before, read_by_name
from fxprune.graph.layers import ChannelGather
from fxprune.plans import GroupedKernels, PrunePlan
from fxprune.plans.eligibility import computes_its_own_forward


@dataclass(frozen=True)
class GroupConvs:
    """Replace every convolution of `plan` by a gather, a grouped convolution and the inverse gather."""

    plan: PrunePlan

    def __call__(self, gm: fx.GraphModule) -> Outcome:
        rewritten = []
        sites = call_sites(gm)
        modules = dict(gm.named_modules())
        named = read_by_name(gm)
        for name, kernels in self.plan.layers.items():
            conv = modules.get(name)
            if not isinstance(conv, Convolution) or conv not in sites:
                raise PassError(
                    f"{name}: the plan groups it, but the traced graph never calls it; "
                    "make the plan with the model that is rewritten"
                )
            if computes_its_own_forward(type(conv)):
                raise PassError(
                    f"{name}: the plan prunes its weight, but the {type(conv).__name__} computes its own forward, "
                    "perhaps with another; leave the layer alone, or pass output='module', which sees what it does"
                )
            if reader := first_reader(conv.parameters(), named):
                raise PassError(
                    f"{name}: its parameters are also read by {reader}, which needs them dense; "
                    f"leave the layer alone with ignore=({name!r},)"
                )
            grouped = grouped_convolution(name, conv, kernels)
            parent, _, child = name.rpartition(".")
            setattr(gm.get_submodule(parent), child, grouped)
            device, dim = conv.weight.device, channel_dim(conv)
            read = ChannelGather(torch.tensor(kernels.kept, device=device).reshape(-1), conv.in_channels, dim)
            restore = ChannelGather(torch.tensor(kernels.out_order, device=device).argsort(), conv.out_channels, dim)
            for node in sites[conv]:
                node.target = name
                if not read.is_identity:
                    gather_before(gm, node, copy.deepcopy(read))
                if not restore.is_identity:
                    gather_after(gm, node, copy.deepcopy(restore))
                rewritten.append(node.name)
        return Outcome(tuple(rewritten))


def grouped_convolution(name: str, conv: Convolution, kernels: GroupedKernels) -> Convolution:
    """Return `conv` with groups, weight and bias `(O,)` in the filter order of `kernels`: `(O, k, *kernel)`, of a
    transposed convolution `(n * k, d, *kernel)`.

    Raises:
        PassError: a kernel that the plan drops is not zero.
    """
    order = torch.tensor(kernels.out_order, device=conv.weight.device)
    dense = kernels_of(conv).detach()
    columns = torch.tensor(kernels.kept, device=dense.device).repeat_interleave(kernels.group_width, dim=0)
    kept = dense[order[:, None], columns]
    if int(dense.count_nonzero()) != int(kept.count_nonzero()):
        dropped = dense[~kernels.mask().to(dense.device)]
        count = int(dropped.flatten(1).any(dim=1).sum())
        raise PassError(
            f"{name}: {count} kernels that the plan drops are not zero; rewrite the model that fxprune.mask returns"
        )
    grouped = copy.copy(conv)  # keeps the class, stride, padding mode and whatever a subclass adds
    grouped._parameters = dict(conv._parameters)
    grouped.in_channels = columns.shape[1] * kernels.groups
    grouped.groups = kernels.groups
    if conv.transposed:  # (O, k) -> (n, d, k) -> (n, k, d) -> (n * k, d)
        kept = kept.reshape(kernels.groups, -1, *kept.shape[1:]).transpose(1, 2).flatten(0, 1).contiguous()
    grouped.weight = _like(conv.weight, kept)
    if conv.bias is not None:
        grouped.bias = _like(conv.bias, conv.bias.detach()[order])
    return grouped


def _like(old: Tensor, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new, requires_grad=old.requires_grad)
