"""Where the forward of a model differs between training and evaluation, and the literals that become a flag."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from fxprune.graph.layers import TrainingFlag


def _owner(node: fx.Node) -> str:
    """Path of the module whose forward made this node."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""


def compare_modes(evaluation: fx.Graph, training: fx.Graph) -> tuple[dict[fx.Node, list[int]], set[str]]:
    """Compare the two graphs module by module.

    Returns:
        The nodes of `evaluation` with a literal False where `training` has True, with the positions of these among the
        flattened arguments; and the modules that differ otherwise.
    """
    left, right = _by_owner(evaluation), _by_owner(training)
    # A module that only one mode calls (an auxiliary head) differs because its caller does.
    shared = left.keys() & right.keys() | {""}
    divergent = {owner for owner in shared if [_kind(n) for n in left[owner]] != [_kind(n) for n in right[owner]]}
    if divergent or left.keys() != right.keys():
        return {}, divergent or left.keys() ^ right.keys()
    flags: dict[fx.Node, list[int]] = {}
    place = {node: (owner, i) for side in (left, right) for owner, own in side.items() for i, node in enumerate(own)}
    for owner, nodes in left.items():
        for node, twin in zip(nodes, right[owner], strict=True):
            pairs = list(zip(_leaves(node), _leaves(twin), strict=True))
            changed = [i for i, (x, y) in enumerate(pairs) if _differ(x, y, place)]
            if changed and all(pairs[i][0] is False and pairs[i][1] is True for i in changed):
                flags[node] = changed
            elif changed:
                divergent.add(owner)
    return flags, divergent


def _by_owner(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    owned: dict[str, list[fx.Node]] = {"": []}
    for node in graph.nodes:
        owned.setdefault(_owner(node), []).append(node)
    return owned


def _kind(node: fx.Node) -> tuple[str, str, str]:
    return node.op, str(node.target), str(torch.utils._pytree.tree_structure((node.args, node.kwargs)))


def _leaves(node: fx.Node) -> list[Any]:
    return torch.utils._pytree.tree_leaves((node.args, node.kwargs))


def _differ(x: Any, y: Any, place: Mapping[fx.Node, tuple[str, int]]) -> bool:
    """Whether two arguments differ: nodes by their place, literals by value, anything else by type."""
    if isinstance(x, fx.Node) and isinstance(y, fx.Node):
        return place[x] != place[y]
    if isinstance(x, slice) and isinstance(y, slice):  # of an input's size: pytree does not look into them
        pairs = ((x.start, y.start), (x.stop, y.stop), (x.step, y.step))
        return any(_differ(left, right, place) for left, right in pairs)
    if type(x) is not type(y):
        return True
    return bool(x != y) if isinstance(x, bool | int | float | str | torch.dtype | None) else False


def insert_training_flags(root: nn.Module, graph: fx.Graph, flags: Mapping[fx.Node, Sequence[int]]) -> None:
    """Put the owner's mode in place of the literals that tracing baked in."""
    for node, positions in flags.items():
        owner = _owner(node)
        module = root.get_submodule(owner)
        if not hasattr(module, "training_flag"):
            module.add_module("training_flag", TrainingFlag().train(module.training))
        with graph.inserting_before(node):
            flag = graph.call_module(f"{owner}.training_flag".lstrip("."))
        flag.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
        leaves, structure = torch.utils._pytree.tree_flatten((node.args, node.kwargs))
        replaced = [flag if i in positions else leaf for i, leaf in enumerate(leaves)]
        node.args, node.kwargs = torch.utils._pytree.tree_unflatten(replaced, structure)


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """While the block runs, a model is in evaluation mode; afterwards each of its modules is in the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def restore_modes(module: fx.GraphModule, root: nn.Module) -> None:
    """Give each container that GraphModule made anew the training mode of the module it stands for."""
    modes = {name: m.training for name, m in root.named_modules()}
    for name, m in module.named_modules():
        m.training = modes.get(name, root.training)
