"""fxprune makes convolutional networks smaller: it prunes kernels and rewrites the graph into grouped convolutions,
exactly.

>>> import torch, fxprune
>>> net = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 16, 1))
>>> pruned = fxprune.compile(net, ratio=0.5, example_inputs=torch.randn(2, 16, 8, 8))
>>> pruned.get_submodule("0").groups
2
"""

import importlib.util
from typing import TYPE_CHECKING, Any

import fxprune.inference.instructions  # noqa: F401  sets variables that PyTorch reads at its first operator
from fxprune.errors import (
    AccelerationError,
    ArgumentError,
    CalibrationError,
    FxpruneError,
    KernelError,
    NothingRewrittenWarning,
    PassError,
    PlanError,
    PoorAgreementWarning,
    StorageError,
    TraceError,
    UnlikeTrainingWarning,
    VerificationError,
    near_matches,
)

if TYPE_CHECKING:
    from fxprune.api import analyze, compile, make_plan, measure_latency, measure_sensitivity, report
    from fxprune.channels import ChannelAnalysis
    from fxprune.exact.reporting import Report
    from fxprune.exact.rewriting import rewrite
    from fxprune.exact.storage import load, save
    from fxprune.exact.verification import Verification, verify
    from fxprune.graph.layers import ChannelGather
    from fxprune.inference.acceleration import accelerate, acceleration_report
    from fxprune.inference.reporting import AccelerationReport
    from fxprune.inference.runtimes.int8 import quantize
    from fxprune.planning.latency.table import LatencyTable
    from fxprune.planning.lossy import mask, recover, refit
    from fxprune.planning.sensitivity import Sensitivity
    from fxprune.plans import GroupedKernels, PrunePlan
    from fxprune.training.sparsification import Sparsifier, hold, sparsify
    from fxprune.training.tickets import random_ticket, rewind

__version__ = "0.2.0"

__all__ = [
    "AccelerationError",
    "AccelerationReport",
    "ArgumentError",
    "CalibrationError",
    "ChannelAnalysis",
    "ChannelGather",
    "FxpruneError",
    "GroupedKernels",
    "KernelError",
    "LatencyTable",
    "NothingRewrittenWarning",
    "PassError",
    "PlanError",
    "PoorAgreementWarning",
    "PrunePlan",
    "Report",
    "Sensitivity",
    "Sparsifier",
    "StorageError",
    "TraceError",
    "UnlikeTrainingWarning",
    "Verification",
    "VerificationError",
    "__version__",
    "accelerate",
    "acceleration_report",
    "analyze",
    "compile",
    "hold",
    "load",
    "make_plan",
    "mask",
    "measure_latency",
    "measure_sensitivity",
    "quantize",
    "random_ticket",
    "recover",
    "refit",
    "report",
    "rewind",
    "rewrite",
    "save",
    "sparsify",
    "verify",
]

# Where the names of the block above are, which are imported when one is first asked for: torch alone takes seconds, and
# so do scipy and torch's exporters, which the first of them brings.
_HOMES = {
    "analyze": "fxprune.api",
    "compile": "fxprune.api",
    "make_plan": "fxprune.api",
    "measure_latency": "fxprune.api",
    "measure_sensitivity": "fxprune.api",
    "report": "fxprune.api",
    "ChannelAnalysis": "fxprune.channels",
    "Report": "fxprune.exact.reporting",
    "rewrite": "fxprune.exact.rewriting",
    "load": "fxprune.exact.storage",
    "save": "fxprune.exact.storage",
    "Verification": "fxprune.exact.verification",
    "verify": "fxprune.exact.verification",
    "ChannelGather": "fxprune.graph.layers",
    "accelerate": "fxprune.inference.acceleration",
    "acceleration_report": "fxprune.inference.acceleration",
    "AccelerationReport": "fxprune.inference.reporting",
    "quantize": "fxprune.inference.runtimes.int8",
    "LatencyTable": "fxprune.planning.latency.table",
    "mask": "fxprune.planning.lossy",
    "recover": "fxprune.planning.lossy",
    "refit": "fxprune.planning.lossy",
    "Sensitivity": "fxprune.planning.sensitivity",
    "GroupedKernels": "fxprune.plans",
    "PrunePlan": "fxprune.plans",
    "Sparsifier": "fxprune.training.sparsification",
    "hold": "fxprune.training.sparsification",
    "sparsify": "fxprune.training.sparsification",
    "random_ticket": "fxprune.training.tickets",
    "rewind": "fxprune.training.tickets",
}


if not TYPE_CHECKING:  # to a type checker it would mean that any name is there

    def __getattr__(name: str) -> Any:
        """A public name, or a room of the package, imported when it is first asked for (PEP 562)."""
        if name not in _HOMES:
            if not name.startswith("_") and importlib.util.find_spec(f"fxprune.{name}") is not None:
                return importlib.import_module(f"fxprune.{name}")
            raise AttributeError(f"module 'fxprune' has no attribute {name!r}{near_matches(name, __all__)}")
        value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
        return value


def __dir__() -> list[str]:
    """What is public."""
    return sorted(__all__)
