"""What an experiment with lottery tickets found: means over seeds, and paired differences with their intervals."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import NamedTuple

from fxprune.comparison.points import Mean

DENSE, RANDOM = "dense", "random"
"""Tickets that no criterion chose: all weights, and as many as the others by lot."""
TRAINED = "trained"
"""How the dense network was trained first."""
TRAININGS = {
    "rewound": "early weights, the rest of the training again",
    "rate-rewound": "trained weights, the rest of the training again",
    "fine-tuned": "trained weights, as many epochs at the last learning rate",
}
"""What may be done with a ticket; each takes as many epochs."""


class Key(NamedTuple):
    """A network of the experiment.

    Attributes:
        seed: of first weights, images and their order; it pairs runs.
        share: of the MACs that was asked for; 1 for the dense network.
        ticket: `DENSE`, `RANDOM`, or criterion and variety as `ticket_name` puts them.
        training: one of `TRAININGS`, or `TRAINED`.
    """

    seed: int
    share: float
    ticket: str
    training: str


Accuracies = Mapping[Key, float]
"""Test accuracy after the last epoch, in [0, 1]."""
Arm = tuple[str, str]
"""A ticket and a training."""


def ticket_name(criterion: str, variety: str) -> str:
    """Of a criterion alone (variety `none`), or with variety."""
    return criterion if variety == "none" else f"{criterion}+{variety}"


@dataclass(frozen=True)
class Difference:
    """One arm less another, over the seeds that both have.

    Attributes:
        what: what is compared.
        share: of the MACs; None for the mean over all shares.
        seeds: how many.
        difference: in accuracy; positive where the first is better.
    """

    what: str
    share: float | None
    seeds: int
    difference: Mean

    @property
    def clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        half = self.difference.half_width
        return half is not None and abs(self.difference.value) > half


def means(accuracies: Accuracies) -> dict[tuple[float, str, str], Mean]:
    """Mean accuracy over the seeds of each share, ticket and training, in the order of the runs."""
    groups: dict[tuple[float, str, str], list[float]] = {}
    for key, accuracy in accuracies.items():
        groups.setdefault((key.share, key.ticket, key.training), []).append(accuracy)
    return {group: Mean.of(values) for group, values in sorted(groups.items(), key=lambda item: -item[0][0])}


def differences(accuracies: Accuracies, criteria: Sequence[str], varieties: Sequence[str]) -> list[Difference]:
    """What the experiment is about: variety against the criterion alone, tickets against random ones and against
    plain fine-tuning; at each share, and over criteria and shares.

    The mean over several comparisons is taken within each seed, so its interval is over seeds too.
    """
    tickets = [ticket_name(criterion, variety) for criterion in criteria for variety in varieties]
    shares = sorted({key.share for key in accuracies if key.share < 1}, reverse=True)
    found = []
    for what, pairs in _questions(criteria, varieties, tickets).items():
        rows = [(f"{_words(a)} - {_words(b)}", share, [(share, a, b)]) for share in shares for a, b in pairs]
        everything = [(share, a, b) for share in shares for a, b in pairs]
        for name, share, cells in [*rows, (f"{what}, mean of {len(everything)}", None, everything)]:
            paired = _paired(accuracies, cells)
            if paired:
                found.append(Difference(name, share, len(paired), Mean.of(paired)))
    return found


def _questions(
    criteria: Sequence[str], varieties: Sequence[str], tickets: Sequence[str]
) -> dict[str, list[tuple[Arm, Arm]]]:
    questions: dict[str, list[tuple[Arm, Arm]]] = {}
    if "none" in varieties:
        for variety in varieties:
            if variety != "none":
                for training in TRAININGS:
                    questions[f"{variety} - criterion alone, {training}"] = [
                        ((ticket_name(criterion, variety), training), (criterion, training)) for criterion in criteria
                    ]
    random: Arm = (RANDOM, "rewound")
    questions["ticket - random, rewound"] = [((ticket, "rewound"), random) for ticket in tickets]
    for other in ("fine-tuned", "rate-rewound"):
        questions[f"rewound - {other}"] = [((ticket, "rewound"), (ticket, other)) for ticket in tickets]
    return questions


def _paired(accuracies: Accuracies, cells: Collection[tuple[float, Arm, Arm]]) -> list[float]:
    """The mean of the differences of `cells` in each seed that has them all."""
    paired = []
    for seed in dict.fromkeys(key.seed for key in accuracies):
        keys = [(Key(seed, share, *a), Key(seed, share, *b)) for share, a, b in cells]
        if keys and all(key in accuracies for pair in keys for key in pair):
            paired.append(mean(accuracies[a] - accuracies[b] for a, b in keys))
    return paired


def _words(arm: Arm) -> str:
    return " ".join(arm)


def table(accuracies: Accuracies, criteria: Sequence[str], varieties: Sequence[str]) -> str:
    """Two tables in Markdown: means of accuracy in per cent, and differences in percentage points."""
    columns = (TRAINED, *TRAININGS)
    known = means(accuracies)
    lines = [f"| MACs | ticket | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for share, ticket in dict.fromkeys((share, ticket) for share, ticket, _ in known):
        cells = [known.get((share, ticket, training)) for training in columns]
        lines.append(f"| {share:g} | {ticket} | {' | '.join('' if c is None else _percent(c) for c in cells)} |")
    lines += ["", "| difference | MACs | seeds | points | interval leaves 0 out |", "|---|---|---|---|---|"]
    for row in differences(accuracies, criteria, varieties):
        share_words = "all" if row.share is None else f"{row.share:g}"
        points, clear = _percent(row.difference, "+"), "yes" if row.clear else ""
        lines.append(f"| {row.what} | {share_words} | {row.seeds} | {points} | {clear} |")
    return "\n".join(lines) + "\n"


def _percent(value: Mean, sign: str = "") -> str:
    half = "" if value.half_width is None else f" ± {100 * value.half_width:.2f}"
    return f"{100 * value.value:{sign}.2f}{half}"
