"""Calibration data: every form in which they are given, and a clear word about what cannot be used."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fxprune.calibration.batches import BATCH_SIZE, read_batches
from fxprune.errors import CalibrationError


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(count))


def loader(data: Tensor, batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(data, torch.arange(len(data))), batch_size)


def in_turn(data: Tensor) -> Iterator[Tensor]:
    yield from torch.split(data, 4)


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda data: data,
    "loader with labels": loader,
    "list of tensors": lambda data: list(torch.split(data, 4)),
    "tuple of tensors": lambda data: torch.split(data, 4),
    "generator": in_turn,
    "tuples with labels": lambda data: [(part, torch.zeros(len(part))) for part in torch.split(data, 4)],
    "lists with names": lambda data: [[part, "cat"] for part in torch.split(data, 4)],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_all_images_and_no_labels(form: str) -> None:
    data = images()
    batches = read_batches(FORMS[form](data))
    assert all(isinstance(batch, tuple) and len(batch) == 1 for batch in batches)
    assert torch.equal(torch.cat([batch[0] for batch in batches]), data)


def test_a_tensor_is_split_into_batches() -> None:
    sizes = [len(image) for (image,) in read_batches(images(2 * BATCH_SIZE + 1))]
    assert sizes == [BATCH_SIZE, BATCH_SIZE, 1]


def test_tensors_are_neither_copied_nor_changed() -> None:
    data, other = images(), images(6) + 1
    before, versions = data.clone(), (data._version, other._version)
    ((first, second),) = read_batches([(data, other, torch.zeros(6))], arguments=2)
    assert first is data
    assert second is other
    (part,) = read_batches(data)[0]
    assert part.untyped_storage().data_ptr() == data.untyped_storage().data_ptr()
    assert (data._version, other._version) == versions
    assert torch.equal(data, before)


def test_several_arguments_are_taken_in_order_and_need_not_be_tensors() -> None:
    data = images()
    assert read_batches([(data, 3, "mode", "label")], arguments=3) == [(data, 3, "mode")]
    nested = (data, [data, data])
    assert read_batches([nested], arguments=2) == [nested]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float64])
def test_every_type_of_number_passes_unchanged(dtype: torch.dtype) -> None:
    data = images().to(dtype)
    ((read,),) = read_batches(data)
    assert read.dtype == dtype
    assert torch.equal(read, data)


def test_batches_may_differ_in_size() -> None:
    parts = [torch.ones(2, 3, 4, 4), torch.ones(1, 3, 8, 8)]
    assert [tuple(part.shape) for (part,) in read_batches(parts)] == [(2, 3, 4, 4), (1, 3, 8, 8)]


def broken(value: float, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    data = images().to(dtype)
    data[-1, -1, -1, -1] = value
    return [images(), data]


@pytest.mark.parametrize(
    "calibration, arguments, message",
    [
        ([], 1, "calibration holds no batch; pass at least one"),
        (iter(()), 1, "holds no batch.*an iterator can be read only once"),
        (torch.zeros(0, 3, 4, 4), 1, r"batch 0 is empty: its shape is \(0, 3, 4, 4\)"),
        ([images(), torch.zeros(2, 3, 0, 4)], 1, r"batch 1 is empty: its shape is \(2, 3, 0, 4\)"),
        ([(images(), torch.zeros(0))], 2, "batch 0 is empty"),
        (torch.zeros(5), 1, r"a tensor of shape \(5,\); the first dimension must count samples"),
        (torch.tensor(1.0), 1, r"a tensor of shape \(\)"),
        ("images.pt", 1, "calibration is a str; it must be a tensor or an iterable of batches"),
        (b"images", 1, "calibration is a bytes"),
        (None, 1, "calibration is a NoneType"),
        (3, 1, "calibration is a int"),
        ({"image": images()}, 1, "calibration is a dict"),
        ([{"image": images()}], 1, "calibration batch 0 is a dict; it must be a tensor, or a tuple"),
        ([images(), "labels"], 1, "calibration batch 1 is a str"),
        ([None], 1, "calibration batch 0 is a NoneType"),
        (np.ones((2, 3, 4, 4)), 1, "calibration batch 0 is a ndarray"),
        ([[1.0, 2.0]], 1, "calibration batch 0 holds no tensor; it must be a tensor, or a tuple that begins with one"),
        ([("cat", images())], 1, "calibration batch 0 holds no tensor"),
        ([images()], 2, "batch 0 has 1 entries, but forward takes 2 arguments"),
        ([(images(), images()), (images(),)], 2, "batch 1 has 1 entries, but forward takes 2"),
        ([()], 1, "batch 0 has 0 entries"),
        (broken(float("nan")), 1, "batch 1 holds NaN or infinity; drop or repair these samples"),
        (broken(float("inf")), 1, "batch 1 holds NaN or infinity"),
        (broken(float("-inf"), torch.bfloat16), 1, "batch 1 holds NaN or infinity"),
        ([(images(), [broken(float("nan"))[1]])], 2, "batch 0 holds NaN or infinity"),
    ],
)
def test_what_cannot_be_used_is_named(calibration: Any, arguments: int, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        read_batches(calibration, arguments)


def test_labels_may_be_anything() -> None:
    data = images()
    assert read_batches([(data, torch.tensor([float("nan")]), None, torch.zeros(0))]) == [(data,)]


def test_an_error_of_the_users_own_data_is_not_hidden() -> None:
    def failing() -> Iterator[Tensor]:
        yield images()
        raise OSError("disk is gone")

    with pytest.raises(OSError, match="disk is gone"):
        read_batches(failing())


def test_an_iterator_is_read_once() -> None:
    batches = in_turn(images())
    assert len(read_batches(batches)) == 2
    with pytest.raises(CalibrationError, match="an iterator can be read only once"):
        read_batches(batches)


@pytest.mark.parametrize(
    "batch", [{"pixel_values": 0, "labels": 1}, {"labels": 1, "image": 0}], ids=["hugging face", "monai"]
)
def test_batches_as_other_libraries_give_them(batch: dict[str, int]) -> None:
    parts = (torch.randn(2, 3, 4, 4), torch.zeros(2))
    named = {key: parts[which] for key, which in batch.items()}
    (read,) = read_batches([named], 1, ("x",))
    assert len(read) == 1
    assert read[0] is parts[0]


@pytest.mark.parametrize(
    "batch, names",
    [
        ({"pixel_values": torch.zeros(2, 3), "image": torch.zeros(2, 3)}, ("x",)),
        ({"pixel_values": torch.zeros(2, 3)}, ("x", "mask")),
        ({"input_ids": torch.zeros(2, 3)}, ("x",)),
    ],
    ids=["two pictures", "two arguments", "no pictures"],
)
def test_control_what_is_not_plain_is_asked(batch: dict[str, Tensor], names: tuple[str, ...]) -> None:
    with pytest.raises(CalibrationError, match="but forward takes 'x'; rename the entry"):
        read_batches([batch], len(names), names)


def test_their_own_name_comes_first() -> None:
    own, other = torch.zeros(2, 3), torch.ones(2, 3)
    (read,) = read_batches([{"image": other, "x": own}], 1, ("x",))
    assert read[0] is own
