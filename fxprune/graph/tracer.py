"""The symbolic tracer: `torch.fx`'s own, with our leaves, proxies that say that they are tensors, buffers that stay
state, contexts that stay, and outputs of any container.
"""

import builtins
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx, nn

from fxprune.errors import TraceError
from fxprune.graph.contexts import GradMode, autocast_recorded
from fxprune.graph.convolutions import Convolution
from fxprune.graph.layers import ChannelGather, TrainingFlag
from fxprune.graph.norms import NormWithZeros

LEAVES: tuple[type[nn.Module], ...] = (
    Convolution,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Linear,
    ChannelGather,
    NormWithZeros,
    TrainingFlag,
)

METADATA = frozenset(
    "size shape dim ndim ndimension numel nelement dtype device layout stride storage_offset element_size itemsize "
    "nbytes requires_grad get_device result_type".split()
)
"""What tells of a tensor, but not of its values; and so does all whose name begins with `is_`."""
NO_TENSORS = METADATA | frozenset(
    "grad_fn item tolist data_ptr numpy register_hook retain_grad backward finfo iinfo "
    "chunk split split_with_sizes tensor_split unbind hsplit vsplit dsplit unsafe_chunk unsafe_split meshgrid "
    "broadcast_tensors max min median mode kthvalue topk sort cummax cummin aminmax svd qr eigh eig lu slogdet".split()
)
"""Attributes, methods and functions that give, or may give, something else than a tensor."""
SEVERAL = (nn.RNNBase, nn.MultiheadAttention, nn.AdaptiveLogSoftmaxWithLoss)
"""Layers that give tuples."""


class TensorProxy(fx.Proxy):
    """A proxy for a value that is a tensor for certain."""

    _is_param = _is_buffer = False  # what isinstance(x, nn.Parameter) and isinstance(x, nn.Buffer) ask for


@contextmanager
def proxies_are_tensors() -> Iterator[None]:
    """While the block runs, `isinstance(x, torch.Tensor)` is true of a `TensorProxy`, as it will be of the value, so
    that forward takes the branch that it takes.

    Python alone is told so. A proxy whose `__class__` says that it is a tensor would deceive C++ too, and TorchScript
    functions and extensions would crash on it.
    """
    original, tensor = builtins.isinstance, torch.empty(0)

    def isinstance_(value: Any, kind: Any) -> bool:
        return original(value, kind) or (type(value) is TensorProxy and original(tensor, kind))

    builtins.isinstance = isinstance_
    try:
        yield
    finally:
        builtins.isinstance = original


def _kept_whole() -> tuple[Callable[..., Any], ...]:
    """torchvision wraps this function for calls from its own modules; here it stays one node for all. No model calls
    it unless torchvision is there already, which takes seconds to import.
    """
    operators = sys.modules.get("torchvision.ops")
    return () if operators is None else (operators.stochastic_depth,)


class Tracer(fx.Tracer):
    """Trace one model once.

    Args:
        leaves: paths of modules that stay whole.
        frozen: paths of modules whose buffers are read while tracing, and are constants of the graph: those that decide
            by their values which way to go.
        tensors: names of arguments of forward that are tensors; None if nothing is known of them.

    Attributes:
        failed: path of the innermost module whose forward raised.
    """

    proxy_buffer_attributes = True

    def __init__(
        self, leaves: Iterable[str] = (), frozen: Iterable[str] = (), tensors: Iterable[str] | None = None
    ) -> None:  # a pickled graph makes its tracer without arguments
        super().__init__(autowrap_functions=_kept_whole())
        self.leaves, self.frozen = frozenset(leaves), frozenset(frozen)
        self.failed: str | None = None
        self._tensors = None if tensors is None else frozenset(tensors)
        self._known: set[fx.Node] = set()
        self._grad: GradMode | None = None

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]
        self._frozen_buffers = {
            id(buffer)
            for name, buffer in root.named_buffers()
            if any(name.startswith(f"{path}.") or not path for path in self.frozen)
        }
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            self._grad = GradMode(self)
            stack.enter_context(autocast_recorded(self))
            stack.enter_context(proxies_are_tensors())
            return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            isinstance(m, LEAVES)
            or module_qualified_name in self.leaves
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None:
                self.failed = self.path_of_module(m)
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if id(attr_val) in self._frozen_buffers:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if torch.is_inference_mode_enabled():
            raise TraceError("forward enters torch.inference_mode, which a graph cannot hold; use torch.no_grad there")
        if self._grad is not None and kind != "placeholder":
            self._grad.follow()
        node = super().create_node(kind, target, *args, **kwargs)
        if self._gives_tensor(node):
            self._known.add(node)
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return TensorProxy(node, self) if node in self._known else super().proxy(node)

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):
            return a.node
        if (
            isinstance(a, Mapping)
            and type(a) not in (dict, OrderedDict)
            and not isinstance(a, fx.immutable_collections.immutable_dict)
        ):
            entries = {key: self.create_arg(value) for key, value in a.items()}
            named = all(isinstance(key, str) and key.isidentifier() for key in entries)
            return self.create_node("call_function", type(a), *(((), entries) if named else ((entries,), {})))
        return super().create_arg(a)

    def _gives_tensor(self, node: fx.Node) -> bool:
        """Whether the value of a node is one tensor, for certain."""
        name = str(getattr(node.target, "__name__", node.target))
        if node.op == "placeholder":
            return self._tensors is None or str(node.target) in self._tensors
        if node.op == "get_attr":
            return True
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            usual = isinstance(module, LEAVES) or type(module).__module__.startswith("torch.nn.")
            return usual and not isinstance(module, SEVERAL) and not getattr(module, "return_indices", False)
        if name in NO_TENSORS or name.startswith("is_"):
            return False
        takes = any(source in self._known for source in node.all_input_nodes)
        if name == "getattr":
            return takes and node.args[1] in ("T", "mT", "H", "mH", "data", "real", "imag")
        if name == "getitem" or node.op == "call_method":
            return node.args[0] in self._known
        return takes and str(getattr(node.target, "__module__", None) or "torch").startswith(("torch", "_operator"))
