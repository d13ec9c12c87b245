"""An accelerated model in plain PyTorch, with as little Python around its layers as there can be."""

import inspect
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxprune.errors import AccelerationError


class TorchModel(nn.Module):
    """What `fxprune.accelerate(runtime="auto")` returns where plain PyTorch is the fastest.

    Args:
        graph: the accelerated graph.
        scripted: let TorchScript call its layers one after another. What Python takes for that, 15 to 30 microseconds a
            layer, is a fifth of the time of a MobileNet.

    Raises:
        AccelerationError: TorchScript cannot take the graph.
    """

    runtime = "torch"

    def __init__(self, graph: fx.GraphModule, scripted: bool = False) -> None:
        super().__init__()
        self.network = graph
        self.scripted = scripted
        self.meta = graph.meta
        self.training = False
        self._signature = inspect.signature(graph.forward)
        self._script()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns.

        Raises:
            AccelerationError: an argument is not what the model was accelerated for, or it is in training mode.
        """
        if self._run is None:
            return self.network(*args, **kwargs)
        given = self._signature.bind(*args, **kwargs)
        given.apply_defaults()
        for name, value in given.arguments.items():  # checked here, for errors in TorchScript lose their type
            entry = getattr(self.network, f"entry_{name}", None)
            given.arguments[name] = value if entry is None else entry(value)
        return self._run(*given.args)

    def _script(self) -> None:
        self._run: Any = None
        if not self.scripted:
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecated upstream, and still what costs least to call
                object.__setattr__(self, "_run", torch.jit.script(self.network))
        except Exception as error:  # whatever TorchScript says of a graph
            raise AccelerationError(
                f"TorchScript cannot take the network: {' '.join(str(error).split())[:200]}"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        """All but what is scripted."""
        return {**self.__dict__, "_run": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._script()

    def save(self, path: str | os.PathLike[str]) -> tuple[Path, ...]:
        """Refuse: there is no such file.

        Raises:
            AccelerationError: always.
        """
        raise AccelerationError(
            f"{path}: PyTorch was the fastest, and what it runs is packed for this process; keep the pruned model with "
            "fxprune.save and accelerate it where it runs, or accelerate for a runtime that has files: 'onnxruntime', "
            "'openvino' or 'inductor'"
        )
