"""A tiny net, and the files that release 0.1 wrote for it: two plans, a compiled model, and what it computes.

They were written once with the code of that release and are never written anew:

    git worktree add ../release <its commit>
    cd ../release && PYTHONPATH=. python <here>/tests/release_files_harness.py <here>/tests/data/release_0_1
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fxprune

FILES = Path(__file__).parent / "data" / "release_0_1"
# What each plan asks for: kernels that stay in groups, and filters that go first.
PLANS: dict[str, dict[str, Any]] = {
    "kernels": {"ratio": 0.6, "form": "overlap", "block": 2},
    "filters and kernels": {"granularity": {"filter": 0.25, "kernel": 0.5}},
}


class Small(nn.Module):
    """A residual block and a head: few weights, so that the files stay small."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 1)
        self.first, self.norm = nn.Conv2d(24, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.second = nn.Conv2d(24, 24, 1)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y: Tensor = self.head((x + self.second(self.norm(self.first(x)).relu())).mean((2, 3)))
        return y


@torch.no_grad()
def small() -> nn.Module:
    """The net in evaluation mode, with weights that NumPy draws alike in every version."""
    model, generator = Small(), np.random.RandomState(0)
    for parameter in model.parameters():
        parameter.copy_(torch.from_numpy(generator.randint(-99, 100, tuple(parameter.shape)) / 128))
    return model.eval()


def image() -> Tensor:
    return torch.from_numpy(np.random.RandomState(1).randint(-9, 10, (2, 3, 5, 5)) / 8).float()


def file_of(plan: str) -> str:
    return f"{plan.replace(' ', '_')}.json"


MODEL = "model.fxprune"
OUTPUTS = "outputs.json"


@torch.no_grad()
def write(folder: Path) -> None:
    """Write all files, which see the docstring of the module."""
    folder.mkdir(parents=True, exist_ok=True)
    outputs = {}
    for name, options in PLANS.items():
        plan = fxprune.make_plan(small(), example_inputs=image(), **options)
        (folder / file_of(name)).write_text(plan.to_json() + "\n")
        pruned = fxprune.rewrite(fxprune.mask(small(), plan), plan, image())
        outputs[name] = pruned(image()).tolist()
        fxprune.save(pruned, folder / MODEL)  # the last one stays: some filters are gone, kernels are in groups
    (folder / OUTPUTS).write_text(json.dumps(outputs) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
