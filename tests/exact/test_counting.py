"""Everything that multiplies is counted, each convolution has a row, and reasons are true."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxprune
from fxprune.vocabulary import Granularity

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def true_macs(model: nn.Module, x: Tensor = X) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return int(counter.get_total_flops()) // 2


class OnShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(32, 32, 3, padding=1), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x if x.shape[-1] > 4 else x * 2))


class OnData(OnShape):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x * 2 if float(x.sum()) > 0 else x))


def net(inside: nn.Module) -> nn.Module:
    def conv(channels: int = 32) -> nn.Conv2d:
        return nn.Conv2d(channels, 32, 3, padding=1)

    return nn.Sequential(conv(3), nn.ReLU(), conv(), nn.ReLU(), inside, nn.ReLU(), conv(), nn.ReLU(), conv()).eval()


@pytest.mark.parametrize("options", [{"macs": 0.7}, {"macs": 0.75, "granularity": "filter"}, {"ratio": 0.5}], ids=str)
@pytest.mark.parametrize("inside", [OnShape, OnData])
def test_modules_that_stay_whole_count(inside: type[nn.Module], options: dict[str, Any]) -> None:
    model = net(inside())
    pruned = fxprune.compile(model, example_inputs=X, output="graph", **options)
    report = fxprune.report(pruned)
    assert report.macs_dense == true_macs(model)
    assert report.macs_pruned == true_macs(pruned)
    if "macs" in options:
        assert (report.macs_pruned or 0) / (report.macs_dense or 1) == pytest.approx(options["macs"], abs=0.01)
    (row,) = [layer for layer in report.layers if layer.name == "4.conv"]
    assert row.macs == row.macs_dense == 64 * 32 * 32 * 9
    assert "inside 4" in row.reason


@pytest.mark.parametrize("options", [{"macs": 0.7}, {"macs": 0.7, "granularity": "filter"}, {"ratio": 0.5}], ids=str)
@pytest.mark.parametrize("inside", [OnShape, OnData])
def test_in_the_models_own_class_they_are_pruned_and_count(inside: type[nn.Module], options: dict[str, Any]) -> None:
    """The linear layer inside mixes another dimension than the gathers before it reorder."""
    model = net(inside())
    pruned = fxprune.compile(model, example_inputs=X, **options)
    report = fxprune.report(pruned)
    assert type(pruned) is nn.Sequential
    assert report.macs_dense == true_macs(model)
    assert report.macs_pruned == true_macs(pruned)
    (row,) = [layer for layer in report.layers if layer.name == "4.conv"]
    assert (row.macs or 0) < (row.macs_dense or 0)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.mid = nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 64, 3, padding=1)
        self.up = nn.ConvTranspose2d(64, 64, 2, 2)
        self.last, self.out = nn.Conv2d(64, 32, 3, padding=1), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.mid(self.down(x).relu()).relu()).relu()
        return self.out(self.last(y).relu())


@pytest.mark.parametrize("granularity", ["kernel", "filter"])
def test_each_convolution_of_any_kind_has_a_row(granularity: Granularity) -> None:
    model = UNet().eval()
    pruned = fxprune.compile(model, 0.5, example_inputs=X, granularity=granularity)
    report = fxprune.report(pruned)
    assert [layer.name for layer in report.layers] == ["down", "mid", "up", "last", "out"]
    assert report.macs_dense == true_macs(model)
    assert report.macs_pruned == true_macs(pruned)
    up = report.layers[2]
    assert up.macs_dense == sum(p.numel() for p in [model.up.weight]) * 16
    assert (up.macs or 0) == up.macs_dense / (4 if granularity == "filter" else 2)


def test_reasons_name_modules_and_what_is_true() -> None:
    class Cumulates(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(1)

    model = net(OnShape())
    assert isinstance(model, nn.Sequential)
    model[5] = Cumulates()
    report = fxprune.report(fxprune.compile(model, 0.5, example_inputs=X, granularity="filter", output="graph"))
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert "inside 4: its forward cannot be traced" in reasons["4.conv"]
    assert reasons["2"] != "the model never calls it"
    assert not any("the model never calls it" in reason for reason in reasons.values())


def test_shapes_come_from_a_real_run_where_forward_reads_data(tmp_path: Path) -> None:
    class Resize(nn.Module):
        def forward(self, x: Tensor, scales: Tensor) -> Tensor:
            return nn.functional.interpolate(x, scale_factor=scales.tolist()[2:])

    class Resizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.resize = Resize()
            self.register_buffer("scales", torch.tensor([1.0, 1.0, 2.0, 2.0]))
            self.a = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1))
            self.b = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 8, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.resize(self.a(x), self.scales))

    model = Resizes().eval()
    asked: list[dict[str, Any]] = [{"ratio": 0.5}, {"ratio": 0.5, "granularity": "filter"}, {"macs": 0.6}]
    for options in asked:
        pruned = fxprune.compile(model, example_inputs=X, **options)
        report = fxprune.report(pruned)
        assert report.macs_dense == true_macs(model)
        assert report.macs_pruned == true_macs(pruned)
        assert report.rewritten > 0
        fxprune.save(pruned, tmp_path / "saved.pt")
        loaded = fxprune.load(tmp_path / "saved.pt", Resizes()).eval()  # finds the same shapes, by a run of its own
        torch.testing.assert_close(loaded(X), pruned(X))
