"""Criteria: each against its formula, their sums and products, and a clear word where evidence is missing."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from fxprune.criteria import CRITERIA, Criterion, Evidence, ScoreFunction, Taylor, kernel_scores, resolve
from fxprune.errors import PlanError
from fxprune.methods import Matrix

Batches = list[tuple[Tensor, Tensor]]


def make_conv(dtype: torch.dtype = torch.float32) -> nn.Conv2d:
    return nn.Conv2d(5, 4, (3, 2), bias=False).to(dtype)


def scores_of(criterion: object, conv: nn.Conv2d, evidence: Evidence | None = None, name: str = "conv") -> Matrix:
    found, score = resolve(criterion, evidence or Evidence())
    return kernel_scores(name, conv, score, found)


def by_kernel(function: Callable[[Matrix, tuple[int, int]], float], conv: nn.Conv2d) -> Matrix:
    """The scores that a formula for one kernel `(kh, kw)` at `(o, c)` gives."""
    weight = conv.weight.detach().double().numpy()
    filters, channels = weight.shape[:2]
    return np.array([[function(weight[o, c], (o, c)) for c in range(channels)] for o in range(filters)])


@pytest.fixture
def earlier() -> Tensor:
    return torch.randn(4, 5, 3, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_named_criterion_is_its_formula(dtype: torch.dtype, earlier: Tensor) -> None:
    conv = make_conv(dtype)
    moments = torch.rand(5, dtype=torch.float64)
    evidence = Evidence(earlier={"conv.weight": earlier.to(dtype)}, moments={"conv": moments})
    old = earlier.to(dtype).double().numpy()
    increase = by_kernel(lambda kernel, at: float((np.abs(kernel) - np.abs(old[at])).sum()), conv)
    expected = {
        "l1": by_kernel(lambda kernel, at: float(np.abs(kernel).sum()), conv),
        "l2": by_kernel(lambda kernel, at: float((kernel**2).sum()), conv),
        "movement": by_kernel(lambda kernel, at: float(np.abs(kernel - old[at]).sum()), conv),
        "magnitude_increase": increase - increase.min(),
        "activation": by_kernel(lambda kernel, at: float((kernel**2).sum() * moments[at[1]]), conv),
    }
    assert expected.keys() | {"random"} == CRITERIA.keys()
    assert len({scores.round(9).tobytes() for scores in expected.values()}) == len(expected)
    for name, scores in expected.items():
        found = scores_of(name, conv, evidence)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, scores, rtol=1e-12, atol=1e-12)


def test_the_names_are_those_of_the_criteria() -> None:
    assert {name: criterion.name for name, criterion in CRITERIA.items()} == {name: name for name in CRITERIA}
    assert resolve("l2", Evidence())[0] == "l2"


def test_random_scores_depend_on_the_seed_and_the_name_only() -> None:
    conv = make_conv()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    first = {name: scores_of("random", conv, name=name) for name in ("a", "b", "a.b")}
    again = {name: scores_of("random", conv, name=name) for name in ("a.b", "b", "a")}
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # type: ignore[index]
    for name, scores in first.items():
        assert scores.tolist() == again[name].tolist()
    assert len({scores.tobytes() for scores in first.values()}) == 3
    assert scores_of("random", conv, Evidence(seed=1), "a").tolist() != first["a"].tolist()
    torch.manual_seed(9)
    assert scores_of("random", make_conv(), name="a").tolist() == first["a"].tolist()


def test_magnitude_increase_orders_kernel_groups_as_the_signed_sums_do() -> None:
    conv = nn.Conv2d(8, 8, 3)
    old = conv.weight.detach() + 0.3 * torch.randn(8, 8, 3, 3)
    signed = (conv.weight.detach().double().abs() - old.double().abs()).sum((2, 3)).numpy()
    found = scores_of("magnitude_increase", conv, Evidence(earlier={"conv.weight": old}))
    assert (signed < 0).any()
    assert found.min() == 0
    clipped = signed.clip(min=0)  # control
    differs = False
    for filters in itertools.combinations(range(8), 4):
        order = np.argsort(signed[list(filters)].sum(axis=0))
        assert np.argsort(found[list(filters)].sum(axis=0)).tolist() == order.tolist()
        differs |= np.argsort(clipped[list(filters)].sum(axis=0)).tolist() != order.tolist()
    assert differs


def test_sums_and_products() -> None:
    conv = make_conv()
    evidence = Evidence(moments={"conv": torch.rand(5)})
    l1, l2, activation = (scores_of(name, conv, evidence) for name in ("l1", "l2", "activation"))
    a, b, c = (CRITERIA[name] for name in ("l1", "l2", "activation"))
    cases: list[tuple[Criterion, str, Matrix]] = [
        (a + b, "l1 + l2", l1 + l2),
        (a * c, "l1 * activation", l1 * activation),
        (2 * a, "2 * l1", 2 * l1),
        (a * 0.5, "l1 * 0.5", l1 / 2),
        ((a + b) * c, "(l1 + l2) * activation", (l1 + l2) * activation),
        (a + b * c, "l1 + l2 * activation", l1 + l2 * activation),
        (3 * (a + 2 * b), "3 * (l1 + 2 * l2)", 3 * (l1 + 2 * l2)),
    ]
    for criterion, name, expected in cases:
        assert criterion.name == name
        np.testing.assert_allclose(scores_of(criterion, conv, evidence), expected, rtol=1e-12)


def norm_of_filter(name: str, conv: nn.Conv2d) -> Tensor:
    return conv.weight.square().sum((1, 2, 3), keepdim=True).sqrt()[..., 0, 0].expand(conv.weight.shape[:2])


def test_functions_join_in() -> None:
    conv = make_conv()
    norms = norm_of_filter("", conv).detach().double().numpy()
    assert resolve(norm_of_filter, Evidence())[0] == "norm_of_filter"
    assert resolve(functools.partial(norm_of_filter), Evidence())[0] == "partial"
    np.testing.assert_allclose(scores_of(norm_of_filter, conv), norms)
    for criterion, name in (
        (CRITERIA["l1"] * norm_of_filter, "l1 * norm_of_filter"),
        (norm_of_filter * CRITERIA["l1"], "norm_of_filter * l1"),
    ):
        assert criterion.name == name
        np.testing.assert_allclose(scores_of(criterion, conv), scores_of("l1", conv) * norms)
    np.testing.assert_allclose(scores_of(norm_of_filter + CRITERIA["l1"], conv), scores_of("l1", conv) + norms)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float16])
def test_any_real_type_of_scores_will_do(dtype: torch.dtype) -> None:
    found = scores_of(lambda name, conv: torch.ones(4, 5, dtype=dtype), make_conv())
    assert found.dtype == np.float64
    assert (found == 1).all()


def filled(value: float) -> ScoreFunction:
    return lambda name, conv: torch.full(conv.weight.shape[:2], value)


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda name, conv: [[1.0]], r"returned a list; it must return a Tensor \(4, 5\)"),
        (lambda name, conv: np.ones((4, 5)), "returned a ndarray"),
        (lambda name, conv: None, "returned a NoneType"),
        (lambda name, conv: conv.weight.abs().sum((1, 2, 3)), r"returned shape \(4,\); .* \(4, 5\)"),
        (lambda name, conv: torch.ones(5, 4), r"returned shape \(5, 4\)"),
        (lambda name, conv: torch.ones(4, 1), r"returned shape \(4, 1\)"),
        (lambda name, conv: torch.ones(4, 5, dtype=torch.complex64), "returned a torch.complex64 tensor"),
        (lambda name, conv: torch.ones(4, 5, device="meta"), "on meta; scores must be real and have values"),
        (filled(math.nan), "returned 20 scores of 20 that are NaN or infinite"),
        (filled(math.inf), "returned 20 scores of 20"),
        (filled(-0.5), "returned negative scores, the lowest -0.5; scores must be 0 or more"),
    ],
)
def test_answers_that_are_no_scores_are_refused(function: ScoreFunction, message: str) -> None:
    for criterion in (function, CRITERIA["l2"] * function, function + CRITERIA["l2"]):
        with pytest.raises(PlanError, match=rf"^stem\.conv: criterion .*lambda.* {message}"):
            scores_of(criterion, make_conv(), name="stem.conv")


def test_a_product_that_overflows_is_refused() -> None:
    conv = make_conv(torch.float64)
    with torch.no_grad():
        conv.weight.mul_(1e100)
    with pytest.raises(PlanError, match=r"^conv: criterion 'l2 \* l2' returned \d+ scores of 20 that are NaN or inf"):
        scores_of(CRITERIA["l2"] * CRITERIA["l2"], conv)


def test_a_criterion_cannot_change_the_weight() -> None:
    def in_place(name: str, conv: nn.Conv2d) -> Tensor:
        return conv.weight.mul_(2).square().sum((2, 3))

    def through_data(name: str, conv: nn.Conv2d) -> Tensor:
        return conv.weight.data.abs_().sum((2, 3))

    def replaced(name: str, conv: nn.Conv2d) -> Tensor:
        conv.weight = nn.Parameter(conv.weight.abs())
        return conv.weight.sum((2, 3))

    for function in (in_place, through_data, replaced):
        conv = make_conv()
        parameter, values = conv.weight, conv.weight.detach().clone()
        with pytest.raises(PlanError, match=f"conv: criterion '{function.__name__}' changed the weight"):
            scores_of(function, conv)
        assert conv.weight is parameter
        assert torch.equal(conv.weight, values)


def test_weights_without_values_are_refused() -> None:
    with pytest.raises(PlanError, match=r"^a: the weight is on the meta device"):
        scores_of("l2", nn.Conv2d(5, 4, 3, device="meta"), name="a")
    conv = make_conv()
    with torch.no_grad():
        conv.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(PlanError, match=r"^a: 1 of 120 weights are NaN or infinite"):
        scores_of("l2", conv, name="a")


@pytest.mark.parametrize(
    "criterion, message",
    [
        ("movement", r"criterion 'movement' needs an earlier state .* pass snapshots=\[state_dict, \.\.\.\]"),
        ("magnitude_increase", "criterion 'magnitude_increase' needs an earlier state"),
        ("activation", "criterion 'activation' needs the second moments of the inputs; pass calibration="),
        (CRITERIA["l2"] * CRITERIA["activation"], "criterion 'activation' needs"),
        ("taylor", r"criterion 'taylor' needs a loss and data to differentiate; pass Taylor\(loss, data\)"),
        (Taylor(mse_loss, []), "criterion 'taylor' needs the model"),
        ("l3", r"criterion is 'l3' \(near: 'l2', 'l1'\); it must be one of 'l1', 'l2', .*, a Criterion, or a function"),
        ("magnitude", r"\(near: 'magnitude_increase'\)"),
        (2, "criterion is 2; it must be one of"),
        (None, "criterion is None"),
        (Taylor, "criterion is <class"),
        (lambda weight: weight.abs(), r"criterion '<lambda>' cannot be called as <lambda>\(name, conv\) \(too many"),
    ],
)
def test_what_cannot_score_is_refused_before_any_layer(criterion: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        resolve(criterion, Evidence())


@pytest.mark.parametrize("other", [1, "l2", None, True])
def test_only_criteria_can_be_added(other: object) -> None:
    with pytest.raises(PlanError, match="a criterion cannot be combined with"):
        CRITERIA["l1"] + other
    with pytest.raises(PlanError, match="a criterion cannot be combined with"):
        other + CRITERIA["l1"]


@pytest.mark.parametrize("factor", [0, -1, math.nan, math.inf])
def test_factors_are_positive_and_finite(factor: float) -> None:
    with pytest.raises(PlanError, match=f"the factor of a criterion is {factor}; it must be positive and finite"):
        factor * CRITERIA["l1"]


@pytest.mark.parametrize(
    "weight, message",
    [
        (
            {"convs.weight": torch.ones(4, 5, 3, 2)},
            r"has no 'conv.weight' \(near: 'convs.weight'\); pass a snapshot of",
        ),
        ({"conv.weight": torch.ones(4, 5, 3, 3)}, r"has shape \(4, 5, 3, 3\), the present one \(4, 5, 3, 2\)"),
        ({"conv.weight": torch.full((4, 5, 3, 2), math.nan)}, "holds NaN or infinity; pass another snapshot"),
    ],
)
@pytest.mark.parametrize("criterion", ["movement", "magnitude_increase"])
def test_an_earlier_state_of_another_model_is_refused(criterion: str, weight: dict[str, Tensor], message: str) -> None:
    with pytest.raises(PlanError, match=f"^conv: criterion '{criterion}': the earlier (state|weight) {message}"):
        scores_of(criterion, make_conv(), Evidence(earlier=weight))


@pytest.mark.parametrize(
    "moments, message",
    [
        ({"other": torch.ones(5)}, r"no second moments were measured here; .* ignore=\('conv',\)"),
        ({"conv": torch.ones(4)}, r"the second moments have shape \(4,\), not \(5,\)"),
        ({"conv": torch.full((5,), math.nan)}, "second moments are negative, NaN or infinite"),
        ({"conv": -torch.ones(5)}, "second moments are negative, NaN or infinite"),
    ],
)
def test_moments_that_do_not_fit_are_refused(moments: dict[str, Tensor], message: str) -> None:
    with pytest.raises(PlanError, match=f"^conv: criterion 'activation': {message}"):
        scores_of("activation", make_conv(), Evidence(moments=moments))


def test_activation_is_the_energy_that_a_1x1_kernel_adds() -> None:
    conv = nn.Conv2d(6, 3, 1, bias=False).double()
    input = torch.randn(4, 6, 5, 5, dtype=torch.float64) * torch.arange(1.0, 7).reshape(6, 1, 1)
    found = scores_of("activation", conv, Evidence(moments={"conv": input.square().mean((0, 2, 3))}))
    with torch.no_grad():
        parts = torch.einsum("oc,nchw->ocnhw", conv.weight[:, :, 0, 0], input)
    np.testing.assert_allclose(found, parts.square().mean((2, 3, 4)).numpy(), rtol=1e-12)


class Net(nn.Module):
    """Two convolutions that the loss depends on, one that it does not, and layers whose mode matters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Conv2d(4, 5, (3, 1))
        self.unused = nn.Conv2d(2, 2, 1)

    def forward(self, input: Tensor) -> Tensor:
        hidden: Tensor = self.drop(torch.tanh(self.norm(self.first(input))))
        output: Tensor = self.second(hidden).mean((2, 3))
        return output


def batches(count: int = 3) -> Batches:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(4, 3, 6, 6, generator=generator), torch.randint(0, 5, (4,), generator=generator))
        for _ in range(count)
    ]


def taylor_scores(model: Net, data: object, loss: object = cross_entropy) -> dict[str, Matrix]:
    name, score = resolve(Taylor(loss, data), Evidence(model=model))  # type: ignore[arg-type]
    return {layer: kernel_scores(layer, getattr(model, layer), score, name) for layer in ("first", "second", "unused")}


def test_taylor_is_the_squared_first_order_change_of_the_loss() -> None:
    model = Net()
    found = taylor_scores(model, batches())
    model.eval()
    loss = torch.stack([cross_entropy(model(input), target) for input, target in batches()]).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    for name in ("first", "second"):
        conv = getattr(model, name)
        products = (conv.weight * conv.weight.grad).detach().double().numpy()
        np.testing.assert_allclose(found[name], (products**2).sum((2, 3)), rtol=1e-4, atol=1e-14)
        assert (found[name] > 0).all()
    assert (found["unused"] == 0).all()


def test_taylor_predicts_what_a_small_weight_costs() -> None:
    model = Net().double().eval()
    data = [(input.double(), target) for input, target in batches(1)]
    with torch.no_grad():
        model.second.weight[2, 1] *= 1e-4
        before = cross_entropy(model(data[0][0]), data[0][1])
        change = torch.zeros(3, 1, dtype=torch.float64)
        kernel = model.second.weight[2, 1].clone()
        for tap in range(3):
            model.second.weight[2, 1, tap] = 0
            change[tap] = cross_entropy(model(data[0][0]), data[0][1]) - before
            model.second.weight[2, 1] = kernel
    found = taylor_scores(model, data)["second"][2, 1]
    assert found == pytest.approx(float(change.square().sum()), rel=1e-2)


def test_taylor_leaves_the_model_and_the_random_state_alone() -> None:
    model = Net().train()
    model.first.weight.requires_grad_(False)
    model.second.weight.grad = torch.ones_like(model.second.weight)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    input, target = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    loader = DataLoader(TensorDataset(input, target), batch_size=4, shuffle=True)
    random = torch.get_rng_state()
    with torch.no_grad():  # planning may well run so
        found = taylor_scores(model, loader)
    assert torch.equal(torch.get_rng_state(), random)
    assert (found["first"] > 0).all()
    assert model.training
    assert model.norm.training
    assert not model.first.weight.requires_grad
    assert model.first.weight.grad is None
    assert bool((model.second.weight.grad == 1).all())
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    next(iter(loader))
    assert not torch.equal(torch.get_rng_state(), random)  # control: a loader does advance it


class NetOfDict(Net):
    def forward(self, input: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(input["image"])


def test_taylor_takes_half_precision_and_nested_batches() -> None:
    data = [({"image": input.to(torch.bfloat16)}, (target,)) for input, target in batches()]
    found = taylor_scores(NetOfDict().to(torch.bfloat16), data, lambda output, target: cross_entropy(output, target[0]))
    assert (found["second"] > 0).any()


def used_up() -> Iterator[tuple[Tensor, Tensor]]:
    data = iter(batches(1))
    next(data)
    return data


@pytest.mark.parametrize(
    "data, loss, message",
    [
        ([], cross_entropy, "data holds no batch"),
        (used_up(), cross_entropy, "data holds no batch; .* A generator is used up by its first plan"),
        (3, cross_entropy, "data is a int; it must be a loader or a list of batches"),
        ([torch.ones(2, 3, 6, 6)], cross_entropy, r"a batch of data is a Tensor; it must be a pair \(input, target\)"),
        ([(torch.ones(2, 3, 6, 6),)], cross_entropy, "a batch of data is a tuple of 1"),
        (batches(), lambda output, target: output.sum() * math.nan, "the loss of batch 0 is nan; it must be finite"),
        (batches(), lambda output, target: output.sum() * math.inf, "the loss of batch 0 is -?inf"),
        (
            batches(),
            lambda output, target: output.sum(1),
            r"the loss of batch 0 has shape \(4,\); it must be one number",
        ),
        (batches(), lambda output, target: output.sum().item(), "the loss of batch 0 is a float; it must be a tensor"),
        (batches(), lambda output, target: output.detach().sum(), "the loss of batch 0 has no gradient"),
    ],
)
def test_taylor_says_what_is_wrong_with_its_data(data: object, loss: object, message: str) -> None:
    with pytest.raises(PlanError, match=f"^criterion 'taylor': {message}"):
        taylor_scores(Net(), data, loss)


def test_taylor_names_the_batch() -> None:
    data = batches()
    data[2][0][0, 0, 0, 0] = math.nan
    with pytest.raises(PlanError, match="the loss of batch 2 is nan"):
        taylor_scores(Net(), data)


def test_taylor_refuses_a_model_without_convolutions_and_a_layer_of_another_model() -> None:
    with pytest.raises(PlanError, match="'taylor': Linear has no convolution to score"):
        resolve(Taylor(mse_loss, [(torch.ones(1, 2), torch.ones(1, 2))]), Evidence(model=nn.Linear(2, 2)))
    name, score = resolve(Taylor(cross_entropy, batches()), Evidence(model=Net()))
    with pytest.raises(PlanError, match=r"^third: criterion 'taylor' knows no such convolution"):
        kernel_scores("third", make_conv(), score, name)


def test_taylor_combines() -> None:
    model = Net()
    criterion = Taylor(cross_entropy, batches()) * CRITERIA["l2"]
    assert criterion.name == "taylor * l2"
    found = scores_of(criterion, model.first, Evidence(model=model), "first")
    expected = taylor_scores(model, batches())["first"] * scores_of("l2", model.first)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
