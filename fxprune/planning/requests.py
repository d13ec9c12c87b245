"""What a user may ask for: one object that checks itself, made at the door and carried to whoever needs part of it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, get_args

from fxprune.calibration.recovery import Recovery
from fxprune.criteria import Criterion, ScoreFunction, criterion_of
from fxprune.criteria.snapshots import Snapshot, listed
from fxprune.criteria.variety import Variety
from fxprune.errors import PlanError, near_matches
from fxprune.inference.runtimes import RUNTIMES
from fxprune.planning.latency.layers import check_precision, check_timed
from fxprune.planning.latency.table import LatencyTable, check_latency
from fxprune.planning.patterns import Ignored, as_entries
from fxprune.planning.sensitivity import Cost, Sensitivity
from fxprune.plans import PrunePlan
from fxprune.plans.fields import check_seed, check_share, freeze_ratio
from fxprune.plans.shapes import BLOCKS, FORMS, TARGETS, Groups
from fxprune.vocabulary import (
    CriterionChoice,
    FormChoice,
    Granularity,
    GranularityChoice,
    Method,
    Precision,
    RuntimeName,
    Scope,
    Target,
    VarietyName,
)

GRANULARITIES: tuple[str, ...] = get_args(Granularity)
"""What is removed: kernels, so that convolutions become grouped, or whole filters, so that they become narrower."""
AUTO = "auto"
"""In place of a granularity: a budget is divided among filters and kernels."""
BRANCH = "branch"
"""The granularity of whole residual branches."""
METHODS: tuple[str, ...] = get_args(Method)
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
RECONSTRUCTION = "reconstruction"
"""The criterion of filters that is the error after a refit; the default with calibration data."""
ON_CPU = ("onnxruntime", "openvino", "inductor")
"""Runtimes that fxprune runs on the CPU only, so that they say what the target is."""
MULTIPLE = 4
"""Of which each channel space keeps a multiple, for ONNX Runtime leaves its fast layout where a convolution reads any
other number: MobileNetV2 at 80 % of the MACs takes 4.3 ms with any widths, 3.8 with multiples of 2, 1.9 of 4 and 1.8 of
8 (96 pixels, one thread of an AMD EPYC, dense 1.95).
"""
NARROW = 16
"""Spaces of fewer channels keep any number: of so few multiples there is little to choose from."""
DEFAULT_RATIO = 0.5
"""Of kernel groups, or filters, where neither ratio nor budget is given."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """How much is to go, of what, chosen how, for which device.

    The fields are the arguments of `fxprune.compile` of the same names, which explains them. Once made, a mapping is a
    copy, an iterable a tuple, and `variety` the rule that its name stands for.

    Attributes:
        after: an earlier plan of filters for the same model: what it removes stays removed, and counts. Of `make_plan`
            alone.
        recover: of `compile` alone.

    Raises:
        PlanError: a value is not legal, or contradicts another. What depends on the model is checked by the planners.
    """

    ratio: float | Mapping[str, float] | None = None
    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    latency_table: LatencyTable | None = None
    sensitivity: Sensitivity | None = None
    granularity: GranularityChoice | Mapping[str, float] = "kernel"
    scope: Scope | None = None
    round_to: int | None = None
    groups: Groups | Mapping[str, Groups] = "auto"
    method: Method = "auto"
    form: FormChoice = "auto"
    block: int | None = None
    target: Target | None = None
    runtime: RuntimeName | None = None
    precision: Precision | None = None
    share_groups: bool | None = None
    criterion: CriterionChoice | Criterion | ScoreFunction | None = None
    variety: VarietyName | Variety | None = None
    snapshots: Iterable[Snapshot] | None = None
    ignore: Ignored | Iterable[Ignored] = ()
    seed: int = 0
    progress: bool = False
    recover: bool | float | Mapping[str, Any] = False
    after: PrunePlan | None = None

    def __post_init__(self) -> None:
        """Check the rules above, and copy what could change."""
        self._check_device()
        self._check_granularity()
        self._check_amount()
        self._check_groups()
        check_seed(self.seed)
        _freeze(self, "variety", Variety.parse(self.variety))
        if self.criterion == RECONSTRUCTION and self.granularity != "kernel":
            pass  # for filters it is measured on data, kernels then have the method of that name
        elif self.criterion == RECONSTRUCTION:
            raise PlanError("criterion 'reconstruction' is for filters; for kernels it is method='reconstruction'")
        elif self.criterion is not None:
            criterion_of(self.criterion)
        self._check_method()
        if self.snapshots is not None:
            _freeze(self, "snapshots", listed(self.snapshots))
        if isinstance(self.recover, Mapping):
            _freeze(self, "recover", MappingProxyType(dict(self.recover)))
        Recovery.of(self.recover)
        _freeze(self, "ignore", as_entries(self.ignore))

    # --- what follows from it -----------------------------------------------------------------------------------------

    @property
    def budgets(self) -> Mapping[Cost, float]:
        """The shares of MACs and parameters that may remain, as far as they were asked for."""
        costs: tuple[Cost, ...] = get_args(Cost)
        return {cost: share for cost in costs if (share := getattr(self, cost)) is not None}

    @property
    def shares(self) -> Mapping[str, float]:
        """All that may remain of the whole network, by name."""
        time = {} if self.latency is None else {"latency": self.latency}
        return {cost: share for cost, share in self.budgets.items()} | time

    @property
    def has_budget(self) -> bool:
        """Whether something of the whole network may remain, not of each layer."""
        return bool(self.shares)

    def without_budgets(self, **changes: Any) -> "Request":
        """The request with something else in place of its budgets, such as ratios."""
        return replace(self, macs=None, params=None, latency=None, latency_table=None, sensitivity=None, **changes)

    def by_weights(
        self, ratio: float | Mapping[str, float] | None, groups: Groups | Mapping[str, Groups], form: FormChoice
    ) -> "Request":
        """Kernels of these amounts, chosen in the cheapest way: which of them stay changes no time and no count."""
        return Request(
            ratio=ratio,
            groups=groups,
            form=form,
            block=self.effective_block,
            target=self.target,
            ignore=self.ignore,
            seed=self.seed,
        )

    def with_shares(self, shares: Mapping[str, float]) -> "Request":
        """The request with other budgets, see `shares`."""
        macs, params, latency = (shares.get(name) for name in ("macs", "params", "latency"))
        table = None if latency is None else self.latency_table
        return replace(self, macs=macs, params=params, latency=latency, latency_table=table)

    @property
    def filter_ratio(self) -> float | Mapping[str, float] | None:
        """The ratio of filters: the default if nothing is given, None for a budget."""
        return DEFAULT_RATIO if self.ratio is None and not self.has_budget else self.ratio

    @property
    def runs_in(self) -> RuntimeName:
        """What computes the network on the target."""
        return self.runtime or "torch"

    @property
    def where(self) -> str:
        """The same in words, with the precision if that is less than the model's."""
        return self.runs_in if self.precision is None else f"{self.runs_in} in {self.precision}"

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of `ignore`, in which modules and types have names already, see `ignored_patterns`."""
        return tuple(entry for entry in as_entries(self.ignore) if isinstance(entry, str))

    @property
    def rule(self) -> Variety | None:
        """The rule of `variety`."""
        assert not isinstance(self.variety, str)
        return self.variety

    @property
    def effective_block(self) -> int:
        """How many channels are kept together. None is what suits the target: 16 on `"cuda"`, else 1; and 1 for the
        methods of papers, which choose single channels.
        """
        if self.block is not None:
            return self.block
        return 1 if self.target is None or self.method in PUBLISHED else BLOCKS[self.target]

    def multiple(self, size: int) -> int:
        """What a channel space of so many filters keeps a multiple of."""
        return self.round_to or (MULTIPLE if size >= NARROW else 1)

    @property
    def gives_up_blocks(self) -> bool:
        """Whether the target would like blocks that the method does not know."""
        return self.block is None and self.target is not None and self.effective_block != BLOCKS[self.target]

    @property
    def shares_groups(self) -> bool:
        """Whether layers that write the same channels get the same groups of filters. It costs some accuracy and saves
        gathers. None is True with a target. Blocks that are read whole hold the order of the stream, so that sharing
        would save nothing, and methods of papers group each layer by itself: None is False for both.
        """
        if self.share_groups is not None:
            return self.share_groups
        return self.target is not None and self.effective_block == 1 and self.method not in PUBLISHED

    @property
    def recovery(self) -> Recovery | None:
        """How long to train on the calibration data, if that was asked for."""
        return Recovery.of(self.recover)

    def method_for(self, calibrated: bool) -> str:
        """The method, given whether there is calibration data.

        Raises:
            PlanError: it needs calibration data, or the criterion or variety does not fit it.
        """
        free = self.criterion is None and self.variety is None
        method = self.method if self.method != "auto" else "reconstruction" if calibrated and free else "cocluster"
        if method == "reconstruction" and not calibrated:
            raise PlanError(
                "method 'reconstruction' measures the error on data; pass calibration=, or use method='cocluster'"
            )
        if self.rule is not None:
            self.rule.similarity_for(calibrated)
        return method

    def measures_filters(self, calibrated: bool) -> bool:
        """Whether filters go by the error that a refit leaves, given whether there is calibration data.

        Raises:
            PlanError: it needs calibration data.
        """
        if self.criterion == RECONSTRUCTION and not calibrated:
            raise PlanError(
                "criterion 'reconstruction' measures the error on data; pass calibration=, or use criterion='l2'"
            )
        return calibrated and (self.criterion == RECONSTRUCTION or (self.criterion is None and self.variety is None))

    def parts(self) -> "Iterator[Request]":
        """Requests of one granularity each, in the order in which they are served: filters first."""
        if isinstance(self.granularity, str) and self.granularity != AUTO:
            yield self
            return
        amounts = self.granularity if isinstance(self.granularity, Mapping) else dict.fromkeys(GRANULARITIES)
        usual = {name: _DEFAULTS[name] for name in _KERNELS_ONLY}
        yield replace(self, granularity="filter", ratio=amounts["filter"], **usual)
        usual = {name: _DEFAULTS[name] for name in _FILTERS_ONLY}
        if self.criterion == RECONSTRUCTION:
            usual["criterion"] = None
        yield replace(self, granularity="kernel", ratio=amounts["kernel"], **usual)

    def of_branches(self) -> "Request":
        """The same budget for whole branches."""
        usual = {name: _DEFAULTS[name] for name in _NOT_OF_BRANCHES}
        return replace(self, granularity="branch", **usual)

    # --- checks -------------------------------------------------------------------------------------------------------

    def _check_granularity(self) -> None:
        """See that only what the granularity has is given."""
        given = self.granularity
        names = list(given) if isinstance(given, Mapping) else [given]
        for name in names:
            if name not in GRANULARITIES and given not in (AUTO, BRANCH):
                close = near_matches(str(name), (*GRANULARITIES, BRANCH, AUTO))
                raise PlanError(
                    f"granularity is {name!r}{close}; it must be 'kernel', 'filter', 'branch', or map the first two to "
                    "their ratios: granularity={'filter': 0.25, 'kernel': 0.5}; or 'auto', with a budget"
                )
        if isinstance(given, Mapping):
            self._check_both(names)
            _freeze(self, "granularity", MappingProxyType({name: freeze_ratio(value) for name, value in given.items()}))
            return
        if given == AUTO:
            self._check_auto()
            return
        if given == BRANCH:
            self._check_branches()
            return
        foreign, other, them = (
            (_KERNELS_ONLY, "kernel", "filters") if given == "filter" else (_FILTERS_ONLY, "filter", "kernels")
        )
        for name in foreign:
            if (value := getattr(self, name)) != _DEFAULTS[name]:
                raise PlanError(f"{name}={_short(value)} is for granularity={other!r}; leave it out for {them}")

    def _check_auto(self) -> None:
        """See that there is a budget to divide, and nothing that fits one part of the network only."""
        if not self.has_budget or self.ratio is not None:
            raise PlanError(
                "granularity='auto' divides a budget among branches, filters and kernels; pass macs=, params= or "
                "latency=, or several of them, and no ratio; or map two to their ratios: granularity={'filter': 0.25, "
                "'kernel': 0.5}"
            )
        for name in ("sensitivity", "snapshots", "after"):
            if (value := getattr(self, name)) is not None:
                raise PlanError(
                    f"{name}={_short(value)} does not fit the network that removed filters leave; leave it out for "
                    "granularity='auto'"
                )

    def _check_branches(self) -> None:
        """See that nothing is given that whole branches have not."""
        for name in _NOT_OF_BRANCHES:
            if (value := getattr(self, name)) != _DEFAULTS[name]:
                raise PlanError(f"{name}={_short(value)} has no meaning for granularity='branch'; leave it out")

    def _check_both(self, names: Sequence[str]) -> None:
        """See that a mapping from granularity to ratio is the only answer to how much goes."""
        if set(names) != set(GRANULARITIES):
            raise PlanError(
                f"granularity names {names} only; give both ratios, or granularity={names[0]!r} with ratio="
            )
        for name in ("macs", "params", "latency"):
            if getattr(self, name) is not None or self.ratio is not None:
                raise PlanError(f"granularity has a ratio for each already; leave ratio and {name} out")
        if self.snapshots is not None:
            raise PlanError(
                "snapshots do not fit the network that removed filters leave; plan one granularity at a time"
            )

    def _check_amount(self) -> None:
        """See that one thing says how much goes, and what it needs is there."""
        if self.ratio is not None and self.has_budget:
            budgets = ", ".join(f"{name}={share!r}" for name, share in self.shares.items())
            raise PlanError(
                f"ratio={_short(self.ratio)} is what each layer loses, and {budgets} what may remain of the whole "
                "network; pass a ratio or budgets"
            )
        if self.has_budget and self.form == "partition":
            raise PlanError("a budget needs ratios of any value, which the partition form has not; leave form out")
        for name, kind, how in _TABLES:
            table = getattr(self, name)
            if table is not None and not isinstance(table, kind):
                raise PlanError(
                    f"{name} is a {type(table).__name__}; pass what {how} returned, or {kind.__name__}.from_json"
                )
        if self.sensitivity is not None and not self.has_budget:
            raise PlanError("sensitivity is for a budget; pass macs= or params= or latency= with it, or leave it out")
        if self.latency_table is not None and self.latency is None:
            raise PlanError("latency_table is for a share of the latency; pass latency= with it, or leave it out")
        for cost, share in self.budgets.items():
            check_share(share, cost)
        if self.latency is not None:
            check_latency(self.latency)
            if self.target is None:
                raise PlanError(
                    f"latency={self.latency:.4g} needs the device to be fast on; pass target='cpu' or target='cuda', "
                    "or runtime='onnxruntime' or 'openvino'"
                )
            check_timed(self.runs_in, self.precision)
        if self.scope is not None and self.scope not in get_args(Scope):
            raise PlanError(f"scope is {self.scope!r}; it must be 'local' or 'global', or None for what suits")
        if self.ratio is not None:
            _freeze(self, "ratio", freeze_ratio(self.ratio))
            if self.scope == "global" and isinstance(self.ratio, Mapping):
                raise PlanError(
                    "ratio maps patterns to shares, but scope='global' ranks all layers together; use 'local'"
                )
        if self.round_to is not None and (
            isinstance(self.round_to, bool) or not isinstance(self.round_to, int) or self.round_to < 1
        ):
            raise PlanError(f"round_to is {self.round_to!r}; it must be an integer, 1 or more, or None for what suits")

    def _check_groups(self) -> None:
        for count in self.groups.values() if isinstance(self.groups, Mapping) else (self.groups,):
            if count != "auto" and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise PlanError(f"groups is {count!r}; it must be a positive integer, 'auto', or map patterns to these")
        if isinstance(self.groups, Mapping):
            _freeze(self, "groups", dict(self.groups))
        _check_choice("method", self.method, METHODS)
        _check_choice("form", self.form, FORMS)
        if self.method in PUBLISHED and self.form == "partition":
            raise PlanError(f"method {self.method!r} is for the overlap form; use form='auto', or method='cocluster'")

    def _check_device(self) -> None:
        if self.target is not None:
            _check_choice("target", self.target, TARGETS)
        if self.runtime is not None:
            _check_choice("runtime", self.runtime, RUNTIMES)
            if self.target is None and self.runtime in ON_CPU:
                _freeze(self, "target", "cpu")
            elif self.target == "cuda" and self.runtime in ON_CPU:
                raise PlanError(
                    f"runtime={self.runtime!r} runs on the CPU, and the target is 'cuda'; leave one of them out"
                )
            elif self.target is None:
                raise PlanError(f"runtime={self.runtime!r} needs the device to run on; pass target='cpu' or 'cuda'")
        check_precision(self.runs_in, self.precision)
        if self.block is not None and (
            isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 1
        ):
            raise PlanError(
                f"block is {self.block!r}; it must be a positive integer, such as 8, or None for what suits the target"
            )
        if self.block is not None and self.block > 1 and self.method in PUBLISHED:
            raise PlanError(f"method {self.method!r} chooses channels one by one; leave block out, or use 'cocluster'")
        if self.share_groups is not None and not isinstance(self.share_groups, bool):
            raise PlanError(
                f"share_groups is {self.share_groups!r}; it must be True, False, or None for what suits the target"
            )
        if self.share_groups and self.method in PUBLISHED:
            raise PlanError(
                f"method {self.method!r} groups each layer by itself; leave share_groups out, or use 'cocluster'"
            )

    def _check_method(self) -> None:
        for what in ("criterion", "variety"):
            if getattr(self, what) is not None and self.method not in ("auto", "cocluster"):
                raise PlanError(f"method {self.method!r} has its own score; leave {what} out, or use 'cocluster'")
        if self.method == "tmi" and self.snapshots is None:
            raise PlanError(
                "method 'tmi' compares the weights with earlier states of the same training run; pass snapshots=[state "
                "dicts or paths], or use method='cocluster', which needs none"
            )


_DEFAULTS: Mapping[str, Any] = {field.name: field.default for field in fields(Request)}
_KERNELS_ONLY = ("sensitivity", "groups", "method", "form", "block", "share_groups")
"""Fields that say how kernels are grouped."""
_FILTERS_ONLY = ("scope", "round_to", "after")
"""Fields that say which filters go."""
_NOT_OF_BRANCHES = (*_KERNELS_ONLY, *_FILTERS_ONLY, "criterion", "variety", "snapshots", "latency_table")
"""Fields that have no meaning for whole branches."""
_TABLES: tuple[tuple[str, type, str], ...] = (
    ("sensitivity", Sensitivity, "fxprune.measure_sensitivity"),
    ("latency_table", LatencyTable, "fxprune.measure_latency"),
)


def _freeze(request: Request, name: str, value: object) -> None:
    object.__setattr__(request, name, value)


def _check_choice(what: str, value: object, legal: tuple[str, ...]) -> None:
    if value not in legal:
        close = near_matches(str(value), legal)
        raise PlanError(f"{what} is {value!r}{close}; it must be one of {', '.join(map(repr, legal))}")


def _short(value: object) -> str:
    return repr(value) if isinstance(value, str | int | float) else f"a {type(value).__name__}"
