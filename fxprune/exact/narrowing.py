"""Take whole channels out of a copy of the user's own model, whose code may count them.

What user code has written into itself (sizes of views, splits, slices) cannot be corrected there. It is found by
recording the narrowed copy: where code computes sizes from shapes, the new recording has the sizes that the compacted
graph asks for; where it does not, it has others, or the run fails, and the channels there have to stay.
"""

from collections.abc import Mapping

from torch import fx, nn

from fxprune.channels.capture import recorded
from fxprune.channels.compaction import StuckError
from fxprune.errors import PassError
from fxprune.exact.operating import operate
from fxprune.graph.editing import calls, label
from fxprune.graph.layers import ChannelGather
from fxprune.graph.recording import Recording, RunError
from fxprune.graph.values import CarriedValues
from fxprune.passes import RemoveChannels
from fxprune.plans import PrunePlan


class CountedError(PassError):
    """Code of the model counts channels that a plan removes.

    Attributes:
        nodes: names of the nodes of the recording where it does, with the reason.
    """

    def __init__(self, nodes: Mapping[str, str]) -> None:
        reason = next(iter(nodes.values()))
        super().__init__(f"a channel that the plan removes cannot go: {reason}; make the plan anew")
        self.nodes = dict(nodes)


def narrow(masked: nn.Module, plan: PrunePlan, recording: Recording) -> tuple[nn.Module, Recording]:
    """A copy of `masked` without the channels that `plan` removes, and its recording.

    Args:
        masked: the user's model, in which they are zero.
        plan: what to remove.
        recording: of `masked`; its graph is used up.

    Raises:
        CountedError: code of the model counts some of these channels.
        PassError: they are not zero, or cannot go for another reason.
    """
    gm = recording.module
    steps = {node.name: node for node in gm.graph.nodes}
    lines = {name: label(node) for name, node in steps.items()}
    try:
        changed = RemoveChannels(plan, CarriedValues(recording.inputs, recording.values))(gm).rewritten
    except StuckError as error:
        raise CountedError({error.node.name: str(error)}) from error
    corrected = [name for name in changed if name in steps]
    present = {node.name: node for node in gm.graph.nodes}
    gone = [name for name in steps if name not in present]
    if gone or any(True for _ in calls(gm, ChannelGather)):
        raise CountedError({name: _FIXED.format(lines[name]) for name in gone or corrected})
    result = operate(masked, gm)
    try:
        now = recorded(result, recording.examples, recording.modes)
    except RunError as error:
        failed = next(name for name, node in steps.items() if node.op != "placeholder" and name not in error.steps)
        raise CountedError({failed: f"{_FIXED.format(lines[failed])}: {error.cause}"}) from error
    found = {node.name: node for node in now.module.graph.nodes}
    wrong = [name for name in corrected if name not in found or _numbers(found[name]) != _numbers(present[name])]
    wrong += [name for name in present if name not in found][:1]
    if wrong:
        raise CountedError({name: _FIXED.format(lines[name]) for name in wrong})
    return result, now


_FIXED = "{} has their number written into it"


def _numbers(node: fx.Node) -> str:
    """The literals among the arguments of a node, as text."""
    return str(fx.node.map_arg((node.args, node.kwargs), lambda source: None))
