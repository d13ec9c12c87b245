"""RemoveBranches: a branch whose last layer has a weight of zero is the bias of that layer."""

from collections.abc import Callable

import pytest
import torch
from equality import assert_same_function
from passes_harness import check_pass, image, prepared
from torch import Tensor, nn

from fxprune.channels.branches import residual_branches
from fxprune.errors import PassError
from fxprune.graph.tracing import trace
from fxprune.graph.values import CarriedValues
from fxprune.passes import RemoveBranches
from fxprune.plans import PrunePlan
from fxprune.plans.masking import masked_copy


class Block(nn.Module):
    """`act(x + tail(last(conv(x))))`, as it is given."""

    def __init__(self, last: nn.Module, tail: nn.Module | None = None, *, adds_in_place: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 4, 3, padding=1)
        self.conv, self.last, self.tail = nn.Conv2d(4, 4, 3, padding=1), last, tail or nn.Identity()
        self.head = nn.Conv2d(4, 4, 1)
        self.adds_in_place = adds_in_place

    def forward(self, x: Tensor) -> Tensor:
        stream = self.stem(x)
        branch = self.tail(self.last(torch.relu(self.conv(stream))))
        if self.adds_in_place:
            branch += stream
        else:
            branch = stream + branch
        return self.head(torch.relu(branch))


def rewrite_of(net: nn.Module, *inputs: Tensor, names: tuple[str, ...] | None = None) -> RemoveBranches:
    traced = trace(net, inputs)
    found, refused = residual_branches(traced.module, traced.values)
    assert not refused
    plan = PrunePlan({}, branches={name: found[name].modules for name in names or found})
    return RemoveBranches(PrunePlan.from_json(plan.to_json()), CarriedValues(traced.inputs, traced.values))


def masked(net: nn.Module, *inputs: Tensor) -> tuple[nn.Module, RemoveBranches]:
    rewrite = rewrite_of(net, *inputs)
    return masked_copy(net, rewrite.plan).eval(), rewrite


def test_a_normalization_leaves_its_shift() -> None:
    net, rewrite = masked(prepared(Block(nn.BatchNorm2d(4))), image())
    gm, outcome = check_pass(
        rewrite,
        net,
        image(),
        after="""
        x -> stem
        -> last_bias -> reshape -> tail
        stem, tail -> add_1 -> relu_1 -> head -> output
        """,
        repeatable=False,
    )
    assert outcome.rewritten == ("last",)
    assert sorted(dict(gm.named_parameters())) == ["head.bias", "head.weight", "last.bias", "stem.bias", "stem.weight"]
    assert torch.equal(gm.get_parameter("last.bias"), net.get_parameter("last.bias"))
    assert bool(net.get_parameter("last.bias").count_nonzero())


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(lambda: Block(nn.Conv2d(4, 4, 1)), id="convolution"),
        pytest.param(lambda: Block(nn.Conv2d(4, 4, 1, bias=False)), id="convolution without bias"),
        pytest.param(lambda: Block(nn.ConvTranspose2d(4, 4, 1)), id="transposed convolution"),
        pytest.param(lambda: Block(nn.BatchNorm2d(4), nn.SiLU()), id="activation behind"),
        pytest.param(lambda: Block(nn.BatchNorm2d(4), nn.SiLU(inplace=True)), id="activation in place behind"),
        pytest.param(lambda: Block(nn.Conv2d(4, 4, 1, bias=False), nn.Sigmoid()), id="what zero becomes"),
        pytest.param(lambda: Block(nn.BatchNorm2d(4), nn.Dropout2d(0.5)), id="dropout behind"),
        pytest.param(lambda: Block(nn.BatchNorm2d(4), adds_in_place=True), id="sum in place of the branch"),
        pytest.param(lambda: Block(nn.Conv2d(4, 4, 1, bias=False), adds_in_place=True), id="nothing in place"),
    ],
)
def test_the_function_stays(block: Callable[[], nn.Module]) -> None:
    net, rewrite = masked(prepared(block()), image())
    gm = trace(net, (image(),)).module
    rewrite(gm)
    gm.graph.lint()
    gm.recompile()
    assert "conv.weight" not in dict(gm.named_parameters())
    assert_same_function(gm, net, (image(),), modes=("eval",) if "Dropout" in str(net) else ("eval", "train"))


def test_dropout_behind_still_drops_by_sample() -> None:
    net, rewrite = masked(prepared(Block(nn.BatchNorm2d(4), nn.Dropout(0.5))), image())
    gm = trace(net, (image(),)).module
    rewrite(gm)
    gm.recompile()
    for seed in range(3):
        outputs = []
        for module in (net.train(), gm.train()):
            torch.manual_seed(seed)
            outputs.append(module(image()))
        assert torch.equal(*outputs)


def test_a_copy_stands_for_the_sum_where_the_graph_writes_in_place() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            stream = self.stem(x)
            total = stream + self.conv(stream)
            return total.relu_() - stream

    net, rewrite = masked(prepared(Net()), image())
    gm = trace(net, (image(),)).module
    rewrite(gm)
    gm.recompile()
    assert_same_function(gm, net, (image(),))
    assert any(node.target is torch.clone for node in gm.graph.nodes)


def test_branches_one_behind_the_other() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, bias=False)
            self.third = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            for conv in (self.first, self.second, self.third):
                x = x + conv(x)
            return x

    net, rewrite = masked(prepared(Net()), image())
    gm = trace(net, (image(),)).module
    assert rewrite(gm).rewritten == ("first", "second", "third")
    gm.recompile()
    assert_same_function(gm, net, (image(),))
    assert sorted(dict(gm.named_parameters())) == ["first.bias", "third.bias"]


def test_a_weight_that_is_not_zero() -> None:
    net = prepared(Block(nn.BatchNorm2d(4)))
    with pytest.raises(PassError, match="last: 4 weights of a branch that the plan removes are not zero"):
        rewrite_of(net, image())(trace(net, (image(),)).module)


def test_a_branch_that_is_none() -> None:
    net = prepared(Block(nn.BatchNorm2d(4)))
    traced = trace(net, (image(),))
    rewrite = RemoveBranches(PrunePlan({}, branches={"head": ("head",)}), CarriedValues(traced.inputs, traced.values))
    with pytest.raises(PassError, match=r"head: .* no residual branch that ends there"):
        rewrite(traced.module)
