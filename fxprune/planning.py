"""Make a plan: decide for each convolution whether it is pruned, into how many groups, and which kernels stay."""

import fnmatch
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from tqdm import tqdm

from fxprune.calibration.least_squares import regularized
from fxprune.calibration.samples import Samples
from fxprune.criteria import Criterion, Evidence, ScoreFunction, kernel_scores, resolve
from fxprune.eligibility import check_model, check_weight, parameters_of_several_modules, skip_reason
from fxprune.errors import PlanError, near_matches
from fxprune.methods import Clustering, Labels, Mask, Matrix, cocluster, common_groups, reconstruction, srgkp, tmi_gkp
from fxprune.methods.cocluster import Layer, choose_channels, in_blocks, share_lost
from fxprune.plan_fields import freeze_ratio
from fxprune.plans import GroupedKernels, PrunePlan
from fxprune.shapes import BLOCKS, FORMS, TARGETS, Groups, Shape, choose_shape
from fxprune.snapshots import Snapshot, load_snapshots
from fxprune.variety import Variety, cosine_similarity, functional_similarity, vary

Value = TypeVar("Value")

METHODS = ("auto", "cocluster", "reconstruction", "tmi", "srgkp")
"""How groups and kept kernels are chosen.

- `"cocluster"`: the kept importance is largest (`fxprune.methods.cocluster`). The only one that takes a criterion and
  variety.
- `"reconstruction"`: the error that a refit leaves is smallest; needs calibration (`fxprune.methods.reconstruction`).
- `"tmi"`: TMI-GKP as published; needs snapshots (`fxprune.methods.tmi`).
- `"srgkp"`: SR-GKP as published (`fxprune.methods.srgkp`).
- `"auto"`: reconstruction if there is calibration data and neither criterion nor variety is given, else cocluster.
"""
PUBLISHED = ("tmi", "srgkp")
"""Methods of papers: overlap form only, and 8 groups unless said otherwise."""
PUBLISHED_GROUPS = 8


class Planner:
    """What is decided about a model before any kernel is looked at, and how the kernels of each layer are chosen.

    A pattern is a module name with the wildcards of `fnmatch`; it also matches all below the modules it names:
    `"layer1"` matches `"layer1.0.conv1"`. Of several patterns the first that matches counts. A module that has several
    names goes by the first.

    Args:
        model: any module with `Conv2d` layers, on any device, in any floating-point type. It is only read.
        ratio: share of kernel groups to remove, in `[0, 1)`; or pattern to share, other layers stay dense.
        groups: number of groups, `"auto"`, or pattern to either; layers that no pattern matches get `"auto"`.
        method: one of `METHODS`.
        form: `"partition"`, `"overlap"`, or `"auto"`: partition where the ratio is `1 - 1/n` and the layer allows it.
        criterion: how much a kernel weighs: a name in `fxprune.criteria.CRITERIA`, a `Criterion`, or a function
            `(name, conv) -> (O, C)`; None is `"l2"`.
        variety: see `fxprune.variety.Variety`.
        snapshots: states of the same model earlier in its training, oldest first: state dicts, modules or paths.
        ignore: patterns of layers to leave dense.
        seed: of all random numbers. Global random state is neither read nor changed.
        calibrated: whether `choose` will be given samples.
        obstacles: convolutions that the graph does not allow to be grouped, with the reason.
        block: see `resolve_block`.
        target: `"cpu"`, `"cuda"` or None: what device `groups="auto"` and the blocks should suit.
        writers: sets of convolutions, see `fxprune.sharing.common_writers`. Those of a set that have equally many
            groups get the same groups of filters in the same order.

    Attributes:
        shapes: what becomes of each convolution that is pruned.
        skipped: the others, with the reason.

    Raises:
        PlanError: an argument is not legal or contradicts another, a pattern matches nothing, the model has no `Conv2d`
            or is quantized, or an explicit `groups` does not divide the filters of a layer.
    """

    def __init__(
        self,
        model: nn.Module,
        ratio: float | Mapping[str, float] = 0.5,
        *,
        groups: Groups | Mapping[str, Groups] = "auto",
        method: str = "auto",
        form: str = "auto",
        criterion: str | Criterion | ScoreFunction | None = None,
        variety: str | Variety | None = None,
        snapshots: Iterable[Snapshot] | None = None,
        ignore: str | Iterable[str] = (),
        seed: int = 0,
        calibrated: bool = False,
        obstacles: Mapping[str, str] = MappingProxyType({}),
        block: int | None = None,
        target: str | None = None,
        writers: Iterable[Collection[str]] = (),
    ) -> None:
        self._ratio = freeze_ratio(ratio)
        for count in groups.values() if isinstance(groups, Mapping) else (groups,):
            if count != "auto" and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise PlanError(f"groups is {count!r}; it must be a positive integer, 'auto', or map patterns to these")
        _check_choice("method", method, METHODS)
        _check_choice("form", form, FORMS)
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise PlanError(f"seed is {seed!r}; it must be an integer, 0 or more")
        self._seed = seed
        self._variety = Variety.parse(variety)
        free = criterion is None and variety is None
        self._method = method if method != "auto" else "reconstruction" if calibrated and free else "cocluster"
        self._check_method(criterion, form, snapshots, calibrated)
        self._block, self._target = resolve_block(block, target, self._method), target
        self._gave_up_blocks = block is None and self._block != resolve_block(None, target, "cocluster")
        check_model(model)
        convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
        if not convs:
            raise PlanError(f"{type(model).__name__} has no Conv2d; fxprune prunes only these")
        if "" in convs:
            raise PlanError("the model is itself a Conv2d; wrap it: torch.nn.Sequential(conv)")
        if self._method in PUBLISHED:
            form = "overlap"
        self._snapshots = () if snapshots is None else load_snapshots(snapshots, model)
        self._moments: dict[str, Tensor] | None = {} if calibrated else None
        evidence = Evidence(model, next(iter(self._snapshots), None), self._moments, seed)
        self._criterion, self._score = resolve("l2" if criterion is None else criterion, evidence)
        self._ratios, self.shapes, self.skipped = self._shapes(model, convs, groups, form, ignore, obstacles)
        self._convs = convs
        self._together = self._sharing(writers)
        self._labels: dict[str, Labels] = {}
        self._energies: dict[str, Matrix] = {}

    @property
    def sharing(self) -> Collection[str]:
        """The convolutions whose groups of filters are also those of another."""
        return self._together.keys()

    def survey(self, name: str, samples: Samples) -> None:
        """Learn what a layer of `sharing` reads in the dense network; with calibration, for all of them before the
        first is chosen: the groups are decided at once, when most layers before them are not pruned yet.
        """
        assert self._moments is not None
        conv = self._convs[name]
        self._moments[name] = samples.second_moment(conv.in_channels)
        # About the mean, which the intercept of the refit takes care of.
        variance = samples.inputs.square().mean(0, dtype=torch.float64)
        energy = (conv.weight.detach().double().flatten(1) * samples.scale[:, None]).square() * variance
        self._energies[name] = energy.view(*conv.weight.shape[:2], -1).sum(2).cpu().numpy()

    def from_weights(self, progress: bool = False) -> PrunePlan:
        """Make the whole plan, without samples.

        Args:
            progress: show a bar on stderr.

        Raises:
            PlanError: see `choose`.
        """
        names = tqdm(self.shapes, desc="planning", unit="conv", disable=not progress)
        return self.plan({name: self.choose(name, self._convs[name]) for name in names})

    def choose(self, name: str, conv: nn.Conv2d, samples: Samples | None = None) -> GroupedKernels:
        """Group the filters of a layer of `shapes` and choose the channels of each group.

        Args:
            name: of the layer.
            conv: its convolution, dense.
            samples: what the layer reads; needed if the planner was told that there would be.

        Raises:
            PlanError: the weight has no finite values, or the criterion gives no legal scores.
        """
        check_weight(name, conv.weight)
        clustering, redundancy = self._cluster(name, conv, self.shapes[name], samples)
        return GroupedKernels(
            clustering.out_order,
            clustering.kept,
            conv.in_channels,
            self._ratios[name],
            redundancy,
            self.shapes[name].block,
            clustering.block_cost,
        )

    def plan(self, layers: Mapping[str, GroupedKernels]) -> PrunePlan:
        """Put the chosen layers together."""
        criterion = self._criterion if self._method == "cocluster" else self._method
        if self._variety is not None:
            criterion = f"{criterion}, variety {self._variety.rule}"
        notes = {name: note for name, shape in self.shapes.items() if (note := shape.note)}
        if self._gave_up_blocks:
            notes = dict.fromkeys(layers, f"method {self._method!r} keeps channels one by one, not in aligned blocks")
        return PrunePlan(layers, self.skipped, self._ratio, self._method, criterion, self._seed, notes)

    def _check_method(self, criterion: object, form: str, snapshots: object, calibrated: bool) -> None:
        for what, value in (("criterion", criterion), ("variety", self._variety)):
            if value is not None and self._method != "cocluster":
                raise PlanError(f"method {self._method!r} has its own score; leave {what} out, or use 'cocluster'")
        if self._method in PUBLISHED and form == "partition":
            raise PlanError(f"method {self._method!r} is for the overlap form; use form='auto', or method='cocluster'")
        if self._method == "tmi" and snapshots is None:
            raise PlanError(
                "method 'tmi' compares the weights with earlier states of the same training run; pass snapshots=[state "
                "dicts or paths], or use method='cocluster', which needs none"
            )
        if self._method == "reconstruction" and not calibrated:
            raise PlanError(
                "method 'reconstruction' measures the error on data; pass calibration=, or use method='cocluster'"
            )
        if self._variety is not None:
            self._variety.similarity_for(calibrated)

    def _shapes(
        self,
        model: nn.Module,
        convs: Mapping[str, nn.Conv2d],
        groups: Groups | Mapping[str, Groups],
        form: str,
        ignore: str | Iterable[str],
        obstacles: Mapping[str, str],
    ) -> tuple[dict[str, float], dict[str, Shape], dict[str, str]]:
        """Asked ratio and shape of each convolution that is pruned, and the reason for each other."""
        ratio = self._ratio
        ignored = match_patterns("ignore", dict.fromkeys([ignore] if isinstance(ignore, str) else ignore, True), convs)
        ratios = match_patterns("ratio", ratio, convs) if isinstance(ratio, Mapping) else dict.fromkeys(convs, ratio)
        wanted = (
            match_patterns("groups", groups, convs) if isinstance(groups, Mapping) else dict.fromkeys(convs, groups)
        )
        shared = parameters_of_several_modules(model)
        shapes: dict[str, Shape] = {}
        skipped: dict[str, str] = {}
        for name, conv in convs.items():
            reason = ""
            if name in ignored:
                reason = "ignored on request"
            elif name not in ratios:
                reason = "no pattern of ratio matches"
            elif ratios[name] == 0:
                reason = "ratio is 0"
            elif name in obstacles:
                reason = obstacles[name]
            else:
                reason = skip_reason(conv, shared)
            if reason:
                skipped[name] = reason
                continue
            count = wanted.get(name, "auto")
            if count == "auto" and self._method in PUBLISHED and conv.out_channels % PUBLISHED_GROUPS == 0:
                count = PUBLISHED_GROUPS
            try:
                shape = choose_shape(
                    conv.out_channels, conv.in_channels, ratios[name], count, form, self._block, self._target
                )
            except PlanError as error:
                raise PlanError(f"{name}: {error}") from error
            if isinstance(shape, str):
                skipped[name] = shape
            else:
                shapes[name] = shape
        return ratios, shapes, skipped

    def _sharing(self, writers: Iterable[Collection[str]]) -> dict[str, tuple[str, ...]]:
        """The layers that get the same groups, for each of them, itself included."""
        together: dict[str, tuple[str, ...]] = {}
        for names in writers:
            by_groups: dict[int, list[str]] = {}
            for name in names:
                if name in self.shapes:
                    by_groups.setdefault(self.shapes[name].groups, []).append(name)
            for alike in by_groups.values():
                if len(alike) > 1:
                    together |= dict.fromkeys(alike, tuple(alike))
        return together

    def _common_groups(self, name: str) -> Labels | None:
        """The group of each filter `(O,)` if other layers have the same groups, which all are decided at once."""
        together = self._together.get(name, ())
        if together and name not in self._labels:
            layers = []
            for other in together:
                shape = self.shapes[other]
                scores = (
                    self._energies[other]  # of what the next layer reads, which the reconstruction is to keep
                    if self._method == "reconstruction"
                    else kernel_scores(other, self._convs[other], self._score, self._criterion)
                )
                layers.append(Layer(in_blocks(scores, shape.block), shape.kept // shape.block, shape.form))
            with threadpool_limits(1):
                labels = common_groups(layers, self.shapes[name].groups, self._seed)
            self._labels |= dict.fromkeys(together, labels)
        return self._labels.get(name)

    def _cluster(
        self, name: str, conv: nn.Conv2d, shape: Shape, samples: Samples | None
    ) -> tuple[Clustering, float | None]:
        """The clustering, and the share of redundant kernel groups if variety looked for them."""
        if self._method == "reconstruction":
            assert samples is not None
            moments = regularized(samples, conv.weight, shape.groups, shape.kept, self._seed)
            clustering = reconstruction(
                conv.weight,
                *moments,
                shape.groups,
                shape.kept,
                shape.form,
                self._seed,
                shape.block,
                self._common_groups(name),
            )
            return clustering, None
        # One thread: the matrices are small, and on a busy machine threads that wait for each other cost ten times the
        # work.
        with threadpool_limits(1):
            weight: Matrix = conv.weight.detach().double().cpu().numpy()
            if self._method == "tmi":
                earlier = [state[f"{name}.weight"].double().cpu().numpy() for state in self._snapshots]
                return tmi_gkp(weight, earlier, shape.groups, shape.kept, seed=self._seed)[0], None
            if self._method == "srgkp":
                return srgkp(weight, shape.groups, shape.kept), None
            if samples is not None and self._moments is not None:
                self._moments[name] = samples.second_moment(conv.in_channels)
            scores = kernel_scores(name, conv, self._score, self._criterion)
            labels = self._common_groups(name)
            clustering = cocluster(
                scores, shape.groups, shape.kept, shape.form, self._seed, block=shape.block, labels=labels
            )
            if self._variety is None:
                return clustering, None
            return self._varied(clustering, weight, scores, shape, samples)

    def _varied(
        self, clustering: Clustering, weight: Matrix, scores: Matrix, shape: Shape, samples: Samples | None
    ) -> tuple[Clustering, float]:
        """Keep the groups and choose their channels anew, so that rare ones stay."""
        assert self._variety is not None
        groups = np.array(clustering.out_order).reshape(shape.groups, -1)  # (n, d)
        labels = np.empty(len(scores), dtype=np.intp)
        labels[groups] = np.arange(shape.groups)[:, None]
        totals = scores[groups].sum(1)  # (n, C)
        chosen, redundancy = self._vary(totals, weight, groups, shape, samples)
        if shape.block == 1:
            return Clustering.from_labels(labels, chosen), redundancy
        blocks, _ = self._vary(totals, weight, groups, shape, samples, shape.block)
        cost = share_lost(float(totals[blocks].sum()), float(totals[chosen].sum()))
        return Clustering.from_labels(labels, blocks, block_cost=cost), redundancy

    def _vary(
        self, totals: Matrix, weight: Matrix, groups: Labels, shape: Shape, samples: Samples | None, block: int = 1
    ) -> tuple[Mask, float]:
        """The channels `(n, C)` of each group, in blocks that are told apart as channels are, and the redundancy."""
        assert self._variety is not None
        filters, channels, height, width = weight.shape
        weight = weight.reshape(filters, channels // block, block * height, width)  # a block as a channel of many taps
        if self._variety.similarity_for(samples is not None) == "functional":
            assert samples is not None
            gram = samples.gram().cpu().numpy()
            similarity = np.stack([functional_similarity(weight[members], gram) for members in groups])
        else:
            kernels = weight[groups].swapaxes(1, 2)  # (n, C / block, d, block * kh, kw)
            similarity = cosine_similarity(kernels.reshape(*kernels.shape[:2], -1))
        kept = shape.kept // block
        remapped, redundancy = vary(in_blocks(totals, block), kept, similarity, self._variety)
        return choose_channels(remapped, kept, shape.form).repeat(block, axis=1), redundancy.share


def resolve_block(block: int | None, target: str | None, method: str) -> int:
    """How many channels are kept together.

    Args:
        block: 1 or more; None is what suits the target: 8 on `"cuda"`, else 1.
        target: one of `TARGETS`, or None.
        method: one of `METHODS`. Those of papers choose single channels: None is 1 for them.

    Raises:
        PlanError: a value is not legal, or the method knows no blocks.
    """
    if target is not None:
        _check_choice("target", target, TARGETS)
    if block is None:
        return 1 if target is None or method in PUBLISHED else BLOCKS[target]
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise PlanError(
            f"block is {block!r}; it must be a positive integer, such as 8, or None for what suits the target"
        )
    if block > 1 and method in PUBLISHED:
        raise PlanError(f"method {method!r} chooses channels one by one; leave block out, or use 'cocluster'")
    return block


def resolve_sharing(share_groups: bool | None, block: int, target: str | None, method: str) -> bool:
    """Whether layers that write the same channels get the same groups of filters.

    Args:
        share_groups: None is what suits the target: True if there is one. It costs some accuracy and saves gathers.
        block: as `resolve_block` gives it. Blocks that are read whole hold the order of the stream, so that sharing
            would save nothing: None is False for more than 1.
        target: one of `TARGETS`, or None.
        method: one of `METHODS`. Those of papers group each layer by itself: None is False for them.

    Raises:
        PlanError: a value is not legal, or the method cannot share.
    """
    if share_groups is None:
        return target is not None and block == 1 and method not in PUBLISHED
    if not isinstance(share_groups, bool):
        raise PlanError(f"share_groups is {share_groups!r}; it must be True, False, or None for what suits the target")
    if share_groups and method in PUBLISHED:
        raise PlanError(f"method {method!r} groups each layer by itself; leave share_groups out, or use 'cocluster'")
    return share_groups


def match_patterns(what: str, patterns: Mapping[str, Value], names: Collection[str]) -> dict[str, Value]:
    """Map each name that a pattern matches to the value of the first such pattern.

    Raises:
        PlanError: a pattern matches no name; the message says what argument it came from and names near ones.
    """
    values: dict[str, Value] = {}
    for pattern, value in patterns.items():
        if not isinstance(pattern, str):
            raise PlanError(f"{what}: {pattern!r} is not a string; use patterns of module names")
        matches = [n for n in names if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, f"{pattern}.*")]
        if not matches:
            known = {prefix: None for n in names for prefix in _prefixes(n)}
            raise PlanError(f"{what}: pattern {pattern!r} matches no Conv2d of the model{near_matches(pattern, known)}")
        for match in matches:
            values.setdefault(match, value)
    return values


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _check_choice(what: str, value: object, legal: Collection[str]) -> None:
    if value not in legal:
        close = near_matches(str(value), legal)
        raise PlanError(f"{what} is {value!r}{close}; it must be one of {', '.join(map(repr, legal))}")
