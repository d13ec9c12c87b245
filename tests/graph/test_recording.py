"""What the recorder writes down, and whether a trace says the same; sizes that follow the batch."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from wild_kinds import TRAPS, Base, Classifier, Detector, Padded, TwoStage, draw, image

from fxprune.channels import analyze_channels
from fxprune.channels.capture import capture, recorded
from fxprune.errors import TraceError
from fxprune.graph.containers import tensors_in
from fxprune.graph.editing import RUN, label
from fxprune.graph.examples import Example, as_examples, as_inputs
from fxprune.graph.recorder import observe
from fxprune.graph.recording import Recording, RunError, record
from fxprune.graph.replaying import SIZES, free_batch
from fxprune.graph.tracing import trace
from fxprune.graph.witness import disagreement

CLASSES: list[Any] = [*TRAPS, Detector, Padded]


def known(layer: nn.Module) -> bool:
    return False


# --- recording --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", CLASSES, ids=[make.__name__ for make in CLASSES])
def test_a_recording_replays_what_was_seen(make: Any) -> None:
    model, x = draw(make), image()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recording = recorded(model, [Example((x,))], modes=("eval",))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    found = recording.module(*Example((x,)).tensors)
    expected = tensors_in(recording.results)
    # The graph shares the buffer that the run had a copy of, and computes in full precision what ran under autocast.
    if make.__name__ not in ("MovingMean", "Autocast"):
        for a, b in zip(found, expected, strict=False):
            assert torch.equal(a, b)


def test_all_runs_are_in_one_graph_and_the_first_counts() -> None:
    recording = recorded(draw(Base), [Example((image(),)), Example((image(3, 12),))])
    assert [mode for _, mode in recording.runs] == ["eval", "eval", "train", "train"]
    assert {node.meta[RUN] for node in recording.module.graph.nodes if node.op == "call_module"} == {0, 1, 2, 3}
    assert [tuple(value.shape) for value in recording.inputs] == [(2, 3, 16, 16)]
    placeholders = [node for node in recording.module.graph.nodes if node.op == "placeholder"]
    assert len(placeholders) == 4


def test_the_batch_of_one_is_taken_twice_where_training_needs_it() -> None:
    class Pooled(Base):
        def forward(self, x: Tensor) -> Any:
            return self.fc(self.c(self.b(self.a(x)).mean((2, 3), keepdim=True)).flatten(1))

    recording = recorded(draw(Pooled), [Example((image(1),))])
    assert [len(example.args[0]) for example, _ in recording.runs] == [1, 2]


def test_what_does_not_run_is_said_and_leaves_nothing() -> None:
    class Needs(Base):
        def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
            if self.training and targets is None:
                raise ValueError("targets, please")
            return super().forward(x)

    recording = recorded(draw(Needs), [Example((image(),))])
    assert recording.modes == ("eval",)
    assert any("targets, please" in note for note in recording.notes)
    assert {node.meta.get(RUN, 0) for node in recording.module.graph.nodes} == {0}
    with pytest.raises(RunError, match=r"does not run on example inputs of shape \(2, 5, 16, 16\)"):
        recorded(draw(Base), [Example((torch.zeros(2, 5, 16, 16),))])


def test_nothing_is_left_patched_and_no_random_number_drawn() -> None:
    call, state = nn.Module.__call__, torch.get_rng_state()

    class Noisy(Base):
        def middle(self, x: Tensor) -> Tensor:
            if x.shape[-1] == 5:
                raise ValueError("five")
            return x + torch.randn_like(x)

    recorded(draw(Noisy), [Example((image(),))])
    with pytest.raises(TraceError):
        recorded(draw(Noisy), [Example((image(2, 5),))])
    assert nn.Module.__call__ is call
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_reads_of_data_are_observed_and_named() -> None:
    recording = recorded(draw(TwoStage), [Example((list(image()),))])
    observed = [node for node in recording.module.graph.nodes if node.target is observe]
    assert observed
    (note,) = (note for note in recording.notes if "looks at data" in note)
    assert "wild_kinds.py:" in note
    assert "wild_kinds.py:" in label(observed[0])


def test_a_layer_that_pads_is_a_plain_one() -> None:
    recording = recorded(draw(Padded), [Example((image(),))])
    assert type(recording.layers.get_submodule("b")) is nn.Conv2d
    called = [str(node.target) for node in recording.module.graph.nodes if node.op == "call_module"]
    assert "b" in called


def test_the_analysis_of_any_model_that_runs_is_printed() -> None:
    for make in CLASSES:
        captured = capture(draw(make), [Example((image(),))], "auto")
        assert "channel space" in str(analyze_channels(captured.module, captured.values))


# --- the two witnesses ------------------------------------------------------------------------------------------------


def test_a_faithful_trace_agrees() -> None:
    model = draw(Base)
    assert disagreement(trace(model, image()), record(model, [Example((image(),))]), known) == ""


class Baked(Base):
    """Takes another way, as another model would, once it is traced."""

    way = 0

    def middle(self, x: Tensor) -> Tensor:
        return (x + 1, x * 2, x)[self.way]


@pytest.mark.parametrize("way", [1, 2])
def test_another_way_is_found(way: int) -> None:
    model = draw(Baked)
    recording = record(model, [Example((image(),))])
    model.way = way
    assert "something else than the model at c.0" in disagreement(trace(model, image()), recording, known)


def test_other_numbers_and_types_are_found() -> None:
    class Pair(Base):
        kind: Any = tuple

        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return {"y": y} if self.kind is dict else (y,)

    model = draw(Pair)
    recording = record(model, [Example((image(),))])
    model.kind = dict
    assert "returns a sequence, the trace a dict" in disagreement(trace(model, image()), recording, known)
    model.kind = tuple
    with torch.no_grad():
        model.fc.bias.add_(1)
    assert "other numbers" in disagreement(trace(model, image()), recording, known)


# --- batches of any size ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Detector, Padded, Base])
def test_a_freed_recording_runs_at_any_batch_size(make: Any) -> None:
    model = draw(make)
    small, large = (recorded(model, [Example((image(size),))], modes=("eval",)) for size in SIZES)
    graph = free_batch(small, large).module
    for batch in (1, 4, 7):
        with torch.no_grad():
            expected = tensors_in(model(image(batch)))
            found = graph(image(batch))
        for a, b in zip(found, expected, strict=False):
            torch.testing.assert_close(a, b)


def test_what_depends_on_the_batch_in_another_way_is_refused() -> None:
    class Divides(Base):
        def middle(self, x: Tensor) -> Tensor:
            return x / (len(x) + 1)

    class Loops(Base):
        def middle(self, x: Tensor) -> Tensor:
            return torch.stack([sample * 2 for sample in x])

    for make, said in ((Divides, "becomes"), (Loops, "other things")):
        small, large = (recorded(draw(make), [Example((image(size),))], modes=("eval",)) for size in SIZES)
        with pytest.raises(TraceError, match=said):
            free_batch(small, large)


# --- inputs -----------------------------------------------------------------------------------------------------------


class Several(nn.Module):
    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0, *, flag: bool = False) -> Tensor:
        return x + y * scale


def test_what_counts_as_one_example_and_what_as_several() -> None:
    x, y = image(), image(3)
    model, single = Several(), Base()
    assert as_examples((x, y), model) == (Example((x, y)),)
    assert len(as_examples([x, y], model)) == 1, "as many tensors as forward needs"
    assert len(as_examples([x, y], single)) == 2
    assert len(as_examples([(x, y), {"x": x, "y": y}], model)) == 2
    assert as_examples([[x, y]], single)[0].args == ([x, y],)
    (named,) = as_examples({"y": y, "x": x, "flag": True}, model)
    assert (named.args, dict(named.kwargs)) == ((x, y), {"flag": True})
    (gap,) = as_examples({"x": x, "y": y, "flag": False, "scale": 2.0}, model)
    assert gap.args == (x, y, 2.0)
    assert as_inputs({"x": x, "y": y}, model) == (x, y)
    with pytest.raises(TraceError, match="'flag' by name only"):
        as_inputs({"x": x, "y": y, "flag": True}, model)
    with pytest.raises(TraceError, match="takes no argument 'z'"):
        as_examples({"x": x, "z": y}, model)


def test_keywords_reach_forward() -> None:
    model = draw(Classifier)
    recording = recorded(model, as_examples({"pixel_values": image(), "hidden": True}, model))
    assert isinstance(recording, Recording)
    assert len(tensors_in(recording.results[0])) == 4
