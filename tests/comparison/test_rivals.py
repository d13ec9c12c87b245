"""Torch-Pruning as an opponent: as many MACs as asked for, and the scores that its documentation names."""

# mypy: disable-error-code="no-untyped-call"

import itertools
from typing import get_args

import pytest
import torch
from equality import randomize
from torch import Tensor, nn

import fxprune
from fxprune.comparison import rivals, torch_pruning
from fxprune.comparison.layer_calls import count_macs, last_layer
from fxprune.comparison.torch_pruning import Importance, prune_channels
from fxprune.errors import FxpruneError
from fxprune.models import load_model
from fxprune.models.cifar import CifarResNet

IMPORTANCES: tuple[Importance, ...] = get_args(Importance)


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size)


def labelled(count: int = 6, channels: int = 3, size: int = 32) -> tuple[Tensor, Tensor]:
    return torch.rand(count, channels, size, size), torch.arange(count) % 2


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_equal_macs(importance: Importance) -> None:
    """ResNet-20, a narrow network, comes within 1 %, and can be trained."""
    model, inputs = load_model("resnet20").eval(), images()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    target = round(0.5 * count_macs(model, inputs))
    batches, state = [labelled()], torch.get_rng_state()
    pruned = prune_channels(model, inputs, target, importance, batches).network
    assert torch.equal(state, torch.get_rng_state())
    assert abs(count_macs(pruned, inputs) / target - 1) <= 0.01
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for network in (model, pruned) for parameter in network.parameters())
    pruned.train()(inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())


def test_a_layer_that_leaps_too_far_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of ResNet-8 leaps together with another; those after it come within 1 %."""
    model, inputs = CifarResNet(8).eval(), images()
    target = round(0.5 * count_macs(model, inputs))
    layers = torch_pruning._layers
    near = prune_channels(model, inputs, target).network
    monkeypatch.setattr(torch_pruning, "_layers", lambda model: itertools.islice(layers(model), 1))
    far = prune_channels(model, inputs, target).network
    assert abs(count_macs(near, inputs) / target - 1) <= 0.01 < abs(count_macs(far, inputs) / target - 1)


def test_the_search_comes_near_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channel by channel on a wide network, 1 % is within reach; a search of one step is not enough."""
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 128, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 5)
    ).eval()
    inputs = images()
    target = round(0.3 * count_macs(model, inputs))
    near = count_macs(prune_channels(model, inputs, target).network, inputs)
    monkeypatch.setattr(torch_pruning, "MACS_STEPS", 1)
    monkeypatch.setattr(torch_pruning, "_layers", lambda model: iter(()))
    far = count_macs(prune_channels(model, inputs, target).network, inputs)
    assert abs(near / target - 1) < 0.02 < abs(far / target - 1)


def test_a_leap_is_taken_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six layers of 64 channels all go from 48 to 40 at one ratio; some of them may be left at 48."""
    widths = [3, *[64] * 6]
    convs = [nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5)).eval()
    inputs = images()
    target = round(0.48 * count_macs(model, inputs))  # between (48 / 64) ** 2 and (40 / 64) ** 2
    near = count_macs(prune_channels(model, inputs, target, round_to=8).network, inputs)
    monkeypatch.setattr(torch_pruning, "_layers", lambda model: iter(()))
    far = count_macs(prune_channels(model, inputs, target, round_to=8).network, inputs)
    assert abs(near / target - 1) < 0.06 < abs(far / target - 1)


def test_the_last_layer_keeps_its_classes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert last_layer(model, images()) is model[2]
    assert prune_channels(model, images(), count_macs(model, images()) // 2).network(images()).shape == (2, 8)


def four_filters() -> nn.Sequential:
    """Filters (3, 0), (-3, 0), (0, 3) and (0.5, 0.5) on one pixel; the outputs do not depend on the first."""
    model = nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.Flatten(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        filters = torch.tensor([[3, 0], [-3, 0], [0, 3], [0.5, 0.5]])
        model.get_parameter("0.weight").copy_(filters.reshape(4, 2, 1, 1))
        model.get_parameter("2.weight").copy_(torch.tensor([[0.0, 1, 1, 1], [0, -1, -1, -1]]))
    return model


@pytest.mark.parametrize(
    "importance,removed",
    [
        ("magnitude", 3),
        ("fpgm", 1),  # between the filters of the paper, not their squares, the last is nearest to all others
        ("taylor", 0),
    ],
)
def test_which_filter_goes(importance: Importance, removed: int) -> None:
    model, (inputs, labels) = four_filters(), labelled(4, 2, 1)
    found = prune_channels(model, inputs, 12, importance, [(inputs, labels)])
    pruned = found.network
    assert found.removed == {"0": (removed,)}
    kept = [number for number in range(4) if number != removed]
    assert torch.equal(pruned.get_parameter("0.weight"), model.get_parameter("0.weight")[kept])
    assert torch.equal(pruned.get_parameter("2.weight"), model.get_parameter("2.weight")[:, kept])


def test_gradients_are_those_of_all_images_together() -> None:
    model, (inputs, labels) = four_filters(), labelled(7, 2, 1)
    together = torch_pruning._gradients(model, [(inputs, labels)])
    apart = torch_pruning._gradients(model, [(inputs[:2], labels[:2]), (inputs[2:], labels[2:])])
    torch.nn.functional.cross_entropy(model(inputs), labels).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.any()
        torch.testing.assert_close(together[name], parameter.grad)
        torch.testing.assert_close(apart[name], parameter.grad)


def test_parameters_that_the_loss_does_not_depend_on_have_no_gradient() -> None:
    model = four_filters()
    model.register_parameter("idle", nn.Parameter(torch.ones(3)))
    assert torch_pruning._gradients(model, [labelled(4, 2, 1)])["idle"].tolist() == [0, 0, 0]


def test_taylor_needs_images() -> None:
    with pytest.raises(fxprune.PlanError, match="taylor: has no labelled images"):
        prune_channels(four_filters(), torch.rand(1, 2, 1, 1), 12, "taylor")


def test_an_importance_that_does_not_exist() -> None:
    with pytest.raises(fxprune.PlanError, match="'l1': must be one of magnitude, fpgm, taylor"):
        prune_channels(four_filters(), torch.rand(1, 2, 1, 1), 12, "l1")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["resnet20_zeros_after", "mobilenet_v2"])
def test_its_channels_are_a_plan_of_the_same_network(name: str) -> None:
    model, inputs = randomize(load_model(name)).eval(), images()
    found = prune_channels(model, inputs, round(0.5 * count_macs(model, inputs)))
    plan = torch_pruning.as_plan(model, found.removed, inputs)
    same = fxprune.rewrite(fxprune.mask(model, plan), plan, inputs).eval()
    assert count_macs(same, inputs) == count_macs(found.network, inputs)
    torch.testing.assert_close(same(inputs), found.network.eval()(inputs), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(same(inputs), model(inputs), rtol=1e-3, atol=1e-4), "control"


def test_other_channels_than_go_together_are_no_plan() -> None:
    """Where zeros are padded before the channels, too, Torch-Pruning removes the wrong ones behind them."""
    model, inputs = load_model("resnet20").eval(), images()
    found = prune_channels(model, inputs, round(0.5 * count_macs(model, inputs)))
    with pytest.raises(FxpruneError, match="Torch-Pruning ties its filters to others than fxprune does"):
        torch_pruning.as_plan(model, found.removed, inputs)


def test_an_opponent_in_the_race() -> None:
    network = rivals.torch_pruning_network(
        four_filters(), torch.rand(2, 2, 1, 1), 0.5, 12, False, "taylor", [labelled(4, 2, 1)], 1
    )
    assert (network.name, network.macs, network.error) == ("torch-pruning", 12, "")
    failed = rivals.torch_pruning_network(four_filters(), torch.rand(2, 2, 1, 1), 0.5, 12, False, "taylor")
    assert failed.error.startswith("PlanError: taylor")
