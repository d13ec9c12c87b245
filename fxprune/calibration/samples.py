"""Samples of what a convolution reads in the pruned network and what it should give, at random positions of the images.

Their number is bounded, and so is the memory: neighbouring positions of one image say much the same, and the solution
has far fewer unknowns than there are positions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.calibration.following import Following
from fxprune.calibration.lockstep import Sample
from fxprune.errors import CalibrationError
from fxprune.graph.convolutions import Convolution, Layer, kernels_of

# Rows: at most MAX_ROWS, and fewer if they would take more than MAX_BYTES in float32, but then still ROWS_PER_UNKNOWN
# for each unknown of an output.
MAX_ROWS = 65_536
MAX_BYTES = 256 * 2**20
ROWS_PER_UNKNOWN = 4
# A filter that BatchNorm scales by less than this share of the largest scale counts as switched off. To repair a sum,
# its weights would have to grow by the inverse, beyond what float16 holds; decayed scales can be as small as 1e-40.
SILENT = 1e-4
CHUNK = 8_192
"""Rows that are multiplied in float32 before the product is added up in float64."""
FEW = 1_024
"""Rows whose columns are added up in float32."""
BAND = 512
"""Columns of a Gram matrix that are computed at a time, as far as its diagonal."""
LARGEST = 1e17
"""Values of which that many squares add up in float32."""


class Moments(NamedTuple):
    """What least squares needs to know of rows: `gram (D, D)`, `cross (O, D)` and `energy (O,)`, float64."""

    gram: Tensor
    cross: Tensor
    energy: Tensor


@dataclass(frozen=True)
class Samples:
    """Rows of a least squares problem for one convolution with `O` filters and `D = C * taps` inputs of each.

    Attributes:
        inputs: `(N, D)` float32, patches that the pruned network feeds it, less their mean.
        input_mean: `(D,)` float64, zero unless `centered`.
        targets: `(N, O)` float32, what it should give.
        target_mean: `(O,)` float64, zero unless `centered`.
        scale: `(O,)` float32; a rectifier that follows reads `scale * output + offset`. Zero if it is next to nothing.
        offset: `(N, O)` or `(1, O)` float32.
        centered: whether the layer has a place for an intercept: a bias, or a BatchNorm that follows.
    """

    inputs: Tensor
    input_mean: Tensor
    targets: Tensor
    target_mean: Tensor
    scale: Tensor
    offset: Tensor
    centered: bool = True

    @property
    def rows(self) -> int:
        """Their number, `N`."""
        return len(self.inputs)

    @property
    def mean_square(self) -> float:
        """Of all inputs: the mean of the diagonal of `gram`."""
        chunks = torch.split(self.inputs, CHUNK)
        return float(sum(chunk.square().sum(1).sum(dtype=torch.float64) for chunk in chunks)) / self.inputs.numel()

    def gram(self) -> Tensor:
        """`(D, D)` float64, mean of `u^T u` over the rows `u` of `inputs`."""
        return self._whole(*(half.gram for half in self.halves))

    def cross(self) -> Tensor:
        """`(O, D)` float64, mean of `t^T u` for the rows `t` of `targets`.

        If centered, `t` is less its mean too. In exact arithmetic that changes nothing; but in float32 a rest of the
        mean stays in `inputs`, and times a large target it exceeds what inputs that hardly vary have to say.
        """
        return self._whole(*(half.cross for half in self.halves))

    def energy(self) -> Tensor:
        """`(O,)` float64, mean square of the targets about `target_mean`."""
        return self._whole(*(half.energy for half in self.halves))

    def moments(self) -> Moments:
        """The three together."""
        return Moments(self.gram(), self.cross(), self.energy())

    def parts(self) -> tuple["Samples", "Samples"]:
        """The first and the second half of the rows, which are different images; twice the same if there is one. Means
        are those of all rows.
        """
        middle = (self.rows + 1) // 2
        first, second = (
            replace(
                self,
                inputs=self.inputs[rows],
                targets=self.targets[rows],
                offset=self.offset if len(self.offset) == 1 else self.offset[rows],
            )
            for rows in (slice(middle), slice(middle if self.rows > 1 else 0, None))
        )
        return first, second

    def of(self, outputs: Tensor) -> "Samples":
        """The same for some of the filters."""
        return replace(
            self,
            targets=self.targets[:, outputs],
            target_mean=self.target_mean[outputs],
            scale=self.scale[outputs],
            offset=self.offset[:, outputs],
        )

    @cached_property
    def halves(self) -> tuple[Moments, Moments]:
        """The moments of both `parts`. Those of all rows follow from them, so that rows are multiplied once."""
        first, second = (half._moments() for half in self.parts())
        return first, second

    def centered_targets(self) -> Tensor:
        """`(N, O)` float32, the targets less `target_mean`."""
        return self.targets - self.target_mean.float()

    def second_moment(self, channels: int) -> Tensor:
        """`(C,)` float64, mean square of each input channel."""
        squares = column_means(self.inputs, Tensor.square) + self.input_mean.square()
        return squares.view(channels, -1).mean(1)

    def _moments(self) -> Moments:
        targets = self.centered_targets()
        energy = column_means(targets, Tensor.square)
        return Moments(gram_of(self.inputs), mean_product(targets, self.inputs), energy)

    def _whole(self, first: Tensor, second: Tensor) -> Tensor:
        """The mean over all rows from those over both halves, of which the first may have one row more."""
        share = (self.rows + 1) // 2 / self.rows if self.rows > 1 else 0.5
        return share * first + (1 - share) * second


def column_means(rows: Tensor, of: Callable[[Tensor], Tensor] = lambda chunk: chunk) -> Tensor:
    """`(D,)` float64, the means of the columns, or of what `of` makes of them. A few rows are added up in float32: sums
    of all in float64 take fourteen times as long.
    """
    total = rows.new_zeros(rows.shape[1], dtype=torch.float64)
    for chunk in torch.split(rows, FEW):
        total += of(chunk).sum(0)
    return total / len(rows)


def mean_product(left: Tensor, right: Tensor) -> Tensor:
    """The mean of `t^T u` over rows `t` and `u`, float64."""
    total = left.new_zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    for a, b in zip(torch.split(left, CHUNK), torch.split(right, CHUNK), strict=True):
        total += a.T @ b
    return total / len(left)


def gram_of(rows: Tensor) -> Tensor:
    """The same for rows with themselves: half of it is computed, the rest is its mirror image."""
    total = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for chunk in torch.split(rows, CHUNK):
        for start in range(0, rows.shape[1], BAND):
            stop = start + BAND
            total[start:stop, :stop] += chunk[:, start:stop].T @ chunk[:, :stop]
    total /= len(rows)
    for start in range(0, rows.shape[1], BAND):
        total[:start, start : start + BAND] = total[start : start + BAND, :start].T
    return total


def rows_for(unknowns: int, most: int = MAX_ROWS) -> int:
    """How many rows are drawn for `unknowns` inputs of one output: about `most`.

    >>> rows_for(144), rows_for(2304), rows_for(4608)
    (65536, 29127, 18432)
    >>> rows_for(144, 8192), rows_for(2304, 8192)
    (8192, 9216)
    """
    least = ROWS_PER_UNKNOWN * unknowns
    return min(MAX_ROWS, max(MAX_BYTES // (4 * unknowns), least), max(most, least))


def draw(
    name: str,
    node: str,
    layer: Layer,
    following: Following,
    pairs: Sequence[tuple[Sample, Sample]],
    seed: int = 0,
    rows: int = MAX_ROWS,
) -> Samples:
    """Sample a convolution, or a linear layer, before which both networks pause.

    Args:
        name: of the layer, for errors.
        node: name of its node.
        layer: the dense one.
        following: what follows it, with what it takes from there.
        pairs: the batches, in the dense and in the pruned network.
        seed: of the positions.
        rows: about how many there are at most.

    Raises:
        CalibrationError: the layer reads or gives values that are not finite.
    """
    weight = kernels_of(layer)
    (dense_scale, dense_shift), (scale, shift) = (affine_of(following, s, len(weight), weight.device) for s in pairs[0])
    scale = torch.where(scale.abs() > SILENT * scale.abs().max(), scale, 0)
    # What the pruned layer has to give for its BatchNorm, if that is another one now, to give what the dense one gives.
    rate, more = (torch.where(scale == 0, same, x / scale) for same, x in ((1, dense_scale), (0, dense_shift - shift)))
    generator = torch.Generator().manual_seed(seed)
    outputs = [dense.value_kept(node) for dense, _ in pairs]
    shapes = [output.shape for output in outputs]
    if following.other is not None:  # the addition may broadcast the output
        others = [torch.as_tensor(dense.value(following.other)).shape for dense, _ in pairs]
        shapes = [torch.Size(np.broadcast_shapes(*terms)) for terms in zip(shapes, others, strict=True)]
    for shape in shapes:
        if isinstance(layer, Convolution) and len(shape) != 2 + len(layer.kernel_size):
            axes = ", ".join(("N", "C", *"DHW"[-len(layer.kernel_size) :]))
            raise CalibrationError(f"{name}: gives {tuple(shape)}; calibrate with batches of images ({axes})")
    grids = [_grid(layer, shape) for shape in shapes]
    available = list(map(math.prod, grids))
    share = min(1.0, rows_for(weight[0].numel(), rows) / max(1, sum(available)))
    read, targets, offsets = [], [], []
    for output, shape, grid, count, (dense, pruned) in zip(outputs, shapes, grids, available, pairs, strict=True):
        positions = torch.randperm(count, generator=generator)[: max(1, round(share * count))].sort().values
        place = tuple(index.to(output.device) for index in torch.unravel_index(positions, grid))
        own = tuple(index % size for index, size in zip(place, _grid(layer, output.shape), strict=True))
        (source,) = dense.network.nodes[node].all_input_nodes
        read.append(_read(layer, pruned.value(source.name), own))
        target = _pick(layer, output, own) * rate + more
        if following.other is not None:
            now, then = (
                _pick(layer, torch.as_tensor(sample.value(following.other), device=output.device).expand(shape), place)
                for sample in (pruned, dense)
            )
            target = target + torch.where(scale == 0, 0, (then - now) / scale)
            offsets.append(now + shift)
        targets.append(target)
    inputs, wanted = torch.cat(read), torch.cat(targets)
    for what, values in (("reads", inputs), ("should give", wanted)):
        low, high = torch.aminmax(values)  # NaN if there is one
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise CalibrationError(
                f"{name}: on the calibration data the layer {what} NaN or infinity; check the data and the model"
            )
        if max(-low, high) > LARGEST:
            raise CalibrationError(
                f"{name}: on the calibration data the layer {what} values beyond {LARGEST:g}, whose squares are too "
                "large to add up; check the scale of the data"
            )
    centered = layer.bias is not None or following.norm is not None
    input_mean = column_means(inputs) * centered
    inputs -= input_mean.float()
    target_mean = column_means(wanted) * centered
    offset = torch.cat(offsets) if offsets else shift[None]
    return Samples(inputs, input_mean, wanted, target_mean, scale, offset, centered)


def patches(conv: Convolution, value: Tensor, image: Tensor, *place: Tensor) -> Tensor:
    """The inputs of one output position each: `(R, C * taps)` float32, in the order of the flattened `(O, C, *kernel)`.

    Args:
        conv: any kernel size, stride, padding and dilation, transposed or not.
        value: its input `(N, C, *space)`.
        image: `(R,)` index of the sample.
        place: `(R,)` each, the position in the output.
    """
    dims = len(conv.kernel_size)
    if not conv.transposed:
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        value = F.pad(value, conv._reversed_padding_repeated_twice, mode=mode)
    index = [image.view(-1, *[1] * dims)]
    missing = torch.zeros((), dtype=torch.bool, device=value.device)
    for d in range(dims):
        stride, taps = conv.stride[d], torch.arange(conv.kernel_size[d], device=value.device) * conv.dilation[d]
        if conv.transposed:  # the output at p is tap t of the input at i where i * stride + t == p + padding
            reached = place[d][:, None] + int(conv.padding[d]) - taps
            read = reached.div(stride, rounding_mode="floor")
            outside = (reached % stride != 0) | (read < 0) | (read >= value.shape[2 + d])
            read = read.clamp(0, value.shape[2 + d] - 1)
            missing = missing | _along(outside, d, dims)
        else:
            read = place[d][:, None] * stride + taps
        index.append(_along(read, d, dims))
    picked = value.movedim(1, -1)[tuple(index)]  # (R, *kernel, C)
    if conv.transposed:
        picked = picked.masked_fill(missing[..., None], 0)
    return picked.movedim(-1, 1).flatten(1).float()


def _along(positions: Tensor, dim: int, dims: int) -> Tensor:
    """`(R, taps)` for one dimension of space as `(R, 1, taps, 1)`, to be broadcast against the others."""
    return positions.view(len(positions), *(-1 if d == dim else 1 for d in range(dims)))


def affine(norm: nn.Module | None, filters: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift `(O,)` float32 that a BatchNorm applies in evaluation mode; 1 and 0 without one."""
    if norm is None:
        return torch.ones(filters, device=device), torch.zeros(filters, device=device)
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -norm.running_mean * scale
        shift = shift if norm.bias is None else shift + norm.bias
    return scale.float(), shift.float()


def affine_of(following: Following, sample: Sample, filters: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift `(O,)` float32 of the BatchNorm behind a layer in one of the networks."""
    if following.frozen is not None:
        scale, shift = (sample.value(node).flatten().float() for node in following.frozen)
        return scale, shift
    norm = None if following.norm is None else sample.network.module.get_submodule(following.norm)
    return affine(norm, filters, device)


def _read(layer: Layer, value: Tensor, place: tuple[Tensor, ...]) -> Tensor:
    """What a layer reads for its outputs at some places, `(R, D)` float32."""
    return patches(layer, value, *place) if isinstance(layer, Convolution) else _pick(layer, value, place)


def _grid(layer: Layer, shape: torch.Size) -> tuple[int, ...]:
    """The dimensions of an output but for that of the channels, which is the last one of a linear layer."""
    return (shape[0], *shape[2:]) if isinstance(layer, Convolution) else shape[:-1]


def _pick(layer: Layer, value: Tensor, place: tuple[Tensor, ...]) -> Tensor:
    """The channels of a value at some places, `(R, C)` float32; all that is there if it has no batch."""
    if not isinstance(layer, Convolution):
        return (value[place] if place else value[None]).float()
    image, *others = place
    where: tuple[Tensor | slice, ...] = (image, slice(None), *others)
    return value[where].float()  # the dimension between comes last
