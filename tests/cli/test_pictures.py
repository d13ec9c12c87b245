"""The road of a user with photos: a folder of pictures, checkpoints as they lie about, what is said of the result."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from alone_harness import run_alone
from PIL import Image
from torch import Tensor, nn

import fxprune
from fxprune.calibration.agreement import Agreement
from fxprune.calibration.pictures import find_pictures, with_labels
from fxprune.cli import main
from fxprune.errors import AccelerationError, CalibrationError, StorageError
from fxprune.files import read_state_dict
from fxprune.models import ModelNameError, Preprocessing, PreprocessingError, load_model, preprocessing_of

NETS = """
import torch
from torch import nn

def small():
    torch.manual_seed(0)
    conv = lambda i, o: nn.Conv2d(i, o, 3, padding=1)
    body = nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 32), nn.ReLU(), conv(32, 32), nn.ReLU())
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))

def images():
    return torch.randn(12, 3, 16, 16)

def batches():
    return [(torch.randn(6, 3, 16, 16), torch.zeros(6)), {"pixel_values": torch.randn(6, 3, 16, 16), "labels": 1}]
"""
NET = "picture_nets:small"


@pytest.fixture(autouse=True)
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "picture_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "picture_nets", raising=False)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Forty drawn pictures in four folders, in three formats and several sizes, one grey, one with transparency."""
    draw = np.random.default_rng(0)
    for i in range(40):
        folder = tmp_path / "photos" / "deep" / str(i % 4)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 255, (20 + i, 24, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels)
        picture = picture.convert("L") if i == 3 else picture.convert("RGBA") if i == 5 else picture
        suffix = "png" if i == 5 else ("jpg", "png", "webp", "JPEG")[i % 4]
        picture.save(folder / f"{i % 4:03d}_{i}.{suffix}", {"jpg": "JPEG"}.get(suffix, suffix))
    (tmp_path / "photos" / ".hidden.png").write_text("no picture")
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    return tmp_path / "photos"


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.filterwarnings("always::fxprune.errors.PoorAgreementWarning")
def test_poor_agreement_is_said_once(
    photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Agreement, "is_poor", True)
    arguments = ["compile", NET, "--size", "16", "-o", "small.pt", "--calibration"]
    assert main([*arguments, str(photos / "deep")]) == 0
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "agree" in line]
    assert "on 10 pictures that nothing was calibrated with only" in said
    for extra in sorted((photos / "deep").rglob("*_[12]?.*")):  # twenty of forty: too few to hold any back
        extra.unlink()
    assert main([*arguments, str(photos / "deep")]) == 0
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "agree" in line]
    assert "calibration inputs" in said


def test_from_a_folder_to_a_file(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compile", NET, "--size", "16", "--calibration", str(photos / "deep"), "-o", "small.pt"]
    document = run_json(capsys, *arguments)
    found = document["evaluation"]
    assert found["inputs"] == 10, "a quarter is held back"
    assert found["agreement"]["held_out"]
    assert 0 <= found["accuracy"] <= 1
    assert 0 <= found["dense_accuracy"] <= 1
    assert found["source"] == "a folder for each class"
    assert all(layer["error"] is not None for layer in document["report"]["layers"] if layer["form"] != "dense")
    assert main([*arguments, "--labels", "names"]) == 0
    said = capsys.readouterr().out
    assert "30 of 40 pictures" in said
    assert "resized to 16x16" in said
    assert "labels: the numbers that names begin with; same class as the dense network" in said
    assert "\non 10 pictures that nothing was calibrated with: accuracy " in said
    assert "; in brackets 95 % intervals\n" in said
    assert main(["verify", "small.pt", NET, "--size", "16", "--calibration", str(photos / "deep")]) == 0
    capsys.readouterr()
    found = run_json(capsys, "eval", "small.pt", NET, "--size", "16", "--data", str(photos))
    assert found["inputs"] == 40
    assert found["which"] == f"pictures of {photos}"
    assert not found["agreement"]["held_out"], "nobody knows"
    assert found["accuracy"] is None, "no folder right below is a class"
    assert 0 <= found["agreement"]["share"] <= 1


def test_a_model_alone_has_an_accuracy(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("eval", NET, "--size", "16", "--data")
    found = run_json(capsys, *arguments, str(photos / "deep"))
    assert found["agreement"] is None
    model = load_model(NET)
    gallery = find_pictures(photos / "deep")
    seen = gallery.read(Preprocessing(16, 16, None, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    labels = torch.tensor([int(file.parent.name) for file in gallery.files])
    assert found["accuracy"] == pytest.approx(float((model(seen).argmax(1) == labels).double().mean()))
    assert main([*arguments, str(photos)]) == 2
    assert "give --labels" in capsys.readouterr().err


def test_sweep(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("sweep", NET, "--size", "16", "--calibration", str(photos / "deep"), "--macs", "0.9,0.6", "--lose")
    document = run_json(capsys, *arguments, "100", "--output", "s.json", "--plot", "s.png")
    assert [budget["asked"] for budget in document["budgets"]] == [1.0, 0.9, 0.6]
    shares = [budget["macs_share"] for budget in document["budgets"]]
    assert shares == pytest.approx([1.0, 0.9, 0.6], abs=0.03)
    assert document["budgets"][0]["relative"] == {"eager": 1.0}
    assert document["best"] == 0.6, "all is allowed, so the smallest"
    assert json.loads(Path("s.json").read_text()) == document
    assert Path("s.png").read_bytes().startswith(b"\x89PNG")
    assert main([*arguments, "-101"]) == 0
    said = capsys.readouterr().out
    assert "every budget loses more than -101 points of accuracy; ask for larger ones" in said
    assert "on 10 pictures that nothing was calibrated with, of which one is 10.0 points" in said


@pytest.mark.parametrize("source", ["x.pt", "x.npy", "x.npz", "picture_nets:images", "./picture_nets.py:batches"])
def test_other_data(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = torch.randn(12, 3, 16, 16)
    torch.save(inputs, "x.pt")
    np.save("x.npy", inputs.numpy())
    np.savez("x.npz", images=inputs.numpy(), labels=np.zeros(12))
    document = run_json(capsys, "compile", NET, "--calibration", source, "-o", "small.pt")
    assert any(layer["error"] is not None for layer in document["report"]["layers"])
    assert document["evaluation"] is None
    assert document["report"]["input_shapes"] == [[2, 3, 16, 16]] or document["report"]["input_shapes"][0][-1] == 16


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--calibration", "empty"], "has no picture in it, at any depth"),
        (["--calibration", "broken"], "cannot be read as a picture"),
        (["--calibration", "odd.npz"], "holds a, b; call the array of the inputs 'images'"),
        (["--calibration", "picture_nets:nothing"], "has no 'nothing'"),
        (["--calibration", "photos/deep", "--labels", "absent.csv"], "absent.csv: cannot be read"),
        (["--calibration", "photos/deep", "--labels", "few.csv"], "pictures have no label, such as"),
        (["--calibration", "photos/deep", "--labels", "wrong.csv"], "'9' is no class; give numbers from 0 to 3"),
        (["--calibration", "photos/deep", "--mean", "0.5", "--std", "1,1,1"], "give one positive deviation for each"),
        (["--weights", "DEFAULT"], "has no published weights DEFAULT; give a file"),
    ],
)
@pytest.mark.usefixtures("photos")
def test_what_cannot_be_read(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/x.jpg").write_text("no picture")
    np.savez("odd.npz", a=np.zeros(2), b=np.zeros(2))
    Path("few.csv").write_text("000_0.jpg,1\n")
    names = [path.name for path in Path("photos").rglob("0*")]
    Path("wrong.csv").write_text("".join(f"{name},9\n" for name in names))
    assert main(["compile", NET, "--size", "16", *arguments, "-o", "small.pt"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_random_weights_are_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "digits_resnet", "-o", "x.pt"]) == 0
    assert "digits_resnet has random weights" in capsys.readouterr().err
    torch.save(load_model("digits_resnet").state_dict(), "w.pth")
    assert main(["compile", "digits_resnet", "--weights", "w.pth", "-o", "x.pt"]) == 0
    assert "random" not in capsys.readouterr().err
    assert main(["compile", NET, "--size", "16", "-o", "x.pt"]) == 0
    assert "random" not in capsys.readouterr().err, "a function of one's own has its own weights"


# --- labels -----------------------------------------------------------------------------------------------------------


def test_labels_by_file(photos: Path) -> None:
    gallery = find_pictures(photos)
    true = tuple(int(file.parent.name) for file in gallery.files)
    Path("l.csv").write_text("".join(f"{file.name};{label}\n" for file, label in zip(gallery.files, true, strict=True)))
    Path("l.json").write_text(
        json.dumps({file.stem: f"class {label}" for file, label in zip(gallery.files, true, strict=True)})
    )
    categories = [f"class-{i}" for i in range(4)]
    assert with_labels(gallery, "l.csv", 4).labels == true
    assert with_labels(gallery, "l.json", 4, categories).labels == true
    assert with_labels(gallery, "names", 4).labels == true
    assert with_labels(find_pictures(photos / "deep"), None, 4).labels is not None
    assert with_labels(gallery, None, 4).labels is None, "one folder is no class"
    with pytest.raises(CalibrationError, match="is no class"):
        with_labels(gallery, "l.json", 4)


def test_folders_by_the_names_of_classes(photos: Path) -> None:
    for number, name in enumerate(("Tree_frog", "tench", "cup", "hen")):
        (photos / "deep" / str(number)).rename(photos / "deep" / name)
    gallery = find_pictures(photos / "deep")
    known = with_labels(gallery, None, 9, ["hen", "tench", "tree frog", "x", "cup"])
    assert known.labels is not None
    assert {file.parent.name: label for file, label in zip(known.files, known.labels, strict=True)} == {
        "Tree_frog": 2, "tench": 1, "cup": 4, "hen": 0,
    }  # fmt: skip
    assert with_labels(gallery, None, 9).labels is None, "neither names nor as many as classes"


# --- preprocessing ----------------------------------------------------------------------------------------------------


def test_torchvision_says_how_its_weights_want_pictures() -> None:
    model = load_model("mobilenet_v2")
    shape = (2, 3, 224, 224)
    first = preprocessing_of("mobilenet_v2", model, Path("mobilenet_v2-b0353104.pth"), shape)
    assert (first.height, first.short, first.source) == (224, 256, "torchvision's for IMAGENET1K_V1")
    second = preprocessing_of("mobilenet_v2", model, Path("DEFAULT"), shape)
    assert (second.height, second.short, second.source) == (224, 232, "torchvision's for IMAGENET1K_V2")
    unknown = preprocessing_of("mobilenet_v2", model, Path("mine.pth"), shape)
    assert replace_source(unknown) == replace_source(first)
    assert "not known" in unknown.source


def replace_source(found: Preprocessing) -> tuple[object, ...]:
    return (found.height, found.width, found.short, found.mean, found.std, found.interpolation)


def test_it_is_what_torchvision_does(photos: Path) -> None:
    from torchvision.models import MobileNet_V2_Weights

    theirs = MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    ours = preprocessing_of("mobilenet_v2", nn.Identity(), Path("IMAGENET1K_V1"), (2, 3, 224, 224))
    file = find_pictures(photos).files[7]
    with Image.open(file) as picture:
        assert torch.equal(ours(picture), theirs(picture.convert("RGB")))


def test_timm_says_it_too() -> None:
    pytest.importorskip("timm")
    found = preprocessing_of("timm:resnest14d", load_model("timm:resnest14d"), None, (2, 3, 224, 224))
    assert (found.height, found.short, found.source) == (224, 256, "timm's for these weights")


def test_what_the_user_says_counts() -> None:
    usual = Preprocessing(224, 224, 256, (0.5,) * 3, (0.5,) * 3)
    changed = usual.changed(size=(112, 112), mean=(0.1, 0.2, 0.3), std=None)
    assert (changed.height, changed.short, changed.mean, changed.std) == (112, 128, (0.1, 0.2, 0.3), (0.5,) * 3)
    with pytest.raises(PreprocessingError, match="give one positive deviation for each mean"):
        usual.changed(size=None, mean=(0.1, 0.2), std=None)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def state() -> dict[str, Tensor]:
    return nn.Conv2d(3, 8, 3).state_dict()


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "state_dict_ema", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module."])
def test_checkpoints_as_training_scripts_leave_them(key: str, prefix: str, tmp_path: Path) -> None:
    (tmp_path / "one_conv.py").write_text("from torch import nn\ndef conv():\n    return nn.Conv2d(3, 8, 3)\n")
    wanted = state()
    content: dict[str, Any] = {key: {f"{prefix}{name}": value for name, value in wanted.items()}}
    content |= {"epoch": 3, "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {}, "lr": [0.1]}}
    torch.save(content, "c.pth")
    model = load_model("./one_conv.py:conv", "c.pth")
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


def test_averaged_weights_come_first_and_their_counter_goes() -> None:
    ema, last = state(), state()
    torch.save({"model": last, "model_ema": {**ema, "n_averaged": torch.tensor(7)}}, "c.pth")
    assert torch.equal(read_state_dict(Path("c.pth"))["weight"], ema["weight"])


def test_safetensors() -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    wanted = state()
    safetensors.save_file(wanted, "c.safetensors")
    assert torch.equal(read_state_dict(Path("c.safetensors"))["weight"], wanted["weight"])
    Path("bad.safetensors").write_text("no tensors")
    with pytest.raises(StorageError, match=r"bad\.safetensors: cannot be read"):
        read_state_dict(Path("bad.safetensors"))


def test_a_pickled_module_is_refused_with_the_way_out() -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 8, 3)), "whole.pth")
    with pytest.raises(
        StorageError, match=r"holds a pickled torch\.nn\S+ and not tensors alone.*save\(model\.state_dict"
    ):
        read_state_dict(Path("whole.pth"))


def test_published_weights_that_do_not_exist() -> None:
    with pytest.raises(ModelNameError, match="has no weights IMAGENET1K_V9; choose from DEFAULT, IMAGENET1K_V1"):
        load_model("resnet18", "IMAGENET1K_V9")


def test_bench_tells_whether_it_is_worth_it_and_the_file_is_what_was_timed(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    for module in ("acceleration", "stopwatch"):
        monkeypatch.setattr(f"fxprune.inference.{module}.ROUNDS", 1)
    monkeypatch.setattr("fxprune.comparison.worth.GRAPH_RUNTIMES", ("onnxruntime",))
    command = ["compile", NET, "--size", "16", "--calibration", str(photos), "--onnx", "net.onnx", "-o", "net.pt"]
    assert main([*command, "--bench", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {"onnxruntime"} <= document["time"]["dense"].keys() == document["time"]["pruned"].keys()
    images = torch.randn(3, 3, 16, 16)
    ours = fxprune.load("net.pt", load_model(NET))(images).detach()
    theirs = torch.from_numpy(run_alone("onnxruntime", tmp_path / "net.onnx", images.numpy()))
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)
    assert main([*command[:-4], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["time"] is None, "control"


def test_what_cannot_be_accelerated_is_not_timed(
    photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise AccelerationError("only a graph can be accelerated")

    monkeypatch.setattr("fxprune.comparison.worth.accelerate", refuses)
    assert main(["compile", NET, "--size", "16", "--bench"]) == 0
    assert "warning: not timed: only a graph can be accelerated" in capsys.readouterr().err


def test_a_wrong_name_is_all_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["compile", "resnet81"], ["eval", "resnet81", "--data", "."], ["sweep", "resnet81", *CALIBRATED]):
        assert main(command) == 2
        told = capsys.readouterr().err.splitlines()
        assert [line for line in told if "resnet81: no such model" in line] == told


CALIBRATED = ("--calibration", "photos")


def test_eval_of_a_file_says_what_flatters(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", NET, "--size", "16", "-o", "net.pt"]) == 0
    capsys.readouterr()
    options = ["--size", "16", "--data", str(photos), "--labels", "names"]
    assert main(["eval", "net.pt", NET, *options]) == 0
    assert "note: of pictures that it was calibrated with this says more good than is true" in capsys.readouterr().out
    assert main(["eval", NET, *options]) == 0
    assert "note:" not in capsys.readouterr().out, "a dense network was calibrated with none"


def test_eval_reads_pictures_at_the_size_a_file_was_compiled_with(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(load_model("digits_resnet", seed=5).state_dict(), "w.pth")
    weights, data = ("--weights", "w.pth"), ("--data", str(photos))
    assert main(["compile", "digits_resnet", *weights, "--size", "20", "-o", "net.pt"]) == 0
    capsys.readouterr()
    of_the_file = run_json(capsys, "eval", "net.pt", "digits_resnet", *weights, *data)
    asked = run_json(capsys, "eval", "net.pt", "digits_resnet", *weights, *data, "--size", "16")
    usual = run_json(capsys, "eval", "digits_resnet", *weights, *data, "--labels", "names")
    checked = ["verify", "net.pt", "digits_resnet", *weights, "--calibration", str(photos)]
    assert main(["compile", "digits_resnet", *weights, *checked[-2:], "--size", "20", "-o", "net.pt"]) == 0
    assert main(checked) == 0
    assert main([*checked, "--size", "16"]) == 1, "control: other inputs were calibrated with"
    capsys.readouterr()
    assert "20x20" in of_the_file["pictures"]
    assert "16x16" in asked["pictures"]
    assert "8x8" in usual["pictures"]


def test_eval_measures_nothing_by_random_weights(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(load_model("digits_resnet", seed=5).state_dict(), "w.pth")
    net, weights = ("digits_resnet", "--size", "16"), ("--weights", "w.pth")
    assert main(["compile", *net, *weights, "-o", "net.pt"]) == 0
    data, labels = ("--data", str(photos)), ("--labels", "names")
    capsys.readouterr()
    for arguments in (("eval", *net, *data, *labels), ("eval", "net.pt", *net, *data)):
        assert main(list(arguments)) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "digits_resnet has random weights, " in captured.err
        assert "--weights FILE or --pretrained" in captured.err
        assert main([*arguments, *weights]) == 0, "control"
        capsys.readouterr()
    assert main(["eval", "net.pt", *net, *data, *labels, "--json"]) == 0
    captured = capsys.readouterr()
    alone = json.loads(captured.out)
    assert "warning: digits_resnet has random weights, and net.pt cannot be compared with it" in captured.err
    assert (alone["agreement"], alone["dense_accuracy"]) == (None, None)
    assert alone["accuracy"] == run_json(capsys, "eval", "net.pt", *net, *weights, *data, *labels)["accuracy"]


def test_it_is_said_what_was_guessed(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "digits_resnet", "--calibration", str(photos)]) == 0
    said = "8x8 is what digits_resnet is made for, mean and deviation are a guess; --size, --mean and --std say it"
    assert said in capsys.readouterr().out
    assert main(["compile", "digits_resnet", "--calibration", str(photos), "--mean", "0.3", "--std", "0.4"]) == 0
    assert "a guess" not in capsys.readouterr().out, "control"
