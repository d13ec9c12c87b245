"""How small may it be? One network at several budgets: what each loses and how fast it is, and the smallest that loses
no more than is allowed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fxprune
from fxprune.comparison.evaluation import HELD_BACK, Evaluation, evaluate
from fxprune.comparison.extras import require
from fxprune.comparison.looks import look_of
from fxprune.comparison.rivals import Network, dense_network, folded
from fxprune.comparison.runtimes import RUNTIMES, prepare
from fxprune.environment import environment
from fxprune.inference.race import race
from fxprune.tables import Bar, Cell, Column, Table, Tabular

ROUNDS = 15
MIN_SECONDS = 0.02
"""Of a turn: short calls are repeated within it."""


@dataclass(frozen=True)
class Budget:
    """One network.

    Attributes:
        asked: the share of the MACs that was asked for; 1 of the dense network.
        macs_share, params_share: what it has of the dense network's.
        evaluation: how good it is.
        seconds, relative: shortest time of a call in each runtime, and that time relative to the dense network's in the
            same runtime.
    """

    asked: float
    macs_share: float
    params_share: float
    evaluation: Evaluation
    seconds: Mapping[str, float]
    relative: Mapping[str, float]


@dataclass(frozen=True, repr=False)
class Sweep(Tabular):
    """What was found. `str()` is a table, `to_dict()` fits JSON.

    Attributes:
        model: its name.
        budgets: the networks, the dense one first, then from the largest.
        allowed: points of accuracy (or of agreement, without labels) that may be lost.
        batch: pictures in a timed call.
        environment: where it was measured.
    """

    model: str
    budgets: tuple[Budget, ...]
    allowed: float
    batch: int
    environment: Mapping[str, Any]

    @property
    def best(self) -> Budget | None:
        """The smallest network that loses no more than is allowed; None if all lose more."""
        good = [budget for budget in self.budgets[1:] if (budget.evaluation.lost or 0.0) * 100 <= self.allowed]
        return min(good, key=lambda budget: budget.macs_share, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return it as dicts, lists, numbers and strings."""
        best = self.best
        return asdict(self) | {
            "budgets": [asdict(budget) for budget in self.budgets],
            "best": None if best is None else best.asked,
        }

    def brief(self) -> str:
        """The answer."""
        what = "accuracy" if self.budgets[0].evaluation.accuracy is not None else "agreement with the dense network"
        best = self.best
        if best is None:
            return f"{self.model}: every budget loses more than {self.allowed:g} points of {what}; ask for larger ones"
        times = ", ".join(
            f"{1 / relative:.2f}x the dense speed in {runtime}" for runtime, relative in best.relative.items()
        )
        return (
            f"{self.model}: at most {self.allowed:g} points of {what} lost with {best.macs_share:.0%} of the MACs "
            f"(--macs {best.asked:g}): {100 * (best.evaluation.lost or 0.0):.1f} lost, {times}"
        )

    def table(self) -> Table:
        """One line for each network."""
        runtimes = list(self.budgets[0].seconds)
        labelled = self.budgets[0].evaluation.accuracy is not None
        columns = (
            Column("asked", right=False),
            Column("MACs"),
            Column("params", goes=2),
            *((Column("accuracy"),) if labelled else ()),
            Column("agreement", goes=int(labelled)),
            *(column for name in runtimes for column in (Column(f"{name} ms"), Column("of dense"))),
        )
        rows: list[tuple[Cell, ...]] = []
        for budget in self.budgets:
            found = budget.evaluation
            rows.append(
                (
                    "dense" if budget is self.budgets[0] else f"{budget.asked:g}",
                    Bar(f"{budget.macs_share:.1%}", budget.macs_share),
                    f"{budget.params_share:.1%}",
                    *((f"{found.accuracy:.1%}",) if labelled and found.accuracy is not None else ()),
                    "" if found.agreement is None else f"{found.agreement.share:.1%}",
                    *(
                        cell
                        for name in runtimes
                        for cell in (
                            f"{1e3 * budget.seconds[name]:.2f}",
                            Bar(f"{budget.relative[name]:.2f}", budget.relative[name]),
                        )
                    ),
                )
            )
        looked_at = self.budgets[0].evaluation
        said = (
            f"on {looked_at.inputs} {looked_at.which}, of which one is {100 / looked_at.inputs:.1f} points; "
            f"shortest of {ROUNDS} times, batch {self.batch}"
        )
        return Table(columns, tuple(rows), (self.brief(), said))


@dataclass(frozen=True)
class SweepInputs:
    """Pictures as the network reads them, float32 `(N, ...)`.

    Attributes:
        calibration: to calibrate with.
        held_out: to look at the results with.
        labels: int64, of `held_out`; None if they are not known.
        source: where the labels come from.
    """

    calibration: Tensor
    held_out: Tensor
    labels: Tensor | None = None
    source: str = ""


def sweep(
    name: str,
    model: nn.Module,
    inputs: SweepInputs,
    budgets: Sequence[float],
    *,
    options: Mapping[str, Any],
    runtimes: Sequence[str] = ("eager",),
    allowed: float = 1.0,
    batch: int = 1,
    progress: bool = False,
) -> Sweep:
    """Compile a network for each budget, look at it and time it.

    Args:
        name: of the model, for people.
        model: the dense network, in evaluation mode; it is not changed.
        inputs: to calibrate with, and to look at the results with.
        budgets: shares of the MACs to keep.
        options: more arguments of `fxprune.compile`.
        runtimes: some of `RUNTIMES`.
        allowed: points of accuracy that may be lost.
        batch: pictures in a timed call.
        progress: show a bar on stderr.

    Raises:
        FxpruneError: the model cannot be pruned so.
    """
    example = inputs.held_out[:batch]
    whole = sum(p.numel() for p in model.parameters())
    dense = dense_network(model, example)
    networks, found = [dense], [_looked_at(model, None, inputs)]
    shares: list[tuple[float, float, float]] = [(1.0, 1.0, 1.0)]
    for asked in tqdm(sorted(budgets, reverse=True), desc="budgets", disable=not progress, leave=False):
        pruned = fxprune.compile(
            model, macs=asked, example_inputs=example, calibration=inputs.calibration, output="graph", **options
        ).eval()
        report = fxprune.report(pruned)
        share = 1.0 if not report.macs_dense or report.macs_pruned is None else report.macs_pruned / report.macs_dense
        networks.append(Network("fxprune", asked, report.macs_pruned, pruned, folded(pruned, example), pruned))
        found.append(_looked_at(pruned, model, inputs))
        shares.append((asked, share, sum(p.numel() for p in pruned.parameters()) / max(1, whole)))
    seconds = {runtime: _times(networks, runtime, example, progress) for runtime in runtimes}
    rows = [
        Budget(
            *shares[i],
            evaluation=found[i],
            seconds={runtime: times[i] for runtime, times in seconds.items()},
            relative={runtime: times[i] / times[0] for runtime, times in seconds.items()},
        )
        for i in range(len(networks))
    ]
    return Sweep(name, tuple(rows), allowed, batch, environment())


def _looked_at(network: nn.Module, dense: nn.Module | None, inputs: SweepInputs) -> Evaluation:
    return evaluate(network, inputs.held_out, inputs.labels, dense, source=inputs.source, which=HELD_BACK)


def _times(networks: Sequence[Network], runtime: str, example: Tensor, progress: bool) -> list[float]:
    """The shortest time of each network, all in one race."""
    layout = None if RUNTIMES[runtime].folds else "channels_last" if example.dim() == 4 else "contiguous"
    with torch.inference_mode():
        calls = {str(i): prepare(network, RUNTIMES[runtime], layout, example) for i, network in enumerate(networks)}
        timings = race(calls, rounds=ROUNDS, min_seconds=MIN_SECONDS, progress=runtime if progress else None)
    return [timings[str(i)].fastest for i in range(len(networks))]


def draw_sweep(found: Sweep, path: Path) -> None:
    """Draw what is kept against MACs, and against time in each runtime.

    Raises:
        ComparisonError: matplotlib is not installed.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    labelled = found.budgets[0].evaluation.accuracy is not None
    panels = ["MACs", *found.budgets[0].seconds]
    figure = Figure(figsize=(4.2 * len(panels), 3.8), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        xs = [budget.macs_share if panel == "MACs" else budget.relative[panel] for budget in found.budgets]
        ys = [100 * (_kept(budget, labelled)) for budget in found.budgets]
        axes.plot(xs, ys, **look_of("fxprune").mark)
        axes.axhline(ys[0] - found.allowed, color=look_of("dense").colour, linewidth=0.8, linestyle="--")
        axes.set_xlabel("share of the MACs" if panel == "MACs" else f"time in {panel}, of the dense network's")
        axes.grid(alpha=0.3)
        for budget, x, y in zip(found.budgets[1:], xs[1:], ys[1:], strict=True):
            axes.annotate(f"{budget.asked:g}", (x, y), textcoords="offset points", xytext=(5, -11), fontsize=8)
    figure.axes[0].set_ylabel("accuracy in %" if labelled else "agreement with the dense network in %")
    figure.suptitle(f"{found.model}; dashed: {found.allowed:g} points lost", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _kept(budget: Budget, labelled: bool) -> float:
    found = budget.evaluation
    if labelled:
        return found.accuracy or 0.0
    return 1.0 if found.agreement is None else found.agreement.share
