"""Tracing: the user's model stays as it was, what cannot be traced stays whole, and the training mode is not frozen."""
# nn.Module.__call__ is typed to return Any; each net would need a cast.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equality import assert_same_function, randomize
from products_harness import in_turns
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import StochasticDepth, stochastic_depth

import fxprune
from fxprune.errors import TraceError
from fxprune.graph.examples import as_inputs
from fxprune.graph.layers import ChannelGather, TrainingFlag
from fxprune.graph.tracing import trace
from fxprune.graph.values import PROBE_SIZES, meta_values


class Net(nn.Module):
    """Stem 3 -> 16, `body` of 16 channels, an eligible convolution, a mean over space."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.inner = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 16, 1)

    def body(self, x: Tensor) -> Tensor:
        return x.relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.inner(self.stem(x)))).mean((2, 3))


def image(batch: int = 2, size: int = 8) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def check(model: nn.Module, x: Tensor | None = None, modes: tuple[str, ...] = ("eval", "train")) -> fx.GraphModule:
    """The trace of a model, after comparison with it."""
    model = randomize(model.double()).eval()
    x = (image() if x is None else x).double()
    traced = trace(model, x).module
    assert_same_function(traced, model, (x,), modes)
    return traced


def operators(module: fx.GraphModule) -> list[str]:
    return [getattr(node.target, "__name__", str(node.target)) for node in module.graph.nodes]


# --- the user's model is untouched ----------------------------------------------------------------------------------


class CachesWhatItSees(Net):
    """Keeps the last value in a dict and on itself, as feature extractors do."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, Any] = {}

    def body(self, x: Tensor) -> Tensor:
        self.cache["last"] = x
        self.seen = x
        return x.relu()


def state_of(model: nn.Module) -> list[tuple[str, Any]]:
    """Everything a model holds: which tensors and modules, by identity, its attributes and modes."""
    return [
        (f"{name}.{key}", id(value) if isinstance(value, Tensor | nn.Module) else repr(value))
        for name, module in model.named_modules()
        for store in (module.__dict__, module._parameters, module._buffers, module._modules)
        for key, value in store.items()
        if key not in ("_parameters", "_buffers", "_modules")
    ]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("use", [trace, fxprune.analyze, fxprune.make_plan, fxprune.compile], ids=lambda f: f.__name__)
def test_the_model_is_untouched(use: Any, training: bool) -> None:
    model = CachesWhatItSees().train(training)
    before, values = state_of(model), {name: t.clone() for name, t in model.state_dict().items()}
    use(model, example_inputs=image())
    assert state_of(model) == before
    assert model.cache == {}
    assert all(torch.equal(t, values[name]) for name, t in model.state_dict().items())


def test_a_touched_model_would_be_seen() -> None:
    for symbolic_trace in (fx.symbolic_trace, lambda model: model(image())):
        model = CachesWhatItSees()
        before = state_of(model)
        symbolic_trace(model)
        assert state_of(model) != before


def test_the_trace_shares_parameters() -> None:
    model = Net()
    module = trace(model, image()).module
    assert {id(p) for p in module.parameters()} == {id(p) for p in model.parameters()}
    assert module.get_submodule("stem") is not model.stem


def test_a_model_that_cannot_be_copied_is_named() -> None:
    model = Net()
    model.lines = (line for line in "ab")  # type: ignore[assignment]  # an attribute that no copy can follow
    with pytest.raises(TraceError, match=r"Net cannot be copied with copy\.deepcopy \(.*generator"):
        trace(model, image())


# --- leaves ---------------------------------------------------------------------------------------------------------


class OwnConv(nn.Conv2d):
    """A convolution whose forward branches on the value."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input if input.shape[0] > 1000 else input * 2)


class OwnNorm(nn.BatchNorm2d):
    """A normalisation with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu() if input.sum() > -1e9 else input


class OwnLinear(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if len(input) > 0 else input


class Subclasses(Net):
    """Layers of the user, all with control flow inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = OwnConv(16, 16, 3, padding=1)
        self.norm = OwnNorm(16)
        self.linear = OwnLinear(16, 16)

    def body(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_layers_stay_whole_subclasses_included() -> None:
    traced = check(Subclasses())
    calls = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == ["stem", "inner", "norm", "linear", "last"]
    assert not trace(Subclasses(), image()).opaque


class Stubborn(nn.Module):
    """Control flow on a value, which no tracer can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y if y.sum() > 0 else -y


class StubbornInside(Net):
    """Two levels above a stubborn module."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Sequential(Stubborn(), nn.ReLU()))

    def body(self, x: Tensor) -> Tensor:
        return self.stage(x)


def test_only_the_innermost_untraceable_module_stays_whole() -> None:
    traced = trace(StubbornInside(), image())
    assert list(traced.opaque) == ["stage.1.0"]
    assert "cannot be traced" in traced.opaque["stage.1.0"]
    assert traced.notes == ("channels of modules that could not be traced keep their order: stage.1.0",)
    calls = [node.target for node in traced.module.graph.nodes if node.op == "call_module"]
    assert calls == ["stem", "inner", "stage.0", "stage.1.0", "stage.1.1", "last"]
    check(StubbornInside())


def test_what_surrounds_an_untraceable_module_is_compiled() -> None:
    pruned = fxprune.compile(StubbornInside(), example_inputs=image(), output="graph")
    report = fxprune.report(pruned)
    assert {layer.name for layer in report.layers if layer.form != "dense"} == {"inner", "stage.0", "last"}
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons["stage.1.0.conv"].startswith("inside stage.1.0: its forward cannot be traced")
    assert trace(StubbornInside(), image()).notes[0] in report.notes


class Detector(nn.Module):
    """A backbone that can be traced under a forward that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3))
        self.neck = nn.Conv2d(32, 16, 1)
        self.heads = Stubborn()
        self.names = nn.Linear(16, 4)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.heads(self.neck(self.backbone(images)))
        return [one[one > 0] for one in maps]


def test_an_untraceable_model_names_its_traceable_children() -> None:
    model = Detector()
    with pytest.raises(TraceError) as caught:
        fxprune.compile(model)
    message = str(caught.value)
    assert "Detector cannot be traced as a whole" in message
    assert "model.backbone = fxprune.compile(model.backbone)" in message
    assert message.endswith("traceable here: backbone, neck")
    assert caught.value.__cause__ is not None


def test_a_compiled_backbone_can_be_put_back() -> None:
    model = randomize(Detector())
    assert isinstance(model.backbone, nn.Module)
    plan = fxprune.make_plan(model.backbone)
    masked = fxprune.mask(model.backbone, plan)
    dense = model(image())
    model.backbone = masked
    expected = model(image())
    model.backbone = fxprune.compile(masked)
    assert isinstance(model.backbone, nn.Module)
    assert list(fxprune.report(model.backbone).layers)[1].form == "partition"
    torch.testing.assert_close(model(image()), expected)
    assert any(a.shape != b.shape or not torch.allclose(a, b) for a, b in zip(dense, expected, strict=True))


def test_a_model_without_any_traceable_part_says_so() -> None:
    class Hopeless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = Stubborn()

        def forward(self, x: Tensor) -> Tensor:
            return self.heads(x) if x.sum() > 0 else x

    with pytest.raises(TraceError, match="none of its submodules"):
        trace(Hopeless())


# --- modes ----------------------------------------------------------------------------------------------------------


class FunctionalDropout(Net):
    def body(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class KeywordDropout(Net):
    def body(self, x: Tensor) -> Tensor:
        return F.dropout2d(x, p=0.5, training=self.training)


class FunctionalStochasticDepth(Net):
    def body(self, x: Tensor) -> Tensor:
        return x + stochastic_depth(x.relu(), 0.5, "row", self.training)


class ModuleStochasticDepth(Net):
    def __init__(self) -> None:
        super().__init__()
        self.drop = StochasticDepth(0.5, "row")

    def body(self, x: Tensor) -> Tensor:
        return x + self.drop(x.relu())


class DropPath(nn.Module):
    """Stochastic depth as repositories write it."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.5) / 0.5


class UserDropPath(Net):
    def __init__(self) -> None:
        super().__init__()
        self.drop = DropPath()

    def body(self, x: Tensor) -> Tensor:
        return x + self.drop(x.relu())


class RandomisedLeaky(Net):
    def body(self, x: Tensor) -> Tensor:
        return F.rrelu(x, 0.1, 0.9, self.training)


MODAL = (
    FunctionalDropout,
    KeywordDropout,
    FunctionalStochasticDepth,
    ModuleStochasticDepth,
    UserDropPath,
    RandomisedLeaky,
)


def distinct_outputs(model: nn.Module, x: Tensor, times: int = 12) -> int:
    with torch.no_grad():
        return len({tuple(model(x).flatten().tolist()) for _ in range(times)})


@pytest.mark.parametrize("net, compiled_in_training", in_turns(MODAL, [False, True]))
def test_randomness_follows_the_mode(net: type[Net], compiled_in_training: bool) -> None:
    model = net().train(compiled_in_training)
    pruned = fxprune.compile(model, example_inputs=image(4))
    assert pruned.training == compiled_in_training
    for _ in range(2):
        assert distinct_outputs(pruned.eval(), image(4)) == 1
        assert distinct_outputs(pruned.train(), image(4)) > 4
    assert not fxprune.report(pruned).notes


@pytest.mark.parametrize("net", [FunctionalDropout, KeywordDropout, FunctionalStochasticDepth, RandomisedLeaky])
def test_a_baked_mode_would_be_seen(net: type[Net]) -> None:
    assert distinct_outputs(fx.symbolic_trace(net().train()).eval(), image(4)) > 4
    assert distinct_outputs(fx.symbolic_trace(net().eval()).train(), image(4)) == 1


def test_a_training_flag_belongs_to_its_owner() -> None:
    class Outer(Net):
        def __init__(self) -> None:
            super().__init__()
            self.part = FunctionalDropout()

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x) + F.dropout(super().forward(x), 0.5, self.training)

    traced = trace(Outer().eval(), image()).module
    flags = [str(n.target) for n in traced.graph.nodes if n.op == "call_module" and "training_flag" in str(n.target)]
    assert sorted(flags) == ["part.training_flag", "training_flag"]
    assert all(isinstance(traced.get_submodule(name), TrainingFlag) for name in flags)
    assert distinct_outputs(traced, image()) == 1
    traced.get_submodule("part").train()
    assert distinct_outputs(traced, image()) > 4


class AuxiliaryHead(Net):
    """Two outputs in training, one in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.body(self.inner(self.stem(x)))
        out = self.last(y).mean((2, 3))
        return (out, self.auxiliary(y)) if self.training else out


def test_a_forward_that_differs_in_structure_follows_evaluation() -> None:
    model = AuxiliaryHead().train()
    traced = trace(model, image())
    assert traced.modes == ("eval",)
    (note,) = traced.notes
    assert note.startswith("the forward of the model itself differs between training and evaluation mode")
    check(AuxiliaryHead(), modes=("eval",))
    pruned = fxprune.compile(model, example_inputs=image(), output="graph")
    assert note in fxprune.report(pruned).notes
    assert isinstance(pruned.train()(image()), Tensor)
    reasons = {layer.name: layer.reason for layer in fxprune.report(pruned).layers}
    assert "never calls it" in reasons["auxiliary"]
    assert trace(Net(), image()).modes == ("eval", "train")


def test_training_flags_of_each_module_are_kept() -> None:
    class Frozen(Net):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Sequential(nn.BatchNorm2d(16))
            self.learning = nn.Sequential(nn.BatchNorm2d(16))

        def body(self, x: Tensor) -> Tensor:
            return self.frozen(x) + self.learning(x)

    model = Frozen().train()
    model.frozen.eval()
    pruned = fxprune.compile(model, example_inputs=image())
    for name, module in model.named_modules():
        assert pruned.get_submodule(name).training == module.training, name
    statistics = {name: buffer.clone() for name, buffer in pruned.named_buffers() if "running_mean" in name}
    pruned(image())
    moved = {
        name for name, buffer in pruned.named_buffers() if name in statistics and (buffer != statistics[name]).any()
    }
    assert moved == {"learning.0.running_mean"}


# --- arguments ------------------------------------------------------------------------------------------------------


class Optional(Net):
    """Arguments that most callers leave out."""

    def forward(self, x: Tensor, scale: Tensor | None = None, *, gain: float = 2.0, flag: bool = False) -> Tensor:
        y = super().forward(x) * gain
        return -y if flag else y if scale is None else y * scale


def test_arguments_left_out_keep_their_default() -> None:
    traced = check(Optional())
    assert [node.name for node in traced.graph.nodes if node.op == "placeholder"] == ["x"]
    with pytest.raises(TypeError):
        traced(image().double(), torch.ones(2, 1))


def test_arguments_given_stay_arguments() -> None:
    model = randomize(Optional().double()).eval()
    scale = torch.tensor([[2.0], [3.0]], dtype=torch.float64)
    traced = trace(model, (image().double(), scale)).module
    assert [node.name for node in traced.graph.nodes if node.op == "placeholder"] == ["x", "scale"]
    assert_same_function(traced, model, (image().double(), scale))
    torch.testing.assert_close(traced(image().double(), scale=scale), model(image().double(), scale=scale))


def test_a_missing_argument_is_named() -> None:
    class Two(Net):
        def forward(self, x: Tensor, features: Tensor) -> Tensor:  # type: ignore[override]  # the point of the net
            return super().forward(x) + features

    with pytest.raises(TraceError, match=r"Two\.forward needs features, but example_inputs has 1 values"):
        trace(Two(), image())
    assert trace(Two(), (image(), torch.ones(2, 16))).inputs[1].shape == (2, 16)


def test_too_many_arguments_are_refused() -> None:
    with pytest.raises(TraceError):
        trace(Net(), (image(), image()))


def test_nested_arguments() -> None:
    class Nested(Net):
        def forward(self, maps: dict[str, Tensor]) -> Tensor:  # type: ignore[override]  # the point of the net
            return super().forward(maps["image"]) + maps["bias"]

    maps = {"image": image(), "bias": torch.ones(16)}
    model = Nested()
    torch.testing.assert_close(trace(model, (maps,)).module(maps), model(maps))


def test_a_bare_tensor_is_one_input() -> None:
    assert as_inputs(image())[0].shape == (2, 3, 8, 8)
    assert len(as_inputs([image(), 3])) == 2


# --- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [224, 32, 28, 64])
def test_an_input_size_is_probed(size: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3, stride=2), nn.Flatten(), nn.Linear(2 * ((size - 3) // 2 + 1) ** 2, 4))
    traced = trace(model)
    assert traced.probed
    assert [tuple(x.shape) for x in traced.inputs] == [(2, 3, size, size)]
    assert tuple(traced.values[traced.module.graph.output_node()].shape) == (2, 4)


def test_the_first_probe_that_fits_is_taken() -> None:
    assert trace(Net()).inputs[0].shape[-1] == PROBE_SIZES[0] == 224
    assert not trace(Net(), image()).probed
    assert trace(nn.Sequential(nn.Linear(7, 3))).inputs[0].shape == (2, 7)
    assert trace(nn.Sequential(nn.Conv1d(5, 3, 2))).inputs[0].shape == (2, 5, 224)


def test_no_probe_fits() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(16 * 49, 4))
    traced = trace(model)
    assert traced.inputs == ()
    assert traced.values == {}
    pruned = fxprune.compile(model)
    assert any("no usual input size fits" in note for note in fxprune.report(pruned).notes)
    masked = fxprune.mask(model, fxprune.make_plan(model))
    fxprune.verify(pruned, masked, image(size=7))


def test_an_example_that_does_not_run_is_refused() -> None:
    with pytest.raises(TraceError, match=r"does not run on example inputs of shape \(2, 5, 8, 8\)"):
        trace(Net(), torch.randn(2, 5, 8, 8))


class SeesDevices(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves the base class untyped
    """Counts results on real devices that are as large as a feature map."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # see above
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self.largest = max(self.largest, leaf.numel())
        return result


def test_values_are_not_computed() -> None:
    x = image(size=64)
    with SeesDevices() as allocations:
        traced = trace(Net(), x)
    assert allocations.largest <= 16 * 16 * 9  # the parameters that Net draws
    tensors = [value for value in traced.values.values() if isinstance(value, Tensor)]
    assert len(tensors) == len(traced.module.graph.nodes)
    assert {value.device.type for value in tensors} == {"meta"}
    with SeesDevices() as allocations:
        Net()(x)
    assert allocations.largest == 2 * 16 * 64 * 64


def test_a_real_run_gives_the_values_where_an_operator_has_no_meta_kernel() -> None:
    class Lookup(Net):
        def body(self, x: Tensor) -> Tensor:
            return x + torch.nonzero(x.sum((0, 2, 3)) > -1e9).reshape(1, -1, 1, 1) * 0.1

    traced = trace(Lookup(), image())
    assert traced.values.keys() == set(traced.module.graph.nodes)
    assert {value.device.type for value in traced.values.values() if isinstance(value, Tensor)} == {"meta"}
    model = randomize(Lookup().double()).eval()
    pruned = fxprune.compile(model, example_inputs=image().double(), verify=False)
    assert fxprune.verify(pruned, fxprune.mask(model, fxprune.make_plan(model)), image().double()).max_rel < 1e-12


# --- what forward may do --------------------------------------------------------------------------------------------


def grow(sizes: list[int], x: Tensor) -> Tensor:
    """Write into a list that was given, as torchvision's window attention does."""
    sizes[0] += 1
    return F.pad(x, (sizes[0], 0))


fx.wrap("grow")


class GivesAList(Net):
    def body(self, x: Tensor) -> Tensor:
        return grow([1, 2], x).relu()


def test_a_wrapped_function_may_change_its_list() -> None:
    traced = trace(GivesAList(), image())
    (node,) = [node for node in traced.module.graph.nodes if node.target is grow]
    assert tuple(traced.values[node].shape) == (2, 16, 8, 10)
    with pytest.raises(TypeError, match="immutable_list"):  # what fx itself hands out cannot be changed
        grow(node.args[0], image())


class MakesConstants(Net):
    def body(self, x: Tensor) -> Tensor:
        slope = torch.linspace(0, 1, 16).reshape(1, 16, 1, 1)
        return x * slope.to(x) + torch.tensor([1.0, 2.0]).to(x).sum()


def test_constants_made_in_forward_are_kept() -> None:
    traced = check(MakesConstants())
    constants = [name for name, _ in traced.named_buffers()]
    assert constants == ["_tensor_constant0", "_tensor_constant1"]
    masked = fxprune.mask(model := randomize(MakesConstants()), fxprune.make_plan(model))
    pruned = fxprune.compile(model, example_inputs=image())
    fxprune.verify(pruned, masked, image())
    assert "_tensor_constant0" in pruned.state_dict()


def test_a_graph_module_is_a_model() -> None:
    model = randomize(FunctionalDropout()).eval()
    traced = fx.symbolic_trace(model)
    x = image()
    pruned = fxprune.compile(traced, example_inputs=x)
    fxprune.verify(pruned, fxprune.mask(model, fxprune.make_plan(model)), x)
    assert any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in pruned.modules())


def test_a_compiled_model_traces_to_itself() -> None:
    pruned = fxprune.compile(randomize(FunctionalDropout()).eval(), example_inputs=image())
    again = trace(pruned, image()).module
    assert operators(again) == operators(pruned)
    with torch.no_grad():
        assert torch.equal(again(image()), pruned(image()))


def test_a_compiled_model_can_be_compiled_again() -> None:
    model = randomize(Net()).eval()
    once = fxprune.compile(model, {"inner": 0.5}, example_inputs=image())
    twice = fxprune.compile(once, {"last": 0.5}, example_inputs=image())
    both = fxprune.make_plan(model, {"inner": 0.5}), fxprune.make_plan(once, {"last": 0.5})
    assert set(both[0].layers) == {"inner"}
    assert set(both[1].layers) == {"last"}
    assert "grouped already" in fxprune.make_plan(once).skipped["inner"]
    assert {n for n, m in twice.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1} == {"inner", "last"}
    fxprune.verify(twice, fxprune.mask(once, both[1]), image())


def test_meta_values_reports_the_error_and_what_came_before_it() -> None:
    module = trace(Net(), image()).module
    values, error = meta_values(module, (torch.empty(2, 3, 8, 8, device="meta"),))
    assert error is None
    assert len(values) == len(module.graph.nodes)
    values, error = meta_values(module, (torch.empty(2, 4, 8, 8, device="meta"),))
    assert isinstance(error, RuntimeError)
    assert [node.op for node in values] == ["placeholder"]


def test_gathers_stay_whole() -> None:
    class Gathered(Net):
        def __init__(self) -> None:
            super().__init__()
            self.gather = ChannelGather(torch.arange(16).flip(0), 16)

        def body(self, x: Tensor) -> Tensor:
            return self.gather(x)

    assert "gather" in operators(check(Gathered()))


def test_annotations_that_are_strings_are_evaluated() -> None:
    (placeholder, *_) = trace(Net(), image()).module.graph.nodes
    assert Net.forward.__annotations__["x"] == "Tensor"
    assert placeholder.type is Tensor

    class Unknown(Net):
        def forward(self, x: NoSuchType) -> Tensor:  # type: ignore[name-defined]  # noqa: F821  # the point of the net
            return super().forward(x)

    (placeholder, *_) = trace(Unknown(), image()).module.graph.nodes
    assert placeholder.type is None


def test_a_module_without_parameters_yet_is_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy modules warn once that they are new
        model = nn.Sequential(nn.LazyConv2d(4, 1))
    with pytest.raises(TraceError, match="0: LazyConv2d is not initialized yet"):
        trace(model)


class BuiltinDropout(nn.Module):
    """torch.dropout is a builtin without a Python signature; another literal False stands before its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.dropout(self.conv(x).sum((2, 3), False), 0.5, self.training)


def test_the_mode_of_a_builtin_follows() -> None:
    compiled = fxprune.compile(BuiltinDropout().eval(), example_inputs=torch.randn(2, 16, 4, 4))
    x = torch.randn(8, 16, 4, 4)
    assert torch.equal(compiled(x), compiled(x))
    assert not torch.equal(compiled.train()(x), compiled(x))
    torch.jit.script(compiled)


# --- buffers --------------------------------------------------------------------------------------------------------


class Decides(nn.Module):
    """Goes by the value of a buffer."""

    def __init__(self, writes: bool = False) -> None:
        super().__init__()
        self.on: Tensor
        self.register_buffer("on", torch.ones(()))
        self.writes = writes

    def forward(self, x: Tensor) -> Tensor:
        if self.on > 0:
            x = x.relu()
        if self.writes:
            self.on.mul_(0.5)
        return x


class InsideNet(Net):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.decides = inner

    def body(self, x: Tensor) -> Tensor:
        y: Tensor = self.decides(x)
        return y


def test_a_buffer_that_decides_is_a_constant() -> None:
    traced = trace(model := InsideNet(Decides()), image())
    assert not traced.opaque
    torch.testing.assert_close(traced.module.eval()(image()), model.eval()(image()))


def test_a_buffer_that_decides_and_changes_leaves_its_module_whole() -> None:
    model = InsideNet(Decides(writes=True)).eval()
    traced = trace(model, image())
    assert "writes into buffers whose values it also looks at" in traced.opaque["decides"]
    traced.module(image())
    assert float(model.decides.on) == 1  # type: ignore[arg-type]  # the graph has a state of its own
    assert float(traced.module.get_buffer("decides.on")) == 0.5


@pytest.mark.parametrize("writes", [False, True])
def test_a_model_that_itself_decides_by_a_buffer(writes: bool) -> None:
    class Itself(InsideNet):
        def body(self, x: Tensor) -> Tensor:
            return Decides.forward(self, x)  # type: ignore[arg-type]

    model = Itself(nn.Identity())
    model.register_buffer("on", torch.ones(()))
    model.writes = writes  # type: ignore[assignment]
    if writes:
        with pytest.raises(TraceError, match="writes into buffers whose values it also looks at"):
            trace(model, image())
    else:
        torch.testing.assert_close(trace(model, image()).module.eval()(image()), model.eval()(image()))


def test_what_cannot_be_traced_ends_with_or_without_buffers() -> None:
    class Asks(InsideNet):
        def body(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    for model in (Asks(nn.Identity()), Asks(nn.BatchNorm2d(16))):
        model.register_buffer("more", torch.zeros(()))
        with pytest.raises(TraceError, match="cannot be traced as a whole"):
            trace(model, image())


# --- inputs by name, and what is no model ---------------------------------------------------------------------------


class Two(Net):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:  # type: ignore[override]
        y = super().forward(x) * scale
        return y if shift is None else y + shift


@pytest.mark.parametrize("names", [("x", "scale"), ("scale", "x"), ("shift", "x", "scale")])
def test_inputs_by_name_are_those_by_position(names: tuple[str, ...]) -> None:
    given = {"x": image(), "scale": torch.tensor(2.0), "shift": torch.tensor(0.5)}
    model = Two().eval()
    named = {name: given[name] for name in names}
    pruned = fxprune.compile(model, 0.5, example_inputs=named)
    plan = pruned.meta["fxprune"].plan
    assert plan == fxprune.make_plan(
        model, 0.5, example_inputs=tuple(given[n] for n in sorted(names, key=list(given).index))
    )
    check = fxprune.verify(pruned, fxprune.mask(model, plan), named)
    assert check.max_rel < 1e-12
    assert fxprune.analyze(model, named).spaces


@pytest.mark.parametrize(
    "names, message",
    [
        (("x", "scael"), r"Two.forward takes no argument 'scael' \(near: 'scale'\)"),
        (("x", "shift"), "forward needs scale, but example_inputs has 2 values"),
    ],
)
def test_names_that_do_not_fit(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        fxprune.compile(Two(), 0.5, example_inputs=dict.fromkeys(names, image()))


def scripted(model: nn.Module) -> Any:
    return torch.jit.trace(model, image())  # type: ignore[no-untyped-call]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "wrap, message",
    [
        (scripted, "TorchScript, which has no Python forward"),
        (nn.DataParallel, "pass the model inside, which is its attribute `module`"),
        (torch.compile, "pass the model inside, which is its attribute `_orig_mod`"),
    ],
    ids=["jit.trace", "DataParallel", "torch.compile"],
)
def test_what_is_around_a_model_is_no_model(wrap: Any, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        fxprune.compile(wrap(Net().eval()), 0.5, example_inputs=image())


@pytest.mark.parametrize(
    "given, message",
    [
        (Net, "the model is a type and no module; call it first"),
        ("resnet18", "the model is 'resnet18', a name or path and no module; build it first"),
    ],
)
def test_what_is_no_module_at_all(given: Any, message: str) -> None:
    for call in (fxprune.compile, fxprune.analyze, fxprune.make_plan):
        with pytest.raises(TraceError, match=message):
            call(given, example_inputs=image())
