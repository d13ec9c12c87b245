"""What stands for what README, docs and help take for granted: small networks, drawn pictures, data sets."""

import re
from collections.abc import Sequence
from pathlib import Path

import docs_harness
import numpy as np
import torch
from datasets_harness import write_batches, write_drawn, write_hundred, write_photo
from docs_harness import ROOT

from fxprune.cli import program

LARGE = {
    "mynets:small", "densenet121", "timm:resnest14d", "resnet18", "resnet50", "resnet20", "resnet20_zeros_after",
    "resnet56", "cifar_vgg16", "mobilenet_v2",
}  # fmt: skip
WEIGHTS = (
    "w.pth", "resnet18.pth", "resnet50.pth", "resnest14d.pth", "small.pt", "last.pt", "epoch1.pt", "epoch2.pt",
    "resnet20.th", "resnet20.pt", "resnet56.th",
)  # fmt: skip
STANDS_FOR = {
    **dict.fromkeys(LARGE, "docs_harness:small"),
    "cifar10:DIR": "cifar10:cifar",
    "cifar100:DIR": "cifar100:cifar",
    "caltech101:DIR": "caltech101:caltech?size=16",
    "benchmarks/results/latency-*.json": str(ROOT / "benchmarks" / "results" / "latency-resnet20-cpu.json"),
    "folder:DIR": "folder:classes",
    "r50.json": "r18.json",
    "cuda": "cpu",
}
SHORTER = {
    "bench": ["--rounds", "1", "--batch", "2"],
    "sweep": ["--macs", "0.7"],
    "train": ["--epochs", "1", "--validation", "10"],
    "compare": [
        "--epochs", "1", "--validation", "0", "--train-images", "8", "--calibration-images", "8", "--seeds", "0",
        "--methods", "dense,filters-refit", "--shares", "0.57",
    ],
}  # fmt: skip
"""Appended to a command: what comes later counts."""
QUICKER = {"--recover": "1", "--latency": "0.97"}
"""In place of what an option is given: the convolutions of a small network take little of its time."""


def arguments(line: str) -> list[str]:
    """A command of the pages, with what is small in place of what is large."""
    words = docs_harness.arguments_of(line.replace("--pretrained", "--weights w.pth"))
    command = words[0]
    words = [STANDS_FOR.get(word, word) for word in words]
    for option, value in QUICKER.items():
        if option in words:
            words[words.index(option) + 1] = value
    if "int8" in words and "--latency" in words:  # layers of a small network are no faster pruned than whole
        words[words.index("--latency") + 1] = "1"
    if "--recipes" in words or "--from" in words:
        return words
    words += SHORTER.get(command, [])
    if "--recipe" in words:  # the networks of the papers are large
        words += ["--dense-epochs", "1"]
        words.insert(1, "resnet20?classes=101")
    if "--calibration-images" in words and command == "train":
        words[words.index("--calibration-images") + 1] = "8"
    return words


HELP = (program.EPILOG, *(command.EXAMPLES for command in program.COMMANDS if hasattr(command, "EXAMPLES")))


def help_commands(texts: Sequence[str] = HELP) -> list[str]:
    """The examples of every `--help`, continued ones as one; what is no whole command, and what needs CUDA, is left."""
    lines = [line.strip() for text in texts for line in re.sub(r"\\\n\s+", " ", text).splitlines()]
    commands = [re.split(r"\s{3,}", line)[0] for line in lines if line.startswith("fxprune ")]
    return [command for command in commands if "..." not in command and "cuda" not in command]


def furnish() -> None:
    """Pictures, weights and data sets, as pages and help take them for granted."""
    write_drawn(Path("photos"), 20)
    images = torch.randn(16, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    torch.save(images, "images.pt")
    np.save("images.npy", images.numpy())
    pictures = sorted(path for path in Path("photos").rglob("*") if path.is_file())
    Path("labels.csv").write_text("".join(f"{path.name},{i % 10}\n" for i, path in enumerate(pictures)))
    for part, count in (("train", 8), ("val", 4)):
        for label, kind in enumerate(("ant", "bee")):
            for number in range(count):
                write_photo(Path("classes", part, kind, f"{number}.jpg"), 40 * label)
    state = docs_harness.small().state_dict()
    for name in WEIGHTS:
        torch.save(state, name)
    Path("cifar").mkdir()
    write_batches(Path("cifar"))
    write_hundred(Path("cifar"))
    for label, kind in enumerate(("BACKGROUND_Google", "ant", "bee", "cat")):
        for number in range(1, 9):
            place = Path("caltech", "caltech101", "101_ObjectCategories", kind)
            write_photo(place / f"image_{number:04d}.jpg", 40 * label)
