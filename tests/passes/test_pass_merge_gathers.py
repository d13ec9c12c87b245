"""MergeGathers: compose, drop identities, share equals; never past an in-place operator that could tell."""

from collections.abc import Callable

import pytest
import torch
from passes_harness import SHUFFLE, check_pass, gather, image, prepared
from torch import Tensor, nn

from fxprune.graph.editing import KEPT_BECAUSE
from fxprune.graph.layers import ChannelGather
from fxprune.graph.memory import Memory
from fxprune.graph.tracing import trace
from fxprune.passes import MergeGathers, merge_gathers

OTHER = (1, 3, 2, 0)
INVERSE = (1, 3, 0, 2)  # of SHUFFLE
IDENTITY = (0, 1, 2, 3)


class Net(nn.Module):
    """Two gathers `a` and `b`, and two 1x1 convolutions `c` and `d`; `body` says how they are connected."""

    def __init__(
        self,
        body: Callable[["Net", Tensor], Tensor],
        a: ChannelGather | None = None,
        b: ChannelGather | None = None,
        width: int = 4,
    ) -> None:
        super().__init__()
        self.a, self.b = a or gather(SHUFFLE), b or gather(OTHER)
        self.c, self.d = nn.Conv2d(width, 4, 1), nn.Conv2d(width, 4, 1)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def net(
    body: Callable[[Net, Tensor], Tensor],
    a: ChannelGather | None = None,
    b: ChannelGather | None = None,
    width: int = 4,
) -> nn.Module:
    return prepared(Net(body, a, b, width))


# --- 1. compose -----------------------------------------------------------------------------------------------------


def test_case_1_a_gather_of_a_gather_reads_the_first_input() -> None:
    gm, outcome = check_pass(
        MergeGathers(),
        net(lambda n, x: n.c(n.b(n.a(x)))),
        image(),
        before="x -> a -> b -> c -> output",
        after="x -> b -> c -> output",
    )
    assert outcome.rewritten == ("b",)
    assert gm.get_buffer("b.index").tolist() == [SHUFFLE[i] for i in OTHER]
    assert not hasattr(gm, "a")


def test_case_1_gathers_that_repeat_and_drop_channels() -> None:
    gm, _ = check_pass(
        MergeGathers(),
        net(lambda n, x: n.c(n.b(n.a(x))), gather((3, 3, 1, 0, 2, 5), 6), gather((5, 5, 0), 6), width=3),
        image(6),
        after="x -> b -> c -> output",
    )
    assert gm.get_buffer("b.index").tolist() == [5, 5, 3]
    merged = gm.get_submodule("b")
    assert isinstance(merged, ChannelGather)
    assert merged.in_channels == 6


def test_case_1_three_in_a_row() -> None:
    check_pass(
        MergeGathers(), net(lambda n, x: n.c(n.a(n.b(n.a(x))))), image(), before="x -> a -> b -> a_1 -> c -> output",
        after="x -> a_1 -> c -> output",
    )  # fmt: skip


def test_case_1_the_inner_gather_stays_for_other_layers() -> None:
    check_pass(
        MergeGathers(),
        net(lambda n, x: n.c(n.b(y := n.a(x))) + n.d(y)),
        image(),
        after="""x -> a
                 x -> b -> c
                 a -> d
                 c, d -> add -> output""",
    )


def test_case_1_a_module_called_elsewhere_keeps_its_index_there() -> None:
    gm, _ = check_pass(
        MergeGathers(),
        net(lambda n, x: n.c(n.b(n.a(x))) + n.d(n.b(x.exp()))),
        image(),
        before="""x -> a -> b -> c
                  x -> exp -> b_1 -> d
                  c, d -> add -> output""",
        after="""x -> b -> c
                 x -> exp -> b_1 -> d
                 c, d -> add -> output""",
    )
    assert gm.get_buffer("b.index").tolist() == list(OTHER)


def test_case_1_takes_over_the_reason_why_a_gather_stays() -> None:
    gm = trace(net(lambda n, x: n.c(n.b(n.a(x)))), image()).module
    inner = next(node for node in gm.graph.nodes if node.name == "a")
    inner.meta[KEPT_BECAUSE] = "told"
    MergeGathers()(gm)
    assert [node.meta.get(KEPT_BECAUSE) for node in gm.graph.nodes if node.name == "b"] == ["told"]


def test_left_alone_along_another_dimension() -> None:
    check_pass(
        MergeGathers(),
        net(lambda n, x: n.c(n.b(n.a(x))), b=gather((4, 0, 2, 1, 3), 5, dim=2)),
        image(),
        after="x -> a -> b -> c -> output",
    )


def test_left_alone_if_others_than_layers_read_the_inner_gather() -> None:
    check_pass(
        MergeGathers(),
        net(lambda n, x: n.c(n.b(y := n.a(x))) + y.relu_()),
        image(),
        after="""x -> a -> b -> c
                 a -> relu_
                 c, relu_ -> add -> output""",
    )


def changes_between(n: Net, x: Tensor) -> Tensor:
    x = x + 1
    y = n.a(x)
    x.relu_()
    z: Tensor = n.c(n.b(y))
    return z + x


def test_left_alone_if_the_original_changes_in_between() -> None:
    check_pass(
        MergeGathers(),
        net(changes_between),
        image(),
        after="""x -> add -> a
                 add -> relu_
                 a -> b -> c
                 c, add -> add_1 -> output""",
    )


# --- 2. identities --------------------------------------------------------------------------------------------------


def test_case_2_an_identity_vanishes() -> None:
    gm, outcome = check_pass(
        MergeGathers(), net(lambda n, x: n.c(n.a(x)), gather(IDENTITY)), image(), after="x -> c -> output"
    )
    assert outcome.rewritten == ("a",)
    assert not hasattr(gm, "a")


def test_case_2_inverse_gathers_cancel() -> None:
    check_pass(
        MergeGathers(),
        net(lambda n, x: n.c(n.b(n.a(x))), gather(SHUFFLE), gather(INVERSE)),
        image(),
        after="x -> c -> output",
    )


def test_case_2_an_identity_of_fresh_memory_vanishes_before_a_writer() -> None:
    check_pass(
        MergeGathers(),
        net(lambda n, x: n.a(n.c(x)).relu_(), gather(IDENTITY)),
        image(),
        after="x -> c -> relu_ -> output",
    )


def test_left_alone_all_channels_out_of_order_or_only_the_first() -> None:
    check_pass(MergeGathers(), net(lambda n, x: n.c(n.a(x))), image(), after="x -> a -> c -> output")
    check_pass(
        MergeGathers(),
        net(lambda n, x: n.c(n.a(x)), gather((0, 1, 2), 4), width=3),
        image(),
        after="x -> a -> c -> output",
    )


def test_left_alone_a_copy_that_is_written_into_while_others_read_the_original() -> None:
    check_pass(
        MergeGathers(),
        net(lambda n, x: n.a(y := n.c(x)).relu_() + y, gather(IDENTITY)),
        image(),
        after="""x -> c -> a -> relu_
                 relu_, c -> add -> output""",
    )


def test_left_alone_a_copy_of_the_input_of_the_model_that_is_written_into() -> None:
    gm, _ = check_pass(
        MergeGathers(), net(lambda n, x: n.a(x).relu_(), gather(IDENTITY)), image(), after="x -> a -> relu_ -> output"
    )
    x = image()
    gm(x)
    assert torch.equal(x, image()), "the input of the caller was written into"


def test_left_alone_a_copy_of_a_view_that_is_written_into() -> None:
    check_pass(
        MergeGathers(),
        net(lambda n, x: n.a((y := n.c(x)).reshape(2, 4, 25)).relu_().sum() + y, gather(IDENTITY, dim=1)),
        image(),
        after="""x -> c -> reshape -> a -> relu_ -> sum_1
                 sum_1, c -> add -> output""",
    )


def keeps_a_copy(n: Net, x: Tensor) -> Tensor:
    x = x + 1
    y = n.a(x)
    x.relu_()
    z: Tensor = n.c(y)
    return z + x


def test_left_alone_an_identity_whose_original_changes_before_it_is_read() -> None:
    check_pass(
        MergeGathers(),
        net(keeps_a_copy, gather(IDENTITY)),
        image(),
        after="""x -> add -> a
                 add -> relu_
                 a -> c
                 c, add -> add_1 -> output""",
    )


# --- 3. equal gathers -----------------------------------------------------------------------------------------------


def test_case_3_equal_gathers_of_one_tensor_become_one() -> None:
    gm, outcome = check_pass(
        MergeGathers(),
        net(lambda n, x: n.c(n.a(x)) + n.d(n.b(x)), gather(), gather()),
        image(),
        after="""x -> a -> c
                 a -> d
                 c, d -> add -> output""",
    )
    assert outcome.rewritten == ("b",)
    assert not hasattr(gm, "b")


@pytest.mark.parametrize(
    "second, body",
    [
        (gather(OTHER), lambda n, x: n.c(n.a(x)) + n.d(n.b(x))),
        (gather(), lambda n, x: n.c(n.a(x)) + n.d(n.b(x + 1))),
        (gather((2, 0, 3, 1), 5, dim=-2), lambda n, x: n.c(n.a(x)) + n.d(n.b(x))[:, :, :1]),
    ],
    ids=["another index", "another tensor", "another dimension"],
)
def test_left_alone_gathers_that_differ(second: ChannelGather, body: Callable[[Net, Tensor], Tensor]) -> None:
    model = net(lambda n, x: body(n, x).sum(dim=2), b=second) if second.dim == -3 else net(
        lambda n, x: n.c(n.a(x)).sum(dim=2) + n.d(n.b(x)).sum(dim=2), b=second
    )  # fmt: skip
    gm = trace(model, image()).module
    outcome = MergeGathers()(gm)
    assert outcome.rewritten == ()
    assert sum(isinstance(module, ChannelGather) for module in gm.modules()) == 2


def written_between(n: Net, x: Tensor) -> Tensor:
    x = x + 1
    y = n.c(n.a(x))
    x.relu_()
    z: Tensor = y + n.d(n.b(x))
    return z


def written_through_a_view(n: Net, x: Tensor) -> Tensor:
    x = x + 1
    y = n.c(n.a(x))
    x.reshape(-1).relu_()
    z: Tensor = y + n.d(n.b(x))
    return z


@pytest.mark.parametrize("body", [written_between, written_through_a_view])
def test_left_alone_equal_gathers_with_a_writer_between(body: Callable[[Net, Tensor], Tensor]) -> None:
    middle = "add -> relu_" if body is written_between else "add -> reshape -> relu_"
    check_pass(
        MergeGathers(),
        net(body, gather(), gather()),
        image(),
        after=f"""x -> add -> a -> c
                  {middle}
                  add -> b -> d
                  c, d -> add_1 -> output""",
    )


def test_left_alone_a_copy_that_a_writer_reads() -> None:
    check_pass(
        MergeGathers(),
        net(lambda n, x: n.c(n.a(x)) + n.b(x).relu_(), gather(), gather()),
        image(),
        after="""x -> a -> c
                 x -> b -> relu_
                 c, relu_ -> add -> output""",
    )


# --- controls -------------------------------------------------------------------------------------------------------


def test_control_sharing_past_a_writer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_gathers, "is_mutating", lambda gm, node: False)
    with pytest.raises(AssertionError, match=r"max .difference"):
        check_pass(
            MergeGathers(),
            net(written_between, gather(), gather()),
            image(),
            after="""x -> add -> a -> c
                     add -> relu_
                     a -> d
                     c, d -> add_1 -> output""",
        )


def test_control_dropping_what_is_no_identity_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChannelGather, "is_identity", True)
    with pytest.raises(AssertionError, match=r"max .difference"):
        check_pass(MergeGathers(), net(lambda n, x: n.c(n.a(x))), image(), after="x -> c -> output")


def test_control_composing_past_a_writer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Memory, "changes", lambda *_: False)
    with pytest.raises(AssertionError, match=r"max .difference"):
        check_pass(
            MergeGathers(),
            net(changes_between),
            image(),
            after="""x -> add -> relu_
                     add -> b -> c
                     c, add -> add_1 -> output""",
        )
