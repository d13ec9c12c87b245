"""Networks of other libraries, unmodified, compiled into their own class: the same function as the masked model in
evaluation and with batch statistics, on other inputs too; their outputs as they were, and the user's model untouched.

`make test-wild` installs the libraries and runs these tests.
"""

import copy
import warnings

import pytest
import torch
from networks import NETWORKS, Wild, run
from torch import fx, nn
from untouched_harness import equal, snapshot
from wild_harness import (
    assert_same,
    compiled,
    compiled_network,
    conv_macs,
    differs,
    in_float64,
    sensitivity,
    structure,
)

import fxprune

pytestmark = [
    pytest.mark.wild,
    pytest.mark.usefixtures("strangers"),
    pytest.mark.filterwarnings("ignore"),  # what the libraries warn of is not ours
    pytest.mark.filterwarnings("error::fxprune.NothingRewrittenWarning"),
]

each_network = pytest.mark.parametrize("network", NETWORKS, ids=str)
each_granularity = pytest.mark.parametrize("granularity", ["kernel", "filter"])


@each_network
def test_it_runs_and_is_the_same_each_time(network: Wild) -> None:
    model, again = network.build(), network.build()
    for batch, size in (network.first, network.other):
        x = network.inputs(batch, size)
        assert_same(in_float64(again, x), in_float64(model, x))
        in_float64(model, x, batch_statistics=True)
    assert sensitivity(model, network.inputs(*network.first)) > 1e-3, "it gives the same whatever it is given"


@each_granularity
@each_network
def test_same_function_in_its_own_class(network: Wild, granularity: str) -> None:
    model, x = network.build(), network.inputs(*network.first)
    given = copy.deepcopy(model)
    before = snapshot(model)
    allowed = network.kernels_left if granularity == "kernel" else network.filters_left
    with warnings.catch_warnings():
        if allowed == 1:
            warnings.simplefilter("ignore", fxprune.NothingRewrittenWarning)
        result = compiled(model, x, granularity)  # type: ignore[arg-type]
    assert equal(snapshot(model), before), "the user's model was touched"
    masked, pruned = result.masked, result.pruned

    if isinstance(model, fx.GraphModule):  # each has a class of its own
        assert isinstance(pruned, fx.GraphModule)
        assert pruned.code == model.code
    else:
        assert type(pruned) is type(model)
        assert pruned.forward.__func__ is model.forward.__func__  # type: ignore[attr-defined]  # both are methods
    names = set(pruned.state_dict())
    assert names >= set(given.state_dict())
    tables = ("_index", ".group")  # of gathers, and of norms that count channels which are gone
    assert all(name.endswith(tables) for name in names - set(given.state_dict()))
    assert set(dict(pruned.named_modules())) >= set(dict(given.named_modules()))
    assert set(vars(pruned)) >= set(vars(given))
    with torch.no_grad():
        assert structure(run(pruned, x)) == structure(run(given, x))

    fxprune.verify(pruned, masked, x)
    for example in (x, network.inputs(*network.other)):
        for batch_statistics in (False, True):
            expected = in_float64(masked, example, batch_statistics)
            assert_same(in_float64(pruned, example, batch_statistics), expected)

    left = conv_macs(pruned, x) / conv_macs(masked, x)
    assert left <= allowed, f"{left:.3f} of the MACs are left"
    if left == 1:
        return

    # Controls: the comparison sees a swap of two channels in one smaller layer, and the plan changes the function.
    swap_channels(pruned, given)
    expected = in_float64(masked, x)
    assert differs(in_float64(pruned, x), expected)
    assert differs(in_float64(given, x), expected)


def swap_channels(pruned: nn.Module, dense: nn.Module) -> None:
    """Swap the first two filters of the first convolution whose weight is smaller than it was."""
    sizes = {name: tensor.numel() for name, tensor in dense.named_parameters()}
    for name, tensor in pruned.named_parameters():
        if tensor.dim() > 2 and tensor.numel() < sizes[name] and len(tensor) > 1:
            order = [1, 0, *range(2, len(tensor))]
            tensor.data.copy_(tensor.data[order])
            return
    raise AssertionError("no convolution is smaller than it was")


def test_the_networks_are_many_and_explained() -> None:
    assert len({network.name for network in NETWORKS}) == len(NETWORKS) >= 35
    unexplained = [n.name for n in NETWORKS if max(n.kernels_left, n.filters_left) > 0.6 and not n.note]
    assert not unexplained


def test_control_a_touched_buffer_is_seen() -> None:
    network = next(n for n in NETWORKS if n.name == "lightning")
    model = network.build()
    before = snapshot(model)
    assert equal(snapshot(model), before)
    with torch.no_grad():
        model.get_buffer("backbone.bn1.running_mean")[0] += 1e-6
    assert not equal(snapshot(model), before)


def test_control_another_container_is_seen() -> None:
    network = next(n for n in NETWORKS if n.name == "hf-resnet")
    output = in_float64(network.build(), network.inputs(*network.first))
    assert not differs(output, output)
    assert differs(dict(output), output)


def test_a_lightning_module_trains_on() -> None:
    """Its own training step, optimizer and hyperparameters; the trainer is not needed for that."""
    network = next(n for n in NETWORKS if n.name == "lightning")
    pruned = compiled_network(network, "kernel").pruned
    assert pruned.hparams == network.build().hparams
    (x, y), before = (network.inputs(4, 64), torch.arange(4)), copy.deepcopy(pruned.state_dict())
    optimizer = pruned.configure_optimizers()  # type: ignore[operator]  # its own method
    pruned.train()
    loss = pruned.training_step((x, y), 0)  # type: ignore[operator]  # its own method
    loss.backward()
    assert all(p.grad is not None for p in pruned.parameters())
    optimizer.step()
    changed = {name for name, value in pruned.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name, _ in pruned.named_parameters()} <= changed
