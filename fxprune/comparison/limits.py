"""How far the output of a network may be from what it must compute: a fast wrong answer is no answer."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.exact import verification
from fxprune.graph.containers import tensors_in

TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Largest difference from the oracle in float32, relative to its largest output, by the type a network runs in: two to
ten times what the dense ResNet-50 shows (7e-6, 1e-2, 5e-2, random weights). For networks that amplify rounding more
than that, see `limit_of`."""
TF32_TOLERANCE = 3e-2
"""The same for float32 on CUDA, whose convolutions may round their factors to as many bits as float16 has."""
NOISE_MARGIN = 10
"""Rounding strikes in every layer: so many times the response to that of the input alone."""
LARGEST_LIMIT = 0.5
"""Beyond it nothing could be told from anything else."""


def limit_of(oracle: nn.Module, expected: Any, inputs: Tensor) -> float:
    """How far a network that runs on `inputs`, in their type, may be from its oracle, as a share of the largest output.

    It is the tolerance of the type, or more for a network that amplifies rounding: `NOISE_MARGIN` times what the oracle
    makes, in float32, of a relative noise on its input as large as the steps of the type.

    Args:
        oracle: on the device of `inputs`, float32.
        expected: what it gives for `inputs.float()`.
        inputs: `(N, C, H, W)`.
    """
    rough = inputs.is_cuda and inputs.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    step = torch.finfo(torch.float16 if rough else inputs.dtype).eps
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(1)).to(inputs.device)
    response = difference(oracle(inputs.float() * (1 + step * noise)), expected)
    return max(TF32_TOLERANCE if rough else TOLERANCE[inputs.dtype], min(NOISE_MARGIN * response, LARGEST_LIMIT))


def difference(found: Any, expected: Any) -> float:
    """Largest difference of two outputs as a share of the largest expected number; infinite if one is not finite.

    Raises:
        VerificationError: they do not have the same shapes.
    """
    mine, theirs = _tensors(found), _tensors(expected)
    if not all(bool(tensor.isfinite().all()) for tensor in (*mine, *theirs)):
        return math.inf
    return verification.difference(mine, theirs)[1]


def _tensors(output: Any) -> list[Tensor]:
    return [tensor.detach().float().cpu() for tensor in tensors_in(output)]
