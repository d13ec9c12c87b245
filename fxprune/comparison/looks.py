"""How pictures look: a colour and a mark for each method, the same in all of them, and labels that do not overlap."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Okabe & Ito, "Color Universal Design", 2008: colours that readers with any kind of colour vision tell apart.
BLACK, VERMILLION, BLUE, GREEN, ORANGE, SKY, PURPLE, GREY = (
    "#000000", "#D55E00", "#0072B2", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#7F7F7F",
)  # fmt: skip


@dataclass(frozen=True)
class Look:
    """How a method is drawn. One family has one hue; what is not refitted is hollow.

    Attributes:
        colour: of marks, lines and labels.
        marker: a mark of matplotlib.
        hollow: only the outline of the mark.
        strong: larger, and its label bold.
    """

    colour: str
    marker: str
    hollow: bool = False
    strong: bool = False

    @property
    def mark(self) -> dict[str, Any]:
        """Keywords of matplotlib for its points."""
        face = "white" if self.hollow else self.colour
        size = 8.0 if self.strong else 5.5
        return {"color": self.colour, "marker": self.marker, "markerfacecolor": face, "markersize": size}

    @property
    def text(self) -> dict[str, Any]:
        """Keywords of matplotlib for its label."""
        return {"color": self.colour, "fontweight": "bold" if self.strong else "normal"}


LOOKS = {
    "dense": Look(BLACK, "*", strong=True),
    "auto": Look(VERMILLION, "D", strong=True),
    "fxprune": Look(VERMILLION, "o", strong=True),
    "fxprune-8": Look(VERMILLION, "s", strong=True),
    "combined": Look(VERMILLION, "^", strong=True),
    "branches": Look(VERMILLION, "v", strong=True),
    "filters": Look(ORANGE, "o", hollow=True),
    "fxprune filters": Look(ORANGE, "o"),
    "filters-refit": Look(ORANGE, "o"),
    "filters-error": Look(ORANGE, "D"),
    "pairs": Look(ORANGE, "s"),
    "pairs-pure": Look(ORANGE, "^"),
    "fxprune-8-recovered": Look(PURPLE, "s", strong=True),
    "filters-error-recovered": Look(PURPLE, "o", strong=True),
    "branches-recovered": Look(PURPLE, "v", strong=True),
    "auto-recovered": Look(PURPLE, "D", strong=True),
    "tmi": Look(GREEN, "o", hollow=True),
    "tmi-refit": Look(GREEN, "o"),
    "srgkp": Look(SKY, "s", hollow=True),
    "srgkp-refit": Look(SKY, "s"),
    "tp-magnitude": Look(BLUE, "P"),
    "tp-magnitude-recovered": Look(BLUE, "D"),
    "tp-fpgm": Look(BLUE, "X"),
    "tp-taylor": Look(BLUE, "v"),
    "torch-pruning": Look(BLUE, "P"),
}
"""By name of the method, or of the network in a record of latencies."""
OTHERS = (Look(GREY, "D"), Look(GREY, "d"))


def look_of(name: str) -> Look:
    """The look of a method; others take turns."""
    return LOOKS.get(name) or OTHERS[sum(map(ord, name)) % len(OTHERS)]


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move places apart until neighbours are `gap` apart, as little as possible, in their order, within bounds.

    The least sum of squared moves is an isotonic regression: with `gap` times its rank taken off, each place may not be
    below the one before (Best & Chakravarti, "Active set algorithms for isotonic regression", 1990).

    >>> spread([1.0, 1.0, 5.0], 1.0, 0.0, 10.0)
    [0.5, 1.5, 5.0]
    """
    from sklearn.isotonic import IsotonicRegression  # here, for it takes a while to import

    if not places:
        return []
    gap = min(gap, (high - low) / max(1, len(places) - 1))
    order = np.argsort(places, kind="stable")
    ranks = gap * np.arange(len(places))
    fitted = IsotonicRegression(y_min=low, y_max=high - ranks[-1]).fit_transform(ranks, np.array(places)[order] - ranks)
    moved = np.empty(len(places))
    moved[order] = fitted + ranks
    return [float(place) for place in moved]


def label_beside(axes: Any, labels: Sequence[tuple[float, float, str, Look]], fontsize: float = 8) -> None:
    """Write labels in a column at the right of the axes, each joined to its point by a thin line.

    Call it when the limits of the axes are as they will stay.

    Args:
        axes: of matplotlib; the figure needs room at its right.
        labels: x and y of a point, its label, and how it looks.
    """
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height / axes.figure.dpi * 72  # in points
    gap = 1.25 * fontsize / height * (high - low)
    column = axes.get_xlim()[1]
    for (x, y, text, look), place in zip(labels, spread([y for _, y, _, _ in labels], gap, low, high), strict=True):
        axes.annotate(
            text, (x, y), (column, place), xycoords="data", textcoords="data", va="center", fontsize=fontsize,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": look.colour, "lw": 0.5, "alpha": 0.5, "relpos": (0, 0.5)},
            **look.text,
        )  # fmt: skip


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of costs and gains those that no other beats in both, cheapest first.

    >>> pareto([(1.0, 5.0), (2.0, 4.0), (3.0, 6.0)])
    [(1.0, 5.0), (3.0, 6.0)]
    """
    front: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or gain > front[-1][1]:
            front.append((cost, gain))
    return front
