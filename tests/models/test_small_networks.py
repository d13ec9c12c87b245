"""The small networks have the sizes of the papers."""

import pytest
import torch
from torch import nn

from fxprune.graph.costs import layer_costs
from fxprune.graph.tracing import trace
from fxprune.models import cifar
from fxprune.models.digits import DigitsResNet


@pytest.mark.parametrize("depth", [20, 32, 56, 110])
def test_cifar_networks_have_the_published_sizes(depth: int) -> None:
    millions = {20: 0.27, 32: 0.46, 56: 0.85, 110: 1.73}  # He et al. 2016, table 6
    model = cifar.CifarResNet(depth)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions[depth]
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name,millions,macs", [("cifar_vgg16", 14.72, 313), ("cifar_resnet18", 11.17, 555)])
def test_wide_cifar_networks_have_the_usual_sizes(name: str, millions: float, macs: int) -> None:
    # Li et al. 2017, table 1: 1.5e7 parameters and 3.13e8 MACs; ResNet-18: 11.17 million, 0.56e9 MACs
    model = cifar.CIFAR_MODELS[name]().eval()
    x = torch.randn(2, 3, 32, 32)
    traced = trace(model, x)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    assert round(sum(cost or 0 for _, cost in layer_costs(traced.module, traced.values).values()) / 1e6) == macs
    assert model(x).shape == (2, 10)


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_cifar_depths_that_do_not_exist(depth: int) -> None:
    with pytest.raises(ValueError, match="6n \\+ 2"):
        cifar.CifarResNet(depth)


@pytest.mark.parametrize("zeros,filled", [("around", slice(8, 24)), ("after", slice(0, 16))])
def test_where_the_shortcut_puts_its_zeros(zeros: cifar.Zeros, filled: slice) -> None:
    block = cifar.CifarBlock(16, 32, 2, zeros).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 16, 4, 4) + 1
    out = block(x)
    assert torch.equal(out[:, filled], x[:, :, ::2, ::2])
    assert int(out.ne(0).any(dim=(0, 2, 3)).sum()) == 16


def test_the_digits_network_has_the_size_it_names() -> None:
    assert f"{sum(p.numel() for p in DigitsResNet().parameters()):,} parameters" in (DigitsResNet.__doc__ or "")
