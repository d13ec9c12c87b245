"""Are saved MACs saved time? The latency of a dense network against pruned ones, in one runtime or several.

Of each batch all networks, in all runtimes and layouts, take turns in one race (`fxprune.inference.race`), so that what
else the machine does hits all alike. Times are medians over the rounds with the distance of their quartiles; ratios are
medians of ratios within a round, to the dense network in the same runtime, and to the best dense one of all runtimes
in the race, which is what a user would run instead. Every network has BatchNorm folded and runs in both layouts, unless
one is asked for, and the faster counts: of the dense opponent too. Before it is timed its output must equal that of its
oracle, for fxprune the masked model. Weights may be random: they take no other time.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fxprune.comparison.layers import LayerRow, layer_table, measure_layers
from fxprune.comparison.limits import difference, limit_of
from fxprune.comparison.requests import LatencyRequest
from fxprune.comparison.rivals import (
    Network,
    dense_network,
    describe,
    filters_network,
    fxprune_network,
    saved_network,
    settle,
    torch_pruning_network,
)
from fxprune.comparison.runtimes import LAYOUTS, RUNTIMES, Call, prepare
from fxprune.comparison.worth import NOISE
from fxprune.environment import environment
from fxprune.inference.race import Timing, race
from fxprune.models import default_input_size, load_model
from fxprune.planning.patterns import left_out

WARMUP = 3
"""Calls before the first that counts; TorchScript compiles during the first two."""
MIN_SECONDS = 0.02
"""A turn lasts at least about this long: short calls are repeated, for a clock and a scheduler need some time."""

WHAT = "ms: median of a call; to dense, to best: median of the ratios within a round, not the ratio of the medians"
"""What the columns of the table are."""
HELD = "openvino is held to float32; on this processor it computes in bfloat16 by default: --dtype bfloat16 races that"


@dataclass(frozen=True)
class Row:
    """One network in one runtime and layout, at one batch.

    Attributes:
        network: see `Network.name`.
        ratio: what fxprune was asked to prune; of filters, that of the network whose MACs they match.
        macs_share: MACs relative to the dense network.
        runtime: one of `RUNTIMES`.
        layout: one of `LAYOUTS`, or None if the runtime chose.
        batch: images at a time.
        seconds, spread: median of one call, and the distance between its quartiles.
        relative: to the dense network in this runtime, in its faster layout: median of the ratios within a round.
        relative_to_best: to the dense network in the runtime that is fastest for it.
        difference, limit: from its oracle, as a share of the largest output, and how large it may be.
        best: it is this network's faster layout.
        error: why there is no time.
    """

    network: str
    ratio: float | None
    macs_share: float | None
    runtime: str
    layout: str | None
    batch: int
    seconds: float | None = None
    spread: float | None = None
    relative: float | None = None
    relative_to_best: float | None = None
    difference: float | None = None
    limit: float | None = None
    best: bool = False
    error: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether it ran and computed something else."""
        return self.difference is not None and bool(self.error)


def make_networks(request: LatencyRequest, model: nn.Module, inputs: Tensor) -> Iterator[Network]:
    """Yield the dense network, those of files, and for each ratio that of fxprune and its rivals of equal MACs.

    Args:
        request: what to measure.
        model: in evaluation mode, float32, on the CPU. With random weights its BatchNorm statistics are set here.
        inputs: two images or more, `(N, C, H, W)`.

    Raises:
        FxpruneError: fxprune cannot compile the model, or a file does not fit it.
    """
    random_weights = request.weights is None
    options = {
        "form": request.form,
        "groups": request.groups,
        "target": request.device,
        "seed": request.seed,
        "ignore": left_out(model, request.only),
    }
    if random_weights:
        settle(model, inputs)
    yield dense_network(model, inputs)
    for path in request.saved:
        yield saved_network(model, inputs, path)
    for ratio in request.ratio:
        network = fxprune_network(model, inputs, ratio, options, random_weights)
        yield network
        assert network.macs is not None
        if "filters" in request.against:
            yield filters_network(model, inputs, ratio, network.macs, options, random_weights)
        if "torch-pruning" in request.against:
            yield torch_pruning_network(model, inputs, ratio, network.macs, random_weights)


def measure(
    networks: Sequence[Network],
    runtimes: Sequence[str],
    layouts: Sequence[str],
    inputs: Tensor,
    rounds: int,
    progress: bool = False,
) -> list[Row]:
    """Race all `networks`, the first of which is the dense one, in all `runtimes` and `layouts`.

    What cannot be run, or computes something else than its oracle, is a row with an error and without a time.

    Args:
        networks: see `make_networks`.
        runtimes: some of `RUNTIMES`.
        layouts: some of `LAYOUTS`.
        inputs: `(N, C, H, W)`, on the device and in the type to measure in.
        rounds: how many turns each takes.
        progress: show bars on stderr.
    """
    expected = _oracles(networks, inputs)
    rows: list[Row] = []
    ready: dict[str, Call] = {}
    entries = [
        (network, runtime, layout)
        for runtime in runtimes
        for network in networks
        for layout in ((None,) if RUNTIMES[runtime].folds or network.error else layouts)
    ]
    for network, runtime, layout in tqdm(entries, desc="preparing", leave=False, disable=not progress):
        share = network.macs / networks[0].macs if network.macs and networks[0].macs else None
        row = Row(network.name, network.ratio, share, runtime, layout, len(inputs), error=network.error)
        if not row.error:
            try:
                call = prepare(network, RUNTIMES[runtime], layout, inputs)
                with torch.inference_mode():
                    row = _checked(row, call(), *expected[id(network)])
            except Exception as error:  # one runtime refuses, the others are worth having all the same
                row = replace(row, error=describe(error))
        if not row.error:
            ready[str(len(rows))] = call
        rows.append(row)
    label = f"batch {len(inputs)}" if progress else None
    with torch.inference_mode():
        timings = race(
            ready, rounds=rounds, warmup=WARMUP, device=inputs.device, min_seconds=MIN_SECONDS, progress=label
        )
    return _with_times(rows, {int(name): timing for name, timing in timings.items()})


@torch.inference_mode()
def _oracles(networks: Sequence[Network], inputs: Tensor) -> dict[int, tuple[Any, float]]:
    """What each network should give, in float32, and how far it may be off, by its id."""
    outputs = {}
    with tuned_cudnn(False):  # to time algorithms would take longer than two calls do
        for network in networks:
            if network.oracle is not None:
                oracle = network.oracle.to(inputs.device)
                expected = oracle(inputs.float())
                outputs[id(network)] = expected, limit_of(oracle, expected, inputs)
                oracle.to("cpu")
    return outputs


def _checked(row: Row, found: Any, expected: Any, limit: float) -> Row:
    gap = difference(found, expected)
    error = "" if gap <= limit else f"wrong: differs by {gap:.1e} of the largest output (limit {limit:.0e})"
    return replace(row, difference=gap, limit=limit, error=error)


def _with_times(rows: Sequence[Row], timings: Mapping[int, Timing]) -> list[Row]:
    """Fill in times and ratios; `timings` by the number of the row."""
    best: dict[tuple[str, str, float | None], int] = {}
    for number in sorted(timings, key=lambda number: timings[number].median):
        row = rows[number]
        best.setdefault((row.runtime, row.network, row.ratio), number)
    dense_ones = [number for number in timings if rows[number].network == "dense"]
    best_dense = min(dense_ones, key=lambda number: timings[number].median, default=None)
    complete = list(rows)
    for number, timing in timings.items():
        row = rows[number]
        dense = best.get((row.runtime, "dense", None))
        complete[number] = replace(
            row,
            seconds=timing.median,
            spread=timing.spread,
            relative=None if dense is None else timing.relative_to(timings[dense]),
            relative_to_best=None if best_dense is None else timing.relative_to(timings[best_dense]),
            best=best[row.runtime, row.network, row.ratio] == number,
        )
    return complete


def table(rows: Sequence[Row]) -> str:
    """Each network in its faster layout as text, one a line, and what failed."""
    wide = max([15, *(len(row.network) for row in rows)]) + 2
    lines = [
        f"{'batch':>5}  {'runtime':<21}{'network':<{wide}}{'ratio':>6}  {'layout':<14}{'ms':>10}{'spread':>9}"
        f"{'to dense':>10}{'to best':>9}{'MACs':>7}{'difference':>12}"
    ]
    for row in rows:
        if not row.best and not row.error:
            continue
        ratio = "-" if row.ratio is None else f"{row.ratio:g}"
        share = "-" if row.macs_share is None else f"{row.macs_share:.3f}"
        who = f"{row.batch:>5}  {row.runtime:<21}{row.network:<{wide}}{ratio:>6}  {row.layout or 'own':<14}"
        if row.seconds is None or row.spread is None:
            lines.append(f"{who}{row.error}")
            continue
        relative, to_best = ("-" if value is None else f"{value:.3f}" for value in (row.relative, row.relative_to_best))
        lines.append(
            f"{who}{row.seconds * 1e3:>10.3f}{row.spread * 1e3:>9.3f}{relative:>10}{to_best:>9}{share:>7}"
            f"{row.difference:>12.1e}"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class Latency:
    """What was measured. `str()` is the tables, `to_dict()` the record.

    Attributes:
        environment: where and when.
        settings: what was asked for.
        rows: of whole networks.
        layers: of single convolutions.
    """

    environment: Mapping[str, Any]
    settings: Mapping[str, Any]
    rows: Sequence[Row] = ()
    layers: Sequence[LayerRow] = ()

    @property
    def is_wrong(self) -> bool:
        """Whether a network computed something else than it must."""
        return any(row.is_wrong for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return it as dicts, lists, numbers and strings."""
        return {
            "environment": dict(self.environment),
            "settings": dict(self.settings),
            "rows": [asdict(row) for row in self.rows],
            "layers": [asdict(row) for row in self.layers],
        }

    def __str__(self) -> str:
        given = ", ".join(f"{name} {_words(value)}" for name, value in self.settings.items() if value not in (None, []))
        parts = [f"{given}\n{table(self.rows)}", WHAT, *([layer_table(self.layers)] if self.layers else [])]
        has_bfloat16 = {"avx512_bf16", "amx_bf16"} & set(self.environment.get("cpu_flags", ()))
        if has_bfloat16 and self.settings.get("dtype") == "float32" and "openvino" in self.settings.get("runtime", ()):
            parts.append(HELD)
        slow = [batch for batch in dict.fromkeys(row.batch for row in self.rows) if not self.is_worth_it(batch)]
        if slow and not self.is_wrong:
            batches = " and ".join(map(str, slow))
            runtimes = list(dict.fromkeys(row.runtime for row in self.rows))
            parts.append(
                f"not worth pruning for time at batch {batches} in {', '.join(runtimes)}: no pruned network is faster "
                "than the best dense"
                + (
                    "; eager PyTorch is slow at small layers, ask --runtime accelerate,onnxruntime"
                    if runtimes == ["eager"]
                    else ""
                )
            )
        return "\n\n".join(parts)

    def is_worth_it(self, batch: int) -> bool:
        """Whether a pruned network is faster at this batch than the dense one wherever that is fastest; True where no
        pruned one was timed.
        """
        pruned = [
            row.relative_to_best
            for row in self.rows
            if row.network != "dense" and row.batch == batch and row.relative_to_best is not None
        ]
        return not pruned or min(pruned) < 1 - NOISE


def measure_model(
    request: LatencyRequest, keep: Callable[[Latency], object] = lambda latency: None, progress: bool = False
) -> Latency:
    """Prune the model and race it, batch after batch.

    Args:
        request: what to measure; see `LatencyRequest.check_available`.
        keep: called after each batch with all that is known.
        progress: show bars on stderr.

    Raises:
        FxpruneError: there is no such model, or fxprune cannot compile it.
    """
    where = environment()
    model = load_model(request.model, request.weights)
    size = default_input_size(model)
    if request.size:
        size = (*size[:2], request.size, request.size)
    networks = list(
        tqdm(
            make_networks(request, model, _images(size, 2)),
            desc="networks",
            total=1 + len(request.saved) + len(request.ratio) * len({"fxprune", *request.against} - {"dense"}),
            leave=False,
            disable=not progress,
        )
    )
    layouts = list(LAYOUTS) if request.layout is None else [request.layout]
    latency = Latency(where, request.settings(size[1:]))
    with tuned_cudnn():
        for batch in request.batch:
            torch.compiler.reset()  # else it would try to serve all batches with one, slower, program
            inputs = _images(size, batch).to(request.device, getattr(torch, request.dtype))
            rows = measure(networks, request.runtime, layouts, inputs, request.rounds, progress)
            layers: list[LayerRow] = []
            for network in networks if request.layers else ():
                if network.name == "fxprune":
                    layers += measure_layers(networks[0], network, layouts, inputs, request.rounds, progress)
            latency = replace(latency, rows=[*latency.rows, *rows], layers=[*latency.layers, *layers])
            keep(latency)
    return latency


def _images(size: Sequence[int], batch: int) -> Tensor:
    """Normal numbers of the shape of `batch` images."""
    return torch.randn(batch, *size[1:], generator=torch.Generator().manual_seed(0))


def _words(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


@contextlib.contextmanager
def tuned_cudnn(tuned: bool = True) -> Iterator[None]:
    """Let cuDNN time its algorithms, for the dense opponent must be the best one; or let it not."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = tuned
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
