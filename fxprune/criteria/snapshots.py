"""Earlier states of a model in training, read and checked before anything is planned from them."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import PlanError, StorageError, near_matches
from fxprune.files import read_state_dict, unwrap, without_prefix
from fxprune.graph.convolutions import Convolution, convolutions, oriented

Snapshot = Mapping[str, Any] | nn.Module | str | Path


def load_snapshots(snapshots: Iterable[Snapshot], model: nn.Module) -> tuple[Mapping[str, Tensor], ...]:
    """Read earlier training states of a model and see that each has every convolution of it.

    Args:
        snapshots: in the order of training, at least one; each a state dict, a module, or the path of a file that
            `torch.load(weights_only=True)` opens. A state dict may lie under `"state_dict"` or `"model_state_dict"`,
            and the prefix `module.` of `nn.DataParallel` is removed.
        model: the model as trained, on any device. It is only read.

    Returns:
        for each snapshot the weights of the convolutions, `"<module name>.weight"` to a tensor `(O, C, *kernel)`,
        detached, in the type and on the device in which it came (files: on the CPU).

    Raises:
        PlanError: there is no snapshot, or one cannot be read, belongs to another model, holds NaN or infinity, or
            shares its memory with the model; the message names it by position and path.
    """
    names = model.state_dict().keys()  # without the weights that a parametrization computes
    convs = {
        key: conv
        for name, conv in convolutions(model).items()
        if (key := f"{name}.weight" if name else "weight") in names
    }
    loaded = tuple(
        _checked(f"snapshot {index}{_path_of(snapshot)}", state_of(f"snapshot {index}", snapshot), convs, names)
        for index, snapshot in enumerate(listed(snapshots))
    )
    if not loaded:
        raise PlanError("snapshots is empty; pass at least one earlier state of the model, such as a checkpoint's path")
    return loaded


def listed(snapshots: Iterable[Snapshot]) -> tuple[Snapshot, ...]:
    """What a user passes as `snapshots=`, read once.

    Raises:
        PlanError: it is a single state, or nothing that can be read.
    """
    if isinstance(snapshots, Mapping | nn.Module | str | os.PathLike) or not isinstance(snapshots, Iterable):
        raise PlanError(
            f"snapshots is a {type(snapshots).__name__}; pass a list of earlier states, also for one: snapshots=[...]"
        )
    return tuple(snapshots)


def _path_of(snapshot: Snapshot) -> str:
    return f" ({os.fspath(snapshot)})" if isinstance(snapshot, str | os.PathLike) else ""


def state_of(what: str, snapshot: Snapshot) -> dict[str, Tensor]:
    """The state dict that a snapshot holds, whole and as it came.

    Args:
        what: as errors are to call it.
        snapshot: a state dict, a module, or the path of a file, see `load_snapshots`.

    Raises:
        PlanError: it cannot be read, or holds no state dict.
    """
    if isinstance(snapshot, nn.Module):
        return dict(snapshot.state_dict())
    if isinstance(snapshot, str | os.PathLike):
        try:
            return read_state_dict(Path(snapshot))
        except StorageError as error:
            raise PlanError(f"{what}: {error}") from error
    state = unwrap(snapshot)
    if state is None:
        raise PlanError(
            f"{what} is a {type(snapshot).__name__} that holds no state dict; pass model.state_dict(), a "
            "module, or the path of a file with a state dict"
        )
    return state


def _checked(
    what: str, state: dict[str, Tensor], convs: Mapping[str, Convolution], names: Iterable[str]
) -> Mapping[str, Tensor]:
    state = without_prefix(state, list(names))
    for key, conv in convs.items():
        weight = conv.weight
        if key not in state:
            raise PlanError(
                f"{what} has no {key!r}, which the model has{near_matches(key, state)}; pass earlier states of the "
                "same model"
            )
        if state[key].shape != weight.shape:
            raise PlanError(
                f"{what}: {key!r} has shape {tuple(state[key].shape)}, in the model {tuple(weight.shape)}; pass "
                "earlier states of the same model"
            )
        if state[key].is_meta:
            raise PlanError(f"{what}: {key!r} is on the meta device and has no values; load the weights first")
        if not torch.isfinite(state[key]).all():
            raise PlanError(f"{what}: {key!r} holds NaN or infinity; leave this snapshot out")
        if not weight.is_meta and state[key].data_ptr() == weight.data_ptr():
            raise PlanError(
                f"{what} shares {key!r} with the model, so it is no earlier state: state_dict() does not copy; take "
                "snapshots by copy.deepcopy(model.state_dict())"
            )
    return {key: oriented(state[key].detach(), conv) for key, conv in convs.items()}
