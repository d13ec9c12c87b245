"""GroupConvs: gather, grouped convolution, inverse gather."""

import pytest
import torch
import torch.nn.functional as F
from equality import masked_by_hand
from passes_harness import SHUFFLE, check_pass, image, prepared
from torch import Tensor, nn

from fxprune.errors import PassError
from fxprune.graph.layers import ChannelGather
from fxprune.graph.tracing import trace
from fxprune.passes import GroupConvs, group_convs
from fxprune.plans import GroupedKernels, PrunePlan

IN_ORDER = (0, 1, 2, 3)
PARTITION = ((1, 3), (0, 2))
OVERLAP = ((0, 1), (1, 3))


class Net(nn.Module):
    def __init__(self, conv: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = conv or nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.conv(x).relu())
        return y


class ByKeyword(Net):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(input=x)
        return y


class WeightReadByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x) + F.conv2d(x, self.conv.weight, padding=1)
        return y


def plan(order: tuple[int, ...] = SHUFFLE, kept: tuple[tuple[int, ...], ...] = PARTITION) -> PrunePlan:
    return PrunePlan({"conv": GroupedKernels(order, kept, in_channels=4, asked_ratio=0.5)})


def masked(net: nn.Module, plan: PrunePlan) -> nn.Module:
    return masked_by_hand(prepared(net), plan)


@pytest.mark.parametrize("kept", [PARTITION, OVERLAP], ids=["partition", "overlap"])
def test_case_1_gather_convolution_inverse_gather(kept: tuple[tuple[int, ...], ...]) -> None:
    net = masked(Net(), plan(kept=kept))
    gm, outcome = check_pass(
        GroupConvs(plan(kept=kept)),
        net,
        image(),
        before="x -> conv -> output",
        after="x -> conv_in -> conv -> conv_out -> output",
        repeatable=False,
    )
    assert outcome.rewritten == ("conv",)
    assert gm.get_buffer("conv_in.index").tolist() == [c for channels in kept for c in channels]
    dense, grouped = net.get_parameter("conv.weight"), gm.get_submodule("conv")
    assert isinstance(grouped, nn.Conv2d)
    assert (grouped.groups, grouped.in_channels, grouped.out_channels) == (2, 4, 4)
    for row, filter_ in enumerate(SHUFFLE):
        for column in range(2):
            assert torch.equal(grouped.weight[row, column], dense[filter_, kept[row // 2][column]])


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.Conv2d(4, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, 3, dilation=2, padding=2),
        nn.Conv2d(4, 4, (1, 3), stride=(1, 2), padding=(0, 1)),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    ],
    ids=str,
)
def test_case_1_keeps_the_geometry(conv: nn.Conv2d) -> None:
    net = masked(Net(conv), plan())
    gm, _ = check_pass(
        GroupConvs(plan()), net, image(), after="x -> conv_in -> conv -> conv_out -> output", repeatable=False
    )
    grouped = gm.get_submodule("conv")
    assert isinstance(grouped, nn.Conv2d)
    for attribute in ("kernel_size", "stride", "padding", "dilation", "padding_mode"):
        assert getattr(grouped, attribute) == getattr(conv, attribute)
    assert (grouped.bias is None) == (conv.bias is None)


def test_case_1_one_group_drops_channels() -> None:
    one = plan(kept=((1, 3),))
    gm, _ = check_pass(
        GroupConvs(one),
        masked(Net(), one),
        image(),
        after="x -> conv_in -> conv -> conv_out -> output",
        repeatable=False,
    )
    assert gm.get_parameter("conv.weight").shape == (4, 2, 3, 3)


def test_case_1_shared_module_stays_shared() -> None:
    gm, outcome = check_pass(
        GroupConvs(plan()),
        masked(Twice(), plan()),
        image(),
        after="x -> conv_in -> conv -> conv_out -> relu -> conv_in_2 -> conv_1 -> conv_out_2 -> output",
        repeatable=False,
    )
    assert outcome.rewritten == ("conv", "conv_1")
    assert sum(isinstance(module, nn.Conv2d) for module in gm.modules()) == 1
    assert sum(isinstance(module, ChannelGather) for module in gm.modules()) == 4


def test_case_1_input_by_keyword() -> None:
    check_pass(
        GroupConvs(plan()),
        masked(ByKeyword(), plan()),
        image(),
        after="x -> conv_in -> conv -> conv_out -> output",
        repeatable=False,
    )


@pytest.mark.parametrize(
    "order, kept, after",
    [
        (IN_ORDER, ((0, 1), (2, 3)), "x -> conv -> output"),
        (SHUFFLE, ((0, 1), (2, 3)), "x -> conv -> conv_out -> output"),
        (IN_ORDER, PARTITION, "x -> conv_in -> conv -> output"),
        (IN_ORDER, ((0, 1), (0, 1)), "x -> conv_in -> conv -> output"),
    ],
)
def test_case_2_identities_are_not_inserted(
    order: tuple[int, ...], kept: tuple[tuple[int, ...], ...], after: str
) -> None:
    some = plan(order, kept)
    check_pass(GroupConvs(some), masked(Net(), some), image(), after=after, repeatable=False)


def test_other_convolutions_are_left_alone() -> None:
    net = masked(Net(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))), PrunePlan({}))
    gm, outcome = check_pass(GroupConvs(PrunePlan({})), net, image(), after="x -> conv_0 -> conv_1 -> output")
    assert outcome.rewritten == ()
    assert gm.get_submodule("conv.0").groups == 1


def test_frozen_parameters_stay_frozen() -> None:
    net = masked(Net(), plan()).requires_grad_(False)
    gm = trace(net, image()).module
    GroupConvs(plan())(gm)
    assert not gm.get_parameter("conv.weight").requires_grad
    assert not gm.get_parameter("conv.bias").requires_grad


def test_dropped_kernels_must_be_zero() -> None:
    gm = trace(prepared(Net()), image()).module
    with pytest.raises(PassError, match=r"conv: 8 kernels that the plan drops are not zero; .*fxprune\.mask"):
        GroupConvs(plan())(gm)


def test_a_convolution_that_is_not_called_is_refused() -> None:
    elsewhere = PrunePlan({"other": plan().layers["conv"]})
    with pytest.raises(PassError, match=r"other: .*never calls it"):
        GroupConvs(elsewhere)(trace(masked(Net(), plan()), image()).module)


def test_a_weight_that_the_graph_reads_by_name_is_refused() -> None:
    gm = trace(masked(WeightReadByName(), plan()), image()).module
    with pytest.raises(PassError, match=r"conv: its parameters are also read by conv_weight, .*ignore=\('conv',\)"):
        GroupConvs(plan())(gm)


@pytest.mark.parametrize("which", ["gather_before", "gather_after"])
def test_control_a_wrong_index_is_seen(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    right = getattr(group_convs, which)

    def wrong(gm: object, node: object, gather: ChannelGather) -> None:
        right(gm, node, ChannelGather(gather.index.roll(1), gather.in_channels))

    monkeypatch.setattr(group_convs, which, wrong)
    with pytest.raises(AssertionError, match=r"max .difference"):
        check_pass(
            GroupConvs(plan()),
            masked(Net(), plan()),
            image(),
            after="x -> conv_in -> conv -> conv_out -> output",
            repeatable=False,
        )


def test_control_another_graph_is_seen() -> None:
    with pytest.raises(AssertionError):
        check_pass(GroupConvs(plan()), masked(Net(), plan()), image(), after="x -> conv -> output", repeatable=False)
