"""The passes in order, and the runner that watches over them.

After each pass the graph is linted and checked against the invariants of the IR; code is generated once, after the
last. Two environment variables look inside: `FXPRUNE_DUMP=dir` writes the graph after each pass as numbered text files,
`FXPRUNE_VERIFY=1` checks after each pass that the function is unchanged.
"""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.errors import PassError, VerificationError
from fxprune.exact.verification import TOLERANCE, difference, evaluate
from fxprune.graph.convolutions import Convolution
from fxprune.graph.editing import Outcome, Pass, calls
from fxprune.graph.examples import Example
from fxprune.graph.layers import ChannelGather
from fxprune.graph.values import CarriedValues
from fxprune.passes import (
    AbsorbGathers,
    AgreeReads,
    AlignWindows,
    FoldBatchNorm,
    GroupConvs,
    MergeGathers,
    RemoveBranches,
    RemoveChannels,
    SinkGathers,
)
from fxprune.plans import PrunePlan

logger = logging.getLogger("fxprune")


def default_pipeline(
    plan: PrunePlan, values: CarriedValues, *, fold_batch_norm: bool = False, for_module: bool = False
) -> tuple[Pass, ...]:
    """Return the passes that turn a masked model into a grouped one.

    Args:
        plan: which convolutions become grouped, and how.
        values: what the nodes of the traced graph give; the passes carry it on.
        fold_batch_norm: also fold BatchNorm, after which the result is exact in evaluation mode only.
        for_module: gathers become parts of layers of a user's own module, so that each layer has to read in one order.
    """
    block = common_block(plan)
    passes: tuple[Pass, ...] = (
        GroupConvs(plan),
        MergeGathers(block),  # before sinking: an identity would be a wish
        SinkGathers(values, block),
        MergeGathers(block),  # a sunk gather meets the one at the end of its space
        AbsorbGathers(),  # only what could not merge
        AlignWindows(values, block),  # orders what is left; a gather that could still vanish would mislead it
        AbsorbGathers(),  # the new orders go into the layers at the ends; merged first, they would be undone
        MergeGathers(block),  # what stands in order now
    )
    if for_module:
        passes = (*passes, AgreeReads(values), AbsorbGathers())  # merged, its gathers would be what they were before
    if plan.removed:  # before them: the plan groups what is left
        passes = (RemoveChannels(plan, values), *passes)
    if plan.branches:  # first: channels go from what these leave
        passes = (RemoveBranches(plan, values), *passes)
    # Last: only without gathers between them does BatchNorm follow its convolution directly.
    return (*passes, FoldBatchNorm()) if fold_batch_norm else passes


def common_block(plan: PrunePlan) -> int:
    """Length of the blocks, in channels, that passes shall keep whole: that of each layer divides it; 1 is no rule."""
    return math.lcm(*(kernels.block for kernels in plan.layers.values()))


def run(gm: fx.GraphModule, passes: Sequence[Pass], inputs: tuple[Any, ...]) -> Mapping[str, Outcome]:
    """Apply `passes` to `gm` in place and return what each did, by numbered pass name.

    Raises:
        PassError: a pass left an invalid graph; the message names the pass.
        VerificationError: with `FXPRUNE_VERIFY=1`, a pass changed the function.
    """
    directory, check = dump_directory(), checks_each_pass()
    if check and not inputs:
        raise PassError(
            "FXPRUNE_VERIFY=1 needs inputs to run the graph on, and no usual size fits; pass example_inputs"
        )
    samples = _random_inputs(gm, inputs) if check else ()
    reference = evaluate(gm, Example(samples), "eval").tensors if check else []
    outcomes: dict[str, Outcome] = {}
    _dump(directory, 0, "traced", gm)
    for number, rewrite in enumerate(passes, start=1):
        name = type(rewrite).__name__
        outcome = outcomes[f"{number} {name}"] = rewrite(gm)
        _check(gm, name)
        logger.info("%s rewrote %d nodes and left %d", name, len(outcome.rewritten), len(outcome.skipped))
        _dump(directory, number, name, gm)
        if check and (worst := difference(evaluate(gm, Example(samples), "eval").tensors, reference)[1]) > TOLERANCE:
            raise VerificationError(f"pass {number} {name} changed the function by {worst:.1e} of the largest output")
    gm.recompile()
    return outcomes


def dump_directory() -> Path | None:
    """Directory for graph dumps, from `FXPRUNE_DUMP`; made if absent.

    Raises:
        PassError: it cannot be made.
    """
    value = os.environ.get("FXPRUNE_DUMP", "")
    if not value:
        return None
    directory = Path(value)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PassError(
            f"FXPRUNE_DUMP is {value!r}, which cannot be made a directory ({error}); name another"
        ) from error
    return directory


def checks_each_pass() -> bool:
    """Whether `FXPRUNE_VERIFY` asks for a check after each pass.

    Raises:
        PassError: the variable has a value other than 0 and 1.
    """
    value = os.environ.get("FXPRUNE_VERIFY", "0")
    if value not in ("", "0", "1"):
        raise PassError(
            f"FXPRUNE_VERIFY is {value!r}; use 1 to check the function after each pass, 0 or nothing to leave it"
        )
    return value == "1"


def _check(gm: fx.GraphModule, name: str) -> None:
    """Check what must hold between passes."""
    try:
        gm.graph.lint()
    except RuntimeError as error:
        raise PassError(f"pass {name} left an invalid graph: {error}") from error
    for node, gather in calls(gm, ChannelGather):
        if gather.index.numel() == 0 or int(gather.index.min()) < 0 or int(gather.index.max()) >= gather.in_channels:
            raise PassError(f"pass {name} left {node.name} with an index outside its {gather.in_channels} channels")
    for node, conv in calls(gm, Convolution):
        sizes = (conv.out_channels, conv.in_channels)[:: -1 if conv.transposed else 1]
        if tuple(conv.weight.shape[:2]) != (sizes[0], sizes[1] // conv.groups):
            raise PassError(
                f"pass {name} left {node.name} with a weight of shape {tuple(conv.weight.shape)} for {conv}"
            )


def _dump(directory: Path | None, number: int, name: str, gm: fx.GraphModule) -> None:
    if directory is not None:
        (directory / f"{number:02d}_{name}.txt").write_text(_text(gm), encoding="utf-8")


def _text(gm: fx.GraphModule) -> str:
    """The graph as text, a node a line: name = operator(arguments), and what the module is."""
    lines = []
    for node in gm.graph.nodes:
        arguments = ", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
        what = f"  # {gm.get_submodule(node.target)}".replace("\n", " ") if node.op == "call_module" else ""
        lines.append(f"{node.name} = {getattr(node.target, '__name__', node.target)}({arguments}){what}")
    return "\n".join(lines) + "\n"


def _random_inputs(gm: fx.GraphModule, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Random tensors of the shapes of the meta tensors `inputs`, on the device of the model."""
    device = next((parameter.device for parameter in gm.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)

    def draw(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        values = torch.randn(leaf.shape, generator=generator)
        return (values if leaf.is_floating_point() else values > 0).to(device, leaf.dtype)

    return tuple(torch.utils._pytree.tree_map(draw, inputs))
