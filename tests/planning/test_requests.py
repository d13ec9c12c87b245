"""What a user asks for: the same fields at every door, checked once when the request is made, and no one else's."""

import inspect
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune import PlanError, PrunePlan
from fxprune.criteria.variety import Variety
from fxprune.planning.latency.table import LatencyTable
from fxprune.planning.requests import Request
from fxprune.planning.sensitivity import Sensitivity

FIELDS = {field.name: field for field in fields(Request)}
SENSITIVITY = Sensitivity((), 1, 1)
LATENCIES = LatencyTable("cpu", "float32", "contiguous", ((2, 3, 8, 8),), 1.0, 1.0, ())
X = torch.zeros(2, 3, 8, 8)

# Each field with a value that is not its default, and what else that value needs.
OPTIONS: dict[str, dict[str, Any]] = {
    "ratio": {"ratio": {"a": 0.25, "*": 0.75}},
    "macs": {"macs": 0.6},
    "params": {"params": 0.6},
    "latency": {"latency": 0.6, "target": "cpu"},
    "latency_table": {"latency_table": LATENCIES, "latency": 0.6, "target": "cpu"},
    "sensitivity": {"sensitivity": SENSITIVITY, "macs": 0.6},
    "granularity": {"granularity": {"filter": 0.25, "kernel": 0.5}},
    "scope": {"scope": "global", "granularity": "filter"},
    "round_to": {"round_to": 8, "granularity": "filter"},
    "groups": {"groups": {"a": 4}},
    "method": {"method": "srgkp"},
    "form": {"form": "overlap"},
    "block": {"block": 4},
    "target": {"target": "cuda"},
    "runtime": {"runtime": "openvino"},
    "precision": {"precision": "int8", "runtime": "openvino"},
    "share_groups": {"share_groups": True},
    "criterion": {"criterion": "l1"},
    "variety": {"variety": "soft"},
    "snapshots": {"snapshots": [{"a.weight": torch.zeros(1)}]},
    "ignore": {"ignore": ["a", "b.*"]},
    "seed": {"seed": 7},
    "progress": {"progress": True},
    "after": {"after": PrunePlan({}), "granularity": "filter"},
    "recover": {"recover": {"steps": 3}},
}


class Stop(Exception):
    """Carries the request that arrived."""


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A net that nobody reads: whoever receives the request raises it, and no model is traced."""

    def received(*arguments: Any, **_: Any) -> None:
        raise Stop(next(argument for argument in arguments if isinstance(argument, Request)))

    for name in ("compiled_for", "plan_for", "sensitivity_of", "measure_for"):
        monkeypatch.setattr(f"fxprune.api.{name}", received)
    monkeypatch.setattr("fxprune.api.Subject", lambda *_: None)
    monkeypatch.setattr("fxprune.api.check_target", lambda *_: None)
    return nn.Conv2d(3, 3, 1)


def request_of(door: Callable[..., Any], *arguments: Any, **options: Any) -> Request:
    with pytest.raises(Stop) as stopped:
        door(*arguments, **options)
    (request,) = stopped.value.args
    assert isinstance(request, Request)
    return request


# --- the doors ------------------------------------------------------------------------------------------------------


def differences(door: Callable[..., Any], names: list[str]) -> list[str]:
    """What a signature says otherwise than the fields of these names, in their order."""
    parameters = inspect.signature(door).parameters
    found = [f"{name} is missing" for name in names if name not in parameters]
    for name in (name for name in names if name in parameters):
        if parameters[name].default != FIELDS[name].default:
            found.append(f"{name} is {parameters[name].default!r} by default, not {FIELDS[name].default!r}")
        if parameters[name].annotation != FIELDS[name].type:
            found.append(f"{name} is a {parameters[name].annotation}, not a {FIELDS[name].type}")
    listed = [name for name in parameters if name in FIELDS]
    return found + ([] if listed == names else [f"these are listed: {listed}"])


def test_compile_and_make_plan_list_every_field_with_its_default() -> None:
    assert differences(fxprune.make_plan, [name for name in FIELDS if name != "recover"]) == []
    assert differences(fxprune.compile, [name for name in FIELDS if name != "after"]) == []


@pytest.mark.parametrize("door", [fxprune.measure_sensitivity, fxprune.measure_latency])
def test_what_measures_lists_fields_with_their_defaults(door: Callable[..., Any]) -> None:
    shared = [name for name in inspect.signature(door).parameters if name in FIELDS]
    assert {"groups", "target", "ignore", "progress"} <= set(shared)
    assert differences(door, shared) == []


def test_control_a_signature_that_drifts_is_seen() -> None:
    def drifted(model: nn.Module, ratio: float = 0.5, *, macs: float | None = None, seed: int = 0) -> None: ...

    ratio = FIELDS["ratio"].type
    assert differences(drifted, ["ratio", "seed", "form"]) == [
        "form is missing",
        "ratio is 0.5 by default, not None",
        f"ratio is a {float}, not a {ratio}",
        "these are listed: ['ratio', 'macs', 'seed']",
    ]


@pytest.mark.parametrize("name", FIELDS)
def test_every_argument_of_compile_and_make_plan_arrives(net: nn.Module, name: str) -> None:
    options = OPTIONS[name]
    expected = Request(**options)
    assert getattr(expected, name) != FIELDS[name].default
    for door, foreign in ((fxprune.make_plan, "recover"), (fxprune.compile, "after")):
        if name == foreign:
            with pytest.raises(TypeError, match=name):
                door(net, **options)
        else:
            assert request_of(door, net, **options, example_inputs=X, calibration=X) == expected


def test_the_ratio_may_stand_behind_the_model(net: nn.Module) -> None:
    for door in (fxprune.compile, fxprune.make_plan):
        assert request_of(door, net, 0.75) == Request(ratio=0.75)


@pytest.mark.parametrize("name", ["groups", "target", "ignore", "progress", "seed"])
def test_every_argument_of_what_measures_arrives(net: nn.Module, name: str) -> None:
    options = OPTIONS[name]
    assert request_of(fxprune.measure_sensitivity, net, **options) == Request(**options)
    if name != "seed":
        expected = Request(**{"target": "cpu", "latency": 1.0, **options})  # by default the device of the model
        assert request_of(fxprune.measure_latency, net, **options, example_inputs=X) == expected


# --- what is refused ------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    # what is removed
    ({"granularity": "filters"}, "granularity is 'filters' (near: 'filter'); it must be 'kernel', 'filter'"),
    ({"granularity": {"filter": 0.5}}, "granularity names ['filter'] only; give both ratios"),
    ({"granularity": {"filter": 0.5, "layer": 0.5}}, "granularity is 'layer'"),
    ({"granularity": {"filter": 1.5, "kernel": 0.5}}, "1.5"),
    ({"granularity": {"filter": 0.2, "kernel": 0.5}, "ratio": 0.5}, "leave ratio and macs out"),
    ({"granularity": {"filter": 0.2, "kernel": 0.5}, "params": 0.5}, "leave ratio and params out"),
    ({"granularity": {"filter": 0.2, "kernel": 0.5}, "snapshots": [{}]}, "plan one granularity at a time"),
    ({"granularity": "filter", "form": "overlap"}, "form='overlap' is for granularity='kernel'; leave it out for fil"),
    ({"granularity": "filter", "groups": 4}, "groups=4 is for granularity='kernel'; leave it out for filters"),
    ({"granularity": "filter", "block": 8}, "block=8 is for granularity='kernel'"),
    ({"granularity": "filter", "share_groups": True}, "share_groups=True is for granularity='kernel'"),
    ({"granularity": "filter", "method": "cocluster"}, "method='cocluster' is for granularity='kernel'"),
    ({"granularity": "filter", "sensitivity": SENSITIVITY}, "sensitivity=a Sensitivity is for granularity='kernel'"),
    ({"scope": "global"}, "scope='global' is for granularity='filter'; leave it out for kernels"),
    ({"round_to": 8}, "round_to=8 is for granularity='filter'"),
    ({"after": PrunePlan({})}, "after=a PrunePlan is for granularity='filter'"),
    # how much
    ({"ratio": 0.5, "macs": 0.5}, "ratio=0.5 is what each layer loses, and macs=0.5 what may remain of the whole net"),
    (
        {"ratio": {"a": 0.5}, "params": 0.5, "latency": 0.6, "target": "cpu"},
        "ratio=a dict is what each layer loses, and params=0.5, latency=0.6 what may remain of the whole network",
    ),
    ({"granularity": "filter", "ratio": 0.5, "macs": 0.6}, "pass a ratio or budgets"),
    ({"macs": 0.5, "form": "partition"}, "a budget needs ratios of any value, which the partition form has not"),
    ({"sensitivity": "{}", "macs": 0.5}, "sensitivity is a str; pass what fxprune.measure_sensitivity returned"),
    ({"latency_table": {}, "latency": 0.5}, "latency_table is a dict; pass what fxprune.measure_latency returned"),
    ({"sensitivity": SENSITIVITY}, "sensitivity is for a budget; pass macs= or params= or latency= with it"),
    ({"latency_table": LATENCIES}, "latency_table is for a share of the latency; pass latency= with it"),
    ({"macs": 0.0}, "macs is 0.0; it must be a share in (0, 1]"),
    ({"macs": 80.0}, "80 % is 0.8"),
    ({"latency": 60, "target": "cpu"}, "of the time of the best dense form; 60 % is 0.6"),
    ({"params": 1.5}, "params is 1.5; it must be a share in (0, 1]"),
    ({"latency": -1.0, "target": "cpu"}, "latency is -1.0"),
    ({"latency": 0.5}, "latency=0.5 needs the device to be fast on; pass target='cpu' or target='cuda'"),
    ({"ratio": 1.0}, "ratio 1.0 is not in [0, 1): it is the share of kernel groups to remove"),
    ({"ratio": {"a": "much"}}, "much"),
    ({"granularity": "filter", "scope": "all"}, "scope is 'all'; it must be 'local' or 'global'"),
    ({"granularity": "filter", "scope": "global", "ratio": {"*": 0.5}}, "scope='global' ranks all layers together"),
    ({"granularity": "filter", "round_to": 0}, "round_to is 0; it must be an integer, 1 or more"),
    ({"granularity": "filter", "round_to": 2.0}, "round_to is 2.0; it must be an integer, 1 or more"),
    # how it is chosen, and for what
    ({"groups": 0}, "groups is 0; it must be a positive integer, 'auto', or map patterns to these"),
    ({"groups": {"a": 2.5}}, "groups is 2.5; it must be a positive integer"),
    ({"groups": True}, "groups is True"),
    ({"method": "cluster"}, "method is 'cluster'"),
    ({"form": "overlapping"}, "form is 'overlapping' (near: 'overlap')"),
    ({"method": "srgkp", "form": "partition"}, "method 'srgkp' is for the overlap form; use form='auto'"),
    ({"target": "gpu"}, "target is 'gpu'"),
    ({"runtime": "onnx"}, "runtime is 'onnx' (near: 'onnxruntime', 'openvino'); it must be one of"),
    ({"runtime": "auto"}, "runtime='auto' needs the device to run on; pass target='cpu' or 'cuda'"),
    ({"runtime": "onnxruntime", "target": "cuda"}, "runtime='onnxruntime' runs on the CPU, and the target is 'cuda'"),
    ({"latency": 0.5, "runtime": "inductor"}, "latency for runtime='inductor': it compiles whole graphs"),
    ({"latency": 0.5, "runtime": "auto", "target": "cpu"}, "latency for runtime='auto': a table of times is of one"),
    ({"latency": 0.5, "runtime": "tensorrt", "target": "cuda"}, "latency for runtime='tensorrt': fxprune does not run"),
    ({"precision": "int4", "runtime": "openvino"}, "precision is 'int4'; it must be 'int8' or 'bfloat16', or None"),
    ({"precision": "int8"}, "precision='int8' is for runtime='onnxruntime' or 'openvino', and the network shall run"),
    ({"precision": "int8", "runtime": "inductor"}, "and the network shall run in 'inductor'; name one of them"),
    ({"precision": "bfloat16", "runtime": "onnxruntime"}, "precision='bfloat16' is for runtime='openvino', and the"),
    ({"block": 0}, "block is 0; it must be a positive integer, such as 8, or None"),
    ({"block": 8, "method": "srgkp"}, "method 'srgkp' chooses channels one by one; leave block out"),
    ({"share_groups": 1}, "share_groups is 1; it must be True, False, or None"),
    ({"share_groups": True, "method": "srgkp"}, "method 'srgkp' groups each layer by itself; leave share_groups out"),
    ({"seed": -1}, "seed is -1"),
    ({"variety": "many"}, "many"),
    ({"criterion": "l3"}, "l3"),
    ({"criterion": "reconstruction"}, "criterion 'reconstruction' is for filters; for kernels it is method='recon"),
    ({"criterion": "l1", "method": "reconstruction"}, "method 'reconstruction' has its own score; leave criterion out"),
    ({"variety": "soft", "method": "srgkp"}, "method 'srgkp' has its own score; leave variety out"),
    ({"method": "tmi"}, "method 'tmi' compares the weights with earlier states of the same training run; pass snap"),
    # what comes after
    ({"recover": "long"}, "recover is 'long'; it must be True, a number of seconds, or a mapping of seconds, steps"),
    ({"recover": 0.0}, "seconds is 0.0; it must be a positive number"),
    ({"recover": {"step": 3}}, "recover names 'step' (near: 'steps'"),
    ({"recover": {"steps": 2.5}}, "steps is 2.5; it must be a number of steps, 1 or more"),
    ({"recover": {"seconds": float("nan")}}, "seconds is nan"),
    ({"recover": {"augment": "flips"}}, "augment is 'flips' (near: 'flip'"),
    ({"recover": {"checkpoint": 1}}, "checkpoint is a int; it must be the path of a file"),
    ({"snapshots": {"a.weight": torch.zeros(1)}}, "snapshots is a dict; pass a list of earlier states, also for one"),
]


@pytest.mark.parametrize(
    "options, message", WRONG, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_a_wrong_value_is_refused_when_the_request_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        Request(**options)


def test_every_field_that_can_be_wrong_is_among_them() -> None:
    free = {"ignore", "progress"}  # any text is a pattern, anything is true or false
    assert {name for options, _ in WRONG for name in options} == FIELDS.keys() - free


def test_compile_refuses_before_any_model_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxprune.api.Subject", lambda *_: pytest.fail("traced"))
    for options, message in WRONG:
        if "after" not in options:
            with pytest.raises(PlanError, match=re.escape(message)):
                fxprune.compile(nn.Conv2d(3, 3, 1), **options)
    with pytest.raises(pytest.fail.Exception, match="traced"):  # control
        fxprune.compile(nn.Conv2d(3, 3, 1))


# --- what it holds --------------------------------------------------------------------------------------------------


def test_it_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Request().ratio = 0.75  # type: ignore[misc]  # that is the point


def test_it_shares_nothing_with_the_caller() -> None:
    ratio, groups, ignore, snapshots = {"a": 0.25}, {"a": 2}, ["a"], [{"a.weight": torch.zeros(1)}]
    request = Request(ratio=ratio, groups=groups, ignore=ignore, snapshots=snapshots)
    ratio["a"], groups["a"] = 0.75, 4
    ignore.append("b")
    snapshots.clear()
    assert request.ratio == {"a": 0.25}
    assert request.groups == {"a": 2}
    assert request.patterns == ("a",)
    assert isinstance(request.snapshots, tuple)
    assert len(request.snapshots) == 1
    both = {"filter": 0.25, "kernel": 0.5}
    request = Request(granularity=both)
    both["filter"] = 0.9
    assert request.granularity == {"filter": 0.25, "kernel": 0.5}
    nested = {"a": 0.1}
    request = Request(granularity={"filter": nested, "kernel": 0.5})  # type: ignore[dict-item]  # a ratio by layer
    nested["a"] = 0.9
    assert request.granularity == {"filter": {"a": 0.1}, "kernel": 0.5}


def test_iterators_are_read_once() -> None:
    request = Request(ignore=iter(["a", "b"]), snapshots=iter([{"a.weight": torch.zeros(1)}]))
    assert request.patterns == request.patterns == ("a", "b")
    assert isinstance(request.snapshots, tuple)
    assert Request(ignore="a.*").patterns == ("a.*",)


def test_a_name_of_a_rule_becomes_the_rule() -> None:
    assert Request(variety="soft").rule == Variety.parse("soft")
    assert Request().rule is None


def test_a_combined_granularity_is_served_in_two_parts() -> None:
    whole = Request(
        granularity={"filter": 0.25, "kernel": 0.5}, groups=4, form="overlap", block=2, round_to=8, scope="local",
        criterion="l1", ignore="a", seed=7,
    )  # fmt: skip
    assert list(whole.parts()) == [
        Request(granularity="filter", ratio=0.25, round_to=8, scope="local", criterion="l1", ignore="a", seed=7),
        Request(granularity="kernel", ratio=0.5, groups=4, form="overlap", block=2, criterion="l1", ignore="a", seed=7),
    ]
    ratios = MappingProxyType({"filter": 0.25, "kernel": 0.5})
    first, second = Request(granularity=ratios, scope="global", target="cuda").parts()
    assert (first.scope, second.scope) == ("global", None)
    assert first.target == second.target == "cuda"


def test_several_budgets_and_a_runtime_that_says_the_target() -> None:
    request = Request(macs=0.5, params=0.6, latency=0.7, runtime="onnxruntime")
    assert request.budgets == {"macs": 0.5, "params": 0.6}
    assert request.shares == {"macs": 0.5, "params": 0.6, "latency": 0.7}
    assert (request.target, request.runs_in) == ("cpu", "onnxruntime")
    assert (Request(target="cuda").runs_in, Request().target) == ("torch", None)
    assert not Request(ratio=0.5).has_budget
    bare = request.without_budgets(ratio=0.5)
    assert (bare.has_budget, bare.ratio, bare.runtime) == (False, 0.5, "onnxruntime")
    assert request.with_shares({"params": 0.9}).shares == {"params": 0.9}


@pytest.mark.parametrize("granularity", ["kernel", "filter"])
def test_a_single_granularity_is_one_part(granularity: str) -> None:
    request = Request(granularity=granularity, ratio=0.25)  # type: ignore[arg-type]
    assert list(request.parts()) == [request]
