"""Operators that move channels, once some of these are gone: kept, corrected, replaced by a gather, or refused."""
# mypy: disable-error-code="no-any-return, no-untyped-call"

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from removal_harness import Subject, check_removal, image, prepared, subject
from torch import Tensor, nn

from fxprune.channels import analyze_channels, compaction, removal
from fxprune.channels.compaction import Compaction, StuckError, shorten
from fxprune.channels.units import Chosen
from fxprune.graph.layers import ChannelGather


class Net(nn.Module):
    """Convolution 3 -> 8, a movement, convolution -> 4."""

    def __init__(self, movement: Callable[[Tensor], Tensor], inner: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(inner, 4, 1)
        self.movement = movement

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.movement(self.a(x)))


def found_in(movement: Callable[[Tensor], Tensor], inner: int = 8) -> Subject:
    return subject(prepared(Net(movement, inner)), image())


def without(found: Subject, *channels: int) -> Chosen:
    """The choice that removes these filters of `a`."""
    goes: Chosen = np.zeros(found.units.count, dtype=np.bool_)
    goes[found.units.layers["a"].writes[list(channels)]] = True
    return goes


def shuffle(x: Tensor) -> Tensor:
    return x.view(2, 2, 4, 4, 4).transpose(1, 2).reshape(2, 8, 4, 4)


def middle(x: Tensor) -> Tensor:
    return torch.cat([x[:, 2:6], x[:, :2], x[:, 6:]], 1)


BALANCED, UNEVEN = (1, 3, 5, 7), (0, 1, 2, 4)

CASES = {
    "dynamic view": (lambda x: x.view(x.shape[0], x.shape[1], -1).unflatten(2, (4, 4)), UNEVEN, [], 0),
    "constant view": (lambda x: x.view(2, 8, 16).unflatten(2, (4, 4)), UNEVEN, ["view"], 0),
    "list of sizes": (lambda x: torch.reshape(x, [2, 8, 4, 4]), UNEVEN, ["reshape"], 0),
    "expanded": (lambda x: x.mean((2, 3), keepdim=True).expand(2, 8, 4, 4), UNEVEN, ["expand"], 0),
    "padding": (lambda x: F.pad(x, (0, 0, 0, 0, 3, 0))[:, :8] + F.pad(x[:, 5:], (0, 0, 0, 0, 3, 2)), None, None, None),
    "shuffle, balanced": (shuffle, BALANCED, ["view"], 0),
    "shuffle, uneven": (shuffle, UNEVEN, ["reshape"], 1),
    "slices": (middle, UNEVEN, None, None),
    "roll": (lambda x: torch.roll(x, 3, 1), (1, 4, 6), None, 1),
    "flip": (lambda x: x.flip(1), UNEVEN, [], 0),
}


@pytest.mark.parametrize("name", CASES)
def test_movements_are_mended(name: str) -> None:
    movement, channels, changed, gathers = CASES[name]
    found = found_in(movement)
    goes = without(found, *channels) if channels is not None else without(found, *found_free(found))
    gm = check_removal(found, goes)
    if gathers is not None:
        assert sum(isinstance(module, ChannelGather) for module in gm.modules()) == gathers
    if changed == []:
        assert [n.name for n in gm.graph.nodes] == [n.name for n in found.traced.module.graph.nodes]


def found_free(found: Subject) -> list[int]:
    """A filter of `a` that can go, if one can."""
    return np.flatnonzero(found.units.layers["a"].writes >= 0).tolist()[:1]


@pytest.mark.parametrize("movement, channels", [(middle, UNEVEN), (shuffle, BALANCED)])
def test_control_a_movement_that_keeps_its_constants_is_seen(
    movement: Callable[[Tensor], Tensor], channels: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = found_in(movement)
    check_removal(found, without(found, *channels))
    monkeypatch.setattr(compaction, "_equal", lambda *_: True)
    with pytest.raises((AssertionError, RuntimeError)):
        check_removal(found, without(found, *channels))


def test_a_view_that_is_computed_with_can_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def spread(x: Tensor) -> Tensor:
        return x.view(2, 2, 4, 4, 4).relu().flatten(1, 2)

    assert "relu gives channels in a form that cannot lose some" in found_in(spread).units.fixed["a"]
    monkeypatch.setattr(removal, "_stuck", lambda *_: None)  # control: without the trial they would be offered
    found = found_in(spread)
    with pytest.raises(StuckError, match="relu gives channels in a form") as caught:
        check_removal(found, without(found, *UNEVEN))
    assert caught.value.node.name == "relu"


def test_a_copy_does_not_replace_memory_that_is_written_later() -> None:
    def written(x: Tensor) -> Tensor:
        y = x.view(2, 2, 4, 4, 4).transpose(1, 2).flatten(1, 2)
        x.mul_(2)
        return y

    found = found_in(written)
    assert found.units.fixed["a"].endswith("cannot lose some of its channels alone")


def test_zeros_of_a_padding_are_no_channel() -> None:
    """One image of one pixel: every channel is one number, and the zeros could be taken for the first."""

    def padded(x: Tensor) -> Tensor:
        return torch.roll(F.pad(x.mean((0, 2, 3), keepdim=True), (0, 0, 0, 0, 1, 1)), 3, 1)

    found = found_in(padded, 10)
    check_removal(found, without(found, 1, 2, 5))


def test_what_stays_is_a_rectangle_or_nothing() -> None:
    found = found_in(lambda x: x.view(2, 2, 4, 4, 4).flatten(1, 2))
    analysis = analyze_channels(found.traced.module, found.traced.values)
    atoms = torch.from_numpy(next(port.atoms for port in analysis.ports if port.kind == "writes"))
    for channels, expected in (((0, 4), {1: [1, 2, 3]}), ((0, 1, 2, 3), {0: [1]}), ((0,), None), ((), {})):
        gone = np.zeros(len(analysis.blocks.classes), dtype=np.bool_)
        gone[atoms[list(channels)].numpy()] = True
        gone = np.isin(analysis.blocks.classes, analysis.blocks.classes[gone])
        kept = Compaction(found.traced.module, found.traced.values, analysis, gone).keep(atoms.reshape(2, 4))
        assert (None if kept is None else {d: positions.tolist() for d, positions in kept.items()}) == expected


def test_shorten_leaves_a_dimension_of_size_one() -> None:
    keep = {0: torch.tensor([1, 2]), 1: torch.tensor([0])}
    assert shorten(torch.arange(3).reshape(3, 1), keep).tolist() == [[1], [2]]
    assert shorten(torch.ones(1, 2), keep).shape == (1, 1)
