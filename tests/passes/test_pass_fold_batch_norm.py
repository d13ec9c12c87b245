"""FoldBatchNorm: one convolution in place of two layers, in evaluation mode."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from passes_harness import check_pass, gather, image, prepared, reasons, show
from torch import Tensor, nn

from fxprune.graph.tracing import trace
from fxprune.passes import FoldBatchNorm, fold_batch_norm

EVAL = ("eval",)


class Net(nn.Module):
    """Convolutions `c` and `d`, and a BatchNorm `n`; `body` says how they are connected."""

    def __init__(
        self, body: Callable[["Net", Tensor], Tensor], c: nn.Module | None = None, n: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.c, self.d = c or nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.n = n or nn.BatchNorm2d(4)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def straight(m: Net, x: Tensor) -> Tensor:
    y: Tensor = m.n(m.c(x)).relu()
    return y


def net(
    body: Callable[[Net, Tensor], Tensor] = straight, c: nn.Module | None = None, n: nn.Module | None = None
) -> nn.Module:
    return prepared(Net(body, c, n))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 1, bias=False),
        nn.Conv2d(4, 4, 3, stride=2, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    ],
    ids=str,
)
@pytest.mark.parametrize("affine", [True, False])
def test_case_1_one_convolution(conv: nn.Conv2d, affine: bool) -> None:
    gm, outcome = check_pass(
        FoldBatchNorm(),
        net(c=conv, n=nn.BatchNorm2d(4, eps=0.1, affine=affine)),
        image(),
        before="x -> c -> n -> relu -> output",
        after="x -> c -> relu -> output",
        modes=EVAL,
    )
    assert outcome.rewritten == ("c",)
    assert not hasattr(gm, "n")
    fused = gm.get_submodule("c")
    assert isinstance(fused, nn.Conv2d)
    assert fused.bias is not None
    assert (fused.stride, fused.groups, fused.padding_mode) == (conv.stride, conv.groups, conv.padding_mode)


class Permuted(nn.Module):
    """A gather between the convolution and its BatchNorm; `also` reads the gathered value as well."""

    def __init__(self, between: nn.Module, also: bool = False, norm: int = 4) -> None:
        super().__init__()
        self.c, self.g, self.n, self.also = nn.Conv2d(4, 4, 3, padding=1), between, nn.BatchNorm2d(norm), also

    def forward(self, x: Tensor) -> Tensor:
        y = self.g(self.c(x))
        z: Tensor = self.n(y).relu()
        return z + y if self.also else z


def test_case_2_through_a_permutation() -> None:
    gm, outcome = check_pass(
        FoldBatchNorm(),
        prepared(Permuted(gather())),
        image(),
        before="x -> c -> g -> n -> relu -> output",
        after="x -> c -> g -> relu -> output",
        modes=EVAL,
    )
    assert outcome.rewritten == ("c",)
    assert not hasattr(gm, "n")


@pytest.mark.parametrize(
    "model, reason",
    [
        (Permuted(gather((0, 1, 1, 3))), "not a plain convolution"),
        (Permuted(gather((0, 1, 2), 4), norm=3), "not a plain convolution"),
        (Permuted(gather(dim=-2)), "not a plain convolution"),
        (Permuted(gather(), also=True), "not a plain convolution"),
    ],
    ids=["repeats a channel", "drops a channel", "permutes rows", "has another reader"],
)
def test_left_alone_behind_another_gather(model: Permuted, reason: str) -> None:
    ready = prepared(model)
    inputs = image(size=4)
    _, outcome = check_pass(FoldBatchNorm(), ready, inputs, after=show(trace(ready, inputs).module))
    assert outcome.rewritten == ()
    assert reason in reasons(outcome)["n"]


def test_control_the_order_of_the_gather_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fold_batch_norm.folded
    for wrong in (lambda order: None, lambda order: order.argsort()):
        monkeypatch.setattr(
            fold_batch_norm, "folded", lambda conv, norm, order, wrong=wrong: right(conv, norm, wrong(order))
        )
        with pytest.raises(AssertionError, match=r"max .difference"):
            check_pass(
                FoldBatchNorm(),
                prepared(Permuted(gather())),
                image(),
                after="x -> c -> g -> relu -> output",
                modes=EVAL,
            )


def test_frozen_weights_stay_frozen() -> None:
    gm, _ = check_pass(
        FoldBatchNorm(), net().requires_grad_(False), image(), after="x -> c -> relu -> output", modes=EVAL
    )
    assert not any(parameter.requires_grad for parameter in gm.parameters())


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Halved(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


def reads_the_convolution(m: Net, x: Tensor) -> Tensor:
    y = m.c(x)
    z: Tensor = m.n(y) + y
    return z


def calls_the_convolution_twice(m: Net, x: Tensor) -> Tensor:
    y: Tensor = m.n(m.c(x)) + m.c(x + 1)
    return y


def calls_the_norm_twice(m: Net, x: Tensor) -> Tensor:
    y: Tensor = m.n(m.c(x)) + m.n(m.d(x))
    return y


@pytest.mark.parametrize(
    "model, reason",
    [
        (net(reads_the_convolution), "other readers"),
        (net(calls_the_convolution_twice), "shared module"),
        (net(calls_the_norm_twice), "shared module"),
        (net(n=nn.BatchNorm2d(4, track_running_stats=False)), "no stored statistics"),
        (net(c=nn.ConvTranspose2d(4, 4, 2)), "not a plain convolution"),
        (net(c=Doubled(4, 4, 1)), "not a plain convolution"),
        (net(n=Halved(4)), "Halved is no BatchNorm2d or BatchNorm3d"),
        (net(lambda m, x: m.n(m.c(x).relu())), "not a plain convolution"),
        (net(lambda m, x: m.n(x)), "not a plain convolution"),
    ],
    ids=[
        "other reader", "shared conv", "shared norm", "no statistics", "transposed", "conv subclass", "norm subclass",
        "relu between", "no conv",
    ],
)  # fmt: skip
def test_left_alone(model: nn.Module, reason: str) -> None:
    unchanged = show(trace(model, image()).module)
    _, outcome = check_pass(FoldBatchNorm(), model, image(), after=unchanged)
    assert outcome.rewritten == ()
    assert reason in reasons(outcome)["n"]


@pytest.mark.parametrize("hooked", ["c", "n"])
def test_left_alone_with_hooks(hooked: str) -> None:
    model = net()
    model.get_submodule(hooked).register_forward_hook(lambda layer, args, output: output * output)
    _, outcome = check_pass(FoldBatchNorm(), model, image(), after="x -> c -> n -> relu -> output")
    assert "hooks" in reasons(outcome)["n"]


def test_left_alone_a_weight_that_the_graph_reads_by_name() -> None:
    class ReadByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.n = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.n(self.c(x)) + F.conv2d(x, self.c.weight)
            return y

    _, outcome = check_pass(
        FoldBatchNorm(),
        prepared(ReadByName()),
        image(),
        after="""x -> c -> n
                 -> c_weight
                 x, c_weight -> conv2d
                 n, conv2d -> add -> output""",
    )
    assert "c_weight reads a parameter" in reasons(outcome)["n"]


def test_left_alone_statistics_of_another_type() -> None:
    model = net()
    model.get_submodule("n").float()
    gm = torch.fx.symbolic_trace(model)
    outcome = FoldBatchNorm()(gm)
    assert "weights are torch.float64" in reasons(outcome)["n"]


def test_tied_weights_fold_on_their_own() -> None:
    conv = nn.Conv2d(4, 4, 1)
    model = Net(lambda m, x: m.n(m.c(x)) + m.d(x), conv)
    model.d.weight = conv.weight
    check_pass(
        FoldBatchNorm(),
        prepared(model),
        image(),
        after="""x -> c
                 x -> d
                 c, d -> add -> output""",
        modes=EVAL,
    )


def test_control_training_mode_is_not_kept() -> None:
    with pytest.raises(AssertionError, match=r"train: .*max .difference"):
        check_pass(FoldBatchNorm(), net(), image(), after="x -> c -> relu -> output")


def test_control_a_wrong_shift_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fold_batch_norm.folded

    def wrong(conv: nn.Conv2d, norm: nn.BatchNorm2d, order: Tensor | None) -> nn.Conv2d:
        assert norm.running_mean is not None
        norm.running_mean = norm.running_mean.flip(0)
        return right(conv, norm, order)

    monkeypatch.setattr(fold_batch_norm, "folded", wrong)
    with pytest.raises(AssertionError, match=r"max .difference"):
        check_pass(FoldBatchNorm(), net(), image(), after="x -> c -> relu -> output", modes=EVAL)


def test_batch_norm_of_a_sequence_without_a_batch_stays() -> None:
    """It takes the channels for samples: folded, it would normalise another dimension."""
    model = prepared(nn.Sequential(nn.Flatten(0, 1), nn.Conv1d(4, 5, 1), nn.BatchNorm1d(4)))
    x = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gm = trace(model, x).module.eval()
    outcome = FoldBatchNorm()(gm)
    assert outcome.rewritten == ()
    assert "BatchNorm1d is no BatchNorm2d" in reasons(outcome)["_2"]
    gm.recompile()
    assert torch.equal(gm(x), model(x))
