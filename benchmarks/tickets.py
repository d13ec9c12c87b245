r"""Are there lottery tickets, and does filter variety find better ones?

    python -m benchmarks.tickets --model digits_resnet --data digits --hold-out 1000 --seeds 0,1,2,3,4 --epochs 8 \
        --rewind-epoch 1 --shares 0.5,0.25 --criteria l1,movement --varieties none,pairs,pairs-pure --output FILE.json
    python -m benchmarks.tickets --model resnet20 --data cifar10:DIR --train-images 10000 --epochs 10 ...

For each seed the dense network is trained from scratch for E epochs, and its weights of epoch R are kept. On the
trained weights each criterion, with each variety, plans what to remove, at equal numbers of filters (or kernels) in
each layer; that they are equal is checked. What stays is trained for E - R epochs:

- *rewound*: from the weights of epoch R, with the images and learning rates of epochs R to E (Frankle et al. 2020). So
  is a *random ticket* of equal numbers.
- *rate-rewound*: from the trained weights, with the same images and learning rates (Renda et al. 2020). So is the
  dense network, which shows what the longer training is worth.
- *fine-tuned*: from the trained weights, with the same images, at the last learning rate.

A seed decides first weights, training images, their order and variation, and the random ticket: within a seed all
runs are paired. What counts is the accuracy after the last epoch on images that choose nothing; momentum begins at 0.

Equal plans are trained once. The record is written after each run, and the same command goes on where it was stopped;
seeds can be added.

Exit codes: 0 done, 2 an error, 130 stopped.
"""

import argparse
import contextlib
import copy
import io
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fxprune
from benchmarks._ticket_table import (
    DENSE,
    RANDOM,
    TRAINED,
    TRAININGS,
    Key,
    differences,
    means,
    table,
    ticket_name,
)
from fxprune.cli import values
from fxprune.comparison.layer_calls import count_macs
from fxprune.environment import environment
from fxprune.models import load_model
from fxprune.models.cifar import CIFAR_MODELS
from fxprune.models.digits import DIGITS_MODELS
from fxprune.training.checkpoints import CheckpointError, check_settings, write_text
from fxprune.training.data.augmentation import generator
from fxprune.training.data.pictures import NORMALIZATIONS
from fxprune.training.data.sources import Data, open_data
from fxprune.training.loop import EVALUATION_BATCH, Progress, Trainer
from fxprune.training.recipe import Recipe
from fxprune.training.run import check_fit
from fxprune.vocabulary import Granularity

DRAW = 3
"""What the generator of the training images of a seed is for, see `fxprune.training.data.augmentation`."""
SNAPSHOTS = ("movement", "magnitude_increase")
"""Criteria that look back; here to the weights to which tickets are rewound."""

Counts = dict[str, list[int]]
"""By layer: filters and input channels that go, then, of a grouped one, groups and channels that each of them keeps."""


@dataclass(frozen=True)
class Setting:
    """What all runs have in common.

    Attributes:
        model: name of the network.
        data: the images; those to validate with are tested with too.
        recipe: of the first training.
        rewind_epoch: to which weights go back.
        batch_norm: see `fxprune.rewind`.
        granularity: `"filter"` or `"kernel"`.
        criteria, varieties: what plans are made with; variety `"none"` is the criterion alone.
        shares: of the MACs that remain.
        train_images: how many a seed draws; None takes all.
    """

    model: str
    data: Data
    recipe: Recipe
    rewind_epoch: int
    batch_norm: str
    granularity: Granularity
    criteria: Sequence[str]
    varieties: Sequence[str]
    shares: Sequence[float]
    train_images: int | None

    @property
    def example(self) -> Tensor:
        """Two images, `(2, C, H, W)`."""
        return self.data.plain_batch(torch.arange(2))[0]

    def network(self, seed: int) -> nn.Module:
        """The network with its first weights."""
        return load_model(self.model, None, seed)

    def training(self, seed: int) -> Data:
        """The images to train with; none to validate with, for nothing is chosen."""
        drawn = torch.randperm(self.data.train_count, generator=generator(seed, DRAW))[: self.train_images]
        return replace(self.data, seed=seed, training=self.data.training[drawn], validation=self.data.validation[:0])

    def keys(self, seed: int) -> list[Key]:
        """All runs of a seed, in the order in which they are done."""
        tickets = [ticket_name(criterion, variety) for criterion in self.criteria for variety in self.varieties]
        arms = [(RANDOM, "rewound"), *itertools.product(tickets, TRAININGS)]
        first = [Key(seed, 1.0, DENSE, training) for training in (TRAINED, "rate-rewound")]
        return [*first, *(Key(seed, share, *arm) for share in self.shares for arm in arms)]


class Experiment:
    """The runs of one seed: trains the dense network, then whatever is asked for.

    Args:
        setting: what all seeds have in common.
        seed: see the module's docstring.

    Attributes:
        dense: the trained network.
        early: its weights of the epoch to rewind to.
    """

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting, self.seed = setting, seed
        self._data = setting.training(seed)
        self.early: dict[str, Tensor] = {}
        self.dense = setting.network(seed)
        self._train(self.dense, setting.recipe, 0, self._keep)

    def accuracy(self, key: Key, plans: Mapping[str, fxprune.PrunePlan]) -> float:
        """Make and train the network of a key, and test it; `plans` are those of its share, by ticket."""
        setting, recipe = self.setting, self.setting.recipe
        if key.training == TRAINED:
            return self._tested(self.dense)
        plan = plans.get(key.ticket)
        if plan is None:
            model = copy.deepcopy(self.dense)
        elif key.training == "rewound":
            model = fxprune.rewind(self.dense, plan, self.early, batch_norm=setting.batch_norm)  # type: ignore[arg-type]
        else:
            model = fxprune.mask(self.dense, plan)
        if key.training == "fine-tuned":
            steps = -(-self._data.train_count // recipe.batch)
            last = recipe.learning_rate(recipe.epochs * steps - 1, steps)
            recipe = replace(recipe, lr=last, schedule="constant")
        sparsifier = None if plan is None else fxprune.hold(model, plan)
        self._train(model, recipe, setting.rewind_epoch, lambda trainer: None, sparsifier)
        return self._tested(model)

    def plans(self, share: float) -> dict[str, fxprune.PrunePlan]:
        """The plan of each ticket at a share of the MACs, that of the random one too.

        Raises:
            PlanError: one of them cannot be made, or two have different counts.
        """
        setting, plans = self.setting, {}
        for criterion, variety in itertools.product(setting.criteria, setting.varieties):
            plans[ticket_name(criterion, variety)] = fxprune.make_plan(
                self.dense,
                macs=share,
                granularity=setting.granularity,
                criterion=criterion,  # type: ignore[arg-type]
                variety=None if variety == "none" else variety,  # type: ignore[arg-type]
                snapshots=[self.early] if criterion in SNAPSHOTS else None,
                example_inputs=setting.example,
                seed=self.seed,
            )
        first = next(iter(plans.values()))
        plans[RANDOM] = fxprune.random_ticket(self.dense, first, self.seed, setting.example)
        check_counts(plans)
        return plans

    def reached(self, plan: fxprune.PrunePlan) -> float:
        """The share of the MACs that remains in the rewritten network."""
        example = self.setting.example
        small = fxprune.rewrite(fxprune.mask(self.dense, plan).eval(), plan, example)
        return count_macs(small, example) / count_macs(self.dense, example)

    def _keep(self, trainer: Trainer) -> None:
        if trainer.progress.epoch == self.setting.rewind_epoch:
            self.early = copy.deepcopy(trainer.model.state_dict())

    def _train(
        self,
        model: nn.Module,
        recipe: Recipe,
        first: int,
        saved: Callable[[Trainer], None],
        sparsifier: fxprune.Sparsifier | None = None,
    ) -> None:
        """Train in place from epoch `first` to the last of `recipe`."""
        trainer = Trainer(model, self._data, recipe, seed=self.seed, sparsifier=sparsifier)
        trainer.progress = Progress(epoch=first)
        with contextlib.redirect_stdout(io.StringIO()):  # an epoch is nothing to report among hundreds
            trainer.run(lambda: saved(trainer), progress=sys.stderr.isatty())

    def _tested(self, model: nn.Module) -> float:
        """Accuracy on all images that are not there to be trained with."""
        data = self.setting.data
        batches = itertools.chain(data.validation_batches(EVALUATION_BATCH), data.test_batches(EVALUATION_BATCH))
        model.eval()
        with torch.inference_mode():
            hits = [(model(images).argmax(1) == labels) for images, labels in batches]
        return float(torch.cat(hits).double().mean())


def counts_of(plan: fxprune.PrunePlan) -> Counts:
    """How much a plan removes of each layer."""
    counts: Counts = {
        name: [len(channels.outputs), len(channels.inputs)] for name, channels in sorted(plan.removed.items())
    }
    for name, kernels in sorted(plan.layers.items()):
        counts[name] = [*counts.get(name, (0, 0)), kernels.groups, kernels.kept_channels]
    return counts


def check_counts(plans: Mapping[str, fxprune.PrunePlan]) -> Counts:
    """See that all plans remove as much of each layer as the first one; return the counts.

    Raises:
        PlanError: one does not.
    """
    (first, plan), *others = plans.items()
    counts = counts_of(plan)
    for name, other in others:
        found = counts_of(other)
        for layer in {**counts, **found}:
            if counts.get(layer) != found.get(layer):
                raise fxprune.PlanError(
                    f"{layer}: {name} removes {found.get(layer)}, {first} {counts.get(layer)}; tickets can only be "
                    "compared at equal counts, leave one out"
                )
    return counts


def first_alike(plans: Mapping[str, fxprune.PrunePlan], ticket: str) -> str:
    """The first ticket whose plan removes the same: where nothing is redundant, variety changes nothing."""

    def removes(plan: fxprune.PrunePlan) -> object:
        return (
            {name: (channels.outputs, channels.inputs) for name, channels in plan.removed.items()},
            {name: (kernels.out_order, kernels.kept) for name, kernels in plan.layers.items()},
        )

    return next((name for name in plans if removes(plans[name]) == removes(plans[ticket])), ticket)


def redundancy_of(plan: fxprune.PrunePlan) -> float | None:
    """The mean share of filters (or kernels) that resemble another of their layer; None if the plan did not look."""
    shares = [channels.redundancy for channels in plan.removed.values()]
    shares += [kernels.redundancy for kernels in plan.layers.values()]
    found = [share for share in shares if share is not None]
    return mean(found) if found else None


def run(setting: Setting, seeds: Sequence[int], record: dict[str, Any], save: Callable[[], None], bar: Any) -> None:
    """Do all runs that `record` has not yet, and add them to it; `save` is called after each.

    Raises:
        FxpruneError: a plan cannot be made, a training diverges, or an image is damaged.
    """
    done = accuracies_of(record)
    for seed in seeds:
        todo = [key for key in setting.keys(seed) if key not in done]
        bar.update(len(setting.keys(seed)) - len(todo))
        if not todo:
            continue
        experiment = Experiment(setting, seed)
        plans: dict[float, dict[str, fxprune.PrunePlan]] = {1.0: {}}
        for key in todo:
            if key.share not in plans:
                plans[key.share] = experiment.plans(key.share)
                first = next(iter(plans[key.share].values()))
                record["plans"][f"{seed} {key.share:g}"] = {
                    "macs_share": experiment.reached(first),
                    "counts": check_counts(plans[key.share]),
                    "redundancy": {ticket: redundancy_of(plan) for ticket, plan in plans[key.share].items()},
                }
            began = time.perf_counter()
            twin = key._replace(ticket=first_alike(plans[key.share], key.ticket))
            done[key] = done[twin] if twin in done else experiment.accuracy(key, plans[key.share])
            seconds = round(time.perf_counter() - began, 3)
            record["runs"].append({**key._asdict(), "as": twin.ticket, "accuracy": done[key], "seconds": seconds})
            save()
            bar.update()


def accuracies_of(record: Mapping[str, Any]) -> dict[Key, float]:
    """The runs of a record."""
    return {Key(*(row[name] for name in Key._fields)): row["accuracy"] for row in record["runs"]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is not done yet, write the record, print the tables; return the exit code."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        setting = _setting(options)
        record = _open_record(options.output, settings_of(setting, options))

        def save() -> None:
            known = accuracies_of(record)
            record["means"] = [
                dict(zip(("share", "ticket", "training"), group, strict=True)) | asdict(value)
                for group, value in means(known).items()
            ]
            record["differences"] = [
                asdict(row) | {"clear": row.clear} for row in differences(known, setting.criteria, setting.varieties)
            ]
            write_text(options.output, json.dumps(record, indent=1) + "\n")

        total = sum(len(setting.keys(seed)) for seed in options.seeds)
        with tqdm(total=total, unit="run", disable=not sys.stderr.isatty()) as bar:
            run(setting, options.seeds, record, save, bar)
    except KeyboardInterrupt:
        print("benchmarks.tickets: stopped; the same command goes on with the run that it was in", file=sys.stderr)
        return 130
    except (fxprune.FxpruneError, OSError, ValueError) as error:
        print(f"benchmarks.tickets: error: {error}", file=sys.stderr)
        return 2
    print(table(accuracies_of(record), setting.criteria, setting.varieties))
    return 0


def settings_of(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """What decides the result of a run, beside its key; a record goes on with the same alone."""
    return {
        "model": setting.model,
        "data": setting.data.name,
        "train_images": setting.train_images,
        "hold_out": options.hold_out,
        "tested": setting.data.validation_count + setting.data.test_count,
        **asdict(setting.recipe),
        "rewind_epoch": setting.rewind_epoch,
        "batch_norm": setting.batch_norm,
        "granularity": setting.granularity,
    }


def _open_record(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The record to go on with, or a new one.

    Raises:
        CheckpointError: the file is damaged, or of other settings.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return {"environment": environment(), "settings": dict(settings), "plans": {}, "runs": []}
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        accuracies_of(record)
        saved = record["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: is no record of tickets ({error}); choose another --output") from error
    check_settings(path, saved, settings)
    return record


def _setting(options: argparse.Namespace) -> Setting:
    data = open_data(options.data, validation=options.hold_out, normalize=NORMALIZATIONS.get(options.model))
    if options.train_images is not None and options.train_images > data.train_count:
        raise ValueError(f"--train-images {options.train_images}: there are {data.train_count} training images")
    setting = Setting(
        options.model,
        data,
        Recipe(epochs=options.epochs, lr=options.lr, batch=options.batch),
        options.rewind_epoch,
        options.batch_norm,
        options.granularity,
        options.criteria,
        options.varieties,
        options.shares,
        options.train_images,
    )
    check_fit(setting.network(0), setting.example, data.classes, options.model)
    return setting


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tickets", description=__doc__.partition("\n\n")[0].lstrip("r")
    )
    add = parser.add_argument
    names = ", ".join([*DIGITS_MODELS, *CIFAR_MODELS])
    add("--model", default="digits_resnet", help=f"{names}, or a name for `fxprune compile` (default: %(default)s)")
    add("--data", required=True, metavar="SOURCE", help="digits, cifar10:DIR, folder:DIR or folder:DIR?size=PIXELS")
    add("--output", type=Path, required=True, metavar="FILE", help="the record, JSON")
    add("--train-images", type=values.count, metavar="N", help="train with so many, drawn by the seed (default: all)")
    add("--hold-out", type=int, default=0, metavar="N", help="training images to test with as well (default: none)")
    add("--seeds", type=values.seeds, default=[0, 1, 2], metavar="S,S,...", help="default: 0,1,2")
    add("--epochs", type=values.count, required=True, metavar="E", help="of the first training")
    add("--rewind-epoch", type=int, default=0, metavar="R", help="keep the weights of this epoch (default: 0, first)")
    add("--batch-norm", choices=("reset", "rewind"), default="reset", help="of rewound networks (%(default)s)")
    add("--shares", type=_shares, default=[0.5, 0.25], metavar="S,S,...", help="of MACs that remain (0.5,0.25)")
    add("--granularity", choices=("filter", "kernel"), default="filter", help="what is removed (%(default)s)")
    add("--criteria", type=_names, default=["l1", "movement"], metavar="C,C,...", help="default: l1,movement")
    add(
        "--varieties", type=_names, default=["none", "pairs", "pairs-pure"], metavar="V,V,...",
        help="default: none,pairs,pairs-pure; none is the criterion alone",
    )  # fmt: skip
    add("--lr", type=float, default=0.1, help="first learning rate, a tenth after each third (default: %(default)s)")
    add("--batch", type=values.count, default=64, help="images of one step (default: %(default)s)")
    add("--threads", type=values.count, help="of torch (default: its own choice)")
    options = parser.parse_args(arguments)
    if not 0 <= options.rewind_epoch < options.epochs:
        parser.error(f"--rewind-epoch {options.rewind_epoch}: must be from 0 to {options.epochs - 1}, before the last")
    return options


def _names(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r}: an empty name; give names with commas between")
    return names


def _shares(text: str) -> list[float]:
    try:
        shares = sorted({float(part) for part in text.split(",")}, reverse=True)
    except ValueError:
        shares = [0.0]
    if not all(0 < share < 1 for share in shares):
        raise argparse.ArgumentTypeError(f"{text!r} are no shares of MACs; give numbers between 0 and 1, as in 0.5,0.3")
    return shares


if __name__ == "__main__":
    sys.exit(main())
