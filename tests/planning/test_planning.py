"""make_plan: which layers are pruned, into what shape, and what every refusal says."""

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxprune
from fxprune.criteria import Evidence, kernel_scores, resolve
from fxprune.errors import PlanError
from fxprune.planning import Request
from fxprune.planning.patterns import left_out, match_patterns
from fxprune.planning.planner import Planner
from fxprune.plans import PrunePlan
from fxprune.plans.shapes import Shape, choose_shape, kept_channels, partition_groups


def make_plan(model: nn.Module, ratio: Any = 0.5, **options: Any) -> PrunePlan:
    obstacles = options.pop("obstacles", {})
    request = Request(ratio=ratio, **options)
    return Planner(model, request, obstacles=obstacles).from_weights(request.progress)


class Block(nn.Module):
    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3)
        self.layer1 = nn.Sequential(Block(), Block())
        self.layer10 = Block()
        self.up = nn.Bilinear(32, 32, 2)
        self.fc = nn.Linear(32, 10)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


BLOCKS = ["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2", "layer10.conv1", "layer10.conv2"]


def test_every_convolution_is_either_planned_or_skipped_with_a_reason(net: Net) -> None:
    plan = make_plan(net)
    assert list(plan.layers) == BLOCKS
    assert dict(plan.skipped) == {"stem": "too few input channels (3 < 16)"}
    assert {(k.form, k.groups, k.kept_channels, k.asked_ratio) for k in plan.layers.values()} == {
        ("partition", 2, 16, 0.5)
    }
    assert (plan.ratio, plan.method, plan.criterion, plan.seed) == (0.5, "cocluster", "l2", 0)
    plan.check(net)
    assert PrunePlan.from_json(plan.to_json()) == plan


def test_the_kept_kernels_weigh_more_than_those_of_the_natural_order(net: Net) -> None:
    plan = make_plan(net)
    for name, kernels in plan.layers.items():
        energy = net.get_submodule(name).weight.detach().square().sum(dim=(2, 3))  # type: ignore[operator]
        natural = torch.eye(2, dtype=torch.bool).repeat_interleave(16, 0).repeat_interleave(16, 1)
        assert energy[kernels.mask()].sum() > energy[natural].sum()


def test_planning_changes_neither_model_nor_global_random_state(net: Net) -> None:
    before = copy.deepcopy(net.state_dict())
    state, numpy_state = torch.get_rng_state(), np.random.get_state()
    first = make_plan(net, 0.6, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert str(np.random.get_state()) == str(numpy_state)
    assert make_plan(net, 0.6, seed=7) == first
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training


def test_the_seed_matters_and_layers_do_not_depend_on_each_other(net: Net) -> None:
    first = make_plan(net, 0.6, groups=2)
    assert any(make_plan(net, 0.6, groups=2, seed=seed).layers != first.layers for seed in range(1, 5))
    alone = make_plan(net, {"layer10.conv2": 0.6}, groups=2)
    assert alone.layers["layer10.conv2"] == first.layers["layer10.conv2"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_point_type_can_be_planned(net: Net, dtype: torch.dtype) -> None:
    assert list(make_plan(net.to(dtype)).layers) == BLOCKS


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weights_on_cuda_give_the_same_plan(net: Net) -> None:
    plan = make_plan(net)
    assert make_plan(net.cuda()) == plan


def test_half_precision_does_not_overflow() -> None:
    conv = nn.Conv2d(16, 16, 3).half()
    conv.weight.data.fill_(60000)
    _, score = resolve("l2", Evidence())
    assert kernel_scores("c", conv, score, "l2")[0, 0] == 9 * float(torch.tensor(60000.0).half()) ** 2


def test_the_criterion_matters(net: Net) -> None:
    # One channel has few large weights, the other many small ones: l2 prefers the first, l1 the second.
    conv = net.layer10.conv1
    conv.weight.data.zero_()
    conv.weight.data[:, :16, 0, 0] = 2
    conv.weight.data[:, 16:] = 0.5
    plans = {
        criterion: make_plan(net, {"layer10.conv1": 0.5}, groups=1, criterion=criterion) for criterion in ("l1", "l2")
    }
    kept = {criterion: plan.layers["layer10.conv1"].kept for criterion, plan in plans.items()}
    assert kept == {"l1": (tuple(range(16, 32)),), "l2": (tuple(range(16)),)}


# Which layers


def test_ratio_by_pattern_takes_the_first_match(net: Net) -> None:
    plan = make_plan(net, {"layer1.1.conv2": 0, "layer1": 0.5, "*.conv2": 0.75})
    assert {name: kernels.asked_ratio for name, kernels in plan.layers.items()} == {
        "layer1.0.conv1": 0.5,
        "layer1.0.conv2": 0.5,
        "layer1.1.conv1": 0.5,
        "layer10.conv2": 0.75,
    }
    assert plan.skipped["layer1.1.conv2"] == "ratio is 0"
    assert plan.skipped["layer10.conv1"] == "no pattern of ratio matches"
    assert plan.ratio == {"layer1.1.conv2": 0, "layer1": 0.5, "*.conv2": 0.75}


def test_ignore_covers_all_below_a_module_and_nothing_beside_it(net: Net) -> None:
    plan = make_plan(net, ignore=("layer1", "stem"))
    assert list(plan.layers) == ["layer10.conv1", "layer10.conv2"]
    assert {plan.skipped[name] for name in ("stem", *BLOCKS[:4])} == {"ignored on request"}
    assert make_plan(net, ignore="layer1") == make_plan(net, ignore=["layer1"])


def test_groups_by_pattern_leave_the_others_on_auto(net: Net) -> None:
    plan = make_plan(net, 0.6, groups={"layer1.0": 4, "layer1": 1, "layer10.conv1": "auto"})
    assert [kernels.groups for kernels in plan.layers.values()] == [4, 4, 1, 1, 2, 2]


def test_convolutions_with_an_obstacle_stay_dense(net: Net) -> None:
    plan = make_plan(net, obstacles={"layer1.0.conv2": "the traced graph never calls it"})
    assert "layer1.0.conv1" in plan.layers
    assert plan.skipped["layer1.0.conv2"] == "the traced graph never calls it"
    assert "layer1.0.conv2" not in plan.layers
    assert "stem" in plan.skipped


def test_a_shared_module_goes_by_its_first_name(net: Net) -> None:
    net.layer1[1] = net.layer1[0]
    assert list(make_plan(net).layers) == ["layer1.0.conv1", "layer1.0.conv2", "layer10.conv1", "layer10.conv2"]


def test_a_shared_weight_stays_dense(net: Net) -> None:
    net.layer10.conv2.weight = net.layer10.conv1.weight
    plan = make_plan(net)
    assert plan.skipped["layer10.conv1"] == plan.skipped["layer10.conv2"] == "shares its weight with another module"


def test_broken_weights_matter_only_where_they_are_read(net: Net) -> None:
    net.layer10.conv1.weight.data[0, 0] = float("nan")
    with pytest.raises(PlanError, match=r"^layer10\.conv1: 9 of 9216 weights are NaN or infinite"):
        make_plan(net)
    assert "layer10.conv1" in make_plan(net, ignore="layer10.conv1").skipped


def test_meta_models_are_refused(net: Net) -> None:
    with pytest.raises(PlanError, match=r"^layer1\.0\.conv1: the weight is on the meta device"):
        make_plan(net.to("meta"))


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Sequential(nn.Linear(3, 3)), "Sequential has no convolution; fxprune prunes only these"),
        (nn.Conv2d(16, 16, 3), "the model is itself a convolution; wrap it: torch.nn.Sequential(conv)"),
        (nn.Sequential(nn.LazyConv2d(16, 3)), "0: LazyConv2d is not initialized yet"),
    ],
)
def test_models_without_a_plan(model: nn.Module, message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        make_plan(model)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"ratio": 1}, "ratio 1 is not in [0, 1)"),
        ({"ratio": -0.5}, "ratio -0.5 is not in [0, 1)"),
        ({"ratio": {"layer1": 50}}, "layer1: ratio 50 is not in [0, 1)"),
        ({"ratio": {"layer2": 0.5}}, "ratio: pattern 'layer2' matches no convolution of the model (near: 'layer1"),
        ({"ignore": ("fc",)}, "ignore: pattern 'fc' matches no convolution of the model"),
        ({"ignore": (3,)}, "ignore: 3 is no name, no pattern of names, no module and no type of modules"),
        ({"groups": {"layr10": 2}}, "groups: pattern 'layr10' matches no convolution of the model (near: 'layer10'"),
        ({"method": "coclster"}, "method is 'coclster' (near: 'cocluster'); it must be one of 'auto', 'cocluster'"),
        ({"criterion": "L2"}, "criterion is 'L2' (near: 'l2'); it must be one of 'l1', 'l2'"),
        ({"form": "partial"}, "form is 'partial' (near: 'partition'); it must be one of 'auto', 'partition',"),
        ({"seed": -1}, "seed is -1; it must be an integer, 0 or more"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"groups": 0}, "groups is 0; it must be a positive integer, 'auto', or map patterns to these"),
        ({"groups": 2.0}, "groups is 2.0"),
        ({"groups": True}, "groups is True"),
        ({"groups": "all"}, "groups is 'all'"),
        ({"groups": {"stem": -2}}, "groups is -2"),
        (
            {"groups": {"*": 6}},
            "layer1.0.conv1: 32 filters do not divide into 6 groups; use a divisor of 32, such as 4 or 8, "
            "or use groups='auto', a mapping from patterns, or ignore the layer",
        ),
        ({"ratio": 0.6, "form": "partition"}, "layer1.0.conv1: ratio 0.6 has no partition form"),
    ],
)
def test_illegal_arguments_are_refused(net: Net, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        make_plan(net, **arguments)


def test_the_bar_is_on_stderr_and_only_on_request(net: Net, capsys: pytest.CaptureFixture[str]) -> None:
    make_plan(net)
    assert capsys.readouterr() == ("", "")
    make_plan(net, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "planning" in err


# Which shape


@pytest.mark.parametrize(
    "channels, ratio, kept",
    [
        (64, 0.5, 32),
        (64, 0.6, 26),  # 25.6
        (10, 0.75, 3),  # 2.5: half up
        (25, 0.9, 3),  # 2.5, and the float product is below it
        (5, 0.7, 2),  # 1.5
        (64, 0.999, 1),  # never none
        (16, 0.01, 16),
        (1, 0.5, 1),
    ],
)
def test_kept_channels_are_rounded(channels: int, ratio: float, kept: int) -> None:
    assert kept_channels(channels, ratio) == kept


@pytest.mark.parametrize(
    "ratio, groups",
    [(0.5, 2), (2 / 3, 3), (0.6667, 3), (0.75, 4), (0.9375, 16), (0.6, None), (0.51, None), (0.3, None), (0.0, None)],
)
def test_partition_ratios_are_recognized(ratio: float, groups: int | None) -> None:
    assert partition_groups(ratio) == groups


@pytest.mark.parametrize(
    "filters, channels, arguments, expected",
    [
        # auto: partition where the ratio is 1 - 1/n and the layer divides
        (64, 64, {"ratio": 0.5}, Shape("partition", 2, 32)),
        (64, 32, {"ratio": 0.75}, Shape("partition", 4, 8)),
        (48, 96, {"ratio": 0.6667}, Shape("partition", 3, 32)),
        (64, 64, {"ratio": 0.5, "groups": 2}, Shape("partition", 2, 32)),
        (16, 16, {"ratio": 0.875, "groups": 8}, Shape("partition", 8, 2)),  # narrow, but asked for
        # auto: overlap elsewhere
        (64, 64, {"ratio": 0.5, "groups": 4}, Shape("overlap", 4, 32)),
        (64, 33, {"ratio": 0.5}, Shape("overlap", 4, 17)),
        (64, 64, {"ratio": 0.6667}, Shape("overlap", 4, 21)),
        (16, 16, {"ratio": 0.875}, Shape("overlap", 2, 2)),  # parts of 2 are too narrow
        (64, 64, {"ratio": 0.5, "groups": 1}, Shape("overlap", 1, 32)),
        # automatic number of overlapping groups
        (128, 64, {"ratio": 0.6}, Shape("overlap", 8, 26)),
        (64, 64, {"ratio": 0.6}, Shape("overlap", 4, 26)),
        (32, 64, {"ratio": 0.6}, Shape("overlap", 2, 26)),
        (16, 64, {"ratio": 0.6}, Shape("overlap", 2, 26)),
        (136, 64, {"ratio": 0.6}, Shape("overlap", 8, 26)),
        (100, 64, {"ratio": 0.6}, Shape("overlap", 4, 26)),
        (18, 64, {"ratio": 0.6}, Shape("overlap", 2, 26)),
        (64, 64, {"ratio": 0.5, "form": "overlap"}, Shape("overlap", 4, 32)),
        # forced partition
        (64, 64, {"ratio": 0.75, "form": "partition"}, Shape("partition", 4, 16)),
        (64, 64, {"ratio": 0.75, "form": "partition", "groups": 4}, Shape("partition", 4, 16)),
    ],
)
def test_shapes(filters: int, channels: int, arguments: dict[str, Any], expected: Shape) -> None:
    assert choose_shape(filters, channels, **arguments) == expected


@pytest.mark.parametrize(
    "filters, channels, arguments, reason",
    [
        (17, 64, {"ratio": 0.6}, "17 filters do not divide into 2 groups"),
        (17, 64, {"ratio": 0.5}, "17 filters do not divide into 2 groups"),
        (64, 64, {"ratio": 0.001}, "ratio 0.001 removes none of 64 channels"),
        (64, 33, {"ratio": 0.5, "form": "partition"}, "64 filters of 33 channels do not divide into 2 parts"),
        (33, 64, {"ratio": 0.5, "form": "partition"}, "33 filters of 64 channels do not divide into 2 parts"),
        (8, 9, {"ratio": 0.5, "form": "partition", "groups": 2}, "8 filters of 9 channels do not divide into 2 parts"),
        (64, 24, {"ratio": 0.875, "form": "partition"}, "too small: 8 parts of 3 filters or channels, fewer than 4"),
    ],
)
def test_shapes_that_cannot_be(filters: int, channels: int, arguments: dict[str, Any], reason: str) -> None:
    assert choose_shape(filters, channels, **arguments) == reason


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"ratio": 0.5, "groups": 6}, "64 filters do not divide into 6 groups; use a divisor of 64, such as 4 or 8"),
        (
            {"ratio": 0.6, "form": "partition"},
            "ratio 0.6 has no partition form, because 1 / (1 - ratio) is not a whole number; use 0.5 or 0.6667, or "
            "form='overlap'",
        ),
        ({"ratio": 0.3, "form": "partition"}, "is not a whole number; use 0.5, or form='overlap'"),
        (
            {"ratio": 0.5, "form": "partition", "groups": 4},
            "groups=4 contradicts ratio 0.5, whose partition form has 1 / (1 - ratio) = 2 groups; use groups=2, "
            "groups='auto' or form='overlap'",
        ),
    ],
)
def test_contradictory_shapes_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        choose_shape(64, 64, **arguments)


def test_the_ratio_that_the_message_suggests_is_accepted() -> None:
    assert choose_shape(48, 48, 0.6667, form="partition") == Shape("partition", 3, 16)


def test_patterns_match_names_and_all_below_them() -> None:
    names = ["layer1.0.conv", "layer1.1.conv", "layer10.conv"]
    assert match_patterns("p", {"layer1": 1}, names) == {"layer1.0.conv": 1, "layer1.1.conv": 1}
    assert match_patterns("p", {"layer1.?": 1}, names) == {"layer1.0.conv": 1, "layer1.1.conv": 1}
    assert match_patterns("p", {"*": 1}, names) == dict.fromkeys(names, 1)
    assert match_patterns("p", {"layer10": 1, "*.conv": 2}, names)["layer10.conv"] == 1
    assert match_patterns("p", {}, names) == {}
    with pytest.raises(PlanError, match="matches no convolution"):
        match_patterns("p", {"LAYER1": 1}, names)


def test_all_convolutions_but_those_that_are_meant_are_left_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Linear(8, 2))
    assert left_out(model, None) == ()
    assert left_out(model, "1x1") == ("0",)
    assert left_out(model, "0") == ("2",)
    with pytest.raises(PlanError, match="only: pattern 'layer1' matches no convolution"):
        left_out(model, "layer1")
    with pytest.raises(PlanError, match="no 1x1 convolution"):
        left_out(model[:1], "1x1")


def test_one_number_of_groups_is_a_wish_and_a_mapping_is_strict() -> None:
    torch.manual_seed(0)
    widths = {"even": 48, "near": 20, "far": 17}
    model = nn.Sequential()
    for name, width in widths.items():
        model.add_module(name, nn.Conv2d(16, width, 1))
        model.add_module(f"back_from_{name}", nn.Conv2d(width, 16, 1))
    plan = make_plan(model, 0.6, groups=8, ignore="back_*")
    assert {name: kernels.groups for name, kernels in plan.layers.items()} == {"even": 8, "near": 10}
    assert plan.notes == {"near": "in 10 groups: 20 filters do not divide into 8"}
    assert plan.skipped["far"] == "17 filters do not divide into 8 groups"
    x = torch.randn(2, 16, 4, 4)
    pruned = fxprune.compile(model, 0.6, groups=8, ignore="back_*", example_inputs=x)
    assert "note: near: in 10 groups: 20 filters do not divide into 8" in str(fxprune.report(pruned))
    with pytest.raises(PlanError, match="near: 20 filters do not divide into 8 groups"):
        make_plan(model, 0.6, groups={"near": 8})


def test_a_number_of_groups_that_a_layer_cannot_have_leaves_it_dense_in_partition_form() -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 1), nn.Conv2d(32, 18, 1))
    plan = make_plan(model, 0.75, groups=4, form="partition")
    assert list(plan.layers) == ["0"]
    assert plan.skipped["1"] == "18 filters do not divide into 4 groups"
