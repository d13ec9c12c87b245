"""How channels pass through operators: one rule a family. `operators` says which operator belongs to which family.

A rule is called with the interpreter state, whose `node` is the current node, and returns the labels of what the node
gives. A rule that meets a case it does not cover returns `state.boundary(reason)`: the channels keep their order and
the report says why. What is in no table is a boundary as well. To add an operator, put it into a table; to add a
family, write a function with the identity it rests on as its docstring.
"""

import operator
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx

from fxprune.channels.interpreter import LARGEST_SPREAD, State, along, compress, layer_name, varying
from fxprune.graph.convolutions import Convolution, channel_dim, is_depthwise
from fxprune.graph.editing import called_module, label
from fxprune.graph.norms import GroupNormWithZeros, LayerNormWithZeros

Rule: TypeAlias = Callable[[State], Any]

UNIFORM = frozenset("zeros ones full new_zeros new_ones new_full zeros_like ones_like full_like".split())
"""What makes tensors that hold one number everywhere."""

# --- elementwise ------------------------------------------------------------------------------------------------------


def elementwise(state: State) -> Any:
    """f(x, y, ...) position by position: a permutation of all operands permutes the result. Operands that broadcast
    over channels do not count.
    """
    operands = [state.operand(node) for node in state.tensors()]
    if isinstance(state.value, Tensor) and len(operands) == 1 and operands[0][1] == tuple(state.value.shape):
        return operands[0][0]
    if not isinstance(state.value, Tensor) or not operands:
        return state.boundary(f"{label(state.node)} gives several tensors")
    return state.join(operands, state.value.dim())


def cast(state: State) -> Any:
    """x.to(y), x.type_as(y): the channels of x; y only lends its type."""
    return state.source()[0]


def constant(state: State) -> Any:
    """A new tensor that does not depend on the values of its inputs, only on their shapes.

    One that holds the same number everywhere is itself in any order of its channels, along dimension 1: the initial
    state of a recurrent cell. What is written into later, and sequences of a length that is computed, keep their order.
    """
    name, value = getattr(state.node.target, "__name__", state.node.target), state.value
    if name not in UNIFORM or not isinstance(value, Tensor) or value.dim() < 2:
        return state.unlabelled(value)
    if state.node in state.written or "out" in state.node.kwargs:
        return state.unlabelled(value)
    if name.endswith("_like"):
        return state.source()[0]
    written = torch.utils._pytree.tree_leaves((state.node.args, state.node.kwargs))
    if value.shape[1] == 1 or (value.dim() < 4 and value.shape[1] not in written):
        return state.unlabelled(value)
    return state.mint_along(1, value.shape[1], value.dim())


# --- data movement ----------------------------------------------------------------------------------------------------


def dimensionwise(state: State) -> Any:
    """Movement that treats all positions of a dimension alike (permute, chunk, slice, unsqueeze ...): execute it on the
    labels.
    """
    return _execute(state, lambda node: state.labels[node].expand(state.values[node].shape))


def item(state: State) -> Any:
    """x[...]: pick from a tuple, or slice a tensor. Index tensors are a boundary."""
    source, key = state.node.args
    assert isinstance(source, fx.Node)
    if not isinstance(state.values[source], Tensor):
        return state.labels[source][state.concrete(key)]
    keys = state.concrete(key)
    if any(isinstance(k, Tensor | list | bool) for k in (keys if isinstance(keys, tuple) else (keys,))):
        return state.boundary(f"{label(state.node)} indexes with a tensor")
    return dimensionwise(state)


def named_item(state: State) -> Any:
    """x.values, x.indices: pick from what max and min give. Of a tensor, or of anything else, it is a boundary."""
    source, name = state.node.args
    assert isinstance(source, fx.Node)
    kind = type(state.values[source])
    names = getattr(kind, "__match_args__", ()) if kind.__module__ == "torch.return_types" else ()
    if name not in names:
        return state.boundary(f"{label(source)} is asked for its {name}")
    return tuple(state.labels[source])[names.index(name)]


def reshape(state: State) -> Any:
    """view, reshape, flatten, pixel shuffle ...: execute the movement on labels and, beside them, on the place inside
    the dimensions that do not vary.

    If that place is the same for all channels, the labels of the result are enough. Otherwise (flatten, pixel shuffle)
    one channel stands at several positions: each gets an atom of its own, tied to the channel, in the role of its
    place.
    """
    source = state.tensors()[0]
    labels, shape = state.labels[source], state.values[source].shape
    if labels.numel() == 1:
        return state.unlabelled(state.value)
    fixed = [d for d in range(labels.dim()) if labels.shape[d] == 1]
    place = torch.zeros((1,) * labels.dim(), dtype=torch.int64)
    for d in fixed:
        place = place * shape[d] + along(torch.arange(shape[d]), d, labels.dim())
    moved = _execute(state, lambda node: labels.expand(shape).contiguous() if node is source else state.values[node])
    places = _execute(
        state, lambda node: place.expand(shape).contiguous() if node is source else state.values[node], compressed=False
    )
    vary, rest = varying(moved), [d for d in range(moved.dim()) if moved.shape[d] == 1]
    rows = places.permute(*vary, *rest).reshape(moved.numel(), -1)
    if bool((rows == rows[0]).all()):
        return moved
    if moved.numel() > LARGEST_SPREAD:
        return state.boundary(f"{label(state.node)} spreads the channels over {moved.numel()} positions")
    roles = np.unique(rows.numpy(), axis=0, return_inverse=True)[1].reshape(-1)
    fresh = state.atoms.mint(moved.numel(), state.node.name)
    state.atoms.tie(fresh, moved.numpy(), state.node.name)
    state.atoms.site(fresh, roles)
    return torch.from_numpy(fresh).reshape(moved.shape)


def concatenate(state: State) -> Any:
    """cat: labels are concatenated; a tensor that comes twice gets a second copy of its atoms. Along a dimension where
    none varies, the operands are tied.
    """
    tensors = state.argument(0, "tensors")
    dim = state.argument(1, "dim", state.node.kwargs.get("axis", 0)) % state.value.dim()
    if any(state.labels[node].shape[dim] > 1 for node in tensors):
        return _concatenate_channels(state, tensors, dim)
    ones = [
        (state.labels[node], tuple(1 if d == dim else n for d, n in enumerate(state.values[node].shape)))
        for node in tensors
    ]
    return state.join(ones, state.value.dim())


def stack(state: State) -> Any:
    """stack makes a new dimension, along which no operand varies: the operands are tied."""
    tensors = state.argument(0, "tensors")
    dim = state.argument(1, "dim", 0) % state.value.dim()
    return state.join(
        [(state.labels[node].unsqueeze(dim), tuple(state.values[node].unsqueeze(dim).shape)) for node in tensors],
        state.value.dim(),
    )


def expand(state: State) -> Any:
    """Broadcasting: dimensions of size one grow, new ones come in front; labels do not vary along either."""
    labels, _ = state.operand(state.tensors()[0])
    return labels.reshape((1,) * (state.value.dim() - labels.dim()) + tuple(labels.shape))


def repeat(state: State) -> Any:
    """repeat along dimensions that do not vary leaves the labels alone; repeating channels is a boundary."""
    labels, shape = state.operand(state.tensors()[0])
    padded = (1,) * (state.value.dim() - len(shape)) + tuple(shape)
    labels = labels.reshape((1,) * (state.value.dim() - labels.dim()) + tuple(labels.shape))
    if any(state.value.shape[d] != padded[d] for d in varying(labels)):
        return state.boundary(f"{label(state.node)} repeats channels")
    return labels


def _concatenate_channels(state: State, tensors: Iterable[fx.Node], dim: int) -> Any:
    vary = sorted({dim}.union(*(varying(state.labels[node]) for node in tensors)))
    parts: list[Tensor] = []
    seen = np.zeros(0, dtype=np.int64)
    for node in tensors:
        labels, shape = state.operand(node)
        target = [n if d in vary else 1 for d, n in enumerate(shape)]
        if labels.shape[dim] == 1 and shape[dim] > 1:
            state.pin(labels, f"{label(state.node)} joins it with channels of another dimension")
            labels = torch.from_numpy(state.atoms.mint(int(np.prod(target)), state.node.name)).reshape(target)
            state.pin(labels, f"{label(state.node)} joins channels whose order is fixed")
        atoms = np.unique(labels.numpy())
        if np.isin(atoms, seen, assume_unique=True).any():
            labels = state.duplicate(labels)
        seen = np.union1d(seen, atoms)
        parts.append(labels.expand(target))
    return compress(torch.cat(parts, dim))


def _execute(state: State, substitute: Callable[[fx.Node], Tensor], *, compressed: bool = True) -> Any:
    """Run the current call with `substitute` in place of its tensors."""
    swap = lambda node: substitute(node) if isinstance(state.values[node], Tensor) else state.values[node]  # noqa: E731
    args, kwargs = fx.node.map_arg(state.node.args, swap), fx.node.map_arg(state.node.kwargs, swap)
    if state.node.op == "call_method":
        result = getattr(args[0], str(state.node.target))(*args[1:], **kwargs)
    else:
        function = called_module(state.module, state.node) if state.node.op == "call_module" else state.node.target
        result = function(*args, **kwargs)  # type: ignore[operator]  # a module, or the function of a call_function node
    if not compressed:
        return result
    return torch.utils._pytree.tree_map(lambda leaf: compress(leaf) if isinstance(leaf, Tensor) else leaf, result)


# --- windows, reductions ----------------------------------------------------------------------------------------------


def windows(dims: int | None) -> Rule:
    """Pooling, interpolation: a window slides over the last `dims` dimensions (None: all but two), the same for all
    channels. Indices of a pooling count the positions of one channel.
    """

    def rule(state: State) -> Any:
        source = state.tensors()[0]
        labels, shape = state.operand(source)
        last = len(shape) - 2 if dims is None else dims
        results = [state.value] if isinstance(state.value, Tensor) else list(state.value)
        if any(result.dim() != len(shape) for result in results):
            return state.boundary(f"{label(state.node)} gives tensors of another rank")
        if any(d >= len(shape) - last for d in varying(labels)):
            return state.boundary(f"{label(state.node)} slides a window over channels")
        return labels if isinstance(state.value, Tensor) else (labels,) * len(results)

    return rule


def unpool(dims: int) -> Rule:
    """Max unpooling over the last `dims` dimensions: each channel is laid out by its own indices, so both are tied."""

    def rule(state: State) -> Any:
        operands = [state.operand(node) for node in state.tensors()]
        last = len(state.value.shape) - dims
        if len(operands) != 2 or any(d >= last for labels, _ in operands for d in varying(labels)):
            return state.boundary(f"{label(state.node)} lays out channels by indices")
        return state.join(operands, state.value.dim())

    return rule


def pad(state: State) -> Any:
    """F.pad: along dimensions that do not vary labels pass. Constant padding of channels adds new ones, all alike (the
    CIFAR option-A shortcut).
    """
    source = state.tensors()[0]
    labels, shape = state.operand(source)
    widths = list(state.concrete(state.argument(1, "pad")))
    mode = state.argument(2, "mode", "constant")
    for i in range(len(widths) // 2):
        before, after = widths[2 * i], widths[2 * i + 1]
        dim = len(shape) - 1 - i
        if labels.shape[dim] == 1 or (before, after) == (0, 0):
            continue
        if mode != "constant" or before < 0 or after < 0 or varying(labels) != [dim]:
            return state.boundary(f"{label(state.node)} pads channels in a way that has no rule")
        sides = [[state.mint_along(dim, width, len(shape))] if width else [] for width in (before, after)]
        labels = torch.cat([*sides[0], labels, *sides[1]], dim)
    return labels


def reduce(state: State) -> Any:
    """Sum, mean, max ... over dimensions: symmetric in what it reduces, so channels reduced whole may move; those that
    meet in one sum are tied.
    """
    source = state.tensors()[0]
    labels, shape = state.operand(source)
    second = 2 if getattr(state.node.target, "__name__", state.node.target) == "norm" else 1  # norm(x, p, dim)
    given = state.argument(second, "dim", state.node.kwargs.get("axis"))
    given = None if isinstance(given, bool) else given  # x.var(unbiased)
    if isinstance(given, fx.Node | Tensor):
        return elementwise(state)  # torch.max(a, b)
    if not isinstance(state.value, Tensor):
        if given is not None and any(d in varying(labels) for d in _dims(given, len(shape))):
            if varying(labels) == _dims(given, len(shape)) and all(_picks_values(user) for user in state.node.users):
                return state.unlabelled(state.value)  # the largest value of all channels, not which one it is
            return state.boundary(f"{label(state.node)} gives the index of a channel")
        kept = labels if state.value[0].dim() == len(shape) else labels.squeeze(_dims(given or 0, len(shape))[0])
        return type(state.value)((kept, kept)) if hasattr(state.value, "_fields") else (kept, kept)
    dims = list(range(len(shape))) if given is None else _dims(state.concrete(given), len(shape))
    meeting = [d for d in varying(labels) if d in dims]
    if meeting and len(meeting) == len(varying(labels)):
        return state.unlabelled(state.value)
    for d in meeting:
        first = labels.narrow(d, 0, 1)
        state.tie(first.expand(labels.shape), labels)
        state.atoms.site(
            labels.numpy(),
            along(torch.arange(labels.shape[d]), d, labels.dim()).expand(labels.shape).contiguous().numpy(),
        )
        labels = first
    if state.value.dim() == len(shape):
        return labels
    return labels.squeeze(tuple(dims)) if dims else labels


def gated(state: State) -> Any:
    """glu(x) = a * sigmoid(b) for the halves a, b of x: the halves are told apart, and their channels tied in pairs."""
    dim = getattr(called_module(state.module, state.node), "dim", -1) if state.node.op == "call_module" else None
    labels, value = state.source()
    dim = int(state.argument(1, "dim", -1) if dim is None else dim) % value.dim()
    if labels.shape[dim] == 1:
        return labels
    halves = labels.chunk(2, dim)
    for half in halves:
        state.atoms.site(half.contiguous().numpy())
    state.tie(halves[0].contiguous(), halves[1].contiguous())
    return halves[0].contiguous()


def channel_argument(state: State) -> Any:
    """softmax, F.normalize: each entry is divided by a symmetric function of its row, so a permutation of the row
    permutes the result.
    """
    return state.labels[state.tensors()[0]]


def _picks_values(user: fx.Node) -> bool:
    return user.target in (operator.getitem, getattr) and user.args[1] in (0, "values")


def _dims(given: int | Iterable[int], rank: int) -> list[int]:
    return [d % rank for d in ([given] if isinstance(given, int) else given)]


# --- layers with weights ----------------------------------------------------------------------------------------------


def convolution(state: State) -> Any:
    """y[o] = sum_c W[o, c] * x[c]: inputs and outputs are free of each other.

    Depthwise (groups = C): output channels c*m ... c*m + m - 1 follow input channel c. Otherwise grouped: channels stay
    in their group. Transposed convolutions hold W as (C, O / groups, ...).
    """
    name = layer_name(state.node)
    conv = state.module.get_submodule(name)
    assert isinstance(conv, Convolution)
    if state.value.dim() != len(conv.kernel_size) + 2:
        return state.boundary(f"{label(state.node)} is given an unbatched image")
    inputs = state.channels(*state.source(), 1)
    weight_in, weight_out = (0, 1) if conv.transposed else (1, 0)
    if is_depthwise(conv):
        return _depthwise(state, name, conv, inputs)
    outputs = state.atoms.mint(conv.out_channels, state.node.name)
    if conv.groups > 1:
        for g in range(conv.groups):
            state.atoms.site(inputs.reshape(conv.groups, -1)[g])
            state.atoms.site(outputs.reshape(conv.groups, -1)[g])
    state.reads(channel_dim(conv), inputs)
    state.writes(channel_dim(conv), outputs)
    if conv.groups == 1 or conv.transposed:
        state.bind(name, "weight", weight_in, inputs, scales=False)
    else:
        state.bind_group(name, inputs)
    if conv.groups == 1 or not conv.transposed:
        state.bind(name, "weight", weight_out, outputs, scales=False)
    else:
        state.bind_group(name, outputs)
    for attribute in ("bias", "gain"):
        state.bind(name, attribute, 0, outputs, scales=False)
    return along(torch.from_numpy(outputs), 1, state.value.dim())


def _depthwise(state: State, name: str, conv: Convolution, inputs: Any) -> Any:
    multiplier = conv.out_channels // conv.in_channels
    outputs = inputs
    if multiplier > 1:
        outputs = state.atoms.mint(conv.out_channels, state.node.name)
        state.atoms.tie(outputs, np.repeat(inputs, multiplier), state.node.name)
        state.atoms.site(outputs, np.tile(np.arange(multiplier), conv.in_channels))
    for attribute in ("weight", "bias", "gain"):
        state.bind(name, attribute, 0, outputs, scales=True)
    return along(torch.from_numpy(outputs), 1, state.value.dim())


def linear(state: State) -> Any:
    """y[..., o] = sum_c W[o, c] x[..., c]."""
    name = layer_name(state.node)
    inputs = state.channels(*state.source(), -1)
    outputs = state.atoms.mint(state.value.shape[-1], state.node.name)
    state.reads(-1, inputs)
    state.writes(-1, outputs)
    state.bind(name, "weight", 1, inputs, scales=False)
    state.bind(name, "weight", 0, outputs, scales=False)
    state.bind(name, "bias", 0, outputs, scales=False)
    return along(torch.from_numpy(outputs), -1, state.value.dim())


def gather(state: State) -> Any:
    """A ChannelGather reads and writes any order, for its index can say so: old and new channels are free of each
    other.
    """
    index_dim = called_module(state.module, state.node).dim
    assert isinstance(index_dim, int)
    inputs = state.channels(*state.source(), index_dim)
    outputs = state.atoms.mint(state.value.shape[index_dim], state.node.name)
    state.reads(index_dim, inputs)
    state.writes(index_dim, outputs)
    return along(torch.from_numpy(outputs), index_dim, state.value.dim())


def channel_scale(dim: int, attributes: tuple[str, ...]) -> Rule:
    """Normalisations, PReLU, layer scale: statistics over all else, or over a symmetric set of channels, and one entry
    of each parameter a channel.
    """

    def rule(state: State) -> Any:
        name = layer_name(state.node)
        module = state.module.get_submodule(name)
        labels, value = state.source()
        sizes = {t.numel() for a in attributes if isinstance(t := getattr(module, a, None), Tensor)}
        if sizes <= {1} and value.shape[dim] != 1:
            return labels  # no parameters, or one for all channels
        atoms = state.channels(labels, value, dim)
        groups = getattr(module, "num_groups", getattr(module, "groups", 1))
        if isinstance(groups, int) and groups > 1:
            for part in atoms.reshape(groups, -1):
                state.atoms.site(part)
        for attribute in attributes:
            state.bind(name, attribute, 0, atoms, scales=True)
        return labels

    return rule


def group_norm(state: State) -> Any:
    """GroupNorm: channels stay in their group, also where it has no parameters."""
    groups = called_module(state.module, state.node).num_groups
    labels, value = state.source()
    if not isinstance(groups, int) or (groups > 1 and varying(labels) not in ([], [1])):
        return state.boundary(f"{label(state.node)} normalises groups of a value whose channels are spread")
    if groups > 1 and varying(labels):
        for part in state.channels(labels, value, 1).reshape(groups, -1):
            state.atoms.site(part)
    return channel_scale(1, ("weight", "bias"))(state)


def layer_norm(state: State) -> Any:
    """LayerNorm over the last dimensions: symmetric in them; its parameters follow the channels along each."""
    name = layer_name(state.node)
    module = state.module.get_submodule(name)
    shape = module.normalized_shape
    assert isinstance(shape, tuple)
    labels, value = state.source()
    inside = [d for d in varying(labels) if d >= value.dim() - len(shape)]
    if len(inside) > 1 or (inside and varying(labels) != inside):
        return state.boundary(f"{label(state.node)} normalises channels that are spread over several dimensions")
    for d in inside:
        for attribute in ("weight", "bias"):
            state.bind(name, attribute, d - (value.dim() - len(shape)), state.channels(labels, value, d), scales=True)
    return labels


def group_norm_with_zeros(state: State) -> Any:
    """GroupNorm of which channels are gone: those that are left stay in their group."""
    name = layer_name(state.node)
    norm = state.module.get_submodule(name)
    assert isinstance(norm, GroupNormWithZeros)
    labels, value = state.source()
    if varying(labels) not in ([], [1]):
        return state.boundary(f"{label(state.node)} normalises groups of a value whose channels are spread")
    atoms = state.channels(labels, value, 1)
    group = norm.group.cpu().numpy()
    for g in np.unique(group):
        state.atoms.site(atoms[group == g])
    for attribute in ("weight", "bias"):
        state.bind(name, attribute, 0, atoms, scales=True)
    return along(torch.from_numpy(atoms), 1, value.dim())


def layer_norm_with_zeros(state: State) -> Any:
    """LayerNorm of which channels are gone: symmetric in those that are left."""
    name = layer_name(state.node)
    norm = state.module.get_submodule(name)
    assert isinstance(norm, LayerNormWithZeros)
    labels, value = state.source()
    if varying(labels) not in ([], [value.dim() + norm.dim]):
        return state.boundary(f"{label(state.node)} normalises channels that are spread over several dimensions")
    atoms = state.channels(labels, value, norm.dim)
    for attribute in ("weight", "bias"):
        state.bind(name, attribute, 0, atoms, scales=True)
    return along(torch.from_numpy(atoms), norm.dim, value.dim())


# --- the same, as functions -------------------------------------------------------------------------------------------


def functional_affine(position: dict[str, int], channel_dim: int) -> Rule:
    """batch_norm, layer_norm, group_norm, prelu as functions: their parameters are values of the graph, joined with x
    along the channels.
    """

    def rule(state: State) -> Any:
        source = state.argument(0, "input")
        labels, shape = state.operand(source)
        groups = state.argument(1, "num_groups") if "num_groups" in position else 1
        if isinstance(groups, int) and groups > 1:
            if varying(labels) != [1]:
                return state.boundary(f"{label(state.node)} normalises groups of a value whose channels are spread")
            for part in state.channels(labels, state.values[source], 1).reshape(groups, -1):
                state.atoms.site(part)
        operands = [(labels, shape)]
        for name, place in position.items():
            node = state.argument(place, name)
            if isinstance(node, fx.Node) and isinstance(state.values.get(node), Tensor):
                own, own_shape = state.operand(node)
                if channel_dim == 1 and len(own_shape) == 1:
                    own, own_shape = along(own.reshape(-1), 1, len(shape)), (1, own_shape[0]) + (1,) * (len(shape) - 2)
                operands.append((own, own_shape))
        return state.join(operands, len(shape)) if len(operands) > 1 else labels

    return rule


def functional_convolution(state: State) -> Any:
    """F.conv2d with a weight that is a value of the graph: a depthwise one scales channels; any other is a boundary,
    for nothing can be stored in its weight.
    """
    source, weight = state.argument(0, "input"), state.argument(1, "weight")
    labels, shape = state.operand(source)
    groups = state.concrete(state.argument(6, "groups", 1))
    bias = state.argument(2, "bias")
    if groups != shape[1] or state.value.shape[1] != shape[1] or varying(labels) != [1]:
        return state.boundary("functional convolution, whose weight is computed or shared")
    kernel, kernel_shape = state.operand(weight)
    window = tuple(
        kernel_shape[2:]
    )  # x stands for itself at every place of the kernel, so these only tell the entries of a kernel apart
    operands = [(labels, (1, shape[1], *window)), (kernel.movedim(0, 1), (1, kernel_shape[0], *window))]
    if isinstance(bias, fx.Node):
        operands.append((along(state.labels[bias].reshape(-1), 1, len(shape)), (1, shape[1], *window)))
    return state.join(operands, len(shape))
