"""Does compiling change a prediction? Accuracy of the dense, the masked and the compiled network on real images.

    python -m benchmarks.accuracy --model resnet20 --weights resnet20.th --data cifar10:DIR --ratio 0.5
    python -m benchmarks.accuracy --model mobilenet_v2 --weights mobilenet_v2.pth --data photos:DIR

Masked and compiled must predict the same class on every image; the exit code is 1 if they do not. Without fine-tuning,
the masked accuracy says what the pruning costs, not what the method can reach.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fxprune
from benchmarks._environment import environment
from benchmarks._images import CIFAR10, IMAGENET, Images, Normalization, open_images
from fxprune.models import load_model

CIFAR_MODELS = {
    "resnet20": IMAGENET,  # these three were trained with the statistics of ImageNet
    "resnet32": IMAGENET,
    "resnet56": IMAGENET,
    "resnet20_zeros_after": CIFAR10,
}


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
    """

    images: int
    dense: float
    masked: float
    compiled: float
    agreeing: int
    classes: int
    difference: float
    scale: float

    def __str__(self) -> str:
        return (
            f"{'network':<10}{'top-1':>9}\n"
            f"{'dense':<10}{self.dense:>9.2%}\n"
            f"{'masked':<10}{self.masked:>9.2%}\n"
            f"{'compiled':<10}{self.compiled:>9.2%}\n"
            f"masked and compiled agree on {self.agreeing} of {self.images} images ({self.classes} classes predicted); "
            f"largest difference of logits {self.difference:.1e} (largest logit {self.scale:.1f})"
        )


def build(name: str, weights: Path | None) -> tuple[nn.Module, Normalization]:
    """Return a model by name, CIFAR-10 or any that `fxprune compile` knows, and how its inputs are normalized."""
    if name in CIFAR_MODELS:
        return load_model(f"benchmarks._cifar:{name}", weights), CIFAR_MODELS[name]
    return load_model(name, weights), IMAGENET


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
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if masked and compiled disagree on an image."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        images = open_images(options.data).first(options.limit)
        model, normalize = build(options.model, options.weights)
        example = normalize(images.first(2).read(0, 2)[0])
        plan = fxprune.make_plan(
            model, options.ratio, example_inputs=example, groups=options.groups, form=options.form, seed=options.seed
        )
        masked = fxprune.mask(model, plan).eval()
        compiled = fxprune.rewrite(masked, plan, example).eval()
    except (fxprune.FxpruneError, OSError, ValueError) as error:
        print(f"benchmarks.accuracy: error: {error}", file=sys.stderr)
        return 2
    found = compare(model, masked, compiled, images, normalize, options.batch, progress=sys.stderr.isatty())
    report = fxprune.report(compiled)
    print(f"{options.model}, ratio {options.ratio}, groups {options.groups}, form {options.form}")
    print(found)
    print(f"parameters {report.params_dense:,} -> {report.params_pruned:,}")
    print(f"MACs {report.macs_dense:,} -> {report.macs_pruned:,}")
    if options.output:
        settings = {"model": options.model, "data": options.data.partition(":")[0], "ratio": options.ratio}
        settings |= {"groups": options.groups, "form": options.form, "seed": options.seed}
        record = {"environment": environment(), "settings": settings}
        record |= {"result": asdict(found), "report": report.to_dict()}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if found.agreeing == found.images else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    description = "Top-1 accuracy of a network: dense, masked and compiled."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=description)
    parser.add_argument("--model", required=True, help=f"{', '.join(CIFAR_MODELS)}, or a name for `fxprune compile`")
    parser.add_argument("--weights", type=Path, help="state dict of the model (default: random)")
    parser.add_argument("--data", required=True, help="cifar10:DIR or photos:DIR")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--groups", type=lambda text: text if text == "auto" else int(text), default="auto")
    parser.add_argument("--form", choices=("auto", "partition", "overlap"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=100, help="images at a time (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="use only the first LIMIT images")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--output", type=Path, help="also write a JSON record here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
