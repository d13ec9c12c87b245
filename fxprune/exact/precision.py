"""Run a copy of a model in float64, whatever it casts to inside, or in its own precision."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fxprune.graph.containers import convert_tensors
from fxprune.graph.contexts import undisturbed
from fxprune.graph.copying import share_tensors
from fxprune.graph.examples import Example

Call = Callable[[nn.Module, Example], Any]
WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}
"""What becomes of a type in float64."""


def forward_of(model: nn.Module, example: Example) -> Any:
    """What a model returns."""
    return example.call(model)


class Precision(Protocol):
    """A way to run a copy of a model: what `call` gives, and the copy as it is afterwards. Neither the model nor the
    example are changed, and the state of random numbers is as before.
    """

    def __call__(
        self, model: nn.Module, example: Example, mode: str, call: Call = forward_of
    ) -> tuple[Any, nn.Module]: ...


def in_double(model: nn.Module, example: Example, mode: str, call: Call = forward_of) -> tuple[Any, nn.Module]:
    """In float64. Large layers convert their weights only while they run, so that the copy needs little memory."""
    try:
        return _run_double(model, example, mode, call, lazily=True)
    except RuntimeError:  # a layer's weight that another module uses directly is not converted in time
        return _run_double(model, example, mode, call, lazily=False)


def in_own(model: nn.Module, example: Example, mode: str, call: Call = forward_of) -> tuple[Any, nn.Module]:
    """In the precision of the model."""
    copy = _in_mode(share_tensors(model, _owned), mode)
    with undisturbed(), without_dropout(mode):
        return call(copy, convert_tensors(example, lambda tensor: tensor.detach().clone())), copy


def _run_double(model: nn.Module, example: Example, mode: str, call: Call, lazily: bool) -> tuple[Any, nn.Module]:
    copy = _double_copy(model, mode, lazily)
    with undisturbed(), without_dropout(mode), _Doubled():  # type: ignore[no-untyped-call]
        return call(copy, convert_tensors(example, _double)), copy


class _Doubled(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """Casts inside forward give float64, and so do tensors that it makes, with the values that they have in their own
    type: a graph has them as constants.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") in WIDER and _tensors((args, kwargs)):
            kwargs = {**kwargs, "dtype": WIDER[kwargs["dtype"]]}
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.dtype not in WIDER:
            return result  # as nearly always
        given = _tensors((args, kwargs))

        def widen(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.dtype not in WIDER or any(leaf is tensor for tensor in given):
                return leaf
            return leaf.to(WIDER[leaf.dtype])

        return tree_map(widen, result)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to(WIDER.get(tensor.dtype, tensor.dtype)).clone()


def _owned(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied


def _double_copy(model: nn.Module, mode: str, lazily: bool) -> nn.Module:
    late = (
        {id(t) for m in model.modules() if type(m) in _LATE for t in m.parameters(recurse=False)} if lazily else set()
    )

    def convert(tensor: Tensor) -> Tensor:
        if id(tensor) in late:
            return tensor
        wide = _double(tensor)
        return nn.Parameter(wide, requires_grad=False) if isinstance(tensor, nn.Parameter) else wide

    copy = _in_mode(share_tensors(model, convert), mode)
    for module in copy.modules():
        if type(module) in _LATE and lazily:
            module.register_forward_pre_hook(_load_double)
            module.register_forward_hook(_unload_double, always_call=True)
    return copy


TRAINING = "training"
"""A mode: the model as `.train()` leaves it, but for dropout. `"train"` is evaluation with batch statistics."""


class _KeepAll(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """Dropout and its kin draw what is kept by position; here each draw gives its expected value, and nothing goes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bernoulli_.float:
            return args[0].fill_(args[1] if len(args) > 1 else 0.5)
        if func is torch.ops.aten.native_dropout.default:
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        return func(*args, **(kwargs or {}))


def without_dropout(mode: str) -> AbstractContextManager[object]:
    """In training mode, dropout is off while the block runs."""
    return _KeepAll() if mode == TRAINING else nullcontext()  # type: ignore[no-untyped-call]


def _in_mode(model: nn.Module, mode: str) -> nn.Module:
    if mode == TRAINING:
        return model.train()
    model.eval()
    for module in model.modules():
        if mode == "train" and isinstance(module, nn.modules.batchnorm._NormBase):
            module.train()
    return model


_LATE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def _load_double(module: nn.Module, args: Any) -> None:
    module.__dict__["_single"] = dict(module._parameters)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(_double(parameter), requires_grad=False)


def _unload_double(module: nn.Module, args: Any, output: Any) -> None:
    if "_single" in module.__dict__:
        module._parameters.update(module.__dict__.pop("_single"))
