"""Every error fxprune raises. Each message names the thing, the value, the rule and the way out."""

import difflib
import sys
import warnings
from collections.abc import Iterable


class FxpruneError(Exception):
    """Base class of all errors that fxprune raises on purpose."""


class TraceError(FxpruneError):
    """The model, or its shapes, cannot be captured as a `torch.fx` graph."""


class PlanError(FxpruneError):
    """A plan cannot be made, is malformed, or belongs to another model."""


class ArgumentError(PlanError, TypeError):
    """A function was called with an argument that it does not have."""


class CalibrationError(FxpruneError):
    """Calibration data is missing, malformed or does not fit the model."""


class PassError(FxpruneError):
    """A rewrite pass left the graph in a state that its contract forbids."""


class VerificationError(FxpruneError):
    """Two models that must compute the same function do not."""


class StorageError(FxpruneError):
    """A saved file is truncated, altered, foreign, or belongs to another model."""


class KernelError(FxpruneError):
    """A kernel was handed tensors that do not fit together, or cannot run where it was asked to."""


class AccelerationError(FxpruneError):
    """A model cannot be accelerated here, or was accelerated for another device or type."""


class NothingRewrittenWarning(UserWarning):
    """The model was compiled, but no convolution could be rewritten."""


class PoorAgreementWarning(UserWarning):
    """The pruned and refitted network differs from the dense one on more than a tenth of what it was not fitted to."""


class UnlikeTrainingWarning(UserWarning):
    """Calibration data do not look like what the network was trained on: they may have been prepared otherwise."""


def warn_user(message: str, category: type[Warning]) -> None:
    """Warn at the line that called fxprune, however deep inside something is noticed."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == "fxprune" or module == "torch.utils._contextlib"  # of torch.no_grad()


def near_matches(name: str, names: Iterable[str]) -> str:
    """The names most like `name`, as the end of an error message: `" (near: 'a', 'b')"`, or `""` if none is."""
    close = difflib.get_close_matches(name, list(names), cutoff=0.5)
    return f" (near: {', '.join(map(repr, close))})" if close else ""
