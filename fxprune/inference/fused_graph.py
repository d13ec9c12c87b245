"""The graph of an accelerated model: fused convolutions, a check at each input, one memory format."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]  # public, but not in its __all__
from torch.utils._pytree import tree_map

from fxprune.errors import AccelerationError
from fxprune.exact.pipeline import common_block
from fxprune.exact.record import find_record
from fxprune.graph.containers import tensors_in
from fxprune.graph.editing import calls
from fxprune.graph.fused import FusedConv2d, gather_channels
from fxprune.graph.layers import ChannelGather
from fxprune.graph.tracing import trace
from fxprune.inference.engines import Engine
from fxprune.inference.forking import check_fork, forks
from fxprune.inference.pooling import use_native_pools
from fxprune.passes import FoldBatchNorm, FuseConvs


def fused_graph(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The model in evaluation mode with `FusedConv2d` in place of its convolutions, and why some were left."""
    record = find_record(model)
    gm = copy.deepcopy(model if isinstance(model, fx.GraphModule) else trace(model, inputs).module).eval()
    gm.meta = {}
    meta = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, inputs)
    FoldBatchNorm()(gm)
    pruned = frozenset(record.plan.layers) if record is not None else frozenset()
    outcome = FuseConvs(meta, pruned, common_block(record.plan) if record is not None else 1)(gm)
    for node in gm.graph.nodes:  # a view of channels_last memory may not exist
        is_view = node.op == "call_method" and node.target == "view" and not node.kwargs
        if is_view and not isinstance(node.args[1], torch.dtype):
            node.target = "reshape"
    gm.graph.lint()
    gm.recompile()
    return gm, tuple(f"{skip.node} is not fused: {skip.reason}" for skip in outcome.skipped)


def with_engines(
    graph: fx.GraphModule, inputs: tuple[Any, ...], engines: Mapping[str, Engine], memory_format: torch.memory_format
) -> fx.GraphModule:
    """A copy of the graph in which each convolution is computed by the engine under the name of its node."""
    gm = copy.deepcopy(graph)
    for node, _ in calls(gm, FusedConv2d):
        _replace(gm, node, engines[node.name])
    for node, gather in calls(gm, ChannelGather):
        _replace(gm, node, FormatKeepingGather(gather))
    if memory_format == torch.channels_last and all(_is_for_native(example) for example in tensors_in(inputs)):
        use_native_pools(gm)
    for node, example in zip([n for n in gm.graph.nodes if n.op == "placeholder"], inputs, strict=False):
        if isinstance(example, Tensor) and node.users:
            path = f"entry_{node.name}"
            gm.add_submodule(path, _Entry(example, memory_format == torch.channels_last))
            with gm.graph.inserting_after(node):
                entry = gm.graph.call_module(path, (node,))
            node.replace_all_uses_with(entry, delete_user_cb=lambda user, entry=entry: user is not entry)
    gm.graph.lint()
    gm.recompile()
    return gm.eval().requires_grad_(False)


def _is_for_native(example: Tensor) -> bool:
    return example.device.type == "cpu" and example.dtype in (torch.float32, torch.int64)


def _replace(gm: fx.GraphModule, node: fx.Node, module: nn.Module) -> None:
    parent, _, child = str(node.target).rpartition(".")
    setattr(gm.get_submodule(parent), child, module.eval())


class _Entry(nn.Module):
    """What every input passes first: refuses what the model was not made for, and converts the memory format. No
    gradient goes back through it, for the fused operators have none.
    """

    def __init__(self, example: Tensor, channels_last: bool) -> None:
        super().__init__()
        self.device_type = example.device.type
        self.dtype = example.dtype
        self.dimensions = example.dim()
        self.channels_last = channels_last and example.dim() == 4
        self.forks = forks()

    def forward(self, x: Tensor) -> Tensor:
        if not is_scripting() and not torch.compiler.is_compiling():  # neither knows of processes
            check_fork(self.forks)
        if self.training:
            raise AccelerationError("an accelerated model is for inference; call eval(), or train the pruned model")
        if x.device.type != self.device_type or x.dtype != self.dtype:
            raise AccelerationError(
                f"the model was accelerated for {self.dtype} on {self.device_type}, and the input is {x.dtype} on "
                f"{x.device}; convert it, or accelerate the pruned model there"
            )
        if x.dim() != self.dimensions:
            raise AccelerationError(
                f"the model was accelerated for an input of {self.dimensions} dimensions, and this one has {x.dim()}; "
                "add or remove the batch dimension"
            )
        if self.channels_last:
            return x.detach().contiguous(memory_format=torch.channels_last)
        return x.detach().contiguous()


class FormatKeepingGather(nn.Module):
    """A gather that keeps the memory format."""

    index: Tensor

    def __init__(self, gather: ChannelGather) -> None:
        super().__init__()
        self.dim = gather.dim
        self.register_buffer("index", gather.index)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4 and self.dim in (-3, 1):
            return gather_channels(x, self.index)
        return x.index_select(self.dim, self.index)
