"""Cases of the zoo by name, and calibration data for them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from zoo import CASES, Case

Batches = Sequence[tuple[Tensor, ...]]


def batches(case: Case, count: int = 2, size: int = 4) -> Batches:
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randn(size, *x.shape[1:], generator=generator, dtype=x.dtype) for x in case.inputs())
        for _ in range(count)
    ]


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)
