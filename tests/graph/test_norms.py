"""Normalisations that count channels which are gone: the same as torch's over these channels at zero."""
# Functions of torch.jit are untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

from fxprune.graph.norms import GroupNormWithZeros, NormWithZeros, norm_kind, with_zeros

C = 12
KEPT = torch.tensor([0, 1, 2, 4, 7, 11])  # of four groups of three: all, one, one and one

NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "GroupNorm": (lambda: nn.GroupNorm(4, C), (2, C, 5, 3), 1),
    "GroupNorm of one group": (lambda: nn.GroupNorm(1, C), (2, C, 5), 1),
    "GroupNorm of two numbers": (lambda: nn.GroupNorm(4, C), (2, C), 1),
    "GroupNorm of volumes": (lambda: nn.GroupNorm(6, C, eps=1e-3), (2, C, 2, 3, 2), 1),
    "LayerNorm": (lambda: nn.LayerNorm(C), (2, 5, C), -1),
    "LayerNorm without shift": (lambda: nn.LayerNorm(C, bias=False), (2, 5, 3, C), -1),
    "LayerNorm2d": (lambda: LayerNorm2d(C, eps=1e-6), (2, C, 5, 3), 1),
    "RMSNorm": (lambda: nn.RMSNorm(C, eps=1e-5), (2, 5, C), -1),
}

each_norm = pytest.mark.parametrize("name", NORMS)


@torch.no_grad()
def pair(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, NormWithZeros, Tensor, int]:
    """A norm in which the scales and shifts of some channels are zero, the same without these channels, an input in
    which they are zero, and its channel dimension.
    """
    build, shape, dim = NORMS[name]
    torch.manual_seed(0)
    dense = build().to(dtype)
    gone = torch.ones(C, dtype=torch.bool).index_fill(0, KEPT, False)
    smaller = copy.deepcopy(dense)
    for attribute, parameter in dense.named_parameters():
        parameter.normal_()
        parameter[gone] = 0
        setattr(smaller, attribute, nn.Parameter(parameter[KEPT].clone()))
    kind = norm_kind(dense)
    assert kind is not None
    x = torch.randn(shape, dtype=dtype) + 0.5
    x.index_fill_(dim, gone.nonzero().flatten(), 0)
    return dense, with_zeros(smaller, kind, KEPT, C), x, dim


@each_norm
@pytest.mark.parametrize("training", [False, True])
def test_equals_the_norm_over_channels_at_zero(name: str, training: bool) -> None:
    dense, smaller, x, dim = pair(name)
    expected = dense.train(training)(x)
    found = smaller.train(training)(x.index_select(dim, KEPT))
    torch.testing.assert_close(found, expected.index_select(dim, KEPT), rtol=1e-12, atol=1e-12)
    gone = torch.tensor([c for c in range(C) if c not in KEPT])
    assert not expected.index_select(dim, gone).any()


@each_norm
def test_control_the_plain_norm_over_the_rest_is_another(name: str) -> None:
    dense, smaller, x, dim = pair(name)
    smaller.channels = len(KEPT) if not isinstance(smaller, GroupNormWithZeros) else 1  # as if none were gone
    expected = dense(x).index_select(dim, KEPT)
    assert (smaller(x.index_select(dim, KEPT)) - expected).abs().nan_to_num(1.0).max() > 1e-3


@each_norm
def test_gradients_are_those_of_the_dense_norm(name: str) -> None:
    dense, smaller, x, dim = pair(name)
    whole, part = x.clone().requires_grad_(), x.index_select(dim, KEPT).requires_grad_()
    weights = torch.randn_like(x)
    (dense(whole) * weights).sum().backward()
    (smaller(part) * weights.index_select(dim, KEPT)).sum().backward()
    assert whole.grad is not None
    torch.testing.assert_close(part.grad, whole.grad.index_select(dim, KEPT))
    for attribute, parameter in smaller.named_parameters():
        gradient = dense.get_parameter(attribute).grad
        assert gradient is not None
        torch.testing.assert_close(parameter.grad, gradient[KEPT])


@each_norm
def test_scripts_and_exports(name: str) -> None:
    _, smaller, x, dim = pair(name, torch.float32)
    part = x.index_select(dim, KEPT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.testing.assert_close(torch.jit.script(smaller)(part), smaller(part))
    exported = torch.export.export(smaller, (part,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    more = part.repeat(3, *[1] * (part.dim() - 1))
    torch.testing.assert_close(exported.module()(more), smaller(more))


@each_norm
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_of_half_precision_are_taken_in_single(name: str, dtype: torch.dtype) -> None:
    dense, smaller, x, dim = pair(name, dtype)
    x = x * 300  # sums of squares beyond float16
    found, expected = smaller(x.index_select(dim, KEPT)), dense(x).index_select(dim, KEPT)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_channels_go_twice() -> None:
    dense, once, x, _ = pair("GroupNorm")
    then = torch.tensor([0, 2, 3, 5])
    with torch.no_grad():
        x[:, KEPT[[1, 4]]] = 0
        for parameter in dense.parameters():
            parameter[KEPT[[1, 4]]] = 0
        for attribute, parameter in list(once.named_parameters()):
            setattr(once, attribute, nn.Parameter(parameter[then].clone()))
    kind = norm_kind(once)
    assert kind is not None
    twice = with_zeros(once, kind, then, len(KEPT))
    left = KEPT[then]
    torch.testing.assert_close(twice(x[:, left]), dense(x)[:, left], rtol=1e-12, atol=1e-12)


def test_only_what_is_known_has_a_kind() -> None:
    class Own(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    class Renamed(nn.GroupNorm):
        pass

    assert norm_kind(Renamed(2, 4)) == norm_kind(nn.GroupNorm(2, 4))
    for norm in (
        Own(4),
        nn.LayerNorm([4, 2]),
        nn.LayerNorm(4, elementwise_affine=False),
        nn.GroupNorm(2, 4, affine=False),
        nn.RMSNorm(4),  # its eps depends on the type
        nn.BatchNorm2d(4),
        nn.Linear(4, 4),
    ):
        assert norm_kind(norm) is None
