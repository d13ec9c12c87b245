"""What a long run consists of, said before it begins, and one bar for all of it."""

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from tqdm import tqdm

from fxprune.durations import in_words

logger = logging.getLogger("fxprune")

LONG = 30.0
"""Seconds from which on a run is announced where no bar is asked for."""


@dataclass
class Run:
    """The stages of a run, and how far it has come.

    Attributes:
        seconds: about how long each stage takes, in their order.
        progress: whether to show that, and a bar, on stderr.
    """

    seconds: Mapping[str, float]
    progress: bool
    _stage: str = field(default="", init=False)
    _passes: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        """Say what will come."""
        total = sum(self.seconds.values())
        text = f"about {in_words(total)}"
        if len(self.seconds) > 1:
            text += ": " + ", ".join(f"{stage} {in_words(time)}" for stage, time in self.seconds.items())
        if self.progress:
            tqdm.write(text, file=sys.stderr)
        elif total >= LONG:
            logger.warning("fxprune: %s", text)  # seen where nobody set up logging
        layout = "{desc:<16}{percentage:3.0f}%|{bar}| {elapsed}"
        self._bar = tqdm(total=max(total, 1e-9), bar_format=layout, disable=not self.progress)

    def begin(self, stage: str, passes: int = 1) -> None:
        """A stage begins, in which the networks pass over the data so many times; those before it are over. One that
        was not foreseen takes no room in the bar.
        """
        self._stage, self._passes = stage, passes
        self._bar.set_description_str(stage)
        self._reach(self._start(stage))

    def advance(self, share: float) -> None:
        """A share of one pass over the data was made."""
        seconds = self.seconds.get(self._stage, 0.0)
        end = self._start(self._stage) + seconds
        self._reach(min(end, self._bar.n + share * seconds / self._passes))

    def close(self) -> None:
        """The run is over, or was left."""
        self._bar.close()

    def finish(self) -> None:
        """All stages are over."""
        self._reach(sum(self.seconds.values()))
        self.close()

    def _start(self, stage: str) -> float:
        """When a stage begins."""
        names = list(self.seconds)
        before = names[: names.index(stage)] if stage in names else []
        return sum(self.seconds[name] for name in before)

    def _reach(self, seconds: float) -> None:
        self._bar.update(max(0.0, seconds - self._bar.n))
