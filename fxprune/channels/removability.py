"""Which channels could be removed, as if they had never been: removing a channel equals setting it to zero only where
zero stays zero up to the layers that read it, and where no operator computes from several channels at once.

Suppose all tensors that belong to a class of channels are zero: the filters that write it, the BatchNorm scales and
shifts on the way. Walking the graph once, each value is asked where that zero is still certain. A sigmoid makes 0.5 of
it, and a product with a zero channel makes zero again (squeeze-and-excitation). A layer that reads a class while it is
not surely zero, or a normalisation over channels, rules the class out, and the reason is kept.

What an elementwise operator makes of zeros is found by evaluating it on zeros, not by a list of names.

The number of channels itself may be computed with: `x.sum(1) / x.shape[1]`. Sizes are followed as well, and rule out
what they count wherever they do anything but tell an operator that moves data the sizes of its result.
"""

import copy
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fxprune.channels import ChannelAnalysis
from fxprune.channels.analysis import family_of
from fxprune.channels.atoms import UNLABELLED
from fxprune.channels.interpreter import varying
from fxprune.graph.containers import holds_tensor
from fxprune.graph.convolutions import Convolution, is_depthwise
from fxprune.graph.editing import called_module, label, tensor_sources
from fxprune.graph.layers import TrainingFlag
from fxprune.graph.memory import is_mutating
from fxprune.graph.norms import norm_kind
from fxprune.plans.eligibility import computes_its_own_forward

Classes = npt.NDArray[np.bool_]

# Operators that only move values, by the family of their rule: zero stays zero, wherever it goes.
_MOVEMENT = frozenset("cast dimensionwise item named_item reshape expand repeat concatenate stack".split())
# Operators that treat all channels alike and apart, given one tensor.
_CHANNELWISE = frozenset("windows pad".split())
_ZERO_ADDS_NOTHING = ("sum", "norm")
# What is asked of a tensor to know how many channels it has.
_COUNTS = ("shape", "size", "numel", "nelement", "len", "__len__")
# Families whose operators may be given such numbers: `fxprune.channels.compaction` sees to it that they fit.
_SIZED = frozenset("dimensionwise item reshape expand repeat pad constant".split())


@dataclass
class _Walk:
    """Where zero is not certain.

    Attributes:
        lost: for each node, the classes `(K,)` that may be other than zero in its value, were they set to zero.
        refused: class to the reason why it cannot be removed.
        counted: for each node that gives sizes, or what is computed from them, the classes `(K,)` whose number counts;
            a list with those of each dimension for a whole shape.
    """

    module: fx.GraphModule
    values: dict[fx.Node, Any]
    analysis: ChannelAnalysis
    lost: dict[fx.Node, Classes] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    counted: dict[fx.Node, Classes | list[Classes]] = field(default_factory=dict)
    _present: dict[fx.Node, Classes] = field(default_factory=dict)

    def none(self) -> Classes:
        """No class, `(K,)`."""
        return np.zeros(self.analysis.blocks.count, dtype=np.bool_)

    def numbers(self, node: fx.Node) -> Classes:
        """The classes whose number a node is given."""
        found = self.none()
        for source in node.all_input_nodes:
            given = self.counted.get(source, [])
            for classes in given if isinstance(given, list) else [given]:
                found = found | classes
        return found

    def present(self, node: fx.Node) -> Classes:
        """The classes that stand in a value."""
        if node not in self._present:
            self._present[node] = self._find(node)
        return self._present[node]

    def _find(self, node: fx.Node) -> Classes:
        found = self.none()
        for leaf in tree_leaves(self.analysis.labels.get(node)):
            if isinstance(leaf, Tensor):
                atoms = leaf.numpy().reshape(-1)
                found[self.analysis.blocks.classes[atoms[atoms != UNLABELLED]]] = True
        return found

    def refuse(self, classes: Classes, reason: str) -> None:
        """These classes stay."""
        for c in np.flatnonzero(classes).tolist():
            self.refused.setdefault(c, reason)

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """Nodes that give a node its tensors."""
        return tensor_sources(node, self.values)

    def carried(self, node: fx.Node) -> Classes:
        """Lost in an operand in which they stand."""
        found = self.none()
        for source in self.sources(node):
            found |= self.lost[source] & self.present(source)
        return found


def irremovable(module: fx.GraphModule, values: dict[fx.Node, Any], analysis: ChannelAnalysis) -> dict[int, str]:
    """Classes of channels (`analysis.blocks.classes`) that cannot be removed exactly, with the reason.

    Args:
        module: the analyzed graph.
        values: what each node gives on meta tensors.
        analysis: of `module`.
    """
    walk = _Walk(module, values, analysis)
    walk.refused |= analysis.blocks.pinned
    for node in module.graph.nodes:
        walk.lost[node] = _visit(walk, node)
    return walk.refused


def _visit(walk: _Walk, node: fx.Node) -> Classes:
    """The classes lost in the value of a node."""
    nothing = walk.none()
    if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):  # a name that torch.fx gives
        walk.refuse(walk.present(node), f"{label(node)} was computed while tracing, and the model has no such tensor")
    if node.op in ("placeholder", "get_attr"):
        return nothing  # parameters and buffers are set to zero themselves
    gives_tensors = holds_tensor(walk.values.get(node))
    if not gives_tensors and walk.values.get(node) is not None:
        walk.counted[node] = _sizes(walk, node)
        return nothing
    family = family_of(walk.module, node)
    if family not in _SIZED:
        walk.refuse(walk.numbers(node), f"{label(node)} computes with their number")
    if node.name in walk.analysis.boundaries or not gives_tensors:
        return nothing  # what meets a boundary is pinned
    if family == "constant":
        return _unless("zeros" in _called(node), walk.present(node))
    if not walk.sources(node):
        return nothing
    module = called_module(walk.module, node) if node.op == "call_module" else None
    source = walk.sources(node)[0]
    if isinstance(module, Convolution):
        return _convolution(walk, node, module, source)
    if family in ("item", "named_item") and not isinstance(walk.values[source], Tensor):
        # of a pair of numbers and indices `lost` is said of the numbers, and no index is surely zero
        return walk.carried(node) | _unless(_is_floating(walk.values[node]), walk.present(node))
    if family in _MOVEMENT or family == "gated":
        return walk.carried(node)
    if family == "unpool":
        return walk.lost[source] & walk.present(source)  # zeros, wherever they are laid
    if family == "elementwise":
        return _elementwise(walk, node)
    if family in _CHANNELWISE:
        return walk.carried(node) | _unless(_keeps_zero(walk, node, source), walk.present(node))
    if family == "linear":
        walk.refuse(walk.carried(node), f"{label(node)} reads it where zero has become another value")
        return nothing
    if family == "reduce":
        return _reduction(walk, node, source)
    if isinstance(module, nn.PReLU):
        return walk.carried(node)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        if _silences(walk, node, source):
            return nothing
        own = all(getattr(module, name, None) is None for name in ("weight", "running_mean"))
        return walk.carried(node) | _unless(own and _keeps_zero(walk, node, source), walk.present(node))
    if node.target is F.instance_norm and len(walk.sources(node)) == 1:
        return walk.carried(node) | _unless(_keeps_zero(walk, node, source), walk.present(node))
    if module is not None and _counts_zeros(module, walk.analysis.labels[source]):
        walk.refuse(walk.carried(node), f"{label(node)} reads it where zero has become another value")
        return nothing  # its scales and shifts are set to zero
    what = type(module).__name__ if module is not None else _called(node)
    walk.refuse(
        walk.present(source) | walk.present(node), f"{label(node)} ({what}) may compute from several channels at once"
    )
    return walk.present(node)


def _counts_zeros(module: nn.Module, labels: Any) -> bool:
    """Whether a module normalises over channels in a way that goes on without some that are zero."""
    kind = norm_kind(module)
    return kind is not None and isinstance(labels, Tensor) and varying(labels) == [kind.dim % labels.dim()]


def _called(node: fx.Node) -> str:
    """Name of the function or method that a node calls."""
    return str(getattr(node.target, "__name__", node.target))


def _sizes(walk: _Walk, node: fx.Node) -> Classes | list[Classes]:
    """The classes whose number a value without tensors depends on."""
    sources = walk.sources(node)
    if not sources:  # arithmetic with sizes, or one of a shape
        if node.target is operator.getitem and isinstance(node.args[1], int | slice):
            shape = walk.counted.get(node.args[0])  # type: ignore[arg-type]  # a node
            if isinstance(shape, list):
                return shape[node.args[1]]
        return walk.numbers(node)
    name = node.args[1] if node.target is getattr else _called(node)
    labels = walk.analysis.labels[sources[0]]
    if name not in _COUNTS or not isinstance(labels, Tensor):
        return walk.none()
    along = [walk.present(sources[0]) if size > 1 else walk.none() for size in labels.shape]
    if isinstance(walk.values[node], tuple):
        return along
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    return along[dim] if name == "size" and isinstance(dim, int) else walk.present(sources[0])


def _convolution(walk: _Walk, node: fx.Node, conv: Convolution, source: fx.Node) -> Classes:
    if computes_its_own_forward(type(conv)):
        reason = f"{label(node)} is a {type(conv).__name__}, which computes its weight from all input channels"
        walk.refuse(walk.present(source) | walk.present(node), reason)
    elif conv.groups == 1:
        walk.refuse(walk.carried(node), f"{label(node)} reads it where zero has become another value")
    elif not is_depthwise(conv):
        reason = f"{label(node)} is a grouped convolution, whose groups have a fixed size"
        walk.refuse(walk.present(source) | walk.present(node), reason)
    return walk.none()  # its filters are set to zero, those of a depthwise convolution too


def _elementwise(walk: _Walk, node: fx.Node) -> Classes:
    """Evaluate the operator for each pattern of operands that are zero."""
    sources = walk.sources(node)
    here = walk.present(node)
    zero = np.stack([walk.present(source) & ~walk.lost[source] for source in sources])  # (operands, classes)
    lost = np.zeros_like(here)
    for pattern in np.unique(zero[:, here], axis=1).T:
        if not _gives_zero(walk, node, dict(zip(sources, pattern.tolist(), strict=True))):
            lost |= here & (zero == pattern[:, None]).all(axis=0)
    if is_mutating(walk.module, node):
        written = node.kwargs.get("out", node.args[0] if node.args else sources[0])
        before = walk.lost[written] if isinstance(written, fx.Node) else walk.none()
        walk.refuse(lost & ~before, f"{label(node)} changes zero in place, under other readers")
    return lost


def _gives_zero(walk: _Walk, node: fx.Node, zero: dict[fx.Node, bool]) -> bool:
    rank = max(walk.values[source].dim() for source in zero)
    generator = torch.Generator().manual_seed(0)

    def operand(source: fx.Node) -> Tensor:
        shape = (2,) * rank
        values = torch.zeros(shape) if zero[source] else torch.randn(shape, generator=generator)
        dtype = walk.values[source].dtype
        return values > 0 if dtype == torch.bool else values.to(dtype)

    return any(zero.values()) and _is_zero(_evaluate(walk, node, operand))


def _keeps_zero(walk: _Walk, node: fx.Node, source: fx.Node) -> bool:
    """Whether an operator that slides over positions, or reduces them, makes zero of zeros."""
    value, labels = walk.values[source], walk.analysis.labels[source]
    shape = [min(size, 2) if d in varying(labels) else size for d, size in enumerate(value.shape)]
    return _is_zero(_evaluate(walk, node, lambda _: torch.zeros(shape, dtype=value.dtype)))


def _silences(walk: _Walk, node: fx.Node, source: fx.Node) -> bool:
    """Whether a normalisation of each channel, with an activation perhaps, gives zero once its scale and shift are."""
    value, generator = walk.values[source], torch.Generator().manual_seed(0)
    shape = [size if d == 1 else 2 for d, size in enumerate(value.shape)]
    operand = torch.randn(shape, generator=generator).to(value.dtype)
    return _is_zero(_evaluate(walk, node, lambda _: operand, silenced=True))


def _reduction(walk: _Walk, node: fx.Node, source: fx.Node) -> Classes:
    """Sum, mean, max ...: over positions as any channelwise operator; over channels only where zeros do not count."""
    meet = walk.present(source) & ~walk.present(node)
    labels, out = (tree_leaves(walk.analysis.labels[n])[0] for n in (source, node))
    if not meet.any() and labels.numel() == out.numel():
        return walk.carried(node) | _unless(_keeps_zero(walk, node, source), walk.present(node))
    name = _called(node)
    if name not in _ZERO_ADDS_NOTHING:
        walk.refuse(walk.present(source), f"{label(node)} ({name}) may compute from several channels at once")
    walk.refuse(walk.carried(node), f"{label(node)} reads it where zero has become another value")
    return walk.present(node) & walk.carried(node)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _unless(kept: bool, classes: Classes) -> Classes:
    return np.zeros_like(classes) if kept else classes


def _evaluate(walk: _Walk, node: fx.Node, operand: Callable[[fx.Node], Tensor], *, silenced: bool = False) -> list[Any]:
    """What a call gives, in evaluation and in training mode, with other tensors in place of its own; nothing if it
    cannot be called. A `silenced` module has zeros for scale and shift.
    """

    def swap(source: fx.Node) -> Any:
        if source.op == "call_module" and isinstance(called_module(walk.module, source), TrainingFlag):
            return training
        return operand(source) if isinstance(walk.values[source], Tensor) else walk.values[source]

    results = []
    with torch.no_grad(), torch.random.fork_rng(devices=()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dropout of a value of unusual rank
        for training in (False, True):
            args, kwargs = fx.node.map_arg(node.args, swap), fx.node.map_arg(node.kwargs, swap)
            try:
                if node.op == "call_module":
                    module = copy.deepcopy(called_module(walk.module, node)).train(training)
                    for attribute in ("weight", "bias") if silenced else ():
                        if isinstance(parameter := getattr(module, attribute, None), Tensor):
                            parameter.zero_()
                    results.append(module(*args, **kwargs))
                elif node.op == "call_method":
                    results.append(getattr(args[0], str(node.target))(*args[1:], **kwargs))
                else:
                    results.append(node.target(*args, **kwargs))  # type: ignore[operator]
            except Exception:  # whatever it raises on so small a value: then nothing is known of it
                if not silenced:  # a normalisation with eps 0 cannot be trained
                    return []
    return results


def _is_zero(results: list[Any]) -> bool:
    """Whether the results are zeros; of one with indices beside it the first counts."""
    numbers = [result if isinstance(result, Tensor) else next(iter(result), None) for result in results]
    return bool(numbers) and all(isinstance(number, Tensor) and not bool(number.any()) for number in numbers)
