"""The shape of a grouped convolution: its form, its number of groups, and how many channels each group keeps."""

import math
from typing import Literal, NamedTuple

from fxprune.errors import PlanError
from fxprune.plans import Form, check_divisible

Groups = int | Literal["auto"]
FORMS = ("auto", "partition", "overlap")

# Overlap form under groups="auto": the most groups whose width stays at 16 filters or more. More groups fit the weights
# better; narrower ones waste the processor (1 thread, oneDNN 3.13, AVX2, 64 channels of 56x56, ratio 0.5, time relative
# to dense: 32 filters a group .55 to .59, 16 filters .70 to .78, 8 filters .96 to 1.02; the work is .5 in each).
AUTO_GROUPS = (8, 4, 2)
AUTO_GROUP_WIDTH = 16
# Partition form, where the ratio dictates the number of groups: below 4 filters a group the convolution is slower than
# the dense one whatever the ratio saves (16 channels of 32x32, 2 filters a group: 1.5 to 5.4 times the dense time).
MIN_PARTITION_WIDTH = 4
# How far a ratio may be from 1 - 1/n and still mean it, so that 0.6667 is 2/3. The channels kept are the same.
PARTITION_TOLERANCE = 1e-4


class Shape(NamedTuple):
    """The form of a grouped convolution, its number of groups and the channels that each group keeps."""

    form: Form
    groups: int
    kept: int


def choose_shape(filters: int, channels: int, ratio: float, groups: Groups = "auto", form: str = "auto") -> Shape | str:
    """Choose the form and number of groups of one convolution, or say why it has to stay dense.

    Args:
        filters: `O`.
        channels: `C`.
        ratio: share of kernel groups to remove, in `(0, 1)`.
        groups: number of groups or `"auto"`.
        form: one of `FORMS`.

    Raises:
        PlanError: `groups` does not divide `filters`, or the partition form contradicts `ratio` or `groups`.

    >>> choose_shape(64, 64, 0.5)
    Shape(form='partition', groups=2, kept=32)
    >>> choose_shape(64, 64, 0.6)
    Shape(form='overlap', groups=4, kept=26)
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
            return Shape("partition", parts, channels // parts)
        if form == "partition":
            return reason
    if groups == "auto":
        return _auto_overlap(filters, kept)
    return Shape("overlap", groups, kept)


def kept_channels(channels: int, ratio: float) -> int:
    """`(1 - ratio) * channels` rounded to the nearest integer, half up, at least 1.

    >>> kept_channels(25, 0.9)  # 2.5; the float product is 2.4999999999999996
    3
    """
    return max(1, math.floor((1 - ratio) * channels + 0.5 + 1e-9))


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


def _auto_overlap(filters: int, kept: int) -> Shape | str:
    for groups in AUTO_GROUPS:
        if filters % groups == 0 and filters // groups >= AUTO_GROUP_WIDTH:
            return Shape("overlap", groups, kept)
    if filters % 2:
        return f"{filters} filters do not divide into 2 groups"
    return Shape("overlap", 2, kept)


def _no_partition(ratio: float) -> str:
    below = math.floor(1 / (1 - ratio))
    near = " or ".join(f"{1 - 1 / parts:.4g}" for parts in (below, below + 1) if parts >= 2)
    return (
        f"ratio {ratio:.4g} has no partition form, because 1 / (1 - ratio) is not a whole number; "
        f"use {near}, or form='overlap'"
    )
