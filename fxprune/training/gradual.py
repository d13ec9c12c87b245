"""Plans on the way to another plan: the same groups of filters, which lose their input channels little by little.

A grouped convolution has one number of groups, and equally many channels in each. So both the number and the filters of
the groups are those of the plan at the target, and only the kept channels shrink: from the channels that a group still
has it keeps the most important ones, by the weights of that moment. Kept sets are nested in time.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from torch import nn

from fxprune.criteria import Evidence, kernel_scores, resolve
from fxprune.criteria.snapshots import load_snapshots
from fxprune.criteria.variety import Variety, cosine_similarity, vary
from fxprune.graph.convolutions import Convolution, conv_at, kernels_of
from fxprune.methods.clustering import Matrix
from fxprune.methods.cocluster import choose_channels, in_blocks
from fxprune.planning.requests import Request
from fxprune.plans import GroupedKernels, PrunePlan
from fxprune.plans.shapes import kept_channels


def narrow(model: nn.Module, target: PrunePlan, before: PrunePlan, share: float, request: Request) -> PrunePlan:
    """The plan at a share of the target's sparsity that keeps nothing which `before` drops.

    Args:
        model: the model as it is now, pruned by `before`. It is only read.
        target: where this leads, in overlap form.
        before: an earlier plan towards the same target; layers that it does not name are still dense.
        share: in `[0, 1]`. A layer of `C` channels keeps `(1 - share * ratio) * C` in each group, rounded as
            `fxprune.plans.shapes.kept_channels` does, never more than before.
        request: its criterion, variety (the similarity is the cosine of the weights), snapshots and seed.

    Raises:
        PlanError: a weight has no finite values, or the criterion gives no legal scores.
    """
    earlier = None if request.snapshots is None else load_snapshots(request.snapshots, model)[0]
    evidence = Evidence(model, earlier, None, request.seed)
    criterion, score = resolve("l2" if request.criterion is None else request.criterion, evidence)
    layers: dict[str, GroupedKernels] = {}
    skipped = dict(target.skipped)
    for name, last in target.layers.items():
        ratio = last.asked_ratio * share
        now = before.layers.get(name) or _dense(last)
        wanted = last.kept_channels if share >= 1 else kept_channels(last.in_channels, ratio, last.block)
        kept = min(now.kept_channels, max(wanted, last.kept_channels))
        if kept == last.in_channels:
            skipped[name] = f"ratio {ratio:.4g} removes none of {kept} channels yet"
        elif kept == now.kept_channels:
            layers[name] = replace(now, asked_ratio=ratio)
        else:
            conv = conv_at(model, name)
            scores = kernel_scores(name, conv, score, criterion)
            layers[name] = replace(_narrowed(conv, now, kept, scores, request.rule), asked_ratio=ratio)
    asked = target.ratio
    reached = (
        {pattern: value * share for pattern, value in asked.items()} if isinstance(asked, Mapping) else asked * share
    )
    notes = {name: note for name, note in target.notes.items() if name in layers}
    return replace(target, layers=layers, skipped=skipped, ratio=reached, notes=notes)


def _dense(last: GroupedKernels) -> GroupedKernels:
    """The same groups of filters, which keep all channels."""
    return replace(last, kept=(tuple(range(last.in_channels)),) * last.groups, block_cost=None)


def _narrowed(
    conv: Convolution, now: GroupedKernels, kept: int, scores: Matrix, variety: Variety | None
) -> GroupedKernels:
    """Keep the `kept` most important of the channels that each group has."""
    groups = np.array(now.out_order).reshape(now.groups, -1)  # (n, d)
    channels = np.array(now.kept)  # (n, k), ascending: whole blocks side by side
    totals = in_blocks(np.take_along_axis(scores[groups].sum(1), channels, axis=1), now.block)  # (n, k / block)
    redundancy = None
    if variety is not None:
        weight = kernels_of(conv).detach().double().cpu().numpy().swapaxes(0, 1)  # (C, O, *kernel)
        slabs = np.stack(
            [weight[np.ix_(mine, members)] for mine, members in zip(channels, groups, strict=True)]
        )  # (n, k, d, *kernel)
        similarity = cosine_similarity(slabs.reshape(*totals.shape, -1))  # a block as a channel of many taps
        totals, found = vary(totals, kept // now.block, similarity, variety)
        redundancy = found.share
    chosen = choose_channels(totals, kept // now.block, "overlap").repeat(now.block, axis=1)  # (n, k)
    left = channels[chosen].reshape(now.groups, kept)
    return replace(now, kept=tuple(tuple(map(int, row)) for row in left), redundancy=redundancy)
