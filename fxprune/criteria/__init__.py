"""Criteria: how much each kernel of a convolution matters. Evidence in, scores `(O, C)` out."""

from fxprune.criteria.criterion import Criterion, Evidence, ScoreFunction, kernel_scores
from fxprune.criteria.standard import CRITERIA, criterion_of, resolve
from fxprune.criteria.taylor import Taylor

__all__ = ["CRITERIA", "Criterion", "Evidence", "ScoreFunction", "Taylor", "criterion_of", "kernel_scores", "resolve"]
