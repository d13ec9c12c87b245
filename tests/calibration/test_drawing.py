"""Minibatches from calibration data: what is held out, what comes together, and that nothing is left out."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fxprune import CalibrationError
from fxprune.calibration.augmentation import AUGMENTATIONS, augmented, crop, flip
from fxprune.calibration.drawing import Drawing


def numbered(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float32)[:, None]


def drawing(batches: list[Any], seed: int = 0, largest: int = 8, parts: int = 1) -> Drawing:
    return Drawing(batches, seed, largest, 2, parts)


def test_a_tenth_is_held_out_and_all_others_are_drawn_once_an_epoch() -> None:
    drawn = drawing([(part,) for part in torch.split(numbered(43), 10)])
    held = [value for batch, count in drawn.held_out() for value in batch[0].flatten().tolist()]
    assert len(held) == drawn.held == 4
    for epoch in range(2):
        steps = range(epoch * drawn.steps_per_epoch, (epoch + 1) * drawn.steps_per_epoch)
        batches = [drawn.minibatch(step)[0].flatten().tolist() for step in steps]
        assert {len(batch) for batch in batches} <= {7, 8}
        assert sorted([value for batch in batches for value in batch] + held) == list(range(43))
    assert drawn.minibatch(0)[0].tolist() != drawn.minibatch(drawn.steps_per_epoch)[0].tolist()


def test_a_minibatch_depends_on_seed_and_step_alone() -> None:
    first, second = drawing([(numbered(40),)]), drawing([(numbered(40),)])
    expected = [first.minibatch(step)[0] for step in range(12)]
    assert all(torch.equal(second.minibatch(step)[0], expected[step]) for step in reversed(range(12)))
    assert not torch.equal(drawing([(numbered(40),)], seed=1).minibatch(0)[0], expected[0])


def test_few_samples_come_in_smaller_minibatches() -> None:
    assert drawing([(numbered(40),)], largest=64, parts=6).minibatch(0)[0].shape == (6, 1)
    assert drawing([(numbered(4),)], largest=64, parts=14).minibatch(0)[0].shape == (2, 1)


def test_samples_of_one_shape_and_one_flag_come_together() -> None:
    batches = [(torch.zeros(6, 3), {"y": torch.zeros(6)}, flag) for flag in (1, 1, 2)] + [
        (torch.ones(6, 4), {"y": torch.ones(6)}, 1)
    ]
    drawn = drawing(batches, largest=16)
    seen = [drawn.minibatch(step) for step in range(drawn.steps_per_epoch)]
    for x, named, flag in seen:
        assert len(x) == len(named["y"])
        assert flag == 1 or x.shape[1] == 3
        assert torch.equal(x[:, 0], named["y"])
    assert max(len(x) for x, _, _ in seen) > 6  # control: two batches did come together
    assert sum(len(x) for x, _, _ in seen) == drawn.drawn == 22


def test_a_batch_whose_tensors_disagree_stays_whole() -> None:
    batches = [(torch.zeros(4, 3), torch.zeros(2, 2)) for _ in range(3)]
    drawn = drawing(batches)
    assert (drawn.drawn, drawn.held) == (2, 1)
    assert [tensor.shape for tensor in drawn.minibatch(0)] == [(4, 3), (2, 2)]


def test_one_sample_is_not_enough() -> None:
    with pytest.raises(CalibrationError, match="the calibration data holds one sample"):
        drawing([(numbered(1),)])


# --- augmentation ---------------------------------------------------------------------------------------------------


def test_flip_mirrors_some_and_crop_shifts_by_up_to_an_eighth() -> None:
    x = torch.rand(64, 3, 16, 32) + 1
    flipped = flip(x)
    same = [torch.equal(a, b) for a, b in zip(flipped, x, strict=True)]
    assert 10 < sum(same) < 54
    assert all(unchanged or torch.equal(a, b.flip(2)) for unchanged, a, b in zip(same, flipped, x, strict=True))
    shifted = crop(x)
    assert shifted.shape == x.shape
    empty = [((image == 0).all(0).all(1).sum(), (image == 0).all(0).all(0).sum()) for image in shifted]
    assert max(int(rows) for rows, _ in empty) == 2
    assert max(int(columns) for _, columns in empty) == 4


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_seed_decides_and_nobody_else_notices(name: str) -> None:
    x = torch.rand(8, 3, 16, 16)
    torch.manual_seed(5)
    (first,) = augmented((x,), name, 1)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(augmented((x,), name, 1)[0], first)
    assert not torch.equal(augmented((x,), name, 2)[0], first)
    assert augmented((x,), None, 1)[0] is x
