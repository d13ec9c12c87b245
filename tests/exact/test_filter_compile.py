"""granularity="filter" from end to end: exact, within the budget, in every form in which a network is used."""
# Functions of torch.jit and torch.onnx are untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from equality import assert_same_function, masked_by_hand, randomize
from removal_harness import zeroed
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxprune
from fxprune.criteria import Taylor
from fxprune.exports import save_onnx
from fxprune.models.cifar import CIFAR_MODELS
from fxprune.planning import lossy
from fxprune.plans import PrunePlan, RemovedChannels
from fxprune.plans.masking import kept_entries, remaining, zero_pruned
from fxprune.vocabulary import VarietyName

NETS = ("resnet20", "resnet56", "cifar_vgg16", "cifar_resnet18")
SHARES = (0.7, 0.5, 0.3)
CRITERIA = ("l1", "l2", "random", "movement", "magnitude_increase", "activation", "Taylor")
VARIETIES = (None, "pairs", "pairs-pure", "soft")
SCOPES = ("local", "global")

# Each share, variety and scope at least once, a residual network and a plain one.
FEW = {
    ("resnet20", 0.3, "movement", "pairs", "global"),
    ("resnet20", 0.7, "l1", "soft", "local"),
    ("resnet20", 0.5, "Taylor", "pairs-pure", "global"),
    ("cifar_vgg16", 0.5, "magnitude_increase", None, "local"),
}
TOLERANCE = 0.01


def images(count: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=dtype)


@cache
def dense(name: str, seed: int = 0) -> nn.Module:
    """A network whose parameters and statistics are all random, in float64 and evaluation mode."""
    model: nn.Module = CIFAR_MODELS[name]()
    return randomize(model.double(), seed).eval()


def evidence(name: str, criterion: str) -> dict[str, Any]:
    """A criterion with what it needs to judge by."""
    if criterion == "Taylor":
        return {"criterion": Taylor(F.cross_entropy, [(images(4), torch.tensor([3, 1, 4, 1]))])}
    if criterion in ("movement", "magnitude_increase"):
        return {"criterion": criterion, "snapshots": [dense(name, seed=1).state_dict()]}
    return {"criterion": criterion} | ({"calibration": images(8)} if criterion == "activation" else {})


def check_budget(pruned: fx.GraphModule, share: float) -> None:
    report = fxprune.report(pruned)
    assert report.macs_pruned is not None
    assert report.macs_dense is not None
    assert abs(report.macs_pruned / report.macs_dense - share) <= TOLERANCE * share


def combinations() -> Iterator[object]:
    for case in itertools.product(NETS, SHARES, CRITERIA, VARIETIES, SCOPES):
        marks = [] if case in FEW else [pytest.mark.slow]
        yield pytest.param(*case, marks=marks, id="-".join(map(str, case)))


@pytest.mark.parametrize("name, share, criterion, variety, scope", list(combinations()))
def test_exact_and_within_the_budget(
    name: str, share: float, criterion: str, variety: VarietyName | None, scope: Any
) -> None:
    model, x = dense(name), images()
    plan = fxprune.make_plan(
        model, macs=share, granularity="filter", scope=scope, variety=variety, example_inputs=x,
        **evidence(name, criterion),
    )  # fmt: skip
    assert not plan.layers
    masked = zeroed(model, plan)
    pruned = fxprune.rewrite(masked, plan, x)
    check_budget(pruned, share)
    assert all(gone.outputs or gone.inputs for gone in plan.removed.values())
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
    assert_same_function(pruned, masked, (x,))


def test_a_miss_and_a_difference_would_be_seen() -> None:
    model, x = dense("resnet20"), images()
    plan = fxprune.make_plan(model, macs=0.5, granularity="filter", example_inputs=x)
    pruned = fxprune.rewrite(zeroed(model, plan), plan, x)
    check_budget(pruned, 0.5)
    for other in (0.494, 0.506):
        with pytest.raises(AssertionError):
            check_budget(pruned, other)
    with torch.no_grad():
        pruned.get_parameter("layer2.1.conv1.weight")[3, 5, 1, 1] += 1e-6
    with pytest.raises(AssertionError):
        assert_same_function(pruned, zeroed(model, plan), (x,), ("eval",))


# --- what goes ------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """conv1 feeds one residual block; conv2 is free within it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.conv3, self.norm3 = nn.Conv2d(24, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        y = self.norm3(self.conv3(F.relu(self.norm2(self.conv2(x)))))
        logits: Tensor = self.head(F.relu(x + y).mean((2, 3)))
        return logits


def small(seed: int = 0) -> nn.Module:
    return randomize(Net().double(), seed).eval()


def pixels(count: int = 2) -> Tensor:
    return images(count)[..., :8, :8]


def planned(**options: Any) -> PrunePlan:
    return fxprune.make_plan(small(), granularity="filter", example_inputs=pixels(), **options)


def kept(plan: PrunePlan) -> dict[str, int]:
    """How many filters each convolution keeps."""
    convs = {name: m.out_channels for name, m in small().named_modules() if isinstance(m, nn.Conv2d)}
    return {name: size - len(plan.removed.get(name, RemovedChannels()).outputs) for name, size in convs.items()}


def test_half_of_everything_is_the_default() -> None:
    plan = planned()
    assert kept(plan) == {"conv1": 8, "conv2": 12, "conv3": 8}
    stream = plan.removed["conv1"].outputs
    assert {plan.removed[name].outputs for name in ("norm1", "conv3", "norm3")} == {stream}
    assert plan.removed["conv2"].inputs == plan.removed["head"].inputs == stream
    assert plan.removed["conv3"].inputs == plan.removed["norm2"].outputs == plan.removed["conv2"].outputs


@pytest.mark.parametrize("options", [{"ratio": 0.4}, {"ratio": 0.4, "scope": "global"}, {"macs": 0.5}], ids=str)
def test_round_to(options: dict[str, Any]) -> None:
    assert any(count % 8 for count in kept(planned(round_to=1, **options)).values()), (
        "the control needs a count that is no multiple"
    )
    assert not any(count % 8 for count in kept(planned(round_to=8, **options)).values())


def test_ratio_by_pattern() -> None:
    plan = planned(ratio={"conv2": 0.25})
    assert kept(plan) == {"conv1": 16, "conv2": 20, "conv3": 16}
    assert plan.removed["conv2"].asked_ratio == 0.25
    assert kept(planned(ratio={"conv2": 0.25, "*": 0.5})) == {"conv1": 8, "conv2": 20, "conv3": 8}


def test_conflicting_ratios_for_filters_that_go_together() -> None:
    with pytest.raises(fxprune.PlanError, match=r"conv1 is to lose 0\.5 and conv3 0\.25.*only go together"):
        planned(ratio={"conv1": 0.5, "conv3": 0.25})


def test_ignore_keeps_all_that_goes_with_a_layer() -> None:
    plan = planned(ratio=0.5, ignore="conv3")
    assert kept(plan) == {"conv1": 16, "conv2": 12, "conv3": 16}
    assert plan.skipped == {"conv1": "conv3 is ignored", "conv3": "conv3 is ignored"}
    assert kept(planned(ratio=0.5)) != kept(plan)


def test_after_an_earlier_plan_only_more_goes() -> None:
    first = planned(ratio=0.25, criterion="l2")
    second = planned(ratio=0.5, criterion="random", after=first)
    alone = planned(ratio=0.5, criterion="random")

    def includes(later: PrunePlan) -> bool:
        return all(set(first.removed[name].outputs) <= set(later.removed[name].outputs) for name in first.removed)

    assert includes(second)
    assert kept(second) == kept(alone)
    assert not includes(alone)


@pytest.mark.parametrize("scope", SCOPES)
def test_variety_keeps_one_of_each_pair_of_twins(scope: Any) -> None:
    """Twelve directions, each twice: the criterion alone drops both of the weak ones, variety one of each."""
    model = small()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        distinct = torch.randn(12, 16, 3, 3, generator=generator, dtype=torch.float64)
        distinct *= torch.linspace(1, 2, 12)[:, None, None, None]
        conv2 = model.get_parameter("conv2.weight")
        conv2[0::2], conv2[1::2] = distinct, distinct * 1.01
    options: dict[str, Any] = {"ratio": {"conv2": 0.5}} if scope == "local" else {"params": 0.7, "ignore": "conv1"}
    options |= {"granularity": "filter", "scope": scope, "criterion": "l2", "example_inputs": pixels()}
    plain = fxprune.compile(model, **options)
    varied = fxprune.compile(model, variety="pairs", **options)

    def pairs(pruned: fx.GraphModule) -> list[int]:
        """How many of each pair stay, the weakest pair first."""
        stays = remaining(24, pruned.meta["fxprune"].plan.removed["conv2"].outputs)
        return torch.bincount(stays // 2, minlength=12).tolist()

    assert pairs(plain)[:2] == [0, 0]
    assert min(pairs(varied)) == 1
    assert sum(pairs(varied)) == sum(pairs(plain))
    (layer,) = (layer for layer in fxprune.report(varied).layers if layer.name == "conv2")
    assert layer.redundancy == 1.0


def test_compile_is_its_steps() -> None:
    model, x = small(), pixels()
    options: dict[str, Any] = {"macs": 0.5, "granularity": "filter", "scope": "global", "variety": "soft"}
    plan = fxprune.make_plan(model, example_inputs=x, **options)
    pruned = fxprune.compile(model, example_inputs=x, verify=False, **options)
    assert pruned.meta["fxprune"].plan == plan
    ours, theirs = pruned.state_dict(), fxprune.rewrite(fxprune.mask(model, plan), plan, x).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- refit and both granularities -----------------------------------------------------------------------------------


@torch.no_grad()
def error(pruned: nn.Module, model: nn.Module, x: Tensor) -> float:
    """Squared error of the output, relative to its variance over images."""
    reference = model(x)
    return float((pruned(x) - reference).square().sum() / (reference - reference.mean(0)).square().sum())


def test_the_refit_makes_up_for_what_went(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, new = small(), pixels(64), images(96)[64:, :, :8, :8]
    options: dict[str, Any] = {"ratio": 0.25, "granularity": "filter", "criterion": "l2", "example_inputs": pixels()}
    plain = fxprune.compile(model, **options)
    refitted = fxprune.compile(model, calibration=data, **options)
    assert refitted.meta["fxprune"].plan.removed == plain.meta["fxprune"].plan.removed
    assert error(refitted, model, new) < 0.5 * error(plain, model, new)
    layers = {layer.name: layer.error for layer in fxprune.report(refitted).layers}
    assert layers["conv1"] is None, "nothing that it reads went"
    assert layers["conv2"] is not None
    assert layers["conv3"] is not None
    monkeypatch.setattr(lossy, "refit_readers", lambda *_, **__: None)
    unfitted = fxprune.compile(model, calibration=data, **options)
    assert error(unfitted, model, new) == pytest.approx(error(plain, model, new))


class Wide(Net):
    """The same with enough channels to be grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.norm2 = nn.Conv2d(32, 48, 3, padding=1), nn.BatchNorm2d(48)
        self.conv3, self.norm3 = nn.Conv2d(48, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 5)


BOTH: dict[str, Any] = {"granularity": {"filter": 0.25, "kernel": 0.5}}


def test_both_granularities() -> None:
    model, x = dense("resnet20"), images()
    plan = fxprune.make_plan(model, example_inputs=x, **BOTH)
    assert plan.layers
    assert plan.removed
    masked = fxprune.mask(model, plan)
    stays = kept_entries(model, plan)
    by_hand = zeroed(model, plan)
    for name in plan.layers:  # the kernels of what is left, mapped back to the numbers of the dense convolution
        weight, gone, kernels = by_hand.get_parameter(f"{name}.weight"), plan.removed[name], plan.layers[name]
        rows, columns = remaining(weight.shape[0], gone.outputs), remaining(weight.shape[1], gone.inputs)
        part = nn.Conv2d(len(columns), len(rows), 1)
        part.weight.data.fill_(1)
        holder = masked_by_hand(nn.ModuleDict({"part": part}), PrunePlan({"part": kernels}))
        keep = holder.get_parameter("part.weight").double()
        weight.data[rows[:, None], columns] *= keep
        assert int(stays[f"{name}.weight"][rows[:, None], columns].sum()) == int(keep.sum()) * 9
    pruned = fxprune.rewrite(masked, plan, x)
    assert_same_function(copy.deepcopy(pruned), by_hand, (x,))
    report = fxprune.report(pruned)
    forms = {layer.form for layer in report.layers}
    assert forms == {"partition", "filters"}
    assert all(layer.filters == 3 * layer.filters_dense / 4 for layer in report.layers if layer.filters_dense)


def test_both_granularities_with_calibration() -> None:
    model, data = randomize(Wide().double()).eval(), pixels(64)
    with torch.no_grad():
        pruned = fxprune.compile(model, calibration=data, verify=True, ignore="conv1", **BOTH)
        plan = pruned.meta["fxprune"].plan
        assert plan.layers.keys() == {"conv2", "conv3"}
        assert plan.removed.keys() == {"conv2", "norm2", "conv3"}
        plain = fxprune.rewrite(fxprune.mask(model, plan), plan, pixels())
        again = fxprune.rewrite(fxprune.mask(model, plan, data), plan, pixels())
        torch.testing.assert_close(again(pixels()), pruned(pixels()))
        assert error(pruned, model, data) < 0.5 * error(plain, model, data)


def test_both_granularities_say_why_a_layer_keeps_its_filters() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3, groups=4)).eval()
    alone = fxprune.make_plan(model, 0.25, granularity="filter", example_inputs=torch.randn(1, 3, 9, 9))
    plan = fxprune.make_plan(model, example_inputs=torch.randn(1, 3, 9, 9), **BOTH)
    assert plan.layers.keys() == {"1"}
    assert plan.notes == {"1": f"keeps its filters: {alone.skipped['1']}"}
    assert plan.skipped["2"] == f"is grouped already (groups=4); keeps its filters: {alone.skipped['2']}"


# --- in every form in which a network is used -----------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "filters": {"ratio": 0.5, "granularity": "filter"},
    "both": {"granularity": {"filter": 0.25, "kernel": 0.5}, "form": "overlap"},
}
each_form = pytest.mark.parametrize("form", FORMS)


def compiled(form: str, **options: Any) -> fx.GraphModule:
    model = randomize(Wide()).eval()
    return fxprune.compile(model, example_inputs=pixels().float(), **(FORMS[form] | options))


def check(actual: Any, expected: nn.Module) -> None:
    for batch in (2, 5):
        x = pixels(batch).float()
        with torch.no_grad():
            torch.testing.assert_close(actual(x), expected(x), rtol=1e-4, atol=1e-4)


@each_form
def test_script_copy_and_pickle(form: str, tmp_path: Path) -> None:
    pruned = compiled(form)
    torch.jit.script(pruned).save(str(tmp_path / "net.pt"))
    check(torch.jit.load(str(tmp_path / "net.pt")), pruned)
    check(torch.jit.freeze(torch.jit.script(pruned)), pruned)
    twin = copy.deepcopy(pruned)
    assert fxprune.report(twin) == fxprune.report(pruned)
    check(twin, pruned)
    check(pickle.loads(pickle.dumps(pruned)), pruned)
    with torch.no_grad():
        twin.get_parameter("conv2.weight").mul_(2)
    with pytest.raises(AssertionError):
        check(twin, pruned)


@each_form
def test_export_with_dynamic_batch(form: str) -> None:
    pruned = compiled(form)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch.export says of parts of its own
        program = torch.export.export(pruned, (pixels(3).float(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    check(program.module(), pruned)


@pytest.mark.slow
@each_form
def test_onnx(form: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pruned, file = compiled(form), tmp_path / "net.onnx"
    save_onnx(pruned, (pixels().float(),), file)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    check(lambda x: torch.tensor(session.run(None, {name: x.numpy()})[0]), pruned)


@each_form
def test_a_training_step_is_the_same_in_both_forms(form: str) -> None:
    model = randomize(Wide().double())
    plan = fxprune.make_plan(model, example_inputs=pixels(), **FORMS[form])
    masked = fxprune.mask(model, plan).train()
    pruned = fxprune.rewrite(masked, plan, pixels()).train()
    x, labels, stays = pixels(6), torch.tensor([0, 1, 2, 3, 4, 0]), kept_entries(model, plan)

    def losses(net: nn.Module, hold: bool) -> list[float]:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        found = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), labels)
            loss.backward()
            optimizer.step()
            if hold:
                zero_pruned(net, stays)
            found.append(float(loss.detach()))
        return found

    expected = losses(pruned, hold=False)
    assert losses(copy.deepcopy(masked), hold=True) == pytest.approx(expected, rel=1e-9)
    # Kernels come back if they are not held; a channel that is zero before a rectifier has no gradient.
    assert (losses(masked, hold=False) == pytest.approx(expected, rel=1e-9)) == (form == "filters")


def test_a_trained_masked_model_is_rewritten() -> None:
    """Train the masked model with its zeros held, then rewrite: the same function."""
    model = randomize(Wide().double())
    plan = fxprune.make_plan(model, example_inputs=pixels(), **FORMS["both"])
    masked, stays = fxprune.mask(model, plan).train(), kept_entries(model, plan)
    optimizer = torch.optim.SGD(masked.parameters(), lr=0.05, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(masked(pixels(6)), torch.tensor([0, 1, 2, 3, 4, 0])).backward()
        optimizer.step()
    with pytest.raises(fxprune.PassError, match="are not zero"):
        fxprune.rewrite(masked, plan, pixels())
    zero_pruned(masked, stays)
    assert_same_function(fxprune.rewrite(masked, plan, pixels()), masked, (pixels(),))


@each_form
def test_fold_batch_norm(form: str) -> None:
    folded = compiled(form, fold_batch_norm=True)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    check(folded, compiled(form))


@pytest.mark.parametrize("form", ["filters", pytest.param("both", marks=pytest.mark.slow)])
def test_accelerate_on_the_cpu(form: str) -> None:
    plain = compiled(form)
    fast = fxprune.accelerate(plain, pixels().float())
    with torch.inference_mode():
        torch.testing.assert_close(fast(pixels().float()), plain(pixels().float()), rtol=1e-3, atol=1e-3)
    assert str(fxprune.report(fast)) == str(fxprune.report(plain))
