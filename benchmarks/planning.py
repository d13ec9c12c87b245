r"""Which choice of kernels, and which refit, keeps the accuracy? All at one structure, on the same real images.

    python -m benchmarks.planning --model resnet20 --weights resnet20.th --data cifar10:DIR \
        --calibration cifar10-train:DIR --ratio 0.5 --groups 8 --seeds 0,1,2 --output planning_resnet20.json

Nothing is fine-tuned. A seed draws the images to calibrate with and is the seed of the plan.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

import fxprune
from benchmarks._images import Images
from benchmarks.accuracy import add_options, build, open_sources, settings_of
from fxprune.calibration.batches import read_batches
from fxprune.calibration.following import Following
from fxprune.calibration.refitting import reconstruct
from fxprune.cli import values
from fxprune.environment import environment
from fxprune.files import write_json
from fxprune.graph.tracing import trace
from fxprune.planning import Request
from fxprune.planning.patterns import left_out
from fxprune.planning.planner import Planner
from fxprune.plans.shapes import Shape
from fxprune.training.data.pictures import Normalization

Refit = Callable[[nn.Module, Tensor, Mapping[str, Any]], fx.GraphModule]
"""Compiles a model, given images to calibrate with and options of `fxprune.make_plan`."""


def without_refit(model: nn.Module, calibration: Tensor, options: Mapping[str, Any]) -> fx.GraphModule:
    """Mask only: the calibration images give shapes and nothing else."""
    return fxprune.compile(model, example_inputs=calibration[:2], verify=False, **options)


def plain_refit(model: nn.Module, calibration: Tensor, options: Mapping[str, Any]) -> fx.GraphModule:
    """Plan from the weights, then least squares toward the outputs of each dense convolution, whatever follows it."""
    example = calibration[:2]
    plan = fxprune.make_plan(model, example_inputs=example, **options)
    masked = fxprune.mask(model, plan)
    reconstruct(
        trace(model, example).module,
        trace(masked, example).module,
        read_batches(calibration),
        plan.layers,
        lambda name, conv, samples: plan.layers[name],
        follow=lambda gm, node: Following(),
        seed=plan.seed,
    )
    return fxprune.rewrite(masked, plan, example)


def full_refit(model: nn.Module, calibration: Tensor, options: Mapping[str, Any]) -> fx.GraphModule:
    """What `fxprune.compile` does with calibration images."""
    return fxprune.compile(model, calibration=calibration, verify=False, **options)


@dataclass(frozen=True)
class Variant:
    """One way to choose and refit kernels.

    Attributes:
        name: on the command line and in the record.
        refit: how the kept weights are solved.
        options: of `fxprune.make_plan`.
        snapshots: whether it looks at earlier states of the training run.
    """

    name: str
    refit: Refit
    options: Mapping[str, str] = field(default_factory=dict)
    snapshots: bool = False


VARIANTS = (
    Variant("masks", without_refit, {"criterion": "l2"}),
    Variant("plain", plain_refit, {"criterion": "l2"}),
    Variant("l2", full_refit, {"criterion": "l2"}),
    Variant("activation", full_refit, {"criterion": "activation"}),
    Variant("variety-soft", full_refit, {"criterion": "l2", "variety": "soft"}),
    Variant("variety-pairs", full_refit, {"criterion": "l2", "variety": "pairs"}),
    Variant("random", full_refit, {"criterion": "random"}),
    Variant("tmi", full_refit, {"method": "tmi"}, snapshots=True),
    Variant("srgkp", full_refit, {"method": "srgkp"}),
    Variant("reconstruction", full_refit, {"method": "reconstruction"}),
)
"""All but the first two are refitted in full."""


@dataclass(frozen=True)
class Run:
    """One network.

    Attributes:
        variant: name of the variant, or `"dense"`.
        seed: of the calibration images and of the plan.
        images: how many were evaluated.
        accuracy: top-1, in [0, 1].
        agreement: share of the images on which it predicts the class that the dense network predicts.
        seconds: from the dense network to the compiled one.
    """

    variant: str
    seed: int
    images: int
    accuracy: float
    agreement: float
    seconds: float


def options_of(variant: Variant, structure: Mapping[str, Any], snapshots: object, seed: int) -> dict[str, Any]:
    """Arguments of `fxprune.make_plan` beside the model and the images."""
    return {**structure, **variant.options, "seed": seed} | ({"snapshots": snapshots} if variant.snapshots else {})


def check_structure(
    variants: Collection[Variant], model: nn.Module, structure: Mapping[str, Any], snapshots: object = None
) -> dict[str, Shape]:
    """See that all variants give the same convolutions the same groups and numbers of channels; return these.

    Raises:
        PlanError: they do not, or one of them cannot be planned.
    """
    first: tuple[str, dict[str, Shape]] | None = None
    for variant in variants:
        options = options_of(variant, structure, snapshots, 0)
        try:
            shapes = Planner(model, Request(**options), calibrated=True).shapes
        except fxprune.PlanError as error:
            raise fxprune.PlanError(f"{variant.name}: {error}; --variants leaves it out") from error
        first = first or (variant.name, shapes)
        for name in sorted(shapes.keys() | first[1].keys()):
            here, there = shapes.get(name), first[1].get(name)
            if here != there:
                raise fxprune.PlanError(
                    f"{name}: {variant.name} plans {_words(here)}, {first[0]} {_words(there)}; to compare them at one "
                    "structure give --groups N --form overlap, or leave one out with --variants"
                )
    assert first is not None
    return first[1]


def _words(shape: Shape | None) -> str:
    return "nothing" if shape is None else f"{shape.groups} groups of {shape.kept} channels ({shape.form})"


def runs(
    variants: Collection[Variant],
    model: nn.Module,
    sources: Callable[[int], tuple[Images, Images]],
    normalize: Normalization,
    structure: Mapping[str, Any],
    seeds: Sequence[int],
    snapshots: object = None,
    batch: int = 100,
) -> Iterator[Run]:
    """Compile and evaluate every variant with every seed, and the dense model with every seed for comparison.

    Args:
        variants: what to compare.
        model: the dense network, in evaluation mode.
        sources: gives for a seed the images to evaluate on and those to calibrate with.
        normalize: how the inputs of the model are normalized.
        structure: options of `fxprune.make_plan` that all share: ratio, groups, form, ignore.
        seeds: one run of each variant for each.
        snapshots: see `fxprune.compile`; for the variants that want them.
        batch: images evaluated at a time.
    """
    for seed in seeds:
        images, source = sources(seed)
        calibration = normalize(source.pixels())
        truth = torch.cat([labels for _, labels in images.batches(batch)])
        dense = predict(model, images, normalize, batch)
        yield Run("dense", seed, len(truth), _share(dense, truth), 1.0, 0.0)
        for variant in variants:
            began = time.perf_counter()
            compiled = variant.refit(model, calibration, options_of(variant, structure, snapshots, seed))
            seconds = time.perf_counter() - began
            found = predict(compiled.eval(), images, normalize, batch)
            yield Run(variant.name, seed, len(truth), _share(found, truth), _share(found, dense), seconds)


@torch.inference_mode()
def predict(network: nn.Module, images: Images, normalize: Normalization, batch: int = 100) -> Tensor:
    """The class that `network` predicts for each image, `(N,)`."""
    return torch.cat([network(normalize(pixels)).argmax(1) for pixels, _ in images.batches(batch)])


def _share(a: Tensor, b: Tensor) -> float:
    return float((a == b).double().mean())


@dataclass(frozen=True)
class Summary:
    """A variant over its seeds: means, and the standard deviation of the accuracy (None of a single seed)."""

    variant: str
    accuracy: float
    deviation: float | None
    agreement: float
    seconds: float


def summarize(found: Collection[Run]) -> list[Summary]:
    """One summary for each variant, in the order of the runs."""
    summaries = []
    for name in dict.fromkeys(run.variant for run in found):
        mine = [run for run in found if run.variant == name]
        accuracy = [run.accuracy for run in mine]
        summaries.append(
            Summary(
                name,
                statistics.mean(accuracy),
                statistics.stdev(accuracy) if len(mine) > 1 else None,
                statistics.mean(run.agreement for run in mine),
                statistics.mean(run.seconds for run in mine),
            )
        )
    return summaries


def table(summaries: Collection[Summary]) -> str:
    """The summaries as text, one a line."""
    lines = [f"{'variant':<16}{'top-1':>9}{'deviation':>11}{'as dense':>10}{'seconds':>9}"]
    for row in summaries:
        deviation = "-" if row.deviation is None else f"{row.deviation:.2%}"
        lines.append(
            f"{row.variant:<16}{row.accuracy:>9.2%}{deviation:>11}{row.agreement:>10.2%}"
            + ("" if row.variant == "dense" else f"{row.seconds:>9.1f}")
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison, print the table, write the record after every network."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = settings_of(options) | {"seeds": options.seeds, "variants": [v.name for v in options.variants]}
    where, found = environment(), list[Run]()
    try:
        model, normalize = build(options.model, options.weights)
        structure = {name: getattr(options, name) for name in ("ratio", "groups", "form")}
        structure["ignore"] = left_out(model, options.only)
        shapes = check_structure(options.variants, model, structure, options.snapshots)
        settings["convolutions"] = len(shapes)
        total = len(options.seeds) * (1 + len(options.variants))
        todo = runs(
            options.variants,
            model,
            lambda seed: _sources(options, seed),
            normalize,
            structure,
            options.seeds,
            options.snapshots,
            options.batch,
        )
        for run in tqdm(todo, total=total, unit="network", disable=not sys.stderr.isatty()):
            found.append(run)
            if options.output:
                rows = [asdict(row) for row in summarize(found)], [asdict(row) for row in found]
                record = {"environment": where, "settings": settings, "summary": rows[0], "runs": rows[1]}
                write_json(options.output, record)
    except (fxprune.FxpruneError, OSError, ValueError) as error:
        print(f"benchmarks.planning: error: {error}", file=sys.stderr)
        return 2
    print(", ".join(f"{name} {value}" for name, value in settings.items() if value is not None))
    print(table(summarize(found)))
    return 0


def _sources(options: argparse.Namespace, seed: int) -> tuple[Images, Images]:
    images, calibration = open_sources(options, seed)
    assert calibration is not None
    return images, calibration


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    description = "Accuracy of methods, criteria and refits at one structure, on real images, without fine-tuning."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planning", description=description)
    add_options(parser)
    parser.add_argument("--ratio", type=float, default=0.5, help="share of kernel groups to prune (%(default)s)")
    parser.add_argument("--seeds", type=values.seeds, default=[0], metavar="S,S,...", help="default: 0")
    names = ",".join(variant.name for variant in VARIANTS)
    parser.add_argument(
        "--variants", metavar="V,V,...", help=f"some of {names} (default: all, those that need snapshots if given)"
    )
    # The published methods have one form only.
    parser.set_defaults(groups=8, form="overlap")
    options = parser.parse_args(arguments)
    if options.calibration is None:
        parser.error("--calibration is needed: the refits work on images")
    try:
        options.variants = choose_variants(options.variants, options.snapshots is not None)
    except ValueError as error:
        parser.error(str(error))
    return options


def choose_variants(names: str | None, snapshots: bool) -> list[Variant]:
    """The variants of these names, or all that can be run.

    Raises:
        ValueError: there is no such variant.
    """
    if names is None:
        return [variant for variant in VARIANTS if snapshots or not variant.snapshots]
    known = {variant.name: variant for variant in VARIANTS}
    for name in names.split(","):
        if name not in known:
            raise ValueError(f"--variants: there is no {name!r}; choose from {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names.split(","))]


if __name__ == "__main__":
    sys.exit(main())
