"""What forward is called with: positional and keyword arguments of any kind, and how users give them."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fxprune.errors import TraceError, near_matches
from fxprune.graph.containers import convert_tensors, tensors_in
from fxprune.graph.copying import copied

Inputs: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """The arguments of one call of forward.

    Attributes:
        args: by position; tensors, numbers, flags, None, and containers of these.
        kwargs: by name, what cannot be given by position.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def call(self, model: nn.Module) -> Any:
        """What a model returns."""
        return model(*self.args, **self.kwargs)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors in the arguments, in order, each once."""
        return list({id(tensor): tensor for tensor in tensors_in((self.args, dict(self.kwargs)))}.values())


def as_examples(example_inputs: Inputs, model: nn.Module) -> tuple[Example, ...]:
    """Return what `example_inputs` says, as one example or several. What its tensors were computed from is forgotten.

    Args:
        example_inputs: a tensor; a tuple of positional arguments; a mapping from the names of arguments; or a list of
            any of these, which are several examples. A list of as many tensors as forward needs arguments, or of what
            can be no example (`[[x, x]]` for a forward that takes a list), is the arguments of one.
        model: whose forward is meant.

    Raises:
        TraceError: the names are not those of arguments of forward, or it needs others.
    """
    if not isinstance(example_inputs, list) or not example_inputs or _is_one(example_inputs, model):
        return (_example(example_inputs, model),)
    return tuple(_example(given, model) for given in example_inputs)


def as_inputs(example_inputs: Inputs, model: nn.Module | None = None) -> tuple[Any, ...]:
    """Return the first example as positional arguments, which is all that a traced graph takes.

    Args:
        example_inputs: see `as_examples`.
        model: whose forward is meant; a mapping needs it, and so does a list of several examples.

    Raises:
        TraceError: some can be given by name only.
    """
    if model is None:
        if isinstance(example_inputs, Mapping):
            names = ", ".join(map(repr, example_inputs))
            raise TraceError(f"the inputs are a dict of {names}; pass a tuple in forward's order")
        given = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
        return convert_tensors(given, Tensor.detach)
    return in_order(as_examples(example_inputs, model)[0], model)


def in_order(example: Example, model: nn.Module) -> tuple[Any, ...]:
    """The arguments of an example by position.

    Raises:
        TraceError: some can be given by name only.
    """
    if example.kwargs:
        name = next(iter(example.kwargs))
        raise TraceError(
            f"{type(model).__name__}.forward takes {name!r} by name only, or others before it are left out, and a "
            "graph takes arguments by position; give them all in forward's order, or compile with output='module'"
        )
    return example.args


def _is_one(given: list[Any], model: nn.Module) -> bool:
    """Whether a list is the arguments of one call, not several examples."""
    if not all(isinstance(part, Tensor | tuple | Mapping | Example) for part in given):
        return True
    needed = sum(p.default is p.empty for p in positional_parameters(model))
    return all(isinstance(part, Tensor) for part in given) and len(given) == needed


def _example(given: Inputs | Example, model: nn.Module) -> Example:
    if isinstance(given, Example):
        return given
    if isinstance(given, Mapping):
        args, kwargs = _by_name(given, model)
    else:
        args, kwargs = (given,) if isinstance(given, Tensor) else tuple(given), {}
    example = Example(args, kwargs)
    _check_fits(example, model)
    _check_batched(example, model)
    if any(tensor.grad_fn is not None for tensor in example.tensors):
        return convert_tensors(example, Tensor.detach)
    return example


def _check_fits(example: Example, model: nn.Module) -> None:
    """See that forward takes as many arguments, and gets all that it needs."""
    signature = inspect.signature(model.forward).parameters.values()
    parameters, given = positional_parameters(model), len(example.args)
    values = given + len(example.kwargs)
    if given > len(parameters) and not any(p.kind is p.VAR_POSITIONAL for p in signature):
        raise TraceError(
            f"{type(model).__name__}.forward takes {len(parameters)} positional arguments, but example_inputs has "
            f"{values} values; give one for each"
        )
    named = [*parameters[given:], *(p for p in signature if p.kind is p.KEYWORD_ONLY)]
    if missing := [p.name for p in named if p.default is p.empty and p.name not in example.kwargs]:
        raise TraceError(
            f"{type(model).__name__}.forward needs {', '.join(missing)}, "
            f"but example_inputs has {values} values; give one for each"
        )


SPATIAL = ((nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3))
"""Convolutions, which take one image without a batch too, and their number of spatial axes."""


def _check_batched(example: Example, model: nn.Module) -> None:
    """See that a single tensor is no image without its batch axis, where the model needs one. Only where it might be is
    the model run, and then a copy: it may well take `(N, H, W)` and add the channels itself, and convolutions alone run
    on single images.

    Raises:
        TraceError: the model does not run on the tensor, and would with a batch axis.
    """
    if len(example.args) != 1 or example.kwargs or not isinstance(example.args[0], Tensor):
        return
    x = example.args[0]
    single = {count + 1 for layer in model.modules() for kind, count in SPATIAL if isinstance(layer, kind)}
    if x.is_meta or x.dim() not in single:
        return
    copy = copied(model).eval()
    if not _runs(copy, x) and _runs(copy, x.unsqueeze(0)):
        raise TraceError(
            f"example_inputs has shape {tuple(x.shape)}, and {type(model).__name__} takes batches; did you forget the "
            "batch dimension? Pass x.unsqueeze(0)"
        )


def _runs(model: nn.Module, x: Tensor) -> bool:
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            model(x)
    except Exception:  # any operator of any model
        return False
    return True


def positional_parameters(model: nn.Module) -> list[inspect.Parameter]:
    """What forward takes by position, in order."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _by_name(named: Mapping[str, Any], model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments that are given by name: by position as far as they follow each other from the first, else by name."""
    parameters = inspect.signature(model.forward).parameters.values()
    positional = [p.name for p in positional_parameters(model)]
    known = positional + [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    unknown = [name for name in named if name not in known]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise TraceError(
            f"{type(model).__name__}.forward takes no argument {unknown[0]!r}{near_matches(str(unknown[0]), known)}; "
            f"the names in example_inputs must be of {', '.join(known) or 'arguments that it has'}"
        )
    first = next((i for i, name in enumerate(positional) if name not in named), len(positional))
    rest = {name: value for name, value in named.items() if name not in positional[:first]}
    return tuple(named[name] for name in positional[:first]), rest
