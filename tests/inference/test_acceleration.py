"""accelerate: the same function, never slower than dense, and clear words for what it was not made for."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equality import randomize
from products_harness import in_turns
from torch import Tensor, fx, nn

import fxprune
from fxprune.errors import AccelerationError, FxpruneError, PlanError, VerificationError
from fxprune.graph.fused import FusedConv2d
from fxprune.inference import acceleration, forms
from fxprune.inference import stopwatch as measurements
from fxprune.inference.acceleration import accelerate, acceleration_report
from fxprune.inference.engines import ENGINES, LibraryConv2d
from fxprune.inference.race import Timing
from fxprune.vocabulary import FormChoice


def image(batch: int = 2, size: int = 12, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    def __init__(self, width: int, stride: int = 1, source: int | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(source or width, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.project = nn.Conv2d(source, width, 1, stride) if source else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        y += self.project(x)
        return F.relu(y)


class Residual(nn.Module):
    """A small ResNet, whose head needs no fixed image size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(Block(16), Block(32, 2, 16))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.dropout(self.blocks(self.stem(x).relu()).mean((2, 3))))
        return y


class Views(nn.Module):
    """AlexNet's way to the classifier, which has no view in channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU6())
        self.head = nn.Linear(16 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.features(x).view(x.size(0), -1))
        return y


class Several(nn.Module):
    """Two inputs, one of them no image; results in a dict and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.scale = nn.Linear(4, 16)

    def forward(self, x: Tensor, z: Tensor) -> dict[str, Any]:
        y = self.left(x).relu()
        return {"map": self.right(y) + y, "more": (y.mean(), self.scale(z))}


class NoImages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line, self.head = nn.Conv1d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.line(x).relu().mean(2))
        return y


def net(kind: type[nn.Module] = Residual) -> nn.Module:
    return randomize(kind()).eval()


def pruned(form: FormChoice = "overlap", kind: type[nn.Module] = Residual, x: Tensor | None = None) -> fx.GraphModule:
    return fxprune.compile(net(kind), 0.5, form=form, example_inputs=image() if x is None else x)


def same(fast: nn.Module, slow: nn.Module, *inputs: Tensor, limit: float = 1e-4) -> None:
    with torch.no_grad():
        expected, found = slow(*inputs), fast(*inputs)
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit)


@pytest.fixture(autouse=True)
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here depends on how long anything takes."""
    monkeypatch.setattr(acceleration, "ROUNDS", 1)
    monkeypatch.setattr(measurements, "ROUNDS", 1)
    monkeypatch.setattr(measurements, "TURN_SECONDS", 0.0)


def take_times(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[str], float]) -> None:
    """Let every form and graph last as long as `seconds` says of its name."""

    def race(variants: Mapping[str, Callable[[], object]], **_: object) -> dict[str, Timing]:
        for call in variants.values():
            call()
        return {name: Timing((seconds(name),)) for name in variants}

    monkeypatch.setattr(acceleration, "race", race)
    monkeypatch.setattr(measurements, "race", race)


@pytest.fixture(scope="module")
def fast() -> tuple[fx.GraphModule, fx.GraphModule]:
    """An accelerated model and what it was made from, with each engine in it at some place."""
    slow = pruned()
    with pytest.MonkeyPatch.context() as patch:
        turn = iter(range(10**6))
        take_times(patch, lambda name: (2 if name.startswith("dense") else 1) + next(turn) * 7 % 5 / 10)
        return accelerate(slow, image(), remember=False), slow


# --- the function ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["partition", "overlap"])
def test_a_pruned_model_computes_the_same(form: FormChoice) -> None:
    slow = pruned(form)
    state = copy.deepcopy(slow.state_dict())
    fast = accelerate(slow.train(), image())
    assert slow.training
    for name, tensor in slow.state_dict().items():
        assert torch.equal(tensor, state[name]), f"{name} has changed"
    same(fast, slow.eval(), image())
    assert not [module for module in fast.modules() if isinstance(module, nn.BatchNorm2d | nn.Conv2d)]


@pytest.mark.parametrize(
    "engine, memory_format", in_turns([engine.name for engine in ENGINES], ["channels_last", "contiguous"])
)
def test_every_engine_in_every_format(engine: str, memory_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take_times(monkeypatch, lambda name: 1 + (engine not in name) + (f"pruned {memory_format}" not in name) / 2)
    monkeypatch.setattr(acceleration, "MARGIN", 9)
    slow = pruned()
    fast = accelerate(slow, image(), remember=False)
    assert acceleration_report(fast).chosen == f"pruned {memory_format}"
    same(fast, slow, image(3, 9, seed=1))


@pytest.mark.parametrize(
    "kind, inputs",
    [
        (Residual, (image(),)),
        (Views, (image(),)),
        (Several, (image(), torch.ones(2, 4))),
        (NoImages, (torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0)),)),
    ],
)
def test_a_dense_model_computes_the_same(kind: type[nn.Module], inputs: tuple[Tensor, ...]) -> None:
    model = net(kind)
    fast = accelerate(model, inputs)
    same(fast, model, *inputs)
    report = acceleration_report(fast)
    assert report.chosen.startswith("dense")
    assert report.relative == 1
    assert report.compiled is None


def test_views_in_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    take_times(monkeypatch, lambda name: 1.0 if "channels_last" in name else 2.0)
    model = net(Views)
    same(accelerate(model, image(), remember=False), model, image(5))


@pytest.mark.parametrize(
    "x",
    [
        image(1), image(7), image(0), image(2, 5), image(3, 31), image(2, 12).transpose(2, 3),
        image(4, 24)[::2, :, 1::2], image(1).expand(4, -1, -1, -1),
        image(2).contiguous(memory_format=torch.channels_last),
    ],
    ids=["one", "seven", "empty", "small", "odd", "transposed", "strided", "expanded", "channels_last"],
)  # fmt: skip
def test_other_inputs(x: Tensor, fast: tuple[fx.GraphModule, fx.GraphModule]) -> None:
    same(*fast, x)


def test_a_very_large_image() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(8), nn.Conv2d(4, 4, 1)).eval()
    same(accelerate(model, image(1, 32)), model, image(1, 2048))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    fast = accelerate(model, image().to(dtype))
    same(fast, model, image().to(dtype), limit=1e-9 if dtype == torch.float64 else 0.1)
    with pytest.raises(AccelerationError, match=r"and the input is torch.float32"):
        fast(image())


def test_gradients_do_not_go_through(fast: tuple[fx.GraphModule, fx.GraphModule]) -> None:
    x = image().requires_grad_()
    y = fast[0](x)
    assert not y.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(fast[0](image()), y)


# --- what it refuses ------------------------------------------------------------------------------------------------


def test_what_it_was_not_made_for(fast: tuple[fx.GraphModule, fx.GraphModule]) -> None:
    model = fast[0]
    for x in (image().to("meta"), image().double(), image().half()):
        with pytest.raises(AccelerationError, match=r"accelerated for torch.float32 on cpu"):
            model(x)
    with pytest.raises(AccelerationError, match=r"input of 4 dimensions, and this one has 3"):
        model(image()[0])
    with pytest.raises(AccelerationError, match=r"for inference; call eval"):
        copy.deepcopy(model).train()(image())
    with pytest.raises(AccelerationError, match=r"cannot become"):
        copy.deepcopy(model).double()


def test_what_cannot_be_accelerated(fast: tuple[fx.GraphModule, fx.GraphModule]) -> None:
    with pytest.raises(AccelerationError, match=r"accelerated already"):
        accelerate(fast[0], image())
    mixed = net()
    mixed.get_submodule("head").double()
    with pytest.raises(AccelerationError, match=r"several devices or types \(cpu, torch.float32, torch.float64\)"):
        accelerate(mixed, image())
    with pytest.raises(AccelerationError, match=r"several devices"):
        accelerate(net(), image().to("meta"))


def test_what_is_for_pruned_models_only(fast: tuple[fx.GraphModule, fx.GraphModule], tmp_path: Any) -> None:
    with pytest.raises(FxpruneError, match=r"the model is accelerated"):
        fxprune.save(fast[0], tmp_path / "model.pt")
    with pytest.raises(FxpruneError):
        fxprune.verify(fast[0], fast[1], image())
    with pytest.raises(AccelerationError, match=r"Residual carries no report"):
        acceleration_report(net())


def test_targets() -> None:
    with pytest.raises(AccelerationError, match=r"needs example_inputs"):
        fxprune.compile(net(), target="cpu")
    with pytest.raises(AccelerationError, match=r"the model is on cpu"):
        fxprune.compile(net(), target="cuda", example_inputs=image())
    with pytest.raises(PlanError, match=r"tpu"):
        fxprune.compile(net(), target="tpu", example_inputs=image())  # type: ignore[arg-type]
    fast = fxprune.compile(net(), target="cpu", example_inputs=image())
    assert acceleration_report(fast).device == "cpu"
    assert fxprune.report(fast).layers


# --- copies ---------------------------------------------------------------------------------------------------------


def test_copies(fast: tuple[fx.GraphModule, fx.GraphModule]) -> None:
    other = copy.deepcopy(fast[0])
    assert acceleration_report(other).to_dict() == acceleration_report(fast[0]).to_dict()
    assert torch.equal(other(image()), fast[0](image()))
    scripted = torch.jit.script(fast[0])
    for _ in range(3):
        assert torch.equal(scripted(image()), fast[0](image()))


# --- the choice -----------------------------------------------------------------------------------------------------


def test_the_dense_graph_is_returned_when_pruning_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    take_times(monkeypatch, lambda name: 3.0 if name == "pruned channels_last" else 1.0 + ("pruned" not in name))
    monkeypatch.setattr(acceleration, "FORMATS", {"channels_last": torch.channels_last})
    slow = pruned()
    fast = accelerate(slow, image(), remember=False)
    report = acceleration_report(fast)
    assert report.chosen == "dense channels_last"
    assert report.seconds["pruned channels_last"] == 3
    assert report.relative == 1
    assert all(layer.chosen.startswith("dense") for layer in report.layers)
    same(fast, slow, image())


def test_every_layer_gets_its_fastest_form(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {
        "pruned library": 3.0,
        "pruned onednn": 1.0,
        "dense library": 0.5,
        "dense onednn": 2.0,
        "dense channels_last": 9.0,
    }
    take_times(monkeypatch, lambda name: next((t for form, t in times.items() if name.startswith(form)), 4.0))
    slow = pruned()
    report = acceleration_report(accelerate(slow, image(), remember=False))
    assert {layer.chosen for layer in report.layers} == {"dense library"}
    times["dense library"] = 1.5
    report = acceleration_report(accelerate(slow, image(), remember=False))
    assert report.chosen.startswith("pruned")
    names = {layer.name for layer in fxprune.report(slow).layers}
    for layer in report.layers:
        is_pruned = any(form.startswith("pruned") for form in layer.seconds)
        assert layer.chosen == ("pruned onednn" if is_pruned else "dense library")
        assert layer.dense_seconds == 1.5
        assert layer.name in names


def test_choices_are_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(acceleration, "FORMATS", {"contiguous": torch.contiguous_format})
    slow = pruned()
    raced: list[str] = []
    right = measurements.Stopwatch.race

    def race(self: measurements.Stopwatch, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        raced.extend(calls)
        return right(self, calls)

    monkeypatch.setattr(measurements.Stopwatch, "race", race)
    first = accelerate(slow, image())
    assert raced
    raced.clear()
    again = accelerate(slow, image())
    assert not raced
    layers = [[(layer.name, layer.seconds) for layer in acceleration_report(fast).layers] for fast in (first, again)]
    assert layers[0] == layers[1]
    accelerate(slow, image(1))
    assert raced, "another batch has other times"


def test_control_a_broken_engine_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = FusedConv2d.forward
    model = net()
    accelerate(model, image(), remember=False)
    monkeypatch.setattr(forms, "ENGINES", (LibraryConv2d,))
    monkeypatch.setattr(FusedConv2d, "forward", lambda self, x, residual=None: 1.01 * right(self, x, residual))
    with pytest.raises(VerificationError, match=r"the accelerated model differs by .* defect of fxprune"):
        accelerate(model, image(), remember=False)


def test_the_report_says_it_all(fast: tuple[fx.GraphModule, fx.GraphModule]) -> None:
    report = acceleration_report(fast[0])
    assert json.loads(json.dumps(report.to_dict()))["memory_format"] == report.memory_format
    text = str(report)
    for part in (
        "convolution",
        "blocks.0.conv1",
        "whole network, shortest times: ",
        f"chosen: {report.chosen}",
        "float32 on cpu",
    ):
        assert part in text
    assert report.difference < 1e-4
    assert report.compiled is fxprune.report(fast[1])


@pytest.mark.parametrize("granularity", ["kernel", "filter", {"filter": 0.25, "kernel": 0.5}])
def test_the_report_says_what_the_time_is_a_share_of(granularity: Any) -> None:
    ratio = None if isinstance(granularity, dict) else 0.5
    pruned = fxprune.compile(net(), ratio, granularity=granularity, example_inputs=image())
    report = acceleration_report(accelerate(pruned, image(), remember=False))
    compiled = fxprune.report(pruned)
    narrower = granularity != "kernel"
    assert report.is_narrower == compiled.is_narrower == narrower
    assert ("the best dense time" in report.brief()) == (not narrower)
    said = "the model before pruning did not race: filters or branches are gone from every form, with "
    assert (said in str(report)) == narrower
    if narrower:
        assert compiled.macs_pruned is not None
        assert compiled.macs_dense is not None
        assert f"with {compiled.macs_pruned / compiled.macs_dense:.0%} of its" in str(report)
    as_fast = replace(report, relative=1.0).brief()
    assert ("1.00" in as_fast) == (not narrower), "a narrower network is not sold as no faster"
    assert "0.80 of" in replace(report, relative=0.8).brief()


def test_the_numbers_of_the_report_agree(fast: tuple[fx.GraphModule, fx.GraphModule]) -> None:
    report = acceleration_report(fast[0])
    best_dense = min(seconds for name, seconds in report.seconds.items() if name.startswith("dense"))
    assert report.relative == report.seconds[report.chosen] / best_dense <= 1
    assert report.spread.keys() == report.seconds.keys()
    text = str(report)
    for name, seconds in report.seconds.items():
        assert f"{name} {1e3 * seconds:.2f} ms (spread {1e3 * report.spread[name]:.2f})" in text
    assert repr(report).startswith("<AccelerationReport: ")
    assert "linear-gradient" in report._repr_html_()
    assert {"triton"} <= set(report.layers[0].obstacles)
