"""Methods, criteria and variety, through make_plan and compile: what each needs, what it contradicts, what it gives."""
# nn.Module.__call__ is typed to return Any; each net would need a cast.
# mypy: disable-error-code="no-any-return"

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from equality import assert_same_function, randomize
from products_harness import in_turns
from torch import Tensor, nn

import fxprune
from fxprune import PlanError, PrunePlan
from fxprune.criteria import CRITERIA, Criterion, Taylor
from fxprune.criteria.variety import VARIETIES, Variety
from fxprune.exact.record import record_of
from fxprune.planning import METHODS
from fxprune.vocabulary import Method


class Net(nn.Module):
    """Three convolutions that can be pruned: 16 -> 32, 32 -> 32, and 32 -> 20, which 8 does not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv1 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 32, 1)
        self.conv3 = nn.Conv2d(32, 20, 1)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.norm(self.conv1(self.stem(x).relu())).relu()).relu()
        return self.head(self.conv3(x).mean((2, 3)))


def net(seed: int = 0) -> Net:
    model = Net()
    randomize(model, seed).eval()
    return model


@pytest.fixture(autouse=True)
def one_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Method "tmi" looks at one embedding of the filters instead of six, of which most of its time goes."""
    monkeypatch.setattr("fxprune.methods.same_size_dbscan.DIMENSIONS", range(2, 3))


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def earlier(count: int = 3) -> list[dict[str, Tensor]]:
    """States of a training run that ends in `net()`: the weights have come from elsewhere."""
    end, start = net().state_dict(), net(1).state_dict()
    return [
        {k: torch.lerp(start[k], end[k], i / count) for k in end if end[k].is_floating_point()} for i in range(count)
    ]


def options_of(method: Method) -> dict[str, Any]:
    """What a method needs."""
    needs: dict[str, dict[str, Any]] = {"tmi": {"snapshots": earlier()}, "reconstruction": {"calibration": images()}}
    return {"method": method, **needs.get(method, {})}


def shapes(plan: PrunePlan) -> dict[str, tuple[str, int, int]]:
    return {name: (kernels.form, kernels.groups, kernels.kept_channels) for name, kernels in plan.layers.items()}


# --- methods --------------------------------------------------------------------------------------------------------


def test_auto_is_reconstruction_only_where_there_are_data_and_no_score() -> None:
    model = net()
    assert fxprune.make_plan(model).method == "cocluster"
    assert fxprune.make_plan(model, calibration=images()).method == "reconstruction"
    assert fxprune.make_plan(model, macs=0.7, calibration=images()).method == "reconstruction"
    scored: tuple[dict[str, Any], ...] = (
        {"criterion": "l1"},
        {"criterion": "l2"},
        {"criterion": CRITERIA["activation"]},
        {"variety": "soft"},
        {"criterion": "l1", "variety": Variety()},
    )
    for options in scored:
        assert fxprune.make_plan(model, calibration=images(), **options).method == "cocluster"
    # What was chosen is what it would have been by name.
    for calibration in (None, images()):
        auto = fxprune.make_plan(model, calibration=calibration)
        assert fxprune.make_plan(model, calibration=calibration, method=auto.method) == auto  # type: ignore[arg-type]
    assert fxprune.make_plan(model, calibration=images(), method="cocluster").criterion == "l2"


PARTITION = {"conv1": ("partition", 2, 8), "conv2": ("partition", 2, 16), "conv3": ("partition", 2, 16)}
OVERLAP = {"conv1": ("overlap", 2, 6), "conv2": ("overlap", 2, 13), "conv3": ("overlap", 2, 13)}
PUBLISHED = {"conv1": ("overlap", 8, 8), "conv2": ("overlap", 8, 16), "conv3": ("overlap", 2, 16)}


@pytest.mark.parametrize(
    "method, half, less",
    [
        ("cocluster", PARTITION, OVERLAP),
        ("reconstruction", PARTITION, OVERLAP),
        ("tmi", PUBLISHED, {"conv1": ("overlap", 8, 6), "conv2": ("overlap", 8, 13), "conv3": ("overlap", 2, 13)}),
        ("srgkp", PUBLISHED, {"conv1": ("overlap", 8, 6), "conv2": ("overlap", 8, 13), "conv3": ("overlap", 2, 13)}),
    ],
)
def test_shapes(method: Method, half: dict[str, Any], less: dict[str, Any]) -> None:
    """Methods of papers have 8 groups that overlap, where 8 divides the filters."""
    model, options = net(), options_of(method)
    plan = fxprune.make_plan(model, 0.5, **options)
    assert shapes(plan) == half
    assert plan.method == plan.criterion == method or (plan.method, plan.criterion) == ("cocluster", "l2")
    assert shapes(fxprune.make_plan(model, 0.6, **options)) == less
    groups = fxprune.make_plan(model, 0.6, groups={"conv1": 4, "conv3": 5}, ignore="conv2", **options)
    assert [kernels.groups for kernels in groups.layers.values()] == [4, 5]
    assert PrunePlan.from_json(plan.to_json()) == plan


# By default the methods without a refit that need no data, and the others with one.
@pytest.mark.parametrize(
    "method, calibrated",
    [
        pytest.param(method, calibrated, marks=[pytest.mark.slow] * (calibrated is (method in ("cocluster", "srgkp"))))
        for method in METHODS
        for calibrated in (False, True)
        if (method, calibrated) != ("tmi", False)
    ],
)
def test_every_method_compiles_exactly_with_and_without_a_refit(method: Method, calibrated: bool) -> None:
    model = net().double()
    data = images().double()
    options = options_of(method)
    if calibrated or "calibration" in options:
        options["calibration"] = data
    pruned = fxprune.compile(model, example_inputs=data[:2], verify=True, **options)
    plan = record_of(pruned).plan
    assert_same_function(pruned, fxprune.mask(model, plan, options.get("calibration")), (data[:2],))
    errors = [layer.error for layer in fxprune.report(pruned).layers if layer.reason == ""]
    assert len(errors) == 3
    assert [error is not None for error in errors] == [options.get("calibration") is not None] * 3


@pytest.mark.parametrize("method", METHODS)
def test_equal_arguments_give_equal_plans(method: Method) -> None:
    ratio = {"conv1": 0.6}
    first = fxprune.make_plan(net(), ratio, **options_of(method))
    assert fxprune.make_plan(net(), ratio, **options_of(method)) == first
    assert fxprune.make_plan(net(1), ratio, **options_of(method)).layers != first.layers


def test_methods_differ() -> None:
    plans = [fxprune.make_plan(net(), 0.6, groups=4, **options_of(method)) for method in METHODS if method != "auto"]  # type: ignore[arg-type]
    for i, plan in enumerate(plans):
        assert all(plan.layers != other.layers for other in plans[:i])


def test_the_refit_errs_less_with_groups_that_were_chosen_for_it() -> None:
    errors = {}
    for method in ("cocluster", "reconstruction", "srgkp"):
        pruned = fxprune.compile(net(), 0.5, form="overlap", groups=4, method=method, calibration=images())
        errors[method] = sum(layer.error for layer in fxprune.report(pruned).layers if layer.error is not None)
    assert errors["reconstruction"] == min(errors.values())


def test_snapshots_come_in_every_kind(tmp_path: Path) -> None:
    states = earlier()
    expected = fxprune.make_plan(net(), {"conv1": 0.5}, method="tmi", snapshots=states)
    modules = []
    for i, state in enumerate(states):
        module = net()
        module.load_state_dict(state, strict=False)
        modules.append(module)
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / f"{i}.pt")
    paths: list[str | Path] = [tmp_path / "0.pt", str(tmp_path / "1.pt"), tmp_path / "2.pt"]
    for snapshots in (iter(modules), paths):
        assert fxprune.make_plan(net(), {"conv1": 0.5}, method="tmi", snapshots=snapshots) == expected
    # The first state weighs as it should: another past, another plan.
    assert (
        fxprune.make_plan(net(), {"conv1": 0.5}, method="tmi", snapshots=[net(2), *states[1:]]).layers
        != expected.layers
    )


# --- contradictions -------------------------------------------------------------------------------------------------

FUNCTIONAL = Variety(similarity="functional")
CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "criterion with tmi": ({"method": "tmi", "criterion": "l2"}, "method 'tmi' has its own score; leave criterion out"),
    "criterion with srgkp": ({"method": "srgkp", "criterion": "l1"}, "'srgkp' has its own score; leave criterion out"),
    "criterion with reconstruction": (
        {"method": "reconstruction", "criterion": "l2", "calibration": "images"},
        "'reconstruction' has its own score; leave criterion out, or use 'cocluster'",
    ),
    "variety with tmi": ({"method": "tmi", "variety": "soft"}, "method 'tmi' has its own score; leave variety out"),
    "variety with srgkp": ({"method": "srgkp", "variety": "pairs"}, "'srgkp' has its own score; leave variety out"),
    "variety with reconstruction": (
        {"method": "reconstruction", "variety": "soft", "calibration": "images"},
        "'reconstruction' has its own score; leave variety out",
    ),
    "partition with tmi": ({"method": "tmi", "form": "partition"}, "method 'tmi' is for the overlap form; use form="),
    "partition with srgkp": ({"method": "srgkp", "form": "partition"}, "method 'srgkp' is for the overlap form"),
    "tmi without snapshots": ({"method": "tmi"}, r"'tmi' compares .* pass snapshots=\[.*use method='cocluster'"),
    "tmi with no snapshot": ({"method": "tmi", "snapshots": []}, "snapshots is empty; pass at least one"),
    "reconstruction without data": (
        {"method": "reconstruction"},
        "'reconstruction' measures the error on data; pass calibration=, or use method='cocluster'",
    ),
    "functional similarity without data": (
        {"variety": FUNCTIONAL},
        "variety: similarity 'functional' needs the covariance of the inputs; pass calibration=, or",
    ),
    "movement without snapshots": ({"criterion": "movement"}, "criterion 'movement' needs .*snapshots"),
    "increase without snapshots": (
        {"criterion": "magnitude_increase"},
        "criterion 'magnitude_increase' needs .*snapshots",
    ),
    "activation without data": ({"criterion": "activation"}, "criterion 'activation' needs .* pass calibration="),
    "sum with activation": ({"criterion": CRITERIA["l1"] + CRITERIA["activation"]}, "'activation' needs"),
    "unknown variety": ({"variety": "pears"}, r"variety is 'pears' \(near: 'pairs'"),
    "variety as a flag": ({"variety": True}, "variety is True; it must be None, 'pairs'"),
    "criterion as a number": ({"criterion": 2}, "criterion is 2"),
    "function of one argument": ({"criterion": lambda conv: conv.weight}, r"must take the name of a layer and its"),
    "snapshot that is no list": ({"criterion": "movement", "snapshots": "epoch.pt"}, "snapshots is a str; pass a list"),
    "unknown method": ({"method": "tmy"}, r"method is 'tmy' \(near: 'tmi'\)"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions(name: str) -> None:
    options, match = CONTRADICTIONS[name]
    if "calibration" in options:
        options = {**options, "calibration": images()}
    for use in (fxprune.make_plan, fxprune.compile):
        with pytest.raises(PlanError, match=match):
            use(net(), **options)


# --- criteria -------------------------------------------------------------------------------------------------------


def energy(name: str, conv: nn.Conv2d) -> Tensor:
    return conv.weight.detach().double().square().sum((2, 3))


class Energy(Criterion):
    name = "energy of mine"

    def bind(self, evidence: Any) -> Any:
        return energy


def test_criteria_by_name_object_and_function() -> None:
    model = net()
    plans = {str(value): fxprune.make_plan(model, 0.6, criterion=value) for value in ("l2", CRITERIA["l2"], energy)}
    plans["class"] = fxprune.make_plan(model, 0.6, criterion=Energy())
    default = fxprune.make_plan(model, 0.6)
    assert [plan.criterion for plan in plans.values()] == ["l2", "l2", "energy", "energy of mine"]
    assert all(plan.layers == default.layers for plan in plans.values())
    others = {name: fxprune.make_plan(model, 0.6, criterion=name) for name in ("l1", "random")}
    assert all(plan.layers != default.layers and plan.criterion == name for name, plan in others.items())
    combined = fxprune.make_plan(model, 0.6, criterion=2 * CRITERIA["l2"] + energy)
    assert combined.layers == default.layers
    assert combined.criterion == "2 * l2 + energy"


def test_movement_keeps_what_moved() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    before["conv2.weight"][:, 16:] += 3.0  # half of the channels come from afar
    plan = fxprune.make_plan(model, {"conv2": 0.5}, groups=1, criterion="movement", snapshots=[before])
    assert plan.layers["conv2"].kept == (tuple(range(16, 32)),)
    assert plan.criterion == "movement"
    # Of several the first counts; and what was small is now large.
    plan = fxprune.make_plan(model, {"conv2": 0.5}, groups=1, criterion="movement", snapshots=[before, net()])
    assert plan.layers["conv2"].kept == (tuple(range(16, 32)),)
    before["conv2.weight"][:, :16] = 0
    plan = fxprune.make_plan(model, {"conv2": 0.5}, groups=1, criterion="magnitude_increase", snapshots=[before])
    assert plan.layers["conv2"].kept == (tuple(range(16)),)


def test_activation_keeps_what_is_active() -> None:
    model = net()
    with torch.no_grad():
        assert model.norm.bias is not None
        model.norm.bias[:16] = -100.0  # half of the channels never fire, the others always
        model.norm.bias[16:] = 100.0
        model.conv2.weight[:, :16] *= 3  # and their weights are the larger ones
    options: dict[str, Any] = {"ratio": {"conv2": 0.5}, "groups": 1}
    active = fxprune.make_plan(model, criterion="activation", calibration=images(), **options)
    assert active.layers["conv2"].kept == (tuple(range(16, 32)),)
    assert active.criterion == "activation"
    assert fxprune.make_plan(model, criterion="l2", **options).layers["conv2"].kept == (tuple(range(16)),)


def test_taylor_keeps_what_the_loss_needs() -> None:
    model = net()
    with torch.no_grad():
        assert model.conv2.bias is not None
        model.conv2.bias[:16] = -100.0  # half of the channels of conv2 never fire: no gradient for who reads them
        model.conv2.bias[16:] = 100.0
    data = [(images(), torch.zeros(8, dtype=torch.long))]
    criterion = Taylor(nn.functional.cross_entropy, data)
    plan = fxprune.make_plan(model, {"conv3": 0.5}, groups=1, criterion=criterion)
    assert plan.layers["conv3"].kept == (tuple(range(16, 32)),)
    assert plan.criterion == "taylor"


def test_a_criterion_that_fails_names_the_layer() -> None:
    def negative(name: str, conv: nn.Conv2d) -> Tensor:
        return -energy(name, conv)

    for calibration in (None, images()):
        with pytest.raises(PlanError, match="conv1: criterion 'negative' returned negative scores"):
            fxprune.make_plan(net(), criterion=negative, calibration=calibration)


# --- variety --------------------------------------------------------------------------------------------------------


def with_twins() -> Net:
    """Every channel of conv2 that is read strongly has a twin; those that are read weakly have none."""
    model = net()
    with torch.no_grad():
        model.conv2.weight[:, 8:16] = 1.01 * model.conv2.weight[:, :8]
        model.conv2.weight[:, :16] *= 3
    return model


@pytest.mark.parametrize(
    "variety, form, calibrated",
    in_turns([*VARIETIES, Variety("soft", beta=2.0, similarity="cosine")], ["partition", "overlap"], [False, True]),
)
def test_variety_in_plan_json_and_report(variety: str | Variety, form: str, calibrated: bool) -> None:
    model = with_twins()
    options: dict[str, Any] = {"calibration": images() if calibrated else None, "form": form, "variety": variety}
    plan = fxprune.make_plan(model, **options)
    rule = VARIETIES[variety].rule if isinstance(variety, str) else variety.rule
    assert plan.criterion == f"l2, variety {rule}"
    assert {kernels.form for kernels in plan.layers.values()} == {form}
    redundancies = {name: kernels.redundancy for name, kernels in plan.layers.items()}
    assert all(share is not None and 0 <= share <= 1 for share in redundancies.values())
    again = PrunePlan.from_json(plan.to_json())
    assert again == plan
    assert {name: kernels.redundancy for name, kernels in again.layers.items()} == redundancies
    pruned = fxprune.compile(model, verify=True, example_inputs=images(2), **options)
    report = fxprune.report(pruned)
    assert {layer.name: layer.redundancy for layer in report.layers if not layer.reason} == redundancies
    assert "redundancy" in str(report)
    assert fxprune.make_plan(model, **options) == plan


def test_without_variety_there_is_no_redundancy() -> None:
    pruned = fxprune.compile(net(), example_inputs=images(2))
    assert all(layer.redundancy is None for layer in fxprune.report(pruned).layers)
    assert "redundancy" not in str(fxprune.report(pruned))


def test_variety_keeps_one_of_two_twins() -> None:
    model = with_twins()
    options: dict[str, Any] = {"ratio": {"conv2": 0.5}, "groups": 1}
    greedy = fxprune.make_plan(model, **options).layers["conv2"].kept[0]
    assert set(greedy) == set(range(16))  # all the twins
    for variety in ("pairs", "soft"):
        kernels = fxprune.make_plan(model, variety=variety, **options).layers["conv2"]
        kept = set(kernels.kept[0])
        assert all(not {channel, channel + 8} <= kept for channel in range(8))
        assert len(kept & set(range(16))) == 8
        assert kernels.redundancy == pytest.approx(0.5)


# --- time -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_large_network_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    model = torchvision.models.resnet50()
    start = time.perf_counter()
    plan = fxprune.make_plan(model, 0.5, method="cocluster")
    with capsys.disabled():
        print(f" ResNet-50: {len(plan.layers)} layers planned in {time.perf_counter() - start:.1f} s")
    assert len(plan.layers) == 52
