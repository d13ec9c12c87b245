"""A machine whose time is what it computes: a nanosecond for each multiply-accumulate of a convolution, a microsecond
beside it for each call of a network.
"""
# nn.Module.__call__ is typed to return Any; each net would need a cast.
# mypy: disable-error-code="no-any-return"

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.inference import acceleration, duel, forms, integers
from fxprune.inference import stopwatch as measurements
from fxprune.inference.engines import LibraryConv2d
from fxprune.inference.race import Timing
from fxprune.planning.latency import layers as layer_times
from fxprune.planning.latency import measure as latency_measure


class Net(nn.Module):
    """Two wide stages with a stride, a shortcut and a convolution that is called twice."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.twice = nn.Conv2d(width, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.point = nn.Conv2d(2 * width, 2 * width, 1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (self.norm(self.first(x)) + x).relu()
        x = self.twice(self.twice(x).relu()).relu()
        return self.head(self.point(self.down(x).relu()).relu().mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def image(count: int = 1, size: int = 12) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


class Clock:
    """A machine on which a call takes a nanosecond for each multiply-accumulate of a convolution, and 1 us beside it;
    whole graphs that are pruned take `factor` times that, and all calls `busy` times.
    """

    def __init__(self) -> None:
        self.factor, self.busy = 1.0, 1.0
        self.races = 0

    def seconds(self, call: Callable[[], object]) -> float:
        macs = 0

        def count(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal macs
            if isinstance(module, LibraryConv2d):
                macs += output.numel() * module.conv.weight[0].numel()

        handle = nn.modules.module.register_module_forward_hook(count)
        call()
        handle.remove()
        return self.busy * (1e-9 * macs + 1e-6)

    def race(self, variants: Mapping[str, Callable[[], object]], **_: Any) -> dict[str, Timing]:
        self.races += 1
        whole = {name: self.factor if name == "pruned" or name.startswith("pruned c") else 1.0 for name in variants}
        return {name: Timing((whole[name] * self.seconds(call),)) for name, call in variants.items()}


def wind(patch: pytest.MonkeyPatch, cache: Path, clock: Clock | None = None) -> Clock:
    """A clock in place of the real one."""
    clock = clock or Clock()
    patch.setenv("FXPRUNE_CACHE", str(cache))
    patch.setattr(latency_measure, "LANES", {})
    for module in (forms, layer_times):
        patch.setattr(module, "ENGINES", (LibraryConv2d,))
    for race in (acceleration, duel, integers, latency_measure, measurements):
        patch.setattr(race, "race", clock.race)
    return clock
