"""fxprune.report: every number against one counted by hand."""

import copy
import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import FxpruneError, NothingRewrittenWarning
from fxprune.exact.reporting import _short
from fxprune.plans import GroupedKernels, PrunePlan

X = torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """16 -> 32 (3x3, with bias) -> 16 (1x1, stride 2, no bias) -> 10 by a linear layer, on 6x6 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.second, self.head = nn.Conv2d(32, 16, 1, stride=2, bias=False), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.second(self.norm(self.first(x)).relu()).mean((2, 3)))
        return y


def order(size: int) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.randperm(size, generator=torch.Generator().manual_seed(2)))


# first keeps 8 of 16 channels in 2 groups that partition them, second 10 of 32 in 4 groups that overlap
EVEN, ODD = tuple(range(0, 16, 2)), tuple(range(1, 16, 2))
PLAN = PrunePlan(
    {
        "second": GroupedKernels(order(16), tuple(tuple(range(g, g + 10)) for g in range(4)), 32, asked_ratio=0.7),
        "first": GroupedKernels(order(32), (EVEN, ODD), 16, asked_ratio=0.5),
    }
)


@pytest.fixture
def pruned() -> torch.fx.GraphModule:
    return fxprune.rewrite(fxprune.mask(Net(), PLAN), PLAN, X)


def test_parameters_and_macs_of_each_layer(pruned: torch.fx.GraphModule) -> None:
    first, second = fxprune.report(pruned).layers  # in the order of the model, not of the plan
    assert (first.name, first.form, first.groups) == ("first", "partition", 2)
    assert (first.params_dense, first.params) == (32 * 16 * 9 + 32, 32 * 8 * 9 + 32)
    assert (first.macs_dense, first.macs) == (36 * 32 * 16 * 9, 36 * 32 * 8 * 9)
    assert (first.asked_ratio, first.reached_ratio) == (0.5, 0.5)
    assert (second.name, second.form, second.groups) == ("second", "overlap", 4)
    assert (second.params_dense, second.params) == (16 * 32, 16 * 10)
    assert (second.macs_dense, second.macs) == (9 * 16 * 32, 9 * 16 * 10)
    assert second.asked_ratio == 0.7
    assert second.reached_ratio == pytest.approx(1 - 10 / 32)
    assert first.reason == second.reason == ""


def test_totals_count_all_parameters_and_all_layers_that_multiply(pruned: torch.fx.GraphModule) -> None:
    report = fxprune.report(pruned)
    rest = 2 * 32 + 16 * 10 + 10  # BatchNorm and the linear layer
    assert report.params_dense == 32 * 16 * 9 + 32 + 16 * 32 + rest
    assert report.params_pruned == 32 * 8 * 9 + 32 + 16 * 10 + rest
    assert report.params_pruned == sum(p.numel() for p in pruned.parameters())
    assert report.macs_dense == 36 * 32 * 16 * 9 + 9 * 16 * 32 + 160
    assert report.macs_pruned == 36 * 32 * 8 * 9 + 9 * 16 * 10 + 160
    assert report.input_shapes == ((2, 16, 6, 6),)
    assert report.rewritten == 2


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_macs_are_for_one_image(batch: int) -> None:
    report = fxprune.report(fxprune.rewrite(fxprune.mask(Net(), PLAN), PLAN, X[:1].repeat(batch, 1, 1, 1)))
    assert report.macs_dense == 36 * 32 * 16 * 9 + 9 * 16 * 32 + 160


def test_a_shared_layer_has_its_parameters_once_and_its_macs_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(self.conv(x).relu())
            return y

    plan = PrunePlan({"conv": GroupedKernels(order(16), (EVEN, ODD), 16, 0.5)})
    (layer,) = fxprune.report(fxprune.rewrite(fxprune.mask(Twice(), plan), plan, X)).layers
    assert (layer.params_dense, layer.params) == (256, 128)
    assert (layer.macs_dense, layer.macs) == (2 * 36 * 256, 2 * 36 * 128)


def test_a_transposed_convolution_counts_by_its_inputs() -> None:
    net = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.ConvTranspose2d(16, 8, 2, stride=2, bias=False))
    report = fxprune.report(fxprune.compile(net, example_inputs=X))
    assert report.macs_dense == 36 * 256 + 36 * 16 * 8 * 4


def test_gathers_and_their_reasons(pruned: torch.fx.GraphModule) -> None:
    gathers = {gather.name: gather for gather in fxprune.report(pruned).gathers}
    modules = {name: m for name, m in pruned.named_modules() if isinstance(m, fxprune.ChannelGather)}
    assert gathers.keys() == modules.keys() == {"first_in", "second_in"}
    assert gathers["first_in"].channels == 16
    assert "x" in gathers["first_in"].reason or "input" in gathers["first_in"].reason
    assert gathers["second_in"].channels == 40
    assert gathers["second_in"].reason == "overlap form: the groups read 40 channels out of 32"


@pytest.mark.parametrize(
    "batch, dtype, size", [(2, torch.float32, 4), (1, torch.float32, 4), (5, torch.float32, 4), (2, torch.float16, 2)]
)
def test_gathered_bytes_are_what_is_written_for_one_image(batch: int, dtype: torch.dtype, size: int) -> None:
    x = X[:1].repeat(batch, 1, 1, 1).to(dtype)
    report = fxprune.report(fxprune.rewrite(fxprune.mask(Net().to(dtype), PLAN), PLAN, x))
    written = {gather.name: gather.bytes for gather in report.gathers}
    assert written == {"first_in": 16 * 36 * size, "second_in": 40 * 36 * size}  # second has stride 2, its gather not
    assert report.gathered_bytes == 56 * 36 * size
    assert report.to_dict()["gathered_bytes"] == report.gathered_bytes
    assert report.to_dict()["gathers"][0]["bytes"] == 16 * 36 * size
    assert "2 remain and write " + {4: "8.06 kB", 2: "4.03 kB"}[size] + " an image" in str(report)


def test_runs_of_a_gather_that_no_pass_can_order(pruned: torch.fx.GraphModule) -> None:
    """first reads the input, whose order is the user's: its even and odd channels are sixteen runs."""
    gathers = {gather.name: gather.runs for gather in fxprune.report(pruned).gathers}
    assert gathers["first_in"] == 16
    assert gathers["second_in"] < 40
    listed = fxprune.report(pruned).describe(gathers=True)
    (line,) = [line for line in listed.splitlines() if line.startswith("first_in")]
    assert line.split()[1:5] == ["2.3", "kB", "16", "16"]
    assert "first_in" not in str(fxprune.report(pruned)), "on request"


def test_no_gathers_write_no_bytes() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1))
    report = fxprune.report(fxprune.compile(net, example_inputs=torch.randn(2, 3, 8, 8)))
    assert report.gathers == ()
    assert report.gathered_bytes == 0
    assert "0 remain" in str(report)


def test_layers_left_dense_say_why() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1))
    report = fxprune.report(fxprune.compile(net, example_inputs=torch.randn(2, 3, 8, 8)))
    stem = report.layers[0]
    assert (stem.name, stem.form, stem.groups, stem.reached_ratio) == ("0", "dense", 1, 0.0)
    assert stem.params == stem.params_dense == 3 * 16 * 9 + 16
    assert "too few input channels" in stem.reason
    assert f"0            dense      {stem.reason}" in str(report)
    assert report.rewritten == 1


def test_the_table(pruned: torch.fx.GraphModule) -> None:
    report = fxprune.report(pruned)
    lines = str(report).splitlines()[5:]
    assert lines[0].split() == ["convolution", "form", "groups", "asked", "reached", "params", "MACs"]
    assert lines[1].split() == "first partition 2 0.5 0.5 4.64 k -> 2.34 k 166 k -> 82.9 k".split()
    assert lines[2].split() == "second overlap 4 0.7 0.688 512 -> 160 4.61 k -> 1.44 k".split()
    text = str(report)
    assert "2 of 2 convolutions grouped" in text
    assert f"({100 * report.params_pruned / report.params_dense:.1f} % remain)" in text
    assert "one image of 16x6x6" in text
    assert "2 remain" in text
    listed = report.describe(gathers=True)
    for gather in report.gathers:
        assert re.search(rf"{gather.name} .* {gather.channels}  {gather.reason}$", listed, re.MULTILINE)


# --- whole filters ---------------------------------------------------------------------------------------------------


class Depthwise(nn.Module):
    """16 -> 32 -> 32 depthwise -> 24 -> 10 by a linear layer, and a tail whose 4 channels are an output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.each = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.last, self.tail = nn.Conv2d(32, 24, 1, bias=False), nn.Conv2d(24, 4, 1)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.last(self.each(self.first(x).relu()).relu()).relu()
        return self.tail(y), self.head(y.mean((2, 3)))


def test_filters_before_and_after() -> None:
    pruned = fxprune.compile(Depthwise(), {"first": 0.25, "last": 0.5}, granularity="filter", example_inputs=X)
    report = fxprune.report(pruned)
    first, each, last, tail = report.layers
    assert {layer.form for layer in report.layers} == {"filters"}
    assert [(layer.filters_dense, layer.filters) for layer in report.layers] == [(32, 24), (32, 24), (24, 12), (4, 4)]
    assert [layer.groups for layer in report.layers] == [1, 24, 1, 1]
    assert [layer.asked_ratio for layer in report.layers] == [0.25, None, 0.5, None]
    assert [layer.reached_ratio for layer in report.layers] == [0.25, 0.25, 0.5, 0.0]
    assert [layer.reason for layer in report.layers] == ["", "", "", "model output"]
    assert (first.params_dense, first.params) == (32 * 17, 24 * 17)
    assert (each.params_dense, each.params) == (32 * 10, 24 * 10)
    assert (last.macs_dense, last.macs) == (36 * 24 * 32, 36 * 12 * 24)
    assert (tail.macs_dense, tail.macs) == (36 * 4 * 24, 36 * 4 * 12)
    assert report.macs_pruned == 36 * (24 * 16 + 24 * 9 + 12 * 24 + 4 * 12) + 120
    assert report.params_pruned == 24 * 17 + 24 * 10 + 12 * 24 + 4 * 13 + 10 * 13
    assert report.rewritten == 4
    first_line, *lines = str(report).splitlines()
    lines = lines[4:]
    assert lines[0].split() == ["convolution", "form", "groups", "filters", "asked", "reached", "params", "MACs"]
    assert lines[1].split() == "first filters 1 32 -> 24 0.25 0.25 544 -> 408 18.4 k -> 13.8 k".split()
    assert lines[2].split() == "each filters 24 32 -> 24 0.25 320 -> 240 10.4 k -> 7.78 k".split()
    assert lines[4].split() == "tail filters 1 4 -> 4 0 100 -> 52 3.46 k -> 1.73 k model output".split()
    assert "4 of 4 convolutions lost filters or input channels; the ratio is the share of filters removed" == first_line
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["filters"] == 24


NOT_CHOSEN = "none of its filters was chosen"


@pytest.mark.parametrize(
    "options, forms, reasons",
    [
        (
            {"ratio": 0.5, "ignore": "first"},
            ["dense", "dense", "filters", "filters"],
            ["first is ignored", "first is ignored", "", "model output"],
        ),
        (
            {"ratio": {"first": 0.5}},
            ["filters", "filters", "filters", "dense"],
            ["", "", NOT_CHOSEN, "model output"],
        ),
        (
            {"ratio": {"last": 0.5}},
            ["dense", "dense", "filters", "filters"],
            [NOT_CHOSEN, NOT_CHOSEN, "", "model output"],
        ),
    ],
    ids=["ignored", "the first", "the last"],
)
def test_every_convolution_that_keeps_its_filters_says_why(
    options: dict[str, Any], forms: list[str], reasons: list[str]
) -> None:
    report = fxprune.report(fxprune.compile(Depthwise(), granularity="filter", example_inputs=X, **options))
    assert [layer.form for layer in report.layers] == forms
    assert [layer.reason for layer in report.layers] == reasons
    assert f"{forms.count('filters')} of 4 convolutions lost filters or input channels" in str(report)
    for line, layer in zip(str(report).splitlines()[6:], report.layers, strict=True):
        assert line.startswith(layer.name)
        assert line.endswith(layer.reason)


def test_both_granularities_in_one_table() -> None:
    options: dict[str, Any] = {"granularity": {"filter": 0.25, "kernel": 0.5}, "example_inputs": X}
    report = fxprune.report(fxprune.compile(Depthwise(), **options))
    first, each, last, tail = report.layers
    assert [layer.form for layer in report.layers] == ["partition", "filters", "partition", "filters"]
    assert (first.asked_ratio, first.filters_dense, first.filters, first.groups) == (0.5, 32, 24, 2)
    assert (last.params_dense, last.params) == (24 * 32, 20 * 12)
    assert each.asked_ratio is None
    assert tail.reason
    assert report.rewritten == 4
    text = str(report)
    assert (
        "2 of 4 convolutions grouped, 2 others lost filters or input channels; the ratio is the share of kernel" in text
    )
    assert json.loads(json.dumps(report.to_dict()))["layers"][1]["asked_ratio"] is None


def test_redundancy_and_error_of_filters() -> None:
    data = torch.randn(16, 16, 6, 6, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"granularity": "filter", "calibration": data, "variety": "pairs"}
    first, each, last, tail = fxprune.report(fxprune.compile(Depthwise(), **options)).layers
    assert [layer.redundancy is not None for layer in (first, each, last, tail)] == [True, False, True, False]
    assert [layer.error is not None for layer in (first, each, last, tail)] == [False, False, True, True]
    plain = fxprune.report(fxprune.compile(Depthwise(), granularity="filter", example_inputs=X))
    assert all(layer.redundancy is layer.error is None for layer in plain.layers)


def test_without_filters_there_is_no_such_column(pruned: torch.fx.GraphModule) -> None:
    report = fxprune.report(pruned)
    assert all(layer.filters == layer.filters_dense for layer in report.layers)
    assert "filters" not in str(report)


def test_to_dict_survives_json(pruned: torch.fx.GraphModule) -> None:
    report = fxprune.report(pruned)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["layers"][0]["name"] == "first"
    assert data["macs_pruned"] == report.macs_pruned
    assert [gather["name"] for gather in data["gathers"]] == [gather.name for gather in report.gathers]
    assert data["input_shapes"] == [[2, 16, 6, 6]]


def test_an_assumed_input_is_noted(pruned: torch.fx.GraphModule) -> None:
    assert fxprune.report(pruned).notes == ()
    report = fxprune.report(fxprune.rewrite(fxprune.mask(Net(), PLAN), PLAN))
    assert report.input_shapes == ((2, 16, 224, 224),)
    assert "assumed input size" in report.notes[0]
    assert f"note: {report.notes[0]}" in str(report)


def test_unknown_shapes_are_called_unknown() -> None:
    class OddSize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x)
            return y.reshape(-1, 16 * 7 * 5)

    report = fxprune.report(fxprune.compile(OddSize(), example_inputs=None))
    assert report.macs_dense is report.macs_pruned is report.layers[0].macs is None
    assert "MACs        unknown  (unknown)" in str(report)
    assert report.gathered_bytes is None
    assert report.gathers[0].bytes is None
    assert "remain and write unknown bytes an image" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["macs_dense"] is None
    assert "no usual input size fits" in report.notes[0]


def test_nothing_rewritten_is_a_warning() -> None:
    with pytest.warns(NothingRewrittenWarning, match="too few input channels"):
        pruned = fxprune.compile(nn.Sequential(nn.Conv2d(3, 16, 3)), example_inputs=torch.randn(2, 3, 8, 8))
    report = fxprune.report(pruned)
    assert report.rewritten == 0
    assert report.params_pruned == report.params_dense
    assert "100.0 % remain" in str(report)


def test_a_copy_has_the_report_too(pruned: torch.fx.GraphModule) -> None:
    assert fxprune.report(copy.deepcopy(pruned)) == fxprune.report(pruned)


@pytest.mark.parametrize("foreign", [nn.Conv2d(3, 3, 1), torch.fx.symbolic_trace(nn.Sequential(nn.ReLU()))])
def test_a_foreign_module_has_no_report(foreign: nn.Module) -> None:
    with pytest.raises(FxpruneError, match=r"carries no record of a compilation; .*fxprune\.compile"):
        fxprune.report(foreign)


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0"), (999, "999"), (1000, "1 k"), (12_345, "12.3 k"), (999_499, "999 k"), (999_500, "1 M"),
        (999_999, "1 M"), (25_557_032, "25.6 M"), (999_999_999, "1 G"), (4_089_184_256, "4.09 G"),
    ],
)  # fmt: skip
def test_short_numbers(count: int, text: str) -> None:
    assert _short(count) == text
