"""Write down what a model does while it really runs.

Nothing is wrapped: tensors are plain tensors and keep their identity, shapes, lengths and branches are plain Python.
Three places watch: a `TorchFunctionMode` sees every call of the torch API, factories and functions of parameters
included; `nn.Module.__call__`, patched meanwhile, keeps layers whole; and a `TorchDispatchMode` catches what neither
saw (TorchScript, C++ extensions) as aten operators, which have no rule and are boundaries.
"""

import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.graph.containers import convert_tensors, holds_tensor, tensors_in
from fxprune.graph.convolutions import Convolution
from fxprune.graph.editing import CODE, RUN
from fxprune.graph.tracer import LEAVES, METADATA
from fxprune.graph.tracing import is_hooked

CONVOLUTIONS: dict[str, type[Convolution]] = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
_CONVOLUTION_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONVOLUTION_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1}
_TELLS_NOTHING = METADATA | {"__len__", "__hash__", "__repr__", "__format__", "register_hook", "retain_grad"}
_HOLDS_LAYERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


# --- operators that only recorded graphs have -------------------------------------------------------------------------


def set_item_(x: Tensor, key: Any, value: Any) -> Tensor:
    """`x[key] = value`, giving x."""
    x[key] = value
    return x


def observe(x: Tensor) -> Tensor:
    """Forward looked at the data of x (`item`, `tolist`, `numpy`, a condition), or a hook saw it: the order of its
    channels counts.
    """
    return x


def get_property(x: Tensor, name: str) -> Any:
    """An attribute of x that is a tensor."""
    return getattr(x, name)


class Constant:
    """A tensor that is neither input, parameter nor buffer: a plain attribute, or made from data. Nobody can reorder
    it, so it is a function without inputs, which has no labels: what meets it keeps its order.
    """

    __name__ = "constant"
    __module__ = __name__

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach().clone()

    def __call__(self) -> Tensor:
        return self.tensor.clone()  # it may be written into


# --- the recorder -----------------------------------------------------------------------------------------------------


class Recorder(TorchFunctionMode):
    """Writes several runs into one graph: modules then have a call site for each run, and what one site is told holds
    for all.

    Args:
        whole: whether a layer with a forward of its own is known, and stays one node.

    Attributes:
        graph: placeholders of all runs first, no output yet.
        values: what each node gave, with meta tensors in place of tensors.
        written: nodes that write into parameters or buffers.
        reads: nodes that look at data, with the line of code.
        padded: convolutions whose own forward only prepares the input, with the attributes of the plain one.
    """

    def __init__(self, whole: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.written: list[fx.Node] = []
        self.reads: list[fx.Node] = []
        self.padded: dict[str, dict[str, Any]] = {}
        self._whole, self._run, self._inside = whole, -1, 0
        self._known: dict[int, tuple[fx.Node, tuple[Any, ...]]] = {}  # parts of tuples are picked when they are used
        self._own: set[int] = set()  # parameters and buffers that this run has used
        self._alive: list[Any] = []  # an id is unique only while its object lives
        self._stack: list[nn.Module] = []
        self._last_input: fx.Node | None = None
        self._paths: dict[int, str] = {}
        self._names: dict[int, str] = {}

    @contextmanager
    def run(self, model: nn.Module, inputs: list[Tensor]) -> Iterator[None]:
        """Record what happens in the block as a run of `model`, a copy that the user does not see, on `inputs`."""
        self._run += 1
        self._known, self._own, self._stack = {}, set(), []
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._names = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
        self._alive += [model, inputs]
        for tensor in inputs:
            self._input(tensor)
        original = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self._call(original, module, args, kwargs)

        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            with _Escapes(self), self:
                yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]

    def forget_run(self) -> None:
        """Take the nodes of the last run out of the graph."""
        for node in reversed(self.graph.nodes):
            if node.meta.get(RUN) == self._run:
                self.graph.erase_node(node)
                self.values.pop(node, None)
        self.written, self.reads = ([n for n in nodes if n in self.values] for nodes in (self.written, self.reads))
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        self._last_input = placeholders[-1] if placeholders else None

    def kept_by(self, model: nn.Module) -> list[Tensor]:
        """Tensors of this run that modules keep as attributes: whoever uses the model may look at them."""
        registers = ("_parameters", "_buffers", "_modules")
        attributes = [v for m in model.modules() for k, v in vars(m).items() if k not in registers]
        return [tensor for tensor in tensors_in(attributes) if id(tensor) in self._known]

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that gives a tensor of this run."""
        if id(tensor) in self._known:
            node, path = self._known[id(tensor)]
            for key in path:
                value = self.values[node][key]
                node = self._node("call_function", operator.getitem, (node, key), {})
                self.values[node] = value
            self._known[id(tensor)] = node, ()
            return node
        name = self._names.get(id(tensor))
        if name is None:
            node = self._node("call_function", Constant(tensor), (), {})
        else:
            self._own.add(id(tensor))
            node = self._node("get_attr", name, (), {})
        with self._unseen():
            self.values[node] = as_meta(tensor)
        self._learn(tensor, node, ())
        return node

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__iter__":  # for part in tensor
            return iter(self.__torch_function__(Tensor.unbind, types, args, {}))
        with self._unseen():
            result = func(*args, **kwargs)
        if name == "__set__":  # x.data = y
            if func.__self__.__name__ == "data":
                self._write("call_method", "copy_", args, {}, args[0])
        elif name == "__setitem__":
            self._write("call_function", set_item_, args, kwargs, args[0])
        elif not holds_tensor(result):
            if name != "__get__" and name not in _TELLS_NOTHING and not _asks_for_a_property(name):
                self._read(tensors_in((args, kwargs)))
        elif name == "__get__":
            self._property(func.__self__.__name__, args[0], result)
        elif name in CONVOLUTIONS and self._is_own_convolution(name, args, kwargs, result):
            pass
        elif name == "__getitem__":
            self._write("call_function", operator.getitem, args, kwargs, result)
        elif getattr(Tensor, name, None) is func or getattr(torch._C.TensorBase, name, None) is func:
            self._write("call_method", name, args, kwargs, result)
        else:
            self._write("call_function", func, args, kwargs, result)
        return result

    def escape(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """An aten operator: run it, and record it where nobody else does."""
        if self._inside:
            return func(*args, **kwargs)
        with self._unseen():
            result = func(*args, **kwargs)
        given = tensors_in((args, kwargs))
        if any(id(tensor) in self._known or id(tensor) in self._names for tensor in given):
            if holds_tensor(result):
                self._write("call_function", func, args, kwargs, result)
            else:
                self._read(given)
        return result

    def _call(self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """`nn.Module.__call__` meanwhile."""
        path = self._paths.get(id(module))
        if not self._inside and path and self._is_leaf(module):
            with self._unseen():
                result = original(module, *args, **kwargs)
            if holds_tensor(result):
                self._write("call_module", path, args, kwargs, result)
            return result
        self._stack.append(module)
        try:
            result = original(module, *args, **kwargs)
        finally:
            self._stack.pop()
        if not self._inside and (module._forward_hooks or module._forward_pre_hooks):
            for tensor in tensors_in((args, kwargs, result)):  # a hook sees them, and may keep them
                if id(tensor) in self._known:
                    self._write("call_function", observe, (tensor,), {}, tensor)
        return result

    def _is_leaf(self, module: nn.Module) -> bool:
        """Layers, and modules of torch that hold no others, are one node. A subclass of a layer with a forward of its
        own (a LayerNorm that permutes, a convolution that pads) is recorded inside, unless it is known.
        """
        if isinstance(module, torch.jit.ScriptModule):
            return True
        of_torch = type(module).__module__.startswith(("torch.nn", "torch.ao.nn"))
        if isinstance(module, LEAVES):
            return of_torch or is_hooked(module) or self._whole(module)
        return of_torch and not isinstance(module, _HOLDS_LAYERS)

    def _is_own_convolution(self, name: str, args: Any, kwargs: Mapping[str, Any], result: Any) -> bool:
        """`F.conv2d(x, self.weight, self.bias, ...)` in the forward of a subclass of Conv2d is the layer itself, after
        what forward did before.
        """
        owner = self._stack[-1] if self._stack else None
        given = dict(zip(_CONVOLUTION_ARGUMENTS, args, strict=False)) | dict(kwargs)
        if not isinstance(owner, CONVOLUTIONS[name]) or not self._paths.get(id(owner)):
            return False  # without a path it is the model itself, which calls no layer
        if given["weight"] is not owner.weight or given.get("bias") is not owner.bias:
            return False
        dims = len(owner.kernel_size)
        called = {name: given.get(name, default) for name, default in _CONVOLUTION_DEFAULTS.items()}
        settings = {name: (value,) * dims if isinstance(value, int) else value for name, value in called.items()}
        settings |= {"groups": given.get("groups", 1), "padding_mode": "zeros"}
        path = self._paths[id(owner)]
        if self.padded.setdefault(path, settings) != settings:
            return False
        self._write("call_module", path, (given["input"],), {}, result)
        return True

    def _property(self, name: str, x: Tensor, result: Any) -> None:
        if name == "data":
            self._write("call_method", "detach", (x,), {}, result)
        elif name in ("T", "mT") and x.dim() == 2:
            self._write("call_method", "t", (x,), {}, result)
        elif name == "mT":
            self._write("call_method", "transpose", (x, -2, -1), {}, result)
        elif name not in ("grad", "grad_fn", "_base"):
            self._write("call_function", get_property, (x, name), {}, result)

    def _read(self, tensors: list[Tensor]) -> None:
        """Forward looked at the data of some tensors."""
        for tensor in tensors:
            if id(tensor) in self._known or id(tensor) in self._names:
                self.reads.append(self._write("call_function", observe, (tensor,), {}, tensor))

    def _write(self, op: str, target: Any, args: Any, kwargs: Any, result: Any) -> fx.Node:
        """Add a node, and remember it as what gives `result`."""
        with self._unseen():
            node = self._node(op, target, self._convert(args), self._convert(dict(kwargs)))
            self.values[node] = as_meta(result)
            name = str(getattr(target, "__name__", target))
            in_place = op != "call_module" and name.endswith("_") and not name.endswith("__")
            if (in_place or name.startswith("__i")) and args and id(args[0]) in self._own:
                self.written.append(node)
            self._learn(result, node, ())
        return node

    def _node(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs)
        node.meta[RUN], node.meta[CODE] = self._run, line_of_code()
        owner = next((module for module in reversed(self._stack) if id(module) in self._paths), None)
        if owner is not None and self._paths[id(owner)]:
            path = self._paths[id(owner)]
            node.meta["nn_module_stack"] = {path: (path, type(owner))}
        return node

    def _learn(self, value: Any, node: fx.Node, path: tuple[Any, ...]) -> None:
        if isinstance(value, Tensor):
            self._known[id(value)] = node, path
            if id(value) in self._names:
                self._own.add(id(value))
            self._alive.append(value)
        elif isinstance(value, Mapping):
            for key, part in value.items():
                self._learn(part, node, (*path, key))
        elif isinstance(value, list | tuple):
            for i, part in enumerate(value):
                self._learn(part, node, (*path, i))

    def _input(self, tensor: Tensor) -> None:
        """Placeholders come first in the graph, those of later runs too."""
        last = self._last_input
        with self.graph.inserting_after(last) if last is not None else self.graph.inserting_before():
            node = self._last_input = self.graph.placeholder(f"input_{self._run}_{len(self._known)}")
        node.meta[RUN] = self._run
        self.values[node] = as_meta(tensor)
        self._learn(tensor, node, ())

    def _convert(self, value: Any) -> Any:
        """Arguments as the graph has them: nodes in place of tensors."""
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, slice):
            return slice(*(self._convert(part) for part in (value.start, value.stop, value.step)))
        if isinstance(value, Mapping):
            return {key: self._convert(part) for key, part in value.items()}
        if isinstance(value, list):
            return [self._convert(part) for part in value]
        if isinstance(value, tuple):
            return tuple(self._convert(part) for part in value)
        return list(value) if isinstance(value, range) else value

    @contextmanager
    def _unseen(self) -> Iterator[None]:
        self._inside += 1
        try:
            with torch._C.DisableTorchFunction():
                yield
        finally:
            self._inside -= 1


class _Escapes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """Shows a recorder each aten operator."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.recorder.escape(func, args, kwargs or {})


def as_meta(value: Any) -> Any:
    """A value with meta tensors in place of tensors."""
    if isinstance(value, Tensor):
        plain = value.detach()
        return plain.to("meta") if plain.is_sparse else torch.empty_like(plain, device="meta")
    return convert_tensors(value, as_meta)


def line_of_code() -> str:
    """Where in code that is neither torch's nor ours the present call was made: `block.py:237`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.partition(".")[0] not in ("torch", "fxprune", "contextlib"):
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _asks_for_a_property(name: str) -> bool:
    return name.startswith("is_") and name != "is_nonzero"
