"""The shape of a grouped convolution: its form, its number of groups, how many channels each group keeps, and whether
it keeps them in aligned blocks.
"""

import math
from typing import Literal, NamedTuple, get_args

from fxprune.errors import PlanError
from fxprune.plans import Form
from fxprune.plans.fields import check_divisible
from fxprune.vocabulary import FormChoice, Target

Groups = int | Literal["auto"]
FORMS: tuple[str, ...] = get_args(FormChoice)
TARGETS: tuple[str, ...] = get_args(Target)
"""Kinds of device that a plan can be made for."""

# Overlap form under groups="auto": the most groups whose width stays at what the target is at ease with. More groups
# fit the weights better; narrower ones waste the processor.
# CPU: 16 filters (1 thread, oneDNN 3.13, AVX2, 64 channels of 56x56, ratio 0.5, time relative to dense: 32 filters a
# group .55 to .59, 16 filters .70 to .78, 8 filters .96 to 1.02; the work is .5 in each). Where there is no such number
# of groups it is two; of the 16 filters that a layer must have at least, that leaves 8, a register of AVX2.
# CUDA: 64 filters, for the tensor cores read both factors from shared memory, which feeds them at 40 % of their peak
# with 16 filters a group, at 67 % with 32 and in full from 64 on (an estimate for sm_90 from its instruction set). Two
# groups of 32 are better than the one that would be left of 64 filters, in which all filters drop the same channels;
# narrower ones are not.
AUTO_GROUPS = (8, 4, 2)
AUTO_GROUP_WIDTH = {"cpu": 16, "cuda": 64}
MIN_GROUP_WIDTH = {"cpu": 1, "cuda": 32}
# Where accuracy at a budget is all that is asked for, groups may be narrower: at equal MACs more groups choose more
# freely (ResNet-20, macs=0.57, no labels: 85.7 % with groups of 16 filters, 88.4 % with 8 groups everywhere).
ACCURATE_GROUP_WIDTH = 2
# Channels that one access to memory brings in half precision: 32 bytes, a sector. Blocks of 8 leave half of each unread
# (3x3, 128 channels of 28x28, 32 images, ratio 0.5 in 2 groups, float16, H200, relative to cuDNN's dense convolution
# with fused ReLU: blocks of 8 1.45, of 16 .83, of 32 .75, of 64 .73).
BLOCKS = {"cpu": 1, "cuda": 16}
SHORTEST_BLOCK = 8
"""Blocks that do not fit a layer are halved down to this many channels, 16 bytes in half precision: the widest load."""
# Partition form, where the ratio dictates the number of groups: below 4 filters a group the convolution is slower than
# the dense one whatever the ratio saves (16 channels of 32x32, 2 filters a group: 1.5 to 5.4 times the dense time).
MIN_PARTITION_WIDTH = 4
# How far a ratio may be from 1 - 1/n and still mean it, so that 0.6667 is 2/3. The channels kept are the same.
PARTITION_TOLERANCE = 1e-4


class Shape(NamedTuple):
    """The form of a grouped convolution, its number of groups, the channels that each group keeps, and the blocks that
    it keeps them in; if these are not the blocks asked for, the note says why.
    """

    form: Form
    groups: int
    kept: int
    block: int = 1
    note: str = ""


def choose_shape(
    filters: int,
    channels: int,
    ratio: float,
    groups: Groups = "auto",
    form: str = "auto",
    block: int = 1,
    target: str | None = None,
) -> Shape | str:
    """Choose the form and number of groups of one convolution, or say why it has to stay dense.

    Args:
        filters: `O`.
        channels: `C`.
        ratio: share of kernel groups to remove, in `(0, 1)`.
        groups: number of groups or `"auto"`.
        form: one of `FORMS`.
        block: keep channels in aligned blocks of this many. A layer that does not divide into such blocks is pruned in
            shorter ones (half of it, a quarter, ... down to `SHORTEST_BLOCK`), or channel by channel, with a note.
        target: one of `TARGETS`; None is as `"cpu"`.

    Raises:
        PlanError: `groups` does not divide `filters`, or the partition form contradicts `ratio` or `groups`.

    >>> choose_shape(64, 64, 0.5)
    Shape(form='partition', groups=2, kept=32, block=1, note='')
    >>> choose_shape(64, 64, 0.6)
    Shape(form='overlap', groups=4, kept=26, block=1, note='')
    >>> choose_shape(64, 64, 0.6, block=8, target="cuda")
    Shape(form='overlap', groups=2, kept=24, block=8, note='')
    """
    if groups != "auto":
        try:
            check_divisible(filters, groups)
        except PlanError as error:
            raise PlanError(f"{error}, or use groups='auto', a mapping from patterns, or ignore the layer") from error
    kept = kept_channels(channels, ratio)
    if kept == channels:
        return f"ratio {ratio:.4g} removes none of {channels} channels"
    parts = partition_groups(ratio)
    if form == "partition":
        if parts is None:
            raise PlanError(_no_partition(ratio))
        if groups not in ("auto", parts):
            raise PlanError(
                f"groups={groups} contradicts ratio {ratio:.4g}, whose partition form has 1 / (1 - ratio) = {parts} "
                f"groups; use groups={parts}, groups='auto' or form='overlap'"
            )
    if form != "overlap" and parts is not None and groups in ("auto", parts):
        reason = _partition_obstacle(filters, channels, parts, explicit=groups == parts)
        if not reason:
            return _partition(channels, parts, block)
        if form == "partition":
            return reason
    if groups == "auto":
        if filters % 2:
            return f"{filters} filters do not divide into 2 groups"
        groups = _auto_groups(filters, target or "cpu")
    return _overlap(channels, ratio, groups, block)


def kept_channels(channels: int, ratio: float, block: int = 1) -> int:
    """`(1 - ratio) * channels` rounded to the nearest multiple of `block`, half up, at least one block.

    >>> kept_channels(25, 0.9)  # 2.5; the float product is 2.4999999999999996
    3
    """
    return block * max(1, math.floor((1 - ratio) * channels / block + 0.5 + 1e-9))


def unit_of(channels: int, block: int, fewest: int = 2) -> int:
    """How many of the channels of a layer go together: `block` if they are `fewest` blocks or more, or its half, and so
    on down to `SHORTEST_BLOCK`; else 1.

    >>> unit_of(64, 8), unit_of(60, 8), unit_of(8, 8), unit_of(40, 16), unit_of(16, 16, fewest=1)
    (8, 1, 1, 8, 16)
    """
    while channels % block or channels < fewest * block:
        if block % 2 or block // 2 < SHORTEST_BLOCK:
            return 1
        block //= 2
    return block


def partition_groups(ratio: float) -> int | None:
    """The integer `n >= 2` for which `ratio` is `1 - 1/n`, up to `PARTITION_TOLERANCE`; None if there is none."""
    parts = round(1 / (1 - ratio))
    return parts if parts >= 2 and abs(ratio - (1 - 1 / parts)) <= PARTITION_TOLERANCE else None


def _partition_obstacle(filters: int, channels: int, parts: int, explicit: bool) -> str:
    if filters % parts or channels % parts:
        return f"{filters} filters of {channels} channels do not divide into {parts} parts"
    width = min(filters, channels) // parts
    if width < MIN_PARTITION_WIDTH and not explicit:
        return f"too small: {parts} parts of {width} filters or channels, fewer than {MIN_PARTITION_WIDTH}"
    return ""


def _partition(channels: int, parts: int, block: int) -> Shape:
    share = channels // parts
    unit = unit_of(share, block, fewest=1)
    note = "" if unit == block else _unaligned(unit, f"{share} channels a group do not divide into", block)
    return Shape("partition", parts, share, unit, note)


def _overlap(channels: int, ratio: float, groups: int, block: int) -> Shape:
    unit = unit_of(channels, block)
    if unit > 1 and kept_channels(channels, ratio, unit) == channels:
        unit = 1
    kept = kept_channels(channels, ratio, unit)
    if unit == block:
        return Shape("overlap", groups, kept, block)
    divides = channels % block == 0
    reason = (
        f"ratio {ratio:.4g} of {channels} channels removes no" if divides else f"{channels} channels do not divide into"
    )
    return Shape("overlap", groups, kept, unit, _unaligned(unit, reason, block))


def _unaligned(unit: int, reason: str, block: int) -> str:
    how = "one by one, not in aligned blocks" if unit == 1 else f"in blocks of {unit}"
    return f"channels are kept {how}: {reason} blocks of {block}"


def _auto_groups(filters: int, target: str) -> int:
    """The number of groups of an even number of filters."""
    for groups in AUTO_GROUPS:
        if filters % groups == 0 and filters // groups >= AUTO_GROUP_WIDTH[target]:
            return groups
    return 2 if filters // 2 >= MIN_GROUP_WIDTH[target] else 1


def accurate_groups(filters: int) -> Groups:
    """The number of groups that serves accuracy at a given cost, not speed; `"auto"` if filters are odd.

    >>> accurate_groups(64), accurate_groups(16), accurate_groups(12), accurate_groups(7)
    (8, 8, 4, 'auto')
    """
    fits = (n for n in AUTO_GROUPS if filters % n == 0 and filters // n >= ACCURATE_GROUP_WIDTH)
    return next(fits, "auto")


def _no_partition(ratio: float) -> str:
    below = math.floor(1 / (1 - ratio))
    near = " or ".join(f"{1 - 1 / parts:.4g}" for parts in (below, below + 1) if parts >= 2)
    return (
        f"ratio {ratio:.4g} has no partition form, because 1 / (1 - ratio) is not a whole number; "
        f"use {near}, or form='overlap'"
    )
