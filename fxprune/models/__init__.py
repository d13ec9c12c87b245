"""Models by name: torchvision's, timm's, a few small ones of our own, and any callable that returns a module."""

from fxprune.models.by_name import ModelNameError, default_input_size, example_inputs, is_published, load_model
from fxprune.models.preprocessing import Preprocessing, PreprocessingError, categories_of, preprocessing_of

__all__ = [
    "ModelNameError",
    "Preprocessing",
    "PreprocessingError",
    "categories_of",
    "default_input_size",
    "example_inputs",
    "is_published",
    "load_model",
    "preprocessing_of",
]
