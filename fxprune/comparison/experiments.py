"""The experiments of papers, as recipes in files: network, data, methods, budgets, training, and what was published.

A recipe is a TOML file of this package (`recipes/NAME.toml`) or of one's own. What it says are the arguments of a
comparison; whoever asks for one may change each of them, and `Experiment.differences` says what was changed.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

from fxprune.comparison.extras import ComparisonError
from fxprune.errors import near_matches
from fxprune.training.recipe import Recipe
from fxprune.vocabulary import ComparedMethod

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

SHELF: Traversable = resources.files("fxprune.comparison") / "recipes"
SUFFIX = ".toml"
DENSE_RATE = 0.1
"""Learning rate of a dense network that is trained from the beginning, where no recipe says it: ten times that of
fine-tuning, as in TMI-GKP."""
NEAR = 0.005
"""How far a share of the MACs may be from the published one and still be beside it."""


@dataclass(frozen=True, kw_only=True)
class DenseTraining:
    """How the dense network is trained that is then pruned.

    Attributes:
        recipe: how.
        snapshots: the first and the last of the epochs after which the weights are kept, for ticket scores.
    """

    recipe: Recipe
    snapshots: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check that there are such epochs."""
        if self.snapshots is not None and not 0 <= self.snapshots[0] <= self.snapshots[1] <= self.recipe.epochs:
            raise ComparisonError(
                f"snapshots from epoch {self.snapshots[0]} to {self.snapshots[1]}: must be two of the epochs 0 to "
                f"{self.recipe.epochs} of the dense training, the first one first"
            )

    @property
    def kept(self) -> range:
        """The epochs after which the weights are kept."""
        return range(0) if self.snapshots is None else range(self.snapshots[0], self.snapshots[1] + 1)

    def lasting(self, epochs: int) -> DenseTraining:
        """The same in another number of epochs; snapshots are of the same part of it."""
        scale = epochs / self.recipe.epochs if self.recipe.epochs else 0
        window = self.snapshots and (round(self.snapshots[0] * scale), round(self.snapshots[1] * scale))
        return replace(self, recipe=replace(self.recipe, epochs=epochs), snapshots=window)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A result that a paper, or what belongs to it, reports; percentages.

    Attributes:
        source: where it is said.
        method: which of the compared methods it is; else `label` says what it is.
        label: what it is called.
        share: of the MACs that remain.
        dense: top-1 accuracy of the network before it was pruned.
        before, after: the same of the pruned one, before and after fine-tuning.
    """

    source: str
    method: str | None = None
    label: str = ""
    share: float = 1.0
    dense: float | None = None
    before: float | None = None
    after: float | None = None

    def __post_init__(self) -> None:
        """Check that it is of something."""
        if (self.method is None) == (not self.label):
            raise ComparisonError("published: either 'method', one that is compared, or 'label' says what it is of")

    def is_of(self, method: str, share: float) -> bool:
        """Whether it stands beside what was measured for this method and share."""
        return self.method == method and abs(self.share - share) <= NEAR


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A recipe.

    Attributes:
        name: what it is asked for by.
        title: what it is, in a line.
        paper: whose experiment it is.
        model, data, methods, shares, seeds, plan_seed, train_images, calibration_images, validation, evaluate, weights:
            see `fxprune.comparison.requests.ComparisonRequest`; data without their folder.
        fine_tuning: how what is pruned is trained.
        dense: how the dense network is trained; None if published weights are pruned.
        published: results to stand beside the measured ones.
        notes: what is not as in the paper, what is not known of it, and its faults.
    """

    name: str
    title: str
    paper: str
    model: str
    data: str
    methods: tuple[str, ...]
    shares: tuple[float, ...]
    fine_tuning: Recipe
    dense: DenseTraining | None = None
    weights: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    plan_seed: int | None = None
    train_images: int | None = None
    calibration_images: int = 1024
    validation: int = 0
    evaluate: str = "test"
    published: tuple[Published, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        """Check what no other object does."""
        for method in (*self.methods, *(found.method for found in self.published if found.method)):
            if method not in get_args(ComparedMethod):
                known = get_args(ComparedMethod)
                raise ComparisonError(f"there is no method {method!r}{near_matches(method, known)}")
        if (self.dense is None) == (self.weights is None):
            raise ComparisonError(
                "either [dense] says how the dense network is trained, or 'weights' names its weights"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of a `ComparisonRequest`, but for the training."""
        return {name: getattr(self, name) for name in SETTINGS}

    def differences(
        self, settings: Mapping[str, Any], fine_tuning: Recipe, dense: DenseTraining | None
    ) -> tuple[str, ...]:
        """What is done otherwise than the recipe says, a sentence each.

        Args:
            settings: what is done; names that are absent are as in the recipe.
            fine_tuning: how it is trained.
            dense: how the dense network is trained; None if weights were given.
        """
        asked, done = self.settings, self.settings | dict(settings)
        found = [_difference(name, done[name], value) for name, value in asked.items() if done[name] != value]
        found += [f"fine-tuning: {line}" for line in _of_recipes(fine_tuning, self.fine_tuning)]
        if dense is not None and self.dense is not None:
            found += [f"training of the dense network: {line}" for line in _of_recipes(dense.recipe, self.dense.recipe)]
        elif self.dense is not None:
            found.append("the dense network was given, not trained")
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """What a record keeps of it."""
        return {
            "name": self.name,
            "title": self.title,
            "paper": self.paper,
            "published": [asdict(found) for found in self.published],
            "notes": list(self.notes),
        }


SETTINGS = (
    "model", "data", "methods", "shares", "seeds", "plan_seed", "train_images", "calibration_images", "validation",
    "evaluate", "weights",
)  # fmt: skip


def recipe_names() -> list[str]:
    """Names of the recipes of this package, in the order of the alphabet."""
    return sorted(file.name.removesuffix(SUFFIX) for file in SHELF.iterdir() if file.name.endswith(SUFFIX))


def read_recipe(name: str) -> Experiment:
    """A recipe of this package, or of a file of one's own, whose name ends in `.toml`.

    Raises:
        ComparisonError: there is none, or something in it is wrong.
    """
    if name.endswith(SUFFIX):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ComparisonError(f"{name}: cannot be read: {error}") from error
        return parse_recipe(Path(name).stem, text)
    known = recipe_names()
    if name not in known:
        raise ComparisonError(
            f"there is no recipe {name!r}{near_matches(name, known)}; `fxprune compare --recipes` lists them, and a "
            f"file of your own ends in {SUFFIX}"
        )
    return parse_recipe(name, (SHELF / f"{name}{SUFFIX}").read_text(encoding="utf-8"))


def parse_recipe(name: str, text: str) -> Experiment:
    """What a file of TOML says.

    Raises:
        ComparisonError: something in it is wrong: the message says where.
    """
    where = f"recipe {name}"
    try:
        given = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ComparisonError(f"{where}: is no TOML: {error}") from error
    _check(where, given, EXPERIMENT)
    rows = given.pop("published", [])
    dense, tuned = given.pop("dense", None), given.pop("fine_tuning")
    rest: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    try:
        return Experiment(
            name=name,
            fine_tuning=_training(f"{where}, [fine_tuning]", tuned).recipe,
            dense=None if dense is None else _training(f"{where}, [dense]", dense, TRAINING | SNAPSHOTS),
            published=tuple(_published(f"{where}, [[published]]", row) for row in rows),
            **rest,
        )
    except ComparisonError as error:
        said = str(error)
        raise error if said.startswith(where) else ComparisonError(f"{where}: {said}") from error


Kind: TypeAlias = "type | tuple[type, ...]"
Kinds: TypeAlias = dict[str, tuple[Kind, bool]]
"""What a key may hold, for `isinstance`, and whether it must be there. What the items of a list are, `LISTS` says."""

NUMBER = (int, float)
TRAINING: Kinds = {
    entry.name: ({"str": str, "bool": bool, "int": int}.get(str(entry.type), NUMBER), entry.name == "epochs")
    for entry in fields(Recipe)
}
SNAPSHOTS: Kinds = {"snapshots": (list, False)}
PUBLISHED: Kinds = {
    "source": (str, True), "method": (str, False), "label": (str, False), "share": (NUMBER, False),
    "dense": (NUMBER, False), "before": (NUMBER, False), "after": (NUMBER, False),
}  # fmt: skip
LISTS: dict[str, Kind] = {
    "methods": str,
    "shares": NUMBER,
    "seeds": int,
    "notes": str,
    "snapshots": int,
    "published": dict,
}
EXPERIMENT: Kinds = {
    "title": (str, True), "paper": (str, True), "model": (str, True), "data": (str, True), "methods": (list, True),
    "shares": (list, True), "fine_tuning": (dict, True), "dense": (dict, False), "weights": (str, False),
    "seeds": (list, False), "plan_seed": (int, False), "train_images": (int, False), "calibration_images": (int, False),
    "validation": (int, False), "evaluate": (str, False), "published": (list, False), "notes": (list, False),
}  # fmt: skip


def _check(where: str, given: Mapping[str, Any], kinds: Kinds) -> None:
    """See that a table has the keys that it must have, no others, and the right kind behind each."""
    for key, value in given.items():
        if key not in kinds:
            raise ComparisonError(
                f"{where}: unknown key {key!r}{near_matches(key, kinds)}; it may have {', '.join(kinds)}"
            )
        kind = kinds[key][0]
        items = value if kind is list and isinstance(value, list) else ()
        if not _is(value, kind) or not all(_is(item, LISTS[key]) for item in items):
            wanted = f"a list of {_words(LISTS[key])}" if kind is list else _words(kind)
            raise ComparisonError(f"{where}: {key} is {value!r}; it must be {wanted}")
    missing = [key for key, (_, needed) in kinds.items() if needed and key not in given]
    if missing:
        raise ComparisonError(f"{where}: {', '.join(missing)} must be there")


def _is(value: object, kind: Kind) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _words(kind: Kind) -> str:
    words: dict[Kind, str] = {str: "text", int: "integers", bool: "true or false", dict: "tables", NUMBER: "numbers"}
    return words.get(kind, "a list")


def _training(where: str, given: Mapping[str, Any], kinds: Kinds = TRAINING) -> DenseTraining:
    _check(where, given, kinds)
    given = dict(given)
    window: Sequence[int] | None = given.pop("snapshots", None)
    if window is not None and len(window) != 2:
        raise ComparisonError(f"{where}: snapshots are the first and the last epoch, as in [35, 70]")
    return DenseTraining(recipe=Recipe(**given), snapshots=None if window is None else (window[0], window[1]))


def _published(where: str, given: Mapping[str, Any]) -> Published:
    _check(where, given, PUBLISHED)
    return Published(**given)


def _of_recipes(done: Recipe, asked: Recipe) -> list[str]:
    pairs = ((entry.name, getattr(done, entry.name), getattr(asked, entry.name)) for entry in fields(Recipe))
    return [_difference(*pair) for pair in pairs if pair[1] != pair[2]]


def _difference(name: str, done: object, asked: object) -> str:
    return f"{name.replace('_', ' ')} {_shown(done)} in place of {_shown(asked)}"


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "all" if value is None else str(value)
