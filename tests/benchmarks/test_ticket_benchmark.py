"""The experiment with lottery tickets: equal counts, the same images for all, paired differences, and going on."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fxprune
from benchmarks import tickets
from benchmarks._ticket_table import DENSE, RANDOM, TRAINED, TRAININGS, Key, differences, means, table, ticket_name
from benchmarks.tickets import Experiment, Setting, check_counts, counts_of, first_alike
from fxprune.plans.masking import kept_entries
from fxprune.training.data.sources import open_data
from fxprune.training.loop import Trainer
from fxprune.training.recipe import Recipe

SHARE = 0.5


@pytest.fixture(scope="module")
def setting() -> Setting:
    """64 digits to train with, two epochs."""
    data = open_data("digits", validation=1300)
    data = replace(data, validation=data.validation[:40])
    recipe = Recipe(epochs=2, batch=32)
    return Setting(
        "digits_resnet", data, recipe, 1, "reset", "filter", ["l1", "movement"], ["none", "pairs-pure"], [SHARE], 64
    )


@pytest.fixture(scope="module")
def experiment(setting: Setting) -> Experiment:
    return Experiment(setting, 0)


@pytest.fixture(scope="module")
def plans(experiment: Experiment) -> dict[str, fxprune.PrunePlan]:
    return experiment.plans(SHARE)


# --- plans ------------------------------------------------------------------------------------------------------------


def test_plans_have_equal_counts_and_differ(plans: dict[str, fxprune.PrunePlan]) -> None:
    assert list(plans) == ["l1", "l1+pairs-pure", "movement", "movement+pairs-pure", RANDOM]
    assert len({json.dumps(counts_of(plan)) for plan in plans.values()}) == 1
    assert len({str(dict(plan.removed)) for plan in plans.values()}) == len(plans)
    assert counts_of(plans["l1"])["layer3.conv2"][0] > 0


def test_unequal_counts_are_refused(setting: Setting, plans: dict[str, fxprune.PrunePlan]) -> None:
    other = fxprune.make_plan(setting.network(0), macs=0.3, granularity="filter", example_inputs=setting.example)
    with pytest.raises(fxprune.PlanError, match=r"\w+: other removes \[\d+, 0\], l1 \[\d+, 0\]; tickets can only be"):
        check_counts({"l1": plans["l1"], "other": other})


def test_the_macs_that_remain(experiment: Experiment, plans: dict[str, fxprune.PrunePlan]) -> None:
    assert experiment.reached(plans[RANDOM]) == pytest.approx(SHARE, rel=0.01)


def test_kernels_have_equal_counts_too(setting: Setting, experiment: Experiment) -> None:
    grouped = copy.copy(experiment)
    grouped.setting = replace(setting, granularity="kernel", varieties=["none"])
    found = grouped.plans(SHARE)
    counts = check_counts(found)
    assert counts
    for name, (_, _, groups, kept) in counts.items():
        assert groups > 1, name
        assert kept < found["l1"].layers[name].in_channels, name
    assert found["l1"].layers["layer2.conv2"].kept != found[RANDOM].layers["layer2.conv2"].kept


def test_equal_plans_are_known(plans: dict[str, fxprune.PrunePlan]) -> None:
    twin = replace(plans["movement"], criterion="twin")
    assert first_alike({**plans, "twin": twin}, "twin") == "movement"
    assert first_alike(plans, "movement+pairs-pure") == "movement+pairs-pure"  # the control
    assert first_alike({}, DENSE) == DENSE


# --- training ---------------------------------------------------------------------------------------------------------


def test_each_training_begins_where_it_says(
    experiment: Experiment, plans: dict[str, fxprune.PrunePlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Early or trained weights under the mask, held there, from the rewound epoch on, at its rates or at the last."""
    seen: list[tuple[Any, int, list[float]]] = []
    train = Trainer.run

    def spy(self: Trainer, *arguments: Any, **options: Any) -> None:
        rates = [self.recipe.learning_rate(step, self.steps) for step in range(self.steps, 2 * self.steps)]
        before = copy.deepcopy(self.model.state_dict())
        train(self, *arguments, **options)
        for name, kept in kept_entries(self.model, plans["l1"]).items():
            assert not self.model.state_dict()[name][~kept].any()
        seen.append((before, self.progress.epoch, rates))
        assert len(self.epochs) == 2  # that of the beginning and one more

    monkeypatch.setattr(Trainer, "run", spy)
    trainings = ("rewound", "rate-rewound", "fine-tuned")
    for training in trainings:
        experiment.accuracy(Key(0, SHARE, "l1", training), plans)
    kept = kept_entries(experiment.dense, plans["l1"])["layer3.conv2.weight"]
    origins = (experiment.early, experiment.dense.state_dict(), experiment.dense.state_dict())
    last = experiment.setting.recipe.learning_rate(3, 2)
    rates = ([experiment.setting.recipe.learning_rate(step, 2) for step in (2, 3)],) * 2 + ([last, last],)
    for (before, end, found), origin, expected in zip(seen, origins, rates, strict=True):
        assert torch.equal(before["layer3.conv2.weight"], torch.where(kept, origin["layer3.conv2.weight"], 0))
        assert end == 2
        assert found == pytest.approx(expected)
    assert not torch.equal(origins[0]["layer3.conv2.weight"], origins[1]["layer3.conv2.weight"])
    assert rates[0] != rates[2]


def test_early_weights_are_those_of_their_epoch(setting: Setting, experiment: Experiment) -> None:
    """Of epoch 0 they are the first ones, from which the dense network of epoch 1 is one epoch away."""
    first = Experiment(replace(setting, rewind_epoch=0), 0)
    fresh = setting.network(0).state_dict()
    assert all(torch.equal(fresh[name], tensor) for name, tensor in first.early.items())
    assert not torch.equal(experiment.early["linear.weight"], first.early["linear.weight"])
    assert torch.equal(experiment.dense.state_dict()["linear.weight"], first.dense.state_dict()["linear.weight"])


def test_a_seed_draws_weights_and_images(setting: Setting) -> None:
    zero, again, one = (setting.training(seed) for seed in (0, 0, 1))
    assert zero.train_count == 64
    assert zero.validation_count == 0
    assert torch.equal(zero.training, again.training)
    assert not torch.equal(zero.training, one.training)
    assert not torch.equal(zero.order(0), one.order(0))
    assert not set(zero.training.tolist()) & set(setting.data.validation.tolist())
    weights = [setting.network(seed).state_dict()["linear.weight"] for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


# --- table ------------------------------------------------------------------------------------------------------------


def invented() -> Iterator[tuple[Key, float]]:
    """Variety gains 1, 2, 3 points in three seeds that are far apart; rewinding 5 in each."""
    for seed, level in enumerate((0.3, 0.5, 0.8)):
        yield Key(seed, 1.0, DENSE, TRAINED), level
        yield Key(seed, SHARE, RANDOM, "rewound"), level
        for training, gain in (("rewound", 0.05), ("rate-rewound", 0.0), ("fine-tuned", 0.0)):
            yield Key(seed, SHARE, "l1", training), level + gain
            yield Key(seed, SHARE, "l1+pairs", training), level + gain + (seed + 1) / 100


def test_differences_are_paired_by_seed() -> None:
    found = {(row.what, row.share): row for row in differences(dict(invented()), ["l1"], ["none", "pairs"])}
    variety = found["l1+pairs rewound - l1 rewound", SHARE]
    assert variety.seeds == 3
    assert variety.difference.value == pytest.approx(0.02)
    # t(0.975, 2) = 4.3027, standard deviation 0.01
    assert variety.difference.half_width == pytest.approx(4.3027 * 0.01 / 3**0.5, rel=1e-4)
    assert not variety.clear
    tuned = found["l1 rewound - l1 fine-tuned", SHARE]
    assert tuned.difference.value == pytest.approx(0.05)
    assert tuned.clear
    over = found["pairs - criterion alone, rewound, mean of 1", None]
    assert over.difference == variety.difference
    alone = means(dict(invented()))[SHARE, "l1", "rewound"]
    assert alone.half_width is not None
    assert alone.half_width > 0.5  # the control: what is not paired is lost in the spread of the seeds


def test_a_seed_without_a_partner_is_left_out() -> None:
    runs = dict(invented())
    del runs[Key(2, SHARE, "l1", "fine-tuned")]
    found = {(row.what, row.share): row for row in differences(runs, ["l1"], ["none"])}
    assert found["l1 rewound - l1 fine-tuned", SHARE].seeds == 2
    assert found["l1 rewound - random rewound", SHARE].seeds == 3


def test_the_table() -> None:
    text = table(dict(invented()), ["l1"], ["none", "pairs"])
    assert f"| {SHARE} | {ticket_name('l1', 'pairs')} |  | 60.33 ±" in text
    assert f"| l1 rewound - l1 fine-tuned | {SHARE} | 3 | +5.00 ± 0.00 | yes |" in text


# --- command line -----------------------------------------------------------------------------------------------------


def run(output: Path, *more: str) -> int:
    arguments = "--data digits --hold-out 1300 --train-images 32 --epochs 1 --batch 32 --criteria l1 --varieties none"
    return tickets.main([*arguments.split(), "--shares", "0.5", "--output", str(output), *more])


def test_what_is_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "record.json"
    assert run(output, "--seeds", "0") == 0
    whole = json.loads(output.read_text())
    assert [row["training"] for row in whole["runs"]] == [TRAINED, "rate-rewound", "rewound", *TRAININGS]
    assert whole["plans"]["0 0.5"]["macs_share"] == pytest.approx(0.5, rel=0.01)
    assert {"environment", "settings", "means", "differences"} <= whole.keys()
    part = {**whole, "runs": whole["runs"][:3]}
    output.write_text(json.dumps(part))
    assert run(output, "--seeds", "0") == 0

    def facts(record: dict[str, Any]) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in record["runs"]]

    assert facts(json.loads(output.read_text())) == facts(whole)
    monkeypatch.setattr(tickets, "Experiment", None)  # the control: nothing is trained
    assert run(output, "--seeds", "0") == 0
    assert "| 1 | dense |" in capsys.readouterr().out
    assert run(output, "--seeds", "0", "--lr", "0.2") == 2
    assert "lr 0.1 there, 0.2 here" in capsys.readouterr().err
    output.write_text("{}")
    assert run(output) == 2
    assert "is no record of tickets" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more,message",
    [
        (("--rewind-epoch", "1"), "must be from 0 to 0, before the last"),
        (("--shares", "0.5,1"), "are no shares of MACs"),
        (("--criteria", "l1,"), "an empty name"),
    ],
)
def test_wrong_options(more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path / "record.json", *more)
    assert message in capsys.readouterr().err


def test_errors_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in (
        (("--train-images", "9999"), "there are 137 training images"),
        (("--criteria", "none"), "criterion"),
    ):
        assert run(tmp_path / "record.json", *more) == 2
        assert message in capsys.readouterr().err
