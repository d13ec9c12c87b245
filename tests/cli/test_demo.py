"""The demo: one short run, and the checks that it makes."""

import copy
import json
from pathlib import Path

import pytest
import torch

import fxprune
from fxprune.cli import demo


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> demo.DemoResult:
    return demo.run(tmp_path_factory.mktemp("demo"), epochs=3, finetune_epochs=1, repeats=2)


def test_the_rows_are_the_five_networks(result: demo.DemoResult) -> None:
    assert [row.name for row in result.rows] == ["dense", "masked", "compiled", "refitted", "fine-tuned"]


def test_the_dense_network_learns(result: demo.DemoResult) -> None:
    assert result.rows[0].accuracy > 0.9


def test_compiled_agrees_with_masked(result: demo.DemoResult) -> None:
    _, masked, compiled, *_ = result.rows
    assert compiled.accuracy == masked.accuracy
    assert result.agreeing == result.test_images == 450
    assert result.difference < 1e-4


def test_fine_tuning_recovers(result: demo.DemoResult) -> None:
    dense, masked, *_, finetuned = result.rows
    assert finetuned.accuracy > masked.accuracy
    assert finetuned.accuracy > dense.accuracy - 0.05


def test_the_compiled_network_is_smaller(result: demo.DemoResult) -> None:
    dense, masked, compiled, refitted, finetuned = result.rows
    assert compiled.params < 0.6 * dense.params
    assert compiled.macs < 0.6 * dense.macs
    assert (masked.params, masked.macs) == (dense.params, dense.macs)
    assert (refitted.params, refitted.macs) == (compiled.params, compiled.macs)
    assert (finetuned.params, finetuned.macs) == (compiled.params, compiled.macs)


def test_the_refit_keeps_what_masking_loses_and_says_how_much(result: demo.DemoResult) -> None:
    dense, masked, _, refitted, _ = result.rows
    assert refitted.accuracy > masked.accuracy + 0.1
    assert refitted.accuracy > dense.accuracy - 0.1
    assert result.agreement.startswith("agreement with the dense network on 32 held-out inputs: ")
    assert result.agreement in str(result)


def test_the_costs_are_those_of_the_network(result: demo.DemoResult) -> None:
    assert result.rows[0].params == sum(parameter.numel() for parameter in demo.DigitNet().parameters())
    # 3x3 convolutions at 8x8, 4x4 and 2x2 pixels, two strided 1x1 shortcuts, and the classifier
    stage1 = 64 * 9 * (16 + 2 * 16 * 16)
    stage2 = 16 * (9 * (16 * 32 + 32 * 32) + 16 * 32)
    stage3 = 4 * (9 * (32 * 64 + 64 * 64) + 32 * 64)
    assert result.rows[0].macs == stage1 + stage2 + stage3 + 64 * 10


def test_both_files_are_written_and_compared(result: demo.DemoResult) -> None:
    assert result.torchscript.is_file()
    assert result.saved.is_file()
    assert result.torchscript_difference < 1e-5
    assert result.saved_difference == 0


def test_the_table_names_every_row(result: demo.DemoResult) -> None:
    text = str(result)
    assert all(f"{row.accuracy:.2%}" in text and f"{row.params:,}" in text for row in result.rows)


def test_the_result_fits_json(result: demo.DemoResult) -> None:
    document = json.loads(json.dumps(result.to_dict()))
    assert document["rows"][2]["name"] == "compiled"
    assert Path(document["torchscript"]).is_file()


def test_the_split_is_fixed_and_disjoint() -> None:
    first, second = demo.digits(), demo.digits()
    assert first.train_images.shape == (1347, 1, 8, 8)
    assert first.test_images.shape == (450, 1, 8, 8)
    assert torch.equal(first.test_images, second.test_images)
    assert 0 <= first.train_images.min() < first.train_images.max() <= 1


def test_a_file_that_computes_something_else_is_refused() -> None:
    images = demo.digits().test_images[:8]
    network = demo.DigitNet().eval()
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
    demo.run(tmp_path, epochs=1, finetune_epochs=0, repeats=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
