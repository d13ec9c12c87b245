r"""Which pruning is worth it? Accuracy against MACs and against measured time, of several pruners on one network.

    python -m benchmarks.compare --model resnet56 --weights resnet56.th --data cifar10:DIR --shares 0.57,0.4 \
        --seeds 0,1,2 --epochs 1 --train-images 10000 --output runs/resnet56
    python -m benchmarks.compare ... --latency-only

All methods begin with the same weights and are fine-tuned by the same recipe for as many epochs; a seed draws the
images to calibrate with, those to train with, and their batches, alike for every method. What counts is the network
after the last epoch. Test images are looked at before and after fine-tuning and choose nothing; to choose a recipe,
`--evaluate validation` looks at images that are held back from the training images.

A run that is done is a file in DIR/runs; the same command goes on where it was stopped, and other methods, shares and
seeds can be added. `--latency-only` times one network of each method and share that is done, all in one race: on a
machine that does nothing else. Each time DIR gets `comparison.json`, `comparison.md`, `comparison.png` and
`comparison.svg`.

Exit codes: 0 done, 1 a method failed, 2 an error, 130 stopped.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fxprune
from benchmarks._augmentation import generator
from benchmarks._checkpoint import CheckpointError, check_settings, fingerprint, write_text
from benchmarks._data import Data, open_data
from benchmarks._distributed import Group
from benchmarks._environment import environment
from benchmarks._fronts import Point, Run, draw, points_of, table
from benchmarks._layer_calls import count_macs
from benchmarks._methods import DENSE, METHODS, Case, Method, Pruned
from benchmarks._recipe import Recipe
from benchmarks._rivals import Network, dense_network
from benchmarks._training import EVALUATION_BATCH, Trainer, TrainingError
from benchmarks.accuracy import CIFAR_MODELS, _count, build
from benchmarks.latency import _fraction, _list_of, _tuned_cudnn, measure
from benchmarks.planning import _seeds
from benchmarks.train import _add_recipe, _check_fit

DRAW = 2
"""What the generator of the images of a seed is for, see `benchmarks._augmentation`."""
RUNTIME = {"cpu": "accelerate", "cuda": "accelerate+cudagraph"}
"""What times the networks, by device; see `benchmarks._rivals`."""
FAILURES = (
    fxprune.PlanError,
    fxprune.CalibrationError,
    fxprune.TraceError,
    fxprune.PassError,
    fxprune.VerificationError,
    TrainingError,
)
"""What may befall one run and leaves the others worth having."""


class Entry(NamedTuple):
    """A run that is wanted, in the order in which they are done: a seed of all methods first."""

    seed: int
    share: float
    method: str

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.method}-{self.share:g}-{self.seed}"


@dataclass(frozen=True)
class Setting:
    """What all runs have in common.

    Attributes:
        model: the dense network, in evaluation mode, on the CPU.
        data: the images.
        recipe, amp, channels_last: of fine-tuning, see `Trainer`.
        device: to train on.
        train_images, calibration_images: how many a seed draws; None takes all.
        snapshots: see `Case`.
        plan_seed: plan once, with the images that this seed draws, for all seeds of fine-tuning; None: each plans.
        evaluate: `"test"` or `"validation"`, which images accuracy is that of.
    """

    model: nn.Module
    data: Data
    recipe: Recipe
    amp: str | None
    channels_last: bool
    device: str
    train_images: int | None
    calibration_images: int
    snapshots: Sequence[Path]
    plan_seed: int | None
    evaluate: str

    def drawn(self, seed: int) -> Tensor:
        """Positions of all training images in the order in which `seed` draws them."""
        return torch.randperm(self.data.train_count, generator=generator(seed, DRAW))

    def case(self, seed: int, share: float) -> Case:
        """What the methods are given."""
        seed = seed if self.plan_seed is None else self.plan_seed
        images, labels = self.data.plain_batch(self.drawn(seed)[: self.calibration_images])
        return Case(self.model, share, images, labels, seed, self.snapshots)

    def training(self, seed: int) -> Data:
        """The images to train with; none to validate with, for nothing is chosen."""
        chosen = self.data.training[self.drawn(seed)[: self.train_images]]
        return replace(self.data, seed=seed, training=chosen, validation=self.data.validation[:0])

    def evaluation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The images to evaluate on."""
        if self.evaluate == "test":
            return self.data.test_batches(EVALUATION_BATCH)
        return self.data.validation_batches(EVALUATION_BATCH)


def run(
    setting: Setting, method: Method, share: float, seed: int, before_training: tuple[Pruned, float] | None = None
) -> tuple[Run, Pruned, float]:
    """Prune, fine-tune and evaluate one network.

    Args:
        setting: what all runs have in common.
        method: the pruner.
        share: of the MACs that is to remain.
        seed: of this run.
        before_training: what the method made of this case before, and in how many seconds; pruned now if absent.

    Returns:
        The run, and what was pruned in how many seconds; it is not trained.

    Raises:
        FxpruneError: one of `FAILURES`, or a damaged image.
    """
    case = setting.case(seed, share)
    if before_training is None:
        began = time.perf_counter()
        pruned = method.prune(case)
        before_training = pruned, time.perf_counter() - began
    pruned, prune_seconds = before_training
    trained, sparsifier = copy.deepcopy(pruned.network), None
    if pruned.plan is not None and pruned.plan.layers:  # dense shapes with zeros train faster, and are the same
        sparsifier = fxprune.hold(trained.to(setting.device), pruned.plan)
    elif pruned.plan is not None:
        trained = _rewritten(pruned, case)
    trainer = Trainer(
        trained,
        setting.training(seed),
        setting.recipe,
        seed=seed,
        sparsifier=sparsifier,
        teacher=copy.deepcopy(setting.model) if setting.recipe.distill_weight else None,
        amp=setting.amp,
        channels_last=setting.channels_last,
        group=Group(device=torch.device(setting.device)),
    )
    before = trainer.accuracy(setting.evaluation_batches())
    began = time.perf_counter()
    trainer.run(lambda: None)
    train_seconds = time.perf_counter() - began
    after = trainer.accuracy(setting.evaluation_batches())
    assert before is not None
    assert after is not None
    final = trainer.model.to("cpu").eval()
    smaller = final if sparsifier is None else _rewritten(replace(pruned, network=final), case)
    macs = count_macs(smaller, case.example)
    found = Run(
        method.name,
        share,
        seed,
        macs,
        macs / count_macs(setting.model, case.example),
        sum(parameter.numel() for parameter in smaller.parameters()),
        before,
        after,
        trainer.epochs[-1].train_loss,
        prune_seconds,
        train_seconds,
    )
    return found, pruned, prune_seconds


def _rewritten(pruned: Pruned, case: Case) -> nn.Module:
    """The smaller network of a masked one, checked."""
    assert pruned.plan is not None
    smaller = fxprune.rewrite(pruned.network, pruned.plan, case.example).eval()
    fxprune.verify(smaller, pruned.network, case.example)
    return smaller


def time_networks(
    setting: Setting, runs: Sequence[Run], folder: Path, batches: Sequence[int], rounds: int, progress: bool = False
) -> list[dict[str, Any]]:
    """Race one network of each method and share, that of its first seed, and the dense one; see `latency.Row`.

    Weights take no other time: those of the plan alone are masked, and not refitted.

    Args:
        setting: whose device is measured.
        runs: what is done.
        folder: where their plans are.
        batches: images at a time.
        rounds: how many turns each takes.
        progress: show bars on stderr.

    Raises:
        CheckpointError: a plan is absent, or the network is not the one that was trained.
    """
    first: dict[tuple[str, float], Run] = {}
    for found in sorted(runs, key=lambda found: found.seed):
        first.setdefault((found.method, found.share), found)
    networks = [dense_network(setting.model, setting.case(0, 1.0).example)]
    for (name, share), found in tqdm(first.items(), desc="networks", leave=False, disable=not progress):
        if name == DENSE.name:
            continue
        case = setting.case(found.seed, share)
        plan_file = folder / f"{Entry(found.seed, share, name).name}.plan.json"
        if plan_file.exists():
            plan = fxprune.PrunePlan.from_json(plan_file.read_text(encoding="utf-8"))
            pruned = Pruned(fxprune.mask(setting.model, plan).eval(), plan)
            network = _rewritten(pruned, case)
        else:
            pruned = METHODS[name].prune(case)
            network = pruned.network
        macs = count_macs(network, case.example)
        if macs != found.macs:
            raise CheckpointError(
                f"{name} at {share:g}: has {macs:,} MACs when it is made anew, {found.macs:,} in its run; remove "
                f"{Entry(found.seed, share, name).name}.json from {folder} and let it run again"
            )
        networks.append(Network(name, share, macs, network, network, pruned.network))
    rows = []
    shape = setting.data.shape
    with _tuned_cudnn():
        for batch in batches:
            inputs = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(setting.device)
            rows += measure(networks, [RUNTIME[setting.device]], [], inputs, rounds, progress)
    return [asdict(row) for row in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is not done yet, and write what is known; return the exit code."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        return _compare(options)
    except KeyboardInterrupt:
        print("benchmarks.compare: stopped; the same command goes on with the run that it was in", file=sys.stderr)
        return 130
    except (fxprune.FxpruneError, OSError, ValueError) as error:
        print(f"benchmarks.compare: error: {error}", file=sys.stderr)
        return 2


def _compare(options: argparse.Namespace) -> int:
    progress = sys.stderr.isatty()
    settings = settings_of(options)
    folder: Path = options.output / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    runs = read_runs(folder, settings)
    latency_file: Path = options.output / "latency.json"
    failed: dict[str, str] = {}
    if options.latency_only:
        if not runs:
            raise CheckpointError(f"{folder}: no run is done; run without --latency-only first")
        latency: dict[str, Any] = {"environment": environment(), "rounds": options.rounds}
        done = list(runs.values())
        latency["rows"] = time_networks(_setting(options), done, folder, options.batches, options.rounds, progress)
        _write(latency_file, latency)
    else:
        wanted = entries(options.methods, options.shares, options.seeds)
        todo = [entry for entry in wanted if entry not in runs]
        setting = _setting(options) if todo else None
        planned: dict[tuple[str, float], tuple[Pruned, float]] = {}
        for entry in tqdm(todo, unit="run", disable=not progress):
            assert setting is not None
            print(f"{METHODS[entry.method].label}, share {entry.share:g}, seed {entry.seed}", flush=True)
            try:
                known = planned.get((entry.method, entry.share))
                found, pruned, seconds = run(setting, METHODS[entry.method], entry.share, entry.seed, known)
            except FAILURES as error:
                failed[entry.name] = f"{type(error).__name__}: {error}"
                print(f"benchmarks.compare: {entry.name}: {failed[entry.name]}", file=sys.stderr)
                continue
            runs[entry] = found
            if options.plan_seed is not None:
                planned[entry.method, entry.share] = pruned, seconds
            if pruned.plan is not None:
                write_text(folder / f"{entry.name}.plan.json", pruned.plan.to_json())
            record = {"environment": environment(), "settings": settings, "run": asdict(found)}
            _write(folder / f"{entry.name}.json", record)
            print(f"accuracy {found.before:.2%}, after fine-tuning {found.after:.2%}", flush=True)
    timed = json.loads(latency_file.read_text(encoding="utf-8")) if latency_file.exists() else None
    if runs:
        report(options.output, settings, list(runs.values()), timed, failed)
    return int(bool(failed))


def entries(methods: Sequence[str], shares: Sequence[float], seeds: Sequence[int]) -> list[Entry]:
    """All runs that are asked for; the dense network has one share alone."""
    wanted = {
        Entry(seed, 1.0 if method == DENSE.name else share, method): None
        for seed in seeds
        for share in shares
        for method in methods
    }
    return list(wanted)


def read_runs(folder: Path, settings: Mapping[str, Any]) -> dict[Entry, Run]:
    """The runs that are done.

    Raises:
        CheckpointError: one is damaged, or was made with other settings.
    """
    runs = {}
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(".plan.json"):
            continue
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found = Run(**record["run"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: is no record of a run ({error}); remove it and it runs again") from error
        check_settings(path, record["settings"], settings)
        runs[Entry(found.seed, found.share, found.method)] = found
    return runs


def report(
    output: Path,
    settings: Mapping[str, Any],
    runs: Sequence[Run],
    latency: Mapping[str, Any] | None,
    failed: Mapping[str, str],
) -> list[Point]:
    """Write record, table and pictures of all that is known, and print the table."""
    points = points_of(runs, latency["rows"] if latency else ())
    record = {
        "settings": settings,
        "points": [asdict(point) for point in points],
        "runs": [asdict(found) for found in runs],
        "failed": failed,
        "latency": latency,
    }
    _write(output / "comparison.json", record)
    text = table(points)
    write_text(output / "comparison.md", text)
    seeds, epochs = len({found.seed for found in runs}), settings["epochs"]
    draw(points, output / "comparison", f"{settings['model']}, {seeds} seeds, epochs of fine-tuning: {epochs}")
    print(text)
    return points


def _setting(options: argparse.Namespace) -> Setting:
    model, _ = build(options.model, options.weights)
    data = open_data(options.data, validation=options.validation, normalize=CIFAR_MODELS.get(options.model))
    for name, count in (("train", options.train_images), ("calibration", options.calibration_images)):
        if count is not None and count > data.train_count:
            raise ValueError(f"--{name}-images {count}: there are {data.train_count} training images")
    _check_fit(model, data.plain_batch(torch.arange(2))[0], data, options.model)
    return Setting(
        model.eval(),
        data,
        _recipe(options),
        options.amp,
        options.channels_last,
        options.device,
        options.train_images,
        options.calibration_images,
        options.snapshots,
        options.plan_seed,
        options.evaluate,
    )


def _recipe(options: argparse.Namespace) -> Recipe:
    return Recipe(**{field.name: getattr(options, field.name) for field in fields(Recipe)})


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What decides the result of a run, beside method, share and seed. Folders appear by their kind, files by name and
    content.
    """
    return {
        "model": options.model,
        "weights": fingerprint(options.weights) if options.weights else None,
        "data": options.data.partition(":")[0],
        "validation": options.validation,
        "evaluate": options.evaluate,
        "plan_seed": options.plan_seed,
        "train_images": options.train_images,
        "calibration_images": options.calibration_images,
        "snapshots": [fingerprint(path) for path in options.snapshots],
        **asdict(_recipe(options)),
        "amp": options.amp,
        "channels_last": options.channels_last,
        "device": options.device,
    }


def _write(path: Path, record: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(record, indent=2) + "\n")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__.partition("\n\n")[0].lstrip("r")
    )
    add = parser.add_argument
    add("--model", required=True, help=f"{', '.join(CIFAR_MODELS)}, or a name for `fxprune compile`")
    add("--weights", type=Path, help="state dict of the model (default: random)")
    add("--data", required=True, metavar="SOURCE", help="cifar10:DIR, digits, folder:DIR or folder:DIR?size=PIXELS")
    add("--output", type=Path, required=True, metavar="DIR", help="where runs, record and pictures go")
    add("--methods", default="all", metavar="M,M,...", help=f"some of {','.join(METHODS)} (default: all)")
    add(
        "--shares",
        type=_list_of(_fraction("share of MACs", "0.57,0.4")),
        default=[0.57, 0.4],
        help="of MACs that remain (default: 0.57,0.4)",
    )
    add("--seeds", type=_seeds, default=[0, 1, 2], metavar="S,S,...", help="default: 0,1,2")
    add("--plan-seed", type=int, metavar="S", help="plan once, with this seed (default: each seed plans anew)")
    add("--train-images", type=_count, metavar="N", help="fine-tune with so many, drawn by the seed (default: all)")
    add("--calibration-images", type=_count, default=1024, metavar="N", help="default: %(default)s")
    add("--snapshots", nargs="+", type=Path, default=[], metavar="FILE", help="earlier states of the training, for TMI")
    add("--validation", type=int, default=5000, metavar="N", help="training images held back (default: %(default)s)")
    add("--evaluate", choices=("test", "validation"), default="test", help="on what images (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=_count, help="of torch (default: its own choice)")
    group = parser.add_argument_group("latency")
    group.add_argument("--latency-only", action="store_true", help="time what is done, in place of doing more")
    group.add_argument("--batches", type=_list_of(_count), default=[1, 32], metavar="N,N,...", help="default: 1,32")
    group.add_argument("--rounds", type=_count, default=15, help="turns of each network (default: %(default)s)")
    _add_recipe(parser.add_argument_group("recipe (default: the fine-tuning of TMI-GKP)"))
    options = parser.parse_args(arguments)
    options.distill_weight, options.distill_temperature = options.distill
    try:
        options.methods = choose_methods(options.methods, bool(options.snapshots))
    except ValueError as error:
        parser.error(str(error))
    if options.evaluate == "validation" and not options.validation:
        parser.error("--evaluate validation: there are no such images with --validation 0")
    return options


def choose_methods(names: str, snapshots: bool) -> list[str]:
    """The methods of these names, or all that can be run.

    Raises:
        ValueError: there is no such method, or it needs snapshots.
    """
    if names == "all":
        return [name for name, method in METHODS.items() if snapshots or not method.snapshots]
    chosen = list(dict.fromkeys(names.split(",")))
    for name in chosen:
        if name not in METHODS:
            raise ValueError(f"--methods: there is no {name!r}; choose from {', '.join(METHODS)}")
        if METHODS[name].snapshots and not snapshots:
            raise ValueError(f"--methods {name}: needs earlier states of the training; give them with --snapshots")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
