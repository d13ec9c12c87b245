"""Two networks side by side: what a pause shows is what a plain forward would, in memory or in files."""
# nn.Module.__call__ is typed to return Any; each net would need a cast.
# mypy: disable-error-code="no-any-return"

import copy
import gc
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from equality import randomize
from products_harness import in_turns, one_in
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map
from zoo import CASES, Case, conv3

from fxprune.calibration.batches import Batch
from fxprune.calibration.lockstep import MEMORY_LIMIT, Lockstep
from fxprune.errors import CalibrationError
from fxprune.graph.memory import Memory
from fxprune.graph.tracing import trace

LIMITS = {"in memory": MEMORY_LIMIT, "in files": 0}
BY_NAME = {case.name: case for case in CASES}
Networks = tuple[fx.GraphModule, fx.GraphModule]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def networks(model: nn.Module, inputs: Sequence[Any]) -> Networks:
    """A net and the same net with other weights."""
    other = randomize(copy.deepcopy(model), seed=1)
    return trace(randomize(model), tuple(inputs)).module, trace(other, tuple(inputs)).module


def of(case: Case) -> tuple[Networks, list[Batch]]:
    inputs = case.inputs()
    return networks(case.build().double(), inputs), [inputs, tuple(2 * tensor[:1] for tensor in inputs)]


def cloned(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


class Plain(fx.Interpreter):
    """Runs a network in one go and notes what each node reads, at the moment when it does."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm.eval())
        self.reads: dict[str, dict[str, Any]] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.reads[n.name] = {source.name: cloned(self.env[source]) for source in n.all_input_nodes}
        return super().run_node(n)


def plain_reads(gm: fx.GraphModule, batch: Batch) -> dict[str, dict[str, Any]]:
    plain = Plain(gm)
    plain.run(*cloned(batch))
    return plain.reads


def same(left: Any, right: Any) -> bool:
    leaves = tree_leaves(left), tree_leaves(right)
    return len(leaves[0]) == len(leaves[1]) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(*leaves, strict=True)
    )


def steps(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op != "placeholder"]


def first_difference(pair: Networks, batches: Sequence[Batch], memory_limit: int, pauses: int = 1) -> str | None:
    """The first node, of every `pauses`-th, that reads something else in lockstep than in a plain forward."""
    expected = [[plain_reads(gm, batch) for gm in pair] for batch in batches]
    with Lockstep(*pair, batches, memory_limit=memory_limit) as lockstep:
        for node in steps(pair[0])[::-pauses][::-1]:
            for samples, reads in zip(lockstep.pause_before(node.name), expected, strict=True):
                for sample, read in zip(samples, reads, strict=True):
                    if not all(same(sample.value(source), value) for source, value in read[node.name].items()):
                        return node.name
    return None


@pytest.mark.parametrize("case", one_in(8, CASES, start=3))
def test_each_node_reads_what_it_reads_in_a_plain_forward(case: Case) -> None:
    pair, batches = of(case)
    before = cloned(batches)
    assert first_difference(pair, batches, LIMITS["in files"]) is None
    assert same(batches, before)


IN_PLACE = ["InPlaceAdd", "InPlaceReluReadLater", "InPlaceFunctionalRelu", "InPlaceUnusedResult"]


class WritesIntoItsInput(nn.Module):
    """A network that changes what the caller gave it, and reads a part of it afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv3(4, 4)
        self.last = conv3(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        y = self.conv(x)
        left.relu_()
        x.mul_(2)
        return y + self.conv(x) + self.last(left) - self.last(right)


class WritesIntoAView(nn.Module):
    """A view of a value is written into after both have been at rest for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv3(4, 4), conv3(4, 4), conv3(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        view = y[:, :2]
        z = self.second(y)
        view.add_(1)
        return z * y + self.third(view)


def feature_map(count: int = 2) -> Batch:
    return (torch.randn(count, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(count)),)


@pytest.mark.parametrize("net", [WritesIntoItsInput, WritesIntoAView])
@pytest.mark.parametrize("pauses, limit", in_turns([1, 2, 5], LIMITS))
def test_networks_that_write_into_views_stay_right(net: type[nn.Module], pauses: int, limit: str) -> None:
    batches = [feature_map(), feature_map(3)]
    before = cloned(batches)
    assert first_difference(networks(net().double(), batches[0]), batches, LIMITS[limit], pauses) is None
    assert same(batches, before)


def test_values_parted_from_their_aliases_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Memory, "changes", lambda *_: False)
    pair = networks(WritesIntoAView().double(), feature_map())
    # A pause while the value and its view rest side by side, and one at the end.
    assert first_difference(pair, [feature_map()], LIMITS["in memory"], pauses=5) is None
    assert first_difference(pair, [feature_map()], LIMITS["in files"], pauses=5) is not None


@pytest.mark.parametrize(
    "name, limit", in_turns(["ResidualAdd", "ChannelShuffle", *IN_PLACE], [*LIMITS.values(), 5_000, 20_000])
)
def test_any_number_of_pauses_and_any_limit_give_the_same(name: str, limit: int) -> None:
    pair, batches = of(BY_NAME[name])
    assert first_difference(pair, batches, limit, pauses=3) is None


def test_shapes_integers_tuples_and_constants_survive() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv3(4, 4)
            self.gain = nn.Parameter(torch.ones(2, 1, 1))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            b, c, h, w = x.shape
            small, large = self.conv(x).split([1, 3], 1)
            flat = large.reshape(b, 3, h * w)
            return small * self.gain[:1] + y.mean() + flat.view(b, 3, h, w) * c + x.size(-1) * self.gain.sum()

    batches = [feature_map() + feature_map(3), (*feature_map(1), torch.ones(7, dtype=torch.float64))]
    pair = networks(Mixed().double(), batches[0])
    assert any(node.op == "get_attr" for node in pair[0].graph.nodes)
    for limit in LIMITS.values():
        assert first_difference(pair, batches, limit) is None


@pytest.mark.parametrize("limit", LIMITS)
def test_looking_ahead_leaves_no_trace(limit: str) -> None:
    pair, batches = of(BY_NAME["ResidualChain"])
    last = steps(pair[0])[-1].args[0]
    assert isinstance(last, fx.Node)
    expected = [[plain_reads(gm, batch)["output"][last.name] for gm in pair] for batch in batches]
    with Lockstep(*pair, batches, memory_limit=LIMITS[limit]) as lockstep:
        for node in steps(pair[0])[1::4]:
            for samples, results in zip(lockstep.pause_before(node.name), expected, strict=True):
                for sample, result in zip(samples, results, strict=True):
                    known, before = list(sample.values), cloned(list(sample.values.values()))
                    assert same(sample.value(last.name), result)
                    assert list(sample.values) == known
                    assert same(list(sample.values.values()), before)
        lockstep.pause_before("output")
        for samples, results in zip(lockstep.samples, expected, strict=True):
            assert same([sample.value(last.name) for sample in samples], results)


def test_weights_may_change_at_a_pause() -> None:
    (dense, pruned), batches = of(BY_NAME["Plain"])
    with Lockstep(dense, pruned, batches) as lockstep:
        lockstep.pause_before("second")
        second = pruned.get_submodule("second")
        assert isinstance(second, nn.Conv2d)
        second.weight.zero_()
        lockstep.pause_before("head")
        for ours, changed in lockstep.samples:
            assert ours.value("second").std() > 0.1
            assert torch.allclose(changed.value("second"), second.bias[:, None, None])  # type: ignore[index]


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, limit", in_turns(["ResidualChain", "DenseBlock", "C2f", "InPlaceUnusedResult"], LIMITS))
def test_only_values_that_are_still_read_are_kept(name: str, limit: str) -> None:
    pair, batches = of(BY_NAME[name])
    order = list(pair[0].graph.nodes)
    with Lockstep(*pair, batches, memory_limit=LIMITS[limit]) as lockstep:
        for i, node in enumerate(order):
            if node.op == "placeholder":
                continue
            needed = {known.name for known in order[:i] if any(order.index(user) >= i for user in known.users)}
            for samples in lockstep.pause_before(node.name):
                assert [{known.name for known in sample.values} for sample in samples] == [needed, needed]


def test_forgotten_values_are_freed() -> None:
    pair, batches = of(BY_NAME["InPlaceUnusedResult"])
    with Lockstep(*pair, batches) as lockstep:
        lockstep.pause_before("second")
        values = [value for sample in lockstep.samples[0] for value in sample.values.values()]
        living = [weakref.ref(value.untyped_storage()) for value in values]
        assert living
        del values
        lockstep.pause_before("output")
        gc.collect()
        assert [reference() for reference in living] == [None] * len(living)


def in_memory(values: dict[fx.Node, Any]) -> list[str]:
    return [
        node.name
        for node, value in values.items()
        if isinstance(value, Tensor) and value.untyped_storage().filename is None
    ]


def test_the_limit_decides_what_goes_to_files() -> None:
    pair, batches = of(BY_NAME["ResidualChain"])
    for limit, expected in ((0, 0), (MEMORY_LIMIT, 1)):
        with Lockstep(*pair, batches, memory_limit=limit) as lockstep:
            lockstep.pause_before("blocks_3_0")
            counts = [len(in_memory(sample.values)) for samples in lockstep.samples for sample in samples]
            assert counts == [expected] * 4
            for samples, batch in zip(lockstep.samples, batches, strict=True):
                size = len(batch[0]) * 32 * 8 * 8 * 8 * expected  # the stream of 32 channels of 8x8, float64
                assert [sample.counted for sample in samples] == [size, size]


@pytest.mark.parametrize("limit, calls", [(MEMORY_LIMIT, 1), (0, 2)])
def test_what_was_computed_ahead_is_not_computed_again_where_there_is_room(limit: int, calls: int) -> None:
    (dense, pruned), batches = of(BY_NAME["ResidualChain"])
    counted = []
    dense.get_submodule("blocks.3.0").register_forward_hook(lambda *_: counted.append(1))
    with Lockstep(dense, pruned, batches, memory_limit=limit) as lockstep:
        first = [sample.value_kept("blocks_3_0") for sample, _ in lockstep.pause_before("blocks_3_0")]
        later = lockstep.pause_before("output")
        ends = [sample.value("output") for sample, _ in later]
    assert len(counted) == calls * len(batches)
    with torch.no_grad():
        assert all(torch.equal(end, dense(*batch)) for end, batch in zip(ends, batches, strict=True))
    assert len(first) == len(batches)


@pytest.mark.parametrize("failing", [False, True])
def test_no_file_is_left_behind(failing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pair, batches = of(BY_NAME["ResidualChain"])
    with Lockstep(*pair, batches, memory_limit=0) as lockstep:
        (folder,) = tmp_path.iterdir()
        lockstep.pause_before("blocks_3_0")
        assert not list(folder.iterdir())  # unlinked, though mapped
        if failing:
            with pytest.raises(RuntimeError, match="stop"), lockstep:
                raise RuntimeError("stop")
            assert not list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())
    assert not lockstep.samples


def test_the_order_in_memory_is_kept_in_files() -> None:
    class Permuted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv3(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).permute(0, 2, 3, 1)
            return self.conv(x) + y.permute(0, 3, 1, 2).view(x.shape)  # a view only of the order it was in

    pair = networks(Permuted().double(), feature_map())
    assert first_difference(pair, [feature_map()], 0) is None


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve space")
def test_a_full_disk_is_an_error_and_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    pair, batches = of(BY_NAME["Plain"])
    with (
        Lockstep(*pair, batches, memory_limit=0) as lockstep,
        pytest.raises(CalibrationError, match="No space left on device; calibrate with fewer images, or set TMPDIR"),
    ):
        lockstep.pause_before("head")


@pytest.mark.cuda
def test_files_return_to_the_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pair, batches = of(BY_NAME["ResidualAdd"])
    with Lockstep(pair[0].cuda(), pair[1].cuda(), batches, memory_limit=0) as lockstep:
        for node in steps(pair[0]):
            for samples in lockstep.pause_before(node.name):
                for sample in samples:
                    assert all(sample.value(source.name).is_cuda for source in node.all_input_nodes)


# --- looking ahead --------------------------------------------------------------------------------------------------


class TwoBranches(nn.Module):
    """`first` is added to a value that another branch gives later."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.first, self.second, self.narrow = conv3(4, 4), conv3(4, 4), conv3(4, 4)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.first(x)
        if self.between == "conv":
            other = self.second(x)
        elif self.between == "in-place conv":
            other = self.second(x).relu_()
        elif self.between == "source written":
            x.mul_(2)
            other = x * 3
        elif self.between == "view of source written":
            x[:, 1:].mul_(2)
            other = x * 3
        elif self.between == "other value written":
            z = self.narrow(x).relu_()
            return y + x * 3 + z
        else:
            other = x * 3
        return y + other


@pytest.mark.parametrize(
    "between, stops, known",
    [
        ("nothing", set(), True),
        ("conv", set(), True),
        ("conv", {"second"}, False),
        ("in-place conv", set(), False),
        ("source written", set(), False),
        ("view of source written", set(), False),
        ("other value written", set(), True),
    ],
)
def test_it_is_known_which_values_can_be_known_ahead(between: str, stops: set[str], known: bool) -> None:
    dense, pruned = networks(TwoBranches(between).double(), feature_map())
    (added,) = dense.graph.find_nodes(op="call_module", target="first")
    (addition,) = added.users
    other = next(term for term in addition.all_input_nodes if term is not added)
    with Lockstep(dense, pruned, [feature_map()]) as lockstep:
        assert lockstep.can_look_ahead("first", other.name, frozenset({"first", *stops})) is known
        (samples,) = lockstep.pause_before("first")
        ahead = cloned([sample.value(other.name) for sample in samples])
        lockstep.pause_before(addition.name)
        if between != "in-place conv":  # it comes out right, though its own past is spoilt
            unchanged = same(ahead, [sample.value(other.name) for sample in samples])
            assert unchanged is (known or bool(stops))


# --- errors ---------------------------------------------------------------------------------------------------------


def test_a_batch_that_does_not_fit_is_named_with_the_node() -> None:
    pair, batches = of(BY_NAME["Plain"])
    wrong = (torch.ones(2, 5, 8, 8, dtype=torch.float64),)
    for batch, number in ((wrong, 2), ((batches[0][0].float(),), 2), ((torch.ones(2, 3, dtype=torch.float64),), 2)):
        with (
            Lockstep(*pair, [*batches, batch]) as lockstep,
            pytest.raises(CalibrationError, match=f"calibration batch {number} does not fit the model: stem fails: "),
        ):
            lockstep.pause_before("head")


def test_networks_of_different_structure_are_refused() -> None:
    (dense, _), batches = of(BY_NAME["Plain"])
    (other, _), _ = of(BY_NAME["ResidualAdd"])
    with pytest.raises(CalibrationError, match="the two networks differ in structure; pass traces of one model"):
        Lockstep(dense, other, batches)


def test_progress_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    pair, batches = of(BY_NAME["Plain"])
    for progress in (False, True):
        with Lockstep(*pair, batches, progress=progress) as lockstep:
            lockstep.pause_before("head")
        captured = capsys.readouterr()
        assert ("calibrating" in captured.err) is progress
        assert not captured.out
