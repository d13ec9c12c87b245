"""What a subcommand shows: one result on stdout, bars on stderr."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import fxprune

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What `add_to` of a subcommand adds it to."""


def warn(text: str) -> None:
    """Say on stderr what the user should know before the work."""
    print(f"fxprune: warning: {text}", file=sys.stderr)


def shows_progress(options: argparse.Namespace) -> bool:
    """Whether there is somebody to look at bars."""
    return sys.stderr.isatty() and not options.quiet


@contextmanager
def steps(count: int, options: argparse.Namespace) -> Iterator[Callable[[str], None]]:
    """Yield a function that names the step that begins; a bar on stderr counts the steps that are over."""
    from tqdm import tqdm

    layout = "{desc:<12}{bar}{n_fmt}/{total_fmt} {elapsed}"
    with tqdm(total=count, disable=not shows_progress(options), bar_format=layout) as bar:
        begun = False

        def step(label: str) -> None:
            nonlocal begun
            bar.update(int(begun))
            bar.set_description_str(label)
            begun = True

        yield step
        bar.update(int(begun))


def show(options: argparse.Namespace, document: dict[str, Any], text: str) -> int:
    """Print the result, as text or as JSON; return the exit code of success."""
    print(json.dumps(document, indent=2) if options.json else text)
    return 0


def verdict(check: fxprune.Verification | None) -> str:
    """A verification, or that there was none, in one line."""
    if check is None:
        return "not verified (--no-verify)"
    return f"verified: compiled equals masked; largest difference {check.max_abs:.1e} ({', '.join(check.modes)} mode)"
