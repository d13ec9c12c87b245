"""The demo: one short run, and the checks that it makes."""

import copy
import json
from pathlib import Path

import pytest
import torch

import fxprune
from fxprune.cli import demo
from fxprune.cli.program import read

WIDTH = 16


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> demo.DemoResult:
    return demo.run(
        tmp_path_factory.mktemp("demo"),
        epochs=3,
        finetune_epochs=1,
        recover_seconds=2,
        rounds=2,
        width=WIDTH,
        ratio=0.5,
    )


def test_the_rows_are_the_five_networks(result: demo.DemoResult) -> None:
    names = ["dense", "pruned alone", "calibrated", "recovered", "fine-tuned"]
    assert [row.name for row in result.rows] == names
    assert [row.labels for row in result.rows] == [False, False, False, False, True]


def test_the_dense_network_learns(result: demo.DemoResult) -> None:
    assert result.rows[0].accuracy > 0.9


def test_compiled_agrees_with_masked(result: demo.DemoResult) -> None:
    assert result.agreeing == result.test_images == 450
    assert result.difference < 1e-4


def test_each_step_keeps_what_pruning_alone_loses(result: demo.DemoResult) -> None:
    dense, pruned, calibrated, recovered, finetuned = result.rows
    assert calibrated.accuracy > pruned.accuracy + 0.1
    assert calibrated.accuracy > dense.accuracy - 0.1
    assert recovered.accuracy > dense.accuracy - 0.1
    assert finetuned.accuracy > dense.accuracy - 0.05
    assert result.agreement.startswith("agreement with the dense network on 32 held-out calibration inputs: ")
    assert result.agreement in str(result)


def test_the_costs_are_those_of_the_network(result: demo.DemoResult) -> None:
    dense, *small = result.rows
    assert dense.params == sum(parameter.numel() for parameter in demo.DigitNet(WIDTH).parameters())
    # 3x3 convolutions at 8x8, 4x4 and 2x2 pixels, two strided 1x1 shortcuts, and the classifier
    stage1 = 64 * 9 * (16 + 2 * 16 * 16)
    stage2 = 16 * (9 * (16 * 32 + 32 * 32) + 16 * 32)
    stage3 = 4 * (9 * (32 * 64 + 64 * 64) + 32 * 64)
    assert dense.macs == stage1 + stage2 + stage3 + 64 * 10
    for row in small:
        assert (row.params, row.macs) == (small[0].params, small[0].macs)
        assert row.params < 0.6 * dense.params
        assert row.macs < 0.6 * dense.macs


def test_every_network_has_a_time_in_every_runtime(result: demo.DemoResult) -> None:
    runtimes = ["eager", "accelerated", *(["ONNX Runtime"] if "ONNX" in result.written else [])]
    for row in result.rows:
        assert list(row.milliseconds) == runtimes
        assert all(milliseconds > 0 for milliseconds in row.milliseconds.values())


def test_the_files_are_written_and_compared(result: demo.DemoResult) -> None:
    assert result.written.keys() == result.differences.keys()
    assert {path.name for path in result.written.values()} <= {"model.pt", "model.onnx"}
    assert all(path.is_file() for path in result.written.values())
    assert result.differences["fxprune"] == 0
    assert max(result.differences.values()) < 1e-4
    folder = result.written["fxprune"].parent
    assert {path.name for path in folder.iterdir()} == {path.name for path in result.written.values()}, "nothing else"


def test_it_ends_with_one_sentence_and_the_next_command(result: demo.DemoResult) -> None:
    text = str(result)
    assert all(f"{row.accuracy:.2%}" in text and f"{row.params:,}" in text for row in result.rows)
    *_, sentence, following = text.splitlines()
    assert sentence.startswith(str(list(result.written.values())[-1]))
    assert sentence.endswith("no labels used")
    assert following == f"next: {demo.NEXT}"
    read(demo.NEXT.split()[1:])  # which ends the process if it is no command


@pytest.mark.parametrize(
    "accuracy, milliseconds, said",
    [
        (0.974, 10.0, "x.pt: 2.0x faster (eager), 1.6 points lost, no labels used"),
        (0.995, 25.0, "x.pt: 1.2x slower (eager), no accuracy lost, no labels used"),
    ],
)
def test_the_sentence_is_honest(accuracy: float, milliseconds: float, said: str) -> None:
    dense = demo.Row("dense", False, 0.99, 9, 9, {"eager": 20.0})
    recovered = demo.Row("recovered", False, accuracy, 5, 5, {"eager": milliseconds})
    tuned = demo.Row("fine-tuned", True, 1.0, 5, 5, {"eager": 1.0})
    result = demo.DemoResult((dense, recovered, tuned), "", 0.0, 1, 1, {"fxprune": Path("x.pt")}, {}, 1.0)
    assert result.brief() == said


def test_the_result_fits_json(result: demo.DemoResult) -> None:
    document = json.loads(json.dumps(result.to_dict()))
    assert document["rows"][2]["name"] == "calibrated"
    assert Path(document["written"]["fxprune"]).is_file()


def test_the_split_is_fixed_and_disjoint() -> None:
    first, second = demo.digits(), demo.digits()
    assert first.train_images.shape == (1347, 1, 8, 8)
    assert first.test_images.shape == (450, 1, 8, 8)
    assert torch.equal(first.test_images, second.test_images)
    assert 0 <= first.train_images.min() < first.train_images.max() <= 1


def test_a_file_that_computes_something_else_is_refused() -> None:
    images = demo.digits().test_images[:8]
    network = demo.DigitNet(WIDTH).eval()
    expected = demo._logits(network, images)
    assert demo._same("same", network, images, expected) == 0
    other = copy.deepcopy(network)
    torch.nn.init.normal_(other.classifier.weight)
    with pytest.raises(fxprune.VerificationError, match="other: logits differ"):
        demo._same("other", other, images, expected)
    torch.nn.init.constant_(other.classifier.weight, float("nan"))
    with pytest.raises(fxprune.VerificationError, match="logits differ"):
        demo._same("other", other, images, expected)


def test_what_is_global_is_left_alone(tmp_path: Path) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    demo.run(tmp_path, epochs=1, finetune_epochs=0, recover_seconds=0.1, rounds=1, width=WIDTH, ratio=0.5, onnx=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
