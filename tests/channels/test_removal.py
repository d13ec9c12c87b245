"""Units of channels: on every net of the zoo as many as declared, and any choice of them can go."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
from equality import assert_bitwise_equal, outputs, small_integers
from products_harness import one_in
from removal_harness import (
    Subject,
    all_but_one,
    check_removal,
    drawn,
    half_of_each,
    prepared,
    spaces,
    subject,
    without,
    zeroed,
)
from zoo import CASES, Case

from fxprune.channels import removal
from fxprune.channels.units import STAYS, Chosen
from fxprune.errors import PlanError
from fxprune.graph.convolutions import convolutions
from fxprune.passes import remove_channels
from fxprune.plans.masking import remaining

HEAD = {"head": "model output"}


@dataclass(frozen=True)
class Expected:
    """What a net of the zoo can lose: its spaces with their numbers of units; which Conv2d lose nothing, and why."""

    spaces: str
    fixed: Mapping[str, str] = field(default_factory=lambda: HEAD)


# Derived once by what is tested here, and read through: each net that has no reason to keep its channels can lose them.
ZOO = {
    "Plain": Expected("stem 16, first 32, second 16"),
    "NoNorm": Expected("stem 16, first 32, second 16"),
    "NoBias": Expected("stem 16, first 32, second 16"),
    "Pointwise": Expected("stem 16, layers.0 64, layers.2 64, layers.4 16"),
    "StridedAndDilated": Expected("stem 16, strided 32, dilated 32, rectangular 16"),
    "PaddingModes": Expected("stem 16, reflect 16, circular 16, same 16"),
    "UnusedConv": Expected("stem 16, first 32, second 16"),
    "PrimeWidth": Expected("stem 16, first 17, second 16"),
    "GroupedConv": Expected(
        "stem 16, second 16",
        {
            **HEAD,
            "first": "middle is a grouped convolution, whose groups have a fixed size",
            "middle": "middle is a grouped convolution, whose groups have a fixed size",
        },
    ),
    "Depthwise": Expected("stem 16, first 32, second 16"),
    "DepthwiseMultiplier": Expected("stem 16, first 32, second 16"),
    "TransposedConv": Expected("stem 16, first 32, up 24, second 16"),
    "TransposedGroupedConv": Expected(
        "stem 16, second 16",
        {
            **HEAD,
            "first": "up is a grouped convolution, whose groups have a fixed size",
            "up": "up is a grouped convolution, whose groups have a fixed size",
        },
    ),
    "TransposedDepthwise": Expected("stem 16, first 32, second 16"),
    "WeightNorm": Expected(
        "stem 16, second 16",
        {
            **HEAD,
            "first": "normed has hooks or a parametrized weight",
            "normed": "normed has hooks or a parametrized weight",
        },
    ),
    "ConvSubclass": Expected(
        "stem 16, second 16",
        {**HEAD, "first": "no rule for zoo.StandardizedConv2d", "standardized": "no rule for zoo.StandardizedConv2d"},
    ),
    "FunctionalConv": Expected(
        "stem 16, second 16", {**HEAD, "first": "functional convolution, whose weight is computed or shared"}
    ),
    "Conv1dOverPixels": Expected("stem 16, first 32, line 32, second 16"),
    "OverSequences": Expected("stem 16, first 32, down 16, up 32"),
    "OverVolumes": Expected("stem 16, first 32, down 16, up 32"),
    "SharedConvTwoInputs": Expected("stem 16, shared 16"),
    "SharedConvInARow": Expected("stem 16"),
    "SharedConvTwoReaders": Expected("stem 16, shared 32, left 16"),
    "TiedWeights": Expected(
        "third 16",
        {
            **HEAD,
            "stem": "first shares a parameter with another module",
            "first": "first shares a parameter with another module",
            "second": "first shares a parameter with another module",
        },
    ),
    "SharedNorm": Expected("stem 16, left 32, last 16"),
    "SharedPReLU": Expected("stem 16, left 16, last 16"),
    "ModuleLoop": Expected("stem 16, convs.0 16, convs.1 16, convs.2 16, convs.3 16"),
    "ResidualAdd": Expected("stem 16, conv1 32"),
    "ResidualSharedConv": Expected("stem 16"),
    "ResidualChain": Expected(
        "stem 16, widen 32, "
        "blocks.0.0 16, blocks.1.0 16, blocks.2.0 16, blocks.3.0 16, blocks.4.0 16, blocks.5.0 16, "
        "blocks.6.0 16, blocks.7.0 16"
    ),
    "Downsample": Expected("stem 16, conv1 32, conv2 32, last 16"),
    "InPlaceAdd": Expected("stem 16, first 16"),
    "Arithmetic": Expected("stem 16, left 32, last 16"),
    "MaximumAndWhere": Expected("stem 16, left 32, last 16"),
    "Concat": Expected("stem 16, left 16, right 24, last 16"),
    "AddOfConcats": Expected("stem 16, a 16, b 8, b 24, last 16"),
    "ConcatWithRelu": Expected("stem 16, first 32, second 16"),
    "DenseBlock": Expected("stem 16, layers.0.2 16, layers.1.2 16, layers.2.2 16"),
    "UNet": Expected("stem 16, encode1 16, encode2 32, bottom 32, up 16, decode1 16, decode2 16"),
    "HighAndLowResolution": Expected("stem 16, high 16, low 32, mix 32"),
    "StackAndSum": Expected("stem 16, left 32, last 16"),
    "SelectiveKernel": Expected(
        "stem 16, last 16",
        {
            **HEAD,
            "left": "softmax (softmax) may compute from several channels at once",
            "right": "softmax (softmax) may compute from several channels at once",
        },
    ),
    "Chunk": Expected("stem 16, first 16, first 16, left 16, last 16"),
    "C2f": Expected("stem 16, enter 16, enter 16, chain.0 16, chain.1 16, leave 16"),
    "Slice": Expected("stem 16, first 8, first 24, second 16"),
    "SteppedSlice": Expected("stem 16, first 10, first 10, first 12, second 16"),
    "UnevenSplit": Expected("stem 16, first 8, first 24, inner 24, last 24"),
    "Unbind": Expected("stem 16, first 16, second 16"),
    "GatedHalves": Expected("stem 16, first 16, second 16"),
    "GatedLinearUnit": Expected("stem 16, first 16, second 16"),
    "HalvesRolledApart": Expected("stem 16, first 16, first 16, second 16"),
    "Res2NetChain": Expected("stem 16, enter 16, enter 16, enter 16, enter 8, steps.1 16, narrow 8, leave 16"),
    "ChannelShuffle": Expected("stem 16, first 32, second 16"),
    "ChannelShuffleModule": Expected("stem 16, first 32, second 16"),
    "ShuffledTwins": Expected("stem 16, first 5, first 27, second 16"),
    "ShuffleNetUnit": Expected("stem 16, widen 16, widen 16, expand 16, project 16"),
    "PixelShuffle": Expected("stem 16, first 16, second 16"),
    "PixelUnshuffle": Expected("stem 16, first 32, second 16"),
    "Focus": Expected("stem 16, last 16"),
    "ChannelPad": Expected("stem 16, conv2 8, conv2 8, conv1 32"),
    "ChannelPadBetween": Expected("stem 16, first 32, second 16"),
    "ChannelRoll": Expected("stem 16, first 15, first 2, second 16"),
    "ChannelRepeat": Expected("stem 16, second 16", {**HEAD, "first": "repeat repeats channels"}),
    "OwnIndex": Expected("stem 16, second 16", {**HEAD, "first": "no rule for torch.index_select"}),
    "Pools": Expected("stem 16, convs.0 16, convs.1 16, convs.2 16, convs.3 16"),
    "Interpolate": Expected("stem 16, convs.0 16, convs.1 16, convs.2 16"),
    "SpatialPad": Expected(
        "stem 16, second 16", {**HEAD, "first": "second reads it where zero has become another value"}
    ),
    "FlattenLinear": Expected("stem 16, last 32", {}),
    "ViewLinear": Expected("stem 16, last 32", {}),
    "PermuteFlattenLinear": Expected("stem 16, last 32", {}),
    "PooledLinear": Expected("stem 16, last 32", {}),
    "HiddenLinear": Expected("stem 16, last 32", {}),
    "PlainBatchNorms": Expected(
        "stem 16, second 16", {**HEAD, "first": "second reads it where zero has become another value"}
    ),
    "BatchNormWithoutStatistics": Expected("stem 16, first 32, second 16"),
    "PreActivation": Expected("stem 16, first 32, second 16"),
    "GroupNorm": Expected("stem 16, first 32, second 16"),
    "InstanceNorm": Expected("stem 16, first 32, second 16"),
    "PlainInstanceNorm": Expected("stem 16, first 32, second 16"),
    "SegNet": Expected("stem 16, first 32, second 16"),
    "MaxoutValues": Expected("stem 16, first 32, left 32, second 16"),
    "RecurrentFromZeros": Expected("stem 16, first 32, second 16"),
    "ConvNeXtBlock": Expected("stem 16, first 32, second 16"),
    "ChannelLayerNorm": Expected("stem 16, first 32, second 16"),
    "ImageLayerNorm": Expected(
        "stem 16, second 16", {**HEAD, "first": "norm (LayerNorm) may compute from several channels at once"}
    ),
    "LocalResponseNorm": Expected(
        "stem 16, second 16", {**HEAD, "first": "no rule for torch.nn.functional.local_response_norm"}
    ),
    "Normalize": Expected(
        "stem 16, second 16", {**HEAD, "first": "normalize (normalize) may compute from several channels at once"}
    ),
    "PReLU": Expected("stem 16, first 32, second 16"),
    "PReLUOneSlope": Expected("stem 16, first 32, second 16"),
    "LayerScale": Expected("stem 16, first 32"),
    "PositionEmbedding": Expected("stem 16, first 32, second 16"),
    "SharedScale": Expected("stem 16, left 16, last 16"),
    "ChannelBuffer": Expected("stem 16, first 32, second 16"),
    "Sigmoid": Expected("stem 16, second 16", {**HEAD, "first": "second reads it where zero has become another value"}),
    "Activations": Expected("stem 16, convs.0 16, convs.1 16, convs.2 16, convs.3 16"),
    "DropoutModules": Expected("stem 16, convs.0 16, convs.1 16, convs.2 16"),
    "FunctionalDropout": Expected("stem 16, first 32, second 16"),
    "FunctionalDropoutKeyword": Expected("stem 16, first 32, second 16"),
    "StochasticDepthBlock": Expected("stem 16, first 32"),
    "DropPathBlock": Expected(
        "first 32",
        {
            **HEAD,
            "stem": "drop (DropPath) may compute from several channels at once",
            "second": "drop (DropPath) may compute from several channels at once",
        },
    ),
    "InPlaceReluReadLater": Expected("stem 16, first 32, left 16"),
    "InPlaceFunctionalRelu": Expected("stem 16, first 32, second 16"),
    "InPlaceUnusedResult": Expected(
        "stem 16, second 16", {**HEAD, "first": "add_ changes zero in place, under other readers"}
    ),
    "SqueezeExcite": Expected("stem 16, first 32, squeeze 8, second 16"),
    "SqueezeExciteLinear": Expected("stem 16, first 32, second 16"),
    "SqueezeExciteWide": Expected("stem 16, first 64, squeeze 16, second 16"),
    "EfficientChannelAttention": Expected(
        "stem 16, second 16",
        {
            **HEAD,
            "first": "mul combines it with a value whose order is fixed",
            "over_channels": "mul combines it with a value whose order is fixed",
        },
    ),
    "SpatialAttention": Expected(
        "stem 16, second 16",
        {
            **HEAD,
            "first": "mean (mean) may compute from several channels at once",
            "gate": "one channel of each space stays",
        },
    ),
    "MaxOverChannels": Expected(
        "stem 16, second 16", {**HEAD, "first": "amax (amax) may compute from several channels at once"}
    ),
    "SoftmaxOverChannels": Expected(
        "stem 16, second 16", {**HEAD, "first": "softmax (softmax) may compute from several channels at once"}
    ),
    "GlobalResponseNorm": Expected(
        "stem 16, second 16", {**HEAD, "first": "mean (mean) may compute from several channels at once"}
    ),
    "InvertedResidual": Expected("stem 16, expand 64, last 16"),
    "CumulativeSum": Expected("stem 16, second 16", {**HEAD, "first": "no rule for torch.cumsum"}),
    "SortOverChannels": Expected("stem 16, second 16", {**HEAD, "first": "no rule for torch.sort"}),
    "MatmulAttention": Expected("stem 16, second 16", {**HEAD, "first": "no rule for _operator.matmul"}),
    "NonLocalBlock": Expected(
        "stem 16, second 16",
        {
            **HEAD,
            "first": "add combines it with a value whose order is fixed",
            "query": "no rule for torch.bmm",
            "key": "no rule for torch.bmm",
            "value": "no rule for torch.bmm",
        },
    ),
    "MultiHeadAttention": Expected(
        "stem 16, first 32, last 16", {**HEAD, "qkv": "no rule for torch._C._nn.scaled_dot_product_attention"}
    ),
    "Einsum": Expected("stem 16, second 16", {**HEAD, "first": "no rule for torch.functional.einsum"}),
    "OpaqueAttention": Expected(
        "stem 16, second 16", {**HEAD, "first": "no rule for torch.nn.modules.activation.MultiheadAttention"}
    ),
    "OpaqueRecurrence": Expected("stem 16, second 16", {**HEAD, "first": "no rule for torch.nn.modules.rnn.LSTM"}),
    "ConvFromInputToOutput": Expected("first 32", {"last": "model output"}),
    "SingleConv": Expected("", {"conv": "model output"}),
    "TwoInputs": Expected(
        "stem 16", {"first": "add combines it with a value whose order is fixed", "last": "model output"}
    ),
    "TupleOutput": Expected("stem 16", {**HEAD, "first": "model output", "second": "model output"}),
    "DictOutput": Expected("stem 16, first 32", {**HEAD, "second": "model output"}),
    "DefaultArgument": Expected("stem 16, first 32, second 16"),
}

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@cache
def found_in(name: str) -> Subject:
    case = next(case for case in CASES if case.name == name)
    return subject(prepared(case.build()), *case.inputs())


def choices(found: Subject) -> dict[str, Chosen]:
    """Ways to remove units, from even to as uneven as can be."""
    uneven = {f"all but one of a space, {seed}": lively(found, 10 * seed) for seed in range(3)}
    halves = {
        "first halves": half_of_each(found.units, last=False),
        "last halves": half_of_each(found.units, last=True),
    }
    return {f"half, {seed}": drawn(found.units, seed) for seed in range(3)} | halves | uneven


def lively(found: Subject, seed: int) -> Chosen:
    """All units of one space but one, such that the net still says something: the one may be dead behind a ReLU."""
    for attempt in range(seed, seed + 10):
        goes = all_but_one(found.units, attempt)
        left = outputs(zeroed(found.net, found.plan(goes)), found.inputs, "eval")
        if all(not torch.equal(output[0], output[1]) for output in left):
            return goes
    raise AssertionError("each of ten choices makes the net constant")


# --- the zoo --------------------------------------------------------------------------------------------------------


@each_case
def test_what_can_be_removed(case: Case) -> None:
    units = found_in(case.name).units
    assert Expected(spaces(units), dict(units.fixed)) == ZOO[case.name]
    convs = convolutions(found_in(case.name).traced.module).keys()
    assert convs == units.fixed.keys() | {
        name for name in convs & units.layers.keys() if (units.layers[name].writes != STAYS).any()
    }


@pytest.mark.parametrize("case", one_in(6, CASES, start=2))
def test_removed_is_zero(case: Case) -> None:
    found = found_in(case.name)
    if found.units.count:
        names = list(choices(found))
        check_removal(found, choices(found)[names[CASES.index(case) % len(names)]])


@pytest.mark.slow
@each_case
def test_removed_is_zero_however_it_is_chosen(case: Case) -> None:
    found = found_in(case.name)
    for choice in choices(found).values() if found.units.count else ():
        check_removal(found, choice)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.integer], ids=lambda case: case.name)
def test_removed_is_zero_bit_by_bit(case: Case) -> None:
    inputs = tuple((2 * x).round() for x in case.inputs())
    found = subject(small_integers(case.build().double()).eval(), *inputs)
    for seed in range(2) if found.units.count else ():
        plan = found.plan(drawn(found.units, seed))
        assert_bitwise_equal(without(found, plan), zeroed(found.net, plan), inputs)


# --- would a mistake be seen? ---------------------------------------------------------------------------------------


def test_control_a_shifted_index_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    found = found_in("Plain")
    goes = drawn(found.units, 0)
    check_removal(found, goes)
    monkeypatch.setattr(remove_channels, "remaining", lambda size, removed: (remaining(size, removed) + 1) % size)
    with pytest.raises(AssertionError, match="at max"):
        check_removal(found, goes)


@pytest.mark.parametrize("name", ["Sigmoid", "PlainBatchNorms", "SpatialPad", "ImageLayerNorm", "MaxOverChannels"])
def test_control_what_is_refused_would_change_the_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removal, "irremovable", lambda *_: {})
    monkeypatch.setattr(remove_channels, "irremovable", lambda *_: {})
    case = next(case for case in CASES if case.name == name)
    found = subject(prepared(case.build()), *case.inputs())
    with pytest.raises((AssertionError, RuntimeError)):
        check_removal(found, drawn(found.units, 0))


def test_control_a_space_that_is_not_split_can_lose_all_that_a_layer_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.name == "Chunk")
    for last in (False, True):
        check_removal(found_in("Chunk"), half_of_each(found_in("Chunk").units, last=last))
    monkeypatch.setattr(removal, "_split", lambda analysis, spaces: spaces)
    found = subject(prepared(case.build()), *case.inputs())
    assert spaces(found.units) == "stem 16, first 32, left 16, last 16"
    with pytest.raises(PlanError, match="left: the plan removes all 16 inputs; keep at least one"):
        found.plan(half_of_each(found.units, last=False)).check(found.net)
