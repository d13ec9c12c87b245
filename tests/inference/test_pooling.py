"""The max pooling of the compiled kernel gives what PyTorch's gives, to the bit."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxprune
from fxprune.inference.kernels import native
from fxprune.inference.pooling import NativeMaxPool2d, use_native_pools

pytestmark = pytest.mark.skipif(bool(native.obstacle()), reason=native.obstacle())


@pytest.mark.parametrize("channels", [1, 3, 4, 7, 8, 16, 19, 64])
@pytest.mark.parametrize(
    "kernel, stride, padding, dilation", [(3, 2, 1, 1), (2, 2, 0, 1), (3, 1, 1, 2), ((1, 5), (3, 1), (0, 2), 1)]
)
def test_it_is_torchs(channels: int, kernel: int, stride: int, padding: int, dilation: int) -> None:
    pool = nn.MaxPool2d(kernel, stride, padding, dilation)
    x = torch.randn(2, channels, 9, 12, generator=torch.Generator().manual_seed(channels))
    x[0, 0, 6, 9], x[1, -1, 0, 0], x[0, -1, 2:5, 2:7] = float("nan"), float("inf"), float("-inf")
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        found, expected = NativeMaxPool2d(pool)(given), pool(given)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert expected.isnan().any(), "control: a NaN is within a window"


@pytest.mark.parametrize("size", [(0, 4, 6, 6), (2, 4, 2, 2)])
def test_no_images_and_a_window_larger_than_the_image(size: tuple[int, ...]) -> None:
    pool = nn.MaxPool2d(3, 2, 1)
    assert torch.equal(NativeMaxPool2d(pool)(torch.ones(size)), pool(torch.ones(size)))


def test_what_it_was_not_made_for_goes_to_torch() -> None:
    pool = nn.MaxPool2d(2)
    for x in (torch.randn(3, 6, 6), torch.randn(1, 3, 6, 6, dtype=torch.float64)):
        assert torch.equal(NativeMaxPool2d(pool)(x), pool(x))


class Pools(nn.Module):
    """Poolings of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.ceiling = nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.shared(x))
        x = F.max_pool2d(x, 2, stride=1, padding=1)
        x = torch.max_pool2d(x, [2, 1], [1, 1])
        return self.ceiling(x)


def test_those_of_a_graph_are_replaced_but_for_ceilings() -> None:
    gm = fx.symbolic_trace(Pools())
    x = torch.randn(1, 5, 33, 41)
    expected = gm(x)
    use_native_pools(gm)
    gm.recompile()
    assert sum(isinstance(module, NativeMaxPool2d) for module in gm.modules()) == 4
    assert [type(module) for module in gm.modules() if isinstance(module, nn.MaxPool2d)] == [nn.MaxPool2d]
    assert torch.equal(gm(x), expected)
    assert torch.equal(torch.jit.script(gm)(x), expected)


def test_an_accelerated_network_uses_it_in_channels_last() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(16, 8, 1)).eval()
    x = torch.randn(2, 3, 20, 20)
    fast = fxprune.accelerate(net, x)
    used = any(isinstance(module, NativeMaxPool2d) for module in fast.modules())
    assert used == (fxprune.acceleration_report(fast).memory_format == "channels_last")
    torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-4)
