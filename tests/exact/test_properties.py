"""Random nets and random plans: the rewritten graph computes what the masked model computes."""

import copy

import pytest
import torch
from equality import assert_bitwise_equal, assert_same_function, masked_by_hand, randomize, small_integers
from hypothesis import HealthCheck, assume, given
from hypothesis import strategies as st
from products_harness import examples
from torch import Tensor, nn

import fxprune
from fxprune.plans import GroupedKernels, PrunePlan

WIDTHS = (4, 6, 8)
IMAGE = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

some = examples(40, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None)


class Norm(nn.Module):
    """BatchNorm, unless arithmetic must stay exact, and an activation that leaves no channel dead."""

    def __init__(self, width: int, exact: bool) -> None:
        super().__init__()
        self.norm: nn.Module = nn.Identity() if exact else nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return nn.functional.leaky_relu(y, 0.25)


class Chain(nn.Module):
    def __init__(self, width: int, out: int, kernel: int, exact: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, kernel, padding=kernel // 2, bias=kernel == 1)
        self.norm = Norm(out, exact)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return y


class Residual(nn.Module):
    def __init__(self, width: int, out: int, kernel: int, exact: bool) -> None:
        super().__init__()
        self.first = Chain(width, out, kernel, exact)
        self.second = nn.Conv2d(out, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.second(self.first(x))
        return y


class Concat(nn.Module):
    def __init__(self, width: int, out: int, kernel: int, exact: bool) -> None:
        super().__init__()
        self.left, self.right = Chain(width, out, kernel, exact), nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], dim=1)


class Chunk(nn.Module):
    def __init__(self, width: int, out: int, kernel: int, exact: bool) -> None:
        super().__init__()
        self.wide, self.narrow = Chain(width, 2 * out, kernel, exact), nn.Conv2d(out, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.wide(x).chunk(2, dim=1)
        y: Tensor = self.narrow(a) - b
        return y


class Depthwise(nn.Module):
    def __init__(self, width: int, out: int, kernel: int, exact: bool) -> None:
        super().__init__()
        self.wide = Chain(width, out, 1, exact)
        self.depthwise = nn.Conv2d(out, out, kernel, padding=kernel // 2, groups=out)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.depthwise(self.wide(x))
        return y


class Shared(nn.Module):
    def __init__(self, width: int, out: int, kernel: int, exact: bool) -> None:
        super().__init__()
        self.conv = Chain(width, width, kernel, exact)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.conv(x) + x)
        return y


BLOCKS = (Chain, Residual, Concat, Chunk, Depthwise, Shared)


@st.composite
def nets(draw: st.DrawFn, exact: bool) -> nn.Module:
    """One to three blocks and a head, narrow and untrained; `exact` leaves out all that rounds."""
    width = 4
    blocks: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        block = draw(st.sampled_from(BLOCKS))(
            width, draw(st.sampled_from(WIDTHS)), draw(st.sampled_from((1, 3))), exact
        )
        blocks.append(block.eval())
        width = nn.Sequential(*blocks)(IMAGE.float()).shape[1]
    return nn.Sequential(*blocks, nn.Conv2d(width, 4, 1)).double()


@st.composite
def groupings(draw: st.DrawFn, filters: int, channels: int) -> GroupedKernels:
    """Any valid grouping: partition or overlap, filters and channels in any order."""
    order = tuple(draw(st.permutations(range(filters))))
    common = [n for n in (2, 4) if filters % n == 0 and channels % n == 0]
    partition: bool = draw(st.booleans())
    if common and partition:
        groups = draw(st.sampled_from(common))
        shuffled, size = draw(st.permutations(range(channels))), channels // groups
        kept = [shuffled[g * size : (g + 1) * size] for g in range(groups)]
    else:
        groups = draw(st.sampled_from([n for n in (1, 2, 3, 4) if filters % n == 0]))
        size = draw(st.integers(1, channels))
        kept = [draw(st.permutations(range(channels)))[:size] for _ in range(groups)]
    return GroupedKernels(order, tuple(tuple(sorted(k)) for k in kept), channels, 0.5)


@st.composite
def planned(draw: st.DrawFn, exact: bool = False) -> tuple[nn.Module, PrunePlan]:
    """A net and a plan for some of its convolutions, at least one."""
    net = draw(nets(exact))
    dense = [(name, m) for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    chosen = draw(st.lists(st.sampled_from(dense), min_size=1, unique_by=lambda pair: pair[0]))
    return net, PrunePlan({name: draw(groupings(m.out_channels, m.in_channels)) for name, m in chosen})


@some
@given(planned(), st.integers(0, 1000))
def test_rewriting_keeps_the_function(case: tuple[nn.Module, PrunePlan], seed: int) -> None:
    net, plan = case
    masked = masked_by_hand(randomize(net, seed).eval(), plan)
    pruned = fxprune.rewrite(masked, plan, IMAGE)
    for name, kernels in plan.layers.items():
        conv = pruned.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        assert conv.groups == kernels.groups
    assert_same_function(pruned, copy.deepcopy(masked), (IMAGE,))


@some
@given(planned(exact=True), st.integers(0, 1000))
def test_integers_are_equal_bit_by_bit(case: tuple[nn.Module, PrunePlan], seed: int) -> None:
    net, plan = case
    masked = masked_by_hand(small_integers(net, seed).eval(), plan)
    integers = (2 * IMAGE).round()
    output = masked(integers)
    assume(not torch.equal(output[0], output[1]))  # zeros among the few weights may leave nothing to compare
    assert_bitwise_equal(fxprune.rewrite(masked, plan, integers), masked, (integers,))


@some
@given(planned(), st.integers(0, 1000))
def test_control_shifted_filters_are_seen(case: tuple[nn.Module, PrunePlan], seed: int) -> None:
    net, plan = case
    masked = masked_by_hand(randomize(net, seed).eval(), plan)
    pruned = fxprune.rewrite(masked, plan, IMAGE)
    name = next(iter(plan.layers))
    weight = pruned.get_parameter(f"{name}.weight")
    weight.data = weight.data.roll(1, 0)
    with pytest.raises(AssertionError, match=r"max .difference"):
        assert_same_function(pruned, masked, (IMAGE,), ("eval",))


@given(planned())
@examples(50, derandomize=True, database=None)
def test_the_drawn_plans_are_what_they_claim(case: tuple[nn.Module, PrunePlan]) -> None:
    net, plan = case
    plan.check(net)
    assert plan.layers
