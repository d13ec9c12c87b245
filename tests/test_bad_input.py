"""Whatever is wrong with a model or an argument: a clear error that changes nothing, or correct behaviour."""
# nn.Module.__call__ is typed to return Any, and some functions of torch not at all.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equality import assert_same_function, masked_by_hand, randomize
from products_harness import in_turns
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import fxprune
from fxprune.criteria.variety import Variety
from fxprune.errors import CalibrationError, FxpruneError, NothingRewrittenWarning, PassError, PlanError, TraceError
from fxprune.vocabulary import FormChoice


class Net(nn.Module):
    """Stem 3 -> 16, two eligible convolutions with a BatchNorm between, linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv1 = nn.Conv2d(16, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 16, 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(self.norm(self.conv1(self.stem(x))).relu()).mean((2, 3)))


def image(dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


def net(training: bool = False) -> Net:
    model = Net()
    randomize(model)
    return model.train(training)


def grouped(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1]


def refuse(model: nn.Module, error: type[FxpruneError], match: str, **options: Any) -> None:
    """See that `compile` raises, with this message, and leaves the model as it was."""
    before = {name: (id(t), t.detach().clone()) for name, t in tensors(model) if not t.is_meta}
    modes = [m.training for m in model.modules()]
    attributes = [sorted(vars(m)) for m in model.modules()]
    with pytest.raises(error, match=match):
        fxprune.compile(model, **options)
    for name, tensor in tensors(model):
        if name in before:
            assert id(tensor) == before[name][0], name
            assert torch.equal(tensor.nan_to_num(), before[name][1].nan_to_num()), name
    assert [m.training for m in model.modules()] == modes
    assert [sorted(vars(m)) for m in model.modules()] == attributes


def tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return [(name, t) for name, t in named if not nn.parameter.is_lazy(t)]


# --- arguments ------------------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "ratio of one": ({"ratio": 1.0}, r"ratio 1\.0 is not in \[0, 1\)"),
    "ratio above one": ({"ratio": 50}, r"ratio 50 is not in \[0, 1\)"),
    "negative ratio": ({"ratio": -0.1}, r"ratio -0\.1 is not in \[0, 1\)"),
    "NaN ratio": ({"ratio": float("nan")}, r"ratio nan is not in \[0, 1\)"),
    "ratio in words": ({"ratio": "half"}, "ratio is 'half'; it must be a number"),
    "ratio of a layer": ({"ratio": {"conv1": 2}}, r"conv1: ratio 2 is not in \[0, 1\)"),
    "groups that do not divide": (
        {"groups": {"*": 3}},
        r"conv1: 32 filters do not divide into 3 groups; use a divisor of 32",
    ),
    "no groups": ({"groups": 0}, "groups is 0; it must be a positive integer"),
    "groups in words": ({"groups": "many"}, "groups is 'many'"),
    "unknown method": ({"method": "cocluste"}, r"method is 'cocluste' \(near: 'cocluster'\)"),
    "unknown criterion": ({"criterion": "l3"}, r"criterion is 'l3' \(near: 'l[12]'.*must be one of 'l1', 'l2'"),
    "unknown form": ({"form": "partitions"}, r"form is 'partitions' \(near: 'partition'\).*'overlap'"),
    "ratio without a partition": ({"ratio": 0.6, "form": "partition"}, r"0\.6 has no partition form.*use 0\.5 or"),
    "groups against the ratio": ({"groups": 4, "form": "partition"}, "groups=4 contradicts ratio 0.5"),
    "ignore matches nothing": ({"ignore": "conv3"}, r"ignore: pattern 'conv3' matches no convolution.*near: 'conv"),
    "ratio matches nothing": ({"ratio": {"layer1": 0.5}}, "ratio: pattern 'layer1' matches no convolution"),
    "groups match nothing": ({"groups": {"head": 2}}, "groups: pattern 'head' matches no convolution"),
    "negative seed": ({"seed": -1}, "seed is -1"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_that_makes_no_sense(name: str) -> None:
    options, match = ARGUMENTS[name]
    refuse(net(), PlanError, match, example_inputs=image(), **options)


BOTH: dict[str, Any] = {"granularity": {"filter": 0.25, "kernel": 0.5}}

FILTERS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown granularity": ({"granularity": "filters"}, r"granularity is 'filters' \(near: 'filter'\); it must be"),
    "one granularity mapped": ({"granularity": {"filter": 0.5}}, r"names \['filter'\] only; give both ratios, or"),
    "an unknown one mapped": ({"granularity": {"filter": 0.5, "row": 0.5}}, "granularity is 'row'.*must be 'kernel'"),
    "a ratio too many": (BOTH | {"ratio": 0.5}, "granularity has a ratio for each already; leave ratio"),
    "a budget for both": (BOTH | {"macs": 0.5}, "granularity has a ratio for each already; leave .*macs out"),
    "snapshots for both": (BOTH | {"snapshots": [{}]}, "snapshots do not fit the network that removed filters leave"),
    "a ratio of all filters for both": (
        {"granularity": {"filter": 1.0, "kernel": 0.5}},
        r"ratio 1\.0 is not in \[0, 1\)",
    ),
    "scope of kernels": ({"scope": "global"}, "scope='global' is for granularity='filter'; leave it out for kernels"),
    "rounding of kernels": ({"round_to": 8}, "round_to=8 is for granularity='filter'"),
    "groups of filters": ({"groups": 4}, "groups=4 is for granularity='kernel'; leave it out for filters"),
    "a form of filters": ({"form": "overlap"}, "form='overlap' is for granularity='kernel'"),
    "a method for filters": ({"method": "srgkp"}, "method='srgkp' is for granularity='kernel'"),
    "blocks of filters": ({"block": 8}, "block=8 is for granularity='kernel'"),
    "shared groups of filters": ({"share_groups": True}, "share_groups=True is for granularity='kernel'"),
    "latency of filters on nothing": ({"latency": 0.5}, r"latency=0\.5 needs the device to be fast on"),
    "latency in no runtime": ({"latency": 0.5, "runtime": "inductor"}, "runtime='inductor': it compiles whole graphs"),
    "unknown scope": ({"scope": "globe"}, "scope is 'globe'; it must be 'local' or 'global'"),
    "no rounding": ({"round_to": 0}, "round_to is 0; it must be an integer, 1 or more"),
    "half rounding": ({"round_to": 2.5}, r"round_to is 2\.5; it must be an integer"),
    "all filters": ({"ratio": 1.0}, r"ratio 1\.0 is not in \[0, 1\)"),
    "ratio and budget": ({"ratio": 0.5, "macs": 0.5}, r"ratio=0\.5 is what each layer loses, and macs=0\.5"),
    "budget above one": ({"macs": 1.5}, r"macs.*1\.5.*\(0, 1\]"),
    "budget out of reach": (
        {"macs": 0.001},
        r"macs=0\.001 cannot be reached by removing filters: .* remains; ask for more",
    ),
    "parameters out of reach": ({"params": 0.001}, r"params=0\.001 cannot be reached by removing filters"),
    "a global ratio out of reach": ({"ratio": 0.99, "scope": "global"}, r"ratio=0\.99 cannot .*the largest ratio is"),
    "ratios in a global ranking": (
        {"ratio": {"*": 0.5}, "scope": "global"},
        "scope='global' ranks all layers together",
    ),
    "a pattern that matches nothing": ({"ratio": {"layer1": 0.5}}, "ratio: pattern 'layer1' matches no convolution"),
    "ignore that matches nothing": ({"ignore": "conv3"}, "ignore: pattern 'conv3' matches no convolution"),
    "movement without snapshots": ({"criterion": "movement"}, "criterion 'movement' .*snapshots"),
    "activation without data": ({"criterion": "activation"}, "criterion 'activation' .*calibration"),
    "unknown variety": ({"variety": "pair"}, "variety is 'pair'.*'pairs'"),
    "similarity of other outputs": (
        {"variety": Variety("pairs", similarity="functional"), "calibration": image(batch=8)},
        "similarity 'functional' is for kernels.*use similarity='cosine'",
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_an_argument_that_makes_no_sense_for_what_is_removed(name: str) -> None:
    options, match = FILTERS[name]
    kernels = name in ("scope of kernels", "rounding of kernels")
    refuse(net(), PlanError, match, example_inputs=image(), **({} if kernels else {"granularity": "filter"}) | options)


def test_filters_of_a_model_whose_size_cannot_be_guessed() -> None:
    class OddSize(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(-1, 3, 5, 7, 11)[:, :, 0])

    refuse(OddSize(), PlanError, "no usual input size fits it; pass example_inputs", granularity="filter")
    x = torch.randn(2, 3, 5, 7, 11)
    assert fxprune.report(fxprune.compile(OddSize(), granularity="filter", example_inputs=x)).rewritten == 3


def test_filters_of_a_model_without_convolutions() -> None:
    refuse(WithoutConvs(), PlanError, "has no convolution", example_inputs=image(), granularity="filter")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_filters_that_are_not_finite(value: float) -> None:
    model = net()
    model.conv1.weight.data[0, 0, 0, 0] = value
    refuse(model, PlanError, "conv1: 1 of 4608 weights are NaN", example_inputs=image(), granularity="filter")


def test_a_model_of_which_no_filter_can_go() -> None:
    with pytest.warns(NothingRewrittenWarning, match="conv: model output"):
        pruned = fxprune.compile(Alone(), granularity="filter", example_inputs=image())
    assert [layer.reason for layer in fxprune.report(pruned).layers] == ["model output"]


class Alone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def filter_plan() -> fxprune.PrunePlan:
    return fxprune.make_plan(net(), granularity="filter", example_inputs=image())


@pytest.mark.parametrize("use", [fxprune.mask, fxprune.rewrite])
def test_a_plan_of_filters_for_another_model(use: Callable[..., Any]) -> None:
    plan = filter_plan()
    with pytest.raises(PlanError, match=r"conv1: Renamed has nothing of this name.*make a plan for this model"):
        use(Renamed(), plan)
    thin = net()
    thin.conv1 = nn.Conv2d(16, 8, 3, padding=1)
    with pytest.raises(PlanError, match=r"conv1: the plan removes output \d+, but there are 8; make a plan"):
        use(thin, plan)


@pytest.mark.parametrize("entry", ["conv1.weight", "conv1.bias", "norm.weight", "norm.bias"])
def test_zeros_of_filters_that_were_broken(entry: str) -> None:
    plan = filter_plan()
    masked = fxprune.mask(net(), plan)
    fxprune.rewrite(masked, plan, image())
    with torch.no_grad():
        masked.get_parameter(entry)[plan.removed[entry.partition(".")[0]].outputs[0]] = 1e-30
    with pytest.raises(
        PassError, match=f"{entry}: .* of channels that the plan removes are not zero; rewrite the model"
    ):
        fxprune.rewrite(masked, plan, image())


@pytest.mark.parametrize(
    "name, change, match",
    [
        ("norm", {"outputs": ()}, r"norm: channel \d+ of its outputs goes together with others"),
        ("conv2", {"inputs": (0, 1)}, "conv[12]: channel .* goes together with others.*make the plan with"),
        ("head", {"outputs": (0,)}, "cannot go: .*model output.*make the plan anew"),
        ("conv1", {"outputs": tuple(range(32))}, "conv1: the plan removes all 32 outputs; keep at least one"),
    ],
)
def test_a_plan_of_filters_that_contradicts_itself(name: str, change: dict[str, Any], match: str) -> None:
    plan = filter_plan()
    removed = dict(plan.removed) | {name: dataclasses.replace(plan.removed[name], **change)}
    wrong = dataclasses.replace(plan, removed=removed)
    with pytest.raises((PassError, PlanError), match=match):
        fxprune.rewrite(fxprune.mask(net(), wrong), wrong, image())


def test_a_plan_after_that_of_another_model() -> None:
    thin = net()
    thin.conv1, thin.norm, thin.conv2 = nn.Conv2d(16, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 1)
    with pytest.raises(PlanError, match=r": the plan removes (in|out)put \d+, but there are 8; make a plan"):
        fxprune.make_plan(thin, granularity="filter", example_inputs=image(), after=filter_plan())
    with pytest.raises(PlanError, match="after=a PrunePlan is for granularity='filter'"):
        fxprune.make_plan(net(), example_inputs=image(), after=filter_plan())


def test_arguments_that_do_make_sense_are_taken() -> None:
    options: dict[str, Any] = {
        "ratio": {"conv*": 0.5},
        "groups": 2,
        "form": "overlap",
        "criterion": "l1",
        "ignore": "conv2",
        "seed": 3,
    }
    assert grouped(fxprune.compile(net(), example_inputs=image(), **options)) == ["conv1"]


def test_verification_needs_inputs() -> None:
    refuse(net(), FxpruneError, "verify=True needs example_inputs", verify=True)


def test_a_refused_model_that_changed_would_be_seen() -> None:
    class Careless(Net):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("not called")

    model = Careless()

    def spoil(*args: Any, **options: Any) -> None:
        model.touched = True  # type: ignore[assignment]  # what a careless tracer does
        raise PlanError("spoiled")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fxprune, "compile", spoil)
        with pytest.raises(AssertionError):
            refuse(model, PlanError, "spoiled")


# --- example inputs -------------------------------------------------------------------------------------------------


def unbatched() -> nn.Sequential:
    """Runs on one image without its batch, as convolutions do."""
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()


def strict() -> nn.Sequential:
    """Does not."""
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()


@pytest.mark.parametrize(
    "use",
    [
        lambda model, x: fxprune.compile(model, 0.5, example_inputs=x),
        lambda model, x: fxprune.compile(model, 0.5, example_inputs=x, output="module"),
        lambda model, x: fxprune.compile(model, 0.5, example_inputs=x, granularity="filter"),
        fxprune.analyze,
        fxprune.accelerate,
        lambda model, x: fxprune.verify(model, model, x),
    ],
)
def test_an_image_without_its_batch(use: Callable[..., Any]) -> None:
    with pytest.raises(TraceError, match=r"shape \(3, 12, 12\), .* forget the batch dimension\? Pass x.unsqueeze\(0\)"):
        use(strict(), torch.randn(3, 12, 12))


@pytest.mark.parametrize("granularity", ["kernel", "filter"])
@pytest.mark.filterwarnings("ignore::fxprune.NothingRewrittenWarning")
def test_control_what_runs_on_one_image_gets_in(granularity: Any) -> None:
    """Its channels keep their order, and its MACs are those of one image."""
    model, x = unbatched(), torch.randn(3, 12, 12)
    pruned = fxprune.compile(model, 0.5, example_inputs=x, granularity=granularity)
    report, batched = (fxprune.report(fxprune.compile(model, 0.5, example_inputs=i)) for i in (x, x[None]))
    assert pruned(x).shape == (16, 8, 8)
    assert (report.macs_dense, report.macs_pruned) == (batched.macs_dense, batched.macs_pruned)


class Spectrogram(nn.Module):
    """Takes `(N, H, W)` and adds the channels itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x.unsqueeze(1))
        return y


def test_control_three_axes_may_be_a_batch() -> None:
    """With as many channels as images, even; and one that does not run is told what it says itself."""
    model, x = Spectrogram().eval(), torch.randn(1, 12, 12)
    assert fxprune.compile(model, 0.5, example_inputs=x)(x).shape == (1, 16, 8, 8)
    with pytest.raises(TraceError, match="does not run on example inputs of shape") as caught:
        fxprune.compile(strict(), 0.5, example_inputs=torch.randn(5, 12, 12))
    assert "batch dimension" not in str(caught.value), "with a batch it does not run either"


def test_example_inputs_that_do_not_run() -> None:
    refuse(
        net(), TraceError, r"does not run on example inputs of shape \(2, 4, 8, 8\)", example_inputs=image()[:, [0] * 4]
    )
    refuse(net(), TraceError, r"forward needs x, but example_inputs has 0 values", example_inputs=())
    refuse(
        net(), TraceError, r"takes 1 positional arguments, but example_inputs has 2", example_inputs=(image(), image())
    )


def test_example_inputs_of_another_type() -> None:
    refuse(net(), TraceError, "does not run on example inputs", example_inputs=image().long())


def test_example_inputs_of_one_sample_and_without_variation() -> None:
    pruned = fxprune.compile(net(), example_inputs=torch.zeros(1, 3, 8, 8))
    assert grouped(pruned) == ["conv1", "conv2"]


# --- models ---------------------------------------------------------------------------------------------------------


class WithoutConvs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))


def test_a_model_without_convolutions() -> None:
    refuse(WithoutConvs(), PlanError, "WithoutConvs has no convolution", example_inputs=image())


def test_a_single_convolution() -> None:
    refuse(
        nn.Conv2d(16, 16, 1),
        PlanError,
        r"wrap it: torch\.nn\.Sequential\(conv\)",
        example_inputs=torch.ones(2, 16, 4, 4),
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    model = net()
    model.conv1.weight.data[0, 0, 0, 0] = value
    refuse(
        model, PlanError, r"conv1: 1 of 4608 weights are NaN or infinite.*ignore=\('conv1',\)", example_inputs=image()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert grouped(fxprune.compile(model, ignore="conv1")) == ["conv2"]


def test_a_quantized_module() -> None:
    class Quantized(Net):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = torch.ao.nn.quantized.Conv2d(16, 32, 3, padding=1)  # type: ignore[assignment]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of torch.ao.quantization
        model = Quantized()
        assert type(model.conv1).__module__.startswith("torch.ao.nn.quantized")
        with pytest.raises(PlanError, match="conv1: Conv2d is quantized"):
            fxprune.compile(model, example_inputs=image())


def test_a_parametrized_weight_stays_dense() -> None:
    model = net()
    model.conv1 = weight_norm(model.conv1)
    pruned = fxprune.compile(model, example_inputs=image())
    reasons = {layer.name: layer.reason for layer in fxprune.report(pruned).layers}
    assert "parametrized" in reasons["conv1"]
    assert "bake=True" in reasons["conv1"]
    assert grouped(pruned) == ["conv2"]
    assert_same_function(pruned.double(), masked_by_hand(model, fxprune.make_plan(model)).double(), (image().double(),))


def test_a_weight_norm_hook_of_old() -> None:
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated since torch 2.0, and still in many models
        nn.utils.weight_norm(model.conv1)
    x = image()
    expected = model.eval()(x).detach()  # the hook stores a computed weight, which deepcopy refuses
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    pruned = fxprune.compile(model, example_inputs=x)
    assert "has forward hooks" in next(layer.reason for layer in fxprune.report(pruned).layers if layer.name == "conv1")
    torch.testing.assert_close(model(x).detach(), expected)


def test_lazy_modules() -> None:
    class Lazy(Net):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.LazyConv2d(32, 3, padding=1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy modules warn that they are new
        model = Lazy()
    refuse(model, FxpruneError, "conv1: LazyConv2d is not initialized yet", example_inputs=image())
    model(image())
    assert grouped(fxprune.compile(model.eval(), example_inputs=image())) == ["conv1", "conv2"]


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Net()
    refuse(model, PlanError, "conv1: the weight is on the meta device", example_inputs=image())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("form", ["partition", "overlap"])
def test_other_floating_types(dtype: torch.dtype, form: FormChoice) -> None:
    model = net().to(dtype)
    plan = fxprune.make_plan(model, form=form)
    pruned = fxprune.compile(model, example_inputs=image(dtype), form=form)
    assert grouped(pruned) == ["conv1", "conv2"]
    assert {p.dtype for p in pruned.parameters()} == {dtype}
    assert pruned(image(dtype)).dtype == dtype
    assert_same_function(pruned.double(), masked_by_hand(model, plan).double(), (image().double(),))


def test_a_type_of_its_own_for_the_norm() -> None:
    model = net().to(torch.bfloat16)
    model.norm.float()
    pruned = fxprune.compile(model, example_inputs=image(torch.bfloat16))
    assert pruned.get_parameter("norm.weight").dtype == torch.float32
    assert pruned.get_parameter("conv1.weight").dtype == torch.bfloat16


# --- calibration data -----------------------------------------------------------------------------------------------


def other_channels(x: Tensor) -> Tensor:
    return x[:, [0, 1]]


CALIBRATIONS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "no batch": (lambda x: [], "calibration holds no batch; pass at least one"),
    "a used iterator": (lambda x: iter(()), r"holds no batch.*an iterator can be read only once"),
    "no image": (lambda x: x[:0], r"batch 0 is empty: its shape is \(0, 3, 8, 8\)"),
    "no image in a later batch": (lambda x: [x, x[:0]], "batch 1 is empty"),
    "text": (lambda x: "images", "calibration is a str; it must be a tensor or an iterable of batches"),
    "a number": (lambda x: 3, "calibration is a int; it must be"),
    "a dict": (lambda x: {"x": x}, "calibration is a dict; it must be"),
    "a batch of None": (lambda x: [None], "batch 0 is a NoneType; it must be a tensor, or a tuple"),
    "a batch as dict": (lambda x: [{"scan": x}], "batch 0 has 'scan', but forward takes 'x'; rename the entry"),
    "an array": (lambda x: x.numpy(), "batch 0 is a ndarray; it must be a tensor"),
    "one dimension": (lambda x: x.flatten(), r"a tensor of shape \(1536,\); the first dimension must count samples"),
    "one image without batch": (
        lambda x: x[0],
        r"batch 0 does not fit the model: there is no batch dimension in shape \(3, 8, 8\)",
    ),
    "other channels": (lambda x: other_channels(x), r"batch 0 does not fit the model: .*shape \(8, 2, 8, 8\)"),
    "other channels later": (
        lambda x: [x, other_channels(x)],
        r"batch 1 does not fit the model: .*shape \(8, 2, 8, 8\)",
    ),
    "labels first": (lambda x: [(torch.arange(8), x)], "batch 0 does not fit the model"),
    "another type": (lambda x: x.double(), "batch 0 does not fit the model: it is of float64"),
    "bytes": (lambda x: x.byte(), "batch 0 does not fit the model: it is of uint8"),
    "NaN": (lambda x: torch.where(x > 2, torch.nan, x), "batch 0 holds NaN or infinity; drop or repair"),
    "infinity later": (lambda x: [x, x / 0], "batch 1 holds NaN or infinity"),
    "out of scale": (lambda x: x * 1e30, r"conv1: .* reads values beyond 1e\+17.*check the scale"),
}


@pytest.mark.parametrize("name, macs", in_turns(CALIBRATIONS, (None, 0.7)))
def test_calibration_data_that_make_no_sense(name: str, macs: float | None) -> None:
    budget = {} if macs is None else {"macs": macs}
    make, match = CALIBRATIONS[name]
    refuse(net(), CalibrationError, match, calibration=make(image(batch=8)), **budget)
    if not budget:
        with pytest.raises(CalibrationError, match=match):
            fxprune.mask(net(), fxprune.make_plan(net()), make(image(batch=8)))


POOR: dict[str, Callable[[Tensor], Any]] = {
    "one image": lambda x: x[:1],
    "one pixel": lambda x: x[:1, :, :1, :1],
    "batches of 1 and 7": lambda x: [x[:1], x[1:]],
    "two sizes": lambda x: [x, x[:, :, :5, 2:]],
    "zeros": torch.zeros_like,
    "one image eight times": lambda x: x[:1].expand(8, -1, -1, -1),
    "labels": lambda x: [(x, None, "label")],
}


@pytest.mark.parametrize("name, form", in_turns(POOR, ("partition", "overlap")))
def test_poor_calibration_data_are_taken(name: str, form: FormChoice) -> None:
    model, data = net(), POOR[name](image(batch=8))
    pruned = fxprune.compile(model, calibration=data, form=form, verify=True, example_inputs=image())
    assert grouped(pruned) == ["conv1", "conv2"]
    assert_sound(pruned, model)
    for layer in fxprune.measure_sensitivity(model, calibration=data).layers:
        assert layer.damage[-1] == 0


def assert_sound(pruned: nn.Module, model: nn.Module) -> None:
    """No weight has grown out of bounds."""
    for name in ("conv1", "conv2"):
        ours, theirs = pruned.get_parameter(f"{name}.weight"), model.get_parameter(f"{name}.weight")
        assert torch.isfinite(ours).all()
        assert ours.abs().max() < 10 * theirs.abs().max()


def test_an_argument_that_the_batches_lack() -> None:
    class TwoInputs(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]  # a net of its own
            return super().forward(x + y)

    refuse(TwoInputs(), CalibrationError, "batch 0 has 1 entries, but forward takes 2", calibration=image())
    pair = (image(), image())
    assert grouped(fxprune.compile(TwoInputs(), calibration=[pair])) == ["conv1", "conv2"]


def test_arguments_that_are_no_batches() -> None:
    class Scaled(Net):
        def forward(self, x: Tensor, offset: Tensor, factor: Tensor) -> Tensor:  # type: ignore[override]  # see above
            return super().forward((x + offset) * factor)

    batch = (image(), torch.randn(3, 8, 8), torch.tensor(2.0))
    assert grouped(fxprune.compile(Scaled(), calibration=[batch])) == ["conv1", "conv2"]


@pytest.mark.parametrize("budget", [{}, {"macs": 0.7}], ids=["ratio", "macs"])
@pytest.mark.parametrize("where, layer", [("before conv1", "conv1"), ("before conv2", "conv2")])
def test_a_model_that_makes_nan(where: str, layer: str, budget: dict[str, Any]) -> None:
    class MakesNaN(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = self.conv1(x.log() if where == "before conv1" else x)
            x = self.conv2(x.sqrt() if where == "before conv2" else self.norm(x))
            return self.head(x.mean((2, 3)))

    model = randomize(MakesNaN())
    refuse(model, CalibrationError, f"{layer}: .* reads NaN or infinity", calibration=image(), **budget)


def test_a_norm_that_makes_nan() -> None:
    model = net()
    assert model.norm.running_var is not None
    model.norm.running_var[3] = float("nan")
    refuse(model, CalibrationError, "conv2: .* reads NaN or infinity", calibration=image())


# --- layers without information -------------------------------------------------------------------------------------


class Repeated(Net):
    """conv1 reads each channel twice: its Gram matrix is singular."""

    def features(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :8]] * 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(self.stem(x))
        return self.head(self.conv2(self.norm(self.conv1(x)).relu()).mean((2, 3)))


class Constant(Repeated):
    """conv1 reads the same everywhere."""

    def features(self, x: Tensor) -> Tensor:
        return 0 * x + 3


class Silent(Repeated):
    """conv1 reads zeros."""

    def features(self, x: Tensor) -> Tensor:
        return 0 * x


KINDS: dict[str, type[Net]] = {"Repeated": Repeated, "Constant": Constant, "Silent": Silent}
CHOSEN_BY: tuple[dict[str, Any], ...] = ({}, {"method": "cocluster"}, {"variety": "soft"}, {"criterion": "activation"})


# From turn 1 on, so that by default every kind and both forms occur.
@pytest.mark.parametrize("options, form, name", in_turns(CHOSEN_BY, ("partition", "overlap"), KINDS, start=1))
def test_singular_gram_matrices(options: dict[str, Any], form: FormChoice, name: str) -> None:
    kind = KINDS[name]
    model = randomize(kind()).eval()
    data = image(batch=8)
    pruned = fxprune.compile(model, calibration=data, form=form, verify=True, example_inputs=data, **options)
    assert grouped(pruned) == ["conv1", "conv2"]
    assert_sound(pruned, model)
    with torch.no_grad():
        error = float((pruned(data) - model(data)).square().sum() / model(data).square().sum())
    # Half of what conv1 reads is superfluous, or all of it.
    assert error < (0.05 if kind is Repeated else 1e-9)
    damage = fxprune.measure_sensitivity(model, calibration=data, groups=1).layers[0].damage
    assert damage[7] < 1e-3


def test_filters_that_the_norm_switches_off() -> None:
    model = net().eval()
    with torch.no_grad():
        model.norm.weight[:16] = 0
        model.norm.weight[16:20] = 1e-30
    pruned = fxprune.compile(model, calibration=image(batch=8), verify=True, example_inputs=image())
    assert grouped(pruned) == ["conv1", "conv2"]
    assert_sound(pruned, model)
    with torch.no_grad():
        model.norm.weight.zero_()
    pruned = fxprune.compile(model, calibration=image(batch=8), verify=False)
    assert_sound(pruned, model)
    assert all(math.isfinite(d) for d in fxprune.measure_sensitivity(model, calibration=image()).layers[0].damage)


# --- snapshots and budgets ------------------------------------------------------------------------------------------


def spoiled(key: str, value: Tensor | None) -> dict[str, Tensor]:
    """A state of another net of the same kind, with one entry changed, or removed."""
    state = dict(randomize(Net(), seed=1).state_dict())
    if value is None:
        del state[key]
    else:
        state[key] = value
    return state


SNAPSHOTS: dict[str, tuple[Callable[[], Any], str]] = {
    "a key less": (lambda: [spoiled("conv1.weight", None)], "snapshot 0 has no 'conv1.weight', which the model has"),
    "another shape": (
        lambda: [net(), spoiled("conv2.weight", torch.ones(8, 32, 1, 1))],
        r"snapshot 1: 'conv2\.weight' has shape \(8, 32, 1, 1\), in the model \(16, 32, 1, 1\)",
    ),
    "NaN": (
        lambda: [spoiled("conv2.weight", torch.full((16, 32, 1, 1), torch.nan))],
        r"snapshot 0: 'conv2\.weight' holds NaN",
    ),
    "another model": (
        lambda: [Renamed()],
        r"snapshot 0 has no 'conv1\.weight', which the model has \(near: .*convolut",
    ),
    "a wider model": (
        lambda: [Wider()],
        r"'conv2\.weight' has shape \(32, 32, 1, 1\).*earlier states of the same model",
    ),
    "none": (list, "snapshots is empty"),
    "one, bare": (lambda: net().state_dict(), "snapshots is a OrderedDict; pass a list"),
    "a missing file": (lambda: ["epoch_1.pt"], "snapshot 0: .*epoch_1.pt"),
    "numbers": (lambda: [1], "snapshot 0 is a int"),
}


@pytest.mark.parametrize("name", SNAPSHOTS)
@pytest.mark.parametrize("use", [{"method": "tmi"}, {"criterion": "movement"}], ids=["tmi", "movement"])
def test_snapshots_that_do_not_fit(name: str, use: dict[str, Any]) -> None:
    make, match = SNAPSHOTS[name]
    refuse(net(), PlanError, match, snapshots=make(), example_inputs=image(), **use)


def test_a_snapshot_that_is_the_model_itself() -> None:
    model = net()
    refuse(model, PlanError, "shares 'stem.weight' with the model", method="tmi", snapshots=[model.state_dict()])
    copied = copy.deepcopy(model.state_dict())  # no movement: all scores are 0, and any choice is as good
    assert grouped(fxprune.compile(model, criterion="movement", snapshots=[copied])) == ["conv1", "conv2"]


@pytest.mark.parametrize("data", [{}, {"calibration": image(batch=8)}], ids=["weights", "calibrated"])
def test_a_budget_out_of_reach(data: dict[str, Any]) -> None:
    match = r"macs=0\.01 cannot be reached by kernels: .* 2 convolutions .* needs removed, 0\.\d+ remains"
    refuse(net(), PlanError, match, example_inputs=image(), macs=0.01, **data)
    refuse(net(), PlanError, "params=0.01 cannot be reached", example_inputs=image(), params=0.01, **data)
    refuse(
        net(),
        PlanError,
        "macs=0.5 cannot be reached by kernels: no convolution can be pruned",
        example_inputs=image(),
        macs=0.5,
        ignore="conv*",
        **data,
    )


# --- plans ----------------------------------------------------------------------------------------------------------


class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, 4)


class Renamed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.convolution1 = self.conv1
        del self.conv1

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(self.norm(self.convolution1(self.stem(x))).relu()).mean((2, 3)))


@pytest.mark.parametrize(
    "other, match",
    [
        (Wider, r"conv2: the plan is for 16 filters of 32 channels, but the convolution has 32 of 32"),
        (Renamed, r"conv1: Renamed has no module of this name \(near: .*'convolution1'"),
        (WithoutConvs, r"conv1: WithoutConvs has no module of this name"),
    ],
)
@pytest.mark.parametrize("use", [fxprune.mask, fxprune.rewrite])
def test_a_plan_for_another_model(use: Callable[..., Any], other: type[nn.Module], match: str) -> None:
    plan = fxprune.make_plan(net())
    model = other()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match=match):
        use(model, plan)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_plan_is_for_the_dense_model() -> None:
    plan = fxprune.make_plan(net())
    with pytest.raises(PlanError, match="conv1: the convolution already has groups=2"):
        fxprune.mask(fxprune.compile(net(), example_inputs=image()), plan)


def test_rewriting_what_was_not_masked() -> None:
    model = net()
    with pytest.raises(PassError, match="conv1: 256 kernels that the plan drops are not zero"):
        fxprune.rewrite(model, fxprune.make_plan(model), image())


def test_a_module_without_a_report() -> None:
    with pytest.raises(FxpruneError, match="Net carries no record of a compilation"):
        fxprune.report(net())


# --- warnings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"ratio": 0}, {"ignore": ("conv*", "stem")}], ids=["ratio", "ignore"])
def test_nothing_rewritten_is_said_aloud(options: dict[str, Any]) -> None:
    model = net()
    with pytest.warns(NothingRewrittenWarning, match="no convolution was rewritten"):
        pruned = fxprune.compile(model, example_inputs=image(), **options)
    assert not grouped(pruned)
    assert fxprune.report(pruned).rewritten == 0
    with torch.no_grad():
        assert torch.equal(pruned(image()), model(image()))


def test_what_is_rewritten_is_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxprune.compile(net(), example_inputs=image())


# --- what the result is, and what it is not -------------------------------------------------------------------------


def storages(model: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for _, t in tensors(model)}


@pytest.mark.parametrize("options", [{}, {"ratio": 0}, {"fold_batch_norm": True}], ids=str)
@pytest.mark.filterwarnings("ignore::fxprune.NothingRewrittenWarning")
def test_the_result_shares_no_memory(options: dict[str, Any]) -> None:
    model = net()
    pruned = fxprune.compile(model, example_inputs=image(), **options)
    assert storages(pruned).isdisjoint(storages(model))
    masked = fxprune.mask(model, plan := fxprune.make_plan(model))
    assert storages(masked).isdisjoint(storages(model))
    assert storages(fxprune.rewrite(masked, plan)).isdisjoint(storages(masked))
    assert not storages(copy.copy(model)).isdisjoint(storages(model))  # sharing would be seen


def test_tied_parameters_stay_tied_in_the_result() -> None:
    model = net()
    twin = nn.BatchNorm2d(32)
    twin.weight = model.norm.weight
    model.conv1 = nn.Sequential(model.conv1, twin)  # type: ignore[assignment]  # a layer more
    pruned = fxprune.compile(model, example_inputs=image())
    assert pruned.get_parameter("norm.weight") is pruned.get_parameter("conv1.1.weight")
    assert storages(pruned).isdisjoint(storages(model))


def test_frozen_parameters_stay_frozen() -> None:
    model = net()
    frozen = {"conv1.weight", "norm.bias", "stem.weight", "head.bias"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    pruned = fxprune.compile(model, example_inputs=image())
    assert {name for name, parameter in pruned.named_parameters() if not parameter.requires_grad} == frozen
    assert grouped(pruned) == ["conv1", "conv2"]


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_is_that_of_the_model(training: bool) -> None:
    model = net(training)
    pruned = fxprune.compile(model, example_inputs=image())
    assert {m.training for m in pruned.modules()} == {training}
    assert model.norm.num_batches_tracked is not None
    assert int(model.norm.num_batches_tracked) == 0
    assert int(pruned.get_buffer("norm.num_batches_tracked")) == 0


def test_random_state_is_left_alone() -> None:
    model = net()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fxprune.compile(model, example_inputs=image())
    assert torch.equal(torch.rand(3), expected)


def test_gradient_mode_and_default_type_are_left_alone() -> None:
    with torch.no_grad():
        pruned = fxprune.compile(net(), example_inputs=image())
        assert not torch.is_grad_enabled()
    assert all(parameter.requires_grad for parameter in pruned.parameters())
    with torch.inference_mode():
        fxprune.compile(net(), example_inputs=image())
    assert torch.get_default_dtype() == torch.float32
