"""Layers that write one channel space get the same groups of filters, and then no gather follows them."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from equality import assert_same_function, masked_by_hand, randomize
from products_harness import in_turns, one_in
from torch import Tensor, fx, nn
from zoo import CASES, Case

import fxprune
import fxprune.planning.making
import fxprune.planning.planner
from fxprune import PlanError, PrunePlan
from fxprune.channels.writers import Writers, common_writers
from fxprune.cli.program import main
from fxprune.exact.record import record_of
from fxprune.graph.layers import ChannelGather
from fxprune.graph.tracing import trace
from fxprune.methods import cocluster, common_groups
from fxprune.methods.cocluster import Layer, group_totals
from fxprune.passes import sink_gathers
from fxprune.planning import Request
from fxprune.plans import Form
from fxprune.vocabulary import FormChoice, Method

FORMS: tuple[Form, ...] = ("partition", "overlap")
each_form = pytest.mark.parametrize("form", FORMS)


class Stage(nn.Module):
    """A stream of 32 channels that a stem, two residual blocks and a projection write; a dense layer at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.project = nn.Conv2d(16, 32, 1)
        self.blocks = nn.ModuleList(self.block(16 if i == 0 else 32) for i in range(3))
        self.head = nn.Linear(32, 5)

    @staticmethod
    def block(channels: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels, 24, 3, padding=1, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (self.project(x) + self.blocks[0](x)).relu()
        for block in list(self.blocks)[1:]:
            x = (x + block(x)).relu()
        y: Tensor = self.head(x.mean((2, 3)))
        return y


WRITERS = ("project", "blocks.0.3", "blocks.1.3", "blocks.2.3")
X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net() -> nn.Module:
    return randomize(Stage()).eval()


def writers_of(model: nn.Module, inputs: Any) -> Writers:
    traced = trace(model, inputs)
    return common_writers(traced.module, traced.values)


def behind_grouped_convs(gm: fx.GraphModule) -> list[str]:
    """Permuting gathers that read a grouped convolution directly."""
    modules = dict(gm.named_modules())
    found = []
    for node in gm.graph.nodes:
        gather = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(gather, ChannelGather) or not gather.is_permutation:
            continue
        source = node.args[0]
        conv = modules.get(str(source.target)) if source.op == "call_module" else None
        if isinstance(conv, nn.Conv2d) and conv.groups > 1:
            found.append(str(node.target))
    return found


def groups_of(plan: PrunePlan, names: tuple[str, ...] = WRITERS) -> set[tuple[int, ...]]:
    return {plan.layers[name].out_order for name in names}


# --- which layers share ---------------------------------------------------------------------------------------------


def test_the_writers_of_a_stream_are_found(net: nn.Module) -> None:
    assert writers_of(net, (X,)) == (WRITERS,)


def test_writers_in_other_spaces_or_of_fixed_channels_are_left_out() -> None:
    class Fixed(Stage):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            y: Tensor = self.project(x) + self.blocks[0](x)  # the output of the model: its order is seen
            return y

    class Halves(Stage):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            first, second = (self.project(x) + self.blocks[0](x)).chunk(2, 1)
            y: Tensor = first.sigmoid() * second
            return y

    assert writers_of(Fixed(), (X,)) == ()
    assert writers_of(Halves(), (X,)) == ()
    plain = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 2))
    assert writers_of(plain, (X,)) == ()


def test_a_module_called_twice_joins_what_it_writes() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.both, self.b = (nn.Conv2d(c, 16, 3, padding=1) for c in (3, 16, 16, 16))
            self.head = nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            first = (self.a(x) + self.both(x)).relu()
            second = (self.b(first) + self.both(first)).relu()
            y: Tensor = self.head(second.mean((2, 3)))
            return y

    assert writers_of(Twice(), (X,)) == (("stem", "a", "both", "b"),)  # what it reads is tied as well


@each_form
def test_the_plan_has_equal_groups_over_a_set(net: nn.Module, form: FormChoice) -> None:
    plan = fxprune.make_plan(net, 0.5, form=form, example_inputs=X, share_groups=True)
    assert len(groups_of(plan)) == 1
    assert len({kernels.kept for name, kernels in plan.layers.items() if name in WRITERS[1:]}) > 1
    alone = fxprune.make_plan(net, 0.5, form=form, example_inputs=X)
    assert len(groups_of(alone)) == len(WRITERS)  # control: they do not agree by themselves
    assert alone == fxprune.make_plan(net, 0.5, form=form, example_inputs=X, share_groups=False)
    others = plan.layers.keys() - set(WRITERS)
    assert others
    assert all(plan.layers[name] == alone.layers[name] for name in others)


def test_only_equal_numbers_of_groups_are_shared(net: nn.Module) -> None:
    groups = {"blocks.0.3": 2, "blocks.1.3": 2, "project": 4, "blocks.2.3": 4}
    plan = fxprune.make_plan(net, 0.4, groups=groups, form="overlap", example_inputs=X, share_groups=True)
    assert len(groups_of(plan, ("blocks.0.3", "blocks.1.3"))) == 1
    assert len(groups_of(plan, ("project", "blocks.2.3"))) == 1
    assert len(groups_of(plan)) == 2


def test_a_target_shares_by_default(net: nn.Module) -> None:
    plan = fxprune.make_plan(net, 0.5, example_inputs=X, target="cpu")
    assert len(groups_of(plan)) == 1
    plan = fxprune.make_plan(net, 0.5, example_inputs=X, target="cpu", share_groups=False)
    assert len(groups_of(plan)) > 1


# --- with all that a plan can be made with --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"calibration": X}, marks=pytest.mark.slow),
        {"calibration": X, "criterion": "activation"},
        {"calibration": X, "form": "overlap"},
        {"variety": "soft", "form": "overlap"},
        {"block": 4},
        pytest.param({"block": 4, "calibration": X, "form": "overlap"}, marks=pytest.mark.slow),
        {"macs": 0.5},
    ],
    ids=lambda options: "-".join(options),
)
def test_options(net: nn.Module, options: Mapping[str, Any]) -> None:
    given = {"example_inputs": X[:2], "share_groups": True, **({} if "macs" in options else {"ratio": 0.5}), **options}
    plan = fxprune.make_plan(net, **given)
    assert len(groups_of(plan)) == 1
    assert PrunePlan.from_json(plan.to_json()) == plan
    state = torch.get_rng_state()
    pruned = fxprune.compile(net, **given, verify=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert record_of(pruned).plan == plan
    if "block" not in options:  # blocks that are read whole hold the order of the stream
        assert behind_grouped_convs(pruned) == []


def test_blocks_do_not_share_by_default(net: nn.Module) -> None:
    plan = fxprune.make_plan(net, 0.5, target="cpu", block=4, example_inputs=X)
    assert len(groups_of(plan)) > 1


@pytest.mark.parametrize("method", ["tmi", "srgkp"])
def test_published_methods_do_not_share(net: nn.Module, method: Method) -> None:
    snapshots: dict[str, Any] = {"snapshots": [Stage()]} if method == "tmi" else {}
    with pytest.raises(PlanError, match="groups each layer by itself; leave share_groups out"):
        fxprune.make_plan(net, 0.4, method=method, share_groups=True, example_inputs=X, **snapshots)
    assert not Request(target="cpu", method=method, **snapshots).shares_groups  # no error where nothing was asked


@pytest.mark.parametrize("value", [1, "yes"])
def test_share_groups_must_be_a_truth_value(net: nn.Module, value: Any) -> None:
    with pytest.raises(PlanError, match=r"share_groups is .*must be True, False, or None"):
        fxprune.make_plan(net, 0.5, share_groups=value, example_inputs=X)


def test_the_command_line_shares(capsys: pytest.CaptureFixture[str]) -> None:
    gathered = {}
    for flag in ("--share-groups", "--no-share-groups"):
        net = "test_shared_groups:Stage"
        arguments = ["report", net, "--ratio", "0.5", "--input-size", "2,3,8,8", "--json", "--quiet", flag]
        assert main(arguments) == 0
        gathered[flag] = json.loads(capsys.readouterr().out)["gathered_bytes"]
    assert gathered["--share-groups"] < gathered["--no-share-groups"]


# --- gathers --------------------------------------------------------------------------------------------------------


def compiled(model: nn.Module, inputs: Any, form: FormChoice, share: bool) -> tuple[fx.GraphModule, PrunePlan]:
    plan = fxprune.make_plan(model, 0.5, form=form, example_inputs=inputs, share_groups=share)
    return fxprune.rewrite(fxprune.mask(model, plan), plan, inputs), plan


@each_form
def test_no_gather_follows_a_writer(net: nn.Module, form: FormChoice) -> None:
    net = net.double()
    shared, plan = compiled(net, X.double(), form, True)
    alone, _ = compiled(net, X.double(), form, False)
    assert behind_grouped_convs(shared) == []
    assert len(behind_grouped_convs(alone)) >= len(WRITERS) - 1  # control
    fxprune.verify(shared, fxprune.mask(net, plan), (X.double(),))
    assert_same_function(shared, masked_by_hand(net, plan), (X.double(),))


SIXTY_FOUR = (torch.zeros(2, 3, 64, 64),)


@pytest.mark.parametrize(
    "name, form",
    [pytest.param(name, form, marks=pytest.mark.slow) for name in ("resnet18", "resnet50") for form in FORMS],
)
def test_residual_networks(name: str, form: FormChoice) -> None:
    model = torchvision.models.get_model(name).eval()
    shared, alone = (compiled(model, SIXTY_FOUR, form, share)[0] for share in (True, False))
    assert behind_grouped_convs(shared) == []
    assert len(behind_grouped_convs(alone)) >= 7
    before, after = fxprune.report(alone).gathered_bytes, fxprune.report(shared).gathered_bytes
    assert before is not None
    assert after is not None
    assert after < 0.95 * before


def double(case: Case) -> nn.Module:
    return randomize(case.build().double()).eval()


# The nets of the zoo in which several layers write one channel space.
SHARING = (
    "OverSequences",
    "OverVolumes",
    "SharedConvTwoInputs",
    "SharedConvInARow",
    "SharedConvTwoReaders",
    "TiedWeights",
    "SharedNorm",
    "SharedPReLU",
    "ResidualAdd",
    "ResidualSharedConv",
    "ResidualChain",
    "Downsample",
    "InPlaceAdd",
    "Arithmetic",
    "MaximumAndWhere",
    "HighAndLowResolution",
    "StackAndSum",
    "SelectiveKernel",
    "Chunk",
    "Focus",
    "LayerScale",
    "SharedScale",
    "StochasticDepthBlock",
    "DropPathBlock",
    "InPlaceReluReadLater",
    "SqueezeExcite",
    "SqueezeExciteWide",
    "InvertedResidual",
    "SegNet",
    "MaxoutValues",
    "RecurrentFromZeros",
)


@pytest.mark.parametrize("case", one_in(8, CASES))
def test_it_is_declared_which_nets_of_the_zoo_share(case: Case) -> None:
    assert bool(writers_of(double(case), case.inputs())) == (case.name in SHARING)


@pytest.mark.parametrize("case, form", in_turns([case for case in CASES if case.name in SHARING], FORMS, step=4))
def test_the_zoo_is_exact_and_gathers_no_more(case: Case, form: FormChoice) -> None:
    model, inputs = double(case), case.inputs()
    shared, plan = compiled(model, inputs, form, True)
    assert_same_function(shared, masked_by_hand(model, plan), inputs)
    alone, _ = compiled(model, inputs, form, False)
    assert len(behind_grouped_convs(shared)) <= len(behind_grouped_convs(alone))
    writers = writers_of(model, inputs)
    assert writers
    planned = [[name for name in names if name in plan.layers] for names in writers]
    assert all(len({plan.layers[name].out_order for name in names}) <= 1 for names in planned)


# --- the choice -----------------------------------------------------------------------------------------------------


def importances() -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    """Two layers in which the same filters, even and odd ones, need the same channels."""
    generator = np.random.default_rng(0)
    first, second = generator.random((16, 8)) * 0.1, generator.random((16, 12)) * 100
    first[::2, :4] += 1
    first[1::2, 4:] += 1
    return [first, second]


def test_no_layer_dominates_by_its_units() -> None:
    first, second = importances()
    layers = [Layer(first, 4, "partition"), Layer(second, 6, "overlap")]
    labels = common_groups(layers, 2)
    assert len(set(labels[::2])) == len(set(labels[1::2])) == 1  # the noise of the second has no more to say
    scaled = common_groups([layers[0], Layer(1e-6 * second, 6, "overlap")], 2)
    assert np.array_equal(labels, scaled)
    alone = cocluster(second, 2, 6)
    assert sorted(alone.out_order[:8]) != list(range(0, 16, 2))  # control: alone it groups otherwise


@each_form
def test_one_layer_groups_as_by_itself_and_given_groups_are_kept(form: Form) -> None:
    first, _ = importances()
    alone = cocluster(first, 2, 4, form)
    labels = common_groups([Layer(first, 4, form)], 2)
    again = cocluster(first, 2, 4, form, labels=labels)
    assert (again.out_order, again.kept) == (alone.out_order, alone.kept)
    other = np.arange(16) // 8
    given = cocluster(first, 2, 4, form, labels=other)
    assert given.out_order == tuple(range(16))
    totals = group_totals(first, other)
    assert given.history[-1] == pytest.approx(float(np.take_along_axis(totals, np.array(given.kept), 1).sum()))


def test_filters_that_do_not_divide_are_refused() -> None:
    first, second = importances()
    with pytest.raises(PlanError, match="do not divide"):
        common_groups([Layer(first, 4, "overlap"), Layer(second, 4, "overlap")], 3)


# --- would a mistake be seen? ---------------------------------------------------------------------------------------


def test_control_groups_that_differ_leave_gathers(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fxprune.planning.kernels, "common_writers", lambda *_: ())
    gm, plan = compiled(net, X, "partition", True)
    assert len(groups_of(plan)) > 1
    assert behind_grouped_convs(gm) != []


def test_control_orders_that_count_alone_lose_to_a_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torchvision.models.resnet18().eval()
    plan = fxprune.make_plan(model, 0.5, form="partition", example_inputs=SIXTY_FOUR, share_groups=True)
    masked = fxprune.mask(model, plan)  # test_residual_networks finds that nothing is left behind
    keys = iter(range(10**6))
    monkeypatch.setattr(sink_gathers, "_order_of", lambda *_: str(next(keys)).encode())
    assert behind_grouped_convs(fxprune.rewrite(masked, plan, SIXTY_FOUR)) != []


def test_control_without_normalization_the_large_layer_dominates(monkeypatch: pytest.MonkeyPatch) -> None:
    module = __import__("fxprune.methods.cocluster", fromlist=["common_groups"])
    first, second = importances()
    layers = [Layer(first, 4, "partition"), Layer(second, 6, "overlap")]
    labels, _, _ = module._best_start(layers, 2, 0, 4)
    assert not np.array_equal(labels, common_groups(layers, 2))
