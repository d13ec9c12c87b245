"""Which pruning is worth it? Accuracy against MACs and against measured time, of several pruners on one network.

All methods begin with the same weights and are fine-tuned by the same recipe for as many epochs; a seed draws the
images to calibrate with, those to train with, and their batches, alike for every method. What counts is the network
after the last epoch. Test images are looked at before and after fine-tuning and choose nothing.

A run that is done is a file; the same request goes on where it was stopped, and other methods, shares and seeds can be
added. Timing is a step of its own, one race of all that is done: on a machine that does nothing else.
"""

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fxprune
from fxprune.comparison.dense_training import with_dense
from fxprune.comparison.duration import training_seconds
from fxprune.comparison.extras import ComparisonError
from fxprune.comparison.latency import Row, measure, tuned_cudnn
from fxprune.comparison.layer_calls import count_macs
from fxprune.comparison.methods import DENSE, METHODS, Case, Pruned
from fxprune.comparison.plots import draw_fronts
from fxprune.comparison.points import Point, Run, beside_published, points_of, table
from fxprune.comparison.requests import ComparisonRequest
from fxprune.comparison.rivals import Network, dense_network
from fxprune.durations import in_words
from fxprune.environment import environment
from fxprune.models import load_model
from fxprune.training.checkpoints import CheckpointError, check_settings, write_text
from fxprune.training.data.augmentation import generator
from fxprune.training.data.pictures import NORMALIZATIONS
from fxprune.training.data.sources import Data, open_data
from fxprune.training.loop import EVALUATION_BATCH, Placement, Trainer, TrainingError, check_device
from fxprune.training.processes import Group
from fxprune.training.run import check_fit

DRAW = 2
"""What the generator of the images of a seed is for, see `fxprune.training.data.augmentation`."""
RUNTIME = {"cpu": "accelerate", "cuda": "accelerate+cudagraph"}
"""What times the networks, by device; see `fxprune.comparison.runtimes`."""
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
        request: what is compared.
    """

    model: nn.Module
    data: Data
    request: ComparisonRequest

    def drawn(self, seed: int) -> Tensor:
        """Positions of all training images in the order in which `seed` draws them."""
        return torch.randperm(self.data.train_count, generator=generator(seed, DRAW))

    def case(self, seed: int, share: float) -> Case:
        """What the methods are given."""
        asked = self.request
        seed = seed if asked.plan_seed is None else asked.plan_seed
        images, labels = self.data.plain_batch(self.drawn(seed)[: asked.calibration_images])
        return Case(self.model, share, images, labels, seed, asked.snapshots)

    def training(self, seed: int) -> Data:
        """The images to train with; none to validate with, for nothing is chosen."""
        chosen = self.data.training[self.drawn(seed)[: self.request.train_images]]
        return replace(self.data, seed=seed, training=chosen, validation=self.data.validation[:0])

    def evaluation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The images to evaluate on."""
        if self.request.evaluate == "test":
            return self.data.test_batches(EVALUATION_BATCH)
        return self.data.validation_batches(EVALUATION_BATCH)


def run(
    setting: Setting,
    entry: Entry,
    before_training: tuple[Pruned, float] | None = None,
    progress: bool = False,
) -> tuple[Run, Pruned, float]:
    """Prune, fine-tune and evaluate one network.

    Args:
        setting: what all runs have in common.
        entry: method, share of the MACs that is to remain, and seed.
        before_training: what the method made of this case before, and in how many seconds; pruned now if absent.
        progress: show a bar on stderr.

    Returns:
        The run, and what was pruned in how many seconds; it is not trained.

    Raises:
        FxpruneError: one of `FAILURES`, or a damaged image.
    """
    seed, share, method = entry
    case, asked = setting.case(seed, share), setting.request
    if before_training is None:
        began = time.perf_counter()
        pruned = METHODS[method].prune(case)
        before_training = pruned, time.perf_counter() - began
    pruned, prune_seconds = before_training
    trained, sparsifier = copy.deepcopy(pruned.network), None
    if pruned.plan is not None and pruned.plan.layers:  # dense shapes with zeros train faster, and are the same
        sparsifier = fxprune.hold(trained.to(asked.device), pruned.plan)
    elif pruned.plan is not None:
        trained = _rewritten(pruned, case)
    trainer = Trainer(
        trained,
        setting.training(seed),
        asked.recipe,
        seed=seed,
        sparsifier=sparsifier,
        teacher=copy.deepcopy(setting.model) if asked.recipe.distill_weight else None,
        placement=Placement(Group(device=torch.device(asked.device)), asked.amp, asked.channels_last),
    )
    before = trainer.accuracy(setting.evaluation_batches())
    began = time.perf_counter()
    trainer.run(lambda: None, progress=progress)
    train_seconds = time.perf_counter() - began
    after = trainer.accuracy(setting.evaluation_batches())
    assert before is not None
    assert after is not None
    final = trainer.model.to("cpu").eval()
    smaller = final if sparsifier is None else _rewritten(replace(pruned, network=final), case)
    macs = count_macs(smaller, case.example)
    found = Run(
        method,
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
    smaller: nn.Module = fxprune.rewrite(pruned.network, pruned.plan, case.example).eval()
    fxprune.verify(smaller, pruned.network, case.example)
    return smaller


def time_networks(
    setting: Setting, runs: Sequence[Run], batches: Sequence[int], rounds: int, progress: bool = False
) -> list[dict[str, Any]]:
    """Race one network of each method and share, that of its first seed, and the dense one; see `latency.Row`.

    Weights take no other time: those of the plan alone are masked, and not refitted.

    Args:
        setting: whose device is measured.
        runs: what is done.
        batches: images at a time.
        rounds: how many turns each takes.
        progress: show bars on stderr.

    Raises:
        CheckpointError: a plan is absent, or the network is not the one that was trained.
    """
    folder, device = setting.request.runs_folder, setting.request.device
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
    with tuned_cudnn():
        for batch in batches:
            inputs = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(device)
            rows += measure(networks, [RUNTIME[device]], [], inputs, rounds, progress)
    return [asdict(row) for row in rows]


def compare(request: ComparisonRequest, complain: Callable[[str], object], progress: bool = False) -> dict[str, str]:
    """Do what is not done yet, and write what is known.

    Args:
        request: what to compare.
        complain: is told of a method that failed, and of pictures that cannot be drawn.
        progress: show bars on stderr.

    Returns:
        Why each run failed that did, by its name.

    Raises:
        FxpruneError: the model, the images and the settings do not go together, or a file is damaged.
        OSError: a file cannot be read or written.
    """
    request = with_dense(request)
    settings, folder = request.settings(), request.runs_folder
    folder.mkdir(parents=True, exist_ok=True)
    runs = read_runs(folder, settings)
    failed: dict[str, str] = {}
    todo = [entry for entry in entries(request.methods, request.shares, request.seeds) if entry not in runs]
    setting = _setting(request) if todo else None
    if setting is not None:
        each = training_seconds(setting.model, setting.data, request.recipe, request.train_images, request.device)
        print(
            f"{len(todo)} runs to do; fine-tuning takes {in_words(each * len(todo))} here if it goes on as now, to "
            "which planning and evaluation come",
            flush=True,
        )
    planned: dict[tuple[str, float], tuple[Pruned, float]] = {}
    for entry in tqdm(todo, unit="run", disable=not progress):
        assert setting is not None
        print(f"{METHODS[entry.method].label}, share {entry.share:g}, seed {entry.seed}", flush=True)
        try:
            known = planned.get((entry.method, entry.share))
            found, pruned, seconds = run(setting, entry, known, progress)
        except FAILURES as error:
            failed[entry.name] = f"{type(error).__name__}: {error}"
            complain(f"{entry.name}: {failed[entry.name]}")
            continue
        runs[entry] = found
        if request.plan_seed is not None:
            planned[entry.method, entry.share] = pruned, seconds
        if pruned.plan is not None:
            write_text(folder / f"{entry.name}.plan.json", pruned.plan.to_json())
        record = {"environment": environment(), "settings": settings, "run": asdict(found)}
        _write(folder / f"{entry.name}.json", record)
        print(f"accuracy {found.before:.2%}, after fine-tuning {found.after:.2%}", flush=True)
    if runs:
        report_on(request, settings, list(runs.values()), failed, complain)
    return failed


def time_done(
    request: ComparisonRequest,
    complain: Callable[[str], object],
    batches: Sequence[int],
    rounds: int,
    progress: bool = False,
) -> None:
    """Time what is done, in place of doing more, and write what is known; see `time_networks`.

    Raises:
        CheckpointError: no run is done, or a file is damaged.
        FxpruneError, OSError: see `compare`.
    """
    request = with_dense(request)
    settings, folder = request.settings(), request.runs_folder
    folder.mkdir(parents=True, exist_ok=True)
    runs = list(read_runs(folder, settings).values())
    if not runs:
        raise CheckpointError(f"{folder}: no run is done; run without --latency-only first")
    latency: dict[str, Any] = {"environment": environment(), "rounds": rounds}
    latency["rows"] = time_networks(_setting(request), runs, batches, rounds, progress)
    _write(request.output / "latency.json", latency)
    report_on(request, settings, runs, {}, complain)


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


def report_on(
    request: ComparisonRequest,
    settings: Mapping[str, Any],
    runs: Sequence[Run],
    failed: Mapping[str, str],
    complain: Callable[[str], object],
) -> list[Point]:
    """Write record, table and pictures of all that is known, and print the table."""
    output, experiment = request.output, request.experiment
    latency = _read_latency(output / "latency.json")
    points = points_of(runs, latency["rows"] if latency else ())
    differences = request.differences()
    record = {
        "recipe": None if experiment is None else experiment.to_dict() | {"differences": list(differences)},
        "settings": settings,
        "points": [asdict(point) for point in points],
        "runs": [asdict(found) for found in runs],
        "failed": failed,
        "latency": latency,
    }
    _write(output / "comparison.json", record)
    text = table(points) if experiment is None else beside_published(points, experiment, differences)
    write_text(output / "comparison.md", text)
    seeds, epochs = len({found.seed for found in runs}), settings["epochs"]
    try:
        title = f"{settings['model']}, {seeds} seed{'s' * (seeds > 1)}, epochs of fine-tuning: {epochs}"
        draw_fronts(points, output / "comparison", title)
    except ComparisonError as error:
        complain(f"no pictures: {error}")
    print(text)
    return points


def _read_latency(path: Path) -> dict[str, Any] | None:
    """What `time_done` found; None if it was not asked for yet.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        latency: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for row in latency["rows"]:
            Row(**row)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: is no record of times ({error}); remove it and time again") from error
    return latency


def _setting(request: ComparisonRequest) -> Setting:
    check_device(request.device)
    model = load_model(request.model, request.weights)
    data = open_data(request.data, validation=request.validation, normalize=NORMALIZATIONS.get(request.model))
    for name, count in (("train", request.train_images), ("calibration", request.calibration_images)):
        if count is not None and count > data.train_count:
            raise ComparisonError(f"--{name}-images {count}: there are {data.train_count} training images")
    check_fit(model, data.plain_batch(torch.arange(2))[0], data.classes, request.model)
    return Setting(model.eval(), data, request)


def _write(path: Path, record: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(record, indent=2) + "\n")
