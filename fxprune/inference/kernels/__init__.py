"""Kernels for convolutions that read a choice of channels: operators of PyTorch, and what computes them on a device."""

from fxprune.inference.kernels.gather_conv import gather_conv2d

__all__ = ["gather_conv2d"]
