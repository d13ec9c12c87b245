"""Ways to call a model, and to use its layers, that a rewrite can get wrong without a word."""

import pytest
import torch
import torch.nn.functional as F
from equality import assert_same_function, masked_by_hand, randomize
from torch import Tensor, nn

import fxprune
from fxprune.vocabulary import FormChoice

X = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).relu())
        return y


def dense(net: nn.Module) -> nn.Module:
    return randomize(net.double()).eval()


@pytest.mark.parametrize("form", ["partition", "overlap"])
@pytest.mark.parametrize("example", [None, X, X[0]], ids=["no example", "batch", "one image without a batch"])
def test_an_image_without_a_batch(example: Tensor | None, form: FormChoice) -> None:
    """Conv2d takes (C, H, W) too: the channels are then the first dimension, not the second."""
    net = dense(Net())
    pruned = fxprune.compile(net, form=form, example_inputs=example)
    masked = masked_by_hand(net, pruned.meta["fxprune"].plan)
    torch.testing.assert_close(pruned(X), masked(X))
    torch.testing.assert_close(pruned(X[0]), masked(X[0]))


class InputsInAList(Net):
    def forward(self, xs: list[Tensor]) -> Tensor:  # type: ignore[override]  # another signature on purpose
        return super().forward(xs[0]) + xs[1]


@pytest.mark.parametrize("form", ["partition", "overlap"])
def test_inputs_in_a_list(form: FormChoice) -> None:
    net, inputs = dense(InputsInAList()), ([X, X + 1],)
    pruned = fxprune.compile(net, form=form, example_inputs=inputs)
    masked = masked_by_hand(net, pruned.meta["fxprune"].plan)
    torch.testing.assert_close(pruned(*inputs), masked(*inputs))


class WeightUsedTwice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.conv2d(x, self.first.weight, padding=1)


class BiasUsedTwice(Net):
    def forward(self, x: Tensor) -> Tensor:
        assert self.first.bias is not None
        return super().forward(x) + self.first.bias[:, None, None]


@pytest.mark.parametrize("net", [WeightUsedTwice(), BiasUsedTwice()], ids=lambda net: type(net).__name__)
def test_a_parameter_that_the_forward_reads_itself(net: nn.Module) -> None:
    """Such a layer cannot be regrouped: it stays dense, with the reason."""
    pruned = fxprune.compile(dense(net), example_inputs=X)
    first, second = fxprune.report(pruned).layers
    assert (first.form, second.form) == ("dense", "partition")
    assert "read" in first.reason
    masked = masked_by_hand(net, pruned.meta["fxprune"].plan)
    assert_same_function(pruned, masked, (X,))


class LinearOverWidth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.width = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.width(self.conv(x))
        return y


class Twice(nn.Module):
    """A compiled block in a larger model, called twice: its gathers are shared modules."""

    def __init__(self) -> None:
        super().__init__()
        block = fxprune.compile(dense(Net()), form="overlap", example_inputs=X)
        self.block, self.between = block, nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(self.between(self.block(x)))
        return y


class Parametrized(Net):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.utils.parametrizations.weight_norm(self.second)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


@pytest.mark.parametrize("form", ["partition", "overlap"])
@pytest.mark.parametrize("kind", [LinearOverWidth, Twice, Parametrized])
def test_layers_whose_gathers_must_stay(kind: type[nn.Module], form: FormChoice) -> None:
    net = dense(kind())
    pruned = fxprune.compile(net, form=form, example_inputs=X)
    assert fxprune.report(pruned).rewritten == 1
    assert_same_function(pruned, masked_by_hand(net, pruned.meta["fxprune"].plan), (X,))
