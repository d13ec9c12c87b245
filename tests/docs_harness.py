"""README and docs followed page by page, on small networks and pictures in place of large ones.

`tests/test_docs.py` follows them in the source tree, `tests/road` in an environment into which a wheel was installed.
"""

import copy
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune

ROOT = Path(__file__).parents[1]
EVERY_PAGE = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```[a-z]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS_A_LIBRARY = {"yolo.md"}
"""Pages that `make test-wild` follows, with the library that they are about (tests/wild)."""
PAGES = [
    path for path in EVERY_PAGE if BLOCK.search(path.read_text(encoding="utf-8")) and path.name not in NEEDS_A_LIBRARY
]
SHORTER = {
    "recover=True": 'recover={"steps": 10}',
    "recover=60": 'recover={"steps": 10}',
    '"steps": 500': '"steps": 10',
    "steps=500": "steps=10",
    "progress=True": "progress=False",
    "latency=0.6": "latency=0.97",  # the convolutions of a small network take little of its time
}
"""What takes minutes, and what stands for it."""


class Small(nn.Module):
    """A residual network of 24 to 48 channels with a classifier."""

    default_cfg: ClassVar[dict[str, Any]] = {"input_size": (3, 10, 10)}

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


def small() -> nn.Module:
    """What stands for any network; the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small().eval()


class SmallWeights:
    """In place of torchvision's weights: nothing is downloaded, and pictures stay small."""

    DEFAULT: Any = None

    def transforms(self) -> Any:
        return lambda picture: torchvision.transforms.functional.resize(picture.float() / 255, [10, 10])


SmallWeights.DEFAULT = SmallWeights()


@contextmanager
def small_world() -> Iterator[None]:
    """Small networks and images of their size in place of ResNet-18 at 224 pixels; nothing is timed for long."""
    from fxprune.inference import acceleration, stopwatch

    randn = torch.randn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models, "resnet18", lambda **_: Small())
        patch.setattr(torchvision.models, "ResNet18_Weights", SmallWeights)
        patch.setattr(torch, "randn", lambda *size, **k: randn(*[10 if n == 224 else n for n in size], **k))
        for module in (acceleration, stopwatch):
            patch.setattr(module, "ROUNDS", 1)
        yield


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


def blocks(page: Path) -> list[str]:
    """The Python of a page, shortened."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    for long, short in SHORTER.items():
        found = [block.replace(long, short) for block in found]
    return found


def follow(page: Path, folder: Path) -> None:
    """Run a page from top to bottom, each block after those before it; `folder` is the current one."""
    given = names()
    torch.save(given["model"].state_dict(), folder / "epoch_10.pt")
    for number, block in enumerate(blocks(page)):
        exec(compile(block, f"{page.name}, block {number}", "exec"), given)


def commands() -> list[str]:
    """Lines of README and docs that call fxprune, continued ones as one, without their comments."""
    found = []
    for page in EVERY_PAGE:
        for block in FENCE.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("fxprune ") and "..." not in line:
                    found.append(line)
    return found


def arguments_of(line: str) -> list[str]:
    """What a command hands to `fxprune`."""
    return shlex.split(line, comments=True)[1:]
