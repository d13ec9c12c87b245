"""Options that several subcommands share, in groups: how each is asked for, and what is made of the answer."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from fxprune.cli import values
from fxprune.cli.output import shows_progress, warn
from fxprune.training.recipe import Recipe
from fxprune.vocabulary import (
    Amp,
    CriterionName,
    FormChoice,
    Method,
    Precision,
    RateSchedule,
    RuntimeName,
    Scope,
    Target,
    VarietyName,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

MODEL_HELP = (
    "a torchvision model, a timm model (timm:NAME), resnet20 and its like for CIFAR-10, or module:callable; "
    "NAME?classes=N for so many classes"
)
FILE_HELP = "a file that `fxprune compile -o` wrote"
DATA_HELP = "cifar10:DIR, cifar100:DIR, caltech101:DIR, folder:DIR, digits or MODULE:CALLABLE; photos with ?size=PIXELS"


def add_amounts(parser: argparse.ArgumentParser) -> None:
    """Add how much `fxprune.make_plan` is to prune, and of what, in two groups."""
    add = parser.add_argument_group("how much (budgets can be combined)").add_argument
    add("--ratio", type=float, help="share of kernel groups, or filters, to prune from each convolution (0.5)")
    add(
        "--macs",
        type=float,
        metavar="SHARE",
        help="instead: share of multiply-accumulates to keep, in (0, 1]; sensitive layers are pruned less",
    )
    add("--params", type=float, metavar="SHARE", help="share of parameters to keep, in (0, 1]")
    add(
        "--latency",
        type=float,
        metavar="SHARE",
        help="share of the time of the best dense form that may remain on --target, or in --runtime, in (0, 1]",
    )
    add = parser.add_argument_group("of what, and for what").add_argument
    add(
        "--granularity",
        type=values.granularity,
        metavar="kernel|filter|branch|auto|filter:R,kernel:R",
        help="prune kernels, so that convolutions become grouped (default), or whole filters, so that they become "
        "narrower, or whole residual branches; all of them, as divides a budget best, which like branches needs "
        "--calibration; or filters at one ratio, then kernels at another",
    )
    add("--ignore", action="append", default=[], metavar="PATTERN", help="modules to leave dense; may be repeated")
    add("--target", choices=get_args(Target), help="kind of device to plan groups and blocks for")
    add(
        "--runtime",
        choices=get_args(RuntimeName),
        help="what will compute the network: --latency is then of the best dense form in it (torch, onnxruntime, "
        "openvino)",
    )
    add(
        "--precision",
        choices=get_args(Precision),
        help="what --runtime will compute in, int8 (onnxruntime, openvino) or bfloat16 (openvino): --latency is then "
        "of the best dense form in it; what is written stays in float32, for quantize or accelerate(precision=)",
    )


def add_choices(parser: argparse.ArgumentParser) -> None:
    """Add by what `fxprune.make_plan` is to choose kernels and filters, in a group of its own."""
    add = parser.add_argument_group("how kernels and filters are chosen (the defaults are the best known)").add_argument
    add("--groups", type=values.groups, default="auto", metavar="N|auto", help="groups per convolution")
    add("--form", choices=get_args(FormChoice), default="auto", help="default: %(default)s")
    add(
        "--block",
        type=int,
        metavar="N",
        help="keep input channels in aligned blocks of N, for wide loads (default: 16 for target cuda, else 1)",
    )
    add(
        "--share-groups",
        action=argparse.BooleanOptionalAction,
        help="group the filters of all layers that write the same channels alike, which saves gathers "
        "(default: with --target)",
    )
    add(
        "--scope",
        choices=get_args(Scope),
        help="filters: the same share of each layer, or all ranked together (default: local; for a budget with "
        "calibration data what does better on held-out data)",
    )
    add(
        "--round-to",
        type=int,
        metavar="N",
        help="filters: keep a multiple of N in each layer (default: 4, and 1 where there are fewer than 16)",
    )
    add("--method", default="auto", help=f"how kernels are chosen: {values.either(Method)} (default: %(default)s)")
    add(
        "--criterion",
        help=f"what a filter is worth, or a kernel of method cocluster: {values.either(CriterionName)}; a filter also "
        "by reconstruction, the default with calibration data (else l2)",
    )
    add("--variety", help=f"make the criterion keep rare kernels or filters: {values.either(VarietyName)}")
    add(
        "--snapshots",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="state dicts from earlier in the same training run, oldest first; for method tmi and some criteria",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what a model by name needs to be built and run."""
    group = parser.add_argument_group("model")
    add_weights(group)
    add_size(group)
    group.add_argument("--seed", type=int, default=0, help="of random weights and of the plan (default: %(default)s)")


def add_weights(group: argparse._ArgumentGroup) -> None:
    """Add which weights a model by name has."""
    weights = group.add_mutually_exclusive_group()
    weights.add_argument(
        "--weights",
        type=Path,
        metavar="FILE|NAME",
        help="weights of MODEL: a checkpoint as training scripts leave it, safetensors, or published ones by name: "
        "DEFAULT (default: random)",
    )
    weights.add_argument(
        "--pretrained",
        action="store_const",
        const=Path("DEFAULT"),
        dest="weights",
        help="the same as --weights DEFAULT",
    )


def add_size(parser: argparse._ActionsContainer) -> None:
    """Add how large inputs are, to a parser or to a group of it."""
    parser.add_argument(
        "--size",
        "--input-size",
        type=values.size,
        metavar="PIXELS|N,C,H,W",
        help="height and width of the inputs, or their whole shape (default: the model's own, else 2,3,224,224)",
    )


def add_training_options(parser: argparse.ArgumentParser, epochs_needed: bool = True) -> None:
    """Add how to train, in a group of its own. What is not given is None, for `training_of`."""
    add = parser.add_argument_group("training (default: the fine-tuning of TMI-GKP)").add_argument
    add("--epochs", type=int, required=epochs_needed)
    add("--lr", type=float, help=f"largest learning rate (default: {Recipe.lr})")
    add("--batch", type=int, help=f"images of one step, over all processes (default: {Recipe.batch})")
    add("--momentum", type=float, help=f"default: {Recipe.momentum}")
    add("--weight-decay", type=float, help=f"default: {Recipe.weight_decay}")
    add("--nesterov", action="store_true", default=None)
    add("--schedule", choices=get_args(RateSchedule), help=f"default: {Recipe.schedule}")
    add("--warmup", type=int, metavar="EPOCHS", help=f"default: {Recipe.warmup}")
    add("--label-smoothing", type=float, help=f"default: {Recipe.label_smoothing}")
    add(
        "--distill", type=values.distillation, metavar="WEIGHT:TEMPERATURE",
        help="learn from the dense network too, such as 0.5:4",
    )  # fmt: skip
    add("--amp", choices=get_args(Amp), help="compute forward in this type (default: float32)")
    add("--channels-last", action="store_true", help="lay images and weights out with the channels innermost")


def add_gathers(parser: argparse.ArgumentParser) -> None:
    """Add whether the report goes on to the gathers."""
    parser.add_argument("--gathers", action="store_true", help="list the gathers that remain, and why")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add how the result is shown."""
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def is_named(name: str) -> bool:
    """Whether a model is one of a library, whose weights are random unless it is said; a function has its own."""
    return ":" not in name or name.startswith("timm:")


def has_random_weights(options: argparse.Namespace) -> bool:
    """Whether nobody said which weights the model of a library has."""
    return options.weights is None and is_named(options.model)


def warn_of_random_weights(options: argparse.Namespace) -> None:
    """Say before the work that what comes of it means nothing."""
    if has_random_weights(options):
        warn(f"{options.model} has random weights, so what is pruned means nothing; --weights FILE or --pretrained")


def model_of(name: str, options: argparse.Namespace) -> nn.Module:
    """The model of this name, as the options want it."""
    from fxprune.models import load_model

    return load_model(name, options.weights, options.seed)


def inputs_of(model: nn.Module, options: argparse.Namespace, calibration: Tensor | None = None) -> tuple[Tensor]:
    """Example inputs: of the size asked for, else some of the calibration, else of the usual size."""
    from fxprune.models import example_inputs

    if calibration is not None and options.size is None:
        return (calibration[:2],)
    return example_inputs(size_of(model, options), options.seed)


def size_of(model: nn.Module, options: argparse.Namespace) -> tuple[int, ...]:
    """The shape of a batch of inputs: as asked for, else the model's own."""
    from fxprune.models import default_input_size

    asked: tuple[int, ...] | None = options.size
    usual = default_input_size(model)
    if asked is None:
        return usual
    return (*usual[:-2], *asked * 2) if len(asked) == 1 else asked


def take_size(options: argparse.Namespace, network: nn.Module, model: nn.Module) -> None:
    """Where no size is asked for, ask for that of the images with which `network` was compiled, if it was with images
    alone, and of another size than is usual for `model`.
    """
    from torch import Tensor

    from fxprune.exact.record import find_record

    record = find_record(network)
    match () if record is None or options.size else record.inputs:
        case [Tensor(shape=shape)] if len(shape) == 4 and shape[-2:] != size_of(model, options)[-2:]:
            options.size = tuple(shape)


def pruning_of(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `fxprune.make_plan`; what was not asked for is left to its defaults."""
    amounts = ("ratio", "macs", "params", "latency", "granularity", "scope", "round_to")
    chosen = ("groups", "form", "block", "share_groups", "method", "criterion", "variety", "snapshots", "ignore")
    names = (*amounts, *chosen, "target", "runtime", "precision")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    return given | {"seed": options.seed, "progress": shows_progress(options)}


def training_of(options: argparse.Namespace, usual: Recipe | None = None) -> Recipe:
    """How to train: as was asked for, and else as usual, or as `Recipe` says.

    Raises:
        RecipeError: a value is out of its range.
    """
    names = [name for name in (field.name for field in fields(Recipe)) if not name.startswith("distill_")]
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.distill is not None:
        given["distill_weight"], given["distill_temperature"] = options.distill
    return Recipe(**given) if usual is None else replace(usual, **given)


def device_of(options: argparse.Namespace) -> str:
    """The device asked for; without, CUDA where there is one."""
    import torch

    asked: str | None = options.device
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def refuse(options: argparse.Namespace, error: Exception) -> NoReturn:
    """End as argparse does where options do not go together: usage and message on stderr, exit code 2."""
    options.error(str(error))
    raise error
