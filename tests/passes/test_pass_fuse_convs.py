"""FuseConvs: what stands around a convolution is computed with it, and the function stays."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from equality import assert_same_function
from passes_harness import SHUFFLE, check_pass, gather, image, prepared, reasons, show
from products_harness import in_turns, one_in
from torch import Tensor, fx, nn
from torch.nn.utils.parametrizations import weight_norm
from zoo import CASES, Case

import fxprune
from fxprune.exact.record import record_of
from fxprune.graph.editing import Outcome, calls
from fxprune.graph.fused import FusedConv2d
from fxprune.graph.layers import ChannelGather
from fxprune.graph.memory import Memory
from fxprune.graph.tracing import trace
from fxprune.passes import FoldBatchNorm, FuseConvs, fuse_convs
from fxprune.vocabulary import FormChoice

EVAL = ("eval",)
Body = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Convolutions `c`, `d` and gathers `g`, `h` of four channels; `body` says how they are connected."""

    def __init__(self, body: Body, c: nn.Module | None = None) -> None:
        super().__init__()
        self.c, self.d = c or nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.g, self.h = gather(), gather((1, 3, 0, 2))
        self.relu, self.relu6, self.bounds = nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(-0.2, 0.3)
        self.p = nn.Parameter(torch.randn(1, 4, 5, 5))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def meta(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.to("meta") for x in inputs)


def fuse(body: Body, after: str, c: nn.Module | None = None, x: Tensor | None = None) -> tuple[fx.GraphModule, Outcome]:
    x = image() if x is None else x
    return check_pass(FuseConvs(meta(x)), prepared(Net(body, c)), x, after=after, modes=EVAL)


def fused(gm: fx.GraphModule) -> list[FusedConv2d]:
    return [conv for _, conv in calls(gm, FusedConv2d)]


# --- what becomes one node ------------------------------------------------------------------------------------------


def test_everything_around_a_convolution_becomes_one_node() -> None:
    gm, outcome = fuse(lambda m, x: F.relu(m.h(m.c(m.g(x))) + x), "x -> c_fused -> output")
    assert outcome == Outcome(("c",))
    (conv,) = fused(gm)
    assert conv.index is not None
    assert conv.index.tolist() == list(SHUFFLE)
    assert conv.order is not None
    assert conv.order.tolist() == [1, 3, 0, 2]
    assert (conv.minimum, conv.maximum, conv.dense_groups) == (0, None, None)
    assert not [module for module in gm.modules() if isinstance(module, ChannelGather)]


def test_a_pruned_convolution_knows_its_dense_form() -> None:
    model, x = prepared(Net(lambda m, x: m.c(x) + m.d(x))), image()
    gm = trace(model, (x,)).module
    FuseConvs(meta(x), pruned=("d",))(gm)
    assert [conv.dense_groups for conv in fused(gm)] == [None, 1]


ACTIVATIONS: dict[str, tuple[Body, tuple[float | None, float | None]]] = {
    "F.relu": (lambda m, x: F.relu(m.c(x)), (0, None)),
    "F.relu in place": (lambda m, x: F.relu(m.c(x), inplace=True), (0, None)),
    "relu": (lambda m, x: m.c(x).relu(), (0, None)),
    "relu_": (lambda m, x: m.c(x).relu_(), (0, None)),
    "torch.relu": (lambda m, x: torch.relu(m.c(x)), (0, None)),
    "nn.ReLU": (lambda m, x: m.relu(m.c(x)), (0, None)),
    "nn.ReLU6": (lambda m, x: m.relu6(m.c(x)), (0, 6)),
    "F.relu6": (lambda m, x: F.relu6(m.c(x)), (0, 6)),
    "nn.Hardtanh": (lambda m, x: m.bounds(m.c(x)), (-0.2, 0.3)),
    "clamp": (lambda m, x: m.c(x).clamp(-0.5, 0.5), (-0.5, 0.5)),
    "clamp max": (lambda m, x: m.c(x).clamp(max=0.5), (None, 0.5)),
    "clamp none": (lambda m, x: torch.clamp(m.c(x), None, 1), (None, 1)),
    "clip_": (lambda m, x: m.c(x).clip_(min=0), (0, None)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    body, bounds = ACTIVATIONS[name]
    gm, _ = fuse(body, "x -> c_fused -> output")
    assert (fused(gm)[0].minimum, fused(gm)[0].maximum) == bounds


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: m.c(x) + x,
        lambda m, x: x + m.c(x),
        lambda m, x: torch.add(m.c(x), x),
        lambda m, x: m.c(x).add_(x),
        lambda m, x: m.c(x).__iadd__(x),
        lambda m, x: x.add(m.c(x)),
        lambda m, x: (m.c(x) + x).clamp(-1, 1),
    ],
)
def test_additions(body: Body) -> None:
    fuse(body, "x -> c_fused -> output")


def test_the_later_of_two_convolutions_takes_the_earlier() -> None:
    fuse(lambda m, x: F.relu(m.c(x) + m.d(x)), "x -> c_fused\nx, c_fused -> d_fused -> output")
    fuse(lambda m, x: m.d(x).relu() + m.c(x).relu(), "x -> d_fused\nx -> c_fused\nd_fused, c_fused -> add -> output")
    fuse(lambda m, x: m.h(m.d(x)) + m.g(m.c(x)), "x -> d_fused\nx, d_fused -> c_fused -> output")


def test_a_gather_is_read_through_whoever_else_reads_it() -> None:
    gm, _ = fuse(
        lambda m, x: torch.cat([m.c(y := m.g(x.sin())), m.d(y), y], 1),
        """x -> sin -> g
           sin -> c_fused
           sin -> d_fused
           c_fused, d_fused, g -> cat -> output""",
    )
    assert all(conv.index is not None for conv in fused(gm))


def test_a_gather_that_convolutions_read_through_is_not_taken_by_the_one_before() -> None:
    gm, _ = fuse(lambda m, x: m.d(m.g(m.c(x))), "x -> c_fused -> d_fused -> output")
    first, second = fused(gm)
    assert (first.order is None, second.index is None) == (True, False)


def test_a_gather_that_repeats_is_read_but_not_written() -> None:
    class Repeats(Net):
        def __init__(self, body: Body) -> None:
            super().__init__(body, nn.Conv2d(6, 4, 3, padding=1, groups=2))
            self.g = gather((0, 2, 2, 3, 0, 1))

    for body, after in (
        (lambda m, x: m.c(m.g(x)), "x -> c_fused -> output"),
        (lambda m, x: m.g(m.d(x)), "x -> d_fused -> g -> output"),
    ):
        check_pass(FuseConvs(meta(image())), prepared(Repeats(body)), image(), after=after, modes=EVAL)


@pytest.mark.parametrize(
    "conv, padding",
    [
        (nn.Conv2d(4, 4, 3, padding="same"), [1, 1]),
        (nn.Conv2d(4, 4, (3, 5), padding="same", dilation=(2, 1)), [2, 2]),
        (nn.Conv2d(4, 4, 3, padding="valid"), [0, 0]),
        (nn.Conv2d(4, 4, (1, 3), stride=2, padding=(0, 2), groups=2, bias=False), [0, 2]),
    ],
    ids=str,
)
def test_padding_becomes_numbers(conv: nn.Conv2d, padding: list[int]) -> None:
    before = conv.padding
    gm, _ = fuse(lambda m, x: m.c(x).relu(), "x -> c_fused -> output", conv)
    assert fused(gm)[0].padding == padding
    assert conv.padding == before


# --- what stays a node of its own -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body, after",
    [
        (lambda m, x: m.c(x) + x[:, :, :1], "x -> c_fused\nx -> getitem\nc_fused, getitem -> add -> output"),
        (lambda m, x: torch.add(m.c(x), x, alpha=2), "x -> c_fused\nc_fused, x -> add -> output"),
        (lambda m, x: (y := m.c(x)) + y, "x -> c_fused -> add -> output"),
        (lambda m, x: m.c(x) + 1, "x -> c_fused -> add -> output"),
        (lambda m, x: m.c(x) + m.p, "x -> c_fused\n-> p\nc_fused, p -> add -> output"),
        (lambda m, x: x.clone().add_(m.c(x)), "x -> clone\nx -> c_fused\nclone, c_fused -> add_ -> output"),
        (lambda m, x: (y := m.c(x)).relu() * y, "x -> c_fused -> relu\nrelu, c_fused -> mul -> output"),
        (lambda m, x: m.c(x).clamp(min=x), "x -> c_fused\nc_fused, x -> clamp -> output"),
        (lambda m, x: m.c(x).relu().relu(), "x -> c_fused -> relu_1 -> output"),
        (lambda m, x: m.c(x).relu() + x, "x -> c_fused\nc_fused, x -> add -> output"),
        (lambda m, x: F.leaky_relu(m.c(x)), "x -> c_fused -> leaky_relu -> output"),
    ],
    ids=[
        "broadcast", "alpha", "with itself", "number", "parameter", "into another", "two readers", "tensor bound",
        "two activations", "add after activation", "leaky",
    ],
)  # fmt: skip
def test_not_fused(body: Body, after: str) -> None:
    fuse(body, after)


def test_a_parameter_is_no_residual_although_one_image_has_its_shape() -> None:
    model, one = prepared(Net(lambda m, x: m.c(x) + m.p)), image(batch=1)
    gm, _ = check_pass(
        FuseConvs(meta(one)), model, one, after="x -> c_fused\n-> p\nc_fused, p -> add -> output", modes=EVAL
    )
    assert_same_function(gm, model, (image(batch=3),), EVAL)


def writes_into_the_input(m: Net, x: Tensor) -> Tensor:
    x = x * 1
    y = m.c(x)
    x.mul_(2)
    z: Tensor = y + x
    return z


def writes_into_the_residual(m: Net, x: Tensor) -> Tensor:
    z = x * 1
    y = m.c(x) + z
    z.mul_(2)
    r: Tensor = y.relu()
    return r


def writes_into_a_view_of_the_input(m: Net, x: Tensor) -> Tensor:
    x = x * 1
    y = m.c(x)
    x.transpose(2, 3).add_(1)
    z: Tensor = y.relu()
    return z


def writes_into_what_a_gather_read(m: Net, x: Tensor) -> Tensor:
    x = x * 1
    y = m.g(x)
    x.mul_(2)
    z: Tensor = m.c(y)
    return z.relu()


@pytest.mark.parametrize(
    "body, after",
    [
        (writes_into_the_input, "x -> mul -> c_fused\nmul -> mul_\nc_fused, mul -> add -> output"),
        (writes_into_the_residual, "x -> mul\nx, mul -> c_fused\nmul -> mul_\nc_fused -> relu -> output"),
        (
            writes_into_a_view_of_the_input,
            "x -> mul -> c_fused\nmul -> transpose -> add_\nc_fused -> relu -> output",
        ),
        (writes_into_what_a_gather_read, "x -> mul -> g\nmul -> mul_\ng -> c_fused -> output"),
    ],
)
def test_writes_on_the_way_end_the_chain(body: Body, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fuse(body, after)
    monkeypatch.setattr(Memory, "changes", lambda *_: False)  # the control: who does not look fuses wrongly
    model, x = prepared(Net(body)), image()
    gm = trace(model, (x,)).module
    FuseConvs(meta(x))(gm)
    gm.recompile()
    with pytest.raises(AssertionError, match=r"max .difference"):
        assert_same_function(gm, model, (x,), EVAL)


def test_a_write_after_the_chain_does_no_harm() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        x = x * 1
        y = m.c(x).relu()
        z: Tensor = y * x.mul_(2)
        return z

    fuse(body, "x -> mul -> c_fused\nmul -> mul_\nc_fused, mul_ -> mul_1 -> output")


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def hooked() -> nn.Conv2d:
    conv = nn.Conv2d(4, 4, 1)
    conv.register_forward_hook(lambda layer, args, output: output * 2)
    return conv


@pytest.mark.parametrize(
    "conv, reason",
    [
        (Doubled(4, 4, 1), "Doubled is more than a Conv2d"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "padding circular"),
        (nn.Conv2d(4, 4, 2, padding="same"), "padding zeros, same"),
        (hooked(), "hooks"),
        (weight_norm(nn.Conv2d(4, 4, 1)), "more than a Conv2d"),
    ],
    ids=["subclass", "circular", "uneven same", "hooked", "weight norm"],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_left_alone(conv: nn.Module, reason: str) -> None:
    model, x = prepared(Net(lambda m, x: m.d(m.c(x).relu()), conv)), image()
    gm = trace(model, (x,)).module
    outcome = FuseConvs(meta(x))(gm)
    gm.recompile()
    assert outcome.rewritten == ("d",)
    assert reason in reasons(outcome)["c"]
    assert_same_function(gm, model, (x,), EVAL)


def test_left_alone_a_weight_that_the_graph_reads_by_name() -> None:
    _, outcome = fuse(
        lambda m, x: m.c(x) + F.conv2d(x, m.c.weight, padding=1),  # type: ignore[arg-type]  # a parameter
        """x -> c
           -> c_weight
           x, c_weight -> conv2d
           c, conv2d -> add -> output""",
    )
    assert "c_weight reads a parameter" in reasons(outcome)["c"]


def test_left_alone_an_image_without_batch() -> None:
    _, outcome = fuse(lambda m, x: m.c(x).relu(), "x -> c -> relu -> output", x=image()[0])
    assert "no batch of images" in reasons(outcome)["c"]


def test_a_hook_on_the_activation_sees_its_value() -> None:
    model = Net(lambda m, x: m.relu6(m.c(x)))
    model.relu6.register_forward_hook(lambda layer, args, output: output * 2)
    x = image()
    gm = trace(prepared(model), (x,)).module
    FuseConvs(meta(x))(gm)
    gm.recompile()
    assert_same_function(gm, model, (x,), EVAL)
    assert fused(gm)[0].minimum is None


def test_a_shared_convolution_is_fused_at_each_of_its_sites() -> None:
    gm, outcome = fuse(lambda m, x: m.c(x).relu() + m.c(m.g(x)), "x -> c_fused\nx, c_fused -> c_fused_2 -> output")
    assert outcome.rewritten == ("c", "c_1")
    assert [conv.minimum for conv in fused(gm)] == [0, None]


# --- the zoo --------------------------------------------------------------------------------------------------------


def fused_zoo(model: nn.Module, inputs: Sequence[Tensor]) -> fx.GraphModule:
    gm = copy.deepcopy(model) if isinstance(model, fx.GraphModule) else trace(model, tuple(inputs)).module
    gm.eval()
    FoldBatchNorm()(gm)
    FuseConvs(meta(*inputs))(gm)
    gm.graph.lint()
    gm.recompile()
    return gm


@pytest.mark.parametrize("case", one_in(6, CASES, start=1))
def test_the_zoo_keeps_its_functions(case: Case) -> None:
    model, inputs = prepared(case.build()), case.inputs()
    gm = trace(model, inputs).module.eval()
    FuseConvs(meta(*inputs))(gm)
    gm.graph.lint()
    gm.recompile()
    assert_same_function(gm, model, inputs, EVAL)
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        assert_same_function(fused_zoo(model, inputs), model, inputs, EVAL)


@pytest.mark.parametrize(
    "case, form",
    in_turns(CASES, ["partition", "overlap"], step=9),
)
def test_the_zoo_keeps_its_functions_when_compiled(case: Case, form: FormChoice) -> None:
    inputs = case.inputs()
    pruned = fxprune.compile(prepared(case.build()), 0.5, form=form, example_inputs=inputs, verify=False)
    again = fused_zoo(pruned, inputs)
    assert_same_function(again, pruned, inputs, EVAL)
    flat = [name for name in record_of(pruned).plan.layers if isinstance(pruned.get_submodule(name), nn.Conv2d)]
    assert sum(1 for _ in calls(again, FusedConv2d)) >= len(flat)


RESIDUAL = next(case for case in CASES if case.name == "ResidualAdd")


@pytest.mark.parametrize("broken", ["order", "residual", "bounds"])
def test_control_a_step_that_gets_lost_is_seen(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fuse_convs._Step
    lost = {
        "order": lambda node, order=None, **rest: right(node, None if order is None else order.argsort(), **rest),
        "residual": lambda node, residual=None, **rest: right(node, **rest),
        "bounds": lambda node, bounds=None, **rest: right(node, **rest),
    }
    monkeypatch.setattr(fuse_convs, "_Step", lost[broken])
    with pytest.raises(AssertionError, match=r"max .difference"):
        fuse(lambda m, x: (m.g(m.c(x)) + x).clamp(-0.5, 0.5), "x -> c_fused -> output")


def test_control_a_wrong_fusion_in_the_zoo_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = prepared(RESIDUAL.build()), RESIDUAL.inputs()
    assert "add" not in show(fused_zoo(model, inputs))
    monkeypatch.setattr(FusedConv2d, "forward", lambda self, x, residual=None: nn.Conv2d.forward(self, x))
    monkeypatch.setattr(FusedConv2d, "_conv_forward", nn.Conv2d._conv_forward, raising=False)
    monkeypatch.setattr(FusedConv2d, "padding_mode", "zeros", raising=False)
    with pytest.raises(AssertionError, match=r"max .difference"):
        assert_same_function(fused_zoo(model, inputs), model, inputs, EVAL)
