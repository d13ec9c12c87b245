"""The training loop and its parts: recipe, checkpoint, masks, resuming, and what of a batch each process gets."""

# mypy: disable-error-code="no-untyped-call"

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.plans.masking import kept_entries
from fxprune.training import checkpoints
from fxprune.training.checkpoints import CheckpointError, check_settings, load_checkpoint, save_checkpoint
from fxprune.training.data.sources import Data, open_data
from fxprune.training.loop import Interrupted, Placement, Trainer, TrainingError
from fxprune.training.processes import Group
from fxprune.training.recipe import SCHEDULES, Recipe, RecipeError

RECIPE = Recipe(epochs=3, batch=32, lr=0.05, schedule="cosine")
STEPS = 4  # of an epoch


@pytest.fixture(scope="module")
def data() -> Data:
    """100 digits to train with, the last batch a small one, 60 to validate with."""
    digits = open_data("digits", validation=200)
    return replace(digits, training=digits.training[:100], validation=digits.validation[:60])


def network() -> nn.Sequential:
    """With a BatchNorm and a Dropout, which have a state of their own."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def nothing() -> None:
    """Saves nothing."""


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- recipe -----------------------------------------------------------------------------------------------------------


def torch_schedule(name: str, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The same in torch, stepped after each step."""
    schedulers = torch.optim.lr_scheduler
    if name == "step":
        return schedulers.StepLR(optimizer, steps // 3, gamma=0.1)
    if name == "cosine":
        return schedulers.CosineAnnealingLR(optimizer, steps)
    if name == "onecycle":
        return schedulers.OneCycleLR(optimizer, 0.4, total_steps=steps, cycle_momentum=False)
    return schedulers.ConstantLR(optimizer, factor=1)


def rates_of_torch(name: str, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler = torch_schedule(name, optimizer, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_those_of_torch(name: str) -> None:
    recipe = Recipe(epochs=6, lr=0.4, schedule=name)
    rates = [recipe.learning_rate(step, 20) for step in range(120)]
    assert rates == pytest.approx(rates_of_torch(name, 120), rel=1e-9)
    for other in SCHEDULES.keys() - {name}:  # control: the comparison tells them apart
        assert rates != pytest.approx(rates_of_torch(other, 120), rel=1e-9)


def test_the_recipe_of_the_paper_steps_after_100_and_200_of_300_epochs() -> None:
    recipe = Recipe(epochs=300)
    by_epoch = [recipe.learning_rate(epoch * 7, 7) for epoch in range(300)]
    assert by_epoch[:100] == [0.01] * 100
    assert by_epoch[100:200] == pytest.approx([0.001] * 100)
    assert by_epoch[200:] == pytest.approx([0.0001] * 100)
    assert (recipe.batch, recipe.momentum, recipe.weight_decay) == (64, 0.9, 5e-4)


def test_warmup_rises_linearly_and_the_schedule_begins_after_it() -> None:
    recipe, after = Recipe(epochs=5, lr=0.4, schedule="cosine", warmup=2), Recipe(epochs=3, lr=0.4, schedule="cosine")
    rates = [recipe.learning_rate(step, 10) for step in range(50)]
    assert rates[:20] == pytest.approx([0.02 * (step + 1) for step in range(20)])
    assert rates[20:] == [after.learning_rate(step, 10) for step in range(30)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"lr": math.nan},
        {"batch": 0},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"nesterov": True, "momentum": 0.0},
        {"schedule": "steps"},
        {"warmup": 4},
        {"warmup": 1, "schedule": "onecycle"},
        {"label_smoothing": 1.0},
        {"distill_weight": 1.1},
        {"distill_temperature": 0.0},
    ],
)
def test_recipe_names_what_is_wrong(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=rf"^({'|'.join(wrong)}) is .*; it must be "):
        Recipe(**{"epochs": 3, **wrong})


def by_hand(logits: list[float], label: int, taught: list[float], weight: float, temperature: float) -> float:
    """Loss of one image, formula by formula."""

    def softmax(scores: list[float], divisor: float) -> list[float]:
        powers = [math.exp(score / divisor) for score in scores]
        return [power / sum(powers) for power in powers]

    hard = -math.log(softmax(logits, 1)[label])
    ours, theirs = softmax(logits, temperature), softmax(taught, temperature)
    soft = sum(q * math.log(q / p) for p, q in zip(ours, theirs, strict=True))
    return (1 - weight) * hard + weight * temperature**2 * soft


def test_distillation_against_a_calculation_by_hand() -> None:
    logits, taught, labels = [[1.0, -0.5, 0.2], [0.3, 2.0, -1.0]], [[0.5, 0.1, -2.0], [1.0, 1.5, 0.0]], [2, 1]
    recipe = Recipe(epochs=1, distill_weight=0.3, distill_temperature=4.0)
    found = float(recipe.loss(torch.tensor(logits), torch.tensor(labels), torch.tensor(taught)))
    for weight, temperature, same in ((0.3, 4.0, True), (0.3, 2.0, False), (0.7, 4.0, False)):
        cases = zip(logits, labels, taught, strict=True)
        expected = sum(by_hand(*case, weight, temperature) for case in cases)
        assert (found == pytest.approx(expected, rel=1e-5)) is same


def test_a_perfect_pupil_learns_nothing_from_its_teacher_alone() -> None:
    logits = torch.randn(4, 10, requires_grad=True)
    labels = torch.arange(4)
    Recipe(epochs=1, distill_weight=1.0, distill_temperature=3.0).loss(logits, labels, logits.detach()).backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-6
    before = logits.grad.clone()
    Recipe(epochs=1).loss(logits, labels).backward()  # control; gradients add up
    assert float((logits.grad - before).abs().max()) > 1e-2


# --- loop -------------------------------------------------------------------------------------------------------------


def test_every_image_is_seen_once_an_epoch(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, Tensor]] = []
    read = Data.training_batch

    def watch(self: Data, positions: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        seen.append((epoch, positions))
        return read(self, positions, epoch)

    monkeypatch.setattr(Data, "training_batch", watch)
    Trainer(network(), data, RECIPE).run(nothing)
    assert len(seen) == RECIPE.epochs * STEPS
    for epoch in range(RECIPE.epochs):
        positions = torch.cat([part for number, part in seen if number == epoch])
        assert sorted(positions.tolist()) == list(range(100))


def test_it_learns_and_records(data: Data) -> None:
    trainer = Trainer(network(), data, replace(RECIPE, epochs=10, lr=0.3, nesterov=True), test_each_epoch=True)
    trainer.run(nothing)
    assert [epoch.epoch for epoch in trainer.epochs] == list(range(11))
    first, last = trainer.epochs[1], trainer.epochs[-1]
    assert last.train_loss is not None
    assert first.train_loss is not None
    assert last.train_loss < first.train_loss - 0.2
    assert last.validation_accuracy == trainer.accuracy(data.validation_batches(7))
    assert last.test_accuracy == trainer.accuracy(data.test_batches(50))
    assert last.validation_accuracy is not None
    assert last.validation_accuracy > 0.3
    assert trainer.progress.step == trainer.progress.images == 0


def pruned(data: Data) -> tuple[nn.Module, fxprune.PrunePlan]:
    model = network()
    plan = fxprune.make_plan(model, 0.5, example_inputs=data.plain_batch(torch.arange(2))[0])
    return fxprune.mask(model, plan), plan


def zeros(model: nn.Module, kept: dict[str, Tensor]) -> bool:
    return all(not model.get_parameter(name)[~stays].any() for name, stays in kept.items())


@pytest.mark.parametrize("held", [True, False])
def test_pruned_weights_stay_zero_through_momentum_and_weight_decay(data: Data, held: bool) -> None:
    masked, plan = pruned(data)
    kept = kept_entries(masked, plan)
    assert any(int((~stays).sum()) for stays in kept.values())
    sparsifier = fxprune.hold(masked, plan) if held else None
    Trainer(masked, data, replace(RECIPE, weight_decay=0.1), sparsifier=sparsifier).run(nothing)
    assert zeros(masked, kept) is held  # control: without the mask they revive


def test_pruning_while_it_trains_counts_no_epoch_as_best_before_all_is_pruned(data: Data) -> None:
    model = network()
    recipe = replace(RECIPE, epochs=8)
    sparsifier = fxprune.sparsify(model, "agp", steps=8 * STEPS, ratio=0.5)
    trainer = Trainer(model, data, recipe, sparsifier=sparsifier)
    trainer.run(nothing)
    assert sparsifier.finished
    assert zeros(model, kept_entries(model, sparsifier.plan))
    assert trainer.best is not None
    assert trainer.best.epoch >= 6  # the target is reached at three quarters


def test_the_best_epoch_is_the_first_of_the_best_by_validation(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([0.9, 0.3, 0.6, 0.6, 0.5])  # the first is that of the network before training
    monkeypatch.setattr(Trainer, "accuracy", lambda self, batches: next(accuracies))
    states: list[dict[str, Tensor]] = []
    trainer = Trainer(network(), data, replace(RECIPE, epochs=4))
    trainer.run(lambda: states.append({name: t.clone() for name, t in trainer.model.state_dict().items()}))
    assert trainer.best is not None
    assert (trainer.best.epoch, trainer.best.accuracy) == (2, 0.6)
    assert equal(trainer.best.state, states[2])
    assert not equal(trainer.best.state, states[3])


def test_without_validation_images_nothing_is_best(data: Data) -> None:
    trainer = Trainer(network(), replace(data, validation=data.validation[:0]), RECIPE)
    trainer.run(nothing)
    assert trainer.best is None
    assert trainer.epochs[-1].validation_accuracy is None


def test_autocast_computes_in_bfloat16_and_keeps_weights_in_float32(data: Data) -> None:
    states = []
    for amp, channels_last in ((None, False), ("bf16", False), ("bf16", True)):
        trainer = Trainer(network(), data, RECIPE, placement=Placement(amp=amp, channels_last=channels_last))
        trainer.run(nothing)
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        states.append(trainer.model.state_dict())
    assert not equal(states[0], states[1])
    for name in states[0]:
        torch.testing.assert_close(states[1][name].float(), states[0][name].float(), rtol=0.1, atol=0.05)


def test_a_loss_that_is_not_finite_ends_it_before_weights_are_touched(data: Data) -> None:
    saves: list[int] = []
    trainer = Trainer(network(), data, replace(RECIPE, lr=1e30, schedule="constant"))
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d of epoch 1; lower --lr"):
        trainer.run(lambda: saves.append(trainer.progress.step))
    assert saves == [0]
    assert trainer.progress.step < STEPS


# --- stop and resume --------------------------------------------------------------------------------------------------


def make(data: Data) -> Trainer:
    masked, plan = pruned(data)
    return Trainer(masked, data, RECIPE, seed=3, sparsifier=fxprune.hold(masked, plan), teacher=network())


def stopped_after(trainer: Trainer, steps: int, path: Path) -> None:
    """Train so many steps, and save."""
    asked = iter([False] * (steps - 1) + [True])
    with pytest.raises(Interrupted, match="--resume goes on"):
        trainer.run(lambda: save_checkpoint(path, trainer.state_dict()), stopping=lambda: next(asked))


@pytest.mark.parametrize("steps", [1, STEPS, STEPS + 2, 3 * STEPS])
def test_resumed_training_is_bit_equal(data: Data, tmp_path: Path, steps: int) -> None:
    whole, begun, resumed = make(data), make(data), make(data)
    whole.run(nothing)
    stopped_after(begun, steps, tmp_path / "c.pt")
    torch.rand(7)  # what others draw meanwhile changes nothing
    resumed.load_state_dict(load_checkpoint(tmp_path / "c.pt"))
    resumed.run(nothing)
    assert equal(resumed.model.state_dict(), whole.model.state_dict())
    assert [replace(e, seconds=0) for e in resumed.epochs] == [replace(e, seconds=0) for e in whole.epochs]
    assert resumed.best is not None
    assert whole.best is not None
    assert equal(resumed.best.state, whole.best.state)


def forget(part: str) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        if part == "momentum":
            state["optimizer"]["state"] = {}
        elif part == "step":
            state["progress"]["step"] = 0
        else:
            state["model"]["1.running_mean"].zero_()

    return change


@pytest.mark.parametrize("part", ["momentum", "step", "statistics"])
def test_control_what_is_forgotten_changes_the_result(data: Data, tmp_path: Path, part: str) -> None:
    whole, begun, resumed = make(data), make(data), make(data)
    whole.run(nothing)
    stopped_after(begun, STEPS + 2, tmp_path / "c.pt")
    state = load_checkpoint(tmp_path / "c.pt")
    forget(part)(state)
    resumed.load_state_dict(state)
    resumed.run(nothing)
    assert not equal(resumed.model.state_dict(), whole.model.state_dict())


# --- checkpoint -------------------------------------------------------------------------------------------------------

CONTENT = {"a": torch.arange(6.0).reshape(2, 3), "b": [1, 2.5, None, {"c": torch.ones(2, dtype=torch.bool)}]}


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.pt", CONTENT)
    found = load_checkpoint(tmp_path / "c.pt")
    assert torch.equal(found["a"], torch.arange(6.0).reshape(2, 3))
    assert found["b"][:3] == [1, 2.5, None]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("write failed")])
def test_on_a_full_disk_the_old_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save_checkpoint(tmp_path / "c.pt", CONTENT)

    def full(content: object, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        CheckpointError, match=r"c\.pt: cannot be written: .*the file of before is untouched; make room"
    ):
        save_checkpoint(tmp_path / "c.pt", {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]
    assert "b" in load_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize("left", [0, 10, 0.5, -1])
def test_a_truncated_checkpoint_is_known(tmp_path: Path, left: float) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, CONTENT)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left * len(whole)) if left == 0.5 else int(left)])
    with pytest.raises(CheckpointError, match=r"c\.pt: truncated, or no checkpoint of a training; start again"):
        load_checkpoint(path)


def test_an_altered_or_foreign_checkpoint_is_known(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, CONTENT)
    whole = torch.load(path, weights_only=True)
    whole["content"]["a"][0, 0] = 1
    torch.save(whole, path)
    with pytest.raises(CheckpointError, match="altered, its checksum"):
        load_checkpoint(path)
    torch.save({"format": checkpoints.FORMAT, "version": 99}, path)
    with pytest.raises(CheckpointError, match="has version 99"):
        load_checkpoint(path)
    torch.save({"weight": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="no checkpoint of a training"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path / "absent.pt")


def test_differing_settings_are_named() -> None:
    check_settings(Path("c.pt"), {"lr": 0.1, "seed": 0}, {"lr": 0.1, "seed": 0})
    with pytest.raises(CheckpointError, match=r"other settings: lr 0\.1 there, 0\.2 here; new None there, 1 here;"):
        check_settings(Path("c.pt"), {"lr": 0.1, "seed": 0}, {"lr": 0.2, "seed": 0, "new": 1})


# --- shares of a batch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 4, 64])
def test_shares_cover_a_batch_once(size: int, count: int) -> None:
    positions = torch.randperm(100)[:count]
    shares = [Group(rank, size).share(positions) for rank in range(size)]
    assert torch.equal(torch.cat([mine for mine, counts in shares if counts]), positions)
    assert all(len(mine) for mine, _ in shares)  # everyone has something to run


@pytest.mark.parametrize("count", [7, 1])
def test_averaged_gradients_of_shares_are_those_of_the_batch(data: Data, count: int) -> None:
    """What the loop does in each of three processes, one after the other."""
    model, recipe, size = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), RECIPE, 3
    positions = torch.arange(count)

    def gradient(mine: Tensor, factor: float) -> Tensor:
        images, labels = data.plain_batch(mine)
        (recipe.loss(model(images), labels) * factor).backward()
        found = model.get_parameter("1.weight").grad
        assert found is not None
        model.zero_grad()
        return found.clone()

    expected = gradient(positions, 1 / count)
    shares = [Group(rank, size).share(positions) for rank in range(size)]
    averaged = sum((gradient(mine, counts * size / count) for mine, counts in shares), torch.zeros(())) / size
    naive = sum((gradient(mine, 1 / len(mine)) for mine, _ in shares), torch.zeros(())) / size
    torch.testing.assert_close(averaged, expected, rtol=1e-5, atol=1e-7)
    if count > 1:  # control: means of uneven shares are another gradient
        assert float((naive - expected).abs().max()) > 1e-3
