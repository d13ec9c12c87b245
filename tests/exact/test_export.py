"""Leaving the graph: scripted, exported, converted, compiled, copied, saved, cast and trained, it stays the same."""
# Functions of torch.jit and torch.onnx are untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from equality import MasksPerSample, assert_same_function, masked_by_hand, randomize
from products_harness import fewer
from torch import Tensor, fx, nn
from zoo import CASES

import fxprune
from fxprune.errors import FxpruneError
from fxprune.exports import save_onnx
from fxprune.graph.layers import ChannelGather

# One of each kind of operator that a format may refuse: a residual stream, slices, concatenations, a shuffle by view,
# permuted layer norms, gates, a flag that follows the mode, a module called twice, a named item.
NETS = (
    "ResidualAdd",
    "C2f",
    "DenseBlock",
    "ShuffleNetUnit",
    "ConvNeXtBlock",
    "SqueezeExcite",
    "FunctionalDropout",
    "SharedConvTwoInputs",
    "MaxoutValues",
)
FEW = ("ResidualAdd", "ShuffleNetUnit", "FunctionalDropout")
# In single precision a change of the order of sums shows in the last bits.
CLOSE = 1e-4

each_net = pytest.mark.parametrize("name", NETS)
few_nets = pytest.mark.parametrize("name", FEW)


@cache
def _made(name: str) -> tuple[nn.Module, fx.GraphModule]:
    (case,) = [case for case in CASES if case.name == name]
    model = randomize(case.build()).eval()
    return model, fxprune.compile(model, form="overlap", example_inputs=image())


def dense(name: str) -> nn.Module:
    return copy.deepcopy(_made(name)[0])


def compiled(name: str) -> fx.GraphModule:
    """A net of the zoo in overlap form, where every convolution is read through a gather."""
    pruned = copy.deepcopy(_made(name)[1])
    assert sum(isinstance(m, ChannelGather) for m in pruned.modules()) >= 1
    assert sum(isinstance(m, nn.Conv2d) and m.groups > 1 for m in pruned.modules()) >= 1
    return pruned


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def run(model: Any, x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        result = model(image() if x is None else x)
    assert isinstance(result, Tensor)
    return result


def check(actual: Any, expected: nn.Module, batches: tuple[int, ...] = (2, 5)) -> None:
    for batch in batches:
        torch.testing.assert_close(run(actual, image(batch)), run(expected, image(batch)), rtol=CLOSE, atol=CLOSE)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """torch.compile keeps what it compiled for the whole process, up to a limit."""
    yield
    torch.compiler.reset()


@contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters say of deprecated parts of their own."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def spoiled(pruned: fx.GraphModule) -> fx.GraphModule:
    """The same with the index of its first gather reversed: what a check must not accept."""
    gather = next(m for m in pruned.modules() if isinstance(m, ChannelGather))
    gather.index.copy_(gather.index.flip(0))
    return pruned


@each_net
def test_a_wrong_gather_would_be_seen(name: str) -> None:
    check(compiled(name), compiled(name))
    with pytest.raises(AssertionError):
        check(spoiled(compiled(name)), compiled(name))


# --- TorchScript ----------------------------------------------------------------------------------------------------


@each_net
def test_script_save_load_freeze(name: str, tmp_path: Path) -> None:
    pruned = compiled(name)
    torch.jit.script(pruned).save(str(tmp_path / "net.pt"))
    loaded = torch.jit.load(str(tmp_path / "net.pt"))
    check(loaded, pruned)
    check(torch.jit.freeze(loaded.eval()), pruned)


@few_nets
def test_trace_of_torchscript(name: str) -> None:
    pruned = compiled(name)
    check(torch.jit.trace(pruned, (image(),)), pruned)


def test_script_follows_the_mode() -> None:
    scripted = torch.jit.script(compiled("FunctionalDropout"))
    assert torch.equal(run(scripted), run(scripted))
    scripted.train()
    assert not torch.equal(run(scripted), run(scripted))
    scripted.eval()
    check(scripted, compiled("FunctionalDropout"))


# --- torch.export, ONNX, torch.compile ------------------------------------------------------------------------------


@each_net
def test_export_with_dynamic_batch(name: str, tmp_path: Path) -> None:
    pruned = compiled(name)
    shapes = ({0: torch.export.Dim("batch")},)
    with quiet():
        program = torch.export.export(pruned, (image(3),), dynamic_shapes=shapes)
        torch.export.save(program, tmp_path / "net.pt2")
        loaded = torch.export.load(tmp_path / "net.pt2")
    check(loaded.module(), pruned, (2, 3, 5))


@pytest.mark.parametrize("name", fewer(FEW, FEW[1:2]))
def test_onnx_with_dynamic_batch(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pruned = compiled(name)
    with quiet():
        torch.onnx.export(
            pruned,
            (image(3),),
            str(tmp_path / "net.onnx"),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
    operators = Counter(node.op_type for node in onnx.load(str(tmp_path / "net.onnx")).graph.node)
    convs = sum(
        n.op == "call_module" and isinstance(pruned.get_submodule(str(n.target)), nn.Conv2d) for n in pruned.graph.nodes
    )
    gathers = sum(
        n.op == "call_module" and isinstance(pruned.get_submodule(str(n.target)), ChannelGather)
        for n in pruned.graph.nodes
    )
    assert operators["Conv"] == convs
    assert operators["Gather"] >= gathers > 0
    assert operators["GatherND"] == operators["Dropout"] == 0
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])

    def net(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])

    check(net, pruned)


@pytest.mark.parametrize("given", ["a tensor", "a tuple", "by name"])
@pytest.mark.parametrize("count", [1, 3])
def test_saved_onnx_takes_any_number_of_images(given: str, count: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pruned, x = compiled(FEW[0]), image(count)
    inputs: dict[str, Any] = {
        "a tensor": x,
        "a tuple": (x,),
        "by name": {next(iter(inspect.signature(pruned.forward).parameters)): x},
    }
    save_onnx(pruned, inputs[given], tmp_path / "net.onnx")
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", *x.shape[1:]]

    def net(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])

    check(net, pruned)


def test_what_onnx_cannot_express_is_said(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")

    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(FxpruneError, match=r"cannot express Branching \(.*data-dependent.*\); torch\.export"):
        save_onnx(Branching(), image(), tmp_path / "net.onnx")


@few_nets
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile(name: str, backend: str) -> None:
    pruned = compiled(name)
    with quiet():
        check(torch.compile(pruned, backend=backend, fullgraph=True, dynamic=False), pruned, (2,))


# --- copies, state ----------------------------------------------------------------------------------------------


@each_net
def test_deepcopy(name: str) -> None:
    pruned = compiled(name)
    twin = copy.deepcopy(pruned)
    assert torch.equal(run(twin), run(pruned))
    assert fxprune.report(twin) == fxprune.report(pruned)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not torch.equal(run(twin), run(pruned))


@each_net
def test_state_dict_into_a_second_compilation(name: str) -> None:
    model = dense(name)
    first = compiled(name)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.mul_(1.25)
    state = pickle.loads(pickle.dumps(first.state_dict()))
    second = fxprune.compile(model, form="overlap", example_inputs=image(), verify=False)
    assert list(second.state_dict()) == list(state)
    assert not torch.equal(run(second), run(first))
    second.load_state_dict(state, strict=True)
    assert torch.equal(run(second), run(first))


def test_pickle_of_the_module() -> None:
    pruned = compiled("ResidualAdd")
    assert torch.equal(run(pickle.loads(pickle.dumps(pruned))), run(pruned))


@few_nets
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_cast(name: str, dtype: torch.dtype) -> None:
    pruned = compiled(name).to(dtype)
    assert {t.dtype for t in pruned.parameters()} == {dtype}
    assert {m.index.dtype for m in pruned.modules() if isinstance(m, ChannelGather)} == {torch.int64}
    result = run(pruned, image().to(dtype))
    assert result.dtype == dtype
    scale = float(run(compiled(name)).abs().max())
    assert float((result.float() - run(compiled(name))).abs().max()) < 0.05 * scale
    assert float((run(spoiled(compiled(name))) - run(compiled(name))).abs().max()) > 0.05 * scale


@pytest.mark.cuda
@each_net
def test_cuda(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pruned = compiled(name).double()
    there = copy.deepcopy(pruned).cuda()
    assert {t.device.type for t in (*there.parameters(), *there.buffers())} == {"cuda"}
    x = image().double()
    torch.testing.assert_close(run(there, x.cuda()).cpu(), run(pruned, x), rtol=1e-9, atol=1e-9)
    model = dense(name).double().cuda()
    made_there = fxprune.compile(model, form="overlap", example_inputs=x.cuda())
    assert {t.device.type for t in (*made_there.parameters(), *made_there.buffers())} == {"cuda"}
    torch.testing.assert_close(run(made_there, x.cuda()).cpu(), run(pruned, x), rtol=1e-6, atol=1e-6)


# --- training -------------------------------------------------------------------------------------------------------


def step(model: nn.Module, x: Tensor) -> None:
    """One step of gradient descent towards zero, with dropout masks that do not depend on the order of channels."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(0)
    with MasksPerSample():
        model.train()(x).square().mean().backward()
    optimizer.step()
    model.eval()


@each_net
def test_gradients_reach_every_parameter(name: str) -> None:
    pruned = compiled(name)
    before = compiled(name).state_dict()
    step(pruned, image())
    assert {n for n, p in pruned.named_parameters() if p.grad is not None} == {
        n for n, _ in dense(name).named_parameters()
    }
    weights = {n: p for n, p in pruned.named_parameters() if p.dim() > 1}  # a bias before BatchNorm has no effect
    assert weights
    assert all(bool(p.grad is not None and p.grad.any()) for p in weights.values())
    assert all(not torch.equal(parameter, before[n]) for n, parameter in weights.items())


@each_net
def test_a_training_step_is_that_of_the_masked_model(name: str) -> None:
    model = dense(name).double()
    plan = fxprune.make_plan(model, form="overlap")
    pruned = fxprune.compile(model, form="overlap", example_inputs=image().double())
    masked = masked_by_hand(model, plan)
    untrained = copy.deepcopy(masked)
    step(pruned, image().double())
    step(masked, image().double())
    assert_same_function(pruned, masked_by_hand(masked, plan), (image().double(),))
    with pytest.raises(AssertionError):
        assert_same_function(pruned, untrained, (image().double(),))
