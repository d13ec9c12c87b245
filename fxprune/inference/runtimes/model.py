"""An accelerated model outside of plain PyTorch: a module that is called as the model is, and computed by a runtime."""

import ctypes
import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias

import torch
from torch import Tensor, nn

from fxprune.errors import AccelerationError, StorageError
from fxprune.exact.record import ACCELERATION
from fxprune.inference.reporting import AccelerationReport, LayerChoice
from fxprune.inference.runtimes.calls import CallForm

logger = logging.getLogger("fxprune")

Run: TypeAlias = Callable[[Sequence[Tensor]], list[Tensor]]
"""What computes the results from the inputs, lists of tensors both; several threads may call it at once."""

_LOADING = threading.Lock()
_PROGRAMS: "weakref.WeakSet[Program]" = weakref.WeakSet()


def _after_fork() -> None:
    """In a child, see that nothing waits for threads of the parent.

    A lock that one of them holds would stay locked for ever; and what is loaded joins its threads when it ends, so it
    must never end: the child keeps a reference too many.
    """
    global _LOADING
    _LOADING = threading.Lock()
    for program in _PROGRAMS:
        program.leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Program:
    """A whole network in the form of one runtime: what can be copied, pickled and written, and loads when it is needed.

    It is loaded once for each number of threads that torch is set to, and anew in a process that was forked: threads do
    not survive a fork. That is why it keeps its weights beside those that are loaded, which no runtime gives back: to
    load again, to copy and to write.

    Attributes:
        runtime: name of the runtime.
        suffixes: what the name of a file of it may end in, the first by default.
    """

    runtime: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        self._loaded: dict[int, Run] = {}
        _PROGRAMS.add(self)

    def load(self, threads: int) -> Run:
        """Make the program ready to run with so many threads."""
        raise NotImplementedError

    def write(self, path: Path) -> None:
        """Write what the runtime needs."""
        raise NotImplementedError

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Compute the results."""
        threads = torch.get_num_threads()
        run = self._loaded.get(threads)
        if run is None:
            with _LOADING:
                run = self._loaded.get(threads)
                if run is None:
                    run = self._loaded[threads] = self.load(threads)
        return run(tensors)

    def leave_to_parent(self) -> None:
        """Forget, in a forked process, what the parent has loaded, without ending it."""
        for run in self._loaded.values():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(run))
        self._loaded = {}

    def __getstate__(self) -> dict[str, Any]:
        """All but what is loaded."""
        return {**self.__dict__, "_loaded": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _PROGRAMS.add(self)


class RuntimeModel(nn.Module):
    """What `fxprune.accelerate` returns where a runtime other than plain PyTorch computes the network.

    It is called as the model that it was made from, with any number of images of the size of the example; it can be
    copied and pickled, called by several threads at once and in forked processes. It has no parameters: weights are
    inside the runtime.

    Args:
        program: what computes.
        call: how the model is called.
        layers: what was chosen for each convolution.
        is_pruned: whether it computes the pruned layers as such, not as dense ones with zeros.
        gathers: how many gathers are in it.
    """

    def __init__(
        self, program: Program, call: CallForm, layers: tuple[LayerChoice, ...], is_pruned: bool, gathers: int
    ) -> None:
        super().__init__()
        self.program, self.call, self.layers = program, call, layers
        self.is_pruned, self.gathers = is_pruned, gathers
        self.meta: dict[str, Any] = {}
        self.training = False

    @property
    def runtime(self) -> str:
        """Name of the runtime."""
        return self.program.runtime

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns, computed by the runtime. No gradient goes through it.

        Raises:
            AccelerationError: an argument is not what the model was accelerated for, or it is in training mode.
        """
        if self.training:
            raise AccelerationError("an accelerated model is for inference; call eval(), or train the pruned model")
        return self.call.returned(self.program(self.call.tensors(args, kwargs)))

    def save(self, path: str | os.PathLike[str]) -> tuple[Path, ...]:
        """Write what the runtime needs to run the model without PyTorch and fxprune.

        Args:
            path: where to. Its end must be one that the runtime knows: `.onnx` for ONNX Runtime; `.xml` for OpenVINO,
                which puts the weights beside it into `.bin`; `.pt2` for Inductor.

        Returns:
            The files.

        Raises:
            AccelerationError: the name ends in something else, the folder is absent, or it cannot be written.
        """
        target = Path(path)
        if target.suffix not in self.program.suffixes:
            raise AccelerationError(
                f"{target}: a model in {self.runtime} is kept in a file that ends in "
                f"{' or '.join(self.program.suffixes)}; name it so"
            )
        try:
            self.program.write(target)
        except OSError as error:
            raise AccelerationError(f"{target} cannot be written: {error.strerror or error}") from error
        except StorageError as error:
            raise AccelerationError(str(error)) from error
        self._tell_of_dense(target)
        return (target, target.with_suffix(".bin")) if target.suffix == ".xml" else (target,)

    def _tell_of_dense(self, target: Path) -> None:
        """Say what a file does not show: that nothing of what kernels were pruned for is in it."""
        report: AccelerationReport | None = self.meta.get(ACCELERATION)
        if self.is_pruned or report is None or report.compiled is None or report.is_narrower:
            return
        if report.compiled.rewritten:
            times = ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in report.seconds.items())
            logger.warning("%s holds the dense form, with zeros: no pruned one is faster here (%s)", target, times)

    def extra_repr(self) -> str:
        inputs = ", ".join(map(str, self.call.specs))
        count = sum(isinstance(part, int) for part in self.call.outputs)
        results = "a tensor" if count == 1 else f"{count} tensors"
        layers = "grouped layers" if self.is_pruned else "dense layers"
        return f"network of {layers} in {self.runtime}: {inputs} -> {results}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Refuse to move.

        Raises:
            AccelerationError: `fn` changes device or type.
        """
        probe = torch.empty(0, dtype=self.call.specs[0].dtype)
        moved = fn(probe)
        if (moved.device, moved.dtype) != (probe.device, probe.dtype):
            raise AccelerationError(
                f"this model was accelerated for {probe.dtype} on cpu in {self.runtime}, and cannot become "
                f"{moved.dtype} on {moved.device}; move the model that fxprune.compile returned, and accelerate it "
                "there"
            )
        return self
