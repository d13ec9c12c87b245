r"""Does compiling change a prediction? Accuracy of the dense, the masked and the compiled network on real images.

    python -m benchmarks.accuracy --model resnet20 --weights resnet20.th --data cifar10:DIR --ratio 0.5
    python -m benchmarks.accuracy --model resnet20 --weights resnet20.th --data cifar10:DIR \
        --calibration cifar10-train:DIR
    python -m benchmarks.accuracy --model mobilenet_v2 --weights mobilenet_v2.pth --data photos:DIR

Masked and compiled must predict the same class on every image; the exit code is 1 if they do not. Without fine-tuning,
the masked accuracy says what the pruning costs, not what the method can reach. With calibration images the kept weights
are refitted; no image is both calibrated with and evaluated.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fxprune
from benchmarks._commands import MODEL_HELP
from benchmarks._cost import timed, with_peak
from benchmarks._images import Images, open_disjoint, open_images
from fxprune.cli import values
from fxprune.environment import environment
from fxprune.files import write_json
from fxprune.models import load_model
from fxprune.planning.patterns import left_out
from fxprune.training.data.pictures import IMAGENET, NORMALIZATIONS, Normalization


@dataclass(frozen=True)
class Comparison:
    """Top-1 accuracy in [0, 1] of three networks on the same images, and how far masked and compiled are apart.

    Attributes:
        images: how many were seen.
        dense, masked, compiled: top-1 accuracy.
        agreeing: images on which masked and compiled predict the same class.
        classes: how many different classes masked predicts; were it one, agreeing would mean little.
        difference: largest absolute difference of their logits.
        scale: largest absolute logit of the masked network.
        agreeing_with_dense: images on which masked predicts the class that dense predicts; None in records from before
            it was counted.
    """

    images: int
    dense: float
    masked: float
    compiled: float
    agreeing: int
    classes: int
    difference: float
    scale: float
    agreeing_with_dense: int | None = None

    def __str__(self) -> str:
        return (
            f"{'network':<10}{'top-1':>9}\n"
            f"{'dense':<10}{self.dense:>9.2%}\n"
            f"{'masked':<10}{self.masked:>9.2%}\n"
            f"{'compiled':<10}{self.compiled:>9.2%}\n"
            f"masked and compiled agree on {self.agreeing} of {self.images} images ({self.classes} classes predicted); "
            f"largest difference of logits {self.difference:.1e} (largest logit {self.scale:.1f})\n"
            f"top-1 agreement with the dense model: {self.agreeing_with_dense} of {self.images} images"
        )


@dataclass(frozen=True)
class Pruning:
    """A plan, the model masked by it and perhaps refitted, and what these took.

    Attributes:
        plan: what to prune.
        masked: the masked model.
        seconds: of `make_plan` ("plan", with calibration images it refits too) and of `mask` ("mask").
        peak_mb: peak of the resident memory above its level just before; None where the system does not tell.
    """

    plan: fxprune.PrunePlan
    masked: nn.Module
    seconds: dict[str, float]
    peak_mb: float | None

    def __str__(self) -> str:
        peak = "unknown" if self.peak_mb is None else f"{self.peak_mb:.0f} MB"
        return f"planning {self.seconds['plan']:.1f} s, masking {self.seconds['mask']:.1f} s, peak memory {peak}"


def build(name: str, weights: Path | None, seed: int = 0) -> tuple[nn.Module, Normalization]:
    """Return a model by name, and how its inputs are normalized."""
    return load_model(name, weights, seed), NORMALIZATIONS.get(name, IMAGENET)


def prune(
    model: nn.Module, example: Tensor, calibration: Tensor | None = None, progress: bool = False, **options: Any
) -> Pruning:
    """Plan and mask; `options` are those of `fxprune.make_plan`."""

    def steps() -> tuple[tuple[float, fxprune.PrunePlan], tuple[float, nn.Module]]:
        planned = timed(
            lambda: fxprune.make_plan(
                model, example_inputs=example, calibration=calibration, progress=progress, **options
            )
        )
        return planned, timed(lambda: fxprune.mask(model, planned[1], calibration, progress=progress).eval())

    ((planning, plan), (masking, masked)), peak = with_peak(steps)
    return Pruning(plan, masked, {"plan": planning, "mask": masking}, peak)


@torch.inference_mode()
def compare(
    dense: nn.Module,
    masked: nn.Module,
    compiled: nn.Module,
    images: Images,
    normalize: Normalization,
    batch: int = 100,
    progress: bool = False,
) -> Comparison:
    """Run the three networks over all `images`, `batch` at a time."""
    # Predicted classes, one row for each of dense, masked, compiled; and the true ones.
    predictions: list[Tensor] = []
    truth: list[Tensor] = []
    difference = scale = 0.0
    with tqdm(total=images.count, unit="image", disable=not progress) as bar:
        for pixels, labels in images.batches(batch):
            inputs = normalize(pixels)
            logits = [network(inputs) for network in (dense, masked, compiled)]
            predictions.append(torch.stack([scores.argmax(1) for scores in logits]))
            truth.append(labels)
            difference = max(difference, float((logits[1] - logits[2]).abs().max()))
            scale = max(scale, float(logits[1].abs().max()))
            bar.update(len(labels))
    predicted = torch.cat(predictions, dim=1)
    accuracy = (predicted == torch.cat(truth)).double().mean(1).tolist()
    return Comparison(
        images=images.count,
        dense=accuracy[0],
        masked=accuracy[1],
        compiled=accuracy[2],
        agreeing=int((predicted[1] == predicted[2]).sum()),
        classes=len(set(predicted[1].tolist())),
        difference=difference,
        scale=scale,
        agreeing_with_dense=int((predicted[0] == predicted[1]).sum()),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if masked and compiled disagree on an image."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    progress = sys.stderr.isatty()
    given = {name: getattr(options, name) for name in PLAN_OPTIONS if getattr(options, name) is not None}
    try:
        images, source = open_sources(options, options.seed)
        model, normalize = build(options.model, options.weights)
        example = normalize(next(images.batches(2))[0])
        calibration = None if source is None else normalize(source.pixels())
        pruning = prune(model, example, calibration, progress, ignore=left_out(model, options.only), **given)
        compiled = fxprune.rewrite(pruning.masked, pruning.plan, example).eval()
    except (fxprune.FxpruneError, OSError, ValueError) as error:
        print(f"benchmarks.accuracy: error: {error}", file=sys.stderr)
        return 2
    found = compare(model, pruning.masked, compiled, images, normalize, options.batch, progress)
    report = fxprune.report(compiled)
    settings = settings_of(options) | {
        "macs": options.macs,
        "method": pruning.plan.method,
        "criterion": pruning.plan.criterion,
        "seed": options.seed,
    }
    print(", ".join(f"{name} {value}" for name, value in settings.items() if value is not None))
    print(found)
    print(f"parameters {report.params_dense:,} -> {report.params_pruned:,}")
    print(f"MACs {report.macs_dense:,} -> {report.macs_pruned:,}")
    print(pruning)
    if options.output:
        measured = {"seconds": pruning.seconds, "peak_mb": pruning.peak_mb}
        result = {"result": asdict(found), "report": report.to_dict()}
        write_json(options.output, {"environment": environment(), "settings": settings} | measured | result)
    return 0 if found.agreeing == found.images else 1


PLAN_OPTIONS = ("ratio", "macs", "groups", "form", "method", "criterion", "variety", "snapshots", "seed")
"""Options that go to `fxprune.make_plan`, which has its own defaults for those that are not given."""


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    description = "Top-1 accuracy of a network: dense, masked and compiled."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=description)
    add_options(parser)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--ratio", type=float, help="share of kernel groups to prune (default: 0.5)")
    size.add_argument("--macs", type=float, metavar="SHARE", help="share of MACs to keep, instead of a ratio")
    parser.add_argument("--method", help="how kernels are chosen (default: that of fxprune)")
    parser.add_argument("--criterion", help="importance of a kernel (default: that of fxprune)")
    parser.add_argument("--variety", help="make the criterion keep rare kernels")
    parser.add_argument("--seed", type=int, default=0, help="of the plan and of the images to calibrate with")
    options = parser.parse_args(arguments)
    if options.macs is None and options.ratio is None:
        options.ratio = 0.5
    return options


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what every benchmark of accuracy can be asked: the model, the images, the structure."""
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument("--weights", type=Path, help="state dict of the model (default: random)")
    parser.add_argument("--data", required=True, help="images to evaluate on: cifar10:DIR or photos:DIR")
    parser.add_argument(
        "--calibration",
        metavar="SOURCE",
        help="images to refit the weights with: cifar10-train:DIR or photos:DIR; of the source of --data those that "
        "are drawn for this are not evaluated (default: no refit)",
    )
    parser.add_argument(
        "--calibration-images", type=values.count, default=512, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--groups", type=values.groups, default="auto")
    parser.add_argument("--form", choices=("auto", "partition", "overlap"), default="auto")
    parser.add_argument("--only", metavar="PATTERN|1x1", help="prune only convolutions of these names, or the 1x1 ones")
    parser.add_argument("--snapshots", nargs="+", type=Path, metavar="FILE", help="earlier states of the training run")
    parser.add_argument("--batch", type=values.count, default=100, help="images at a time (default: %(default)s)")
    parser.add_argument("--limit", type=values.count, help="evaluate only the first LIMIT images")
    parser.add_argument("--threads", type=values.count, help="of torch (default: its own choice)")
    parser.add_argument("--output", type=Path, help="also write a JSON record here")


def open_sources(options: argparse.Namespace, seed: int) -> tuple[Images, Images | None]:
    """Open the images to evaluate on, and those to calibrate with if there is a source of them."""
    if options.calibration is None:
        return open_images(options.data).first(options.limit), None
    images, calibration = open_disjoint(options.data, options.calibration, options.calibration_images, seed)
    return images.first(options.limit), calibration


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Those of `add_options` that decide the result, for the record: folders by their kind, files by their name."""
    calibrated = options.calibration is not None
    return {
        "model": options.model,
        "data": options.data.partition(":")[0],
        "calibration": options.calibration.partition(":")[0] if calibrated else None,
        "calibration_images": options.calibration_images if calibrated else None,
        "ratio": options.ratio,
        "groups": options.groups,
        "form": options.form,
        "only": options.only,
        "snapshots": [path.name for path in options.snapshots] if options.snapshots else None,
    }


if __name__ == "__main__":
    sys.exit(main())
