r"""Are saved MACs saved time? The latency of a dense network against pruned ones, in one runtime or several.

    python -m benchmarks.latency --model resnet50 --ratio 0.5 --batch 1,8 --runtime eager,compile,script
    python -m benchmarks.latency --model resnet18 --ratio 0.5,0.75 --against dense,torch-pruning --layers --plot r18.png
    python -m benchmarks.latency --plot all.svg --from benchmarks/results/latency-*.json

Method: of each batch all networks, in all runtimes and layouts, take turns in one race (`fxprune.inference.race`), so
that what else the machine does hits all alike. Times are medians over the rounds with the distance of their quartiles;
ratios are medians of ratios within a round, to the dense network in the same runtime. Every network has BatchNorm
folded and runs in both layouts, unless one is asked for, and the faster counts: of the dense opponent too. Before it is
timed its output must equal that of its oracle, for fxprune the masked model. Weights may be random: they take no other
time."""

import argparse
import contextlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fxprune
from benchmarks._environment import environment
from benchmarks._layers import LayerRow, layer_table, measure_layers
from benchmarks._plots import FORMATS, draw_speed_up, read_records
from benchmarks._rivals import (
    LAYOUTS,
    RIVALS,
    RUNTIMES,
    Call,
    Network,
    dense_network,
    describe,
    difference,
    fxprune_network,
    limit_of,
    prepare,
    settle,
    torch_pruning_network,
)
from benchmarks.accuracy import CIFAR_MODELS, _count, build, left_out, write
from fxprune.inference.race import Timing, race
from fxprune.models import default_input_size
from fxprune.plans.shapes import FORMS

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

WARMUP = 3
"""Calls before the first that counts; TorchScript compiles during the first two."""
MIN_SECONDS = 0.02
"""A turn lasts at least about this long: short calls are repeated, for a clock and a scheduler need some time."""


@dataclass(frozen=True)
class Row:
    """One network in one runtime and layout, at one batch.

    Attributes:
        network: `"dense"`, `"fxprune"` or `"torch-pruning"`.
        ratio: what fxprune was asked to prune; of torch-pruning, that of the network whose MACs it matches.
        macs_share: MACs relative to the dense network.
        runtime: one of `RUNTIMES`.
        layout: one of `LAYOUTS`, or None if the runtime chose.
        batch: images at a time.
        seconds, spread: median of one call, and the distance between its quartiles.
        relative: to the dense network in this runtime, in its faster layout: median of the ratios within a round.
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
    difference: float | None = None
    limit: float | None = None
    best: bool = False
    error: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether it ran and computed something else."""
        return self.difference is not None and bool(self.error)


def make_networks(
    model: nn.Module,
    inputs: Tensor,
    ratios: Sequence[float],
    rivals: Sequence[str],
    options: Mapping[str, Any],
    random_weights: bool,
) -> Iterator[Network]:
    """Yield the dense network, and for each ratio that of fxprune and its rival of equal MACs.

    Args:
        model: in evaluation mode, float32, on the CPU. With random weights its BatchNorm statistics are set here.
        inputs: two images or more, `(N, C, H, W)`.
        ratios: of fxprune.
        rivals: some of `RIVALS`.
        options: of `fxprune.make_plan`.
        random_weights: whether the model is untrained.

    Raises:
        FxpruneError: fxprune cannot compile the model.
    """
    if random_weights:
        settle(model, inputs)
    yield dense_network(model, inputs)
    for ratio in ratios:
        network = fxprune_network(model, inputs, ratio, options, random_weights)
        yield network
        if "torch-pruning" in rivals:
            assert network.macs is not None
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
    complete = list(rows)
    for number, timing in timings.items():
        row = rows[number]
        dense = best.get((row.runtime, "dense", None))
        complete[number] = replace(
            row,
            seconds=timing.median,
            spread=timing.spread,
            relative=None if dense is None else timing.relative_to(timings[dense]),
            best=best[row.runtime, row.network, row.ratio] == number,
        )
    return complete


def table(rows: Sequence[Row]) -> str:
    """Each network in its faster layout as text, one a line, and what failed."""
    lines = [
        f"{'batch':>5}  {'runtime':<21}{'network':<14}{'ratio':>6}  {'layout':<14}{'ms':>10}{'spread':>9}"
        f"{'to dense':>10}{'MACs':>7}{'difference':>12}"
    ]
    for row in rows:
        if not row.best and not row.error:
            continue
        ratio = "-" if row.ratio is None else f"{row.ratio:g}"
        share = "-" if row.macs_share is None else f"{row.macs_share:.3f}"
        who = f"{row.batch:>5}  {row.runtime:<21}{row.network:<14}{ratio:>6}  {row.layout or 'own':<14}"
        if row.seconds is None or row.spread is None:
            lines.append(f"{who}{row.error}")
            continue
        relative = "-" if row.relative is None else f"{row.relative:.3f}"
        lines.append(
            f"{who}{row.seconds * 1e3:>10.3f}{row.spread * 1e3:>9.3f}{relative:>10}{share:>7}{row.difference:>12.1e}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write the record after each batch; return 1 if a network computed something else."""
    options = _options(arguments)
    try:
        _check_available(options)
        if options.records:
            print(f"{draw_speed_up(read_records(options.records), options.plot)} points in {options.plot}")
            return 0
        if options.threads:
            torch.set_num_threads(options.threads)
        return _run(options)
    except (fxprune.FxpruneError, OSError, ValueError) as error:
        print(f"benchmarks.latency: error: {error}", file=sys.stderr)
        return 2


def _check_available(options: argparse.Namespace) -> None:
    """See that there is what `options` need, before anything is measured.

    Raises:
        ValueError: something is absent; the message says how to do without.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device on this machine; measure with --device cpu")
    needing = [name for name in options.runtime if RUNTIMES[name].cuda]
    if options.device == "cpu" and needing:
        raise ValueError(f"--runtime {needing[0]}: there are no CUDA graphs on the CPU; leave it out, or --device cuda")
    wanted = {"torch_pruning": "torch-pruning" in options.against, "matplotlib": options.plot is not None}
    for package, extra in (("torch_pruning", "torch-pruning"), ("matplotlib", "plots")):
        if wanted[package] and importlib.util.find_spec(package) is None:
            raise ValueError(f"{package} is not installed; pip install fxprune[{extra}]")


def _run(options: argparse.Namespace) -> int:
    progress = sys.stderr.isatty()
    where = environment()
    model, _ = build(options.model, options.weights)
    size = (2, *default_input_size(model)[1:])
    if options.model in CIFAR_MODELS:
        size = (2, 3, 32, 32)
    if options.size:
        size = (*size[:2], options.size, options.size)
    plan_options = {"form": options.form, "groups": options.groups, "target": options.device, "seed": options.seed}
    plan_options["ignore"] = left_out(model, options.only)
    networks = list(
        tqdm(
            make_networks(
                model, _images(size, 2), options.ratio, options.against, plan_options, options.weights is None
            ),
            desc="networks",
            total=1 + len(options.ratio) * (1 + ("torch-pruning" in options.against)),
            leave=False,
            disable=not progress,
        )
    )
    layouts = list(LAYOUTS) if options.layout is None else [options.layout]
    rows: list[Row] = []
    layers: list[LayerRow] = []
    record: dict[str, Any] = {"environment": where, "settings": _settings(options, size)}
    with _tuned_cudnn():
        for batch in options.batch:
            torch.compiler.reset()  # else it would try to serve all batches with one, slower, program
            inputs = _images(size, batch).to(options.device, DTYPES[options.dtype])
            rows += measure(networks, options.runtime, layouts, inputs, options.rounds, progress)
            if options.layers:
                for network in networks:
                    if network.name == "fxprune":
                        layers += measure_layers(networks[0], network, layouts, inputs, options.rounds, progress)
            record["rows"] = [asdict(row) for row in rows]
            record["layers"] = [asdict(row) for row in layers]
            write(options.output, record)
    print(", ".join(f"{name} {_words(value)}" for name, value in record["settings"].items() if value is not None))
    print(table(rows))
    if layers:
        print(f"\n{layer_table(layers)}")
    if options.plot:
        draw_speed_up({str(options.output): record}, options.plot)
    return int(any(row.is_wrong for row in rows))


def _images(size: Sequence[int], batch: int) -> Tensor:
    """Normal numbers of the shape of `batch` images."""
    return torch.randn(batch, *size[1:], generator=torch.Generator().manual_seed(0))


def _words(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


@contextlib.contextmanager
def _tuned_cudnn() -> Iterator[None]:
    """Let cuDNN time its algorithms, for the dense opponent must be the best one."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _settings(options: argparse.Namespace, size: Sequence[int]) -> dict[str, Any]:
    return {
        "model": options.model,
        "weights": options.weights.name if options.weights else None,
        "ratio": options.ratio,
        "form": options.form,
        "groups": options.groups,
        "only": options.only,
        "device": options.device,
        "dtype": options.dtype,
        "size": list(size[1:]),
        "batch": options.batch,
        "layout": options.layout,
        "against": options.against,
        "runtime": options.runtime,
        "rounds": options.rounds,
        "seed": options.seed,
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    description = "Latency of a network, dense and pruned, in one runtime or several."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=description)
    parser.add_argument("--model", help=f"{', '.join(CIFAR_MODELS)}, or a name for `fxprune compile`")
    parser.add_argument("--weights", type=Path, help="state dict of the model (default: random)")
    parser.add_argument("--ratio", type=_ratios, default=[0.5], metavar="R,R,...", help="what to prune (default: 0.5)")
    parser.add_argument("--groups", type=lambda text: text if text == "auto" else int(text), default="auto")
    parser.add_argument("--form", choices=FORMS, default="auto")
    parser.add_argument("--only", metavar="PATTERN|1x1", help="prune only convolutions of these names, or the 1x1 ones")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--size", type=_count, metavar="PIXELS", help="height and width (default: the model's own)")
    parser.add_argument("--batch", type=_list_of(_count), default=[1], metavar="N,N,...", help="images (default: 1)")
    parser.add_argument("--layout", choices=LAYOUTS, help="memory layout (default: both, and the faster counts)")
    parser.add_argument(
        "--against", type=_choices("rival", RIVALS), default=["dense"], help=f"some of {','.join(RIVALS)}; dense always"
    )
    parser.add_argument(
        "--runtime",
        type=_choices("runtime", list(RUNTIMES)),
        default=["eager"],
        help=f"some of {','.join(RUNTIMES)} (default: eager)",
    )
    parser.add_argument("--rounds", type=_count, default=15, help="turns of each (default: %(default)s)")
    parser.add_argument("--layers", action="store_true", help="also each grouped convolution against the dense one")
    parser.add_argument("--threads", type=_count, help="of torch (default: its own choice)")
    parser.add_argument("--seed", type=int, default=0, help="of the plan")
    parser.add_argument(
        "--output", type=Path, help="JSON record (default: benchmarks/results/latency-MODEL-DEVICE.json)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw speed-up against MACs, .png or .svg")
    parser.add_argument(
        "--from", type=Path, nargs="+", dest="records", metavar="RECORD", help="only draw these, with --plot"
    )
    options = parser.parse_args(arguments)
    if options.plot is not None and options.plot.suffix not in FORMATS:
        parser.error(f"--plot {options.plot}: must end in {' or '.join(FORMATS)}")
    if options.records and options.plot is None:
        parser.error("--from draws records; --plot FILE says where")
    if not options.records and options.model is None:
        parser.error("--model is needed: what to measure")
    if options.output is None and options.model is not None:
        name = re.sub(r"[^\w.-]+", "-", options.model)
        options.output = RESULTS / f"latency-{name}-{options.device}.json"
    return options


def _list_of(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A parser of what commas part, each once."""
    return lambda text: list(dict.fromkeys(parse(part) for part in text.split(",")))


def _choices(what: str, legal: Sequence[str]) -> Callable[[str], list[Any]]:
    def parse(name: str) -> str:
        if name not in legal:
            raise argparse.ArgumentTypeError(f"there is no {what} {name!r}; choose from {', '.join(legal)}")
        return name

    return _list_of(parse)


def _fraction(what: str, example: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is no {what}; give numbers between 0 and 1, as in {example}")
        return value

    return parse


_ratios = _list_of(_fraction("ratio to prune", "0.5,0.75"))


if __name__ == "__main__":
    sys.exit(main())
