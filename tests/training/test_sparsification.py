"""Pruning while training: what is pruned stays zero, plans are nested, and a resumed training is the same one."""

# mypy: disable-error-code="no-untyped-call"

import copy
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from products_harness import fewer, in_turns
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.optim import SGD, Adam, AdamW, Optimizer
from zoo import ResidualAdd

import fxprune
from fxprune.calibration.subject import Subject
from fxprune.criteria import Taylor
from fxprune.errors import FxpruneError, PassError, PlanError
from fxprune.planning import Request
from fxprune.planning.making import plan_for
from fxprune.plans import PrunePlan
from fxprune.plans.masking import kept_entries, zero_pruned
from fxprune.training import gradual, sparsification
from fxprune.training.schedules import SCHEDULES
from fxprune.vocabulary import PruningSchedule

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "momentum and weight decay": lambda params: SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "Adam": lambda params: Adam(params, lr=0.01, amsgrad=True),
    "AdamW": lambda params: AdamW(params, lr=0.01, weight_decay=0.1),
}
X = torch.randn(4, 16, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3])


def net() -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 16, 3, padding=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 4),
        )


def sgd(model: nn.Module) -> Optimizer:
    return OPTIMIZERS["momentum and weight decay"](model.parameters())


def train(model: nn.Module, optimizer: Optimizer, steps: int, sparsifier: fxprune.Sparsifier | None = None) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        if sparsifier is not None:
            sparsifier.step()


def revived(model: nn.Module, plan: PrunePlan) -> int:
    """How many weights that the plan drops are not zero."""
    state = model.state_dict()
    return sum(int(state[name][~stays].count_nonzero()) for name, stays in kept_entries(model, plan).items())


# --- zeros ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, hooked", in_turns(OPTIMIZERS, [True, False]))
def test_what_is_pruned_is_zero_after_every_step(name: str, hooked: bool) -> None:
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, 3)  # momentum from before the pruning pulls at what is pruned
    sparsifier = fxprune.sparsify(model, "agp", steps=8, every=1, optimizer=optimizer if hooked else None)
    seen = []
    for _ in range(10):
        train(model, optimizer, 1, None if hooked else sparsifier)
        assert revived(model, sparsifier.plan) == 0
        seen.append(sum(kernels.ratio for kernels in sparsifier.plan.layers.values()))
    assert seen[-1] == 1.0  # half of each of two layers
    assert len(set(seen)) >= 4
    buffers = [value for state in optimizer.state.values() for value in state.values() if value.shape == (32, 16, 3, 3)]
    pruned = [int(buffer[~kept_entries(model, sparsifier.plan)["0.weight"]].count_nonzero()) for buffer in buffers]
    assert bool(pruned)
    assert (sum(pruned) == 0) == hooked  # only a sparsifier that knows the optimizer can clear them


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_control_without_the_mask_they_revive(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    sparsifier = fxprune.sparsify(model, "one-shot", steps=4, optimizer=optimizer)
    train(model, optimizer, 1)
    assert revived(model, sparsifier.plan) == 0
    monkeypatch.setattr(sparsification, "zero_pruned", lambda *_: None)
    train(model, optimizer, 1)
    assert revived(model, sparsifier.plan) > 100
    with pytest.raises(PassError):
        sparsifier.rewrite()


def test_not_a_number_becomes_zero_too() -> None:
    model = net()
    kept = kept_entries(model, fxprune.make_plan(model))
    weight = model.get_parameter("0.weight")
    with torch.no_grad():
        weight.fill_(torch.nan)
    zero_pruned(model, kept)
    assert torch.equal(weight.isnan(), kept["0.weight"])
    assert weight[~kept["0.weight"]].eq(0).all()
    with pytest.raises(PlanError, match=r"0.weight: the mask is for a parameter \(32, 16, 3, 3\), the model has \(8"):
        zero_pruned(nn.Sequential(nn.Conv2d(16, 8, 3)), kept)


def test_after_the_hook_is_taken_off_nothing_is_held() -> None:
    model = net()
    optimizer = sgd(model)
    sparsifier = fxprune.sparsify(model, "one-shot", steps=4, optimizer=optimizer)
    train(model, optimizer, 2)
    sparsifier.remove()
    train(model, optimizer, 1)
    assert revived(model, sparsifier.plan) > 100
    sparsifier.step()
    assert revived(model, sparsifier.plan) == 0


def test_a_step_that_the_scaler_skips_does_not_count() -> None:
    model = net()
    optimizer = sgd(model)
    sparsifier = fxprune.sparsify(model, "one-shot", steps=4, optimizer=optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, progress in ((1.0, 0.25), (torch.inf, 0.25), (1.0, 0.5)):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(X), Y) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert sparsifier.progress == progress
        assert revived(model, sparsifier.plan) == 0


# --- plans ----------------------------------------------------------------------------------------------------------


def plans(schedule: PruningSchedule = "agp", **options: Any) -> Iterator[PrunePlan]:
    """The plan after each of 16 steps, of which 12 prune."""
    model = net()
    optimizer = sgd(model)
    sparsifier = fxprune.sparsify(model, schedule, steps=16, every=1, **options)
    for _ in range(16):
        train(model, optimizer, 1, sparsifier)
        yield sparsifier.plan


def comebacks(sequence: list[PrunePlan]) -> int:
    """Kernels that one plan drops and the next keeps."""
    masks = [kept_entries(net(), plan) for plan in sequence]
    count = 0
    for before, after in itertools.pairwise(masks):
        for name, stays in before.items():
            count += int((after[name] & ~stays).sum()) if name in after else int((~stays).sum())
    return count


OPTIONS: dict[str, dict[str, Any]] = {
    "l2": {},
    "random": {"criterion": "random", "seed": 5},
    "variety": {"variety": "soft", "ratio": 0.7},
    "blocks": {"block": 4, "groups": 2},
    "variety in blocks": {"block": 4, "variety": "pairs-pure"},
    "by pattern": {"ratio": {"0": 0.25, "3": 0.75}},
    "budget": {"macs": 0.59, "example_inputs": X},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_plans_are_nested_and_end_at_the_target(options: str) -> None:
    sequence = list(plans(**OPTIONS[options]))
    assert comebacks(sequence) == 0
    target = fxprune.make_plan(
        net(), **({"ratio": 0.5} if options != "budget" else {}) | OPTIONS[options], form="overlap"
    )
    last = sequence[-1]
    assert last.layers.keys() == target.layers.keys()
    for name, kernels in target.layers.items():
        assert last.layers[name].kept_channels == kernels.kept_channels or options == "budget"
        assert last.layers[name].asked_ratio == pytest.approx(kernels.asked_ratio, abs=0.1)
        assert last.layers[name].block == kernels.block
        orders = {plan.layers[name].out_order for plan in sequence if name in plan.layers}
        counts = [plan.layers[name].kept_channels for plan in sequence if name in plan.layers]
        assert len(orders) == 1
        assert counts == sorted(counts, reverse=True)
        assert len(set(counts)) >= 2


def test_control_plans_of_their_own_are_not_nested(monkeypatch: pytest.MonkeyPatch) -> None:
    def anew(model: nn.Module, target: PrunePlan, before: PrunePlan, share: float, request: Request) -> PrunePlan:
        return fxprune.make_plan(
            model, 0.5 * share, form="overlap", criterion=lambda name, conv: torch.rand(conv.weight.shape[:2])
        )

    monkeypatch.setattr(sparsification, "narrow", anew)
    assert comebacks(list(plans())) > 100


def test_each_group_keeps_the_most_important_of_what_it_has() -> None:
    model = net()
    target = fxprune.make_plan(model, 0.5, form="overlap")
    half = gradual.narrow(model, target, PrunePlan({}), 0.5, Request())
    with torch.no_grad():
        for name in target.layers:
            model.get_parameter(f"{name}.weight").normal_(generator=torch.Generator().manual_seed(1))
    masked = fxprune.mask(model, half)
    whole = gradual.narrow(masked, target, half, 1.0, Request())
    for name, kernels in whole.layers.items():
        energy = masked.get_parameter(f"{name}.weight").square().sum((2, 3))
        for group, kept in enumerate(kernels.kept):
            members = list(kernels.out_order[group * kernels.group_width : (group + 1) * kernels.group_width])
            best = energy[members].sum(0).topk(kernels.kept_channels).indices.sort().values
            assert list(kept) == best.tolist()
    assert whole.layers != gradual.narrow(net(), target, half, 1.0, Request()).layers  # other weights, another choice


FILTERS: dict[str, dict[str, Any]] = {
    "l2": {"ratio": 0.5},
    "random": {"ratio": 0.5, "criterion": "random", "seed": 5},
    "variety": {"ratio": 0.5, "variety": "pairs-pure"},
    "global": {"ratio": 0.5, "scope": "global"},
    "budget": {"macs": 0.5, "round_to": 1, "example_inputs": X},
    "by pattern": {"ratio": {"0": 0.75}},
}


@pytest.mark.parametrize("options, schedule", in_turns(FILTERS, ["agp", "one-shot"]))
def test_filters_that_went_stay_away_and_the_target_is_reached(options: str, schedule: PruningSchedule) -> None:
    sequence = list(plans(schedule, granularity="filter", **{"example_inputs": X} | FILTERS[options]))
    assert comebacks(sequence) == 0
    counts = [len(plan.removed["0"].outputs) if "0" in plan.removed else 0 for plan in sequence]
    target = fxprune.make_plan(net(), granularity="filter", **{"example_inputs": X} | FILTERS[options])
    if options == "budget":  # other filters than those of one plan may make it up
        report = fxprune.report(fxprune.rewrite(fxprune.mask(net(), sequence[-1]), sequence[-1], X))
        assert report.macs_pruned == pytest.approx(0.5 * (report.macs_dense or 0), rel=0.02)
    else:
        assert counts[-1] == len(target.removed["0"].outputs)
    assert len(set(counts)) >= (4 if schedule == "agp" else 1)


def test_control_filters_planned_anew_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_for

    def anew(subject: Subject, request: Request) -> tuple[PrunePlan, nn.Module | None]:
        assert isinstance(request.ratio, float)
        sizes = torch.Generator().manual_seed(int(1000 * request.ratio))

        def drawn(name: str, conv: nn.Conv2d) -> Tensor:
            return torch.rand(conv.weight.shape[:2], generator=sizes)

        return plan(subject, replace(request, criterion=drawn, after=None))

    monkeypatch.setattr(sparsification, "plan_for", anew)
    # A filter of zeros scores zero whatever the criterion; without the masks nothing tells that it went.
    monkeypatch.setattr(sparsification, "zero_pruned", lambda model, kept: None)
    assert comebacks(list(plans(granularity="filter", ratio=0.5, example_inputs=X))) > 100


def test_planning_happens_when_it_is_due() -> None:
    assert len({plan.to_json() for plan in plans(SCHEDULES["iterative"].name)}) == 3  # type: ignore[arg-type]
    assert len({plan.to_json() for plan in plans("one-shot", form="partition")}) == 1
    waits = fxprune.sparsify(net(), "agp", steps=16, end=0.99)
    assert waits.every == 1
    waits = fxprune.sparsify(net(), "agp", steps=16, every=5, end=0.5)
    shares = []
    for _ in range(16):
        waits.step()
        shares.append(waits.share)
    assert [i + 1 for i in range(1, 16) if shares[i] > shares[i - 1]] == [6, 8]  # each fifth, and where it ends
    assert waits.finished
    later = fxprune.sparsify(net(), "one-shot", steps=4, start=0.75)
    seen = []
    for _ in range(4):
        later.step()
        seen.append((later.progress, later.finished, len(later.plan.layers)))
    assert seen == [(0.25, False, 0), (0.5, False, 0), (0.75, True, 2), (1.0, True, 2)]


def test_making_a_sparsifier_changes_nothing() -> None:
    model = net()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    sparsifier = fxprune.sparsify(model, "one-shot", steps=3)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert sparsifier.plan.skipped == {"0": "not pruned yet", "3": "not pruned yet"}
    filters = fxprune.sparsify(model, "one-shot", steps=3, granularity="filter", example_inputs=X)
    assert filters.plan.skipped == {"0": "not pruned yet", "3": "not pruned yet"}


# --- rewriting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule, granularity", in_turns(["one-shot", "agp"], ["kernel", "filter"]))
def test_the_rewritten_network_computes_what_the_trained_one_does(schedule: PruningSchedule, granularity: Any) -> None:
    model, images = ResidualAdd(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    optimizer = sgd(model)
    planning = {"granularity": granularity, "example_inputs": images}
    sparsifier = fxprune.sparsify(model, schedule, steps=4, every=1, optimizer=optimizer, **planning)
    for _ in range(4):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    small = sparsifier.rewrite()
    check = fxprune.verify(small, model, images)
    assert check.modes == ("eval", "train")
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        model.get_submodule("head").weight.add_(1)  # type: ignore[operator]
    with pytest.raises(fxprune.VerificationError):
        fxprune.verify(small, model, images)


def test_a_plan_is_held_through_fine_tuning() -> None:
    model = net()
    plan = fxprune.make_plan(model, 0.5)
    masked = fxprune.mask(model, plan)
    optimizer = sgd(masked)
    sparsifier = fxprune.hold(masked, plan, optimizer)
    assert sparsifier.finished
    assert sparsifier.progress == 1
    train(masked, optimizer, 3)
    assert revived(masked, plan) == 0
    small = sparsifier.rewrite(X)
    # Trained further, the small network and the masked one go the same way.
    twin = SGD(small.parameters(), lr=0.05)
    train(small, twin, 2)
    again = SGD(masked.parameters(), lr=0.05)
    train(masked, again, 2, fxprune.hold(masked, plan))
    small.eval()
    masked.eval()
    torch.testing.assert_close(small(X), masked(X), rtol=1e-4, atol=1e-5)
    dense = fxprune.hold(copy.deepcopy(model), plan)
    assert revived(dense._module, plan) == 0  # a model that is dense yet is masked at once


# --- resuming -------------------------------------------------------------------------------------------------------


def run(
    schedule: PruningSchedule, stop: int | None, early_weights: bool = True, forget: bool = False
) -> dict[str, Tensor]:
    """Train 12 steps, with a new process after `stop` of them."""
    model = net()
    optimizer = sgd(model)
    options: dict[str, Any] = {"steps": 12, "every": 2, "criterion": "l1", "ratio": 0.6}
    sparsifier = fxprune.sparsify(model, schedule, optimizer=optimizer, **options)
    train(model, optimizer, 12 if stop is None else stop)
    if stop is not None:
        text = json.dumps(sparsifier.state_dict())
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        model = net()
        optimizer = sgd(model)
        if early_weights:
            model.load_state_dict(saved[0])
        sparsifier = fxprune.sparsify(model, schedule, optimizer=optimizer, **options)
        if not forget:
            sparsifier.load_state_dict(json.loads(text))
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        train(model, optimizer, 12 - stop)
    return dict(model.state_dict())


@pytest.mark.parametrize("schedule", fewer(SCHEDULES, ["agp", "one-shot"]))
def test_a_resumed_training_is_the_uninterrupted_one(schedule: PruningSchedule) -> None:
    whole = run(schedule, None)
    for stop, early_weights in ((0, True), (5, True), (5, False), (11, True)):
        resumed = run(schedule, stop, early_weights)
        assert all(torch.equal(whole[key], value) for key, value in resumed.items())
    if schedule != "one-shot":  # made anew from the pruned weights it is the same plan
        assert not torch.equal(whole["0.weight"], run(schedule, 5, forget=True)["0.weight"])


def test_a_state_of_another_sparsifier_is_refused() -> None:
    sparsifier = fxprune.sparsify(net(), "agp", steps=12)
    other = fxprune.sparsify(net(), "agp", steps=13)
    with pytest.raises(PlanError, match=r"the state is of a sparsifier with steps 13, this one has 12; make it with"):
        sparsifier.load_state_dict(other.state_dict())
    with pytest.raises(PlanError, match=r"schedule Agp\(start=0.0, end=0.75\), this one has Iterative"):
        fxprune.sparsify(net(), "iterative", steps=12).load_state_dict(sparsifier.state_dict())
    with pytest.raises(PlanError, match=r"no state of a sparsifier: it must have the fields version"):
        sparsifier.load_state_dict({"step": 3})


# --- what cannot be held --------------------------------------------------------------------------------------------


def parametrized(plan: PrunePlan) -> Any:
    model = net()
    parametrizations.weight_norm(model.get_submodule("0"))
    return fxprune.hold(model, plan)


def shared(plan: PrunePlan) -> Any:
    model = nn.ModuleList(net().children())
    model.append(nn.Conv2d(16, 32, 3))
    model[-1].weight = model[0].weight
    return fxprune.hold(model, plan)


PLAN = fxprune.make_plan(net())


@pytest.mark.parametrize(
    "make,error,message",
    [
        (lambda: parametrized(PLAN), PlanError, r"0: the plan prunes its weight, but the Param"),
        (lambda: shared(PLAN), PlanError, r"0.weight: the parameter belongs to several modules"),
        (lambda: fxprune.sparsify(net(), steps=0), PlanError, r"steps is 0; it must be the number of steps"),
        (lambda: fxprune.sparsify(net(), steps=5, every=0), PlanError, r"every is 0"),
        (lambda: fxprune.sparsify(net(), steps=5, granularity="row"), PlanError, r"granularity is 'row'"),  # type: ignore[arg-type]
        (lambda: fxprune.sparsify(net(), steps=5, calibration=X), PlanError, r"calibration has no meaning while"),
        (lambda: fxprune.sparsify(net(), steps=5, form="partition"), PlanError, r"form is 'partition', but schedule"),
        (lambda: fxprune.sparsify(net(), steps=5, method="tmi"), PlanError, r"method is 'tmi', but schedule 'agp'"),
        (lambda: fxprune.sparsify(net(), steps=5, ratio=0.5, macs=0.5), PlanError, r"pass a ratio or budgets"),
        (lambda: fxprune.sparsify(net(), steps=5, ignore="stem"), PlanError, r"'stem' matches no convolution"),
        (lambda: fxprune.sparsify(net(), steps=5, optimizer=sgd(net())), PlanError, r"no parameter of the model"),
        (lambda: fxprune.sparsify(net(), steps=5, optimizer="sgd"), PlanError, r"optimizer is a str"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_is_named(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_step_by_hand_and_by_hook_is_refused() -> None:
    model = net()
    sparsifier = fxprune.sparsify(model, steps=4, optimizer=sgd(model))
    with pytest.raises(FxpruneError, match=r"leave sparsifier.step\(\) out"):
        sparsifier.step()


def test_snapshots_are_read_once(tmp_path: Path) -> None:
    model = net()
    path = tmp_path / "first.pt"
    torch.save(model.state_dict(), path)
    optimizer = sgd(model)
    sparsifier = fxprune.sparsify(model, steps=6, every=1, criterion="movement", snapshots=[path], optimizer=optimizer)
    path.unlink()
    train(model, optimizer, 6)
    assert sparsifier.finished
    assert sparsifier.plan.criterion == "movement"


# --- wrappers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_under_distributed_data_parallel_as_without() -> None:
    alone, inside = net(), net()
    for model, wrapped in ((alone, alone), (inside, DistributedDataParallel(inside))):
        optimizer = sgd(wrapped)
        sparsifier = fxprune.sparsify(wrapped, steps=6, every=1, optimizer=optimizer)
        train(wrapped, optimizer, 6)
        assert revived(model, sparsifier.plan) == 0
        assert "0" in sparsifier.plan.layers
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), inside.parameters(), strict=True))


def _process(rank: int, folder: str, agree: bool) -> None:
    """One of two, each with a criterion that reads data of its own; writes its last mask."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    if not agree:
        sparsification.Sparsifier._agreed = lambda self, plan: plan  # type: ignore[method-assign]
    model = DistributedDataParallel(net())
    data = [(torch.randn(4, 16, 6, 6, generator=torch.Generator().manual_seed(rank)), Y)]
    optimizer = sgd(model)
    options: dict[str, Any] = {"steps": 4, "every": 1, "criterion": Taylor(F.cross_entropy, data)}
    sparsifier = fxprune.sparsify(model, optimizer=optimizer, **options)
    train(model, optimizer, 4)
    Path(folder, f"{rank}.json").write_text(json.dumps(sparsifier.state_dict()))
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("agree", [True, False], ids=["agree", "control"])
def test_all_processes_prune_alike(agree: bool, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_process, (str(tmp_path), agree), nprocs=2)  # type: ignore[attr-defined]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert (first == second) == agree
