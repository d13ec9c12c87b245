"""What tests do to a training while it runs."""

from collections.abc import Callable
from typing import Any

import pytest

from fxprune.training.loop import Trainer


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
    """Do something just before a step, counted from 1."""
    step, count = Trainer._step, iter(range(1, 10**6))

    def watched(self: Trainer, *rest: Any) -> bool:
        if next(count) == number:
            act()
        return step(self, *rest)

    monkeypatch.setattr(Trainer, "_step", watched)
