"""FusedConv2d: the plain form of a convolution with what surrounds it, and the dense form of the same function."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.graph.fused import FusedConv2d, gather_channels


def random_conv(
    seed: int,
    groups: int,
    channels: int,
    kept: int,
    width: int,
    repeats: bool = True,
    ordered: bool = True,
    bias: bool = True,
    dense_groups: int = 1,
) -> FusedConv2d:
    """A 3x2 kernel in float64. Group g reads `kept` channels of its part of the input, of which `dense_groups` parts
    exist; a channel perhaps several times.
    """
    generator = torch.Generator().manual_seed(seed)
    part, per_part = channels // dense_groups, groups // dense_groups
    conv = nn.Conv2d(groups * kept, groups * width, (3, 2), (2, 1), (1, 2), groups=groups, bias=bias).double()
    fused = FusedConv2d(conv, channels)
    fused.weight.copy_(torch.randn(conv.weight.shape, generator=generator))
    reads = [
        (torch.randint(part, (kept,), generator=generator) if repeats else torch.randperm(part, generator=generator))[
            :kept
        ]
        + g // per_part * part
        for g in range(groups)
    ]
    fused.index = torch.cat(reads)
    if ordered:  # filters stay in their part of the output
        out = groups * width // dense_groups
        fused.order = torch.cat([torch.randperm(out, generator=generator) + i * out for i in range(dense_groups)])
    fused.dense_groups = dense_groups
    return fused


def images(channels: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, 7, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


CASES = {
    "one group": {"groups": 1, "channels": 6, "kept": 4, "width": 5},
    "groups": {"groups": 3, "channels": 7, "kept": 4, "width": 2},
    "no repeats": {"groups": 4, "channels": 8, "kept": 4, "width": 3, "repeats": False},
    "in order, no bias": {"groups": 2, "channels": 4, "kept": 2, "width": 1, "ordered": False, "bias": False},
    "grouped before": {"groups": 6, "channels": 8, "kept": 3, "width": 2, "dense_groups": 2},
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES)
def test_dense_is_the_same_function(case: str, seed: int) -> None:
    conv = random_conv(seed, **CASES[case])  # type: ignore[arg-type]  # mypy joins the types of the table
    x, dense = images(conv.channels), conv.dense()
    residual = torch.randn_like(conv(x))
    conv.minimum, conv.maximum = dense.minimum, dense.maximum = -0.5, 1.5
    torch.testing.assert_close(dense(x, residual), conv(x, residual), rtol=0, atol=1e-12)
    assert (dense.groups, dense.index, dense.order) == (conv.dense_groups, None, None)
    assert dense.weight.shape == (conv.out_channels, conv.channels // dense.groups, 3, 2)


@pytest.mark.parametrize("lost", ["order", "index", "repeat"])
def test_control_a_wrong_dense_form_is_seen(lost: str) -> None:
    conv = random_conv(0, **CASES["groups"])  # type: ignore[arg-type]  # mypy joins the types of the table
    x, right = images(conv.channels), conv(images(conv.channels))
    wrong = conv.copy()
    assert conv.index is not None
    assert conv.order is not None
    if lost == "order":
        wrong.order = conv.order.argsort()
    elif lost == "index":
        wrong.index = conv.index.flip(0)
    else:  # a repeated channel counts as often as it is read
        wrong.weight[:, 1:][conv.index.reshape(3, 4)[:, 1:].repeat_interleave(2, 0) == conv.index[0]] = 0
    assert not torch.allclose(wrong.dense()(x), right)


def test_the_forward_is_written_out() -> None:
    conv = random_conv(1, **CASES["groups"])  # type: ignore[arg-type]  # mypy joins the types of the table
    conv.minimum = 0.0
    x = images(7)
    assert conv.index is not None
    assert conv.order is not None
    y = F.conv2d(x[:, conv.index], conv.weight, conv.bias, (2, 1), (1, 2), groups=3)[:, conv.order]
    residual = torch.randn_like(y)
    assert torch.equal(conv(x, residual), (y + residual).relu())
    assert conv.reads().tolist() == conv.index.reshape(3, 4).tolist()
    assert "reads 12 gathered channels, reorders its output" in repr(conv)


def test_operands_are_not_written_into() -> None:
    conv = FusedConv2d(nn.Conv2d(4, 4, 1), 4)
    conv.minimum = 0.0
    x, residual = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    kept = x.clone(), residual.clone()
    conv(x, residual)
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])


def test_a_copy_shares_nothing_and_nothing_learns() -> None:
    source = nn.Conv2d(4, 4, 1)
    conv = FusedConv2d(source, 4)
    other = conv.copy()
    with torch.no_grad():
        source.weight.zero_()
        conv.weight.add_(1)
    assert not torch.equal(conv.weight, other.weight)
    assert int(other.weight.count_nonzero()) == 16
    assert list(conv.parameters()) == []


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gathers_keep_the_memory_format(memory_format: torch.memory_format) -> None:
    x, index = images(5).contiguous(memory_format=memory_format), torch.tensor([4, 0, 0, 2])
    y = gather_channels(x, index)
    assert torch.equal(y, x[:, index])
    assert y.is_contiguous(memory_format=memory_format)
    assert torch.equal(gather_channels(x[:, :, ::2, 1:], index), x[:, index, ::2, 1:])


def test_it_scripts() -> None:
    conv = random_conv(1, **CASES["groups"])  # type: ignore[arg-type]  # mypy joins the types of the table
    conv.maximum = 0.5
    x = images(7)
    assert torch.equal(torch.jit.script(conv)(x, None), conv(x))
