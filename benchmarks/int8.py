"""Is int8 worth it after pruning? Accuracy and time of dense and pruned networks in float32, bfloat16 and int8.

    python -m benchmarks.int8 --model resnet20 --weights resnet20.th --data cifar10:DIR --output RECORD.json
    python -m benchmarks.int8 --model resnet18 --batch 1 --calibration-images 48 --test-images 64 --output RECORD.json

ONNX Runtime and OpenVINO, each layer in the form that is fastest there in float32 and in int8, and PyTorch: what
`accelerate` makes of it, and Inductor with the integers of torchao's pt2e. All networks take turns in one race, one
thread, at each batch. Images to calibrate, for the refit and for the ranges of int8, are training images; accuracy is
that on test images, which choose nothing. Without data weights and images are random, and the record has the share of
images on which a network puts the same class first as the float32 network that it was made from.
"""

import argparse
import copy
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxprune
from benchmarks._commands import MODEL_HELP, run_as
from fxprune.calibration import read_batches
from fxprune.cli import values
from fxprune.comparison.evaluation import accuracy
from fxprune.environment import environment
from fxprune.exact.record import ACCELERATION
from fxprune.files import write_json
from fxprune.inference.integers import in_integers
from fxprune.inference.race import race
from fxprune.inference.runtimes.int8 import quantize
from fxprune.models import default_input_size, load_model
from fxprune.training.data.pictures import NORMALIZATIONS
from fxprune.training.data.sources import open_data
from fxprune.vocabulary import GraphRuntime

READ_ONNX: tuple[GraphRuntime, ...] = ("onnxruntime", "openvino")
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "kernels 0.5": {"ratio": 0.5, "share_groups": True},
    "kernels 0.75": {"ratio": 0.75, "share_groups": True},
    "filters, macs 0.5": {"macs": 0.5, "granularity": "filter", "round_to": 8},
    "filters, macs 0.27": {"macs": 0.27, "granularity": "filter", "round_to": 8},
}
"""The last keep about the multiply-accumulates of kernels at 0.75."""
COLUMNS = (
    "onnxruntime float32", "onnxruntime int8", "openvino float32", "openvino bfloat16", "openvino int8",
    "torch float32", "torch bfloat16", "inductor float32", "inductor int8",
)  # fmt: skip
ROUNDS = 15
TURN_SECONDS = 0.05
TEST_BATCH = 250


class InBfloat16(nn.Module):
    """A bfloat16 network that is called as the float32 one is."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.network(x.bfloat16())
        return y.float()


def forms(pruned: nn.Module, images: Tensor, batch: int) -> dict[str, Callable[[], nn.Module]]:
    """What makes each network of a row, by column."""
    example = images[:batch]
    half = copy.deepcopy(pruned).bfloat16()
    found: dict[str, Callable[[], nn.Module]] = {
        "torch float32": lambda: fxprune.accelerate(pruned, example),
        "torch bfloat16": lambda: InBfloat16(fxprune.accelerate(half, example.bfloat16())),
        "openvino bfloat16": lambda: fxprune.accelerate(pruned, example, runtime="openvino", precision="bfloat16"),
        "inductor float32": lambda: fxprune.accelerate(pruned, example, runtime="inductor"),
        "inductor int8": lambda: quantize(fxprune.accelerate(pruned, example, runtime="inductor"), images),
    }
    for runtime in READ_ONNX:
        found[f"{runtime} float32"] = functools.partial(fxprune.accelerate, pruned, example, runtime=runtime)
        found[f"{runtime} int8"] = functools.partial(in_integers, pruned, (example,), runtime, read_batches(images))
    return found


def measure(options: argparse.Namespace) -> int:
    """Prune, quantize, look at accuracy, race, and write the record after each step; print the table."""
    torch.set_num_threads(1)
    model = load_model(options.model, options.weights).eval()
    images, tested, labels = _data(model, options)
    settings = {
        name: getattr(options, name) for name in ("model", "calibration_images", "test_images", "batch", "columns")
    }
    variants = {name: arguments for name, arguments in VARIANTS.items() if name in ("dense", *options.variants)}
    settings |= {"weights": "random" if options.weights is None else "trained", "variants": variants}
    record: dict[str, Any] = {"environment": environment(), "settings": settings, "rows": {}}
    networks: dict[str, dict[str, nn.Module]] = {}
    for variant, arguments in variants.items():
        pruned = model
        if arguments:
            given = None if options.data is None else images
            pruned = fxprune.compile(model, example_inputs=images[:2], calibration=given, **arguments)
        row: dict[str, Any] = {"macs": 1.0, "cells": {}}
        if arguments:
            report = fxprune.report(pruned)
            assert report.macs_dense
            assert report.macs_pruned
            row["macs"] = report.macs_pruned / report.macs_dense
        expected = _classes(pruned, tested)
        networks[variant] = {}
        made = forms(pruned, images, options.batch[0])
        for column in options.columns:
            network = networks[variant][column] = made[column]()
            cell: dict[str, Any] = {}
            if labels is not None:
                cell["accuracy"] = accuracy(network, tested, labels)
            else:
                cell["agreement"] = float((_classes(network, tested) == expected).double().mean())
            fast = network.network if isinstance(network, InBfloat16) else network
            if ACCELERATION in getattr(fast, "meta", {}):
                cell["chosen"] = fxprune.acceleration_report(fast).chosen
            row["cells"][column] = cell
            print(f"{variant}, {column}: {cell}", file=sys.stderr, flush=True)
        record["rows"][variant] = row
        write_json(options.output, record)
    for batch in options.batch:
        calls: dict[str, Callable[[], object]] = {
            f"{variant}/{column}": functools.partial(network, images[:batch])
            for variant, columns in networks.items()
            for column, network in columns.items()
            if column != "inductor int8" or batch == options.batch[0]  # at others it runs as it is, not compiled
        }
        for name, timing in race(calls, rounds=options.rounds, min_seconds=TURN_SECONDS).items():
            variant, _, column = name.partition("/")
            cell = record["rows"][variant]["cells"][column]
            cell |= {f"seconds, batch {batch}": timing.fastest, f"spread, batch {batch}": timing.spread}
        write_json(options.output, record)
    print(table(record["rows"], options.batch))
    return 0


def _data(model: nn.Module, options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor | None]:
    """Images to calibrate with, images to test on, and their labels, if there are data."""
    if options.data is None:
        generator = torch.Generator().manual_seed(0)
        size = default_input_size(model)[1:]
        counts = options.calibration_images, options.test_images
        found = [torch.randn(count, *size, generator=generator) for count in counts]
        return found[0], found[1], None
    data = open_data(options.data, validation=0, normalize=NORMALIZATIONS.get(options.model))
    images = data.plain_batch(data.order(0)[: options.calibration_images])[0]
    tested, labels = (
        torch.cat(part)[: options.test_images] for part in zip(*data.test_batches(TEST_BATCH), strict=True)
    )
    return images, tested, labels


@torch.no_grad()
def _classes(network: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([network(part).argmax(1) for part in torch.split(images, TEST_BATCH)])


def table(rows: Mapping[str, Any], batches: Sequence[int]) -> str:
    """For each batch a table: one line a network, and in each cell its time relative to the fastest dense float32
    network, and what it gets right in percent.
    """
    lines = []
    for batch in batches:
        key = f"seconds, batch {batch}"
        columns = [column for column in COLUMNS if key in rows["dense"]["cells"].get(column, {})]
        best = min(rows["dense"]["cells"][column][key] for column in columns if column.endswith("float32"))
        lines += [
            f"Batch {batch}: the fastest dense float32 network takes {1e3 * best:.2f} ms.",
            "",
            f"| network | MACs | {' | '.join(columns)} |",
            f"|---|---|{'---|' * len(columns)}",
        ]
        for name, row in rows.items():
            cells = [
                f"{cell[key] / best:.2f} ({100 * cell.get('accuracy', cell.get('agreement')):.1f})"
                for cell in (row["cells"][column] for column in columns)
            ]
            lines.append(f"| {name} | {row['macs']:.2f} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip("\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the options and measure."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8", description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    add("--model", required=True, help=MODEL_HELP)
    add("--weights", type=Path, help="state dict of the model (default: random)")
    add("--data", metavar="SOURCE", help="images with labels (default: random images, without)")
    add("--output", type=Path, required=True, help="JSON record")
    add("--calibration-images", type=values.count, default=256)
    add("--test-images", type=values.count, default=5000)
    add("--rounds", type=values.count, default=ROUNDS, help="turns of each network (default: %(default)s)")
    add("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="beside dense (default: all)")
    add("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS), help="runtimes and precisions (default: all)")
    add("--batch", type=values.list_of(values.count), default=[1, 32], metavar="N,N,...")
    return run_as("benchmarks.int8", measure, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
