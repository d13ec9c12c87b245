"""RemoveChannels: what it does to each kind of module, and when it refuses."""
# mypy: disable-error-code="no-any-return, no-untyped-call"

import copy

import pytest
import torch
from removal_harness import Subject, check_removal, drawn, image, prepared, subject, without, zeroed
from torch import Tensor, fx, nn

from fxprune.errors import PassError
from fxprune.graph.tracing import trace
from fxprune.graph.values import CarriedValues
from fxprune.passes import RemoveChannels
from fxprune.plans import PrunePlan, RemovedChannels


class Block(nn.Module):
    """Convolution, BatchNorm, depthwise, transposed, linear: each kind of module that can lose channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.prelu = nn.PReLU(12)
        self.up = nn.ConvTranspose2d(12, 5, 2, 2)
        self.scale = nn.Parameter(torch.ones(12, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.prelu(self.depthwise(self.norm(self.conv(x)).relu())) * self.scale)


def of(plan: dict[str, RemovedChannels]) -> PrunePlan:
    return PrunePlan({}, removed=plan)


GOES = {
    "conv": RemovedChannels(outputs=(1, 4)),
    "norm": RemovedChannels(outputs=(1, 4)),
    "depthwise": RemovedChannels(outputs=(2, 3, 8, 9)),
    "prelu": RemovedChannels(outputs=(2, 3, 8, 9)),
    "up": RemovedChannels(inputs=(2, 3, 8, 9)),
    "scale": RemovedChannels(outputs=(2, 3, 8, 9)),
}


def test_each_kind_of_module_loses_what_it_must() -> None:
    found = subject(prepared(Block()), image())
    goes = found.units.layers["conv"].writes[[1, 4]]
    chosen = (torch.arange(found.units.count)[:, None] == torch.from_numpy(goes)).any(1).numpy()
    assert found.plan(chosen).removed == GOES
    gm = check_removal(found, chosen)
    stays, wide = [0, 2, 3, 5], [0, 1, 4, 5, 6, 7, 10, 11]
    dense = zeroed(found.net, of(GOES)).state_dict()
    for name, tensor in gm.state_dict().items():
        if name.startswith("up."):
            expected = dense[name][wide] if name == "up.weight" else dense[name]
        else:
            expected = (
                dense[name][stays if name.startswith(("conv", "norm")) else wide] if dense[name].dim() else dense[name]
            )
        assert torch.equal(tensor, expected), name
    sizes = {name: module.extra_repr().split(", kernel")[0] for name, module in gm.named_children()}
    assert (sizes["conv"], sizes["up"]) == ("3, 4", "8, 5")
    assert sizes["norm"].startswith("4, ")
    assert sizes["depthwise"] == "4, 8"
    assert sizes["prelu"] == "num_parameters=8"
    assert gm.get_submodule("depthwise").groups == 4


def test_nothing_planned_is_nothing_done() -> None:
    gm = trace(prepared(Block()), (image(),)).module
    assert not RemoveChannels(of({}), CarriedValues(()))(gm).rewritten


def test_weights_that_read_removed_channels_do_not_matter() -> None:
    found = subject(prepared(Block()), image())
    with torch.no_grad():
        found.net.get_parameter("up.weight")[[2, 3, 8, 9]] = 1e6
    plan = of(GOES)
    expected = zeroed(found.net, plan)(image())
    assert torch.allclose(without(found, plan).eval()(image()), expected, rtol=1e-10, atol=0)


def zeroed_graph(found: Subject) -> fx.GraphModule:
    gm = zeroed(found.traced.module, of(GOES))
    assert isinstance(gm, fx.GraphModule)
    return gm


@pytest.mark.parametrize("name", ["conv.weight", "conv.bias", "norm.weight", "norm.bias", "depthwise.bias", "scale"])
def test_what_is_not_zero_is_refused(name: str) -> None:
    found = subject(prepared(Block()), image())
    gm = zeroed_graph(found)
    holder, _, attribute = name.rpartition(".")
    tensor = getattr(gm.get_submodule(holder), attribute)
    with torch.no_grad():
        tensor[GOES[holder or name].outputs[0]] = 1e-30
    with pytest.raises(PassError, match=rf"^{name}: .* not zero; rewrite the model that fxprune.mask returns"):
        RemoveChannels(of(GOES), CarriedValues(found.traced.inputs))(gm)


@pytest.mark.parametrize("name", GOES)
def test_a_part_of_what_goes_together_is_refused(name: str) -> None:
    found = subject(prepared(Block()), image())
    kind = "inputs" if name == "up" else "outputs"
    less = RemovedChannels(**{kind: getattr(GOES[name], kind)[:-1]})
    for plan in (of(GOES | {name: less}), of({n: goes for n, goes in GOES.items() if n != name})):
        with pytest.raises(PassError, match="goes together with others, and the plan removes some of them only"):
            RemoveChannels(plan, CarriedValues(found.traced.inputs))(zeroed_graph(found))


def test_channels_that_stay_are_refused_with_the_reason() -> None:
    gm = trace(prepared(Block()), (image(),)).module
    plan = of({"up": RemovedChannels(outputs=(0,))})
    gm.load_state_dict(zeroed(gm, plan).state_dict())
    with pytest.raises(PassError, match="cannot go: model output; make the plan anew"):
        RemoveChannels(plan, CarriedValues((image().to("meta"),)))(gm)


class Tied(nn.Module):
    """Two convolutions read one value with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1)
        self.left = nn.Conv2d(6, 4, 1)
        self.right = nn.Conv2d(6, 4, 1, stride=2)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x).relu()
        return self.left(y), self.right(y)


class Alias(nn.Module):
    """One convolution under two names, called by both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1)
        self.left = nn.Conv2d(6, 6, 1)
        self.right = self.left
        self.last = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.right(self.left(self.conv(x).relu()).relu()))


class OneNorm(nn.Module):
    """Two BatchNorms share their parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)
        self.norm, self.other = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.other.weight, self.other.bias = self.norm.weight, self.norm.bias
        self.last = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.left(x)).relu() - self.other(self.right(x)))


class Own(nn.Module):
    """The model reads the weight of a layer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(x)) * self.conv.weight.sum()


@pytest.mark.parametrize("kind", [Tied, Alias, OneNorm, Own])
def test_what_is_shared_is_shortened_once_or_stays(kind: type[nn.Module]) -> None:
    found = subject(prepared(kind()), image())
    assert found.units.count == (0 if kind is Own else 6)
    for seed in range(2) if found.units.count else ():
        gm = check_removal(found, drawn(found.units, seed))
        assert len(list(gm.parameters())) == len(list(copy.deepcopy(found.net).parameters()))
