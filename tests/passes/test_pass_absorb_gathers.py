"""AbsorbGathers: permutations move into the weights of the layers at their ends."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from passes_harness import SHUFFLE, SWAP, check_pass, gather, image, prepared, reasons, show
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from fxprune.graph.editing import Tensors
from fxprune.graph.layers import ChannelGather
from fxprune.graph.tracing import trace
from fxprune.passes import AbsorbGathers, absorb_gathers

Layer = nn.modules.conv._ConvNd | nn.Linear

LAYERS: dict[str, Callable[[], Layer]] = {
    "conv": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "conv without bias": lambda: nn.Conv2d(4, 4, 1, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 2, stride=2),
}
GROUPED: dict[str, Callable[[], Layer]] = {
    "grouped": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2),
    "grouped wide": lambda: nn.Conv2d(4, 4, 1, groups=2),
    "grouped transposed": lambda: nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2),
}


class Net(nn.Module):
    """Layers `c` and `d`, gathers `g` and `h`; `body` says how they are connected."""

    def __init__(
        self,
        body: Callable[["Net", Tensor], Tensor],
        c: nn.Module | None = None,
        d: nn.Module | None = None,
        g: ChannelGather | None = None,
        h: ChannelGather | None = None,
    ) -> None:
        super().__init__()
        self.c, self.d = c or nn.Conv2d(4, 4, 1), d or nn.Conv2d(4, 4, 1)
        self.g, self.h = g or gather(SHUFFLE), h or gather(SHUFFLE)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def net(body: Callable[[Net, Tensor], Tensor], **modules: nn.Module) -> nn.Module:
    return prepared(Net(body, **modules))  # type: ignore[arg-type]  # gathers go to g and h, layers to c and d


def permuted(image: Tensor) -> Tensor:
    """A batch of pixels (2, 3, 4) from (2, 4, h, w): linear layers read the last dimension."""
    return image.flatten(2)[:, :, :3].transpose(1, 2)


# --- 1. inputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_case_1_inputs(layer: Callable[[], Layer]) -> None:
    gm, outcome = check_pass(
        AbsorbGathers(),
        net(lambda n, x: n.c(n.g(x)), c=layer()),
        image(),
        before="x -> g -> c -> output",
        after="x -> c -> output",
    )
    assert outcome.rewritten == ("c",)
    assert not hasattr(gm, "g")


@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 4), (2, 4, 4)])
def test_case_1_inputs_of_a_linear_layer(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    model = net(lambda n, x: n.c(n.g(x)), c=nn.Linear(4, 5), g=gather(dim=-1))
    check_pass(AbsorbGathers(), model, x, after="x -> c -> output")


def test_case_1_shared_layer_whose_sites_agree() -> None:
    _, outcome = check_pass(
        AbsorbGathers(),
        net(lambda n, x: n.c(n.g(x)) + n.c(n.h(x.exp()))),
        image(),
        after="""x -> c
                 x -> exp -> c_1
                 c, c_1 -> add -> output""",
    )
    assert outcome.rewritten == ("c", "c_1")


def test_case_1_two_sites_that_read_one_gather() -> None:
    check_pass(
        AbsorbGathers(),
        net(lambda n, x: n.c(y := n.g(x)) * n.c(y)),
        image(),
        after="""x -> c
                 x -> c_1
                 c, c_1 -> mul -> output""",
    )


def tied(**modules: nn.Module) -> Callable[[Callable[[Net, Tensor], Tensor]], nn.Module]:
    def build(body: Callable[[Net, Tensor], Tensor]) -> nn.Module:
        model = Net(body, **modules)  # type: ignore[arg-type]  # as in `net`
        model.d.weight = model.c.weight
        return prepared(model)

    return build


def test_case_1_tied_weights_change_together() -> None:
    gm, _ = check_pass(
        AbsorbGathers(),
        tied()(lambda n, x: n.c(n.g(x)) + n.d(n.h(x.exp()))),
        image(),
        after="""x -> c
                 x -> exp -> d
                 c, d -> add -> output""",
    )
    assert gm.get_parameter("c.weight") is gm.get_parameter("d.weight")


# --- 2. outputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_case_2_outputs(layer: Callable[[], Layer]) -> None:
    model = net(lambda n, x: n.g(n.c(x)), c=layer())
    gm, outcome = check_pass(AbsorbGathers(), model, image(), before="x -> c -> g -> output", after="x -> c -> output")
    assert outcome.rewritten == ("c",)
    if model.get_submodule("c").bias is not None:
        assert torch.equal(gm.get_parameter("c.bias"), model.get_parameter("c.bias")[list(SHUFFLE)])


def test_case_2_outputs_of_a_linear_layer() -> None:
    x = permuted(image())
    model = net(lambda n, x: n.g(n.c(x)), c=nn.Linear(4, 4), g=gather(dim=-1))
    check_pass(AbsorbGathers(), model, x, after="x -> c -> output")


def test_case_2_tied_weights_with_a_bias_of_their_own() -> None:
    gm, _ = check_pass(
        AbsorbGathers(),
        tied()(lambda n, x: n.g(n.c(x)) + n.h(n.d(x.exp()))),
        image(),
        after="""x -> c
                 x -> exp -> d
                 c, d -> add -> output""",
    )
    assert gm.get_parameter("c.weight") is gm.get_parameter("d.weight")
    assert not torch.equal(gm.get_parameter("c.bias"), gm.get_parameter("d.bias"))


def test_case_2_the_gain_of_a_standardized_convolution_moves_too() -> None:
    class Gained(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(4, 4, 1)
            self.gain = nn.Parameter(torch.ones(4, 1, 1, 1))

        def forward(self, input: Tensor) -> Tensor:
            return F.conv2d(input, self.weight * self.gain, self.bias)

    check_pass(AbsorbGathers(), net(lambda n, x: n.g(n.c(x)), c=Gained()), image(), after="x -> c -> output")


def test_both_sides_of_one_layer() -> None:
    check_pass(AbsorbGathers(), net(lambda n, x: n.h(n.c(n.g(x)))), image(), after="x -> c -> output")


def test_a_shared_layer_in_a_row_absorbs_on_one_side_only() -> None:
    """Each gather can move one way: the one in the middle is gone when the outputs are looked at."""
    model = net(lambda n, x: n.g(n.c(n.h(n.c(n.g(x))))))
    _, outcome = check_pass(AbsorbGathers(), model, image(), after="x -> c -> c_1 -> g_1 -> output")
    assert "different orders" in reasons(outcome)["g_1"]


# --- 3. groups ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("layer", GROUPED.values(), ids=GROUPED.keys())
def test_case_3_a_permutation_inside_the_groups(layer: Callable[[], Layer], side: str) -> None:
    body = (lambda n, x: n.c(n.g(x))) if side == "inputs" else (lambda n, x: n.g(n.c(x)))
    check_pass(AbsorbGathers(), net(body, c=layer(), g=gather(SWAP)), image(), after="x -> c -> output")


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_case_3_three_channels_a_group(side: str) -> None:
    """With three channels a permutation inside a group need not be its own inverse."""
    cycle = gather((1, 2, 0, 5, 3, 4), 6)
    body = (lambda n, x: n.c(n.g(x))) if side == "inputs" else (lambda n, x: n.g(n.c(x)))
    for layer in (nn.Conv2d(6, 6, 1, groups=2), nn.ConvTranspose2d(6, 6, 1, groups=2)):
        check_pass(AbsorbGathers(), net(body, c=layer, g=cycle), image(6), after="x -> c -> output")


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("layer", GROUPED.values(), ids=GROUPED.keys())
def test_left_alone_across_groups(layer: Callable[[], Layer], side: str) -> None:
    body = (lambda n, x: n.c(n.g(x))) if side == "inputs" else (lambda n, x: n.g(n.c(x)))
    after = "x -> g -> c -> output" if side == "inputs" else "x -> c -> g -> output"
    _, outcome = check_pass(AbsorbGathers(), net(body, c=layer()), image(), after=after)
    assert reasons(outcome) == {"g": "it moves channels between the groups of the layer"}


# --- left alone -----------------------------------------------------------------------------------------------------


def test_left_alone_a_gather_that_others_read() -> None:
    _, outcome = check_pass(
        AbsorbGathers(),
        net(lambda n, x: n.c(y := n.g(x)) + y),
        image(),
        after="""x -> g -> c
                 c, g -> add -> output""",
    )
    assert outcome.rewritten == ()


def test_left_alone_a_layer_that_others_read() -> None:
    check_pass(
        AbsorbGathers(),
        net(lambda n, x: n.g(y := n.c(x)) + y),
        image(),
        after="""x -> c -> g
                 g, c -> add -> output""",
    )


@pytest.mark.parametrize(
    "index, channels", [((0, 0, 2, 3), 4), ((5, 0, 2, 3), 6)], ids=["repeats a channel", "drops channels"]
)
def test_left_alone_what_is_no_permutation(index: tuple[int, ...], channels: int) -> None:
    model = net(lambda n, x: n.c(n.g(x)), g=gather(index, channels))
    _, outcome = check_pass(AbsorbGathers(), model, image(channels), after="x -> g -> c -> output")
    assert reasons(outcome) == {"g": "it reads channels twice or not at all"}


@pytest.mark.parametrize("second", ["another order", "no gather"])
def test_left_alone_sites_that_disagree(second: str) -> None:
    disagree = gather((1, 3, 2, 0))
    model = net((lambda n, x: n.c(n.g(x)) + n.c(n.h(x))) if second == "another order" else
                (lambda n, x: n.c(n.g(x)) + n.c(x)), h=disagree)  # fmt: skip
    gm = trace(model, image()).module
    before = show(gm)
    outcome = AbsorbGathers()(gm)
    assert show(gm) == before
    assert set(reasons(outcome).values()) == {"the call sites of the layer read different orders"}


def test_left_alone_tied_weights_that_disagree() -> None:
    _, outcome = check_pass(
        AbsorbGathers(),
        tied()(lambda n, x: n.c(n.g(x)) + n.d(x)),
        image(),
        after="""x -> g -> c
                 x -> d
                 c, d -> add -> output""",
    )
    assert "different orders" in reasons(outcome)["g"]


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_left_alone_another_dimension_than_the_channels(side: str) -> None:
    """A linear layer mixes the last dimension; the gather reorders the first after the batch. Both have 4 entries."""
    x = torch.randn(2, 4, 4, dtype=torch.float64)
    body = (lambda n, x: n.c(n.g(x))) if side == "inputs" else (lambda n, x: n.g(n.c(x)))
    after = "x -> g -> c -> output" if side == "inputs" else "x -> c -> g -> output"
    check_pass(AbsorbGathers(), net(body, c=nn.Linear(4, 4), g=gather(dim=-2)), x, after=after)


def test_left_alone_the_rows_of_an_image_before_a_convolution() -> None:
    x = image(size=4)
    check_pass(AbsorbGathers(), net(lambda n, x: n.c(n.g(x)), g=gather(dim=-2)), x, after="x -> g -> c -> output")


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_left_alone_a_computed_weight(side: str) -> None:
    body = (lambda n, x: n.c(n.g(x))) if side == "inputs" else (lambda n, x: n.g(n.c(x)))
    after = "x -> g -> c -> output" if side == "inputs" else "x -> c -> g -> output"
    model = net(body, c=weight_norm(nn.Conv2d(4, 4, 1)))
    _, outcome = check_pass(AbsorbGathers(), model, image(), after=after)
    assert reasons(outcome) == {"g": "the layer has hooks or a computed weight"}


def test_left_alone_a_layer_with_a_hook() -> None:
    model = net(lambda n, x: n.c(n.g(x)))
    model.get_submodule("c").register_forward_pre_hook(lambda layer, args: (args[0].cumsum(1),))
    _, outcome = check_pass(AbsorbGathers(), model, image(), after="x -> g -> c -> output")
    assert reasons(outcome) == {"g": "the layer has hooks or a computed weight"}


def test_left_alone_a_weight_that_the_graph_reads_by_name() -> None:
    class ReadByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.g = nn.Conv2d(4, 4, 1), gather()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.c(self.g(x))
            return y + F.conv2d(x, self.c.weight)

    _, outcome = check_pass(
        AbsorbGathers(),
        prepared(ReadByName()),
        image(),
        after="""x -> g -> c
                 -> c_weight
                 x, c_weight -> conv2d
                 c, conv2d -> add -> output""",
    )
    assert reasons(outcome) == {"g": "c_weight reads a parameter of the layer"}


def test_left_alone_an_input_that_changes_before_the_layer_reads_it() -> None:
    def body(n: Net, x: Tensor) -> Tensor:
        x = x + 1
        y = n.g(x)
        x.relu_()
        z: Tensor = n.c(y)
        return z + x

    _, outcome = check_pass(
        AbsorbGathers(),
        net(body),
        image(),
        after="""x -> add -> g
                 add -> relu_
                 g -> c
                 c, add -> add_1 -> output""",
    )
    assert "in-place operator" in reasons(outcome)["g"]


# --- controls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("layer", [*LAYERS.values(), GROUPED["grouped"]], ids=[*LAYERS, "grouped"])
def test_control_the_inverse_instead_is_seen(
    monkeypatch: pytest.MonkeyPatch, layer: Callable[[], Layer], side: str
) -> None:
    right = getattr(absorb_gathers, f"_absorb_{side}")
    monkeypatch.setattr(
        absorb_gathers, f"_absorb_{side}", lambda tensors, layers, index: right(tensors, layers, index.argsort())
    )
    monkeypatch.setattr(absorb_gathers, "_stays_in_groups", lambda *_: True)
    body = (lambda n, x: n.c(n.g(x))) if side == "inputs" else (lambda n, x: n.g(n.c(x)))
    with pytest.raises(AssertionError, match=r"max .difference"):
        check_pass(AbsorbGathers(), net(body, c=layer()), image(), after="x -> c -> output")


def test_control_a_bias_that_stays_behind_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Tensors.replace
    monkeypatch.setattr(Tensors, "replace", lambda self, old, new: right(self, old, new) if old.dim() > 1 else old)
    with pytest.raises(AssertionError, match=r"max .difference"):
        check_pass(AbsorbGathers(), net(lambda n, x: n.g(n.c(x))), image(), after="x -> c -> output")
