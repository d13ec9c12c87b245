"""The benchmarks: their own arithmetic on made-up input, and short runs on ../shared where it is present."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fxprune
from benchmarks import _cifar, accuracy, compile_time
from benchmarks._environment import environment
from benchmarks._images import CIFAR10, IMAGENET, Images, Normalization, open_images

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = Path(os.environ.get("FXPRUNE_SHARED", ROOT.parent / "shared"))
    if not (folder / "weights").is_dir():
        pytest.skip(f"no trained weights: {folder.name}/weights is absent; set FXPRUNE_SHARED to a folder that has it")
    return folder


class First(nn.Module):
    """Logits for two classes: the first pixel, and 0.5."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.gain * x[:, 0, 0, 0]
        return torch.stack([first, torch.full_like(first, 0.5)], dim=1)


def five_images() -> Images:
    pixels = torch.tensor([0.1, 0.2, 0.6, 0.8, 0.9]).reshape(5, 1, 1, 1).expand(5, 3, 1, 1)
    labels = torch.tensor([1, 0, 0, 0, 1])
    return Images(5, lambda start, stop: (pixels[start:stop], labels[start:stop]))


NOT_NORMALIZED = Normalization((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_comparison_counts_every_image_once(batch: int) -> None:
    found = accuracy.compare(First(), First(0.7), First(0.65), five_images(), NOT_NORMALIZED, batch)
    assert found.images == 5
    assert found.dense == pytest.approx(3 / 5)
    assert found.masked == pytest.approx(2 / 5)
    assert found.compiled == pytest.approx(2 / 5)
    assert found.agreeing == 5
    assert found.difference == pytest.approx(0.05 * 0.9)
    assert found.scale == pytest.approx(0.63)
    assert found.classes == 2


def test_comparison_sees_a_disagreement() -> None:
    found = accuracy.compare(First(), First(), First(0.7), five_images(), NOT_NORMALIZED, 2)
    assert found.agreeing == 4


@pytest.mark.parametrize("depth", [20, 32, 56])
def test_cifar_networks_have_the_published_sizes(depth: int) -> None:
    millions = {20: 0.27, 32: 0.46, 56: 0.85}  # He et al. 2016, table 6
    model = _cifar.CifarResNet(depth)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions[depth]
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_cifar_depths_that_do_not_exist(depth: int) -> None:
    with pytest.raises(ValueError, match="6n \\+ 2"):
        _cifar.CifarResNet(depth)


@pytest.mark.parametrize("zeros,filled", [("around", slice(8, 24)), ("after", slice(0, 16))])
def test_where_the_shortcut_puts_its_zeros(zeros: _cifar.Zeros, filled: slice) -> None:
    block = _cifar.CifarBlock(16, 32, 2, zeros).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 16, 4, 4) + 1
    out = block(x)
    assert torch.equal(out[:, filled], x[:, :, ::2, ::2])
    assert int(out.ne(0).any(dim=(0, 2, 3)).sum()) == 16


def test_cifar_sheets(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5000, 32, 32, 3), dtype=np.uint8)
    sheet = images.reshape(50, 100, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(1600, 3200, 3)
    Image.fromarray(sheet).save(tmp_path / "cifar10_test_00.webp", lossless=True)
    np.savez(tmp_path / "labels.npz", y_test=np.arange(5000) % 10)
    found = open_images(f"cifar10:{tmp_path}")
    pixels, labels = found.read(123, 125)
    assert found.count == 5000
    assert torch.equal((pixels * 255).round().byte(), torch.tensor(images[123:125]).permute(0, 3, 1, 2))
    assert labels.tolist() == [3, 4]


def test_photos(tmp_path: Path) -> None:
    Image.new("RGB", (512, 300), (255, 0, 51)).save(tmp_path / "207_dog.jpg", quality=100)
    Image.new("L", (300, 300)).save(tmp_path / "003_grey.jpg")
    Image.new("L", (300, 300)).save(tmp_path / "unnamed.jpg")
    found = open_images(f"photos:{tmp_path}")
    pixels, labels = found.read(0, 2)
    assert labels.tolist() == [3, 207]
    assert pixels.shape == (2, 3, 224, 224)
    assert pixels[1].mean((1, 2)).tolist() == pytest.approx([1, 0, 0.2], abs=0.02)


@pytest.mark.parametrize("source", ["cifar10", "cifar10:", "mnist:x", "x"])
def test_a_source_of_another_kind(source: str) -> None:
    with pytest.raises(ValueError, match="must be cifar10:DIR or photos:DIR"):
        open_images(source)


def test_a_folder_without_photos(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no photo"):
        open_images(f"photos:{tmp_path}")


def test_first_images() -> None:
    assert five_images().first(3).count == 3
    assert five_images().first(None).count == five_images().first(9).count == 5
    assert [len(labels) for _, labels in five_images().first(3).batches(2)] == [2, 1]


def test_normalization() -> None:
    pixels = torch.tensor(CIFAR10.mean).reshape(1, 3, 1, 1) + torch.tensor(CIFAR10.std).reshape(1, 3, 1, 1)
    torch.testing.assert_close(CIFAR10(pixels), torch.ones(1, 3, 1, 1))
    assert not torch.allclose(IMAGENET(pixels), torch.ones(1, 3, 1, 1))


def test_absent_data_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert accuracy.main(["--model", "resnet20", "--data", "cifar10:absent"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("benchmarks.accuracy: error: ")
    assert len(captured.err.splitlines()) == 1


def test_environment_fits_json() -> None:
    record = json.loads(json.dumps(environment()))
    assert record["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads()


def test_medians() -> None:
    runs: list[compile_time.Measurement] = [{"a": 1.0, "b": None}, {"a": 5.0}, {"a": 2.0, "b": None, "c": 4.0}]
    assert compile_time.medians(runs) == {"a": 2.0, "b": None, "c": 4.0}


def test_the_memory_limit() -> None:
    assert compile_time.memory_limit_mb(nn.Linear(1000, 1000, bias=False)) == pytest.approx(212)
    assert compile_time.memory_limit_mb(nn.Linear(1000, 1000, bias=False).half()) == pytest.approx(206)


def test_the_table_marks_what_is_above_its_limit() -> None:
    result: dict[str, float | None] = {"analysis": 0.5, "plan": 1.0, "mask": 0.1, "rewrite": 1.0, "compile": 9.0}
    result |= {"verified": None, "compile peak MB": 100.0, "verified peak MB": 900.0}
    line = compile_time.table({"net": {**result, "limit_mb": 300.0, "target_seconds": 2.0}}).splitlines()[1]
    assert line.split() == ["net", "0.50", "1.00", "0.10", "1.00", "9.00!", "-", "100", "900!", "300"]


def test_the_peak_is_above_the_level() -> None:
    if compile_time._reset_peak_mb() is None:
        pytest.skip("this system does not let a process reset its peak memory")
    seconds, peak = compile_time._timed_with_peak(lambda: torch.ones(30_000_000))  # 120 MB
    assert seconds > 0
    assert peak is not None
    assert 100 < peak < 200
    _, nothing = compile_time._timed_with_peak(lambda: None)
    assert nothing is not None
    assert nothing < 20


@pytest.mark.slow
def test_a_measurement_in_a_fresh_process() -> None:
    found = compile_time.measure_in_fresh_process("squeezenet1_1", "steps", threads=1)
    assert set(found) == {"analysis", "plan", "mask", "rewrite"}
    assert all(seconds is not None and seconds > 0 for seconds in found.values())
    with pytest.raises(RuntimeError, match="no such model"):
        compile_time.measure_in_fresh_process("squeezenet9", "steps", threads=1)


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize(
    "model,weights,at_least",
    [
        ("resnet20", "resnet20-12fca82f.th", 0.90),
        ("resnet20_zeros_after", "resnet20_choH_sd.pt", 0.91),
        ("resnet56", "resnet56-4bfd9763.th", 0.91),
    ],
)
def test_trained_networks(shared: Path, tmp_path: Path, model: str, weights: str, at_least: float) -> None:
    record = tmp_path / "record.json"
    code = accuracy.main(
        [
            *("--model", model, "--weights", str(shared / "weights" / "cifar10" / weights)),
            *("--data", f"cifar10:{shared / 'data' / 'cifar10'}", "--limit", "500", "--output", str(record)),
            *("--ratio", "0.25", "--form", "overlap"),  # gentle enough that predictions still vary without fine-tuning
        ]
    )
    assert code == 0
    document = json.loads(record.read_text())
    assert document["result"]["agreeing"] == document["result"]["images"] == 500
    assert document["result"]["dense"] >= at_least
    assert document["result"]["classes"] >= 8
    assert document["report"]["params_pruned"] < 0.8 * document["report"]["params_dense"]
    assert str(shared) not in record.read_text()


@pytest.mark.shared
@pytest.mark.slow
def test_photos_agree(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = accuracy.main(
        [
            *("--model", "mobilenet_v2", "--weights", str(shared / "weights/imagenet/mobilenet_v2-b0353104.pth")),
            *("--data", f"photos:{shared / 'data' / 'photos'}", "--limit", "40", "--batch", "20"),
        ]
    )
    assert code == 0
    assert "agree on 40 of 40 images" in capsys.readouterr().out


@pytest.mark.shared
@pytest.mark.slow
def test_a_disagreement_is_exit_code_1(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite = fxprune.rewrite

    def other(masked: nn.Module, plan: fxprune.PrunePlan, example: torch.Tensor) -> torch.fx.GraphModule:
        compiled = rewrite(masked, plan, example)
        nn.init.normal_(compiled.get_submodule("linear").get_parameter("bias"), std=100)
        return compiled

    monkeypatch.setattr(fxprune, "rewrite", other)
    data = f"cifar10:{shared / 'data' / 'cifar10'}"
    assert accuracy.main(["--model", "resnet20", "--data", data, "--limit", "50"]) == 1
