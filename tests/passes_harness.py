"""Run one pass on a small net, and check what every pass must keep: the function, the graph, the user's model."""

import copy
from collections.abc import Sequence

import torch
from equality import assert_same_function, randomize
from torch import Tensor, fx, nn

from fxprune.graph.editing import Outcome, Pass
from fxprune.graph.layers import ChannelGather
from fxprune.graph.tracing import trace

SHUFFLE = (2, 0, 3, 1)  # no involution: reading it the wrong way round shows
SWAP = (0, 1, 3, 2)  # stays inside two groups of two


def gather(index: Sequence[int] = SHUFFLE, in_channels: int = 4, dim: int = -3) -> ChannelGather:
    return ChannelGather(torch.tensor(index), in_channels, dim)


def image(channels: int = 4, size: int = 5, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def prepared(net: nn.Module) -> nn.Module:
    """The net in float64, in evaluation mode, with weights from which every mistake shows."""
    return randomize(net.double()).eval()


def check_pass(
    rewrite: Pass,
    net: nn.Module,
    *inputs: Tensor,
    before: str | None = None,
    after: str,
    modes: Sequence[str] = ("eval", "train"),
    repeatable: bool = True,
) -> tuple[fx.GraphModule, Outcome]:
    """Trace `net`, apply `rewrite`, and return the graph module and what the pass reported.

    Args:
        rewrite: the pass.
        net: what it works on, with the weights it shall have.
        inputs: arguments of forward, float64.
        before: the graph before, as `show` prints it; None where `after` says it all.
        after: the graph after.
        modes: in which the function must stay.
        repeatable: whether a second run must find nothing left to do.

    Raises:
        AssertionError: the graph is not `after`, is invalid, computes another function, or `net` has changed.
    """
    original = copy.deepcopy(net)
    gm = trace(net, inputs).module
    if before is not None:
        assert show(gm) == listing(before)
    outcome = rewrite(gm)
    gm.graph.lint()
    gm.recompile()
    assert show(gm) == listing(after)
    reads = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    unused = [name for name, module in gm.named_modules() if isinstance(module, ChannelGather) and name not in reads]
    assert not unused, f"gathers that nobody calls: {unused}"
    for (name, ours), theirs in zip(net.state_dict().items(), original.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), f"{name} of the traced model has changed"
    assert_same_function(copy.deepcopy(gm), original, inputs, modes)
    if repeatable:
        again = rewrite(gm)
        assert not again.rewritten, f"the second run rewrites {again.rewritten}"
        assert show(gm) == listing(after)
    return gm, outcome


def show(gm: fx.GraphModule) -> str:
    """The graph in one line for each run of nodes that only read the one before: `x -> conv -> bn -> output`."""
    lines: list[str] = []
    last: list[fx.Node] = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            continue
        if last and node.all_input_nodes == last:
            lines[-1] += f" -> {node.name}"
        else:
            lines.append(f"{', '.join(source.name for source in node.all_input_nodes)} -> {node.name}".lstrip())
        last = [node]
    return "\n".join(lines)


def listing(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


def reasons(outcome: Outcome) -> dict[str, str]:
    return {skip.node: skip.reason for skip in outcome.skipped}
