"""`fxprune bench`: are saved MACs saved time? Dense against pruned networks, in one runtime or several."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from fxprune.cli import values
from fxprune.cli.options import MODEL_HELP, add_output_options, add_size, add_weights
from fxprune.cli.output import Subparsers, show, shows_progress
from fxprune.vocabulary import BenchRuntime, Dtype, FormChoice, Layout, Rival

if TYPE_CHECKING:
    from fxprune.comparison.requests import LatencyRequest

DESCRIPTION = """\
Latency of a network, dense and pruned, in one runtime or several. All take turns in one race, and each must compute
what it should before it is timed. Shown are the median of ms and, to the dense network of that runtime and to the best
of all, medians of the ratios within a round: not the ratio of medians.
"""
EXAMPLES = """\
examples:
  fxprune bench resnet50 --ratio 0.5 --batch 1,8 --runtime eager,compile,accelerate
  fxprune bench resnet18 --ratio 0.5,0.75 --against dense,torch-pruning --layers --output r18.json --plot r18.png
  fxprune bench resnet50 --device cuda --dtype float16 --runtime accelerate+cudagraph --json
  fxprune bench resnet50 --saved resnet50.pt r50.pt --runtime accelerate,onnxruntime
  fxprune bench --from r18.json r50.json --plot both.svg
"""


def add_to(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "bench",
        help="time a model, dense and pruned, here and now",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    add_options(parser)
    add_output_options(parser)
    parser.set_defaults(run=run, error=parser.error)


def add_options(parser: argparse.ArgumentParser, output: str = "write a JSON record after each batch") -> None:
    """Add what to measure of a model; `output` is the help of `--output`."""
    what = parser.add_argument_group("what to race")
    add_weights(what)
    add = what.add_argument
    ratios = values.list_of(values.fraction("ratio to prune", "0.5,0.75"))
    add("--ratio", type=ratios, metavar="R,R,...", help="what to prune of each convolution (default: 0.5)")
    add("--groups", type=values.groups, default="auto")
    add("--form", choices=get_args(FormChoice), default="auto")
    add("--only", metavar="PATTERN|1x1", help="prune only convolutions of these names, or the 1x1 ones")
    add("--seed", type=int, default=0, help="of the plan")
    add(
        "--saved",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="in place of a ratio, or as well: files of this model that `fxprune compile -o` wrote, by whatever plan",
    )
    rivals = values.some_of("rival", get_args(Rival))
    add("--against", type=rivals, default=["dense"], help=f"some of {values.either(Rival)}; dense always")
    place = parser.add_argument_group("where, and with what images")
    add = place.add_argument
    runtimes = values.some_of("runtime", get_args(BenchRuntime))
    add(
        "--runtime",
        type=runtimes,
        default=["eager"],
        help=f"some of {values.either(BenchRuntime)} (default: eager)",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--dtype", choices=get_args(Dtype), default="float32", help="default: %(default)s")
    add("--layout", choices=get_args(Layout), help="memory layout (default: both, and the faster counts)")
    add("--threads", type=values.count, help="of torch (default: its own choice)")
    batches = values.list_of(values.count)
    add("--batch", type=batches, default=[1], metavar="N,N,...", help="images (default: 1)")
    add_size(place)
    add = parser.add_argument_group("how long, and what to write").add_argument
    add("--rounds", type=values.count, default=15, help="turns of each (default: %(default)s)")
    add("--layers", action="store_true", help="also each grouped convolution against the dense one")
    add("--output", type=Path, help=output)
    add("--plot", type=Path, metavar="FILE", help="draw time against MACs, .png or .svg")
    add("--from", type=Path, nargs="+", dest="records", metavar="RECORD", help="only draw these, with --plot")


def run(options: argparse.Namespace) -> int:
    """Measure, write the record after each batch, print the tables; return 1 if a network computed something else."""
    import torch

    from fxprune.comparison.extras import require
    from fxprune.comparison.latency import Latency, measure_model
    from fxprune.comparison.plots import draw_latencies, read_records
    from fxprune.files import check_writable, write_json

    check(options)
    for path in (options.output, options.plot):
        if path is not None:
            check_writable(path)
    if options.plot:
        require("matplotlib")
    if options.records:
        print(f"{draw_latencies(read_records(options.records), options.plot)} points in {options.plot}")
        return 0
    request = request_of(options)
    request.check_available()
    if options.threads:
        torch.set_num_threads(options.threads)

    def keep(latency: Latency) -> None:
        if options.output:
            write_json(options.output, latency.to_dict())

    latency = measure_model(request, keep, shows_progress(options))
    show(options, latency.to_dict(), str(latency))
    if options.plot:
        draw_latencies({str(options.output or options.model): latency.to_dict()}, options.plot)
    return int(latency.is_wrong)


def check(options: argparse.Namespace) -> None:
    """End with a message where options do not go together."""
    from fxprune.comparison.plots import FORMATS

    if options.plot is not None and options.plot.suffix not in FORMATS:
        options.error(f"--plot {options.plot}: must end in {' or '.join(FORMATS)}")
    if options.records and options.plot is None:
        options.error("--from draws records; --plot FILE says where")
    if options.saved and not options.ratio and set(options.against) != {"dense"}:
        options.error("--against matches the MACs of what --ratio prunes; give --ratio, or leave it out with --saved")
    if not options.records and options.model is None:
        options.error("MODEL is needed: what to measure")


def pixels_of(options: argparse.Namespace) -> int | None:
    """Height and width of the images: `--batch` has their number, and the model knows the channels."""
    size: tuple[int, ...] | None = options.size
    if size is None:
        return None
    if len(size) not in (1, 4) or size[-1] != size[-2:][0]:
        options.error(f"--size {','.join(map(str, size))}: images are square here; give pixels, as in 224")
    return size[-1]


def request_of(options: argparse.Namespace) -> LatencyRequest:
    """What the options ask for."""
    from fxprune.comparison.requests import LatencyRequest

    return LatencyRequest(
        model=options.model,
        weights=options.weights,
        ratio=options.ratio or ([] if options.saved else LatencyRequest.ratio),
        saved=options.saved,
        groups=options.groups,
        form=options.form,
        only=options.only,
        device=options.device,
        dtype=options.dtype,
        size=pixels_of(options),
        batch=options.batch,
        layout=options.layout,
        against=options.against,
        runtime=options.runtime,
        rounds=options.rounds,
        layers=options.layers,
        seed=options.seed,
    )
