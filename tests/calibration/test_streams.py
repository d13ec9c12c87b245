"""Calibration data that come from a loader or a generator and are more than memory is to hold."""
# nn.Module.__call__ is typed to return Any; each net would need a cast.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from equality import randomize
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune
import fxprune.calibration.batches
from fxprune.calibration.agreement import hold_out
from fxprune.calibration.batches import Batch, read_batches
from fxprune.calibration.lockstep import Lockstep
from fxprune.calibration.mapped import is_mapped, mapped
from fxprune.errors import CalibrationError
from fxprune.graph.containers import tensors_in
from fxprune.graph.tracing import trace

IMAGES = torch.randn(48, 3, 10, 10, generator=torch.Generator().manual_seed(0))
EIGHT = IMAGES[:8].numel() * 4
"""Bytes of a batch."""


def generator() -> Iterator[Tensor]:
    for batch in IMAGES.split(8):
        yield batch.clone()


def loader() -> Iterable[Any]:
    return DataLoader(TensorDataset(IMAGES, torch.zeros(48)), batch_size=8)


def in_memory(batches: Iterable[Batch]) -> int:
    tensors = [tensor for batch in batches for tensor in tensors_in(batch)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if not is_mapped(tensor))


def net(inplace: bool = False) -> nn.Module:
    torch.manual_seed(0)
    first: list[nn.Module] = [nn.ReLU(inplace=True)] if inplace else []
    layers = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
    model = nn.Sequential(*first, *layers, nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return randomize(model).eval()


@pytest.mark.parametrize("source", [generator, loader])
def test_what_exceeds_memory_is_kept_in_files(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_memory(read_batches(source())) == 6 * EIGHT
    monkeypatch.setattr(fxprune.calibration.batches, "MEMORY", 2 * EIGHT)
    batches = read_batches(source())
    assert in_memory(batches) == 2 * EIGHT
    assert torch.equal(torch.cat([batch[0] for batch in batches]), IMAGES)
    parts = hold_out(batches)
    assert parts is not None
    assert in_memory([*parts[0], *parts[1]]) <= 2 * EIGHT  # copies of the rest would be more
    # What is in memory anyway stays where it is.
    assert in_memory(read_batches(list(generator()))) == 6 * EIGHT
    assert read_batches(IMAGES)[1][0].data_ptr() == IMAGES[32:].data_ptr()


@pytest.mark.parametrize("inplace", [False, True])
def test_two_networks_in_step_hold_no_copies_of_the_images_unless_they_write_into_them(inplace: bool) -> None:
    model = net(inplace)
    batches = read_batches(generator())
    dense, pruned = (trace(model, (IMAGES[:2],)).module for _ in range(2))
    with torch.no_grad(), Lockstep(dense, pruned, batches) as networks:
        values = [value for pair in networks.samples for sample in pair for value in sample.values.values()]
        own = {value.data_ptr() for value in values}
    assert own.isdisjoint({batch[0].data_ptr() for batch in batches}) is inplace
    assert torch.equal(torch.cat([batch[0] for batch in batches]), IMAGES)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.filterwarnings("ignore::fxprune.PoorAgreementWarning")
def test_a_stream_gives_the_network_that_a_list_gives(inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(inplace)
    expected = fxprune.compile(model, macs=0.7, calibration=list(generator()))
    other = fxprune.compile(model, macs=0.7, calibration=[2 * batch for batch in generator()])
    monkeypatch.setattr(fxprune.calibration.batches, "MEMORY", EIGHT)
    found = fxprune.compile(model, macs=0.7, calibration=generator())
    states = [list(network.state_dict().values()) for network in (expected, found, other)]
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(states[0], states[2], strict=True))


def test_a_disk_that_cannot_hold_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def full(file: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.raises(CalibrationError, match=r"cannot hold 9600 more bytes.*TMPDIR"):
        mapped(IMAGES[:8])
    assert not list(tmp_path.iterdir())
