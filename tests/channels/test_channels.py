"""Channel spaces: for each construct who is tied, what may move and why not; and moving what may move is exact."""
# nn.Module.__call__ is typed to return Any, and some methods of Tensor not at all; each net would need a cast.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from equality import assert_same_function, randomize
from products_harness import one_in
from torch import Tensor, fx, nn
from zoo import CASES, Case

import fxprune
from fxprune.channels import ChannelAnalysis, Reordering, analyze_channels
from fxprune.channels.atoms import Array, AtomTable
from fxprune.channels.operators import METHODS
from fxprune.errors import PassError
from fxprune.graph.tracing import Trace, trace
from fxprune.passes.sink_gathers import reorder

# --- constructs -----------------------------------------------------------------------------------------------------


Function: TypeAlias = Callable[[Any, Tensor], Any]
Parts: TypeAlias = Mapping[str, nn.Module | nn.Parameter]


class Net(nn.Module):
    """Layers and parameters by name, and a function of them."""

    def __init__(self, function: Function, parts: Parts) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def conv(inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, **options)


@dataclass(frozen=True)
class Construct:
    """A net, and what must be known of the channel space of `of`.

    Attributes:
        name: of the construct.
        function, parts: the net, applied to (2, 3, 4, 4).
        of: a producer of the space.
        channels: classes of channels in it.
        blocks: sizes of the sets of classes that may be exchanged, ascending.
        with_: all producers of the space, `of` among them.
        ties: nodes that tie them.
        reason: a fragment of why the others may not move.
    """

    name: str
    function: Function
    parts: Parts
    of: str
    channels: int
    blocks: tuple[int, ...]
    with_: tuple[str, ...] = ()
    ties: tuple[str, ...] = ()
    reason: str = ""


def image() -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64),)


def tied(first: nn.Conv2d, second: nn.Conv2d) -> nn.Conv2d:
    second.weight = first.weight
    return second


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, output: output.flip(1))
    return module


A, B = conv(3, 8), conv(3, 8)


def between(function: Function, inner: int = 8, **parts: nn.Module | nn.Parameter) -> tuple[Function, Parts]:
    """Conv `a` 3 -> 8, `function`, conv `z` `inner` -> 4."""
    return (lambda m, x: m.z(function(m, m.a(x))), {"a": conv(3, 8), **parts, "z": conv(inner, 4)})


CONSTRUCTS = (
    Construct("relu", *between(lambda m, x: x.relu()), "a", 8, (8,)),
    Construct("output", *between(lambda m, x: x), "z", 4, (), reason="model output"),
    Construct(
        "add",
        *(lambda m, x: m.z(m.a(x) + m.b(x)), {"a": conv(3, 8), "b": conv(3, 8), "z": conv(8, 4)}),
        "a",
        8,
        (8,),
        ("a", "b"),
        ("add",),
    ),
    Construct(
        "mul",
        *(lambda m, x: m.z(m.a(x).mul(m.b(x).sigmoid())), {"a": conv(3, 8), "b": conv(3, 8), "z": conv(8, 4)}),
        "a",
        8,
        (8,),
        ("a", "b"),
        ("mul",),
    ),
    Construct(
        "add of something fixed",
        lambda m, x: m.z(m.a(x) + F.pad(x, (0, 0, 0, 0, 0, 5))),
        {"a": conv(3, 8), "z": conv(8, 4)},
        "a",
        8,
        (),
        reason="combines it with a value whose order is fixed",
    ),
    Construct(
        "concat",
        lambda m, x: m.z(torch.cat([m.a(x), m.b(x)], 1)),
        {"a": conv(3, 8), "b": conv(3, 4), "z": conv(12, 4)},
        "b",
        4,
        (4,),
    ),
    Construct(
        "concat of itself",
        *between(lambda m, x: torch.cat([x, x.relu()], 1), 16),
        "a",
        8,
        (8,),
        ties=("cat",),
    ),
    Construct(
        "sum of concats whose seams do not meet",
        lambda m, x: m.z(torch.cat([m.a(x), m.b(x)], 1) + torch.cat([m.c(x), m.d(x)], 1)),
        {"a": conv(3, 8), "b": conv(3, 4), "c": conv(3, 3), "d": conv(3, 9), "z": conv(12, 4)},
        "a",
        12,
        (3, 4, 5),
        ("a", "b", "c", "d"),
        ("add",),
    ),
    Construct(
        "chunk",
        *between(lambda m, x: m.l(x.chunk(2, 1)[0]) + m.r(x.chunk(2, 1)[1]), l=conv(4, 8), r=conv(4, 8)),
        "a",
        8,
        (4, 4),
    ),
    Construct(
        "chunk and add", *between(lambda m, x: x.chunk(2, 1)[0] - x.chunk(2, 1)[1], 4), "a", 4, (4,), ties=("sub",)
    ),
    Construct(
        "uneven split",
        *between(lambda m, x: torch.cat([x.split([2, 6], 1)[0].relu(), x.split([2, 6], 1)[1]], 1)),
        "a",
        8,
        (2, 6),
    ),
    Construct(
        "overlapping slices",
        *between(lambda m, x: torch.cat([x[:, :5], x[:, 3:].relu()], 1), 10),
        "a",
        8,
        (2, 3, 3),
        ties=("cat",),
    ),
    Construct("single channel", *between(lambda m, x: torch.cat([x[:, :1].relu(), x[:, 1:]], 1)), "a", 8, (1, 7)),
    Construct(
        "channel shuffle", *between(lambda m, x: x.view(2, 2, 4, 4, 4).transpose(1, 2).flatten(1, 2)), "a", 8, (8,)
    ),
    Construct("permute", *between(lambda m, x: x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2)), "a", 8, (8,)),
    Construct(
        "flatten",
        lambda m, x: m.z(m.a(x).flatten(1)),
        {"a": conv(3, 8), "z": nn.Linear(128, 4)},
        "a",
        8,
        (8,),
        ties=("flatten",),
    ),
    Construct(
        "view that spreads channels over pixels",
        *between(lambda m, x: x.reshape(2, 4, 8, 4), 4),
        "a",
        4,
        (),
        ties=("reshape", "z"),
        reason="tied to one another",
    ),
    Construct(
        "pixel shuffle",
        *between(lambda m, x: F.pixel_shuffle(x, 2), 2),
        "a",
        2,
        (),
        ties=("pixel_shuffle", "z"),
        reason="tied to one another",
    ),
    Construct(
        "pixel unshuffle", *between(lambda m, x: F.pixel_unshuffle(x, 2), 32), "a", 8, (8,), ties=("pixel_unshuffle",)
    ),
    Construct("GroupNorm", *between(lambda m, x: m.n(x), n=nn.GroupNorm(2, 8)), "a", 8, (4, 4)),
    Construct("GroupNorm of one group", *between(lambda m, x: m.n(x), n=nn.GroupNorm(1, 8)), "a", 8, (8,)),
    Construct(
        "LayerNorm",
        *between(lambda m, x: m.n(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), n=nn.LayerNorm(8)),
        "a",
        8,
        (8,),
    ),
    Construct("PReLU", *between(lambda m, x: m.p(x), p=nn.PReLU(8)), "a", 8, (8,)),
    Construct(
        "layer scale",
        *between(lambda m, x: x * m.gamma, gamma=nn.Parameter(torch.ones(8, 1, 1))),
        "a",
        8,
        (8,),
        ties=("mul",),
    ),
    Construct(
        "squeeze and excite",
        *between(lambda m, x: x * m.e(m.s(x.mean((2, 3), True)).relu()).sigmoid(), s=conv(8, 6), e=conv(6, 8)),
        "a",
        8,
        (8,),
        ("a", "e"),
        ("mul",),
    ),
    Construct("depthwise", *between(lambda m, x: m.d(x), d=conv(8, 8, groups=8)), "a", 8, (8,)),
    Construct(
        "depthwise with multiplier",
        *between(lambda m, x: m.d(x), 16, d=conv(8, 16, groups=8)),
        "a",
        8,
        (8,),
        ties=("d",),
    ),
    Construct("grouped, its inputs", *between(lambda m, x: m.g(x), 12, g=conv(8, 12, groups=2)), "a", 8, (4, 4)),
    Construct("grouped, its outputs", *between(lambda m, x: m.g(x), 12, g=conv(8, 12, groups=2)), "g", 12, (6, 6)),
    Construct(
        "transposed", *between(lambda m, x: m.t(x.relu()), 6, t=nn.ConvTranspose2d(8, 6, 2, stride=2)), "t", 6, (6,)
    ),
    Construct(
        "transposed and grouped",
        *between(lambda m, x: m.t(x), 6, t=nn.ConvTranspose2d(8, 6, 2, groups=2)),
        "a",
        8,
        (4, 4),
    ),
    Construct(
        "shared in a row",
        *between(lambda m, x: m.s(m.s(x).relu()), s=conv(8, 8)),
        "a",
        8,
        (8,),
        ("a", "s", "s_1"),
        ("s_1",),
    ),
    Construct(
        "tied weights",
        lambda m, x: m.y(m.a(x)) + m.z(m.b(x).relu()),
        {"a": A, "b": tied(A, B), "y": conv(8, 4), "z": conv(8, 4)},
        "a",
        8,
        (8,),
        ("a", "b"),
        ("b",),
    ),
    Construct("option-A padding", *between(lambda m, x: F.pad(x, (0, 0, 0, 0, 0, 3)), 11), "pad", 3, (3,)),
    Construct("unknown operator", *between(lambda m, x: x.cumsum(1)), "a", 8, (), reason="no rule for torch.cumsum"),
    Construct("hooked module", *between(lambda m, x: m.h(x), h=hooked(nn.ReLU())), "a", 8, (), reason="h has hooks"),
    Construct("softmax", *between(lambda m, x: x.softmax(1)), "a", 8, (8,)),
    Construct("mean over channels", *between(lambda m, x: x - x.mean(1, keepdim=True)), "a", 8, (8,)),
    Construct(
        "sum over halves", *between(lambda m, x: x.unflatten(1, (2, 4)).sum(1), 4), "a", 4, (4,), ties=("sum_1",)
    ),
    Construct(
        "argument of the maximum",
        *between(lambda m, x: x * x.max(1, keepdim=True)[1]),
        "a",
        8,
        (),
        reason="gives the index of a channel",
    ),
    Construct("repeat", *between(lambda m, x: x.repeat(1, 2, 1, 1), 16), "a", 8, (), reason="repeats channels"),
    Construct(
        "parameter read beside its layer",
        *between(lambda m, x: m.n(x) + m.n.weight.sum() * m.n.weight.view(1, -1, 1, 1), n=nn.BatchNorm2d(8)),
        "a",
        8,
        (),
        ties=("add",),
        reason="also read directly",
    ),
)

each_construct = pytest.mark.parametrize("construct", CONSTRUCTS, ids=lambda construct: construct.name)


def build(construct: Construct) -> nn.Module:
    return randomize(Net(construct.function, construct.parts).double()).eval()


def analysis_of(traced: Trace) -> ChannelAnalysis:
    return analyze_channels(traced.module, traced.values)


def classes_of(analysis: ChannelAnalysis, producers: tuple[str, ...]) -> Array:
    """The classes to which the atoms of `producers` belong."""
    blocks = analysis.blocks
    mine = [p in producers for p in blocks.producers]
    run = np.searchsorted(blocks.starts, np.arange(blocks.classes.size), side="right") - 1
    return np.unique(blocks.classes[np.asarray(mine)[run]])


@each_construct
def test_channel_space(construct: Construct) -> None:
    analysis = fxprune.analyze(build(construct), image())
    (space,) = [space for space in analysis.spaces if construct.of in space.producers]
    assert set(space.producers) == set(construct.with_ or (construct.of,))
    assert space.channels == construct.channels
    found = analysis.blocks.block_of[classes_of(analysis, space.producers)]
    assert tuple(sorted(np.unique(found[found >= 0], return_counts=True)[1].tolist())) == construct.blocks
    assert space.permutable == sum(size for size in construct.blocks if size > 1)
    assert set(construct.ties) <= set(space.ties)
    assert bool(space.ties) == bool(construct.ties)
    assert construct.reason in space.reason
    assert bool(space.reason) == bool(construct.reason)
    assert construct.of in str(analysis)
    assert construct.reason in str(analysis)


def test_every_boundary_is_named() -> None:
    net = Net(lambda m, x: m.z(m.a(x).cumsum(1).sort(1)[0]), {"a": conv(3, 8), "z": conv(8, 4)})
    analysis = fxprune.analyze(net, image()[0].float())
    assert list(analysis.boundaries) == ["cumsum", "sort"]
    assert "boundaries" in str(analysis)
    assert "boundaries" not in str(fxprune.analyze(nn.Sequential(conv(3, 8)), image()[0].float()))


# --- moving what may move is exact ----------------------------------------------------------------------------------


def random_order(analysis: ChannelAnalysis, seed: int = 0) -> Array:
    """A random permutation of every block, asked for as a pass asks for it."""
    random = np.random.default_rng(seed)
    reordering, blocks = Reordering(analysis.blocks), analysis.blocks
    for block in range(int(blocks.block_of.max(initial=-1)) + 1):
        classes = np.flatnonzero(blocks.block_of == block)
        places, atoms = (
            np.concatenate([blocks.members[int(c)] for c in order]) for order in (classes, random.permutation(classes))
        )
        assert reordering.wish(places, atoms, "test") == ""
    return reordering.permutation()


def reordered(traced: Trace, analysis: ChannelAnalysis, moved: Array) -> tuple[fx.GraphModule, tuple[str, ...]]:
    layers = reorder(traced.module, analysis, moved)
    traced.module.graph.lint()
    traced.module.recompile()
    return traced.module, layers


def differs(actual: nn.Module, reference: nn.Module) -> bool:
    try:
        assert_same_function(actual, reference, image(), ("eval",))
    except AssertionError:
        return True
    return False


@each_construct
def test_moving_what_may_move_is_exact(construct: Construct) -> None:
    model = build(construct)
    traced = trace(model, image())
    analysis = analysis_of(traced)
    moved = random_order(analysis)
    module, _ = reordered(traced, analysis, moved)
    assert_same_function(module, model, image())
    sizes = [size for size in construct.blocks if size > 1]
    there = np.concatenate([analysis.blocks.members[c] for c in classes_of(analysis, (construct.of,))])
    assert bool((moved[there] != there).any()) == bool(sizes)


# Nothing can move where a single convolution reads the input and gives the output.
IMMOVABLE = {"SingleConv"}


@pytest.mark.parametrize("case", one_in(4, CASES, start=1))
def test_any_admissible_order_of_a_zoo_net_is_exact(case: Case) -> None:
    model = randomize(case.build().double()).eval()
    traced = trace(model, case.inputs())
    analysis = analysis_of(traced)
    module, layers = reordered(traced, analysis, random_order(analysis))
    assert bool(layers) == (case.name not in IMMOVABLE)
    assert_same_function(module, model, case.inputs())


# --- would a mistake be seen? ---------------------------------------------------------------------------------------

# Orders across the groups of a convolution are exact as well, but would not vanish into its weight; whole sets of
# channels that a reshape ties could move together, but nothing says which channel of a set becomes which.
CAUTIOUS = ("group", "pixel shuffle", "spreads")
RESTRICTED = [c for c in CONSTRUCTS if len(c.blocks) != 1 and not any(word in c.name for word in CAUTIOUS)]


@pytest.mark.parametrize("construct", RESTRICTED, ids=lambda construct: construct.name)
def test_what_is_forbidden_would_change_the_function(construct: Construct) -> None:
    model = build(construct)
    traced = trace(model, image())
    analysis = analysis_of(traced)
    (space,) = [space for space in analysis.spaces if construct.of in space.producers]
    classes = classes_of(analysis, space.producers)
    moved = np.arange(analysis.blocks.classes.size)
    for place, atom in zip(classes.tolist(), np.roll(classes, 1).tolist(), strict=True):
        if len(analysis.blocks.members[place]) == len(analysis.blocks.members[atom]):
            moved[analysis.blocks.members[place]] = analysis.blocks.members[atom]
    try:
        module, layers = reordered(traced, analysis, moved)
    except PassError:
        return  # such an order does not even exist
    assert layers
    assert differs(module, model)


def test_halves_taken_for_exchangeable_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    construct = next(c for c in CONSTRUCTS if c.name == "uneven split")
    site = AtomTable.site

    def forgets_parts(self: AtomTable, atoms: Array, roles: Array | None = None) -> None:
        if atoms.size not in (2, 6):
            site(self, atoms, roles)

    model = build(construct)
    assert not differs(changed(model), model)
    monkeypatch.setattr(AtomTable, "site", forgets_parts)
    assert differs(changed(model), model)


def test_a_forgotten_tie_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(next(c for c in CONSTRUCTS if c.name == "squeeze and excite"))
    assert not differs(changed(model), model)
    monkeypatch.setattr(AtomTable, "tie", lambda self, left, right, cause: None)
    assert differs(changed(model), model)


def test_a_forgotten_pin_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(next(c for c in CONSTRUCTS if c.name == "output"))
    assert not differs(changed(model), model)
    monkeypatch.setattr(AtomTable, "pin", lambda self, atoms, reason: None)
    assert differs(changed(model), model)


def changed(model: nn.Module) -> fx.GraphModule:
    traced = trace(model, image())
    analysis = analysis_of(traced)
    return reordered(traced, analysis, random_order(analysis))[0]


# --- wishes ---------------------------------------------------------------------------------------------------------


def test_wishes_are_accepted_whole_or_refused() -> None:
    analysis = fxprune.analyze(build(next(c for c in CONSTRUCTS if c.name == "chunk")), image())
    (atoms,) = [port.atoms for port in analysis.ports if port.kind == "writes" and port.node.name == "a"]
    reordering = Reordering(analysis.blocks)
    assert reordering.wish(atoms, np.roll(atoms, 1), "across").startswith("other layers tell")
    assert np.array_equal(reordering.permutation(), np.arange(analysis.blocks.classes.size))
    assert reordering.wish(atoms[:4], atoms[[1, 0, 3, 2]], "first") == ""
    assert reordering.wish(atoms[:2], atoms[[1, 0]], "same") == ""
    assert "first has fixed" in reordering.wish(atoms[:4], atoms[[1, 2, 3, 0]], "other")
    assert reordering.permutation()[atoms].tolist() == atoms[[1, 0, 3, 2, 4, 5, 6, 7]].tolist()
    (output,) = [port.atoms for port in analysis.ports if port.kind == "writes" and port.node.name == "z"]
    assert reordering.wish(output, output[::-1], "last") == "model output"


def test_a_partial_wish_fills_its_block() -> None:
    analysis = fxprune.analyze(build(CONSTRUCTS[0]), image())
    (atoms,) = [port.atoms for port in analysis.ports if port.kind == "writes" and port.node.name == "a"]
    reordering = Reordering(analysis.blocks)
    assert reordering.wish(atoms[:2], atoms[[1, 2]], "partial") == ""
    assert sorted(reordering.permutation()[atoms].tolist()) == atoms.tolist()
    assert reordering.permutation()[atoms].tolist() == atoms[[1, 2, 0, 3, 4, 5, 6, 7]].tolist()


# --- size -----------------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Residual blocks on one stream."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stem = conv(3, 4)
        self.blocks = nn.ModuleList(conv(4, 4) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return x.mean((1, 2, 3))


class Dense(nn.Module):
    """Every layer reads the concatenation of all before it."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(conv(3 + 4 * i, 4) for i in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1).mean((1, 2, 3))


@contextmanager
def shallow_stack(frames: int = 120) -> Iterator[None]:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + frames)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


@pytest.mark.parametrize("net", [Chain(400), Dense(60)], ids=["chain", "dense"])
def test_analysis_of_a_deep_graph_does_not_recurse(net: nn.Module) -> None:
    traced = trace(net, torch.randn(1, 3, 2, 2))
    analysis_of(traced)  # whatever is imported or cached at first use
    with shallow_stack():
        analysis = analysis_of(traced)
        moved = random_order(analysis)
    assert (moved != np.arange(moved.size)).any()
    assert not analysis.boundaries


def test_a_recursive_walk_would_be_seen() -> None:
    def walk(depth: int) -> int:
        return 0 if depth == 0 else walk(depth - 1)

    with shallow_stack(), pytest.raises(RecursionError):
        walk(400)


def work(blocks: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Nodes of a chain, and the label elements that its analysis records: ties, sites and pins."""
    count = 0
    with monkeypatch.context() as patch:
        for name in ("tie", "site", "pin"):
            original = getattr(AtomTable, name)

            def counted(self: AtomTable, atoms: Array, *rest: Any, original: Any = original) -> None:
                nonlocal count
                count += atoms.size
                original(self, atoms, *rest)

            patch.setattr(AtomTable, name, counted)
        traced = trace(Chain(blocks), torch.randn(1, 3, 2, 2))
        analysis_of(traced)
    return len(traced.module.graph.nodes), count


def test_work_grows_with_the_graph_and_not_with_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, small = work(20, monkeypatch)
    more_nodes, large = work(40, monkeypatch)
    assert more_nodes > 1.9 * nodes
    assert small > nodes
    assert large < 2.2 * small


def test_analysis_is_pure_data() -> None:
    analysis = fxprune.analyze(build(CONSTRUCTS[0]), image())
    with pytest.raises(dataclasses.FrozenInstanceError):
        analysis.ports = ()  # type: ignore[misc]  # the point of the test


class Casts(nn.Module):
    """x.type_as(y) where y has another shape: only x lends its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.other = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).type_as(self.other(x).flatten(1)))


def test_a_cast_passes_channels_on() -> None:
    analysis = fxprune.analyze(Casts(), torch.randn(2, 3, 4, 4))
    assert {space.producers: space.permutable for space in analysis.spaces}["first",] == 8


def test_a_rule_that_fails_is_a_boundary(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(state: object) -> None:
        raise IndexError("not foreseen")

    monkeypatch.setitem(METHODS, "type_as", broken)
    analysis = fxprune.analyze(Casts(), torch.randn(2, 3, 4, 4))
    assert "its rule failed (IndexError: not foreseen)" in analysis.boundaries["type_as"]
    assert {space.producers: space.permutable for space in analysis.spaces}["first",] == 0
    assert "type_as" in caplog.text
