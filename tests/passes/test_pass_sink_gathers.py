"""SinkGathers: permutations sink through channelwise operators to the layers at the ends of their space."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from passes_harness import SHUFFLE, check_pass, gather, image, prepared, reasons
from torch import Tensor, fx, nn

from fxprune.channels.orders import new_order
from fxprune.errors import PassError
from fxprune.graph.editing import KEPT_BECAUSE, Outcome, gather_before
from fxprune.graph.layers import ChannelGather
from fxprune.graph.tracing import trace
from fxprune.graph.values import CarriedValues
from fxprune.passes import AbsorbGathers, MergeGathers, SinkGathers, sink_gathers

META = (image().to("meta"),)


class Net(nn.Module):
    """Convolutions `c`, `d` and `e`, a gather `g`, a BatchNorm `n`; `body` says how they are connected."""

    def __init__(self, body: Callable[["Net", Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.c, self.d, self.e = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.g, self.n = gather(), nn.BatchNorm2d(4)
        self.body = body
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def net(body: Callable[[Net, Tensor], Tensor], **modules: nn.Module) -> nn.Module:
    return prepared(Net(body, **modules))


class SinkAndMerge:
    """What the pipeline does: a sunk gather meets its inverse and both vanish."""

    def __call__(self, gm: fx.GraphModule) -> Outcome:
        outcome = SinkGathers(CarriedValues(META))(gm)
        MergeGathers()(gm)
        return outcome


def test_case_1_a_gather_between_two_layers_moves_to_one_of_them() -> None:
    gm, outcome = check_pass(
        SinkGathers(CarriedValues(META)),
        net(lambda m, x: m.d(m.g(m.c(x)).relu())),
        image(),
        before="x -> c -> g -> relu -> d -> output",
        after="x -> c -> g -> g_out -> relu -> d_in -> d -> output",
        repeatable=False,
    )
    assert set(outcome.rewritten) == {"g", "d"}
    index = gm.get_buffer("g.index")
    assert index[gm.get_buffer("g_out.index")].tolist() == [0, 1, 2, 3], "the gather was to become an identity"


def test_case_1_and_merging_leaves_one_gather_at_the_end() -> None:
    gm, _ = check_pass(
        SinkAndMerge(),
        net(lambda m, x: m.d(m.g(m.c(x)).relu())),
        image(),
        after="x -> c -> relu -> d_in -> d -> output",
        repeatable=False,
    )
    assert gm.get_buffer("d_in.index").tolist() == list(SHUFFLE)


def test_case_1_through_a_residual_connection() -> None:
    check_pass(
        SinkAndMerge(),
        net(lambda m, x: m.d(m.g(m.c(x)) + m.g(m.e(x)))),
        image(),
        after="""x -> c
                 x -> e
                 c, e -> add -> d_in -> d -> output""",
        repeatable=False,
    )


def test_case_1_a_tensor_that_meets_its_own_reordering_keeps_a_gather() -> None:
    """y + y[p] would need two orders at once; one gather stays, and what it moved elsewhere can be absorbed."""
    gm, _ = check_pass(
        SinkAndMerge(),
        net(lambda m, x: m.d((y := m.c(x)) + m.g(y))),
        image(),
        after="""x -> c -> c_out -> g_out
                 c_out, g_out -> add -> d_in -> d -> output""",
        repeatable=False,
    )
    AbsorbGathers()(gm)
    assert [name for name, module in gm.named_modules() if isinstance(module, ChannelGather)] == ["g_out"]


@pytest.mark.parametrize(
    "body, modules",
    [
        (lambda m, x: m.d(m.n(m.g(m.c(x)))), {}),
        (lambda m, x: m.d(m.n(m.g(m.c(x)))), {"n": nn.Conv2d(4, 4, 3, padding=1, groups=4)}),
        (lambda m, x: m.d(m.n(m.g(m.c(x)))), {"n": nn.PReLU(4)}),
        (lambda m, x: m.d(m.n(m.g(m.c(x)))), {"n": nn.InstanceNorm2d(4, affine=True)}),
    ],
    ids=["BatchNorm", "depthwise", "PReLU", "InstanceNorm"],
)
def test_case_2_parameters_with_an_entry_a_channel(
    body: Callable[[Net, Tensor], Tensor], modules: dict[str, nn.Module]
) -> None:
    model = net(body, **modules)
    gm, _ = check_pass(SinkAndMerge(), model, image(), after="x -> c -> n -> d_in -> d -> output", repeatable=False)
    inverse = torch.tensor(SHUFFLE).argsort()
    assert torch.equal(gm.get_parameter("n.weight"), model.get_parameter("n.weight")[inverse])


def test_case_2_a_layer_scale() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.d, self.g = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), gather()
            self.scale = nn.Parameter(torch.randn(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.d(self.g(self.c(x)) * self.scale)
            return y

    check_pass(
        SinkAndMerge(),
        prepared(Scaled()),
        image(),
        after="""x -> c
                 -> scale
                 c, scale -> mul -> d_in -> d -> output""",
        repeatable=False,
    )


@pytest.mark.parametrize(
    "body, after",
    [
        (lambda m, x: m.g(x).exp(), "x -> g -> exp -> output"),
        (lambda m, x: m.d(m.g(x).cumsum(1)), "x -> g -> cumsum -> d -> output"),
    ],
    ids=["from input to output", "into an operator that mixes channels"],
)
def test_left_alone_where_no_order_is_free(body: Callable[[Net, Tensor], Tensor], after: str) -> None:
    _, outcome = check_pass(SinkGathers(CarriedValues(META)), net(body), image(), after=after)
    assert set(reasons(outcome)) == {"g"}
    assert reasons(outcome)["g"]


def test_left_alone_with_a_reason_for_the_report() -> None:
    gm = trace(net(lambda m, x: m.g(x).exp()), image()).module
    (skip,) = SinkGathers(CarriedValues(META))(gm).skipped
    (kept,) = (node.meta[KEPT_BECAUSE] for node in gm.graph.nodes if node.name == "g")
    assert kept == skip.reason


@pytest.mark.parametrize("index, channels", [((0, 0, 2, 3), 4), ((5, 0, 2, 3), 6)], ids=["repeats", "drops"])
def test_left_alone_what_is_no_permutation(index: tuple[int, ...], channels: int) -> None:
    model = net(lambda m, x: m.d(m.g(m.c(x)).relu()), g=gather(index, channels), c=nn.Conv2d(4, channels, 1))
    check_pass(SinkGathers(CarriedValues(META)), model, image(), after="x -> c -> g -> relu -> d -> output")


def test_left_alone_without_shapes() -> None:
    model = net(lambda m, x: m.d(m.g(m.c(x)).relu()))
    _, outcome = check_pass(SinkGathers(CarriedValues(())), model, image(), after="x -> c -> g -> relu -> d -> output")
    assert outcome == Outcome()


def test_nothing_to_do_without_gathers() -> None:
    model = net(lambda m, x: m.d(m.n(m.c(x)).relu()))
    check_pass(SinkGathers(CarriedValues(META)), model, image(), after="x -> c -> n -> relu -> d -> output")


def test_the_pipeline_then_absorbs_what_is_left() -> None:
    class All:
        def __call__(self, gm: fx.GraphModule) -> Outcome:
            SinkAndMerge()(gm)
            return AbsorbGathers()(gm)

    check_pass(All(), net(lambda m, x: m.d(m.n(m.g(m.c(x))))), image(), after="x -> c -> n -> d -> output")


def test_control_parameters_that_stay_behind_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink_gathers, "_reorder_parameter", lambda *_: None)
    with pytest.raises(AssertionError, match=r"max .difference"):
        check_pass(
            SinkAndMerge(),
            net(lambda m, x: m.d(m.n(m.g(m.c(x))))),
            image(),
            after="x -> c -> n -> d_in -> d -> output",
            repeatable=False,
        )


def test_control_the_inverse_instead_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(gm: fx.GraphModule, node: fx.Node, gather: ChannelGather) -> None:
        gather_before(gm, node, ChannelGather(gather.index.argsort(), gather.in_channels))

    monkeypatch.setattr(sink_gathers, "gather_before", wrong)
    with pytest.raises(AssertionError, match=r"max .difference"):
        check_pass(
            SinkAndMerge(),
            net(lambda m, x: m.d(m.g(m.c(x)).relu())),
            image(),
            after="x -> c -> relu -> d_in -> d -> output",
            repeatable=False,
        )


def test_control_an_order_that_takes_channels_out_of_a_value_is_refused() -> None:
    atoms = np.array([0, 1, 2, 3])
    with pytest.raises(PassError, match="out of a value"):
        new_order(atoms, np.array([0, 1, 2, 4, 3]))
