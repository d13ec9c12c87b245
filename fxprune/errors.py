"""Every error fxprune raises. Each message names the thing, the value, the rule and the way out."""


class FxpruneError(Exception):
    """Base class of all errors that fxprune raises on purpose."""


class TraceError(FxpruneError):
    """The model, or its shapes, cannot be captured as a `torch.fx` graph."""


class PlanError(FxpruneError):
    """A plan cannot be made, is malformed, or belongs to another model."""


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
