"""How a model is called, put down so that a runtime that knows nothing but a list of tensors can stand in for it."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from fxprune.errors import AccelerationError
from fxprune.graph.containers import holds_tensor


@dataclass(frozen=True)
class TensorSpec:
    """What an input must be.

    Attributes:
        name: of the argument; numbered where an argument holds several.
        dtype: its type.
        shape: its sizes in the example.
        batched: its first size is the number of images, and free.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    batched: bool

    def __str__(self) -> str:
        sizes = ["batch" if self.batched and place == 0 else str(size) for place, size in enumerate(self.shape)]
        return f"{self.name} ({', '.join(sizes)}) {str(self.dtype).removeprefix('torch.')}"

    def check(self, tensor: Tensor) -> None:
        """See that a tensor is what the model was accelerated for.

        Raises:
            AccelerationError: it lies elsewhere, or has another type, rank or size.
        """
        if tensor.device.type != "cpu" or tensor.dtype != self.dtype:
            raise AccelerationError(
                f"the model was accelerated for {self.dtype} on cpu, and the input {self.name} is {tensor.dtype} on "
                f"{tensor.device}; convert it, or accelerate the pruned model there"
            )
        if tensor.dim() != len(self.shape):
            raise AccelerationError(
                f"the model was accelerated for an input of {len(self.shape)} dimensions, and {self.name} has "
                f"{tensor.dim()}; add or remove the batch dimension"
            )
        first = 1 if self.batched else 0
        if tuple(tensor.shape[first:]) != self.shape[first:]:
            raise AccelerationError(
                f"the model was accelerated for {self}, and {self.name} is {tuple(tensor.shape)}; accelerate the "
                "pruned model with an example of that size, or with runtime='torch', which takes any"
            )


@dataclass(frozen=True)
class CallForm:
    """The arguments and results of a model, as lists of tensors.

    Attributes:
        signature: of forward.
        structure, constants: of the arguments: how they are nested, and those that are no tensors, by place.
        specs: the tensors among them, in order.
        results: how the results are nested.
        outputs: for each result the number of the tensor that it is, or the constant.
    """

    signature: inspect.Signature
    structure: TreeSpec
    constants: Mapping[int, Any]
    specs: tuple[TensorSpec, ...]
    results: TreeSpec
    outputs: tuple[int | str | None, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, graph: fx.GraphModule, inputs: tuple[Any, ...]) -> "CallForm":
        """How a graph is called, by an example.

        Raises:
            AccelerationError: an argument or a result is not made of tensors in lists, tuples and dicts.
        """
        signature = inspect.signature(graph.forward)
        bound = signature.bind(*inputs)
        bound.apply_defaults()
        leaves, structure = tree_flatten(bound.args)
        owners = [
            name for name, value in zip(bound.arguments, bound.args, strict=False) for _ in tree_flatten(value)[0]
        ]
        constants = {place: leaf for place, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
        if odd := next((leaf for leaf in constants.values() if holds_tensor(leaf)), None):
            raise AccelerationError(f"an argument is a {type(odd).__name__}; {_ONLY_TENSORS}")
        tensors = [(owners[place], leaf) for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        counted = [name for name, _ in tensors]
        names = [
            name if counted.count(name) == 1 else f"{name}_{counted[:place].count(name)}"
            for place, name in enumerate(counted)
        ]
        specs = tuple(
            TensorSpec(name, tensor.dtype, tuple(tensor.shape), False)
            for name, (_, tensor) in zip(names, tensors, strict=True)
        )
        found, results = tree_flatten(graph(*bound.args))
        outputs: list[int | str | None] = []
        count = 0
        for leaf in found:
            if isinstance(leaf, Tensor):
                outputs.append(count)
                count += 1
            elif leaf is None or isinstance(leaf, str):
                outputs.append(leaf)
            else:
                raise AccelerationError(f"a result is {leaf!r}, a {type(leaf).__name__}; {_ONLY_TENSORS}")
        if not count or not specs:
            raise AccelerationError("the model takes or gives no tensor; there is nothing that a runtime could compute")
        form = cls(signature, structure, constants, specs, results, tuple(outputs))
        return form._with_free_batch(graph, form.tensors(inputs, {}))

    def _with_free_batch(self, graph: fx.GraphModule, tensors: Sequence[Tensor]) -> "CallForm":
        """The same with the number of images free, if the graph runs with another one."""
        images = [spec.shape[0] for spec in self.specs if len(spec.shape) >= 3] or [
            spec.shape[0] for spec in self.specs if spec.shape
        ]
        if not images or images[0] == 0:
            return self
        specs = tuple(replace(spec, batched=spec.shape[:1] == (images[0],)) for spec in self.specs)
        free = replace(self, specs=specs)
        try:
            results = tree_flatten(graph(*free.arguments(free.resized(tensors, images[0] + 1))))[0]
        except Exception:  # whatever a model raises that has the number of images written into it
            return self
        is_alike = len(results) == len(self.outputs)
        return free if is_alike else self

    @property
    def has_free_batch(self) -> bool:
        """Whether the number of images is free."""
        return any(spec.batched for spec in self.specs)

    def resized(self, tensors: Sequence[Tensor], batch: int) -> list[Tensor]:
        """The tensors with another number of images: the first of them, or all and the first ones again."""
        return [
            tensor[torch.arange(batch) % len(tensor)] if spec.batched else tensor
            for spec, tensor in zip(self.specs, tensors, strict=True)
        ]

    def tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a call.

        Raises:
            TypeError: forward takes no such arguments.
            AccelerationError: they are not what the model was accelerated for.
        """
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        leaves, structure = tree_flatten(bound.args)
        if structure != self.structure:
            raise AccelerationError("the arguments are nested otherwise than in the example; accelerate with theirs")
        found = []
        for place, leaf in enumerate(leaves):
            if place in self.constants:
                if type(leaf) is not type(self.constants[place]) or leaf != self.constants[place]:
                    raise AccelerationError(
                        f"the model was accelerated with the argument {self.constants[place]!r}, and this one is "
                        f"{leaf!r}; accelerate with that"
                    )
            elif not isinstance(leaf, Tensor):
                raise AccelerationError(f"the model was accelerated for a tensor, and this is a {type(leaf).__name__}")
            else:
                found.append(leaf)
        for spec, tensor in zip(self.specs, found, strict=True):
            spec.check(tensor)
        batches = {spec.name: len(tensor) for spec, tensor in zip(self.specs, found, strict=True) if spec.batched}
        if len(set(batches.values())) > 1:
            sizes = ", ".join(f"{name} has {size}" for name, size in batches.items())
            raise AccelerationError(f"the inputs have different numbers of images: {sizes}; give all as many")
        return found

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """The arguments of forward with these tensors in them."""
        rest = iter(tensors)
        places = range(self.structure.num_leaves)
        leaves = [self.constants[place] if place in self.constants else next(rest) for place in places]
        return tuple(tree_unflatten(leaves, self.structure))

    def returned(self, tensors: Sequence[Tensor]) -> Any:
        """What the model returns, made of the tensors that it computes."""
        leaves = [tensors[part] if isinstance(part, int) else part for part in self.outputs]
        return tree_unflatten(leaves, self.results)


class Flat(nn.Module):
    """A graph with a list of tensors for arguments and results."""

    def __init__(self, graph: fx.GraphModule, call: CallForm) -> None:
        super().__init__()
        self.network, self.call = graph, call  # `graph` is a name that torch.export takes for its own

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        results = tree_leaves(self.network(*self.call.arguments(tensors)))
        return tuple(leaf for leaf in results if isinstance(leaf, Tensor))


_ONLY_TENSORS = (
    "other runtimes than PyTorch take and give tensors in lists, tuples and dicts only; accelerate with runtime='torch'"
)
