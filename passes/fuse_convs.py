"""clamp(gather(conv(gather(x, a)), b) + residual, low, high) becomes one `FusedConv2d`.

x (N, C, H, W); a (groups * k,), b (O,) long; evaluation mode.

1. A gather of channels before the convolution is read through, whoever else reads it.
2. After it, as long as each value has one reader: a gather that permutes, an add of a value of the same shape, ReLU or
   ReLU6 (or `clamp` with numbers), in this order, each at most once. Of two convolutions that are added the later one
   takes the other as residual. The shape must be the same for larger inputs too.
3. The fused node stands where the last of them stood, unless an in-place operator changes its input on the way there;
   then the chain ends before.
Left alone, with a reason: convolutions of other kinds and subclasses of Conv2d, padding other than zeros, hooks and
computed weights, values that are no batches of images, parameters that the graph reads by name.
"""

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from fxprune.channels.orders import alignment
from fxprune.graph.convolutions import Convolution
from fxprune.graph.editing import Outcome, Skip, called_module, calls, first_reader, new_path, read_by_name
from fxprune.graph.fused import FusedConv2d
from fxprune.graph.layers import ChannelGather
from fxprune.graph.memory import Memory
from fxprune.graph.tracing import is_hooked
from fxprune.graph.values import meta_values

# Targets of nodes: functions, and names of methods.
_ADDS_IN_PLACE = frozenset(("add_", "__iadd__", operator.iadd))
_ADDS = frozenset(("add", "__add__", "__radd__", operator.add, torch.add)) | _ADDS_IN_PLACE
_RELUS = frozenset(("relu", "relu_", torch.relu, torch.relu_, F.relu, F.relu_))
_CLAMPS = frozenset(("clamp", "clamp_", "clip", "clip_", torch.clamp, torch.clamp_, torch.clip, torch.clip_))


@dataclass(frozen=True)
class FuseConvs:
    """Turn each plain convolution, with what surrounds it, into a `FusedConv2d`. For evaluation only.

    Attributes:
        inputs: arguments of forward as meta tensors, to know shapes.
        pruned: names of the convolutions that had one group before they were pruned.
        block: convolutions shall read aligned blocks of this many channels: a permutation between two convolutions
            that moves no whole blocks goes to the one that writes.
    """

    inputs: tuple[Any, ...]
    pruned: Collection[str] = ()
    block: int = 1

    def __call__(self, gm: fx.GraphModule) -> Outcome:
        values, _ = meta_values(gm, self.inputs)
        larger, _ = meta_values(gm, tuple(tree_map(_larger, self.inputs)))
        named, memory = read_by_name(gm), Memory(gm)
        convs: dict[fx.Node, nn.Conv2d] = {}
        skipped = []
        for node, conv in calls(gm, Convolution):
            if not isinstance(conv, nn.Conv2d):
                skipped.append(Skip(node.name, f"there is no fused form of a {type(conv).__name__}"))
            elif reason := _why_not(node, conv, values, first_reader(conv.parameters(), named)):
                skipped.append(Skip(node.name, reason))
            else:
                convs[node] = conv
        claimed: dict[fx.Node, list[_Step]] = {}
        taken: set[fx.Node] = set()
        for node in reversed(convs):  # of two convolutions that are added the later one can take the other's result
            claimed[node] = _tail(gm, node, (values, larger), memory, convs, taken, self.block)
            taken.update(step.node for step in claimed[node])
        through = {
            node
            for node in convs
            if _gather(gm, source := node.all_input_nodes[0]) is not None
            and source not in taken
            and _reads_through(source, _last(node, claimed), memory)
        }
        self._rewrite(gm, convs, claimed, through)
        for node, _ in reversed(list(calls(gm, ChannelGather))):
            if not node.users:
                gm.graph.erase_node(node)
        gm.delete_all_unused_submodules()
        return Outcome(tuple(node.name for node in convs), tuple(skipped))

    def _rewrite(
        self,
        gm: fx.GraphModule,
        convs: Mapping[fx.Node, nn.Conv2d],
        claimed: Mapping[fx.Node, Sequence["_Step"]],
        through: Collection[fx.Node],
    ) -> None:
        position = {node: i for i, node in enumerate(gm.graph.nodes)}
        replaced: dict[fx.Node, fx.Node] = {}
        last = {node: _last(node, claimed) for node in convs}
        for node in sorted(convs, key=lambda node: position[last[node]]):
            source = node.all_input_nodes[0]
            fused = FusedConv2d(_with_numeric_padding(convs[node]), convs[node].in_channels)
            if node in through and (gather := _gather(gm, source)) is not None:
                fused.channels, fused.index = gather.in_channels, gather.index.clone()
                source = source.all_input_nodes[0]
            fused.dense_groups = 1 if str(node.target) in self.pruned else None
            arguments = [source]
            for step in claimed[node]:
                if step.order is not None:
                    fused.order = step.order
                if step.residual is not None:
                    arguments.append(step.residual)
                if step.bounds is not None:
                    fused.minimum, fused.maximum = step.bounds
            path = new_path(gm, f"{node.target}_fused")
            gm.add_submodule(path, fused.eval())
            with gm.graph.inserting_after(last[node]):
                new = gm.graph.call_module(path, tuple(replaced.get(argument, argument) for argument in arguments))
            replaced[last[node]] = new
            last[node].replace_all_uses_with(new)
            for old in (*(step.node for step in reversed(claimed[node])), node):
                gm.graph.erase_node(old)


@dataclass(frozen=True)
class _Step:
    """A node after a convolution that is computed with it: a gather, an addition or a clamp."""

    node: fx.Node
    order: Tensor | None = None
    residual: fx.Node | None = None
    bounds: tuple[float | None, float | None] | None = None


def _why_not(node: fx.Node, conv: nn.Conv2d, values: Mapping[fx.Node, Any], reader: str | None) -> str:
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} is more than a Conv2d"
    if conv.padding_mode != "zeros" or (
        conv.padding == "same" and any(_same_padding(conv, axis) is None for axis in (0, 1))
    ):
        return f"padding {conv.padding_mode}, {conv.padding}: no fused form pads like that"
    if is_hooked(conv):
        return "it has hooks or a computed weight"
    if reader:
        return f"{reader} reads a parameter of it"
    value = values.get(node)
    if not isinstance(value, Tensor) or value.dim() != 4:
        return "its output is no batch of images"
    return ""


def _tail(
    gm: fx.GraphModule,
    node: fx.Node,
    values: Sequence[Mapping[fx.Node, Any]],
    memory: Memory,
    convs: Collection[fx.Node],
    taken: Collection[fx.Node],
    block: int,
) -> list[_Step]:
    """What follows the convolution and can be computed with it."""
    steps: list[_Step] = []
    last, stage = node, 0
    while len(last.users) == 1 and (user := next(iter(last.users))) not in taken:
        gather = _gather(gm, user)
        left = gather is not None and _all_read_through(user, convs, memory) and _moves_blocks(gather, block)
        if gather is not None and stage < 1 and gather.is_permutation and not left:
            step, stage = _Step(user, order=gather.index.clone()), 1
        elif stage < 2 and (residual := _residual(user, last, values)) is not None:
            step, stage = _Step(user, residual=residual), 2
        elif stage < 3 and (bounds := _bounds(gm, user)) is not None:
            step, stage = _Step(user, bounds=bounds), 3
        else:
            break
        # The fused node stands at the end of the chain and reads there what was read earlier.
        reads = [(node.all_input_nodes[0], node), *((s.residual, s.node) for s in [*steps, step] if s.residual)]
        if any(memory.changes(value, before, [user]) for value, before in reads):
            break
        steps.append(step)
        last = user
    return steps


def _last(node: fx.Node, claimed: Mapping[fx.Node, Sequence[_Step]]) -> fx.Node:
    """The end of what is computed with a convolution."""
    return claimed[node][-1].node if claimed[node] else node


def _reads_through(gather: fx.Node, reader: fx.Node, memory: Memory) -> bool:
    return not memory.changes(gather.all_input_nodes[0], gather, [reader])


def _all_read_through(gather: fx.Node, convs: Collection[fx.Node], memory: Memory) -> bool:
    """Whether all readers are convolutions that can read the input of the gather instead."""
    return all(user in convs and _reads_through(gather, user, memory) for user in gather.users)


def _moves_blocks(gather: ChannelGather, block: int) -> bool:
    return block == 1 or alignment(gather.index.cpu().numpy(), block) == block


def _gather(gm: fx.GraphModule, node: fx.Node) -> ChannelGather | None:
    """The gather of the channels of images that `node` is, if it is one."""
    if node.op != "call_module":
        return None
    gather = called_module(gm, node)
    return gather if isinstance(gather, ChannelGather) and gather.dim in (-3, 1) else None


def _residual(user: fx.Node, value: fx.Node, values: Sequence[Mapping[fx.Node, Any]]) -> fx.Node | None:
    """What `user` adds to `value`, if it is an addition of two tensors of one type that have one shape in all runs: a
    parameter `(1, C, H, W)` has the shape of a single image, and is broadcast over two.
    """
    if user.op not in ("call_method", "call_function") or user.target not in _ADDS:
        return None
    if len(user.args) != 2 or user.kwargs or not all(isinstance(arg, fx.Node) for arg in user.args):
        return None
    first, second = user.args
    if first is second:
        return None
    other = second if first is value else first
    if user.target in _ADDS_IN_PLACE and first is not value:
        return None  # writes into the other value
    assert isinstance(other, fx.Node)
    if not all(_alike(run.get(value), run.get(other)) for run in values if value in run):
        return None
    return other


def _alike(mine: Any, theirs: Any) -> bool:
    """Whether both are tensors of one shape and type."""
    if not isinstance(mine, Tensor) or not isinstance(theirs, Tensor):
        return False
    return mine.shape == theirs.shape and mine.dtype == theirs.dtype


def _larger(leaf: Any) -> Any:
    """Twice the batch, and images of twice the size."""
    if not isinstance(leaf, Tensor) or leaf.dim() == 0:
        return leaf
    return leaf.new_empty(
        [n * (1 if i == 1 else 2) for i, n in enumerate(leaf.shape)]
        if leaf.dim() == 4
        else (2 * len(leaf), *leaf.shape[1:])
    )


def _bounds(gm: fx.GraphModule, user: fx.Node) -> tuple[float | None, float | None] | None:
    """The bounds between which `user` keeps its input, if that is all it does."""
    if user.op == "call_module":
        module = called_module(gm, user)
        if is_hooked(module):
            return None
        if type(module) is nn.ReLU:
            return 0.0, None
        if type(module) in (nn.ReLU6, nn.Hardtanh):
            return float(module.min_val), float(module.max_val)  # type: ignore[arg-type]
        return None
    if user.op not in ("call_method", "call_function"):
        return None
    if user.target in _RELUS and len(user.args) == 1:
        return 0.0, None
    if user.target is F.relu6 and len(user.args) == 1:
        return 0.0, 6.0
    if user.target in _CLAMPS and not set(user.kwargs) - {"min", "max"}:
        low, high = (*user.args[1:], None, None)[:2]
        low, high = user.kwargs.get("min", low), user.kwargs.get("max", high)
        if isinstance(low, int | float | None) and isinstance(high, int | float | None) and (low, high) != (None, None):
            return None if low is None else float(low), None if high is None else float(high)
    return None


def _same_padding(conv: nn.Conv2d, axis: int) -> int | None:
    """The padding on both sides that `"same"` stands for; None if the sides differ."""
    total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
    return None if total % 2 else total // 2


def _with_numeric_padding(conv: nn.Conv2d) -> nn.Conv2d:
    if not isinstance(conv.padding, str):
        return conv
    plain = nn.Conv2d.__new__(nn.Conv2d)
    plain.__dict__.update(conv.__dict__)
    plain.padding = (0, 0) if conv.padding == "valid" else tuple(_same_padding(conv, i) or 0 for i in (0, 1))
    return plain
