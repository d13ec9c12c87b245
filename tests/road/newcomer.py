"""What a newcomer does with the package, in the environment into which a wheel was installed.

    python newcomer.py pages            follow every page of README and docs
    python newcomer.py commands         give every command of them
    python newcomer.py line COMMAND     give one

It runs in an empty folder and sees `tests`, for the harnesses, but not the source of fxprune.
"""

import os
import sys
import time
import warnings
from pathlib import Path

import docs_harness
import pytest
import torch
from datasets_harness import accept_small, write_batches, write_drawn, write_hundred, write_photo

import fxprune
from fxprune.cli import main

ROOT = Path(__file__).parents[2]
LARGE = {"resnet18", "resnet50", "resnet20", "resnet20_zeros_after", "resnet56", "cifar_vgg16", "mobilenet_v2"}
WEIGHTS = ("w.pth", "resnet20.th", "resnet20.pt", "resnet56.th")
STANDS_FOR = {
    **dict.fromkeys(LARGE, "docs_harness:small"),
    "cifar10:DIR": "cifar10:cifar",
    "cifar100:DIR": "cifar100:cifar",
    "caltech101:DIR": "caltech101:caltech?size=16",
    "benchmarks/results/latency-*.json": str(ROOT / "benchmarks" / "results" / "latency-resnet20-cpu.json"),
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


def arguments(line: str) -> list[str]:
    """A command of the pages, with what is small in place of what is large."""
    words = docs_harness.arguments_of(line.replace("--pretrained", "--weights w.pth"))
    command = words[0]
    words = [STANDS_FOR.get(word, word) for word in words]
    if "--recipes" in words or "--from" in words:
        return words
    words += SHORTER.get(command, [])
    if "--recipe" in words:  # the networks of the papers are large
        words += ["--dense-epochs", "1"]
        words.insert(1, "resnet20?classes=101")
    if "--calibration-images" in words and command == "train":
        words[words.index("--calibration-images") + 1] = "8"
    return words


def furnish() -> None:
    """Pictures, weights and data sets, as the pages take them for granted."""
    write_drawn(Path("photos"), 20)
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


def give(line: str) -> int:
    """Give one command; 0 if it does what it should."""
    began = time.perf_counter()
    try:
        code = main(arguments(line))
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    print(f"--- {time.perf_counter() - began:.1f} s, exit code {code}: {line}", flush=True)
    return code


def run(what: str, *rest: str) -> int:
    """Do one of the three; return how much of it failed."""
    torch.set_num_threads(1)
    if what == "line":
        return give(*rest)
    if what == "commands":
        failed = [line for line in docs_harness.commands() if give(line)]
        print("\n".join(["failed:", *failed]))
        return len(failed)
    warnings.simplefilter("ignore")
    for page in docs_harness.PAGES:
        began = time.perf_counter()
        docs_harness.follow(page, Path.cwd())
        print(f"--- {time.perf_counter() - began:.1f} s: {page.name}", flush=True)
    return 0


if __name__ == "__main__":
    assert ROOT not in Path(fxprune.__file__).parents, f"{fxprune.__file__} is the source, not the wheel"
    if sys.argv[1] != "pages" and not os.path.exists("photos"):
        furnish()
    with docs_harness.small_world(), pytest.MonkeyPatch.context() as patch:
        accept_small(patch)
        sys.exit(run(*sys.argv[1:]))
