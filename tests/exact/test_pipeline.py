"""The runner: order, invariants between passes, and the two environment variables that look inside."""

import itertools
from pathlib import Path

import pytest
import torch
from passes_harness import image, prepared
from torch import Tensor, fx, nn

import fxprune
from fxprune.errors import FxpruneError, PassError, VerificationError
from fxprune.exact.pipeline import checks_each_pass, default_pipeline, dump_directory, run
from fxprune.exact.verification import difference, evaluate
from fxprune.graph.editing import Outcome
from fxprune.graph.examples import Example
from fxprune.graph.layers import ChannelGather
from fxprune.graph.tracing import trace
from fxprune.graph.values import CarriedValues
from fxprune.passes import AbsorbGathers, FoldBatchNorm, GroupConvs
from fxprune.plans import GroupedKernels, PrunePlan

PLAN = PrunePlan(
    {
        "first": GroupedKernels((2, 0, 3, 1), ((1, 3), (0, 2)), in_channels=4, asked_ratio=0.5),
        "second": GroupedKernels((1, 3, 2, 0), ((0, 1), (1, 3)), in_channels=4, asked_ratio=0.5),
    }
)
INPUTS = (image().to("meta"),)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.second(self.norm(self.first(x)).relu())
        return y


@pytest.fixture
def masked() -> nn.Module:
    return fxprune.mask(prepared(Net()), PLAN)


def gathers(gm: nn.Module) -> int:
    return sum(isinstance(module, ChannelGather) for module in gm.modules())


# --- order ----------------------------------------------------------------------------------------------------------


def test_outcomes_are_numbered_and_named(masked: nn.Module) -> None:
    outcomes = run(trace(masked, image()).module, default_pipeline(PLAN, CarriedValues(INPUTS)), INPUTS)
    assert list(outcomes) == [
        "1 GroupConvs", "2 MergeGathers", "3 SinkGathers", "4 MergeGathers", "5 AbsorbGathers",
        "6 AlignWindows", "7 AbsorbGathers", "8 MergeGathers",
    ]  # fmt: skip
    assert outcomes["1 GroupConvs"].rewritten == ("first", "second")


def test_folding_comes_last(masked: nn.Module) -> None:
    passes = default_pipeline(PLAN, CarriedValues(INPUTS), fold_batch_norm=True)
    assert isinstance(passes[-1], FoldBatchNorm)
    assert passes[:-1] == default_pipeline(PLAN, CarriedValues(INPUTS))


def test_any_order_keeps_the_function_and_the_given_one_leaves_fewest_gathers(masked: nn.Module) -> None:
    """Orders of the eight passes, and of those with BatchNorm folded first: none may be wrong, none better."""
    x = Example((image(),))
    expected = evaluate(masked, x, "eval").tensors
    default = default_pipeline(PLAN, CarriedValues(INPUTS))
    left = []
    orders = [(first, *rest) for first, *rest in itertools.permutations(default)]
    for order in [default, *orders[::2687], (FoldBatchNorm(), *default)]:
        gm = trace(masked, image()).module
        run(gm, order, INPUTS)
        assert difference(evaluate(gm, x, "eval").tensors, expected)[1] <= 1e-10, [type(p).__name__ for p in order]
        left.append(gathers(gm))
    assert left[0] == min(left)
    assert max(left) > left[0], "the order makes no difference at all: the comment in the pipeline is idle"


# --- invariants -----------------------------------------------------------------------------------------------------


class Breaks:
    """A pass that leaves the graph in the state that `how` says."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __call__(self, gm: fx.GraphModule) -> Outcome:
        conv = gm.get_submodule("first")
        assert isinstance(conv, nn.Conv2d)
        if self.how == "order of nodes":
            nodes = list(gm.graph.nodes)
            nodes[1].append(nodes[2])
            nodes[2].args = (nodes[4],)
        elif self.how == "module that is not there":
            next(node for node in gm.graph.nodes if node.name == "first").target = "nowhere"
        elif self.how == "weight shape":
            conv.weight = nn.Parameter(conv.weight[:, :2].detach().clone())
        elif self.how == "function":
            conv.weight = nn.Parameter(conv.weight.detach().flip(0))
        else:
            self._plant_gather(gm)
        return Outcome(("first",))

    def _plant_gather(self, gm: fx.GraphModule) -> None:
        index = {"index above": [0, 1, 2, 4], "index below": [0, 1, 2, -1], "empty index": []}[self.how]
        gm.add_submodule("g", ChannelGather(torch.tensor(index), 4))
        node = next(node for node in gm.graph.nodes if node.name == "first")
        with gm.graph.inserting_before(node):
            node.args = (gm.graph.call_module("g", node.args),)


@pytest.mark.parametrize(
    "how, message",
    [
        ("index above", "Breaks left g with an index outside its 4 channels"),
        ("index below", "Breaks left g with an index outside its 4 channels"),
        ("empty index", "Breaks left g with an index outside its 4 channels"),
        ("weight shape", r"Breaks left first with a weight of shape \(4, 2, 3, 3\)"),
        ("order of nodes", "Breaks left an invalid graph"),
    ],
)
def test_invariants_between_passes(masked: nn.Module, how: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        run(trace(masked, image()).module, (Breaks(how),), INPUTS)


# --- FXPRUNE_VERIFY -------------------------------------------------------------------------------------------------


def test_verify_names_the_pass_that_changes_the_function(masked: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = (*default_pipeline(PLAN, CarriedValues(INPUTS)), Breaks("function"))
    run(trace(masked, image()).module, wrong, INPUTS)  # unseen without the check
    monkeypatch.setenv("FXPRUNE_VERIFY", "1")
    with pytest.raises(VerificationError, match=r"pass 9 Breaks changed the function by \d"):
        run(trace(masked, image()).module, wrong, INPUTS)


def test_verify_passes_the_pipeline(masked: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXPRUNE_VERIFY", "1")
    assert gathers(fxprune.rewrite(masked, PLAN, image())) == 3


def test_verify_needs_inputs(masked: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXPRUNE_VERIFY", "1")
    with pytest.raises(PassError, match=r"needs inputs .*example_inputs"):
        run(trace(masked, image()).module, (GroupConvs(PLAN), AbsorbGathers()), ())


@pytest.mark.parametrize("value, expected", [("", False), ("0", False), ("1", True)])
def test_values_of_verify(monkeypatch: pytest.MonkeyPatch, value: str, expected: bool) -> None:
    monkeypatch.setenv("FXPRUNE_VERIFY", value)
    assert checks_each_pass() is expected


@pytest.mark.parametrize("value", ["yes", "true", "2", " 1"])
def test_other_values_of_verify_are_refused(masked: nn.Module, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("FXPRUNE_VERIFY", value)
    with pytest.raises(FxpruneError, match=f"FXPRUNE_VERIFY is '{value}'; use 1"):
        fxprune.rewrite(masked, PLAN, image())


# --- FXPRUNE_DUMP ---------------------------------------------------------------------------------------------------


def test_dump_writes_numbered_graphs(masked: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    directory = tmp_path / "new" / "graphs"
    monkeypatch.setenv("FXPRUNE_DUMP", str(directory))
    fxprune.rewrite(masked, PLAN, image())
    assert sorted(path.name for path in directory.iterdir()) == [
        "00_traced.txt", "01_GroupConvs.txt", "02_MergeGathers.txt", "03_SinkGathers.txt", "04_MergeGathers.txt",
        "05_AbsorbGathers.txt", "06_AlignWindows.txt", "07_AbsorbGathers.txt", "08_MergeGathers.txt",
    ]  # fmt: skip
    traced, grouped = (path.read_text() for path in sorted(directory.iterdir())[:2])
    assert "first = first(x)  # Conv2d(4, 4" in traced
    assert "groups=2" not in traced
    assert "first_in = first_in(x)  # ChannelGather" in grouped
    assert "first = first(first_in)" in grouped
    assert "groups=2" in grouped


def test_no_dump_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FXPRUNE_DUMP", raising=False)
    assert dump_directory() is None
    monkeypatch.setenv("FXPRUNE_DUMP", "")
    assert dump_directory() is None


def test_a_dump_into_a_file_is_refused(masked: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("FXPRUNE_DUMP", str(tmp_path / "file"))
    with pytest.raises(FxpruneError, match="FXPRUNE_DUMP"):
        fxprune.rewrite(masked, PLAN, image())
    assert (tmp_path / "file").read_text() == "mine"
