"""The network in every runtime that is asked for and can take it, checked, ready to race."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import AccelerationError, FxpruneError, VerificationError, near_matches
from fxprune.graph.containers import tensors_in
from fxprune.inference.checks import check_same
from fxprune.inference.runtimes import AUTO, OTHERS, RUNTIMES, TORCH
from fxprune.inference.runtimes.model import RuntimeModel
from fxprune.inference.runtimes.precisions import precision_obstacle, runtime_in
from fxprune.inference.runtimes.runtime import Network


def check_runtime(runtime: str, device: torch.device, dtype: torch.dtype, precision: str | None = None) -> None:
    """See that there is such a runtime, and that it can be used here.

    Args:
        runtime: one of `RUNTIMES`.
        device, dtype: of the model.
        precision: what it shall compute in; None is the type of the model.

    Raises:
        AccelerationError: there is none, or it cannot; the message says what to install.
    """
    if runtime not in RUNTIMES:
        raise AccelerationError(
            f"runtime is {runtime!r}{near_matches(str(runtime), RUNTIMES)}; it must be one of {', '.join(RUNTIMES)}"
        )
    if precision is not None and (reason := precision_obstacle(runtime, precision)):
        raise AccelerationError(reason)
    if runtime in OTHERS and (reason := runtime_in(runtime, precision).obstacle(device, dtype)):
        asked = "" if precision is None else f", precision={precision!r}"
        raise AccelerationError(f"runtime={runtime!r}{asked}: {reason}")


@torch.no_grad()
def entrants(
    runtime: str,
    network: Network,
    original: nn.Module,
    expected: Sequence[Tensor],
    dtype: torch.dtype,
    precision: str | None = None,
) -> tuple[dict[str, RuntimeModel], dict[str, str], tuple[str, ...]]:
    """The network in the runtimes beside PyTorch, each of which computes what the model does.

    Args:
        runtime: one of `RUNTIMES`; `"auto"` is all that can.
        network: what to build.
        original: the model, in evaluation mode.
        expected: what it returns for the inputs of the network.
        dtype: its type.
        precision: what the one runtime computes in; None is that type.

    Returns:
        Accelerated models by name: `"dense openvino"`; by runtime the reason why it has none; and the remarks of those
        that have some.

    Raises:
        AccelerationError: the one runtime that was asked for cannot take the network.
        VerificationError: it computes something else.
    """
    models: dict[str, RuntimeModel] = {}
    absent: dict[str, str] = {}
    remarks: list[str] = []
    for name in () if runtime == TORCH else OTHERS if runtime == AUTO else (runtime,):
        device, found = expected[0].device, runtime_in(name, precision)
        if reason := found.obstacle(device, dtype):
            absent[name] = reason
            continue
        try:
            built = found.build(network)
            for model in built.values():
                _check(model, original, network.inputs, list(expected), computed_in(dtype, precision))
        except FxpruneError as error:
            if runtime != AUTO:
                raise
            absent[name] = str(error)
        else:
            models |= built
            remarks.append(found.remark())
    return models, absent, tuple(filter(None, remarks))


def computed_in(dtype: torch.dtype, precision: str | None) -> torch.dtype:
    """The type whose rounding errors are to be expected of a model in a type, computed in a precision."""
    if precision is None:
        return dtype
    found: torch.dtype = getattr(torch, precision)
    return found


def _check(
    model: RuntimeModel, original: nn.Module, inputs: tuple[Any, ...], expected: list[Tensor], dtype: torch.dtype
) -> None:
    """See that it computes what the model does, for another number of images too.

    Raises:
        VerificationError: it does not.
    """
    check_same(model, original, inputs, expected, dtype)
    call = model.call
    if call.has_free_batch:
        tensors = call.tensors(inputs, {})
        batch = next(len(tensor) for spec, tensor in zip(call.specs, tensors, strict=True) if spec.batched)
        more = call.arguments(call.resized(tensors, batch + 1))
        try:
            check_same(model, original, more, tensors_in(original(*more)), dtype)
        except VerificationError as error:
            raise VerificationError(f"with {batch + 1} images instead of {batch}, {error}") from error
