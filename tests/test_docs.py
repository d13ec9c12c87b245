"""Every Python block of README and docs runs, page by page, on a small network in place of a large one."""

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune.cli import program
from fxprune.inference import acceleration, stopwatch

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS_A_LIBRARY = {"yolo.md"}
"""Pages that `make test-wild` follows, with the library that they are about (tests/wild)."""
PAGES = [
    path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if BLOCK.search(path.read_text(encoding="utf-8")) and path.name not in NEEDS_A_LIBRARY
]
SHORTER = {
    "recover=True": 'recover={"steps": 10}',
    "recover=60": 'recover={"steps": 10}',
    '"steps": 500': '"steps": 10',
    "steps=500": "steps=10",
    "progress=True": "progress=False",
    "latency=0.6": "latency=0.97",
}
"""What takes minutes, or is out of reach for a network whose convolutions take little of its time, and what stands for
it."""


class Small(nn.Module):
    """A residual network of 24 to 48 channels with a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = nn.Sequential(
            nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1)
        )
        self.layer4 = nn.Sequential(
            nn.Conv2d(24, 48, 3, 2, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 48, 3, padding=1)
        )
        self.fc = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        y: torch.Tensor = self.fc(self.layer4(x + self.layer1(x)).mean((2, 3)))
        return y


def names() -> dict[str, Any]:
    """What pages take as given."""
    torch.manual_seed(0)
    model, images = Small().eval(), torch.randn(32, 3, 10, 10)
    plan = fxprune.make_plan(model, 0.5, example_inputs=images[:2])
    loader = DataLoader(TensorDataset(images, torch.arange(32) % 10), batch_size=16)
    return {
        "torch": torch, "torchvision": torchvision, "fxprune": fxprune, "copy": copy, "model": model, "x": images[:2],
        "images": images, "plan": plan, "loader": loader, "epochs": 1,
        "pictures": [torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8) for _ in range(32)],
    }  # fmt: skip


class SmallWeights:
    """In place of torchvision's weights: nothing is downloaded, and pictures stay small."""

    DEFAULT: Any = None

    def transforms(self) -> Any:
        return lambda picture: torchvision.transforms.functional.resize(picture.float() / 255, [10, 10])


SmallWeights.DEFAULT = SmallWeights()


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small networks and images of their size in place of ResNet-18 at 224 pixels; nothing is timed for long."""
    randn = torch.randn
    monkeypatch.setattr(torchvision.models, "resnet18", lambda **_: Small())
    monkeypatch.setattr(torchvision.models, "ResNet18_Weights", SmallWeights)
    monkeypatch.setattr(torch, "randn", lambda *size, **k: randn(*[10 if n == 224 else n for n in size], **k))
    for module in (acceleration, stopwatch):
        monkeypatch.setattr(module, "ROUNDS", 1)
    monkeypatch.chdir(tmp_path)


def blocks(page: Path) -> list[str]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    for long, short in SHORTER.items():
        found = [block.replace(long, short) for block in found]
    return found


@pytest.mark.usefixtures("small_world")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_runs(page: Path, tmp_path: Path) -> None:
    """From top to bottom, each block after those before it."""
    given = names()
    torch.save(given["model"].state_dict(), tmp_path / "epoch_10.pt")
    for number, block in enumerate(blocks(page)):
        exec(compile(block, f"{page.name}, block {number}", "exec"), given)


FENCE = re.compile(r"^```[a-z]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Lines of README and docs that call fxprune, continued ones as one, without their comments."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for block in FENCE.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("fxprune ") and "..." not in line:
                    found.append(line)
    return found


@pytest.mark.parametrize("line", commands())
def test_the_command_line_takes_every_command(line: str) -> None:
    program.read(shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize("line", ["fxprune compile", "fxprune bench net --ratios 0.5", "fxprune fly net"])
def test_control_it_does_not_take_others(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.read(shlex.split(line)[1:])
    assert "usage:" in capsys.readouterr().err


def test_every_page_with_code_is_here() -> None:
    assert {"README.md", "ten-minutes.md", "planning.md", "training.md"} <= {page.name for page in PAGES}
    assert len(PAGES) >= 10


@pytest.mark.usefixtures("small_world")
def test_control_a_wrong_block_fails(tmp_path: Path) -> None:
    page = tmp_path / "wrong.md"
    page.write_text("```python\npruned = fxprune.compile(model, ratios=0.5)\n```\n")
    with pytest.raises(TypeError):
        test_a_page_runs(page, tmp_path)


def test_pages_that_need_a_library_are_followed_elsewhere() -> None:
    for name in NEEDS_A_LIBRARY:
        followed = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "wild").glob("*.py"))
        assert (ROOT / "docs" / name).is_file()
        assert name.removesuffix(".md") in followed.lower()
