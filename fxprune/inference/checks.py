"""Does an accelerated model compute what the model did? Up to rounding of the type."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fxprune.errors import VerificationError
from fxprune.exact.verification import difference
from fxprune.graph.containers import tensors_in

# Largest difference to the model before, relative to the largest output: some hundred steps of the type (TF32 for
# float32 on CUDA), or else what the model itself makes of such a step on its input, times a few for its many layers.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
TF32_TOLERANCE = 1e-2
NOISE_MARGIN = 20
LARGEST_LIMIT = 0.1


def check_same(
    accelerated: nn.Module, original: nn.Module, inputs: tuple[Any, ...], expected: list[Tensor], dtype: torch.dtype
) -> float:
    """The difference that acceleration made, relative to the largest output.

    Raises:
        VerificationError: it is more than rounding.
    """
    found = tensors_in(accelerated(*inputs))
    gap = difference(found, expected)[1]
    is_cuda = any(tensor.is_cuda for tensor in expected)
    limit = TF32_TOLERANCE if is_cuda and dtype == torch.float32 else TOLERANCES.get(dtype, LARGEST_LIMIT)
    if gap > limit:
        shaken = tree_map(lambda leaf: _shaken(leaf, limit / NOISE_MARGIN), inputs)
        moved = tensors_in(original(*shaken))
        limit = max(limit, min(LARGEST_LIMIT, NOISE_MARGIN * difference(moved, expected)[1]))
    if not gap <= limit:
        raise VerificationError(
            f"the accelerated model differs by {gap:.1e} of the largest output (limit {limit:.0e}); "
            "this is a defect of fxprune, please report it with the model"
        )
    return gap


def _shaken(leaf: Any, share: float) -> Any:
    """The input, each number moved by about `share` of itself."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    noise = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1)).to(leaf)
    return leaf * (1 + share * noise)
