"""gather(gather(x, a), b) == gather(x, a[b]).  x (N, C, H, W); a (A,), b (B,) long; both along one dimension.

1. A gather of a gather reads the first input directly; the inner one goes if nobody else reads it.
   A module that is called elsewhere too keeps its index there.
2. A gather that reads all channels in order vanishes.
3. Gathers of one tensor with one index become one, unless an in-place operator may change the tensor between them.
Left alone: an inner gather that others than layers read (both results are needed); a copy that an in-place operator may
write into, or whose original an in-place operator may change before it is read. With a reason: a gather that reads
aligned blocks for a convolution, after one that tears them apart.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx, nn

from fxprune.channels.orders import alignment, feeds_convolution
from fxprune.graph.contexts import is_switch
from fxprune.graph.convolutions import Convolution
from fxprune.graph.editing import KEPT_BECAUSE, Outcome, Skip, call_sites, called_module, calls, erase_gather, new_path
from fxprune.graph.layers import ChannelGather
from fxprune.graph.memory import Memory, is_mutating, storage_roots


@dataclass(frozen=True)
class MergeGathers:
    """Compose chains of gathers, drop identities and share equal ones.

    Attributes:
        block: convolutions that read aligned blocks of this many channels, or of a divisor of it, shall go on doing so.
    """

    block: int = 1

    def __call__(self, gm: fx.GraphModule) -> Outcome:
        skipped: list[Skip] = []
        rewritten = [*_compose(gm, self.block, skipped), *_drop_identities(gm), *_share(gm)]
        return Outcome(tuple(rewritten), tuple(skipped))


def _compose(gm: fx.GraphModule, block: int, skipped: list[Skip]) -> list[str]:
    done = []
    memory, sites = Memory(gm), call_sites(gm)
    for node, gather in calls(gm, ChannelGather):
        inner = node.args[0]
        if not isinstance(inner, fx.Node) or inner.op != "call_module":
            continue
        first = called_module(gm, inner)
        if not isinstance(first, ChannelGather) or first.dim != gather.dim or not _are_readers(gm, inner.users):
            continue
        source = inner.args[0]
        assert isinstance(source, fx.Node)
        if memory.changes(source, inner, [node]):
            continue
        composed = first.index[gather.index]
        if feeds_convolution(gm, node):
            keep = alignment(gather.index.cpu().numpy(), block)
            if alignment(composed.cpu().numpy(), keep) < keep:
                skipped.append(Skip(node.name, f"after {inner.name} its blocks of {keep} channels would fall apart"))
                continue
        if len(sites[gather]) > 1:
            sites[gather].remove(node)
            gather = copy.deepcopy(gather)
            node.target = new_path(gm, str(node.target))
            gm.add_submodule(node.target, gather)
            sites[gather] = [node]
        gather.index, gather.in_channels = composed, first.in_channels
        node.args = (source,)
        if KEPT_BECAUSE in inner.meta:
            node.meta.setdefault(KEPT_BECAUSE, inner.meta[KEPT_BECAUSE])
        if not inner.users:
            erase_gather(gm, inner, source, sites)
        done.append(node.name)
    return done


def _drop_identities(gm: fx.GraphModule) -> list[str]:
    done = []
    memory, sites = Memory(gm), call_sites(gm)
    for node, gather in calls(gm, ChannelGather):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        # A gather is a copy. It may go if nobody could tell: nobody writes into the copy, or nobody else sees the
        # original; and the original stays what it was.
        unseen = memory.owns(source) and len(source.users) == 1
        if (
            gather.is_identity
            and (unseen or _are_readers(gm, node.users))
            and not memory.changes(source, node, node.users)
        ):
            erase_gather(gm, node, source, sites)
            done.append(node.name)
    return done


def _share(gm: fx.GraphModule) -> list[str]:
    done = []
    roots, sites = storage_roots(gm), call_sites(gm)
    seen: dict[tuple[object, ...], fx.Node] = {}
    for node in list(gm.graph.nodes):
        if is_switch(node):
            seen = {}  # under no_grad a gather passes no gradient on
        if is_mutating(gm, node):
            written = roots[node]
            seen = {key: gather for key, gather in seen.items() if roots[gather.all_input_nodes[0]].isdisjoint(written)}
        if (
            node.op != "call_module"
            or not isinstance(gather := called_module(gm, node), ChannelGather)
            or not _are_readers(gm, node.users)
        ):
            continue
        first = seen.setdefault((node.args[0], gather.dim, tuple(gather.index.tolist())), node)
        if first is not node:
            erase_gather(gm, node, first, sites)
            done.append(node.name)
    return done


def _are_readers(gm: fx.GraphModule, users: Iterable[fx.Node]) -> bool:
    """Whether all users are layers that neither write into their input nor return it."""
    layers = (Convolution, nn.Linear, ChannelGather)
    return all(user.op == "call_module" and isinstance(called_module(gm, user), layers) for user in users)
