"""Models by name: torchvision's, timm's, a few small ones of our own, and any callable that returns a module."""

from fxprune.models.by_name import ModelNameError, default_input_size, example_inputs, load_model

__all__ = ["ModelNameError", "default_input_size", "example_inputs", "load_model"]
