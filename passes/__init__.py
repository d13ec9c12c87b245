"""The rewrite passes, in pipeline order. Each is exact: the graph computes the same function before and after."""

if __name__ != "fxprune.passes":
    raise ImportError("this folder is the package fxprune.passes; import it by that name")

from fxprune.passes.remove_branches import RemoveBranches
from fxprune.passes.remove_channels import RemoveChannels
from fxprune.passes.group_convs import GroupConvs
from fxprune.passes.sink_gathers import SinkGathers
from fxprune.passes.merge_gathers import MergeGathers
from fxprune.passes.absorb_gathers import AbsorbGathers
from fxprune.passes.align_windows import AlignWindows
from fxprune.passes.agree_reads import AgreeReads
from fxprune.passes.fold_batch_norm import FoldBatchNorm
from fxprune.passes.fuse_convs import FuseConvs

__all__ = [
    "AbsorbGathers",
    "AgreeReads",
    "AlignWindows",
    "FoldBatchNorm",
    "FuseConvs",
    "GroupConvs",
    "MergeGathers",
    "RemoveBranches",
    "RemoveChannels",
    "SinkGathers",
]
