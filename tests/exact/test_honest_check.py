"""The check compares what there is to compare, raises no false alarm, and says how it was made."""

import collections
import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from products_harness import in_turns
from torch import Tensor, fx, nn

import fxprune
from fxprune import VerificationError, verify
from fxprune.exact.precision import in_double, in_own
from fxprune.exact.verification import evaluate
from fxprune.graph.examples import Example
from fxprune.vocabulary import Granularity

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 16, 1)

    def run(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(self.b(self.a(x).relu()).relu())
        return y


# --- outputs of any container -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Data:
    logits: Tensor
    features: Tensor


class ModelOutput(collections.OrderedDict[str, Any]):
    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Entries(dict[str, Any]):
    pass


CONTAINERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dataclass": Data,
    "model output": lambda a, b: ModelOutput(logits=a, features=b),
    "subclass of dict": lambda a, b: Entries(logits=a, features=b),
    "dict": lambda a, b: {"logits": a, "features": b},
    "nested": lambda a, b: ModelOutput(all=[Data(a, b)], none=None),
}


class Returns(Base):
    def __init__(self, container: str) -> None:
        super().__init__()
        self.container = container

    def forward(self, x: Tensor) -> Any:
        features = self.b(self.a(x).relu())  # read outside: its channels keep their order and number
        return CONTAINERS[self.container](self.c(features.relu()), features)


def parts(output: Any) -> list[Tensor]:
    from fxprune.graph.containers import tensors_in

    return tensors_in(output)


@pytest.mark.parametrize("container, granularity", in_turns(CONTAINERS, ["kernel", "filter"]))
def test_outputs_keep_type_order_and_number(container: str, granularity: Granularity) -> None:
    model = Returns(container).eval()
    pruned = fxprune.compile(model, 0.5, example_inputs=X, granularity=granularity)
    masked = fxprune.mask(model, pruned.meta["fxprune"].plan)
    found, expected = pruned(X), masked(X)
    assert type(found) is type(expected)
    assert [t.shape for t in parts(found)] == [t.shape for t in parts(expected)]
    for left, right in zip(parts(found), parts(expected), strict=True):
        torch.testing.assert_close(left, right)
    assert len(parts(found)) == 2


@pytest.mark.parametrize("container", CONTAINERS)
def test_control_a_permuted_part_is_seen(container: str) -> None:
    model = Returns(container).eval()
    pruned = fxprune.compile(model, 0.5, example_inputs=X)
    masked = fxprune.mask(model, pruned.meta["fxprune"].plan)
    verify(pruned, masked, X)
    with torch.no_grad():
        masked.b.weight.copy_(masked.b.weight.flip(0))  # type: ignore[operator, union-attr]
        masked.c.weight.copy_(masked.c.weight.flip(1))  # type: ignore[operator, union-attr]
        masked.b.bias.copy_(masked.b.bias.flip(0))  # type: ignore[operator, union-attr]
    with pytest.raises(VerificationError, match="differ in eval mode"):
        verify(pruned, masked, X)


def test_a_check_that_compares_nothing_is_an_error() -> None:
    class Counts(Base):
        def forward(self, x: Tensor) -> int:
            self.run(x)
            return 3

    with pytest.raises(VerificationError, match="a int, holds no tensor, so nothing can be compared"):
        verify(Counts(), Counts(), X)


def test_another_class_of_output_is_seen() -> None:
    model = Returns("model output").eval()
    other = Returns("model output").eval()
    other.load_state_dict(model.state_dict())
    other.container = "dict"
    with pytest.raises(VerificationError, match="returns a dict, the masked model a ModelOutput"):
        verify(other, model, X)


# --- branches ---------------------------------------------------------------------------------------------------------


class AsksForTensors(Base):
    def forward(self, x: Any) -> Tensor:
        if isinstance(x, Tensor) and torch.is_tensor(x):
            x = (x - 0.5) / 0.25
        y = self.a(x).relu()
        width: Any = y.shape[1]
        if not isinstance(y, Tensor) or isinstance(width, Tensor) or isinstance(y, nn.Parameter):
            y = y * 0
        if isinstance(self.b.weight, Tensor):
            y = y + 1
        z: Tensor = self.c(self.b(y).relu())
        return z


@pytest.mark.parametrize("example", [X, None], ids=["with example", "without"])
def test_the_branch_that_the_model_takes(example: Tensor | None) -> None:
    model = AsksForTensors().eval()
    pruned = fxprune.compile(model, 0.5, example_inputs=example)
    masked = fxprune.mask(model, pruned.meta["fxprune"].plan)
    torch.testing.assert_close(pruned(X), masked(X))
    assert isinstance(masked, AsksForTensors)
    assert not torch.allclose(masked(X), masked.run(X))  # control: the other branch gives something else


# --- casts ------------------------------------------------------------------------------------------------------------


class FromBytes(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x.float() / 255)


class To32(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x.to(torch.float32))


class Type32(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x.type(torch.float32))


class SoftmaxIn32(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x).float().softmax(1).to(x.dtype)


class SoftmaxOf32(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.run(x), 1, dtype=torch.float32)


class MakesTensors(Base):
    def forward(self, x: Tensor) -> Tensor:
        grid = torch.linspace(0, 1, x.shape[-1], dtype=torch.float32) + torch.tensor(0.1)
        return self.run(x + grid + torch.zeros(x.shape[-1]))


class Grid(nn.Module):
    """A cache in a plain attribute, which moves nowhere with the model."""

    def __init__(self) -> None:
        super().__init__()
        self.grid = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        if self.grid.shape[-1] != x.shape[-1]:
            self.grid = torch.arange(x.shape[-1], dtype=x.dtype, device=x.device)
        return x + self.grid


class KeepsAGrid(Base):
    def __init__(self) -> None:
        super().__init__()
        self.grid = Grid()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.grid(self.run(x))
        return y


BYTES = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CASTS: list[tuple[type[Base], Tensor]] = [
    (FromBytes, BYTES), (FromBytes, X), (To32, X), (Type32, X), (SoftmaxIn32, X), (SoftmaxOf32, X), (MakesTensors, X),
    (KeepsAGrid, X),
]  # fmt: skip


@pytest.mark.parametrize("kind, x", CASTS, ids=[f"{kind.__name__}-{x.dtype}" for kind, x in CASTS])
def test_casts_are_followed(kind: type[Base], x: Tensor) -> None:
    model = kind().eval()
    pruned = fxprune.compile(model, 0.5, example_inputs=x)
    check = verify(pruned, fxprune.mask(model, pruned.meta["fxprune"].plan), x)
    assert check.precision == "float64"
    assert check.max_rel < 1e-12
    model(x)  # a use of the model, which may leave something behind, changes nothing
    fxprune.compile(model, 0.5, example_inputs=x)


@pytest.mark.parametrize("kind, x", CASTS, ids=[f"{kind.__name__}-{x.dtype}" for kind, x in CASTS])
def test_control_a_small_difference_behind_a_cast_is_seen(kind: type[Base], x: Tensor) -> None:
    model = kind().eval()
    pruned = fxprune.compile(model, 0.5, example_inputs=x)
    masked = fxprune.mask(model, pruned.meta["fxprune"].plan)
    with torch.no_grad():
        pruned.get_parameter("b.weight").mul_(1 + 1e-5)
    with pytest.raises(VerificationError, match="differ in eval mode"):
        verify(pruned, masked, x)


class OnlyIn32(Base):
    """Refuses to run in any other type."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.run(x)
        if torch.finfo(y.dtype).bits != 32:
            raise TypeError("float32 only")
        return y


def test_the_models_own_precision_where_float64_is_impossible() -> None:
    model = nn.Sequential(OnlyIn32()).eval()
    check = verify(fxprune.mask(model, fxprune.PrunePlan({})), model, X)
    assert check.precision == "float32"
    assert "float32 only" in check.notes[0]
    assert ", in float32: largest" in str(check)
    other = OnlyIn32().eval()
    other.load_state_dict(model[0].state_dict())
    verify(nn.Sequential(other), model, X)
    with torch.no_grad():
        other.b.weight.mul_(1 + 1e-3)  # control: far above rounding
    with pytest.raises(VerificationError, match="differ in eval mode"):
        verify(nn.Sequential(other), model, X)


@pytest.mark.parametrize("precision", [in_double, in_own])
def test_a_run_changes_neither_model_nor_inputs_nor_random_numbers(precision: Any) -> None:
    class Writes(Base):
        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)
            return self.run(x) + torch.rand(())

    model, x = Writes(), X.clone()
    state = torch.get_rng_state()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    first = evaluate(model, Example((x,)), "train", precision)
    again = evaluate(model, Example((x,)), "train", precision)
    assert torch.equal(x, X)
    assert torch.equal(first.tensors[0], again.tensors[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.get_default_dtype() == torch.float32


# --- batches of one ---------------------------------------------------------------------------------------------------


class ViewsOne(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x).view(1, 16, -1).mean(2)


class FlattensAll(Base):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.flatten(self.run(x)))
        return y


class NormOfOne(Base):
    """Batch statistics of one sample of one position do not exist."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.run(x).mean((2, 3), keepdim=True))
        return y


@pytest.mark.parametrize("kind", [ViewsOne, FlattensAll, NormOfOne])
def test_a_batch_of_one_is_checked_as_given(kind: type[Base]) -> None:
    x = X[:1]
    model = kind().eval()
    pruned = fxprune.compile(model, 0.5, example_inputs=x)
    check = verify(pruned, fxprune.mask(model, pruned.meta["fxprune"].plan), x)
    assert check.modes == ("eval", "train")
    assert check.max_rel < 1e-12


def test_a_mode_that_does_not_run_is_said_to_be_unchecked() -> None:
    class OneOnly(NormOfOne):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(1, 3, 12, 12))

    model = OneOnly().eval()
    check = fxprune.verify(model, model, X[:1])
    assert check.modes == ("eval",)
    assert "train mode was not compared" in check.notes[0]
    with pytest.raises(VerificationError, match="does not run on the example inputs in train mode"):
        fxprune.verify(model, model, X[:1], modes=("train",))


def test_inputs_that_do_not_fit_are_told_apart_from_a_defect() -> None:
    with pytest.raises(VerificationError, match="the masked model does not run on the example inputs in eval mode"):
        verify(To32(), To32(), torch.zeros(2, 5, 8, 8))


def test_dropout_behind_a_crop_is_alive() -> None:
    class Crops(Base):
        def forward(self, x: Tensor) -> Tensor:
            h, w = x.shape[-2:]
            y = nn.functional.dropout(self.a(nn.functional.pad(x, (2, 2, 2, 2))).relu(), 0.5, self.training)
            return self.c(self.b(y))[..., : h - 2, : w - 2]

    pruned = fxprune.compile(Crops(), 0.5, example_inputs=X)
    assert not torch.equal(pruned.train()(X), pruned(X))
    assert torch.equal(pruned.eval()(X), pruned(X))
    assert not fxprune.report(pruned).notes


def test_hooks_on_containers_are_told() -> None:
    seen: list[Tensor] = []
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(32, 32, 3)), nn.Conv2d(32, 16, 1))
    model[1].register_forward_hook(lambda _, __, y: seen.append(y))
    notes = fxprune.report(fxprune.compile(model.eval(), 0.5, example_inputs=X, output="graph")).notes
    assert any("hooks ran once" in note and note.endswith(": 1") for note in notes)


def test_control_a_graph_that_loses_state_is_seen() -> None:
    class Counts(Base):
        def __init__(self) -> None:
            super().__init__()
            self.calls: Tensor
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.run(x)

    model = Counts().eval()
    pruned = fxprune.compile(model, 0.5, example_inputs=X)
    masked = fxprune.mask(model, pruned.meta["fxprune"].plan)
    verify(pruned, masked, X)
    for node in pruned.graph.find_nodes(op="call_method", target="add_"):
        pruned.graph.erase_node(node)
    pruned.recompile()
    with pytest.raises(VerificationError, match="calls"):
        verify(pruned, masked, X)
    assert not any(node.target is operator.iadd for node in fx.symbolic_trace(Base().a).graph.nodes)
