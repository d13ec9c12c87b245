"""Samples of a layer: the right inputs, the right targets, the right number of rows."""
# nn.Module.__call__ is typed to return Any; each net would need a cast.
# mypy: disable-error-code="no-any-return, no-untyped-call"

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equality import randomize
from torch import Tensor, nn

import fxprune.calibration.samples
from fxprune.calibration.batches import Batch
from fxprune.calibration.following import Following, follow
from fxprune.calibration.lockstep import Lockstep
from fxprune.calibration.samples import MAX_ROWS, Samples, affine, draw, patches, rows_for
from fxprune.errors import CalibrationError
from fxprune.graph.convolutions import kernels_of
from fxprune.graph.tracing import trace


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# --- patches --------------------------------------------------------------------------------------------------------

GEOMETRIES: dict[str, dict[str, Any]] = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1},
    "1x1, stride": {"kernel_size": 1, "stride": 2},
    "1x1, padding": {"kernel_size": 1, "padding": 2},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "two strides": {"kernel_size": 3, "stride": (2, 3), "padding": (0, 1)},
    "dilation": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "all at once": {"kernel_size": (3, 2), "stride": (1, 2), "dilation": (2, 3), "padding": (3, 1)},
    "rectangular": {"kernel_size": (1, 5), "padding": (0, 2)},
    "rectangular the other way": {"kernel_size": (4, 1), "stride": (1, 2)},
    "same": {"kernel_size": (3, 5), "padding": "same"},
    "same, even": {"kernel_size": (2, 4), "padding": "same"},
    "same, dilation": {"kernel_size": 2, "dilation": 3, "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid", "stride": 2},
    "reflect": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect", "dilation": (1, 2)},
    "circular": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular"},
    "replicate": {"kernel_size": (5, 3), "padding": (2, 1), "padding_mode": "replicate", "stride": 2},
    "same, reflect": {"kernel_size": (4, 3), "padding": "same", "padding_mode": "reflect"},
}


def everywhere(output: Tensor) -> tuple[Tensor, ...]:
    grid = output.shape[0], output.shape[2], output.shape[3]
    return torch.unravel_index(torch.arange(output[:, 0].numel()), grid)


def rows_of(output: Tensor) -> Tensor:
    """`(N * H * W, O)`: the outputs of all positions, one image after the other."""
    return output.permute(0, 2, 3, 1).flatten(0, 2)


def by_convolution(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """All patches, cut out by torch's own convolution with one-hot kernels: `(N * H * W, D)`."""
    unknowns = conv.weight[0].numel()
    probe = copy.deepcopy(conv)
    probe.out_channels, probe.bias = unknowns, None
    probe.weight = nn.Parameter(torch.eye(unknowns, dtype=x.dtype).view(-1, *conv.weight.shape[1:]))
    return rows_of(probe(x))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_patches_are_what_the_convolution_reads(geometry: str) -> None:
    conv = nn.Conv2d(3, 5, **GEOMETRIES[geometry])
    x = torch.randn(2, 3, 9, 11)
    output = conv(x)
    place = everywhere(output)
    read = patches(conv, x, *place)
    assert torch.equal(read, by_convolution(conv, x))
    assert conv.bias is not None
    assert torch.allclose(read @ conv.weight.flatten(1).T + conv.bias, rows_of(output), atol=1e-5)
    chosen = torch.randperm(len(read))[:7]
    assert torch.equal(patches(conv, x, *(index[chosen] for index in place)), read[chosen])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("geometry", [name for name, options in GEOMETRIES.items() if "padding_mode" not in options])
def test_patches_equal_unfold(geometry: str) -> None:
    conv = nn.Conv2d(3, 5, **GEOMETRIES[geometry])
    x = torch.randn(2, 3, 9, 11)
    padded = F.pad(x, conv._reversed_padding_repeated_twice)
    columns = F.unfold(padded, conv.kernel_size, conv.dilation, 0, conv.stride)
    read = patches(conv, x, *everywhere(conv(x)))
    assert torch.equal(read, columns.transpose(1, 2).flatten(0, 1))


KINDS: dict[str, tuple[nn.modules.conv._ConvNd, tuple[int, ...]]] = {
    "Conv1d": (nn.Conv1d(3, 5, 3, stride=2, padding=2, dilation=2), (11,)),
    "Conv1d, circular": (nn.Conv1d(3, 5, 4, padding=(2,), padding_mode="circular"), (9,)),
    "Conv3d": (nn.Conv3d(3, 5, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 0)), (4, 5, 3)),
    "Conv3d, replicate": (nn.Conv3d(3, 5, 3, padding=1, padding_mode="replicate"), (3, 4, 3)),
    "ConvTranspose1d": (nn.ConvTranspose1d(3, 5, 3, stride=2, padding=2, output_padding=1, dilation=2), (7,)),
    "ConvTranspose2d": (nn.ConvTranspose2d(3, 5, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=1), (5, 4)),
    "ConvTranspose2d, stride above the kernel": (nn.ConvTranspose2d(3, 5, 2, stride=4), (3, 4)),
    "ConvTranspose3d": (nn.ConvTranspose3d(3, 5, 2, stride=(1, 2, 3), dilation=(2, 1, 1)), (3, 2, 4)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_patches_times_kernels_are_the_output_of_every_kind(kind: str) -> None:
    conv, space = KINDS[kind]
    x = torch.randn(2, 3, *space)
    output = conv(x)
    place = torch.meshgrid(*(torch.arange(n) for n in (2, *output.shape[2:])), indexing="ij")
    read = patches(conv, x, *(index.flatten() for index in place))
    weight = kernels_of(conv)
    assert weight.shape[:2] == (5, 3)
    assert conv.bias is not None
    found = read @ weight.flatten(1).T + conv.bias
    assert torch.allclose(found, output.movedim(1, -1).flatten(0, -2), atol=1e-5)
    wrong = read @ weight.flip(1).flatten(1).T + conv.bias  # a control: another order of the channels shows
    assert not torch.allclose(wrong, output.movedim(1, -1).flatten(0, -2), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_patches_are_float32(dtype: torch.dtype) -> None:
    conv, x = nn.Conv2d(3, 5, 3).to(dtype), torch.randn(1, 3, 5, 5).to(dtype)
    read = patches(conv, x, *everywhere(conv(x)))
    assert read.dtype == torch.float32
    assert torch.equal(read, by_convolution(nn.Conv2d(3, 5, 3), x.float()))


# --- rows -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A convolution between two others, then `after`."""

    def __init__(self, after: str = "", bias: bool = True, width: int = 6) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, width, 3, padding=1, bias=bias)
        self.norm, self.side = nn.BatchNorm2d(width), nn.Conv2d(4, width, 1)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).relu()
        if self.after == "pooled, broadcast":
            return (self.norm(self.conv(x.mean((2, 3), keepdim=True))) + self.side(x)).relu()
        side = self.side(x) if "+" in self.after else x
        y = self.conv(x)
        if "norm" in self.after:
            y = self.norm(y)
        if "+ pooled" in self.after:
            return (y + side.mean((2, 3), keepdim=True)).relu()
        if "+ number" in self.after:
            return (y + x.size(0)).relu()
        if "+" in self.after:
            return (y + side).relu()
        return y


def images(*sizes: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(size, 3, 6, 5, generator=generator),) for size in sizes]


def perturbed(model: nn.Module) -> nn.Module:
    """A copy whose layers before and beside `conv` have other weights."""
    other = copy.deepcopy(model)
    for name in ("before", "side"):
        weight = other.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(weight) * 0.2)
    return other


def drawn(
    model: nn.Module, batches: Sequence[Batch], seed: int = 0, pruned: nn.Module | None = None
) -> tuple[Samples, Following, dict[str, Tensor]]:
    """The samples of `conv`, and all rows of the values around it in the dense (d) and the pruned (p) network."""
    conv = model.get_submodule("conv")
    assert isinstance(conv, nn.Conv2d)
    twins = trace(model, batches[0]).module, trace(pruned or perturbed(model), batches[0]).module
    (node,) = twins[0].graph.find_nodes(op="call_module", target="conv")
    following = follow(twins[0], node)
    with Lockstep(*twins, batches) as networks:
        pairs = networks.pause_before(node.name)
        samples = draw("conv", node.name, conv, following, pairs, seed)
        values = {
            f"{key} {name}": torch.cat([rows_of(pair[i].value(name)) for pair in pairs])
            for i, key in enumerate("dp")
            for name in (node.name, following.other)
            if name is not None and isinstance(pairs[0][0].value(name), Tensor)
        }
        source = node.all_input_nodes[0].name
        values["patches"] = torch.cat([by_convolution(conv, pair[1].value(source)) for pair in pairs])
        if following.other is not None:
            (end,) = (n for n in twins[0].graph.nodes if n.name.startswith("add"))
            values["d sum"] = torch.cat([rows_of(dense.value(end.name)) for dense, _ in pairs])
    return samples, following, values


@pytest.mark.parametrize("after", ["", "norm"])
@pytest.mark.parametrize("bias", [True, False])
def test_inputs_are_those_of_the_pruned_network_and_targets_those_of_the_dense(after: str, bias: bool) -> None:
    samples, _, values = drawn(randomize(Block(after, bias)), images(2, 3))
    assert len(samples.inputs) == 5 * 6 * 5
    assert torch.allclose(samples.inputs + samples.input_mean.float(), values["patches"], atol=1e-6)
    assert torch.equal(samples.targets, values["d conv"])
    assert not torch.allclose(samples.targets, values["p conv"], atol=0.1)


@pytest.mark.parametrize("after, bias, centered", [("", True, True), ("norm", False, True), ("", False, False)])
def test_means_are_taken_off_where_there_is_a_place_for_an_intercept(after: str, bias: bool, centered: bool) -> None:
    samples, _, values = drawn(randomize(Block(after, bias)), images(2, 3))
    if centered:
        assert samples.inputs.mean(0).abs().max() < 1e-6
        assert torch.allclose(samples.input_mean, values["patches"].double().mean(0))
        assert torch.allclose(samples.target_mean, values["d conv"].double().mean(0))
        assert samples.input_mean.abs().max() > 0.1
    else:
        assert torch.equal(samples.inputs, values["patches"])
        assert not samples.input_mean.any()
        assert not samples.target_mean.any()


@pytest.mark.parametrize("after", ["+", "norm +", "norm + pooled", "norm + number"])
@pytest.mark.parametrize("gamma", [None, -0.5])
def test_with_an_addition_the_sum_is_the_target(after: str, gamma: float | None) -> None:
    model = randomize(Block(after, bias=False))
    if gamma is not None:
        assert isinstance(model.norm, nn.BatchNorm2d)
        model.norm.weight.fill_(gamma)
    samples, following, values = drawn(model, images(2, 3))
    assert following.other is not None
    assert torch.allclose(samples.scale * samples.targets + samples.offset, values["d sum"], atol=1e-5)
    if "number" not in after:
        assert not torch.allclose(samples.targets, values["d conv"], atol=0.1)


def test_targets_are_those_of_the_layer_where_the_other_branch_is_unchanged() -> None:
    model = randomize(Block("norm +"))
    samples, _, values = drawn(model, images(2), pruned=copy.deepcopy(model))
    assert torch.allclose(samples.targets, values["d conv"], atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 1e-42, -1e-20, 1e-9])
def test_a_filter_that_batch_norm_silences_does_not_repair_the_sum(gamma: float) -> None:
    model = randomize(Block("norm +"))
    assert isinstance(model.norm, nn.BatchNorm2d)
    model.norm.weight[2] = gamma
    samples, _, values = drawn(model, images(2))
    assert torch.equal(samples.targets[:, 2], values["d conv"][:, 2])
    assert samples.scale[2] == 0
    others = [0, 1, 3, 4, 5]
    assert torch.allclose((samples.scale * samples.targets + samples.offset)[:, others], values["d sum"][:, others])


def test_all_filters_may_be_silenced() -> None:
    model = randomize(Block("norm +"))
    assert isinstance(model.norm, nn.BatchNorm2d)
    model.norm.weight.zero_()
    samples, _, values = drawn(model, images(2))
    assert torch.equal(samples.targets, values["d conv"])


def test_an_output_that_the_addition_broadcasts_is_fitted_to_the_whole_sum() -> None:
    model = randomize(Block("pooled, broadcast", bias=False))
    samples, following, values = drawn(model, images(2, 3))
    assert following == Following("norm", "side", (0.0, float("inf")))
    assert len(samples.inputs) == 5 * 6 * 5
    assert torch.allclose(samples.scale * samples.targets + samples.offset, values["d sum"], atol=1e-5)
    read = samples.inputs + samples.input_mean.float()
    assert torch.allclose(read, values["patches"].repeat_interleave(6 * 5, 0), atol=1e-6)


@pytest.mark.parametrize("affine_parameters", [True, False])
def test_scale_and_shift_are_those_of_batch_norm(affine_parameters: bool) -> None:
    norm = nn.BatchNorm2d(5, affine=affine_parameters).eval()
    randomize(norm)
    x = torch.randn(2, 5, 3, 3)
    scale, shift = affine(norm, 5, x.device)
    assert torch.allclose(x * scale[:, None, None] + shift[:, None, None], norm(x), atol=1e-6)
    one, zero = affine(None, 3, x.device)
    assert one.tolist() == [1, 1, 1]
    assert zero.tolist() == [0, 0, 0]


# --- number and choice of rows --------------------------------------------------------------------------------------


def test_rows_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomize(Block("norm +"))
    every, _, _ = drawn(model, images(3, 2, 4))
    monkeypatch.setattr(fxprune.calibration.samples, "MAX_ROWS", 40)
    some, _, _ = drawn(model, images(3, 2, 4))
    assert len(every.inputs) == 9 * 6 * 5
    assert abs(len(some.inputs) - 40) <= 1
    assert len(some.inputs) == len(some.targets) == len(some.offset)
    # Each row is one of all rows, in their order, with the target and the offset that belong to it.
    whole, part = (torch.cat([s.inputs + s.input_mean.float(), s.targets, s.offset], 1).double() for s in (every, some))
    distance, nearest = torch.cdist(part, whole).min(1)
    assert distance.max() < 1e-4
    assert (nearest.diff() > 0).all()
    assert len({int(row) // (6 * 5) for row in nearest}) == 9  # all images take part


def test_rows_stay_bounded_with_many_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fxprune.calibration.samples, "MAX_ROWS", 12)
    samples, _, _ = drawn(randomize(Block()), images(*[1] * 9))
    assert 9 <= len(samples.inputs) <= 12


def test_a_layer_with_many_inputs_still_gets_rows_for_each_unknown() -> None:
    for unknowns in (9, 144, 1152, 4608, 9216, 20_000):
        assert rows_for(unknowns) == MAX_ROWS or rows_for(unknowns) >= 4 * unknowns or unknowns > MAX_ROWS // 4
    assert rows_for(4608) * 4608 * 4 <= 2**29
    assert rows_for(100_000) == MAX_ROWS


def test_a_seed_gives_one_draw_and_global_random_state_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fxprune.calibration.samples, "MAX_ROWS", 40)
    model = randomize(Block("norm +"))
    state = torch.get_rng_state()
    first, _, _ = drawn(model, images(3, 2), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again, _, _ = drawn(model, images(3, 2), seed=3)
    other, _, _ = drawn(model, images(3, 2), seed=4)
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.targets, other.targets)


# --- moments --------------------------------------------------------------------------------------------------------


def test_moments_are_means_over_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fxprune.calibration.samples, "CHUNK", 64)
    monkeypatch.setattr(fxprune.calibration.samples, "BAND", 10)
    samples, _, values = drawn(randomize(Block("norm +")), images(3, 2))
    assert samples.inputs.shape[1] == 36
    u, t = samples.inputs.double(), samples.targets.double()
    assert torch.allclose(samples.gram(), u.T @ u / len(u), atol=1e-6)
    assert torch.allclose(samples.cross(), t.T @ u / len(u), atol=1e-6)
    assert samples.mean_square == pytest.approx(float(samples.gram().diagonal().mean()))
    assert torch.allclose(samples.energy(), t.var(0, correction=0), atol=1e-6)
    squares = values["patches"].double().square().view(len(u), 4, 9).mean((0, 2))
    assert torch.allclose(samples.second_moment(4), squares, atol=1e-6)
    assert samples.gram().dtype == samples.cross().dtype == samples.energy().dtype == torch.float64


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_halves_are_other_rows_and_make_up_the_whole(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    u, t, offset = (torch.randn(rows, width, generator=generator) for width in (5, 3, 3))
    none = torch.zeros(5).double(), t, torch.zeros(3).double(), torch.ones(3)
    samples = Samples(u, *none, offset, centered=False)
    first, second = samples.parts()
    assert (first.rows, second.rows) == ((rows + 1) // 2, max(1, rows // 2))
    if rows > 1:
        assert torch.equal(torch.cat([first.inputs, second.inputs]), u)
        assert torch.equal(torch.cat([first.targets, second.targets]), t)
        assert torch.equal(torch.cat([first.offset, second.offset]), offset)
    for half, moments in zip((first, second), samples.halves, strict=True):
        assert torch.allclose(moments.gram, (half.inputs.T @ half.inputs / half.rows).double(), atol=1e-6)
    assert torch.allclose(samples.gram(), (u.T @ u / rows).double(), atol=1e-6)
    some = samples.of(torch.tensor([2, 0]))
    assert torch.equal(some.targets, t[:, [2, 0]])
    assert torch.equal(some.offset, offset[:, [2, 0]])


def test_energy_without_an_intercept_is_not_taken_about_the_mean() -> None:
    samples, _, values = drawn(randomize(Block(bias=False)), images(3, 2))
    assert torch.allclose(samples.energy(), values["d conv"].double().square().mean(0), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_give_float32_rows(dtype: torch.dtype) -> None:
    model = randomize(Block("norm +")).to(dtype)
    samples, _, _ = drawn(model, [(x.to(dtype),) for (x,) in images(2)])
    rows = samples.inputs, samples.targets, samples.scale, samples.offset
    assert {tensor.dtype for tensor in rows} == {torch.float32}
    assert {samples.input_mean.dtype, samples.target_mean.dtype} == {torch.float64}


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "broken, verb", [("p before", "reads"), ("d conv", "should give"), ("d side", "should give"), ("p side", "should")]
)
def test_values_that_are_not_finite_are_named(value: float, broken: str, verb: str) -> None:
    model = randomize(Block("norm +"))
    other = perturbed(model)
    weight = (model if broken[0] == "d" else other).get_submodule(broken[2:]).weight
    assert isinstance(weight, Tensor)
    weight[0] = value
    with pytest.raises(CalibrationError, match=f"conv: on the calibration data the layer {verb}.* NaN or infinity"):
        drawn(model, images(2), pruned=other)


def test_images_without_a_batch_are_refused() -> None:
    model = randomize(Block())
    batches = [(torch.ones(3, 6, 5),)]
    twins = trace(model, batches[0]).module, trace(copy.deepcopy(model), batches[0]).module
    conv = model.conv
    assert isinstance(conv, nn.Conv2d)
    with (
        Lockstep(*twins, batches) as networks,
        pytest.raises(CalibrationError, match=r"conv: gives \(6, 6, 5\); calibrate with batches of images"),
    ):
        draw("conv", "conv", conv, Following(), networks.pause_before("conv"))
