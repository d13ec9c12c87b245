"""Save a compiled model as weights and plan, without code, and replay it on a fresh dense model."""

import hashlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.calibration.agreement import Agreement
from fxprune.errors import FxpruneError, StorageError
from fxprune.exact.record import Record, keep_record, record_of
from fxprune.exact.reporting import Report
from fxprune.exact.rewriting import rewritten
from fxprune.exact.surgery import repeat
from fxprune.files import write_whole
from fxprune.graph.baking import baked
from fxprune.graph.containers import tensors_in
from fxprune.graph.copying import tensors_of
from fxprune.graph.tracing import trace
from fxprune.plans import PrunePlan
from fxprune.plans.masking import masked_copy
from fxprune.plans.plan import REMAKE

FORMAT = "fxprune"
VERSION = 1


def save(pruned: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the weights, index tables and plan of a compiled model. The file holds no code and opens with
    `torch.load(weights_only=True)`.

    The file appears whole or not at all: it is written beside `path` and then renamed.

    Raises:
        FxpruneError: the module was not compiled by fxprune.
        StorageError: the file cannot be written.
    """
    record = record_of(pruned)
    is_graph = isinstance(pruned, fx.GraphModule)
    tensors = pruned.state_dict() if is_graph else tensors_of(pruned)
    state = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    described = {"plan": record.plan.to_json(), "inputs": _describe(record.inputs), "options": dict(record.options)}
    if not is_graph:
        described |= {"surgery": record.surgery, "report": record.report.to_dict(), "modes": list(record.modes)}
    else:
        if measured := _measured(record.report):
            described["measured"] = measured
        if any(not tensor.is_meta for tensor in tensors_in(record.inputs)):
            described["run"] = True  # shapes were found by a run, and must be again
    header = json.dumps(described)
    content = {"format": FORMAT, "version": VERSION, "header": header, "state": state, "digest": _digest(header, state)}
    target = Path(path)
    try:
        write_whole(target, lambda partial: torch.save(content, partial))
    except (OSError, RuntimeError) as error:
        raise StorageError(f"{target} cannot be written: {error}; choose another place") from error


def load(path: str | os.PathLike[str], model: nn.Module) -> Any:
    """Rebuild a compiled model, graph or module of the model's own class, from a file and a dense model of the same
    architecture, whose weights do not matter. `model` is not changed.

    Raises:
        StorageError: the file is truncated, altered, foreign or of a newer format, or was saved from another
            architecture.
    """
    if not isinstance(path, str | os.PathLike):
        raise StorageError(f"the file is a {type(path).__name__}; it is the first argument: fxprune.load(path, model)")
    content = _read(Path(path))
    header = json.loads(content["header"])
    try:
        plan = PrunePlan.from_json(header["plan"])
        dense = baked(model)[0] if plan.baked else model
        if "surgery" in header:
            return _operated_again(plan, header, content["state"], dense)
        blank = masked_copy(dense, plan)
        for name in plan.layers:  # any weights will do, but the dropped kernels must be zero, and zero times NaN is NaN
            nn.init.zeros_(blank.get_parameter(f"{name}.weight"))
        inputs = _made_up(header["inputs"], _device_of(model) if header.get("run") else torch.device("meta"))
        pruned = rewritten(blank, plan, trace(blank, inputs or None), **header["options"])
    except FxpruneError as error:
        why = str(error).replace(REMAKE, _ANOTHER)  # the plan is in the file: nobody can make another for it
        raise StorageError(f"{path} does not fit {type(model).__name__}: {why}") from error
    record = record_of(pruned)
    keep_record(pruned, replace(record, report=_with_measured(record.report, header.get("measured", {}))))
    return _fill(pruned, content["state"], path, model)


_ANOTHER = "load it with the model it was compiled from"


def _measured(report: Report) -> dict[str, Any]:
    """What a report says that replaying a plan does not find again."""
    errors = {layer.name: layer.error for layer in report.layers if layer.error is not None}
    found = {"errors": errors} if errors else {}
    return found if report.agreement is None else {**found, "agreement": asdict(report.agreement)}


def _with_measured(report: Report, measured: dict[str, Any]) -> Report:
    errors = measured.get("errors", {})
    agreement = Agreement(**measured["agreement"]) if "agreement" in measured else None
    layers = tuple(replace(layer, error=errors.get(layer.name)) for layer in report.layers)
    return replace(report, layers=layers, agreement=agreement)


def _operated_again(plan: PrunePlan, header: dict[str, Any], state: dict[str, Tensor], model: nn.Module) -> nn.Module:
    """A copy of the user's model, changed as the file says.

    Raises:
        FxpruneError: the file does not fit it.
    """
    plan.check(model)
    result = repeat(model, header["surgery"], state)
    inputs = _made_up(header["inputs"], torch.device("meta"))
    report = Report.from_dict(header["report"])
    modes, options = tuple(header["modes"]), header["options"]
    keep_record(result, Record(plan, report, inputs, modes, options, surgery=header["surgery"]))
    return result


def _fill(pruned: nn.Module, state: dict[str, Tensor], path: object, model: nn.Module) -> nn.Module:
    """Put the saved tensors in place; the index tables must be those that replaying the plan gave."""
    own = pruned.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) or sorted(name for name in own if own[name].shape != state[name].shape)
    if wrong:
        raise StorageError(
            f"{path} does not fit {type(model).__name__}: {wrong[0]} differs; "
            "build the model with the arguments it was compiled with"
        )
    for name, tensor in own.items():
        if (
            name.rpartition(".")[2] == "index"
            and not tensor.is_floating_point()
            and not torch.equal(tensor.cpu(), state[name])
        ):
            raise StorageError(
                f"{path} does not fit {type(model).__name__}: replaying its plan gives another {name}; {_ANOTHER}"
            )
    pruned.load_state_dict(state)
    return pruned


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise StorageError(f"{path} does not exist") from error
    except IsADirectoryError as error:
        raise StorageError(f"{path} is a folder") from error
    except Exception as error:  # torch raises a dozen types for files that are not its own
        raise StorageError(
            f"{path} is truncated or not a file of fxprune.save, but ONNX, say ({type(error).__name__})"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise StorageError(f"{path} was not written by fxprune.save; for a plain state dict use model.load_state_dict")
    if content.get("version") != VERSION:
        raise StorageError(
            f"{path} has format version {content.get('version')}, this fxprune reads version {VERSION}; "
            "use the version that wrote it"
        )
    if not isinstance(content.get("header"), str) or not isinstance(content.get("state"), dict):
        raise StorageError(f"{path} is altered: parts of it are missing")
    if not all(isinstance(tensor, Tensor) for tensor in content["state"].values()):
        raise StorageError(f"{path} is altered: its state holds more than tensors")
    if content.get("digest") != _digest(content["header"], content["state"]):
        raise StorageError(f"{path} is altered: its checksum does not match; save the model again")
    return content


def _describe(value: Any) -> Any:
    """Inputs as JSON: tensors by shape and type, what holds them by kind."""
    if isinstance(value, Tensor):
        return {"tensor": [list(value.shape), str(value.dtype).removeprefix("torch.")]}
    if isinstance(value, dict):
        return {"dict": {name: _describe(item) for name, item in value.items()}}
    if isinstance(value, list | tuple):
        return {"list" if isinstance(value, list) else "tuple": [_describe(item) for item in value]}
    if isinstance(value, bool | int | float | str | None):
        return {"value": value}
    raise StorageError(
        f"the model was compiled with an example input of type {type(value).__name__}, which a file without code "
        "cannot hold; compile it with tensors, numbers, strings, and lists, tuples or dicts of them"
    )


def _made_up(description: Any, device: torch.device) -> Any:
    """Undo `_describe`, with tensors of ones: what replaying a plan asks of them is their shape. Where forward reads
    data, shapes were found by a run, and are again.
    """
    ((kind, content),) = description.items()
    if kind == "tensor":
        shape, dtype = content
        return torch.ones(shape, dtype=getattr(torch, dtype), device=device)
    if kind == "dict":
        return {name: _made_up(item, device) for name, item in content.items()}
    if kind in ("list", "tuple"):
        items = [_made_up(item, device) for item in content]
        return items if kind == "list" else tuple(items)
    return content


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _digest(header: str, state: dict[str, Tensor]) -> str:
    """SHA-256 of all that counts: a flipped bit in a weight is noticed."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
