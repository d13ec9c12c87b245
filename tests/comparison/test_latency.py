"""The race of networks, on tiny ones: what races, what is refused, what is written; nothing about speed."""

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from benchmarks import latency as front
from benchmarks._commands import RESULTS
from fxprune.comparison import latency, layers, limits, rivals, runtimes
from fxprune.comparison.layer_calls import count_macs
from fxprune.comparison.rivals import Network
from fxprune.comparison.runtimes import RUNTIMES, Runtime
from fxprune.inference.race import Timing


class Tiny(nn.Module):
    """Two convolutions to prune, BatchNorm, a residual add, classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.first = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(64)
        self.second = nn.Conv2d(64, 32, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(32)
        self.classes = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.norm2(self.second(self.norm1(self.first(x)).relu()))).relu()
        logits: Tensor = self.classes(x.mean((2, 3)))
        return logits


def tiny() -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Tiny().eval()


def images() -> Tensor:
    return latency._images((2, 3, 8, 8), 2)


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return tmp_path / "record.json"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, record: Path) -> Callable[..., int]:
    """`main` on `--model tiny` with one round, unless asked otherwise."""

    def load_model(name: str, weights: Path | None) -> nn.Module:
        assert (name, weights) == ("tiny", None)
        return tiny()

    monkeypatch.setattr(latency, "load_model", load_model)
    monkeypatch.setattr(latency, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(layers, "MIN_SECONDS", 0.0)
    base = ["--model", "tiny", "--size", "8", "--rounds", "2", "--threads", "1", "--output", str(record)]
    return lambda *more: front.main([*base, *more])


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_a_run(run: Callable[..., int], record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "picture.png"
    state = torch.get_rng_state()
    code = run(
        *("--ratio", "0.5,0.75", "--batch", "2", "--against", "dense,torch-pruning"),
        *("--runtime", "eager,script", "--layers", "--plot", str(picture)),
    )
    assert code == 0
    assert torch.equal(torch.get_rng_state(), state)
    document = json.loads(record.read_text())
    assert document.keys() == {"environment", "settings", "rows", "layers"}
    assert document["settings"]["size"] == [3, 8, 8]
    assert document["settings"]["ratio"] == [0.5, 0.75]
    rows = document["rows"]
    # runtimes x layouts x (dense, and two networks for each ratio)
    assert len(rows) == 2 * 2 * 5
    assert not any(row["error"] for row in rows)
    assert all(row["seconds"] > 0 and row["relative"] > 0 and row["spread"] >= 0 for row in rows)
    assert all(row["difference"] < 1e-5 for row in rows)
    assert sum(row["best"] for row in rows) == len(rows) / 2, "of two layouts one is the faster"
    assert {row["relative"] for row in rows if row["network"] == "dense" and row["best"]} == {1.0}
    shares = {(row["network"], row["ratio"]): row["macs_share"] for row in rows}
    assert shares["dense", None] == 1
    assert shares["fxprune", 0.75] < shares["fxprune", 0.5] < 0.6
    assert len(document["layers"]) == 2 * 2  # ratios x convolutions
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert sum(line.split()[1:3] == ["script", "fxprune"] for line in lines) == 2
    assert sum(line.startswith("second ") for line in lines) == 2
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_records_of_the_repository_change_where_that_is_asked_for() -> None:
    name = "latency-timm-resnet26d-cpu.json"
    asked = ["--model", "timm:resnet26d"]
    assert front.read_options(asked).output == Path("build/benchmarks") / name
    assert front.read_options([*asked, "--record"]).output == RESULTS / name
    assert front.read_options([*asked, "--output", "other.json"]).output == Path("other.json")
    with pytest.raises(SystemExit):
        front.read_options([*asked, "--record", "--output", "other.json"])


def test_one_layout(run: Callable[..., int], record: Path) -> None:
    assert run("--layout", "channels_last") == 0
    assert {row["layout"] for row in rows_of(record)} == {"channels_last"}
    assert all(row["best"] for row in rows_of(record))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(run: Callable[..., int], record: Path, dtype: str) -> None:
    assert run("--dtype", dtype) == 0
    differences = [row["difference"] for row in rows_of(record)]
    assert max(differences) > 1e-5, "it did run in half precision"


def test_openvino_computes_a_network_in_bfloat16(run: Callable[..., int], record: Path) -> None:
    openvino = pytest.importorskip("fxprune.inference.runtimes.openvino")
    for package in ("openvino", "onnxscript"):
        pytest.importorskip(package)
    if not openvino.has_bfloat16():
        pytest.skip("this processor has no instructions for bfloat16")
    assert run("--dtype", "bfloat16", "--runtime", "accelerate,openvino") == 0
    differences = [row["difference"] for row in rows_of(record) if row["runtime"] == "openvino"]
    assert len(differences) >= 2
    assert min(differences) > 1e-5


def test_some_convolutions_in_one_form(run: Callable[..., int], record: Path) -> None:
    assert run("--only", "sec*", "--form", "overlap", "--groups", "4", "--layers") == 0
    (layer,) = json.loads(record.read_text())["layers"]
    assert (layer["name"], layer["groups"], layer["macs_share"]) == ("second", 4, 0.5)
    assert layer["gather"] > 0, "groups that share channels read gathered ones"
    assert layer["lost"] == pytest.approx(layer["grouped"] + layer["gather"] - 0.5 * layer["dense"], rel=0.9)


# --- a fast wrong answer is no answer ---------------------------------------------------------------------------------


def test_a_broken_rewrite_is_found(
    run: Callable[..., int], record: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite = fxprune.rewrite

    def broken(masked: nn.Module, plan: fxprune.PrunePlan, inputs: Tensor) -> fx.GraphModule:
        pruned = rewrite(masked, plan, inputs)
        with torch.no_grad():
            pruned.get_parameter("second.weight")[:8].mul_(1.1)
        return pruned

    monkeypatch.setattr(fxprune, "rewrite", broken)
    assert run() == 1
    wrong = [row for row in rows_of(record) if row["network"] == "fxprune"]
    assert wrong
    assert all(row["error"].startswith("wrong: differs by") and row["seconds"] is None for row in wrong)
    assert all(row["seconds"] for row in rows_of(record) if row["network"] == "dense")
    assert "wrong: differs by" in capsys.readouterr().out


def test_a_broken_runtime_is_found(run: Callable[..., int], record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNTIMES, "script", Runtime(lambda module, inputs: lambda: module(inputs) * 1.01))
    assert run("--runtime", "eager,script") == 1
    assert {row["runtime"] for row in rows_of(record) if row["error"]} == {"script"}


@pytest.mark.parametrize(
    "found,expected",
    [
        (torch.tensor([1.0, 2.0]), 0.0),
        (torch.tensor([1.0, 2.5]), 0.25),
        (torch.tensor([math.nan, 2.0]), math.inf),
        ({"logits": torch.tensor([1.0, math.inf])}, math.inf),
    ],
)
def test_differences(found: object, expected: float) -> None:
    assert limits.difference(found, torch.tensor([1.0, 2.0])) == expected


def test_the_limit_grows_with_what_a_network_makes_of_noise() -> None:
    class Amplifier(nn.Module):
        """What is left of its input after the most of it is taken away."""

        def forward(self, x: Tensor) -> Tensor:
            return x - x.round(decimals=4)

    inputs = images()
    ordinary = tiny()
    assert limits.limit_of(ordinary, ordinary(inputs), inputs) == 1e-4
    amplifier = Amplifier()
    assert 1e-3 < limits.limit_of(amplifier, amplifier(inputs), inputs) <= limits.LARGEST_LIMIT
    half = inputs.bfloat16()
    assert limits.limit_of(amplifier, amplifier(half.float()), half) == limits.LARGEST_LIMIT
    assert limits.limit_of(ordinary, ordinary(half.float()), half) < 0.4


def test_nothing_is_proved_by_an_oracle_without_numbers() -> None:
    nothing = torch.full((2,), math.nan)
    assert limits.difference(nothing, nothing) == math.inf
    with pytest.raises(fxprune.VerificationError, match="shapes"):
        limits.difference(torch.ones(2), torch.ones(3))


# --- what fails is a row ----------------------------------------------------------------------------------------------


def test_a_runtime_that_refuses(
    run: Callable[..., int], record: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(module: nn.Module, inputs: Tensor) -> Callable[[], Any]:
        raise RuntimeError("\n  operator not supported\nat line 3\nand so on")

    monkeypatch.setitem(RUNTIMES, "script", Runtime(refuse))
    assert run("--runtime", "script,eager") == 0
    failed = [row for row in rows_of(record) if row["runtime"] == "script"]
    assert {row["error"] for row in failed} == {"RuntimeError: operator not supported at line 3"}
    assert all(row["relative"] for row in rows_of(record) if row["runtime"] == "eager")
    assert "operator not supported" in capsys.readouterr().out


def test_a_rival_that_crashes(run: Callable[..., int], record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*arguments: object) -> nn.Module:
        raise AssertionError("unknown layer")

    monkeypatch.setattr(rivals, "prune_channels", crash)
    assert run("--against", "torch-pruning") == 0
    (row,) = (row for row in rows_of(record) if row["network"] == "torch-pruning")
    assert (row["error"], row["seconds"], row["macs_share"]) == ("AssertionError: unknown layer", None, None)


def test_a_dense_network_that_fails_leaves_no_ratio(
    run: Callable[..., int], record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_pruned(module: nn.Module, inputs: Tensor) -> Callable[[], Any]:
        if module.get_submodule("first").groups == 1:
            raise RuntimeError("too dense")
        return lambda: module(inputs)

    monkeypatch.setitem(RUNTIMES, "script", Runtime(only_pruned))
    assert run("--runtime", "script") == 0
    assert [(row["network"], row["seconds"] is None, row["relative"]) for row in rows_of(record)] == [
        ("dense", True, None),
        ("dense", True, None),
        ("fxprune", False, None),
        ("fxprune", False, None),
    ]


# --- runtimes ---------------------------------------------------------------------------------------------------------


def test_accelerate_gets_the_network_as_it_is(
    run: Callable[..., int], record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[nn.Module] = []

    def accelerate(module: nn.Module, inputs: Tensor) -> nn.Module:
        given.append(module)
        assert inputs.shape == (4, 3, 8, 8)
        assert torch.is_grad_enabled()
        return module

    monkeypatch.setattr(fxprune, "accelerate", accelerate, raising=False)
    arguments = ("--runtime", "accelerate", "--against", "dense,torch-pruning", "--batch", "4")
    assert run(*arguments) == 0
    rows = rows_of(record)
    assert [(row["network"], row["layout"], row["best"]) for row in rows] == [
        (name, None, True) for name in ("dense", "fxprune", "torch-pruning")
    ]
    assert isinstance(given[0], Tiny)
    assert isinstance(given[1], fx.GraphModule)
    assert all(any(isinstance(m, nn.BatchNorm2d) for m in module.modules()) for module in given)
    # control: what it returns is checked
    monkeypatch.setattr(fxprune, "accelerate", lambda module, inputs: lambda x: module(x) + 0.1, raising=False)
    assert run(*arguments) == 1


def test_runtimes_in_which_people_deploy(run: Callable[..., int], record: Path) -> None:
    names = [name for name in ("onnxruntime", "openvino") if not RUNTIMES[name].obstacle("cpu", "float32")]
    assert run("--runtime", ",".join(["eager", *names]), "--layout", "contiguous") == 0
    rows = rows_of(record)
    assert {row["runtime"]: row["layout"] for row in rows} == {"eager": "contiguous", **dict.fromkeys(names)}
    assert all(row["difference"] < 1e-4 and not row["error"] for row in rows)
    dense = [row for row in rows if row["network"] == "dense"]
    assert [row["relative"] for row in dense] == [1.0] * len(dense)
    (best,) = (row for row in dense if row["relative_to_best"] == 1)
    assert best["seconds"] == min(row["seconds"] for row in dense)
    for row in rows:  # two rounds: the median of two ratios lies between them
        assert row["relative_to_best"] == pytest.approx(row["seconds"] / best["seconds"], rel=0.9)
    slower = [row for row in dense if row is not best]
    assert all(row["relative_to_best"] != row["relative"] for row in slower), "each has another opponent"


def test_a_runtime_that_is_missing(
    run: Callable[..., int], record: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = refused(run, record, capsys, "--runtime", "eager,openvino")
    assert "--runtime openvino: onnx and onnxscript and openvino not installed; pip install 'fxprune[openvino]'" in said
    monkeypatch.undo()


def test_compile_is_asked_for_its_best(run: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def stand_in(module: nn.Module, **options: Any) -> nn.Module:
        asked.append(options)
        return module

    monkeypatch.setattr(torch, "compile", stand_in)
    assert run("--runtime", "compile") == 0
    assert asked == [{"dynamic": False, "options": {"freezing": True}}] * 4


@pytest.mark.slow
def test_compile_itself(run: Callable[..., int], record: Path) -> None:
    assert run("--runtime", "compile", "--layout", "contiguous", "--batch", "1,2") == 0
    assert not any(row["error"] for row in rows_of(record))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_on_cuda(run: Callable[..., int], record: Path, dtype: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert run("--device", "cuda", "--dtype", dtype, "--runtime", "eager,cudagraph", "--layers") == 0
    assert not any(row["error"] for row in rows_of(record))


# --- the networks -----------------------------------------------------------------------------------------------------


def test_macs_are_those_of_the_report() -> None:
    model, inputs = tiny(), images()
    pruned = fxprune.compile(model, 0.5, example_inputs=inputs)
    report = fxprune.report(pruned)
    assert count_macs(model, inputs) == report.macs_dense
    assert count_macs(pruned, inputs) == report.macs_pruned
    assert not any(module._forward_hooks for module in model.modules()), "no hook stays"


def test_folding() -> None:
    model, inputs = tiny(), images()
    rivals.settle(model, inputs)
    folded = rivals.folded(model, inputs)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert limits.difference(folded(inputs), model(inputs)) < 1e-5
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules()), "the model stays as it was"


def test_settling() -> None:
    model, inputs = tiny(), images()
    with torch.no_grad():
        model.get_parameter("first.weight").mul_(1e6)
    before = model(inputs).abs().max()
    rivals.settle(model, inputs)
    assert before > 1e4
    assert model(inputs).abs().max() < 10
    powers: list[float] = []
    norm = model.get_submodule("norm1")
    norm.register_forward_hook(lambda norm, x, y: powers.append(float(y.detach().square().mean())))
    model(inputs)
    assert powers == [pytest.approx(1, abs=1e-3)]
    assert not norm._forward_pre_hooks, "no hook stays"


def test_torch_pruning_at_equal_macs() -> None:
    model, inputs = tiny(), images()
    dense = count_macs(model, inputs)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    networks = {
        share: rivals.torch_pruning_network(model, inputs, 0.5, round(share * dense)) for share in (0.8, 0.5, 0.25)
    }
    assert not any(network.error for network in networks.values())
    # multiples of 8 of 32 and 64 channels come no nearer
    for share, network in networks.items():
        assert network.macs is not None
        assert network.macs / dense == pytest.approx(share, abs=0.15)
    assert networks[0.25].macs < networks[0.5].macs < networks[0.8].macs  # type: ignore[operator]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# --- arithmetic and pictures ------------------------------------------------------------------------------------------


def test_filters_of_equal_macs() -> None:
    model, inputs = tiny(), images()
    wanted = round(0.6 * count_macs(model, inputs))
    made = rivals.filters_network(model, inputs, 0.5, wanted, {"seed": 0, "form": "auto"})
    assert made.name == "fxprune filters"
    assert made.macs is not None
    assert 0.5 * wanted < made.macs <= wanted
    assert made.module is not None
    assert made.oracle is not None
    assert len(made.module.get_parameter("stem.weight")) % rivals.ROUND_TO == 0
    torch.testing.assert_close(made.module(inputs), made.oracle(inputs), rtol=1e-4, atol=1e-4)
    refused = rivals.filters_network(model, inputs, 0.5, 10, {})
    assert refused.module is None
    assert "macs=" in refused.error


def test_the_faster_layout_of_the_dense_network_is_the_opponent() -> None:
    rows = [
        latency.Row(network, ratio, 1.0, runtime, layout, 1, difference=0.0)
        for runtime in ("eager", "script")
        for network, ratio in (("dense", None), ("fxprune", 0.5))
        for layout in ("contiguous", "channels_last")
    ]
    times = [4.0, 2.0, 3.0, 1.5, 1.0, 8.0, 5.0, 6.0]
    found = latency._with_times(rows, {i: Timing((t, 3 * t)) for i, t in enumerate(times)})
    assert [row.relative for row in found] == [2.0, 1.0, 1.5, 0.75, 1.0, 8.0, 5.0, 6.0]
    assert [row.best for row in found] == [False, True, False, True, True, False, True, False]
    lines = latency.table(found).splitlines()[1:]
    assert len(lines) == 4
    assert "channels_last" in lines[0]


def a_record(model: str = "net", relative: float = 0.8) -> dict[str, Any]:
    row = latency.Row("fxprune", 0.5, 0.5, "eager", None, 8, 1.0, 0.1, relative, 0.0, best=True)
    dense = latency.Row("dense", None, 1.0, "eager", None, 8, 1.0, 0.1, 1.0, 0.0, best=True)
    failed = latency.Row("torch-pruning", 0.5, None, "eager", None, 8, error="crash")
    settings = {"model": model, "device": "cpu", "dtype": "float32"}
    return {"settings": settings, "rows": [vars(row), vars(dense), vars(failed)]}


def test_only_drawing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / f"{name}.json" for name in "ab"]
    for path in paths:
        path.write_text(json.dumps(a_record(path.stem)))
    picture = tmp_path / "new" / "picture.svg"
    assert front.main(["--plot", str(picture), "--from", *map(str, paths)]) == 0
    assert capsys.readouterr().out.startswith("2 points")
    text = picture.read_text()
    assert "<svg" in text


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": []}', '{"settings": {"model": 1}, "rows": []}'])
def test_what_is_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    assert front.main(["--plot", str(tmp_path / "p.png"), "--from", str(path)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "a.json" in error
    assert not (tmp_path / "p.png").exists()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--runtime", "eager,magic"], "there is no runtime 'magic'; choose from eager, compile, script"),
        (["--against", "nobody"], "there is no rival 'nobody'; choose from dense, filters, torch-pruning"),
        (["--batch", "1,0"], "'0' is no count"),
        (["--batch", ""], "is no count"),
        (["--ratio", "0"], "'0' is no ratio to prune"),
        (["--ratio", "0.5,1"], "'1' is no ratio"),
        (["--ratio", "nan"], "'nan' is no ratio"),
        (["--ratio", "half"], "'half' is no ratio"),
        (["--rounds", "0"], "'0' is no count"),
        (["--dtype", "float64"], "invalid choice: 'float64'"),
        (["--plot", "picture.gif"], "must end in .png or .svg"),
        (["--from", "a.json"], "--plot FILE says where"),
    ],
)
def test_malformed_options(
    run: Callable[..., int], record: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as exit:
        run(*arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert not record.exists()


def test_a_model_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        front.main([])
    assert "--model is needed" in capsys.readouterr().err


def refused(run: Callable[..., int], record: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("benchmarks.latency: error: ")
    assert not record.exists()
    return captured.err


def test_a_machine_without_cuda(
    run: Callable[..., int], record: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no CUDA device" in refused(run, record, capsys, "--device", "cuda")


def test_cuda_graphs_on_the_cpu(run: Callable[..., int], record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no CUDA graphs on the CPU" in refused(run, record, capsys, "--runtime", "eager,cudagraph")


@pytest.mark.parametrize(
    "package,arguments", [("torch_pruning", ["--against", "torch-pruning"]), ("matplotlib", ["--plot", "a.png"])]
)
def test_a_missing_package(
    run: Callable[..., int],
    record: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    package: str,
    arguments: list[str],
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    assert f"{package} is not installed; pip install 'fxprune[" in refused(run, record, capsys, *arguments)


def test_patterns_that_match_nothing(run: Callable[..., int], record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "matches no convolution" in refused(run, record, capsys, "--only", "nowhere")


def test_a_network_that_could_not_be_made_is_never_prepared() -> None:
    with pytest.raises(AssertionError):
        runtimes.prepare(Network("torch-pruning", 0.5, error="crash"), RUNTIMES["eager"], None, images())
