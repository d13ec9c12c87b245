"""fxprune makes convolutional networks smaller: it prunes kernels and rewrites the graph into grouped convolutions,
exactly.

>>> import torch, fxprune
>>> net = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 16, 1))
>>> pruned = fxprune.compile(net, ratio=0.5, example_inputs=torch.randn(2, 16, 8, 8))
>>> pruned.get_submodule("0").groups
2
"""

from fxprune.api import analyze, compile, make_plan, measure_latency, measure_sensitivity, report
from fxprune.channels import ChannelAnalysis
from fxprune.errors import (
    AccelerationError,
    CalibrationError,
    FxpruneError,
    KernelError,
    NothingRewrittenWarning,
    PassError,
    PlanError,
    PoorAgreementWarning,
    StorageError,
    TraceError,
    VerificationError,
)
from fxprune.exact.reporting import Report
from fxprune.exact.rewriting import rewrite
from fxprune.exact.storage import load, save
from fxprune.exact.verification import Verification, verify
from fxprune.graph.layers import ChannelGather
from fxprune.inference.acceleration import accelerate, acceleration_report
from fxprune.inference.reporting import AccelerationReport
from fxprune.planning.latency_table import LatencyTable
from fxprune.planning.lossy import mask, recover
from fxprune.planning.sensitivity import Sensitivity
from fxprune.plans import GroupedKernels, PrunePlan
from fxprune.training.sparsification import Sparsifier, hold, sparsify
from fxprune.training.tickets import random_ticket, rewind

__version__ = "0.2.0"

__all__ = [
    "AccelerationError",
    "AccelerationReport",
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
    "Verification",
    "VerificationError",
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
    "random_ticket",
    "recover",
    "report",
    "rewind",
    "rewrite",
    "save",
    "sparsify",
    "verify",
]
