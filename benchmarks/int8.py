"""Is int8 worth it after pruning? Accuracy and time of dense and pruned networks, float32 and int8, in two runtimes.

    python -m benchmarks.int8 --model cifar_vgg16 --weights vgg16.pth --data cifar10:DIR --output RECORD.json

All networks take turns in one race, one thread, at each batch. Images to calibrate, for the refit and for the ranges of
int8, are training images; accuracy is that on test images, which choose nothing.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxprune
from benchmarks._commands import MODEL_HELP, run_as
from fxprune.cli import values
from fxprune.comparison.evaluation import accuracy
from fxprune.environment import environment
from fxprune.files import write_json
from fxprune.inference.race import race
from fxprune.inference.runtimes.int8 import quantize
from fxprune.models import load_model
from fxprune.training.data.pictures import NORMALIZATIONS
from fxprune.training.data.sources import open_data
from fxprune.vocabulary import GraphRuntime

RUNTIMES: tuple[GraphRuntime, ...] = ("onnxruntime", "openvino")
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "kernels": {"macs": 0.5},
    "filters": {"macs": 0.5, "granularity": "filter"},
}
ROUNDS = 15
TURN_SECONDS = 0.05
TEST_BATCH = 250


def measure(options: argparse.Namespace) -> int:
    """Prune, quantize, look at accuracy, race, write the record and print the table."""
    torch.set_num_threads(1)
    model = load_model(options.model, options.weights).eval()
    data = open_data(options.data, validation=0, normalize=NORMALIZATIONS.get(options.model))
    images = data.plain_batch(data.order(0)[: options.calibration_images])[0]
    networks: dict[str, nn.Module] = {}
    for variant, arguments in VARIANTS.items():
        network = model
        if arguments:
            network = fxprune.compile(model, calibration=images, example_inputs=images[:2], **arguments)
        for runtime in RUNTIMES:
            fast = fxprune.accelerate(network, images[: options.batch[0]], runtime=runtime)
            networks[f"{variant}, {runtime}"] = fast
            networks[f"{variant}, {runtime} int8"] = quantize(fast, images)
    tested, labels = (
        torch.cat(part)[: options.test_images] for part in zip(*data.test_batches(TEST_BATCH), strict=True)
    )
    rows = {name: {"accuracy": accuracy(network, tested, labels)} for name, network in networks.items()}
    for batch in options.batch:
        calls = {name: functools.partial(network, images[:batch]) for name, network in networks.items()}
        for name, timing in race(calls, rounds=ROUNDS, min_seconds=TURN_SECONDS).items():
            rows[name] |= {f"seconds, batch {batch}": timing.fastest, f"spread, batch {batch}": timing.spread}
    settings = {"model": options.model, "calibration_images": options.calibration_images, "macs": 0.5}
    write_json(options.output, {"environment": environment(), "settings": settings, "rows": rows})
    print(table(rows, options.batch))
    return 0


def table(rows: dict[str, dict[str, float]], batches: Sequence[int]) -> str:
    """One line a network: accuracy, and time relative to the fastest dense float network at each batch."""
    lines = [
        f"| network | accuracy | {' | '.join(f'ms, batch {batch} | to dense' for batch in batches)} |",
        f"|---|---|{'---|---|' * len(batches)}",
    ]
    for name, row in rows.items():
        cells = [f"{100 * row['accuracy']:.2f}"]
        for batch in batches:
            key = f"seconds, batch {batch}"
            dense = min(other[key] for who, other in rows.items() if who.startswith("dense") and "int8" not in who)
            cells += [f"{row[key] * 1e3:.2f}", f"{row[key] / dense:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the options and measure."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8", description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    add("--model", required=True, help=MODEL_HELP)
    add("--weights", type=Path, help="state dict of the model")
    add("--data", required=True, metavar="SOURCE")
    add("--output", type=Path, required=True, help="JSON record")
    add("--calibration-images", type=values.count, default=256)
    add("--test-images", type=values.count, default=5000)
    add("--batch", type=values.list_of(values.count), default=[1, 32], metavar="N,N,...")
    return run_as("benchmarks.int8", measure, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
