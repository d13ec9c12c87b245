"""Compiling a network of four times the blocks takes four times the work: counted, not timed."""

import warnings
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from passes_harness import image
from torch import Tensor, nn

import fxprune
import fxprune.graph.values as values_module
from fxprune.channels.atoms import Reordering

CHANNELS = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.second = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.norm(self.first(x))))
        return y


def chain(blocks: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(blocks))).eval()


def work_of(blocks: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a compilation does what takes its time, and for how many channels."""
    done: Counter[str] = Counter()
    run, permutation = values_module.meta_values, Reordering.permutation

    def counted(name: str, work: Callable[..., object], weigh: Callable[[object], int]) -> Callable[..., object]:
        def call(*args: object) -> object:
            result = work(*args)
            done[name] += weigh(result)
            return result

        return call

    def atoms(moved: object) -> int:
        assert isinstance(moved, np.ndarray)
        return moved.size

    with monkeypatch.context() as patch:
        patch.setattr(values_module, "meta_values", counted("runs on meta tensors", run, lambda _: 1))
        patch.setattr(Reordering, "permutation", counted("channels ordered", permutation, atoms))
        model, x = chain(blocks), image(CHANNELS).float()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruned = fxprune.compile(model, 0.5, form="overlap", groups=4, example_inputs=x, verify=False)
    done["gathers"] = len(fxprune.report(pruned).gathers)
    return done


def test_a_longer_chain_takes_work_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = work_of(8, monkeypatch), work_of(32, monkeypatch)
    assert short["gathers"] > 4
    assert long["gathers"] >= 3 * short["gathers"]
    assert long["runs on meta tensors"] == short["runs on meta tensors"] == 2  # one for the plan, one for the rewrite
    assert long["channels ordered"] <= 4.5 * short["channels ordered"]
