"""The user's own module with smaller layers: equal to the masked model in both modes, at other batches and sizes, of
the same class, with the same names, for networks that no trace takes.
"""

import copy
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from products_harness import in_turns
from torch import Tensor, nn
from wild_kinds import LIBRARIES, TRAPS, Base, Classifier, Detector, Padded, SamePad, TwoStage, block, draw, image

import fxprune
from fxprune.exact.precision import TRAINING
from fxprune.exact.record import record_of
from fxprune.exact.rewriting import _without
from fxprune.exact.verification import difference, evaluate
from fxprune.graph.containers import tensors_in
from fxprune.graph.examples import as_examples
from fxprune.graph.gathered import GatheredLayer

GRANULARITIES: tuple[Any, ...] = ("kernel", "filter", {"filter": 0.25, "kernel": 0.5})


def compiled(model: nn.Module, inputs: Any, granularity: Any = "kernel", **options: Any) -> Any:
    ratio = None if isinstance(granularity, dict) else 0.5
    return fxprune.compile(model, ratio, example_inputs=inputs, granularity=granularity, output="module", **options)


def masked_for(model: nn.Module, pruned: nn.Module) -> Any:
    return fxprune.mask(model, record_of(pruned).plan)


def gap(pruned: nn.Module, masked: nn.Module, inputs: Any, mode: str = "eval") -> float:
    (example,) = as_examples(inputs, masked)
    return difference(evaluate(pruned, example, mode).tensors, evaluate(masked, example, mode).tensors)[1]


def rewritten(pruned: nn.Module) -> int:
    return fxprune.report(pruned).rewritten


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a model is, to compare afterwards."""
    return {
        **{name: tensor.clone() for name, tensor in model.state_dict().items()},
        **{
            f"{path}.{name}": copy.deepcopy(value)
            for path, module in model.named_modules()
            for name, value in vars(module).items()
            if not name.startswith("_")
        },
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return tensors_in(a) != [] or a == b or isinstance(a, list)


# --- networks that stand for libraries --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::fxprune.NothingRewrittenWarning")  # of one that returns all its channels
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=["kernels", "filters", "both"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_network_of_a_library_comes_out_as_itself_and_exact(name: str, granularity: Any) -> None:
    kind = LIBRARIES[name]
    model, inputs = draw(kind.make), kind.inputs(2, 16)
    before = state_of(model)
    pruned = compiled(model, inputs, granularity)
    assert type(pruned) is type(model)
    assert all(same(value, before[key]) for key, value in state_of(model).items()), "the user's model was changed"
    if granularity == "kernel":
        assert rewritten(pruned) == kind.grouped
    elif granularity == "filter":
        assert rewritten(pruned) >= kind.shorter
    masked = masked_for(model, pruned)
    assert gap(pruned, masked, inputs) <= 1e-10
    assert gap(pruned, masked, inputs, "train") <= 1e-10
    assert gap(pruned, masked, kind.inputs(3, 24)) <= 1e-10
    assert gap(pruned, masked, kind.inputs(3, 24), TRAINING) <= 1e-10


def test_the_classifier_loses_filters_where_it_does_not_return_them() -> None:
    model = draw(Classifier)
    pruned = compiled(model, {"pixel_values": image()}, "filter")
    assert rewritten(pruned) == 3
    assert type(pruned(pixel_values=image())) is type(model(pixel_values=image()))
    assert gap(pruned, masked_for(model, pruned), {"pixel_values": image()}) <= 1e-10


# --- networks made to break it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("trap, granularity", in_turns(TRAPS, GRANULARITIES))
def test_traps_are_exact(trap: type[Base], granularity: Any) -> None:
    model = draw(trap)
    pruned = compiled(model, image(), granularity)
    masked = masked_for(model, pruned)
    assert rewritten(pruned) >= 1
    for mode in ("eval", "train", TRAINING):
        assert gap(pruned, masked, image(), mode) <= 1e-10, mode
    assert gap(pruned, masked, image(3, 20)) <= 1e-10


def test_what_a_model_keeps_as_an_attribute_is_in_order() -> None:
    model = draw(next(trap for trap in TRAPS if trap.__name__ == "KeepsResult"))
    pruned = compiled(model, image())
    masked = masked_for(model, pruned)
    with torch.no_grad():
        pruned(image())
        masked(image())
    torch.testing.assert_close(pruned.last, masked.last)


def test_what_a_hook_sees_is_in_order() -> None:
    model = draw(Base)
    seen: list[Tensor] = []
    model.b.register_forward_hook(lambda module, inputs, output: seen.append(output))
    pruned = compiled(model, image())
    masked = masked_for(model, pruned)
    seen.clear()
    with torch.no_grad():
        pruned(image())
        masked(image())
    torch.testing.assert_close(seen[0], seen[1])


def test_the_check_sees_a_wrong_order() -> None:
    """The negative control of all the above: one order changed by one place."""
    model = draw(Detector)
    pruned = compiled(model, image())
    layers = (layer for layer in pruned.modules() if isinstance(layer, GatheredLayer))
    layer = next(layer for layer in layers if layer.read_index is not None)
    assert layer.read_index is not None
    layer.read_index.copy_(layer.read_index.roll(1))
    name = next(name for name, module in pruned.named_modules() if module is layer)
    with pytest.raises(fxprune.VerificationError, match=rf"first module that differs is {name} \(GatheredConv2d\)"):
        fxprune.verify(pruned, masked_for(model, pruned), image())


def test_the_check_looks_at_real_training_mode() -> None:
    """Auxiliary results come in training mode only; one that is wrong must be seen."""
    model = draw(next(trap for trap in TRAPS if trap.__name__ == "MoreInTraining"))
    pruned = compiled(model, image())
    with torch.no_grad():
        pruned.head.weight.mul_(2)
    with pytest.raises(fxprune.VerificationError, match="training"):
        fxprune.verify(pruned, masked_for(model, pruned), image())


# --- as itself --------------------------------------------------------------------------------------------------------


def test_names_stay_and_vendor_code_finds_what_it_looks_for() -> None:
    model = draw(Detector)
    pruned = compiled(model, image())
    assert model.state_dict().keys() <= pruned.state_dict().keys()
    assert [name for name, _ in pruned.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert [name for name, _ in pruned.named_modules()] == [name for name, _ in model.named_modules()]
    gathered = {name: layer for name, layer in pruned.named_modules() if isinstance(layer, GatheredLayer)}
    assert gathered
    for name, layer in gathered.items():
        before = model.get_submodule(name)
        assert isinstance(before, nn.Conv2d)
        assert isinstance(layer, nn.Conv2d)
        assert layer.stride == before.stride
        assert layer.weight.shape[0] == before.weight.shape[0]
        assert layer.in_channels == before.in_channels
        with pytest.raises(AttributeError, match="would forget"):
            _ = layer.groups
    with pytest.raises(fxprune.TraceError, match="is a result of fxprune"):
        compiled(pruned, image())


@pytest.mark.parametrize("make", [Detector, Padded], ids=["torch's convolutions", "convolutions of its own"])
def test_folding_batch_norm_in_place_is_exact(make: type[nn.Module]) -> None:
    """As vendors do before they predict: scale the weight, set the bias, leave BatchNorm out."""
    model = draw(make)
    pruned = compiled(model, image())
    pairs: list[Any] = [
        (m[0], m[1]) for m in pruned.modules() if isinstance(m, nn.Sequential) and isinstance(m[0], nn.Conv2d)
    ]
    pairs += [(pruned.b, pruned.norm)] if isinstance(pruned, Padded) else []
    assert any(isinstance(conv, GatheredLayer) and conv.give_index is not None for conv, _ in pairs)
    with torch.no_grad():
        expected = tensors_in(pruned(image()))
        for conv, norm in pairs:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            bias = torch.zeros(len(scale)) if conv.bias is None else conv.bias
            conv.weight.data = conv.weight * scale.view(-1, 1, 1, 1)
            conv.bias = nn.Parameter((bias - norm.running_mean) * scale + norm.bias)
            norm.reset_running_stats()
            norm.eps = 0.0
            nn.init.ones_(norm.weight)
            nn.init.zeros_(norm.bias)
        torch.testing.assert_close(tensors_in(pruned(image())), expected, rtol=1e-4, atol=1e-4)


def test_copies_pickles_and_state_dicts() -> None:
    model = draw(Padded)
    pruned = compiled(model, image())
    expected = pruned(image())
    for twin in (copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned))):
        assert torch.equal(twin(image()), expected)
        assert type(twin) is Padded
        assert fxprune.report(twin).to_dict() == fxprune.report(pruned).to_dict()
    file = io.BytesIO()
    torch.save(pruned.state_dict(), file)
    file.seek(0)
    fresh = compiled(draw(Padded), image())
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.mul_(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(image()), expected)


def test_it_trains_like_the_masked_model() -> None:
    """Gradients of the layers that stay are those of the masked model."""
    model = draw(TwoStage)
    inputs = (list(image()),)
    pruned = compiled(model, inputs).double()
    masked = masked_for(model, pruned).double()
    batch = [x.double() for x in inputs[0]]
    for network in (pruned, masked):
        network.train()
        sum(found["boxes"].square().mean() for found in network(batch)).backward()
    torch.testing.assert_close(pruned.box[0].weight.grad, masked.box[0].weight.grad)
    grouped = pruned.body[1][0].weight.grad
    dense = masked.body[1][0].weight.grad[masked.body[1][0].weight != 0]
    torch.testing.assert_close(grouped.flatten().sort().values, dense.flatten().sort().values)


def test_export_and_compile() -> None:
    model = draw(next(trap for trap in TRAPS if trap.__name__ == "CallsThrice"))
    pruned = compiled(model, image())
    expected = pruned(image())
    exported = torch.export.export(pruned, (image(),)).module()
    torch.testing.assert_close(exported(image()), expected)
    scripted = torch.jit.script(compiled(draw(Base), image()).a)
    assert scripted(image()).shape == (2, 32, 16, 16)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_onnx(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pruned = compiled(draw(Padded), image())
    torch.onnx.export(pruned, (image(),), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: image().numpy()})
    torch.testing.assert_close(torch.from_numpy(found), pruned(image()), rtol=1e-4, atol=1e-5)


# --- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=["kernels", "filters", "both"])
def test_saved_and_loaded_into_a_fresh_model(granularity: Any, tmp_path: Path) -> None:
    pruned = compiled(draw(Detector), image(), granularity)
    fxprune.save(pruned, tmp_path / "net.pt")
    torch.manual_seed(1)
    loaded = fxprune.load(tmp_path / "net.pt", Detector().eval())
    assert type(loaded) is Detector
    for mine, theirs in zip(tensors_in(pruned(image())), tensors_in(loaded(image())), strict=True):
        assert torch.equal(mine, theirs)
    assert fxprune.report(loaded).to_dict() == fxprune.report(pruned).to_dict()
    fxprune.save(loaded, tmp_path / "again.pt")
    again = fxprune.load(tmp_path / "again.pt", Detector().eval())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), pruned.parameters(), strict=True))


class Normed(Base):
    """A convolution whose weight is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.c[0] = nn.utils.parametrizations.weight_norm(self.c[0])


def test_what_was_baked_is_baked_again_when_it_is_loaded(tmp_path: Path) -> None:
    pruned = compiled(draw(Normed), image(), bake=True)
    assert record_of(pruned).plan.baked == ("c.0",)
    fxprune.save(pruned, tmp_path / "net.pt")
    loaded = fxprune.load(tmp_path / "net.pt", Normed().eval())
    assert torch.equal(loaded(image()), pruned(image()))


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    fxprune.save(compiled(draw(Detector), image()), tmp_path / "net.pt")
    with pytest.raises(fxprune.StorageError, match="does not fit Padded"):
        fxprune.load(tmp_path / "net.pt", draw(Padded))


# --- what is asked for, and what decides ------------------------------------------------------------------------------


def test_auto_gives_the_graph_where_both_witnesses_agree_and_the_module_where_not() -> None:
    graph = fxprune.compile(draw(Base), 0.5, example_inputs=image())
    assert isinstance(graph, torch.fx.GraphModule)
    module = fxprune.compile(draw(TRAPS[2]), 0.5, example_inputs=image())
    assert type(module) is TRAPS[2]
    assert any("own module" in note for note in fxprune.report(module).notes)
    assert any("looks at data" in note and "wild_kinds.py" in note for note in fxprune.report(module).notes)


class Stumbles(Base):
    """Runs where torch's own tensors are seen by nobody."""

    def middle(self, x: Tensor) -> Tensor:
        if torch._C._len_torch_function_stack():
            raise RuntimeError("somebody watches")
        return x


def test_what_cannot_be_recorded_is_compiled_by_its_trace_and_checked() -> None:
    model = draw(Stumbles)
    graph = fxprune.compile(model, 0.5, example_inputs=image())
    assert isinstance(graph, torch.fx.GraphModule)
    assert any("could not be compared" in note and "somebody watches" in note for note in fxprune.report(graph).notes)
    with pytest.raises(fxprune.TraceError, match="somebody watches"):
        compiled(model, image())


class Guesses(Base):
    """Symbolic tracing takes the first branch, for the type of a proxy is not that of a tensor."""

    def middle(self, x: Tensor) -> Tensor:
        return x * self.scale if type(x) is Tensor else x


def test_a_branch_that_the_trace_takes_wrongly_is_found() -> None:
    model = draw(Guesses)
    assert type(fxprune.compile(model, 0.5, example_inputs=image())) is Guesses
    graph = fxprune.compile(model, 0.5, example_inputs=image(), output="graph", verify=False)
    assert any("something else than the model" in note for note in fxprune.report(graph).notes)
    with pytest.raises(fxprune.VerificationError):
        fxprune.verify(graph, masked_for(model, graph), image())


class Sized(Base):
    """Small images take another way, through a layer of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.small = block(64, 64)

    def middle(self, x: Tensor) -> Tensor:
        return self.small(x) if x.shape[-1] < 12 else x


def test_several_examples_are_all_recorded() -> None:
    model = draw(Sized)
    pruned = compiled(model, [image(2, 16), image(2, 8)])
    masked = masked_for(model, pruned)
    assert gap(pruned, masked, image(2, 16)) <= 1e-10
    assert gap(pruned, masked, image(2, 8)) <= 1e-10
    forms = {layer.name: layer.form for layer in fxprune.report(pruned).layers}
    assert forms["small.0"] != "dense"
    alone = compiled(model, image(2, 16))
    reasons = {layer.name: layer.reason for layer in fxprune.report(alone).layers}
    assert reasons["small.0"] == "the traced graph never calls it"
    assert gap(alone, masked_for(model, alone), image(2, 16)) <= 1e-10


def test_what_cannot_be_asked_for_is_said() -> None:
    model = draw(Detector)
    with pytest.raises(fxprune.PlanError, match="output='modul' is not known"):
        fxprune.compile(model, 0.5, example_inputs=image(), output="modul")  # type: ignore[arg-type]
    with pytest.raises(fxprune.TraceError, match="pass example_inputs"):
        fxprune.compile(model, 0.5, output="module")
    with pytest.raises(fxprune.TraceError, match="does not run on example inputs"):
        compiled(draw(Padded), image(2, 18))
    with pytest.raises(fxprune.PassError, match="fold_batch_norm"):
        compiled(model, image(), fold_batch_norm=True)
    with pytest.raises(fxprune.AccelerationError, match="own module"):
        fxprune.accelerate(compiled(model, image()), image())


# --- calibration and training -----------------------------------------------------------------------------------------


def error_of(model: Any, reference: Any, inputs: Any) -> float:
    with torch.no_grad():
        return sum(
            float((a - b).square().mean())
            for a, b in zip(tensors_in(model(inputs)), tensors_in(reference(inputs)), strict=True)
        )


@pytest.mark.parametrize("granularity", ["kernel", "filter"])
@pytest.mark.parametrize("make", [Detector, Padded])
def test_a_refit_helps_and_takes_batches_of_any_size(make: type[nn.Module], granularity: str) -> None:
    model = draw(make)
    batches = [image(5, 16), image(3, 16), image(4, 16)]
    plain = compiled(model, image(), granularity)
    refitted = compiled(model, image(), granularity, calibration=batches)
    assert error_of(refitted, model, image(6, 16)) < error_of(plain, model, image(6, 16))
    assert any(layer.error is not None for layer in fxprune.report(refitted).layers)


class CountsSamples(Base):
    def middle(self, x: Tensor) -> Tensor:
        return torch.stack([sample * (i + 1) for i, sample in enumerate(x)])


def test_a_batch_that_is_taken_apart_must_keep_its_size() -> None:
    model = draw(CountsSamples)
    compiled(model, image(), calibration=[image(4, 16), image(4, 16)])
    with pytest.raises(fxprune.CalibrationError, match="batches of one size"):
        compiled(model, image(), calibration=[image(4, 16), image(3, 16)])


def test_batches_by_name() -> None:
    model = draw(Classifier)
    batches = [{"pixel_values": image(4, 16), "labels": torch.zeros(4)}]
    pruned = compiled(model, {"pixel_values": image()}, calibration=batches)
    assert any(layer.error is not None for layer in fxprune.report(pruned).layers)
    with pytest.raises(fxprune.CalibrationError, match="pixel_values"):
        compiled(model, {"pixel_values": image()}, calibration=[{"pixels": image()}])


def test_a_sparsifier_gives_the_module() -> None:
    model = draw(Detector)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    sparsifier = fxprune.sparsify(model, "one-shot", steps=2, ratio=0.5, optimizer=optimizer, example_inputs=image())
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        sum(level.square().mean() for level in model(image())).backward()
        optimizer.step()
    small = sparsifier.rewrite()
    assert type(small) is Detector
    assert rewritten(small) == 8
    assert gap(small, model, image()) <= 1e-10


class Signal(nn.Module):
    """Over one dimension, with a number that no generated code could hold."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv1d(3, 32, 3, padding=1), nn.BatchNorm1d(32), nn.Conv1d(32, 32, 3, padding=1)
        self.fc, self.plain = nn.Linear(32, 10), torch.rand(32, 1) + 0.5

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.b(self.norm(self.a(x)).relu() * self.plain.to(x.dtype)).mean(2))


def test_recovery_over_one_dimension() -> None:
    model, data = draw(Signal), image(24, 16).mean(3)
    recovered = compiled(model, data[:2], calibration=data, recover={"steps": 40})
    assert rewritten(recovered) == 1
    assert error_of(recovered, model, data) < error_of(compiled(model, data[:2], calibration=data), model, data)


def test_only_layers_that_the_plan_groups_are_told_to_stay_dense() -> None:
    model = draw(Sized)
    plan = fxprune.make_plan(model, 0.5, example_inputs=image(), output="module")
    without = _without(plan, {"b.0": "two orders", "fc": "two orders"})
    assert without.layers.keys() == plan.layers.keys() - {"b.0"}
    assert without.skipped == {**plan.skipped, "b.0": "two orders"}


def test_layers_that_pad_keep_their_class() -> None:
    pruned = compiled(draw(Padded), image())
    layer = pruned.b
    assert isinstance(layer, SamePad)
    assert isinstance(layer, GatheredLayer)
    assert layer.computed_groups > 1
    found: Mapping[str, Any] = {entry.name: entry for entry in fxprune.report(pruned).layers}
    assert found["b"].form in ("partition", "overlap")


def test_recovery_goes_on_where_the_refit_ends() -> None:
    model = draw(Base)
    data = image(24, 16)
    refitted = compiled(model, image(), calibration=data)
    recovered = compiled(model, image(), calibration=data, recover={"steps": 40})
    assert type(recovered) is Base
    assert rewritten(recovered) == rewritten(refitted)
    assert error_of(recovered, model, data) < error_of(refitted, model, data)
