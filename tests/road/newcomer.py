"""What a newcomer does with the package, in the environment into which a wheel was installed.

    python newcomer.py pages            follow every page of README and docs
    python newcomer.py commands         give every command of them
    python newcomer.py help             give every example of every --help
    python newcomer.py line COMMAND     give one

It runs in an empty folder and sees `tests`, for the harnesses, but not the source of fxprune.
"""

import os
import shutil
import sys
import time
import warnings
from pathlib import Path

import docs_harness
import pytest
import torch
from datasets_harness import accept_small
from newcomer_harness import arguments, furnish, help_commands

import fxprune
from fxprune.cli import main

ROOT = Path(__file__).parents[2]


def give(line: str) -> int:
    """Give one command; 0 if it does what it should."""
    began = time.perf_counter()
    given = arguments(line)
    if given[0] in ("train", "compare") and "--output" in given and "--resume" not in given:
        shutil.rmtree(given[given.index("--output") + 1], ignore_errors=True)  # pages share names of folders
    try:
        code = main(given)
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    print(f"--- {time.perf_counter() - began:.1f} s, exit code {code}: {line}", flush=True)
    return code


def run(what: str, *rest: str) -> int:
    """Do one of these; return how much of it failed."""
    torch.set_num_threads(1)
    if what == "line":
        return give(*rest)
    if what in ("commands", "help"):
        lines = docs_harness.commands() if what == "commands" else help_commands()
        failed = [line for line in lines if give(line)]
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
