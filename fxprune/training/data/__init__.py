"""Images to train with: where they come from, how they are split, varied and normalized.

`sources` opens them, by words such as `cifar10:DIR` or `folder:DIR`; everything random is a function of numbers given.
"""

from fxprune.training.data.pictures import DataError, Normalization
from fxprune.training.data.sources import Data, open_data

__all__ = ["Data", "DataError", "Normalization", "open_data"]
