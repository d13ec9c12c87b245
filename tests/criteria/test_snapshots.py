"""Snapshots: every form in which one is given, and what is said of a wrong one."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fxprune.criteria.snapshots import load_snapshots
from fxprune.errors import PlanError, StorageError
from fxprune.files import read_state_dict


def net(seed: int = 0, channels: int = 4) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.Sequential(nn.Conv2d(channels, 4, 1, bias=False))
        )


def earlier() -> dict[str, Tensor]:
    return dict(net(seed=1).state_dict())


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


FORMS: dict[str, Callable[[Path], Any]] = {
    "dict": lambda _: earlier(),
    "OrderedDict": lambda _: OrderedDict(earlier()),
    "module": lambda _: net(seed=1),
    "data parallel": lambda _: nn.DataParallel(net(seed=1)),
    "wrapped": lambda _: {"model_state_dict": earlier(), "epoch": 3},
    "path": lambda folder: saved(folder / "state.pt", earlier()),
    "str": lambda folder: str(saved(folder / "state.pt", earlier())),
    "file, wrapped": lambda folder: saved(folder / "state.pt", {"state_dict": earlier(), "epoch": 3}),
    "file, of a training script": lambda folder: saved(
        folder / "state.pt", {"model_state_dict": earlier(), "loss": torch.tensor(0.5)}
    ),
    "file, data parallel": lambda folder: saved(
        folder / "state.pt", {"state_dict": {f"module.{key}": value for key, value in earlier().items()}}
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_weights_of_the_convolutions(form: str, tmp_path: Path) -> None:
    (loaded,) = load_snapshots([FORMS[form](tmp_path)], net())
    assert loaded.keys() == {"0.weight", "2.0.weight"}
    for key, value in loaded.items():
        assert torch.equal(value, earlier()[key])
        assert not value.requires_grad


def test_the_order_is_kept_and_any_iterable_will_do() -> None:
    states = [net(seed=seed).state_dict() for seed in (3, 1, 2)]
    loaded = load_snapshots(iter(states), net())
    assert all(torch.equal(a["0.weight"], b["0.weight"]) for a, b in zip(loaded, states, strict=True))


def test_a_snapshot_may_be_of_another_type_and_lack_what_is_no_convolution() -> None:
    state = {key: value.half() for key, value in earlier().items() if key in ("0.weight", "2.0.weight")}
    (loaded,) = load_snapshots([state], net())
    assert loaded["0.weight"].dtype == torch.float16


def test_a_model_that_is_data_parallel_or_has_a_module_of_that_name() -> None:
    model = nn.ModuleDict({"module": net()})
    (loaded,) = load_snapshots([nn.ModuleDict({"module": net(seed=1)})], model)
    assert loaded.keys() == {"module.0.weight", "module.2.0.weight"}


def test_weights_that_are_computed_are_not_asked_for() -> None:
    def parametrized(seed: int) -> nn.Module:
        model = net(seed)
        parametrizations.weight_norm(model[0])  # type: ignore[index]
        return model

    (loaded,) = load_snapshots([parametrized(1)], parametrized(0))
    assert loaded.keys() == {"2.0.weight"}


def changed(**entries: Tensor | None) -> dict[str, Tensor]:
    """An earlier state with some entries replaced or, where None, removed; `_` stands for a dot."""
    state = earlier()
    for name, value in entries.items():
        key = name.removeprefix("at_").replace("_", ".")
        if value is None:
            del state[key]
        else:
            state[key] = value
    return state


@pytest.mark.parametrize(
    "snapshot,message",
    [
        (changed(at_0_weight=None), r"snapshot 1 has no '0.weight', which the model has .*'2.0.weight'.*same model"),
        (
            net(channels=5),
            r"snapshot 1: '0.weight' has shape \(5, 3, 3, 3\), in the model \(4, 3, 3, 3\); pass earlier",
        ),
        (changed(at_0_weight=torch.full((4, 3, 3, 3), torch.nan)), r"snapshot 1: '0.weight' holds NaN or infinity"),
        (changed(at_2_0_weight=torch.full((4, 4, 1, 1), torch.inf)), r"snapshot 1: '2.0.weight' holds NaN"),
        (changed(at_0_weight=torch.empty(4, 3, 3, 3, device="meta")), r"snapshot 1: '0.weight' is on the meta device"),
        ({"epoch": 3}, r"snapshot 1 is a dict that holds no state dict; pass model.state_dict\(\)"),
        (7, r"snapshot 1 is a int that holds no state dict"),
        (None, r"snapshot 1 is a NoneType that holds no state dict"),
        ("nowhere/epoch.pt", r"snapshot 1: nowhere/epoch.pt: cannot be read: No such file"),
    ],
)
def test_a_wrong_snapshot_is_named(snapshot: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        load_snapshots([earlier(), snapshot], net())


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut short"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(PlanError, match=r"snapshot 0: .*state.pt: not a file of tensors"):
        load_snapshots([tmp_path / "state.pt"], net())


def test_a_file_with_code_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"holds a pickled torch"):
        load_snapshots([saved(tmp_path / "model.pt", net(seed=1))], net())
    with pytest.raises(StorageError):
        read_state_dict(tmp_path / "model.pt")


def test_a_file_is_named_with_the_wrong_key(tmp_path: Path) -> None:
    path = saved(tmp_path / "epoch_3.pt", changed(at_0_weight=None))
    with pytest.raises(PlanError, match=r"snapshot 0 \(.*epoch_3.pt\) has no '0.weight'"):
        load_snapshots([path], net())


@pytest.mark.parametrize(
    "snapshots,what",
    [(earlier(), "dict"), ("epoch_3.pt", "str"), (Path("epoch_3.pt"), r"\w*Path"), (net(), "Sequential"), (5, "int")],
)
def test_a_snapshot_that_is_no_list_is_refused(snapshots: Any, what: str) -> None:
    with pytest.raises(PlanError, match=rf"snapshots is a {what}; pass a list of earlier states"):
        load_snapshots(snapshots, net())


def test_no_snapshot_is_refused() -> None:
    with pytest.raises(PlanError, match="snapshots is empty; pass at least one"):
        load_snapshots([], net())


def test_a_state_dict_that_follows_the_model_is_refused() -> None:
    model = net()
    for alias in (model.state_dict(), model):
        with pytest.raises(PlanError, match=r"snapshot 0 shares '0.weight' with the model.*copy.deepcopy"):
            load_snapshots([alias], model)
    assert load_snapshots([copy.deepcopy(model.state_dict())], model)


def test_the_model_is_not_changed() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    load_snapshots([earlier()], model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
