"""Whatever goes wrong on the command line is a sentence with the way out and an exit code that means what help says."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import fxprune
from fxprune.cli import main
from fxprune.errors import FxpruneError, StorageError
from fxprune.exports import save_onnx, save_torchscript
from fxprune.files import check_folder, check_writable, write_whole
from fxprune.models import load_model

NETS = """
from torch import nn

def small():
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))

def broken():
    raise KeyError("weights")

def needs(width):
    return nn.Conv2d(width, width, 3)
"""
SIZE = ("--size", "16")


@pytest.fixture(autouse=True)
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sentence_nets.py").write_text(NETS)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sentence_nets", raising=False)


def compiled() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(16, 32, 3))
    return fxprune.compile(model, example_inputs=torch.randn(2, 16, 8, 8))


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("compile", "NETS:small", "-o", "."), ". is a folder; name a file in it"),
        (("compile", "NETS:small", "-o", "folder"), "folder is a folder; name a file in it, such as folder/pruned.pt"),
        (("compile", "NETS:small", "-o", "sentence_nets.py/x.pt"), "sentence_nets.py is a file, not a folder"),
        (("compile", "NETS:small", "--onnx", "folder"), "folder is a folder"),
        (("compile", "NETS:small", "--torchscript", "folder"), "folder is a folder"),
        (("compile", "NETS:broken", "-o", "x.pt"), "it raises KeyError: 'weights' (sentence_nets.py, line 8)"),
        (("compile", "NETS:needs", "-o", "x.pt"), "called without arguments, it raises TypeError: needs() missing 1"),
        (("compile", "./absent.py:small", "-o", "x.pt"), "absent.py: no such file"),
        (("bench", "NETS:small", "--output", "."), ". is a folder"),
        (("bench", "NETS:small", "--output", "x.json", "--plot", "folder/.png"), "must end in .png or .svg"),
        (("demo", "--output", "sentence_nets.py"), "sentence_nets.py is a file; name a folder"),
        (("train", "digits_resnet", "--data", "digits", "--epochs", "1", "--output", "sentence_nets.py"), "is a file"),
        (
            ("compare", "digits_resnet", "--data", "digits", "--epochs", "1", "--output", "sentence_nets.py"),
            "is a file",
        ),
    ],
)
def test_one_line_before_the_work(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for work in ("make_plan", "planning.compiling.compiled_for"):
        monkeypatch.setattr(f"fxprune.{work}", lambda *_, **__: pytest.fail("the work began"))
    arguments = tuple(argument.replace("NETS", "sentence_nets") for argument in arguments)
    try:
        code = main([*arguments, *(SIZE if arguments[0] in ("compile", "bench") else ())])
    except SystemExit as stopped:  # argparse, where options do not go together
        code = int(str(stopped.code))
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert said in captured.err
    assert "Traceback" not in captured.err


def test_a_model_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "./sentence_nets.py:small", *SIZE, "-o", "small.pt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == {"fxprune": "small.pt"}
    assert main(["verify", "small.pt", "sentence_nets:small", *SIZE]) == 0


def test_nothing_to_write_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "sentence_nets:small", *SIZE]) == 0
    assert "nothing will be written: -o FILE, --onnx FILE" in capsys.readouterr().err
    assert main(["compile", "sentence_nets:small", *SIZE, "-o", "x.pt"]) == 0
    assert "nothing" not in capsys.readouterr().err


def test_a_file_with_other_weights_is_no_defect(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(load_model("sentence_nets:small", seed=5).state_dict(), "w.pth")
    assert main(["compile", "sentence_nets:small", "--weights", "w.pth", *SIZE, "-o", "small.pt"]) == 0
    capsys.readouterr()
    assert main(["verify", "small.pt", "sentence_nets:small", *SIZE]) == 1
    said = capsys.readouterr().err
    assert "give those that FILE was compiled from with --weights" in said
    assert "defect" not in said
    assert main(["verify", "small.pt", "sentence_nets:small", "--weights", "w.pth", *SIZE]) == 0


def test_a_wrong_option_shows_the_usage_of_its_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["compile", "sentence_nets:small", "--inputsize", "3"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: fxprune compile ")
    assert "unrecognized arguments: --inputsize 3 (near: '--input-size'" in said


@pytest.mark.parametrize("option", ["--size", "--input-size"])
@pytest.mark.parametrize("value", ["16", "2,3,16,16"])
@pytest.mark.parametrize("command", ["compile", "bench"])
def test_one_name_for_the_size(command: str, value: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["-o", "x.pt"] if command == "compile" else ["--rounds", "1", "--layout", "contiguous"]
    assert main([command, "sentence_nets:small", option, value, *more, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    found = document["report"]["input_shapes"][0][-1] if command == "compile" else document["settings"]["size"][-1]
    assert found == 16


def test_grey_pictures_are_not_given_to_a_network_for_colour(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "resnet20", "--data", "digits", "--epochs", "1", "--output", "run"]) == 2
    assert "digits: has pictures of 1 channels, and the network is for 3" in capsys.readouterr().err


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write",
    [
        lambda path: fxprune.save(compiled(), path),
        lambda path: save_torchscript(compiled(), path),
        lambda path: save_onnx(compiled(), (torch.randn(2, 16, 8, 8),), path),
    ],
    ids=["fxprune.save", "save_torchscript", "save_onnx"],
)
@pytest.mark.parametrize("path", [".", "folder", "sentence_nets.py/x.pt", "absent/x.pt"])
def test_writing_fails_with_a_sentence(write: Callable[[str], object], path: str) -> None:
    with pytest.raises(StorageError, match=r"; (name|make|choose) "):
        write(path)
    assert sorted(os.listdir(".")) == ["folder", "sentence_nets.py"]


def test_devices_are_not_replaced_by_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageError, match="is a device or pipe and no file"):
        write_whole(tmp_path / "pipe", lambda partial: partial.write_text("x"))
    assert not (tmp_path / "pipe").is_file()


def test_control_what_can_be_written_passes(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "deep" / "x.pt")
    check_writable(tmp_path / "sentence_nets.py")
    check_folder(tmp_path / "new")
    with pytest.raises(StorageError, match="does not exist; make it first"):
        check_writable(tmp_path / "new" / "x.pt", new_folder=False)


@pytest.mark.parametrize(
    "call",
    [
        fxprune.compile,
        fxprune.make_plan,
        fxprune.analyze,
        fxprune.report,
        lambda model: fxprune.accelerate(model, torch.zeros(1, 3, 8, 8)),
        lambda model: fxprune.verify(model, model, torch.zeros(1, 3, 8, 8)),
        lambda model: fxprune.save(model, "x.pt"),
        lambda model: fxprune.mask(model, None),  # type: ignore[arg-type]
        lambda model: fxprune.rewrite(model, None),  # type: ignore[arg-type]
    ],
)
@pytest.mark.parametrize(
    "model, said",
    [
        ("resnet18", "'resnet18', a name or path and no module; build it first"),
        (nn.Conv2d(3, 8, 3).state_dict(), "a state dict, which are weights without their network"),
        (nn.Conv2d, "the model is a type and no module; call it first"),
        (None, "the model is a NoneType and no module"),
    ],
    ids=["a name", "a state dict", "a class", "nothing"],
)
def test_what_is_no_model_is_told_apart(call: Callable[[object], object], model: object, said: str) -> None:
    with pytest.raises(FxpruneError, match=said):
        call(model)


def test_what_is_no_plan() -> None:
    with pytest.raises(fxprune.PlanError, match=r"the plan is a str; pass what fxprune\.make_plan returned"):
        fxprune.mask(nn.Conv2d(3, 8, 3), "plan.json")  # type: ignore[arg-type]
