"""Prune while training, and keep what is pruned at zero: one object that any training loop can call.

The masked dense network is trained, not the small one: pruned weights are zero after every step, so that it computes
what the rewritten network computes, and `Sparsifier.rewrite` gives that network at any time. Elementwise optimizers
(SGD, Adam and their kin) move the weights that stay as they would in the small network. What looks at all gradients at
once does not: pruned weights still have gradients, and they count in the norm that is clipped.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from fxprune.calibration.subject import Subject
from fxprune.criteria.snapshots import load_snapshots
from fxprune.errors import FxpruneError, PlanError
from fxprune.exact.rewriting import rewrite
from fxprune.exact.verification import verify
from fxprune.graph.copying import tensors_of
from fxprune.graph.examples import Inputs
from fxprune.planning.hints import refuse_unknown
from fxprune.planning.making import plan_for
from fxprune.planning.patterns import ignored_patterns
from fxprune.planning.requests import DEFAULT_RATIO, GRANULARITIES, Request
from fxprune.plans import PrunePlan
from fxprune.plans.eligibility import parameters_of_several_modules
from fxprune.plans.masking import kept_entries, zero_pruned
from fxprune.training.gradual import narrow
from fxprune.training.schedules import OneShot, Schedule, resolve_schedule
from fxprune.vocabulary import Granularity, Output, PruningSchedule

EVENTS = 100
"""Into how many equal parts the training is divided by the steps at which a gradual schedule plans anew, unless said
otherwise. Zhu & Gupta 2017, section 3, plan every 100 to 1000 steps and find no difference between them."""
VERSION = 1
REFUSED = ("latency", "latency_table", "calibration", "verify", "fold_batch_norm")


def sparsify(
    model: nn.Module,
    schedule: PruningSchedule | Schedule = "agp",
    *,
    steps: int,
    ratio: float | Mapping[str, float] | None = None,
    granularity: Granularity = "kernel",
    optimizer: Optimizer | None = None,
    every: int | None = None,
    start: float | None = None,
    end: float | None = None,
    **planning: Any,
) -> "Sparsifier":
    """Prune `model` while it trains. Nothing is pruned until the first step.

        sparsifier = fxprune.sparsify(model, "agp", steps=epochs * len(loader), ratio=0.5, optimizer=optimizer)
        ...                                          # train as ever
        small = sparsifier.rewrite(example_inputs)

    Without `optimizer=` call `sparsifier.step()` after every `optimizer.step()`.

    The given model is masked in place: it is the one being trained. Each plan drops all that the plan before it drops.
    In granularity `"kernel"` a gradual schedule fixes the groups of filters at its first event, by co-clustering at the
    target ratio in overlap form, see `fxprune.training.gradual`; `"one-shot"` takes what `make_plan` gives at its
    moment, in any form and by any method.

    Args:
        model: the model in training. Under `DistributedDataParallel`, `DataParallel` or `torch.compile` the module
            inside is planned; in a process group all take the plan of its first process.
        schedule: a name in `fxprune.training.schedules.SCHEDULES` or a `Schedule`.
        steps: how many steps the training has, that is, how often `step` will be called.
        ratio: see `make_plan`: the target.
        granularity: `"kernel"` or `"filter"`.
        optimizer: calls `step` itself after each of its steps, and its buffers (momentum, Adam's moments) are cleared
            where a weight is pruned. Steps that a `torch.amp.GradScaler` skips do not count.
        every: least number of steps from one plan to the next; by default a hundredth of `steps`.
        start: share of the training before the first pruning; None is the schedule's own.
        end: share of the training at which the target is reached; None is the schedule's own.
        planning: more arguments of `make_plan`, such as `macs` for the target, `criterion`, `variety`, `groups`,
            `snapshots`, `ignore`, `example_inputs` and `seed`. A criterion with data (Taylor) needs data that can be
            read once a plan: a list or a loader.

    Raises:
        PlanError: an argument is not legal, nothing can be planned, or the optimizer does not train the model.
        TraceError: the model cannot be traced.
    """
    chosen = resolve_schedule(schedule, start, end)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise PlanError(f"steps is {steps!r}; it must be the number of steps of the training, 1 or more")
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise PlanError(f"every is {every!r}; it must be a number of steps, 1 or more")
    if granularity not in GRANULARITIES:
        raise PlanError(f"granularity is {granularity!r}; it must be {' or '.join(map(repr, GRANULARITIES))}")
    for name in REFUSED:
        if planning.pop(name, None) is not None:
            raise PlanError(
                f"{name} has no meaning while the weights still change; make a plan with fxprune.make_plan, then "
                "train under it with fxprune.hold"
            )
    example_inputs = planning.pop("example_inputs", None)
    if granularity == "kernel" and chosen.gradual:
        _check_gradual(chosen, planning)
        planning |= {"method": "cocluster", "form": "overlap"}
    refuse_unknown(planning.keys() - {field.name for field in fields(Request)})
    planning["ignore"] = ignored_patterns(planning.get("ignore", ()), _unwrap(model)[0])
    request = Request(ratio=ratio, granularity=granularity, **planning)
    if request.ratio is None and not request.budgets:
        request = replace(request, ratio=DEFAULT_RATIO)
    if request.snapshots is not None:  # read now: there will be many plans, and a file may be gone by then
        request = replace(request, snapshots=load_snapshots(request.snapshots, _unwrap(model)[0]))
    pruning = Pruning(chosen, steps, every or max(1, steps // EVENTS), request, example_inputs)
    return Sparsifier(model, pruning, optimizer)


def hold(model: nn.Module, plan: PrunePlan, optimizer: Optimizer | None = None) -> "Sparsifier":
    """Keep what `plan` drops at zero while `model` trains: fine-tuning of a masked model, training of a ticket.

        masked = fxprune.mask(model, plan, calibration)
        sparsifier = fxprune.hold(masked, plan, optimizer)
        ...                                          # train as ever
        small = sparsifier.rewrite(example_inputs)

    Args:
        model: the dense or masked model; it is masked in place, at once.
        plan: what to drop.
        optimizer: see `sparsify`.

    Raises:
        PlanError: the plan was made for another model, a weight cannot be held at zero, or the optimizer does not train
            the model.
    """
    return Sparsifier(model, Pruning(OneShot(), 0, 1, Request()), optimizer, plan)


@dataclass(frozen=True)
class Pruning:
    """How a sparsifier prunes.

    Attributes:
        schedule: the schedule.
        steps: how many steps the training has; 0 where a plan is held.
        every: least number of steps from one plan to the next.
        request: what the target is and how it is planned.
        example_inputs: positional arguments of forward.
    """

    schedule: Schedule
    steps: int
    every: int
    request: Request
    example_inputs: Inputs | None = None


class Sparsifier:
    """What `sparsify` and `hold` return: counts the steps, plans anew when it is time, and zeroes what is pruned.

    Attributes:
        schedule: the schedule.
        steps: how many steps the training has; 0 where a plan is held.
        every: least number of steps from one plan to the next.
        plan: what is pruned now.
        share: share of the target sparsity that it has.
    """

    def __init__(
        self, model: nn.Module, pruning: Pruning, optimizer: Optimizer | None, plan: PrunePlan | None = None
    ) -> None:
        self.schedule, self.steps, self.every = pruning.schedule, pruning.steps, pruning.every
        self.share = 0.0
        self._module, self._parallel = _unwrap(model)
        self._request, self._example_inputs = pruning.request, pruning.example_inputs
        self._output: Output = "auto"  # the first plan decides
        self._step = 0
        self._planned_at: int | None = None
        self._target: PrunePlan | None = None  # whose groups of filters all plans of a gradual schedule have
        self._optimizer = optimizer
        if optimizer is not None:
            _check_optimizer(optimizer, self._module)
        if plan is None:
            preview = self._planned(self._request)  # what cannot be planned is told before the training
            narrower = (name for name, channels in preview.removed.items() if channels.asked_ratio is not None)
            names = dict.fromkeys((*preview.layers, *narrower), "not pruned yet")
            self.plan = PrunePlan({}, {**preview.skipped, **names})
            self._kept: dict[str, Tensor] = {}
        else:
            self.share = 1.0
            self._adopt(plan)
        self._hook = None if optimizer is None else optimizer.register_step_post_hook(lambda *_: self._advance())

    @property
    def progress(self) -> float:
        """Share of the training that is done, in `[0, 1]`; 1 where a plan is held."""
        return min(1.0, self._step / self.steps) if self.steps else 1.0

    @property
    def finished(self) -> bool:
        """Whether the target is reached; weights go on being held at zero."""
        return self.share == 1

    def step(self) -> None:
        """Count one step of the optimizer, prune more if it is time, and zero what is pruned.

        Raises:
            FxpruneError: the optimizer was handed over and does this itself.
            PlanError: planning failed, for instance because a weight became NaN.
        """
        if self._hook is not None:
            raise FxpruneError("the optimizer calls the sparsifier after each step; leave sparsifier.step() out")
        self._advance()

    def rewrite(self, example_inputs: Inputs | None = None) -> Any:
        """The smaller network that computes what the model computes now, see `fxprune.rewrite`; the model stays.

        Args:
            example_inputs: arguments of forward, for shapes and to verify the result; by default those that
                `sparsify` was given. Without any the result is not verified.

        Raises:
            PassError: a pruned weight is not zero, because steps were made without `step`.
            TraceError: the model cannot be traced.
            VerificationError: the result differs from the model.
        """
        inputs = self._example_inputs if example_inputs is None else example_inputs
        small = rewrite(self._module, self.plan, inputs, output=self._output)
        if inputs is not None:
            verify(small, self._module, inputs)
        return small

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on later, as strings and numbers, ready for JSON. The weights are not in it."""
        return {
            "version": VERSION,
            "schedule": repr(self.schedule),
            "steps": self.steps,
            "every": self.every,
            "step": self._step,
            "share": self.share,
            "planned_at": self._planned_at,
            "plan": self.plan.to_json(),
            "target": None if self._target is None else self._target.to_json(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, and zero what its plan drops. The weights may be loaded before or after.

        Args:
            state: of a sparsifier that was made with the same arguments for the same model.

        Raises:
            PlanError: it is something else.
        """
        own = self.state_dict()
        if not isinstance(state, Mapping) or state.keys() != own.keys():
            raise PlanError(f"the state is no state of a sparsifier: it must have the fields {', '.join(own)}")
        for name in ("version", "schedule", "steps", "every"):
            if state[name] != own[name]:
                raise PlanError(
                    f"the state is of a sparsifier with {name} {state[name]}, this one has {own[name]}; make it with "
                    "the same arguments"
                )
        plan = PrunePlan.from_json(state["plan"])
        target = None if state["target"] is None else PrunePlan.from_json(state["target"])
        self._adopt(plan)
        self._step, self.share, self._planned_at, self._target = (
            state["step"],
            state["share"],
            state["planned_at"],
            target,
        )

    def remove(self) -> None:
        """Take the hook off the optimizer; from then on nothing is held at zero unless `step` is called."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _advance(self) -> None:
        self._step += 1
        share = self.schedule(self.progress)
        waited = self._planned_at is None or self._step - self._planned_at >= self.every
        if share > self.share and (waited or share == 1):
            plan = self._agreed(self._plan_at(share))
            self._adopt(plan)
            self.share, self._planned_at = share, self._step
        else:
            self._zero()

    def _plan_at(self, share: float) -> PrunePlan:
        before = None if self._planned_at is None else self.plan
        if self._request.granularity == "filter":
            return self._planned(replace(_scaled(self._request, share), after=before))
        if not self.schedule.gradual:
            return self._planned(self._request)
        if self._target is None:
            self._target = self._planned(self._request)
        return narrow(self._module, self._target, self.plan, share, self._request)

    def _planned(self, request: Request) -> PrunePlan:
        subject = Subject(self._module, self._example_inputs, None, self._output)
        self._output = "module" if subject.is_recorded else "graph"
        return plan_for(subject, request)[0]

    def _agreed(self, plan: PrunePlan) -> PrunePlan:
        """The plan of the first process. Equal weights give equal plans, but a criterion may have data of its own in
        each process, and networks that are pruned differently would drift apart without a word.
        """
        group = None if self._parallel is None else self._parallel.process_group
        if group is None or distributed.get_world_size(group) == 1:
            return plan
        texts = [plan.to_json(), None if self._target is None else self._target.to_json()]
        distributed.broadcast_object_list(texts, distributed.get_global_rank(group, 0), group)
        self._target = None if texts[1] is None else PrunePlan.from_json(texts[1])
        return PrunePlan.from_json(texts[0] or "")

    def _adopt(self, plan: PrunePlan) -> None:
        kept = kept_entries(self._module, plan)
        shared = parameters_of_several_modules(self._module)
        parameters = dict(self._module.named_parameters(remove_duplicate=False))
        for name in kept:
            if name in parameters and id(parameters[name]) in shared:
                raise PlanError(
                    f"{name}: the parameter belongs to several modules, and only one of them is pruned; leave the "
                    "layer out of the plan"
                )
        zero_pruned(self._module, kept)  # refuses what it cannot mask
        self.plan, self._kept = plan, kept
        self._zero()

    @torch.no_grad()
    def _zero(self) -> None:
        zero_pruned(self._module, self._kept)
        if self._optimizer is None:
            return
        tensors = tensors_of(self._module)
        for name, stays in self._kept.items():
            for value in self._optimizer.state.get(tensors[name], {}).values():
                if isinstance(value, Tensor) and value.shape == stays.shape:
                    value.masked_fill_(~stays.to(value.device), 0)


def _check_gradual(schedule: Schedule, planning: Mapping[str, Any]) -> None:
    for name, legal in (("method", ("auto", "cocluster")), ("form", ("auto", "overlap"))):
        if planning.get(name, "auto") not in legal:
            raise PlanError(
                f"{name} is {planning[name]!r}, but schedule {schedule.name!r} shrinks co-clustered groups in overlap "
                f"form; leave {name} out, or use schedule='one-shot'"
            )


def _scaled(request: Request, share: float) -> Request:
    """The request at a share of the target sparsity."""
    if request.has_budget:
        return request.with_shares({name: 1 - (1 - left) * share for name, left in request.shares.items()})
    if isinstance(request.ratio, Mapping):
        return replace(request, ratio={pattern: value * share for pattern, value in request.ratio.items()})
    assert request.ratio is not None
    return replace(request, ratio=request.ratio * share)


def _unwrap(model: nn.Module) -> tuple[nn.Module, DistributedDataParallel | None]:
    """The module inside wrappers that run it, and the wrapper that spreads it over processes."""
    parallel = None
    while True:
        if isinstance(model, DistributedDataParallel):
            parallel = model
        inside = model.module if isinstance(model, DataParallel | DistributedDataParallel) else None
        inside = getattr(model, "_orig_mod", None) if inside is None else inside  # torch.compile
        if not isinstance(inside, nn.Module):
            return model, parallel
        model = inside


def _check_optimizer(optimizer: Optimizer, module: nn.Module) -> None:
    if not isinstance(optimizer, Optimizer):
        raise PlanError(
            f"optimizer is a {type(optimizer).__name__}; pass a torch.optim.Optimizer, or leave it out and call "
            "sparsifier.step() after each step"
        )
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in trained for parameter in module.parameters()):
        raise PlanError(
            "the optimizer has no parameter of the model; make it from model.parameters() of the same model, or leave "
            "it out and call sparsifier.step() after each step"
        )
