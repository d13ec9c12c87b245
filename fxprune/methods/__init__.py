"""Methods: how filters are grouped and which input channels each group keeps. Arrays in, `Clustering` out."""

from fxprune.methods.clustering import Clustering, Labels, Mask, Matrix
from fxprune.methods.cocluster import cocluster, common_groups
from fxprune.methods.reconstruction import reconstruction
from fxprune.methods.srgkp import srgkp
from fxprune.methods.tmi import TmiChoice, tmi_gkp

__all__ = [
    "Clustering",
    "Labels",
    "Mask",
    "Matrix",
    "TmiChoice",
    "cocluster",
    "common_groups",
    "reconstruction",
    "srgkp",
    "tmi_gkp",
]
