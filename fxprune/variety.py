"""Filter variety by the name that it had in 0.1; it lives in `fxprune.criteria.variety`."""

from fxprune.criteria.variety import VARIETIES, Variety

__all__ = ["VARIETIES", "Variety"]
