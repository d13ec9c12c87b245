"""Make a plan: decide for each convolution whether it is pruned, into how many groups, and which kernels stay."""

from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from types import MappingProxyType

import numpy as np
import torch
from threadpoolctl import ThreadpoolController, threadpool_limits
from torch import Tensor, nn
from tqdm import tqdm

from fxprune.calibration.held_out import regularized
from fxprune.calibration.samples import Samples
from fxprune.calibration.subject import Subject
from fxprune.criteria import Evidence, kernel_scores, resolve
from fxprune.criteria.snapshots import load_snapshots
from fxprune.criteria.variety import cosine_similarity, functional_similarity, vary
from fxprune.errors import PlanError
from fxprune.graph.convolutions import Convolution, convolutions, kernels_of
from fxprune.methods import Clustering, Labels, Mask, Matrix, cocluster, common_groups, reconstruction, srgkp, tmi_gkp
from fxprune.methods.cocluster import Layer, choose_channels, in_blocks, share_lost
from fxprune.planning.patterns import match_patterns
from fxprune.planning.requests import DEFAULT_RATIO, PUBLISHED, Request
from fxprune.plans import GroupedKernels, PrunePlan
from fxprune.plans.eligibility import check_model, check_weight, parameters_of_several_modules, skip_reason
from fxprune.plans.fields import nearest_divisor
from fxprune.plans.shapes import Shape, accurate_groups, choose_shape

ZERO = "ratio is 0"
"""Why a layer stays whole that was asked to."""
PUBLISHED_GROUPS = 8
"""Of each convolution in the published methods; "auto" takes fewer in narrow layers, to be fast."""


class Planner:
    """What is decided about a model before any kernel is looked at, and how the kernels of each layer are chosen.

    A pattern is a module name with the wildcards of `fnmatch`; it also matches all below the modules it names:
    `"layer1"` matches `"layer1.0.conv1"`. Of several patterns the first that matches counts. A module that has several
    names goes by the first.

    Args:
        model: any module with convolutions, on any device, in any floating-point type. It is only read.
        request: what is asked for. Of its amounts only the ratio counts here.
        calibrated: whether `choose` will be given samples.
        accurate: whether the number of groups, where it is open, serves the accuracy at the ratios, not speed.
        obstacles: convolutions that the graph does not allow to be grouped, with the reason.
        writers: sets of convolutions, see `fxprune.channels.writers.common_writers`. Those of a set that have equally
            many groups get the same groups of filters in the same order.

    Attributes:
        shapes: what becomes of each convolution that is pruned.
        skipped: the others, with the reason.

    Raises:
        PlanError: a pattern matches nothing, the model has no convolution or is quantized, a number of groups that was
            given for single layers does not divide the filters of one, or the method needs data that are not there.
    """

    def __init__(
        self,
        model: nn.Module,
        request: Request,
        *,
        calibrated: bool = False,
        accurate: bool = False,
        obstacles: Mapping[str, str] = MappingProxyType({}),
        writers: Iterable[Collection[str]] = (),
    ) -> None:
        self._request, self._seed, self._variety = request, request.seed, request.rule
        self._ratio = DEFAULT_RATIO if request.ratio is None else request.ratio
        self._method, self._accurate = request.method_for(calibrated), accurate
        check_model(model)
        convs = convolutions(model)
        if not convs:
            raise PlanError(f"{type(model).__name__} has no convolution; fxprune prunes only these")
        if "" in convs:
            raise PlanError("the model is itself a convolution; wrap it: torch.nn.Sequential(conv)")
        self._snapshots = () if request.snapshots is None else load_snapshots(request.snapshots, model)
        self._moments: dict[str, Tensor] | None = {} if calibrated else None
        evidence = Evidence(model, next(iter(self._snapshots), None), self._moments, self._seed)
        self._criterion, self._score = resolve("l2" if request.criterion is None else request.criterion, evidence)
        self._near: dict[str, str] = {}  # why a layer has another number of groups than was asked for
        self._ratios, self.shapes, self.skipped = self._shapes(model, convs, obstacles)
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
        energy = (kernels_of(conv).detach().double().flatten(1) * samples.scale[:, None]).square() * variance
        self._energies[name] = energy.view(*kernels_of(conv).shape[:2], -1).sum(2).cpu().numpy()

    def from_weights(self, progress: bool = False) -> PrunePlan:
        """Make the whole plan, without samples.

        Args:
            progress: show a bar on stderr.

        Raises:
            PlanError: see `choose`.
        """
        names = tqdm(self.shapes, desc="planning", unit="conv", disable=not progress)
        return self.plan({name: self.choose(name, self._convs[name]) for name in names})

    def choose(self, name: str, conv: Convolution, samples: Samples | None = None) -> GroupedKernels:
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
        if self._request.gives_up_blocks:
            notes = dict.fromkeys(layers, f"method {self._method!r} keeps channels one by one, not in aligned blocks")
        for name, note in self._near.items():
            if name in layers:
                notes[name] = f"{notes[name]}; {note}" if name in notes else note
        return PrunePlan(layers, self.skipped, self._ratio, self._method, criterion, self._seed, notes)

    def _shapes(
        self, model: nn.Module, convs: Mapping[str, Convolution], obstacles: Mapping[str, str]
    ) -> tuple[dict[str, float], dict[str, Shape], dict[str, str]]:
        """Asked ratio and shape of each convolution that is pruned, and the reason for each other."""
        request, groups = self._request, self._request.groups
        form = "overlap" if self._method in PUBLISHED else request.form
        ratio = self._ratio
        ignored = match_patterns("ignore", dict.fromkeys(request.patterns, True), convs)
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
                reason = obstacles.get(name) or skip_reason(conv, shared) or "no pattern of ratio matches"
            elif ratios[name] == 0:
                reason = ZERO
            elif name in obstacles:
                reason = obstacles[name]
            else:
                reason = skip_reason(conv, shared)
            if reason:
                skipped[name] = reason
                continue
            asked = count = wanted.get(name, "auto")
            if count == "auto" and self._method in PUBLISHED and conv.out_channels % PUBLISHED_GROUPS == 0:
                count = PUBLISHED_GROUPS
            elif count == "auto" and self._accurate:
                count = accurate_groups(conv.out_channels)
            if asked != "auto" and not isinstance(groups, Mapping):  # one number for all: a wish
                near = nearest_divisor(conv.out_channels, asked)
                if near is None or (near != asked and form == "partition"):
                    skipped[name] = f"{conv.out_channels} filters do not divide into {asked} groups"
                    continue
                count = near
                if near != asked:
                    self._near[name] = f"in {near} groups: {conv.out_channels} filters do not divide into {asked}"
            try:
                shape = choose_shape(
                    conv.out_channels,
                    conv.in_channels,
                    ratios[name],
                    count,
                    form,
                    request.effective_block,
                    request.target,
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

    def _one_thread(self) -> AbstractContextManager[object]:
        """Keep numeric libraries to one thread: the matrices are small, and on a busy machine threads that wait for
        each other cost ten times the work.
        """
        limited: AbstractContextManager[object] = (
            threadpool_limits(1)  # TMI-GKP loads such a library on the way
            if self._method == "tmi"
            else self._pools.limit(limits=1)
        )
        return limited

    @cached_property
    def _pools(self) -> ThreadpoolController:
        """The numeric libraries that are loaded, looked for once: it takes longer than planning a narrow layer."""
        return ThreadpoolController()

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
            with self._one_thread():
                labels = common_groups(layers, self.shapes[name].groups, self._seed)
            self._labels |= dict.fromkeys(together, labels)
        return self._labels.get(name)

    def _cluster(
        self, name: str, conv: Convolution, shape: Shape, samples: Samples | None
    ) -> tuple[Clustering, float | None]:
        """The clustering, and the share of redundant kernel groups if variety looked for them."""
        if self._method == "reconstruction":
            assert samples is not None
            moments = regularized(samples, kernels_of(conv), shape.groups, shape.kept, self._seed)
            clustering = reconstruction(
                kernels_of(conv),
                *moments,
                shape.groups,
                shape.kept,
                shape.form,
                self._seed,
                shape.block,
                self._common_groups(name),
            )
            return clustering, None
        with self._one_thread():
            if self._method == "tmi":
                weight = _as_matrix(kernels_of(conv))
                earlier = [state[f"{name}.weight"].double().cpu().numpy() for state in self._snapshots]
                return tmi_gkp(weight, earlier, shape.groups, shape.kept, seed=self._seed)[0], None
            if self._method == "srgkp":
                return srgkp(_as_matrix(kernels_of(conv)), shape.groups, shape.kept), None
            if samples is not None and self._moments is not None:
                self._moments[name] = samples.second_moment(conv.in_channels)
            scores = kernel_scores(name, conv, self._score, self._criterion)
            labels = self._common_groups(name)
            clustering = cocluster(
                scores, shape.groups, shape.kept, shape.form, self._seed, block=shape.block, labels=labels
            )
            if self._variety is None:
                return clustering, None
            return self._varied(clustering, _as_matrix(kernels_of(conv)), scores, shape, samples)

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
        filters, channels = weight.shape[:2]
        weight = weight.reshape(
            filters, channels // block, -1
        )  # (O, C / block, taps): a block as a channel of many taps
        if self._variety.similarity_for(samples is not None) == "functional":
            assert samples is not None
            gram = samples.gram().cpu().numpy()
            similarity = np.stack([functional_similarity(weight[members], gram) for members in groups])
        else:
            slabs = weight[groups].swapaxes(1, 2)  # (n, C / block, d, taps)
            similarity = cosine_similarity(slabs.reshape(*slabs.shape[:2], -1))
        kept = shape.kept // block
        remapped, redundancy = vary(in_blocks(totals, block), kept, similarity, self._variety)
        return choose_channels(remapped, kept, shape.form).repeat(block, axis=1), redundancy.share


def _as_matrix(weight: Tensor) -> Matrix:
    matrix: Matrix = weight.detach().double().cpu().numpy()
    return matrix


def prunable_shapes(subject: Subject, request: Request) -> dict[str, Shape]:
    """The shapes of all convolutions that can be pruned, in the form that any ratio has.

    Raises:
        PlanError: see `Planner`.
    """
    usual = Request(groups=request.groups, form="overlap", ignore=request.ignore, target=request.target)
    accurate = serves_accuracy(subject, request)
    return Planner(subject.layers, usual, accurate=accurate, obstacles=subject.obstacles).shapes


def serves_accuracy(subject: Subject, request: Request) -> bool:
    """Whether a budget is spent for accuracy: with data to refit, and no target that it should be fast on."""
    return subject.batches is not None and request.target is None
