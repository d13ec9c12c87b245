"""Methods: how filters are grouped and which input channels each group keeps. Arrays in, `Clustering` out."""

from fxprune.methods.clustering import Clustering, Labels, Mask, Matrix
from fxprune.methods.cocluster import cocluster

__all__ = ["Clustering", "Labels", "Mask", "Matrix", "cocluster"]
