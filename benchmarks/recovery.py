r"""What recovery gives after the refit, without labels: accuracy on real images, over several seeds.

    python -m benchmarks.recovery --model resnet20 --weights resnet20.th --data cifar10:DIR \
        --calibration cifar10-train:DIR --calibration-images 1024 --macs 0.57 --groups 8 --seconds 180 --amp bf16

A seed draws the images to calibrate with, the plan, and all that recovery draws. No image is both calibrated with and
evaluated. The time of recovery is that of the processor, beside that of the clock. With `--latency` the share of the
time is measured anew in the end: the recovered network against the dense one, both accelerated, a race of their own.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fxprune
from benchmarks._images import Images, open_disjoint
from benchmarks.accuracy import add_options, build, settings_of
from fxprune.calibration.augmentation import AUGMENTATIONS
from fxprune.calibration.recovery import RECOVERED, Recovered
from fxprune.calibration.subject import Subject
from fxprune.cli import values
from fxprune.environment import environment
from fxprune.files import write_json, write_whole
from fxprune.inference.duel import share_of_time
from fxprune.planning.lossy import masked_by
from fxprune.planning.making import plan_for
from fxprune.planning.patterns import left_out
from fxprune.planning.requests import AUTO, BRANCH, GRANULARITIES, Request
from fxprune.training.data.pictures import Normalization

TIMED_BATCH = 32


@dataclass(frozen=True)
class Accuracy:
    """Of three networks on the same images, in [0, 1].

    Attributes:
        images: how many.
        dense, refitted, recovered: top-1 accuracy.
        refitted_agreement, recovered_agreement: share of the images on which the network predicts what dense predicts.
    """

    images: int
    dense: float
    refitted: float
    recovered: float
    refitted_agreement: float
    recovered_agreement: float


@torch.inference_mode()
def measure(networks: Sequence[nn.Module], images: Images, normalize: Normalization, batch: int) -> Accuracy:
    """Run the dense, the refitted and the recovered network over all images."""
    rows: list[Tensor] = []
    for pixels, labels in images.batches(batch):
        inputs = normalize(pixels)
        predicted = torch.stack([network(inputs).argmax(1) for network in networks])
        rows.append(torch.cat([predicted == labels, predicted[1:] == predicted[0]]).double().sum(1))
    return Accuracy(images.count, *(torch.stack(rows).sum(0) / images.count).tolist())


def start(
    model: nn.Module, calibration: Tensor, request: Request, kept: Path | None
) -> tuple[fxprune.PrunePlan, nn.Module]:
    """Plan and refit, or take both from the file `kept`, which is written where it is absent."""
    if kept is not None and kept.exists():
        saved = torch.load(kept, weights_only=True)
        plan = fxprune.PrunePlan.from_json(saved["plan"])
        masked = fxprune.mask(model, plan)
        masked.load_state_dict(saved["state"])
        return plan, masked
    example = None if request.latency is None else (calibration[:TIMED_BATCH],)
    subject = Subject(model, example, calibration)
    plan, refitted = plan_for(subject, request)
    masked = masked_by(subject, plan) if refitted is None else refitted
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        state = {"plan": plan.to_json(), "state": masked.state_dict()}
        write_whole(kept, lambda partial: torch.save(state, partial))
    return plan, masked


def run(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One seed: what it reached, and what it took."""
    model, normalize = build(options.model, options.weights)
    model.eval()
    images, source = open_disjoint(options.data, options.calibration, options.calibration_images, seed)
    calibration = normalize(source.pixels())
    asked = {name: getattr(options, name) for name in ("ratio", "macs", "latency", "granularity")}
    if options.latency is not None:
        asked["target"] = "cpu"
    if options.granularity not in ("filter", BRANCH):
        asked |= {"groups": options.groups, "form": options.form}
    request = Request(**asked, ignore=left_out(model, options.only), seed=seed)
    plan, masked = start(model, calibration, request, options.refits and options.refits / f"{options.name}-{seed}.pt")
    began = time.process_time()
    autocast = torch.autocast("cpu", torch.bfloat16) if options.amp else nullcontext()
    limits = {name: getattr(options, name) for name in ("seconds", "steps", "augment")}
    with autocast:
        recovered = fxprune.recover(
            model, masked, plan, calibration, **limits, seed=seed, progress=sys.stderr.isatty()
        ).eval()
    took = time.process_time() - began
    done = getattr(recovered, RECOVERED)
    assert isinstance(done, Recovered)
    pruned = fxprune.rewrite(recovered, plan, calibration[:2])
    fxprune.verify(pruned, recovered, calibration[:2])
    reached = measure((model, masked.eval(), recovered), images.first(options.limit), normalize, options.batch)
    report = fxprune.report(pruned)
    assert report.macs_dense
    assert report.macs_pruned
    return {
        "seed": seed,
        "processor_seconds": took,
        "recovery": asdict(done),
        "accuracy": asdict(reached),
        "macs_share": report.macs_pruned / report.macs_dense,
        "parameters": report.params_pruned,
        "time_share": None if options.latency is None else time_share(pruned, model, calibration[:TIMED_BATCH]),
    }


def time_share(pruned: nn.Module, dense: nn.Module, inputs: Tensor) -> float:
    """What the pruned network takes of the time of the dense one, each accelerated."""
    return share_of_time(fxprune.accelerate(pruned, inputs), fxprune.accelerate(dense, inputs), (inputs,))


def table(runs: Sequence[dict[str, Any]]) -> str:
    """A row for each seed, and mean and standard deviation over the seeds."""
    names = ("dense", "refitted", "recovered", "refitted_agreement", "recovered_agreement")
    heads = ("dense", "refit", "recovered", "refit agrees", "recovered agrees", "steps", "loss", "processor s")
    lines = ["seed  " + "".join(f"{head:>18}" for head in heads)]
    for row in runs:
        shares = "".join(f"{row['accuracy'][name]:>18.2%}" for name in names)
        loss = f"{row['recovery']['before']:.4f}->{row['recovery']['after']:.4f}"
        lines.append(
            f"{row['seed']:<6}{shares}{row['recovery']['steps']:>18}{loss:>18}{row['processor_seconds']:>18.0f}"
        )
    if len(runs) > 1:
        for what, over in (("mean", statistics.mean), ("sd", statistics.stdev)):
            shares = "".join(f"{over([row['accuracy'][name] for row in runs]):>18.2%}" for name in names)
            lines.append(f"{what:<6}{shares}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    runs = []
    try:
        for seed in tqdm(options.seeds, desc="seeds", disable=not sys.stderr.isatty()):
            runs.append(run(options, seed))
            if options.output:
                own = ("macs", "latency", "granularity", "seconds", "steps", "augment", "amp")
                settings = settings_of(options) | {name: getattr(options, name) for name in own}
                write_json(options.output, {"environment": environment(), "settings": settings, "runs": runs})
    except (fxprune.FxpruneError, OSError, ValueError) as error:
        print(f"benchmarks.recovery: error: {error}", file=sys.stderr)
        return 2
    print(table(runs))
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    description = "Top-1 accuracy of a network: dense, refitted and recovered."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=description)
    add_options(parser)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--ratio", type=float, help="share of kernel groups, or filters, to prune")
    size.add_argument("--macs", type=float, metavar="SHARE", help="share of MACs to keep, instead of a ratio")
    size.add_argument(
        "--latency", type=float, metavar="SHARE", help=f"share of the time to keep, accelerated, batch {TIMED_BATCH}"
    )
    parser.add_argument(
        "--granularity", choices=(*GRANULARITIES, BRANCH, AUTO), default="kernel", help="default: %(default)s"
    )
    parser.add_argument("--seconds", type=float, help="of recovery")
    parser.add_argument("--steps", type=values.count, help="of recovery")
    parser.add_argument("--augment", choices=AUGMENTATIONS)
    parser.add_argument("--amp", choices=("bf16",), help="recover in bfloat16 where that suits (default: float32)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--refits", type=Path, metavar="DIR", help="keep plans and refits here for the next time")
    parser.add_argument("--name", default="refit", help="of their files (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.calibration is None:
        parser.error("--calibration is needed")
    return options


if __name__ == "__main__":
    sys.exit(main())
