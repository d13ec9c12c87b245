"""Nets and requests whose plans are recorded, and how they are recorded.

The record holds what release 0.1 planned. It was written, and is extended, with the code of that release:

    git worktree add ../release <its commit>
    cd ../release && PYTHONPATH=. python <here>/tests/recorded_plans_harness.py <here>/tests/data

Existing entries stay as they are unless `--anew` is given. The weights are short binary fractions, so that float64
adds them up exactly in any order: a plan that ranks sums must not hang on the instruction set or on the number of
threads. Filters went in ones then, and are asked for so.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fxprune
from fxprune.models import load_model

DATA = Path(__file__).parent / "data"
ZERO, SPARED = "ratio is 0", "the budget was met without it"
"""Why a layer stays whole to which a budget gave no ratio: what 0.1 said, and what is said now."""


class Tiny(nn.Module):
    """Two residual additions, a projection, a depthwise convolution and a concatenation, 24 to 32 channels wide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.first = nn.Conv2d(24, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.second = nn.Conv2d(32, 24, 3, padding=1)
        self.third = nn.Conv2d(24, 24, 1)
        self.project = nn.Conv2d(24, 24, 1, stride=2)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.left, self.right = nn.Conv2d(24, 24, 1), nn.Conv2d(24, 24, 3, padding=1)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.second(self.norm(self.first(x)).relu())).relu()
        x = self.depthwise(self.project((x + self.third(x)).relu())).relu()
        y: Tensor = self.head(torch.cat([self.left(x), self.right(x)], 1).relu().mean((2, 3)))
        return y


@torch.no_grad()
def with_short_weights(model: nn.Module) -> nn.Module:
    """The model in float64 with weights of -99 to 99 parts in 1024, which NumPy draws alike in every version.

    Wide enough for few ties, short enough for exact sums of squares. Statistics of BatchNorm stay 0 and 1.
    """
    generator = np.random.RandomState(0)  # whose stream never changes
    for parameter in model.double().parameters():
        parameter.copy_(torch.from_numpy(generator.randint(-99, 100, tuple(parameter.shape)) / 1024))
    return model.eval()


def net(name: str) -> nn.Module:
    return with_short_weights(Tiny() if name == "tiny" else load_model(name))


def example(name: str) -> Tensor:
    size = 16 if name == "tiny" else 64
    return torch.zeros(2, 3, size, size, dtype=torch.float64)


def images() -> Tensor:
    drawn = np.random.RandomState(1).randint(-9, 10, (16, 3, 16, 16))
    return torch.from_numpy(drawn.astype(np.float64))


BOTH = {"filter": 0.25, "kernel": 0.5}
RANKED: dict[str, Any] = {"granularity": "filter", "scope": "global", "macs": 0.6, "round_to": 4}
# What is asked of the tiny net; its plans are recorded whole.
TINY: dict[str, dict[str, Any]] = {
    "default": {},
    "ratio": {"ratio": 0.6},
    "ratio by layer": {"ratio": {"first": 0.25, "*": 0.75}},
    "partition": {"ratio": 0.75, "form": "partition"},
    "overlap": {"ratio": 0.4, "form": "overlap", "groups": 8},
    "groups by layer": {"groups": {"left": 2, "*": 4}},
    "block": {"block": 4, "form": "overlap"},
    "cpu": {"target": "cpu", "ratio": 0.75},
    "cuda": {"target": "cuda", "block": 8},
    "shared groups": {"share_groups": True},
    "macs": {"macs": 0.6},
    "params": {"params": 0.5},
    "criterion": {"criterion": "l1", "form": "overlap"},
    "variety": {"criterion": "l1", "variety": "pairs"},
    "soft variety": {"variety": "soft", "form": "overlap"},
    "srgkp": {"method": "srgkp", "groups": 4},
    "filters": {"granularity": "filter", "ratio": 0.3, "round_to": 1},
    "ranked filters": RANKED,
    "both": {"granularity": BOTH, "round_to": 1},
    "ignore": {"ignore": ["first", "l*"]},
    "seed": {"seed": 3},
}
# With data, of which the last bits decide between channels that are alike: how many stay is recorded, not which.
CALIBRATED: dict[str, dict[str, Any]] = {
    "calibrated": {},
    "calibrated filters": {"granularity": "filter", "ratio": 0.3, "round_to": 1},
    "calibrated both": {"granularity": BOTH, "round_to": 1},
}
# What is asked of the large ones; a digest of the plan is recorded, and a line a layer.
LARGE: dict[str, dict[str, Any]] = {
    "default": {},
    "overlap": {"ratio": 0.6},
    "cuda": {"target": "cuda", "block": 8, "ratio": 0.6},
    "shared groups": {"share_groups": True},
    "macs": {"macs": 0.6},
    "filters": {"granularity": "filter", "ratio": 0.3, "round_to": 1},
    "ranked filters": RANKED,
    "both": {"granularity": BOTH, "round_to": 1},
}
NETS: dict[str, dict[str, dict[str, Any]]] = {"tiny": TINY | CALIBRATED, "resnet18": LARGE, "mobilenet_v2": LARGE}


def planned(model: nn.Module, name: str, request: str) -> dict[str, Any]:
    """The plan as its JSON says it."""
    data: dict[str, Any] = {"calibration": images()} if request in CALIBRATED else {}
    plan = fxprune.make_plan(model, example_inputs=example(name), **data, **NETS[name][request])
    decoded: dict[str, Any] = json.loads(plan.to_json())
    if NETS[name][request].keys() & {"macs", "params"}:  # 0.1 said so of each layer that it could not prune
        told = decoded["skipped"].items()
        decoded["skipped"] = {n: ZERO if why in (ZERO, SPARED) else "no pattern of ratio matches" for n, why in told}
    return decoded


def digest(plan: Mapping[str, Any]) -> str:
    """SHA-256 of what a plan does: all but shares and costs, which are rounded numbers."""
    chosen = {
        "layers": {n: [k["out_order"], k["kept"], k["in_channels"], k["block"]] for n, k in plan["layers"].items()},
        "removed": {name: [gone["outputs"], gone["inputs"]] for name, gone in plan["removed"].items()},
        **{key: plan[key] for key in ("method", "criterion", "seed", "skipped", "notes")},
    }
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def summary(plan: Mapping[str, Any]) -> dict[str, str]:
    """What happens to each layer, in words."""
    told = {}
    for name, kernels in plan["layers"].items():
        every = [channel for group in kernels["kept"] for channel in group]
        form = "partition" if sorted(every) == list(range(kernels["in_channels"])) else "overlap"
        block = f", blocks of {kernels['block']}" if kernels["block"] > 1 else ""
        told[name] = f"{form}, {len(kernels['kept'])} groups, {len(kernels['kept'][0])}/{kernels['in_channels']}{block}"
    for name, gone in plan["removed"].items():
        cut = f"-{len(gone['outputs'])} filters, -{len(gone['inputs'])} inputs"
        told[name] = f"{cut}; {told[name]}" if name in told else cut
    return told


def recorded(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((DATA / "plans" / f"{name}.json").read_text())
    return record


def record(folder: Path, anew: bool) -> None:
    """Write what this code plans to `folder`, which see the docstring of the module."""
    (folder / "plans").mkdir(parents=True, exist_ok=True)
    for name, requests in NETS.items():
        model, path = net(name), folder / "plans" / f"{name}.json"
        entries = json.loads(path.read_text()) if path.exists() and not anew else {}
        for request in requests:
            if request not in entries:
                plan = planned(model, name, request)
                entries[request] = (
                    plan
                    if request in TINY and name == "tiny"
                    else {"layers": summary(plan)}
                    if request in CALIBRATED
                    else {"digest": digest(plan), "layers": summary(plan)}
                )
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items())
        path.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    record(Path(sys.argv[1]), "--anew" in sys.argv[2:])
