"""The fastest int8 form of a model in a runtime: every form of its layers is timed in integers, and whole graphs race
there.

`fxprune.quantize` takes the forms as they are fastest in float32; in integers others may be (a grouped convolution that
gains nothing from 8 bits beside a dense one that gains twofold).
"""

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxprune.calibration.batches import Batch
from fxprune.exact.record import ACCELERATION, find_record
from fxprune.exact.verification import difference
from fxprune.graph.containers import tensors_in
from fxprune.inference.acceleration import ROUNDS, TURN_SECONDS
from fxprune.inference.fused_graph import fused_graph
from fxprune.inference.race import race
from fxprune.inference.reporting import AccelerationReport
from fxprune.inference.runtimes import RuntimeModel
from fxprune.inference.runtimes.contest import check_runtime
from fxprune.inference.runtimes.int8 import divided, tell_agreement
from fxprune.inference.runtimes.int8_tools import IN_INTEGERS
from fxprune.inference.runtimes.precisions import INT8
from fxprune.inference.runtimes.runtime import Network
from fxprune.inference.stopwatch import Stopwatch


@torch.no_grad()
def in_integers(
    model: nn.Module,
    inputs: tuple[Any, ...],
    runtime: str,
    batches: Sequence[Batch] | None = None,
    progress: bool = False,
    remember: bool = True,
) -> RuntimeModel:
    """The fastest int8 form of a model.

    Args:
        model: float32 on the CPU; compiled or dense.
        inputs: arguments of forward, of the sizes to be fast for.
        runtime: a key of `fxprune.inference.runtimes.int8_tools.IN_INTEGERS`.
        batches: of calibration data. None where only times count: ranges are then those of the example.
        progress: show bars on stderr.
        remember: see `fxprune.accelerate`.

    Returns:
        A `RuntimeModel`, with a report; if there are batches also with its agreement with the model on those that were
        held out, see `fxprune.quantize`.

    Raises:
        AccelerationError: the runtime is not here, or cannot take the model.
        CalibrationError: there are too few batches, or they do not fit the model.

    Warns:
        PoorAgreementWarning: see `fxprune.quantize`.
    """
    weight = next(model.parameters())
    check_runtime(runtime, weight.device, weight.dtype, INT8)
    original = copy.deepcopy(model).eval()
    graph, skipped = fused_graph(model, inputs)
    stopwatch = Stopwatch(torch.device("cpu"), remember)
    network = Network(graph, inputs, stopwatch, progress)
    fitted, held = ([], []) if batches is None else divided(batches, network.call)
    built = IN_INTEGERS[runtime].build(replace(network, batches=fitted))
    stopwatch.save()
    timings = race(
        {name: functools.partial(candidate, *inputs) for name, candidate in built.items()},
        rounds=ROUNDS,
        device=torch.device("cpu"),
        min_seconds=TURN_SECONDS,
    )
    chosen = min(timings, key=lambda name: timings[name].fastest)
    best_dense = min(timing.fastest for name, timing in timings.items() if name.startswith("dense"))
    result = built[chosen]
    result.meta[ACCELERATION] = AccelerationReport(
        device="cpu",
        dtype=INT8,
        memory_format="own",
        chosen=chosen,
        seconds={name: timing.fastest for name, timing in timings.items()},
        relative=timings[chosen].fastest / best_dense,
        layers=result.layers,
        gathers=result.gathers,
        difference=difference(tensors_in(result(*inputs)), tensors_in(original(*inputs)))[1],
        notes=skipped,
        compiled=getattr(find_record(model), "report", None),
        runtime=result.runtime,
        spread={name: timing.spread for name, timing in timings.items()},
    )
    if held:
        tell_agreement(result, original, held)
    return result
