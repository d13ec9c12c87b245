"""What a comparison is asked for, in time or in accuracy: frozen, checked, and put down beside what was found."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from fxprune.comparison.experiments import SETTINGS, DenseTraining, Experiment
from fxprune.comparison.extras import ComparisonError, is_installed, require
from fxprune.comparison.methods import DENSE, METHODS
from fxprune.comparison.runtimes import RUNTIMES
from fxprune.models import is_published
from fxprune.plans.shapes import Groups
from fxprune.training.checkpoints import fingerprint
from fxprune.training.recipe import Recipe

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class LatencyRequest:
    """What is to be measured.

    Attributes:
        model: a name for `load_model`.
        weights: its state dict; random without.
        ratio: what fxprune prunes; a network for each.
        saved: files of `fxprune.save`, made from this model; a network for each.
        groups, form: of the plans.
        only: prune only convolutions of these names, or `"1x1"` ones; None for all.
        device: `"cpu"` or `"cuda"`.
        dtype: one of `DTYPES`.
        size: height and width in pixels; None for the model's own.
        batch: images at a time, one race for each number.
        layout: one of `LAYOUTS`; None for both, of which the faster counts.
        against: some of `RIVALS`; the dense network always runs.
        runtime: some of `RUNTIMES`.
        rounds: turns of each network.
        layers: race each grouped convolution against the dense one too.
        seed: of the plan.
    """

    model: str
    weights: Path | None = None
    ratio: Sequence[float] = (0.5,)
    saved: Sequence[Path] = ()
    groups: Groups = "auto"
    form: str = "auto"
    only: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    size: int | None = None
    batch: Sequence[int] = (1,)
    layout: str | None = None
    against: Sequence[str] = ("dense",)
    runtime: Sequence[str] = ("eager",)
    rounds: int = 15
    layers: bool = False
    seed: int = 0

    def check_available(self) -> None:
        """See that there is what is needed, before anything is measured.

        Raises:
            ComparisonError: something is absent; the message says how to do without.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ComparisonError("--device cuda: torch sees no CUDA device on this machine; measure with --device cpu")
        for name in self.runtime:
            if reason := RUNTIMES[name].obstacle(self.device, self.dtype):
                raise ComparisonError(f"--runtime {name}: {reason}")
        if "torch-pruning" in self.against:
            require("torch_pruning")

    def settings(self, shape: Sequence[int]) -> dict[str, Any]:
        """What decides the times, for the record; `shape` is that of an image."""
        return {
            "model": self.model,
            "weights": self.weights.name if self.weights else None,
            "ratio": list(self.ratio),
            "saved": [path.name for path in self.saved] or None,
            "form": self.form,
            "groups": self.groups,
            "only": self.only,
            "device": self.device,
            "dtype": self.dtype,
            "size": list(shape),
            "batch": list(self.batch),
            "layout": self.layout,
            "against": list(self.against),
            "runtime": list(self.runtime),
            "rounds": self.rounds,
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True)
class ComparisonRequest:
    """What is to be compared.

    Attributes:
        model: a name for `load_model`.
        data: images for `open_data`.
        output: the folder for runs, record and pictures.
        recipe: of fine-tuning.
        weights: state dict of the model, or the name of published ones; random without.
        dense: how the model is trained before, which takes the place of the weights.
        experiment: the recipe of a paper that this follows, to say what was published and what is otherwise.
        methods: names in `METHODS`.
        shares: of the MACs that remain.
        seeds: a run of each method and share for each.
        plan_seed: plan once, with the images that this seed draws, for all seeds of fine-tuning; None: each plans.
        train_images: how many a seed draws to fine-tune with; None takes all.
        calibration_images: how many it draws to calibrate with.
        snapshots: see `Case`.
        validation: training images held back.
        evaluate: `"test"` or `"validation"`, which images accuracy is that of.
        device: `"cpu"` or `"cuda"`.
        amp, channels_last: see `Placement`.

    Raises:
        ComparisonError: a method cannot be run, or there are no images to evaluate on.
    """

    model: str
    data: str
    output: Path
    recipe: Recipe
    weights: Path | None = None
    dense: DenseTraining | None = None
    experiment: Experiment | None = None
    methods: Sequence[str] = (DENSE.name,)
    shares: Sequence[float] = (0.57, 0.4)
    seeds: Sequence[int] = (0, 1, 2)
    plan_seed: int | None = None
    train_images: int | None = None
    calibration_images: int = 1024
    snapshots: Sequence[Path] = ()
    validation: int = 5000
    evaluate: str = "test"
    device: str = "cpu"
    amp: str | None = None
    channels_last: bool = False

    def __post_init__(self) -> None:
        """Check what goes together."""
        if self.evaluate == "validation" and not self.validation:
            raise ComparisonError("--evaluate validation: there are no such images with --validation 0")

    @property
    def dense_folder(self) -> Path:
        """Where the dense network is, if it is trained here."""
        return self.output / "dense"

    @property
    def runs_folder(self) -> Path:
        """Where the runs that are done are."""
        return self.output / "runs"

    def settings(self) -> dict[str, Any]:
        """What decides the result of a run, beside method, share and seed. Folders appear by their kind, files by name
        and content.
        """
        return {
            "model": self.model,
            "weights": self._weights(),
            "data": self.data.partition(":")[0],
            "validation": self.validation,
            "evaluate": self.evaluate,
            "plan_seed": self.plan_seed,
            "train_images": self.train_images,
            "calibration_images": self.calibration_images,
            "snapshots": [fingerprint(path) for path in self.snapshots],
            **asdict(self.recipe),
            "amp": self.amp,
            "channels_last": self.channels_last,
            "device": self.device,
        }

    def differences(self) -> tuple[str, ...]:
        """What is done otherwise than the recipe of the paper says, a sentence each; see `Experiment.differences`."""
        if self.experiment is None:
            return ()
        names = {entry.name for entry in fields(self)} & set(SETTINGS)
        done = {name: getattr(self, name) for name in names - {"weights", "data"}}
        done = {name: tuple(value) if isinstance(value, list) else value for name, value in done.items()}
        done["data"] = self.data.partition(":")[0]
        if self.dense is None:
            done["weights"] = None if self.weights is None else self.weights.name
        return self.experiment.differences(done, self.recipe, self.dense)

    def _weights(self) -> str | None:
        if self.weights is None or is_published(self.weights):
            return None if self.weights is None else str(self.weights)
        return fingerprint(self.weights)


def possible_methods(names: Iterable[str], snapshots: bool) -> list[str]:
    """Those of the methods that can be run here: the packages that they need are installed, and snapshots are there."""
    methods = [METHODS[name] for name in names]
    return [
        method.name
        for method in methods
        if (snapshots or not method.snapshots) and (not method.package or is_installed(method.package))
    ]


def choose_methods(names: str, snapshots: bool) -> list[str]:
    """The methods of these names, or of `"all"` those that can be run here.

    Raises:
        ComparisonError: there is no such method, or it needs snapshots or a package that is not installed.
    """
    if names == "all":
        return possible_methods(METHODS, snapshots)
    chosen = list(dict.fromkeys(names.split(",")))
    for name in chosen:
        if name not in METHODS:
            raise ComparisonError(f"--methods: there is no {name!r}; choose from {', '.join(METHODS)}")
        if METHODS[name].snapshots and not snapshots:
            raise ComparisonError(f"--methods {name}: needs earlier states of the training; give them with --snapshots")
        if METHODS[name].package:
            require(METHODS[name].package)
    return chosen
