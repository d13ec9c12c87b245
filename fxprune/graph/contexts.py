"""Contexts that forward enters, as nodes of the graph: `torch.no_grad()` and `torch.autocast(...)` change what is
computed between them, so they must stay where they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

SET_GRAD = torch._C._set_grad_enabled
SWITCHES = frozenset((SET_GRAD, torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast))
"""Functions whose calls begin or end a context. `torch.fx` knows that they have side effects."""


def is_switch(node: fx.Node) -> bool:
    """Whether a node begins or ends a context."""
    return node.op == "call_function" and node.target in SWITCHES


class GradMode:
    """Writes changes of the gradient mode into the graph that a tracer makes."""

    def __init__(self, tracer: fx.Tracer) -> None:
        self.tracer = tracer
        self.outer: fx.Node | None = None  # the mode of the caller, as the graph asks for it
        self.recorded, self.writing = True, False

    def follow(self) -> None:
        """Make the graph follow the mode of this moment. It gives the mode of its caller back, not just any."""
        now = torch.is_grad_enabled()
        if self.writing or now == self.recorded:
            return
        self.writing, self.recorded = True, now
        if now:
            self.tracer.create_node("call_function", SET_GRAD, (self.outer,), {})
        else:
            self.outer = self.tracer.create_node("call_function", torch.is_grad_enabled, (), {})
            self.tracer.create_node("call_function", SET_GRAD, (False,), {})
        self.writing = False


@contextmanager
def autocast_recorded(tracer: fx.Tracer) -> Iterator[None]:
    """While the block runs, entering and leaving `torch.autocast` is written into the graph of `tracer`, also where it
    changes nothing at the moment: the caller of the graph may be in another context.
    """
    entered: list[fx.Node] = []
    enter: Any = torch.autocast.__enter__
    leave: Any = torch.autocast.__exit__

    def recorded_enter(context: Any) -> Any:
        values = (context.device, context.fast_dtype, context._enabled, context._cache_enabled)
        entered.append(tracer.create_node("call_function", torch.amp.autocast_mode._enter_autocast, values, {}))
        return enter(context)

    def recorded_leave(context: Any, *exception: Any) -> Any:
        if entered:
            tracer.create_node("call_function", torch.amp.autocast_mode._exit_autocast, (entered.pop(),), {})
        return leave(context, *exception)

    torch.autocast.__enter__, torch.autocast.__exit__ = recorded_enter, recorded_leave  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__, torch.autocast.__exit__ = enter, leave  # type: ignore[method-assign]


@contextmanager
def undisturbed() -> Iterator[None]:
    """No gradients; and afterwards contexts and random numbers are what they were."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.no_grad(), contexts_restored(), torch.random.fork_rng(devices):
        yield


@contextmanager
def contexts_restored() -> Iterator[None]:
    """Leave no context behind, also where a graph fails between its beginning and its end."""
    devices = [name for name in ("cpu", "cuda") if name == "cpu" or torch.cuda.is_available()]
    before = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
    cached, nesting = torch.is_autocast_cache_enabled(), torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        try:
            yield
        finally:
            for device, (enabled, dtype) in zip(devices, before, strict=True):
                torch.set_autocast_enabled(device, enabled)
                torch.set_autocast_dtype(device, dtype)
            torch.set_autocast_cache_enabled(cached)
            while torch.autocast_increment_nesting() > nesting:
                torch.autocast_decrement_nesting()
                torch.autocast_decrement_nesting()
            torch.autocast_decrement_nesting()
            if nesting == 1:
                torch.clear_autocast_cache()
