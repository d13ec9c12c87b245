"""Measure the times that a request needs: of grouped layers, of narrower ones, or of both."""

from fxprune.calibration.subject import Subject
from fxprune.planning.filters import removable_of
from fxprune.planning.latency.budget import group_counts
from fxprune.planning.latency.measure import Wanted, measure_layers
from fxprune.planning.latency.network import WholeNetwork
from fxprune.planning.latency.table import LatencyTable
from fxprune.planning.requests import Request


def measure_for(subject: Subject, request: Request) -> LatencyTable:
    """Time what can become of a model.

    Args:
        subject: the model, on the device to measure, with an example input.
        request: with a latency; its granularity says what can go.

    Raises:
        PlanError: nothing can be planned.
        AccelerationError: the model cannot be accelerated.
    """
    network = WholeNetwork.of(subject, request)
    parts = {part.granularity: part for part in request.parts()}
    wanted = Wanted(
        counts=group_counts(subject, parts["kernel"]) if "kernel" in parts else {},
        units=removable_of(subject, parts["filter"].patterns).units if "filter" in parts else None,
    )
    return measure_layers(network, wanted)
