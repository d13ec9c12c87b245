"""Other runtimes: the same function, clear words for what they do not take, files, threads and forks."""

import copy
import importlib.util
import inspect
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from alone_harness import SUFFIX, run_alone
from equality import randomize
from torch import Tensor, fx, nn

import fxprune
from fxprune import exports
from fxprune.errors import AccelerationError, FxpruneError, VerificationError
from fxprune.graph.containers import tensors_in
from fxprune.graph.editing import calls
from fxprune.graph.fused import FusedConv2d
from fxprune.inference import acceleration
from fxprune.inference import stopwatch as measurements
from fxprune.inference.acceleration import accelerate, acceleration_report
from fxprune.inference.fused_graph import fused_graph
from fxprune.inference.race import Timing
from fxprune.inference.runtimes import OTHERS, RuntimeModel, TorchModel, inductor, onnx_layers, openvino
from fxprune.inference.runtimes.calls import CallForm, Flat
from fxprune.inference.runtimes.onnx_based import OnnxBased
from fxprune.inference.runtimes.onnx_graphs import single_layer
from fxprune.inference.runtimes.onnx_layers import DENSE, GROUPED, SPLIT
from fxprune.vocabulary import FormChoice, GraphRuntime

HERE = [name for name, runtime in OTHERS.items() if not runtime.obstacle(torch.device("cpu"), torch.float32)]
READS_ONNX = [name for name in HERE if name != "inductor"]
each_runtime = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "inductor" else ()) for name in HERE]
)
each_that_reads_onnx = pytest.mark.parametrize("name", READS_ONNX)
needs = {
    name: pytest.mark.skipif(name not in HERE, reason=OTHERS[name].obstacle(torch.device("cpu"), torch.float32))
    for name in OTHERS
}


def image(batch: int = 2, size: int = 12, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """A residual block, a pooling, and BatchNorm everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first, self.norm1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.second, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.wide = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU6(), nn.Conv2d(32, 32, 3, 2, 1, groups=32), nn.ReLU())
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.norm2(self.second(F.relu(self.norm1(self.first(x))))) + x)
        y: Tensor = self.head(self.pool(self.wide(x)).flatten(1))
        return y


class Pair(NamedTuple):
    """What a network may return."""

    scaled: Tensor
    name: str


class Several(nn.Module):
    """Two inputs, one of them no image, a flag; results in containers, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.scale = nn.Linear(4, 16)

    def forward(self, x: Tensor, z: Tensor, double: bool = False) -> dict[str, Any]:
        y = self.left(x).relu()
        if double:
            y = y * 2
        return {"map": self.right(y) + y, "more": (y, Pair(self.scale(z), "scaled")), "again": y, "nothing": None}


def net(kind: type[nn.Module] = Block) -> nn.Module:
    return randomize(kind()).eval()


def pruned(form: FormChoice = "overlap", **options: Any) -> fx.GraphModule:
    return fxprune.compile(net(), 0.5, form=form, example_inputs=image(), **options)


def same(fast: nn.Module, slow: nn.Module, *inputs: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(fast(*inputs), slow(*inputs), rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here depends on how long anything takes."""
    monkeypatch.setattr(acceleration, "ROUNDS", 1)
    monkeypatch.setattr(measurements, "ROUNDS", 1)
    monkeypatch.setattr(measurements, "TURN_SECONDS", 0.0)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def take_times(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[str], float]) -> None:
    """Let every form and graph last as long as `seconds` says of its name."""

    def race(variants: Mapping[str, Callable[[], object]], **_: object) -> dict[str, Timing]:
        return {name: Timing((seconds(name),)) for name in variants}

    monkeypatch.setattr(acceleration, "race", race)
    monkeypatch.setattr(measurements, "race", race)


@pytest.fixture(scope="module")
def slow() -> fx.GraphModule:
    return pruned()


@pytest.fixture(scope="module")
def fast(slow: fx.GraphModule) -> Callable[[GraphRuntime], RuntimeModel]:
    """The pruned network in a runtime, made once."""
    made: dict[str, RuntimeModel] = {}

    def make(name: GraphRuntime) -> RuntimeModel:
        if name not in made:
            with pytest.MonkeyPatch.context() as patch:
                take_times(patch, lambda key: 1.0 if f"{name} " in f"{key} " and "pruned" in key else 2.0)
                model = accelerate(slow, image(), runtime=name, remember=False)
            assert isinstance(model, RuntimeModel)
            made[name] = model
        return made[name]

    return make


# --- the function ---------------------------------------------------------------------------------------------------


@each_runtime
def test_it_computes_the_same(
    name: GraphRuntime, fast: Callable[[GraphRuntime], RuntimeModel], slow: fx.GraphModule
) -> None:
    model = fast(name)
    assert model.is_pruned
    assert model.runtime == acceleration_report(model).runtime == name
    for x in (
        image(2), image(1), image(5), image(0), image(2).transpose(2, 3), image(4, 24)[::2, :, ::2, ::2],
        image(1).expand(3, -1, -1, -1), image(2).contiguous(memory_format=torch.channels_last),
        image(2).requires_grad_(),
    ):  # fmt: skip
        same(model, slow, x)
    assert not model(image().requires_grad_()).requires_grad
    with torch.inference_mode():
        same(model, slow, image())
    for batch in range(6, 18):  # more sizes than a runtime compiles for
        same(model, slow, image(batch))


@each_that_reads_onnx
@pytest.mark.parametrize("form", ["partition", "overlap"])
@pytest.mark.parametrize("wanted", [GROUPED, SPLIT, DENSE])
def test_every_form_of_a_layer(
    name: GraphRuntime, form: FormChoice, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_times(monkeypatch, lambda key: 1.0 if wanted in key or key == f"pruned {name}" else 2.0)
    slow = pruned(form, groups=2, ignore="stem")
    model = accelerate(slow, image(), runtime=name, remember=False)
    chosen = Counter(layer.chosen for layer in acceleration_report(model).layers)
    assert chosen[wanted] >= 3
    assert chosen.total() == chosen[wanted] + (0 if wanted == DENSE else chosen[DENSE])
    same(model, slow, image(3))


@each_that_reads_onnx
def test_what_the_graph_looks_like(
    name: GraphRuntime, fast: Callable[[GraphRuntime], RuntimeModel], slow: fx.GraphModule
) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(fast(name).program.model)  # type: ignore[attr-defined]
    onnx.checker.check_model(model, full_check=True)
    operators = Counter(node.op_type for node in model.graph.node)
    convs = [conv for _, conv in calls(fused_graph(slow, (image(),))[0], FusedConv2d)]
    gathers = sum(conv.index is not None for conv in convs) + sum(conv.order is not None for conv in convs)
    assert gathers
    assert operators == {
        "Conv": len(convs), "Gather": gathers, "Relu": 4, "Clip": 1, "Add": 1, "GlobalAveragePool": 1, "Reshape": 1,
        "Gemm": 1,
    }  # fmt: skip
    assert acceleration_report(fast(name)).gathers == gathers
    (given,), (result,) = model.graph.input, model.graph.output
    assert (given.name, result.name) == ("x", "output")
    assert [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim] == ["batch", 3, 12, 12]
    assert result.type.tensor_type.shape.dim[0].dim_param == "batch"


@each_runtime
def test_arguments_and_results_in_containers(name: GraphRuntime) -> None:
    model, x, z = net(Several), image(), torch.ones(2, 4)
    fast = accelerate(model, (x, z), runtime=name)
    for batch in (2, 3):
        found = fast(image(batch), z=torch.full((batch, 4), 0.5))
        expected = model(image(batch), torch.full((batch, 4), 0.5))
        assert list(found) == list(expected)
        assert isinstance(found["more"][1], Pair)
        assert (found["more"][1].name, found["nothing"]) == ("scaled", None)
        torch.testing.assert_close(tensors_in(found), tensors_in(expected), rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError):
        fast(x, z, True)  # what the example left out keeps its default for good
    with pytest.raises(AccelerationError, match=r"different numbers of images: x has 2, z has 3"):
        fast(x, torch.ones(3, 4))
    with pytest.raises(TypeError):
        fast(x)


@each_that_reads_onnx
def test_a_batch_size_that_is_written_into_the_model(name: GraphRuntime) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).reshape(2, 50, 8).mean(1)

    model = net(Fixed)
    fast = accelerate(model, image(), runtime=name)
    same(fast, model, image(seed=1))
    with pytest.raises(AccelerationError, match=r"accelerated for x \(2, 3, 12, 12\) float32, and x is \(4, 3, 12, 12"):
        fast(image(4))


class Shuffled(nn.Module):
    """A permutation of channels that is not its own inverse, before an activation and a dense convolution."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3)
        self.register_buffer("order", torch.arange(16).roll(1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).index_select(1, self.order).sigmoid().relu())
        return y


@each_that_reads_onnx
def test_a_permutation_before_a_dense_convolution(name: GraphRuntime) -> None:
    model = net(Shuffled)
    same(accelerate(model, image(), runtime=name), model, image(seed=1))


@needs["openvino"]
def test_control_openvino_moves_a_permutation_the_wrong_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this does not fail any more, OpenVINO has been mended, and `hide_permutations` can go."""
    monkeypatch.setattr(openvino, "hide_permutations", lambda model: None)
    with pytest.raises(VerificationError, match="differs by"):
        accelerate(net(Shuffled), image(), runtime="openvino")


@needs["openvino"]
@pytest.mark.parametrize("hides", [True, False], ids=["hidden", "control"])
def test_a_portable_file_is_right_in_openvino(hides: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hides:
        monkeypatch.setattr(exports, "hide_permutations", lambda model: None)
    model, path = net(Shuffled), tmp_path / "net.onnx"
    exports.save_onnx(model, (image(),), path)
    core = openvino.core_of(os.getpid())
    found = torch.from_numpy(core.compile_model(core.read_model(str(path)), "CPU")([image(5).numpy()])[0])
    assert torch.allclose(found, model(image(5)), rtol=0.05, atol=0.05) == hides  # it may compute in bfloat16


@each_that_reads_onnx
def test_the_weights_of_a_dense_layer_take_in_a_permutation(name: str) -> None:
    torch.manual_seed(0)
    conv = FusedConv2d(nn.Conv2d(16, 8, 3), 16)
    conv.index = torch.randperm(16)
    shape = torch.Size((1, 16, 6, 6))
    kinds = [node.op_type for node in single_layer(conv, DENSE, [shape]).graph.node]
    assert kinds == ["Conv"] * 3
    runtime = OTHERS[name]
    assert isinstance(runtime, OnnxBased)
    x = torch.randn(shape)
    (found,) = runtime.program.of(single_layer(conv, DENSE, [shape])).load(1)([x])
    torch.testing.assert_close(found, conv(x / 2) / 2, rtol=1e-4, atol=1e-4)
    conv.index[0] = conv.index[1]  # a channel twice: it stays a gather
    assert "Gather" in [node.op_type for node in single_layer(conv, DENSE, [shape]).graph.node]


# --- what they refuse -----------------------------------------------------------------------------------------------


@each_that_reads_onnx
def test_what_it_was_not_made_for(name: GraphRuntime, fast: Callable[[GraphRuntime], RuntimeModel]) -> None:
    model = fast(name)
    for x in (image().to("meta"), image().double(), image().half()):
        with pytest.raises(AccelerationError, match=r"accelerated for torch.float32 on cpu, and the input x is"):
            model(x)
    with pytest.raises(AccelerationError, match=r"input of 4 dimensions, and x has 3"):
        model(image()[0])
    for x in (image(size=16), image(channels=4)):
        with pytest.raises(
            AccelerationError, match=r"x \(batch, 3, 12, 12\) float32, and x is .*runtime='torch', which"
        ):
            model(x)
    with pytest.raises(AccelerationError, match=r"nested otherwise"):
        model([image()])
    with pytest.raises(AccelerationError, match=r"for inference; call eval"):
        copy.deepcopy(model).train()(image())
    moves: list[Callable[[Any], object]] = [nn.Module.double, nn.Module.half, lambda module: module.to("meta")]
    for move in moves:
        with pytest.raises(
            AccelerationError, match=rf"accelerated for torch.float32 on cpu in {name}, and cannot become"
        ):
            move(copy.deepcopy(model))
    assert model.float().to("cpu").eval() is model
    with pytest.raises(AccelerationError, match=r"accelerated already"):
        accelerate(model, image(), runtime=name)
    with pytest.raises(FxpruneError, match=r"the model is accelerated"):
        fxprune.save(model, "model.pt")


def test_a_runtime_that_is_none() -> None:
    with pytest.raises(
        AccelerationError, match=r"runtime is 'onnxruntim' \(near: 'onnxruntime'\); it must be one of auto"
    ):
        accelerate(net(), image(), runtime="onnxruntim")  # type: ignore[call-overload]


@pytest.mark.parametrize("name, extra", [("onnxruntime", r"fxprune\[onnx\]"), ("openvino", r"fxprune\[openvino\]")])
def test_a_runtime_that_is_missing(name: GraphRuntime, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == name else found(asked))
    with pytest.raises(AccelerationError, match=rf"runtime='{name}': {name} not installed; pip install '{extra}'"):
        accelerate(net(), image(), runtime=name)
    monkeypatch.setattr(type(OTHERS["inductor"]), "obstacle", lambda *_: "left out here")
    fast = accelerate(net(), image(), runtime="auto")
    absent = acceleration_report(fast).absent
    assert f"{name} not installed" in absent[name]
    assert f"not in the race: {name}: {name} not installed; pip install" in str(acceleration_report(fast))
    assert not any(name in entry for entry in acceleration_report(fast).seconds)


def test_tensorrt_is_refused() -> None:
    with pytest.raises(AccelerationError, match=r"fxprune does not run it yet; export the compiled model"):
        accelerate(net(), image(), runtime="tensorrt")
    reason = OTHERS["tensorrt"].obstacle(torch.device("cuda"), torch.float32)
    assert "fxprune does not run it yet" in reason
    assert "trtexec --onnx=FILE" in reason


def test_inductor_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(AccelerationError, match=r"needs a C\+\+ compiler; install g\+\+ or clang\+\+"):
        accelerate(net(), image(), runtime="inductor")


@each_that_reads_onnx
def test_a_model_that_a_runtime_cannot_take(name: GraphRuntime) -> None:
    class Number(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return x * 2, x.shape[0]

    with pytest.raises(
        AccelerationError, match=r"a result is 2, a int; other runtimes than PyTorch take and give tensors"
    ):
        accelerate(Number(), image(), runtime=name)
    with pytest.raises(AccelerationError, match=r"takes float32 models there, and this one is float64"):
        accelerate(net().double(), image().double(), runtime=name)

    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.linalg.eigvals(x).real.sort().values
            return y

    with pytest.raises(AccelerationError, match=r"cannot be exported to ONNX: .*eig"):
        accelerate(Odd(), image(), runtime=name)


@each_that_reads_onnx
def test_what_a_runtime_says_of_a_broken_file(name: GraphRuntime) -> None:
    program = OTHERS[name].program(b"no model")  # type: ignore[attr-defined]
    with pytest.raises(AccelerationError, match=r"cannot take the network: "):
        program([image()])


@each_that_reads_onnx
def test_control_a_wrong_answer_does_not_race(name: GraphRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    right = onnx_layers.Nodes.constant

    def wrong(self: onnx_layers.Nodes, label: str, value: Any) -> str:
        return right(self, label, value * 1.01 if label.endswith("weight") else value)

    slow = pruned()
    monkeypatch.setattr(onnx_layers.Nodes, "constant", wrong)
    with pytest.raises(VerificationError, match=r"the accelerated model differs by"):
        accelerate(slow, image(), runtime=name, remember=False)
    monkeypatch.setattr(type(OTHERS["inductor"]), "obstacle", lambda *_: "left out here")
    fast = accelerate(slow, image(), runtime="auto", remember=False)
    assert isinstance(fast, TorchModel)
    assert "differs by" in acceleration_report(fast).absent[name]


@each_that_reads_onnx
def test_control_another_batch_size_is_checked_too(name: GraphRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    right = RuntimeModel.forward
    monkeypatch.setattr(RuntimeModel, "forward", lambda self, x: right(self, x) + (len(x) == 3))
    with pytest.raises(VerificationError, match=r"with 3 images instead of 2, the accelerated model differs"):
        accelerate(net(), image(), runtime=name, remember=False)


# --- the choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "winner",
    [
        "pruned channels_last",
        "pruned channels_last scripted",
        "dense contiguous",
        "dense contiguous scripted",
        *(f"{kind} {name}" for name in READS_ONNX for kind in ("pruned", "dense")),
    ],
)
def test_auto_returns_the_fastest(winner: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(type(OTHERS["inductor"]), "obstacle", lambda *_: "left out here")
    monkeypatch.setattr(acceleration, "MARGIN", 99)
    slow = pruned()
    times = {"dense": 4.0, "pruned": 3.0}
    take_times(monkeypatch, lambda key: 1.0 if key == winner else times.get(key.split()[0], 2.0))
    fast = accelerate(slow, image(), runtime="auto", remember=False)
    report = acceleration_report(fast)
    assert report.chosen == winner
    assert report.relative == (1.0 if winner.startswith("dense") else 0.25)
    assert {f"dense {name}" for name in READS_ONNX} <= report.seconds.keys()
    assert report.absent.keys() == OTHERS.keys() - set(READS_ONNX)
    assert json.loads(json.dumps(report.to_dict()))["absent"]["tensorrt"]
    assert report.compiled is fxprune.report(slow)
    same(fast, slow, image(3))
    in_torch = winner.split()[1] not in OTHERS
    assert isinstance(fast, TorchModel if in_torch else RuntimeModel)
    assert report.runtime == fast.runtime == ("torch" if in_torch else winner.split()[1])
    if in_torch:
        with pytest.raises(
            AccelerationError, match=r"PyTorch was the fastest.*keep the pruned model with fxprune.save"
        ):
            fast.save(tmp_path / "model.onnx")


def test_a_scripted_network_checks_its_inputs_and_is_copied_pickled_and_called_by_name() -> None:
    slow = pruned()
    graph = accelerate(slow, image())
    fast = TorchModel(graph, scripted=True)
    assert fast._run is not None, "control: it is TorchScript that runs"
    name = next(iter(inspect.signature(graph.forward).parameters))
    copies = {"itself": fast, "copied": copy.deepcopy(fast), "pickled": pickle.loads(pickle.dumps(fast))}
    for label, model in copies.items():
        for x in (image(), image(3), image().contiguous(memory_format=torch.channels_last)):
            torch.testing.assert_close(model(x), slow(x), rtol=1e-4, atol=1e-4, msg=label)
            torch.testing.assert_close(model(**{name: x}), slow(x), rtol=1e-4, atol=1e-4, msg=label)
        with pytest.raises(AccelerationError, match=r"the input is torch.float64"):
            model(image().double())
        with pytest.raises(AccelerationError, match=r"add or remove the batch dimension"):
            model(image()[0])
        with pytest.raises(AccelerationError, match=r"is for inference; call eval"):
            copy.deepcopy(model).train()(image())


def test_what_torchscript_cannot_take_is_said_and_does_not_race(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(torch.jit, "script", refuse)
    monkeypatch.setattr(type(OTHERS["inductor"]), "obstacle", lambda *_: "left out here")
    fast = accelerate(pruned(), image(), runtime="auto", remember=False)
    report = acceleration_report(fast)
    assert not [name for name in report.seconds if "scripted" in name]
    assert any("TorchScript cannot take the network: no such thing" in note for note in report.notes)


def test_plain_torch_stays_a_graph() -> None:
    fast = accelerate(net(), image())
    assert isinstance(fast, fx.GraphModule)
    assert acceleration_report(fast).runtime == "torch"
    assert acceleration_report(fast).absent == {}


@each_that_reads_onnx
def test_dense_is_returned_where_pruning_does_not_pay(name: GraphRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = pruned()
    take_times(monkeypatch, lambda key: 1.0 if key.startswith("dense") else 2.0)
    fast = accelerate(slow, image(), runtime=name, remember=False)
    report = acceleration_report(fast)
    assert isinstance(fast, RuntimeModel)
    assert (report.chosen, report.relative, report.gathers, fast.is_pruned) == (f"dense {name}", 1.0, 0, False)
    assert {layer.chosen for layer in report.layers} == {DENSE}
    same(fast, slow, image())


# --- files ----------------------------------------------------------------------------------------------------------


@each_that_reads_onnx
def test_a_users_road(name: GraphRuntime, tmp_path: Path) -> None:
    """Compiled with calibration, accelerated, saved, and run where there is only the runtime and numpy."""
    slow = fxprune.compile(net(), 0.5, form="overlap", example_inputs=image(), calibration=image(16, seed=3))
    model = accelerate(slow, image(), runtime=name)
    assert isinstance(model, RuntimeModel)
    file = tmp_path / f"model{SUFFIX[name]}"
    for written in model.save(file):
        assert written.is_file()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ([".bin", ".xml"] if name == "openvino" else [".onnx"])
    y = torch.from_numpy(run_alone(name, file, image(3, seed=5).numpy()))
    assert y.shape == (3, 5)
    torch.testing.assert_close(y, slow(image(3, seed=5)).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["dense", "pruned"])
@each_that_reads_onnx
def test_a_file_of_the_dense_form_says_so(
    name: GraphRuntime,
    form: str,
    slow: fx.GraphModule,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    take_times(monkeypatch, lambda key: 1.0 if f"{name} " in f"{key} " and form in key else 2.0)
    model = accelerate(slow, image(), runtime=name, remember=False)
    assert isinstance(model, RuntimeModel)
    file = tmp_path / f"model{SUFFIX[name]}"
    model.save(file)
    said = [record.getMessage() for record in caplog.records if "holds the dense form" in record.getMessage()]
    assert len(said) == (form == "dense")
    assert all(
        text.startswith(f"{file} holds the dense form, with zeros: no pruned one is faster here (") for text in said
    )


@each_that_reads_onnx
def test_files_that_cannot_be_written(
    name: GraphRuntime, fast: Callable[[GraphRuntime], RuntimeModel], tmp_path: Path
) -> None:
    model, suffix = fast(name), OTHERS[name].program.suffixes[0]  # type: ignore[attr-defined]
    with pytest.raises(
        AccelerationError, match=rf"a model in {name} is kept in a file that ends in \{suffix}; name it so"
    ):
        model.save(tmp_path / "model.pt")
    with pytest.raises(AccelerationError, match=r"nowhere.model.* cannot be written"):
        model.save(tmp_path / "nowhere" / f"model{suffix}")
    assert list(tmp_path.iterdir()) == []


@needs["inductor"]
@pytest.mark.slow
def test_inductor_ahead_of_time(
    fast: Callable[[GraphRuntime], RuntimeModel], slow: fx.GraphModule, tmp_path: Path
) -> None:
    (path,) = fast("inductor").save(tmp_path / "model.pt2")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt2"]
    loaded = torch._inductor.aoti_load_package(str(path))
    for batch in (2, 5):
        torch.testing.assert_close(loaded(image(batch))[0], slow(image(batch)).detach(), rtol=1e-4, atol=1e-4)


@needs["onnxruntime"]
def test_no_constant_of_a_model_goes_unread(fast: Callable[[GraphRuntime], RuntimeModel]) -> None:
    import onnx

    model = onnx.load_from_string(fast("onnxruntime").program.model)  # type: ignore[attr-defined]
    read = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= read
    assert any(node.op_type == "GlobalAveragePool" for node in model.graph.node), "whose axes were a constant"


@needs["inductor"]
def test_inductor_compiles_any_number_of_networks() -> None:
    """Dynamo takes 8 for each code object. Nothing is generated here: it is what would take the time."""
    example = torch.ones(1, 2)

    def compile_many(prepared: Callable[[nn.Module], Callable[..., Any]]) -> None:
        for width in range(1, torch._dynamo.config.recompile_limit + 3):
            graph = fx.symbolic_trace(nn.Sequential(nn.Linear(2, width)))
            network = prepared(Flat(graph, CallForm.of(graph, (example,))))
            assert torch.compile(network, backend="eager", fullgraph=True)(example)[0].shape == (1, width)

    compile_many(inductor.with_own_code)
    with pytest.raises(Exception, match="fullgraph"):
        compile_many(lambda network: network)  # control: they share their forward


@needs["inductor"]
@pytest.mark.slow
def test_inductor_packs_its_weights_and_fuses_activations(fast: Callable[[GraphRuntime], RuntimeModel]) -> None:
    from torch._inductor.utils import run_and_get_code

    _, codes = run_and_get_code(copy.deepcopy(fast("inductor")), image())
    generated = "\n".join(codes)
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in net().modules())
    calls_of_onednn = generated.count("torch.ops.mkldnn._convolution_pointwise")
    assert calls_of_onednn >= convolutions
    assert "extern_kernels.convolution" not in generated, "weights that are no constants are not packed"
    assert generated.count("'relu'") + generated.count('"relu"') >= 3


# --- copies, threads, forks -----------------------------------------------------------------------------------------


@each_that_reads_onnx
def test_copies(name: GraphRuntime, fast: Callable[[GraphRuntime], RuntimeModel]) -> None:
    model = fast(name)
    expected = model(image())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.program is not model.program
        assert torch.equal(other(image()), expected)
        assert acceleration_report(other).to_dict() == acceleration_report(model).to_dict()
        with pytest.raises(AccelerationError, match=r"x \(batch, 3, 12, 12\) float32"):
            other(image(size=13))
    assert f"network of grouped layers in {name}: x (batch, 3, 12, 12) float32 -> a tensor" in repr(model)
    assert model.state_dict() == {}


@each_that_reads_onnx
def test_threads_follow_torch(
    name: GraphRuntime, fast: Callable[[GraphRuntime], RuntimeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(fast(name))
    asked: list[int] = []
    right = type(model.program).load

    def load(program: Any, threads: int) -> Any:
        asked.append(threads)
        return right(program, threads)

    monkeypatch.setattr(type(model.program), "load", load)
    expected = model(image())
    model(image())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    torch.testing.assert_close(model(image()), expected, rtol=1e-5, atol=1e-5)
    assert asked == [1, 2]


@each_runtime
def test_two_threads_at_once(
    name: GraphRuntime, fast: Callable[[GraphRuntime], RuntimeModel], slow: fx.GraphModule
) -> None:
    model = pickle.loads(pickle.dumps(fast(name))) if name != "inductor" else fast(name)
    inputs = [image(2, seed=seed) for seed in range(4)]
    expected = [slow(x).detach() for x in inputs]
    start, gaps = threading.Barrier(4), {}

    def work(number: int) -> None:
        start.wait()
        found = [model(inputs[number]) for _ in range(20)]
        gaps[number] = max(float((y - expected[number]).abs().max()) for y in found)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(gaps.values()) < 1e-4
    assert len(gaps) == 4
    assert float((expected[0] - expected[1]).abs().max()) > 1e-2, "control: the answers are not all alike"


FORK = """
import os, signal, torch, fxprune
torch.set_num_threads({threads})
net = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3)).eval()
x = torch.randn(2, 16, 64, 64)
for name in {names}:
    fast = fxprune.accelerate(net, x, runtime=name, remember=False)
    expected = fast(x)
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)  # whatever hangs ends
        try:
            y = fast(x)
            said = "ran"
        except fxprune.AccelerationError as error:
            said = str(error)
        torch.set_num_threads(1)
        same = torch.allclose(y if said == "ran" else fast(x), expected, atol=1e-5)
        print(name, same, said, flush=True)
        os._exit(0)  # as the children of multiprocessing do
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize(
    "names, threads",
    [
        pytest.param(("torch", *READS_ONNX), 1, marks=pytest.mark.slow),
        (("torch", *READS_ONNX), 2),
        *(pytest.param(("inductor",), threads, marks=pytest.mark.slow) for threads in (1, 2)),
    ],
)
def test_fork_after_load(names: tuple[str, ...], threads: int) -> None:
    """In one process, without the compiled kernel, which would have to be built."""
    environment = {**os.environ, "FXPRUNE_NATIVE": "0"}
    program = FORK.format(names=names, threads=threads)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert lines[1::2] == ["0"] * len(names)
    for name, line in zip(names, lines[::2], strict=True):
        if threads > 1 and name in ("torch", "inductor"):
            assert line.startswith(f"{name} True the process was forked")
            assert "call torch.set_num_threads(1) in the child" in line
        else:
            assert line == f"{name} True ran"


SIGNAL = """
import faulthandler, gc, os, signal, torch, fxprune
faulthandler.enable()
net = torch.nn.Conv2d(3, 4, 3).eval()
x = torch.randn(1, 3, 8, 8)
models = [fxprune.accelerate(net, x, runtime="{name}", remember=False) for _ in range(2)]
for _ in range(2):
    del models[0]
    gc.collect()
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGTERM)
"""


@needs["openvino"]
def test_signals_are_handled_when_models_are_gone() -> None:
    program = SIGNAL.format(name="openvino")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "handled"), done.stderr


@pytest.mark.slow
@each_that_reads_onnx
def test_in_a_process_that_was_spawned(name: GraphRuntime, fast: Callable[[GraphRuntime], RuntimeModel]) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(fast(name), (image(),))
    torch.testing.assert_close(found, fast(name)(image()), rtol=1e-5, atol=1e-5)
