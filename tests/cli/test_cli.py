"""The command line: what each subcommand prints and writes, its exit codes, and its one-line errors."""

import inspect
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from products_harness import in_turns
from torch import nn

import fxprune
from fxprune.calibration.agreement import Agreement
from fxprune.cli import command_compile
from fxprune.cli import program as cli
from fxprune.comparison.evaluation import Evaluation
from fxprune.exact.rewriting import rewritten
from fxprune.models import load_model

NETS = """
from torch import nn

class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + x).relu()

def small():
    stem = nn.Conv2d(3, 16, 3, padding=1)
    return nn.Sequential(stem, Residual(16), Residual(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))

def wide():
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), Residual(32))

def deep():
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), *(Residual(32) for _ in range(4)))

def four():
    stem = nn.Conv2d(3, 32, 3, padding=1)
    return nn.Sequential(stem, Residual(32), Residual(32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))

def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
"""
SIZE = ("--input-size", "2,3,8,8")


@pytest.fixture(autouse=True)
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "handmade_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "handmade_nets", raising=False)


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """Run a command that must succeed; its stdout must be one JSON document."""
    assert cli.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """Run a command that must fail with one line on stderr and nothing on stdout."""
    assert cli.main(list(arguments)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if "warning: nothing will be written" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("fxprune: error: ")
    return lines[0]


@pytest.fixture
def saved(capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["compile", "handmade_nets:small", *SIZE, "-o", "small.pt"]) == 0
    capsys.readouterr()
    return "small.pt"


def test_compile_prints_the_report_and_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compile", "handmade_nets:small", *SIZE]) == 0
    captured = capsys.readouterr()
    assert "1.conv1" in captured.out
    assert "verified: compiled equals masked" in captured.out
    assert (
        captured.err
        == "fxprune: warning: nothing will be written: -o FILE, --onnx FILE or --torchscript FILE says where\n"
    )


def test_compile_json(capsys: pytest.CaptureFixture[str]) -> None:
    document = run_json(capsys, "compile", "handmade_nets:small", *SIZE, "-o", "deep/small.pt")
    assert document["files"] == {"fxprune": "deep/small.pt"}
    grouped = [layer["name"] for layer in document["report"]["layers"] if layer["form"] != "dense"]
    assert grouped == ["1.conv1", "1.conv2", "2.conv1", "2.conv2"]
    assert document["report"]["params_pruned"] < document["report"]["params_dense"]
    assert document["verification"]["max_abs"] < 1e-9
    assert Path("deep/small.pt").is_file()


def test_the_options_reach_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    document = run_json(
        capsys, "compile", "handmade_nets:small", *SIZE, "--no-verify", "--ratio", "0.75", "--groups", "4",
        "--form", "overlap", "--criterion", "l1", "--ignore", "1.conv1", "--ignore", "2.*",
    )  # fmt: skip
    assert document["verification"] is None
    grouped = [layer for layer in document["report"]["layers"] if layer["form"] != "dense"]
    assert [(layer["name"], layer["form"], layer["groups"]) for layer in grouped] == [("1.conv2", "overlap", 4)]
    assert grouped[0]["reached_ratio"] == 0.75


def test_blocks_and_target_reach_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("report", "handmade_nets:deep", *SIZE, "--ratio", "0.6")
    plain, blocks, cuda = (
        run_json(capsys, *arguments, *more)["layers"][1] for more in ((), ("--block", "4"), ("--target", "cuda"))
    )
    assert [plain["groups"], blocks["groups"], cuda["groups"]] == [2, 2, 1]
    assert [plain["reached_ratio"], blocks["reached_ratio"], cuda["reached_ratio"]] == [1 - 13 / 32, 0.625, 0.5]
    assert [layer["block_cost"] is not None for layer in (plain, blocks, cuda)] == [False, True, True]
    assert "block is 0" in error_of(capsys, *arguments, "--block", "0")


@pytest.mark.parametrize(
    "arguments, forms, filters",
    [
        pytest.param(["--granularity", "filter"], {"filters"}, [16, 16, 16, 16, 16], marks=pytest.mark.slow),
        (["--granularity", "filter", "--macs", "0.5", "--scope", "global", "--round-to", "8"], {"filters"}, None),
        (["--granularity", "filter:0.25,kernel:0.5"], {"filters", "partition"}, [24, 24, 24, 24, 24]),
        pytest.param(["--granularity", "kernel"], {"dense", "partition"}, [32] * 5, marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and isinstance(value[0], str) else None,
)
def test_granularity(
    capsys: pytest.CaptureFixture[str], arguments: list[str], forms: set[str], filters: list[int] | None
) -> None:
    document = run_json(capsys, "compile", "handmade_nets:four", *SIZE, *arguments, "-o", "four.pt")
    layers = document["report"]["layers"]
    assert {layer["form"] for layer in layers} == forms
    kept = [layer["filters"] for layer in layers]
    assert kept == filters if filters else len(set(kept)) > 1 and not any(count % 8 for count in kept)
    assert run_json(capsys, "report", "four.pt", "handmade_nets:four")["layers"] == layers
    assert run_json(capsys, "verify", "four.pt", "handmade_nets:four", *SIZE)["max_abs"] < 1e-9
    assert run_json(capsys, "report", "handmade_nets:four", *SIZE, *arguments)["layers"] == layers


@pytest.fixture
def images() -> torch.Tensor:
    """Calibration images, also in `images.pt`."""
    images = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.save(images, "images.pt")
    return images


COMPILE = ("compile", "handmade_nets:small")


def difference(path: str, images: torch.Tensor) -> float:
    """Mean squared difference of a compiled file from its dense model."""
    model = load_model("handmade_nets:small")
    with torch.no_grad():
        return float((fxprune.load(path, model).eval()(images) - model(images)).square().mean())


def test_calibration_refits_the_weights(capsys: pytest.CaptureFixture[str], images: torch.Tensor) -> None:
    run_json(capsys, *COMPILE, *SIZE, "-o", "masks.pt")
    document = run_json(capsys, *COMPILE, "--calibration", "images.pt", "-o", "refitted.pt")
    assert document["calibration"] == "images.pt"
    assert document["report"]["input_shapes"] == [[2, 3, 8, 8]], "the size of the images, without --input-size"
    assert document["verification"]["max_abs"] < 1e-9
    layers = [layer for layer in document["report"]["layers"] if layer["form"] != "dense"]
    assert len(layers) == 4
    assert all(layer["error"] is not None for layer in layers)
    assert difference("refitted.pt", images) < 0.5 * difference("masks.pt", images)
    masked = fxprune.compile(load_model("handmade_nets:small"), 0.5, calibration=images, verify=False).eval()
    file = fxprune.load("refitted.pt", load_model("handmade_nets:small")).eval()
    torch.testing.assert_close(file(images), masked(images))


def test_recover_trains_them(capsys: pytest.CaptureFixture[str], images: torch.Tensor) -> None:
    run_json(capsys, *COMPILE, *SIZE, "-o", "masks.pt")
    run_json(capsys, *COMPILE, "--calibration", "images.pt", "-o", "refitted.pt")
    run_json(
        capsys, *COMPILE, "--calibration", "images.pt", "--recover", "2", "--augment", "flip", "-o", "recovered.pt"
    )
    assert difference("recovered.pt", images) != difference("refitted.pt", images)
    assert difference("recovered.pt", images) < 0.5 * difference("masks.pt", images)
    line = error_of(capsys, *COMPILE, "--recover")
    assert "--recover learns from calibration data; add --calibration FILE" in line
    line = error_of(capsys, *COMPILE, "--calibration", "images.pt", "--augment", "flip")
    assert "--augment is for --recover" in line


def test_calibration_files(capsys: pytest.CaptureFixture[str], images: torch.Tensor) -> None:
    np.save("single.npy", images.numpy().astype(np.float32))
    np.save("double.npy", images.numpy().astype(np.float64))
    torch.save(images.clone().requires_grad_(), "with_gradient.pth")
    first, *others = (
        run_json(capsys, "report", "handmade_nets:small", "--ignore", "2.*", "--calibration", path)
        for path in ("images.pt", "single.npy", "double.npy", "with_gradient.pth")
    )
    assert any(layer["error"] for layer in first["layers"])
    assert others == [first] * 3


def test_the_agreement_is_told(capsys: pytest.CaptureFixture[str], images: torch.Tensor) -> None:
    told = run_json(capsys, *COMPILE, "--calibration", "images.pt")["report"]["agreement"]
    assert told["inputs"] > 0
    assert 0 <= told["share"] <= 1
    assert cli.main([*COMPILE, "--calibration", "images.pt"]) == 0
    assert f"agreement with the dense network on {told['inputs']} " in capsys.readouterr().out
    assert run_json(capsys, *COMPILE, *SIZE)["report"]["agreement"] is None


def test_the_input_size_may_differ_from_that_of_the_images(
    capsys: pytest.CaptureFixture[str], images: torch.Tensor
) -> None:
    document = run_json(capsys, *COMPILE, "--ignore", "2.*", "--calibration", "images.pt", "--input-size", "4,3,16,16")
    assert document["report"]["input_shapes"] == [[4, 3, 16, 16]]


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("absent.pt", None, "cannot be read: No such file"),
        ("absent.npy", None, "cannot be read: No such file"),
        ("text.pt", b"no tensor", "torch.load(weights_only=True)"),
        ("text.npy", b"no array", "numpy.load"),
        ("dict.pt", {"images": torch.zeros(2, 3, 8, 8)}, "holds a dict"),
        ("list.pt", [torch.zeros(2, 3, 8, 8)], "holds a list"),
        ("objects.npy", np.array([None, 1]), "numpy.load"),
        ("bytes.npy", np.zeros((2, 3, 8, 8), np.uint8), "holds uint8"),
        ("labels.pt", torch.zeros(2, dtype=torch.int64), "holds int64"),
        ("flat.pt", torch.zeros(8), "(8,)"),
        ("empty.pt", torch.zeros(0, 3, 8, 8), "(0, 3, 8, 8)"),
        ("channels.pt", torch.zeros(2, 7, 8, 8), "7"),
        ("nan.npy", np.full((2, 3, 8, 8), np.nan), "NaN"),
    ],
)
def test_bad_calibration_files(capsys: pytest.CaptureFixture[str], name: str, content: Any, message: str) -> None:
    if isinstance(content, bytes):
        Path(name).write_bytes(content)
    elif isinstance(content, np.ndarray):
        np.save(name, content)
    elif content is not None:
        torch.save(content, name)
    assert message in error_of(capsys, *COMPILE, "--calibration", name)


def test_calibration_images_with_other_channels_than_the_input_size(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(torch.zeros(2, 7, 8, 8), "channels.pt")
    assert "does not fit the model" in error_of(capsys, *COMPILE, *SIZE, "--calibration", "channels.pt")


@pytest.mark.usefixtures("images")
def test_verify_a_refitted_file(capsys: pytest.CaptureFixture[str]) -> None:
    run_json(capsys, *COMPILE, "--ignore", "2.*", "--calibration", "images.pt", "-o", "small.pt")
    arguments = ("verify", "small.pt", "handmade_nets:small", *SIZE)
    assert "give the same data" in error_of(capsys, *arguments, code=1)
    assert run_json(capsys, *arguments, "--calibration", "images.pt")["max_abs"] < 1e-9
    torch.save(torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1)), "other.pt")
    assert "give the same data" not in error_of(capsys, *arguments, "--calibration", "other.pt", code=1)


def plan_of(path: str) -> fxprune.PrunePlan:
    plan = fxprune.load(path, load_model("handmade_nets:small")).meta["fxprune"].plan
    assert isinstance(plan, fxprune.PrunePlan)
    return plan


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(
    "arguments,method,criterion",
    [
        ([], "cocluster", "l2"),
        (["--calibration", "images.pt"], "reconstruction", "reconstruction"),
        (["--calibration", "images.pt", "--method", "cocluster"], "cocluster", "l2"),
        (["--calibration", "images.pt", "--criterion", "activation"], "cocluster", "activation"),
        (["--criterion", "l1", "--variety", "soft"], "cocluster", "l1, variety soft"),
        (["--criterion", "movement", "--snapshots", "first.pt", "second.pt"], "cocluster", "movement"),
        (["--method", "tmi", "--snapshots", "first.pt", "second.pt"], "tmi", "tmi"),
    ],
)
def test_methods_and_criteria(
    capsys: pytest.CaptureFixture[str], arguments: list[str], method: str, criterion: str
) -> None:
    arguments = [*arguments, "--ignore", "1.conv2", "--ignore", "2.*"]
    for seed, name in ((5, "first.pt"), (6, "second.pt")):
        torch.save(load_model("handmade_nets:small", seed=seed).state_dict(), name)
    run_json(capsys, *COMPILE, *SIZE, "--ratio", "0.25", "--no-verify", *arguments, "-o", "small.pt")
    plan = plan_of("small.pt")
    assert (plan.method, plan.criterion) == (method, criterion)


def test_snapshots_come_in_the_order_of_the_command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def stop(arguments: dict[str, Any]) -> None:
        given.update(arguments)
        raise fxprune.PlanError("enough")

    monkeypatch.setattr("fxprune.api.request_of", stop)
    error_of(capsys, *COMPILE, *SIZE, "--snapshots", "b.pt", "a.pt", "--variety", "pairs")
    assert given["snapshots"] == [Path("b.pt"), Path("a.pt")]
    assert given["variety"] == "pairs"
    assert given.keys().isdisjoint({"ratio", "macs", "params", "criterion"}), "left to the defaults of make_plan"


budgets = pytest.mark.skipif(
    "macs" not in inspect.signature(fxprune.compile).parameters, reason="this version has no budgets"
)


@budgets
@pytest.mark.usefixtures("images")
@pytest.mark.parametrize("what, share", in_turns(("macs", "params"), ("0.8", "0.6")))
def test_a_budget(capsys: pytest.CaptureFixture[str], what: str, share: str) -> None:
    arguments = ("compile", "handmade_nets:wide", "--calibration", "images.pt", "--no-verify")
    report = run_json(capsys, *arguments, f"--{what}", share)["report"]
    # kernels come in whole channels
    assert report[f"{what}_pruned"] / report[f"{what}_dense"] == pytest.approx(float(share), abs=0.02)


@budgets
@pytest.mark.parametrize("share", ["0", "1.5"])
def test_a_budget_that_cannot_be(capsys: pytest.CaptureFixture[str], share: str) -> None:
    assert "macs" in error_of(capsys, *COMPILE, *SIZE, "--macs", share)


def test_compile_is_deterministic_in_the_seed(capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("a.pt", "1"), ("b.pt", "1"), ("c.pt", "2")):
        run_json(capsys, "compile", "handmade_nets:small", *SIZE, "--seed", seed, "-o", name)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = load_model("handmade_nets:small")
    a, b, c = (fxprune.load(name, model).eval()(x) for name in ("a.pt", "b.pt", "c.pt"))
    assert torch.equal(a, b)
    assert not torch.allclose(a, c)


def test_weights_are_used(capsys: pytest.CaptureFixture[str]) -> None:
    model = load_model("handmade_nets:small")
    last = model.get_submodule("5")
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, 3)
    torch.save(model.state_dict(), "weights.pth")
    run_json(capsys, "compile", "handmade_nets:small", *SIZE, "--weights", "weights.pth", "-o", "out.pt")
    pruned = fxprune.load("out.pt", load_model("handmade_nets:small")).eval()
    assert torch.equal(pruned(torch.randn(2, 3, 8, 8)), torch.full((2, 5), 3.0))


def test_torchscript(capsys: pytest.CaptureFixture[str]) -> None:
    document = run_json(
        capsys, "compile", "handmade_nets:small", *SIZE, "--torchscript", "small.ts.pt", "-o", "small.pt"
    )
    assert document["files"]["TorchScript"] == "small.ts.pt"
    scripted = torch.jit.load("small.ts.pt")  # type: ignore[no-untyped-call]  # torch.jit is untyped
    pruned = fxprune.load("small.pt", load_model("handmade_nets:small")).eval()
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(scripted(x), pruned(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_onnx(capsys: pytest.CaptureFixture[str]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run_json(capsys, "compile", "handmade_nets:small", *SIZE, "--onnx", "small.onnx", "-o", "small.pt")
    pruned = fxprune.load("small.pt", load_model("handmade_nets:small")).eval()
    x = torch.randn(5, 3, 8, 8)
    session = onnxruntime.InferenceSession("small.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.tensor(found), pruned(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "precision, said",
    [("int8", "makes integers of it"), ("bfloat16", "computes such an ONNX file in bfloat16"), (None, "")],
)
def test_files_are_in_float32_whatever_the_plan_is_for(
    capsys: pytest.CaptureFixture[str], precision: str | None, said: str
) -> None:
    given = [] if precision is None else ["--runtime", "openvino", "--precision", precision]
    assert cli.main(["compile", "handmade_nets:small", *SIZE, *given, "-o", "small.pt"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("what was written is in float32: " if precision else "wrote small.pt")
    assert said in last


def test_onnx_not_installed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxprune.exports.importlib.util.find_spec", lambda name: None)
    line = error_of(capsys, "compile", "handmade_nets:small", *SIZE, "--onnx", "small.onnx")
    assert "pip install 'fxprune[onnx]'" in line


def test_report_of_a_file(capsys: pytest.CaptureFixture[str], saved: str) -> None:
    document = run_json(capsys, "report", saved, "handmade_nets:small")
    assert next(layer["name"] for layer in document["layers"] if layer["form"] != "dense") == "1.conv1"


def test_report_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "handmade_nets:small", *SIZE]) == 0
    assert "1.conv1" in capsys.readouterr().out


@pytest.mark.usefixtures("images")
def test_report_with_calibration(capsys: pytest.CaptureFixture[str]) -> None:
    document = run_json(capsys, "report", "handmade_nets:small", "--calibration", "images.pt")
    assert [layer["error"] is not None for layer in document["layers"]] == [False, True, True, True, True]
    error_of(capsys, "report", "handmade_nets:small", "--calibration", "absent.pt")


def test_report_of_a_file_needs_its_model(capsys: pytest.CaptureFixture[str], saved: str) -> None:
    assert "fxprune report small.pt MODEL" in error_of(capsys, "report", saved)


def test_verify(capsys: pytest.CaptureFixture[str], saved: str) -> None:
    assert cli.main(["verify", saved, "handmade_nets:small", *SIZE]) == 0
    assert "verified: compiled equals masked" in capsys.readouterr().out


def test_verify_fails_on_other_weights(capsys: pytest.CaptureFixture[str], saved: str) -> None:
    error_of(capsys, "verify", saved, "handmade_nets:small", *SIZE, "--seed", "3", code=1)


def test_verify_refuses_another_model(capsys: pytest.CaptureFixture[str], saved: str) -> None:
    error_of(capsys, "verify", saved, "handmade_nets:wide", *SIZE)


def test_verify_refuses_a_damaged_file(capsys: pytest.CaptureFixture[str], saved: str) -> None:
    content = Path(saved).read_bytes()
    Path(saved).write_bytes(content[: len(content) // 2])
    error_of(capsys, "verify", saved, "handmade_nets:small", *SIZE)


def test_analyze(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["analyze", "handmade_nets:small", *SIZE]) == 0
    assert "add" in capsys.readouterr().out
    document = run_json(capsys, "analyze", "handmade_nets:small", *SIZE)
    (tied,) = (space for space in document["spaces"] if space["ties"])
    assert (tied["channels"], tied["permutable"], len(tied["producers"])) == (16, 16, 3)  # the stem and two blocks
    assert document["boundaries"] == {}


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["compile", "resnet_50"], "did you mean resnet50"),
        (["compile", "handmade_nets:small", *SIZE, "--ratio", "1.5"], "1.5"),
        (["compile", "handmade_nets:small", *SIZE, "--groups", "0"], "groups"),
        (["compile", "handmade_nets:small", *SIZE, "--method", "magic"], "magic"),
        (["compile", "handmade_nets:small", *SIZE, "--criterion", "l3"], "l3"),
        (["compile", "handmade_nets:small", *SIZE, "--variety", "hard"], "hard"),
        (["compile", "handmade_nets:small", *SIZE, "--method", "tmi"], "snapshots"),
        (["compile", "handmade_nets:small", *SIZE, "--method", "reconstruction"], "calibration"),
        (["compile", "handmade_nets:small", *SIZE, "--snapshots", "absent.pt"], "absent.pt"),
        (["compile", "handmade_nets:small", *SIZE, "--granularity", "filter:0.5"], "give both ratios"),
        (["compile", "handmade_nets:small", *SIZE, "--granularity", "filter", "--groups", "4"], "groups=4"),
        (["compile", "handmade_nets:small", *SIZE, "--round-to", "8"], "round_to=8"),
        (["report", "handmade_nets:small", "--calibration", "absent.npy"], "absent.npy"),
        (["compile", "handmade_nets:small", "--input-size", "2,7,8,8"], "7"),
        (["compile", "handmade_nets:small", "--weights", "absent.pth"], "absent.pth"),
        (["verify", "absent.pt", "handmade_nets:small"], "absent.pt"),
        (["compile", "handmade_nets:small", *SIZE, "-o", "handmade_nets.py/out.pt"], "handmade_nets.py"),
    ],
)
def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in error_of(capsys, *arguments)


@pytest.mark.filterwarnings("default::fxprune.NothingRewrittenWarning")
def test_a_model_left_whole_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compile", "handmade_nets:small", *SIZE, "--ignore", "*"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("fxprune: warning: ")]


def test_a_failed_verification_is_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(masked: nn.Module, *rest: Any, **options: Any) -> Any:
        pruned = rewritten(masked, *rest, **options)
        for parameter in pruned.parameters():
            parameter.data.mul_(1.1)
        return pruned

    monkeypatch.setattr("fxprune.planning.compiling.rewritten", broken)
    error_of(capsys, "compile", "handmade_nets:small", *SIZE, "-o", "small.pt", code=1)
    assert not Path("small.pt").exists(), "a network that failed the check must not be written"


def test_an_interrupt_is_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fxprune.planning.compiling.plan_for", interrupt)
    assert cli.main(["compile", "handmade_nets:small", *SIZE]) == 130


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["compile"],
        ["compile", "m", "--groups", "x"],
        ["compile", "m", "--snapshots"],
        ["compile", "m", "--runtime", "onnx"],
        ["compile", "m", "--granularity", "filter:a,kernel:b"],
        ["compile", "m", "--granularity", "filter:0.5:1"],
        ["compile", "m", "--scope", "globe"],
        ["compile", "m", "--round-to", "x"],
        ["compile", "m", "--granularity", "filer"],
        ["compile", "m", "--input-size", "2,a"],
        ["compile", "m", "--input-size", "0"],
    ],
)
def test_a_malformed_command_line_is_exit_code_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "usage: fxprune" in capsys.readouterr().err


def test_a_ratio_beside_a_budget_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compile", "resnet18", "--ratio", "0.5", "--macs", "0.5"]) == 2
    assert "pass a ratio or budgets" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compile", "report", "verify", "analyze", "bench", "train", "compare", "demo"])
def test_each_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0
    assert f"usage: fxprune {command}" in capsys.readouterr().out


def test_the_examples_of_the_help_parse() -> None:
    texts = [cli.EPILOG, *(command.EXAMPLES for command in cli.COMMANDS if hasattr(command, "EXAMPLES"))]
    lines = [line for text in texts for line in re.sub(r"\\\n\s+", " ", text).splitlines() if "  fxprune " in line]
    assert len(lines) >= 20
    for line in lines:
        words = re.split(r"\s{3,}", line.strip())[0].replace("'", "")
        if "..." not in words:
            cli.read(words.split()[1:])


def test_bars_only_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(torch.randn(8, 3, 8, 8), "images.pt")
    arguments = ["compile", "handmade_nets:small", "--calibration", "images.pt", "-o", "small.pt"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert cli.main(arguments) == 0
    said = capsys.readouterr().err
    assert said.count("about ") == 1, "one total for planning, refit and what is told"
    assert all(f"{stage} " in said.splitlines()[0] for stage in ("plan", "agreement"))
    assert "100%" in said
    assert cli.main([*arguments, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_python_m_fxprune(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fxprune", "--version"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("fxprune", run_name="__main__", alter_sys=False)
    assert not exit_.value.code
    assert capsys.readouterr().out == f"fxprune {fxprune.__version__}\n"


@pytest.mark.slow
def test_python_m_fxprune_in_a_process_of_its_own() -> None:
    root = Path(fxprune.__file__).parent.parent
    command = [sys.executable, "-m", "fxprune", "--version"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == f"fxprune {fxprune.__version__}\n"


@pytest.mark.parametrize("share, warns", [(0.5, True), (0.95, False)])
def test_pictures_held_back_on_which_few_agree_are_a_warning(
    share: float, warns: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = Evaluation(10, Agreement(share, 10, True, True, 0.1), None, None, which="pictures")
    command_compile._warn_of_poor(evaluation, fxprune.PrunePlan({}), recovered=True)
    said = capsys.readouterr().err
    assert ("on 10 pictures only 50.0% agree with the dense network; more calibration images" in said) == warns
    command_compile._warn_of_poor(None, fxprune.PrunePlan({}), recovered=True)
    assert capsys.readouterr().err == ""
