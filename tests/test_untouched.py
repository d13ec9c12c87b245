"""After any public call the user's model is bit for bit what it was: parameters, buffers, attributes, modes."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equality import randomize
from products_harness import in_turns, one_in
from torch import Tensor, nn
from torch.nn.utils import prune
from untouched_harness import equal, snapshot
from zoo import CASES, Case

import fxprune


def each_step(model: nn.Module, x: tuple[Tensor, ...]) -> None:
    """Every public function that is handed a model, on one model."""
    fxprune.analyze(model, x)
    plan = fxprune.make_plan(model, 0.5, example_inputs=x)
    masked = fxprune.mask(model, plan)
    before = snapshot(masked)
    pruned = fxprune.rewrite(masked, plan, x)
    fxprune.verify(pruned, masked, x)
    assert equal(snapshot(masked), before)


@pytest.mark.parametrize("asked", [{"macs": 0.6}, {"ratio": 0.5, "granularity": "filter"}])
def test_the_mode_of_the_model_decides_nothing_but_that_of_the_result(asked: dict[str, Any]) -> None:
    model = randomize(
        nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(16, 5),
        )
    )  # fmt: skip
    images = torch.randn(32, 3, 12, 12)
    results = {}
    for mode in (True, False):
        before = snapshot(model.train(mode))
        results[mode] = fxprune.compile(model, calibration=images, **asked)
        assert equal(snapshot(model), before)
        assert {part.training for part in results[mode].modules()} == {mode}
    training, evaluation = (results[mode].state_dict() for mode in (True, False))
    assert training.keys() == evaluation.keys()
    assert all(torch.equal(training[name], evaluation[name]) for name in training)
    assert not torch.equal(results[True](images), results[False](images)), "control: the modes differ"


@pytest.mark.filterwarnings("ignore::fxprune.NothingRewrittenWarning")
@pytest.mark.parametrize("case", one_in(5, CASES))
def test_the_zoo_is_untouched(case: Case) -> None:
    torch.manual_seed(0)
    model = randomize(case.build().double())
    before = snapshot(model)
    each_step(model, case.inputs())
    assert equal(snapshot(model), before)


class Grid(nn.Module):
    """Keeps positions in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.grid = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        if self.grid.shape[-1:] != x.shape[-1:]:
            self.grid = torch.arange(x.shape[-1], dtype=x.dtype, device=x.device)
        return x + self.grid


class Counts(nn.Module):
    """Writes into buffers, an attribute and a parameter while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 16, 1)
        self.calls: Tensor
        self.mean: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(32))
        self.bound = nn.Parameter(torch.full((32, 1, 1), 3.0))
        self.seen: Any = None
        self.grid = Grid()

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        y = self.a(x).relu()
        self.mean.mul_(0.5).add_(y.mean((0, 2, 3)), alpha=0.5)
        self.bound.data.clamp_(max=2.0)
        self.seen = y
        z: Tensor = self.c(self.grid(self.b((y - self.mean.view(1, -1, 1, 1)).minimum(self.bound)).relu()))
        return z


class Inside(nn.Module):
    """A module that cannot be traced and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 1)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.conv(x if float(x.detach().sum()) > 0 else -x)
        return y


def counts() -> nn.Module:
    return Counts()


def counts_inside() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), Inside(), nn.Conv2d(32, 16, 1)
    )


def pruned_by_torch() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 1))
    prune.ln_structured(model[2], "weight", 0.5, n=2, dim=0)  # type: ignore[no-untyped-call]
    return model


X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
DATA = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(1))
CALLS: dict[str, Callable[[nn.Module], object]] = {
    "steps": lambda model: each_step(model, (X,)),
    "compile": lambda model: fxprune.compile(model, 0.5, example_inputs=X),
    "compile filters": lambda model: fxprune.compile(model, 0.5, example_inputs=X, granularity="filter"),
    "compile calibrated": lambda model: fxprune.compile(model, 0.5, calibration=DATA),
    "compile both calibrated": lambda model: fxprune.compile(
        model, granularity={"filter": 0.25, "kernel": 0.5}, calibration=DATA
    ),
    "sensitivity": lambda model: fxprune.measure_sensitivity(model, calibration=DATA),
    "no example": lambda model: fxprune.compile(model, 0.5),
}


@pytest.mark.filterwarnings("ignore::fxprune.NothingRewrittenWarning")
@pytest.mark.parametrize("build", [counts, counts_inside, pruned_by_torch])
@pytest.mark.parametrize("call, training", in_turns(CALLS, (False, True)))
def test_models_that_change_as_they_run(build: Callable[[], nn.Module], call: str, training: bool) -> None:
    torch.manual_seed(0)
    model = build().train(training)
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        CALLS[call](model)
    assert equal(snapshot(model), before)


def test_control_a_run_is_seen() -> None:
    for model in (Counts(), counts_inside()):
        before = snapshot(model)
        model(X)
        assert not equal(snapshot(model), before)
        assert equal(snapshot(model), snapshot(model))


def test_state_stays_state() -> None:
    model = Counts().eval()
    pruned = fxprune.compile(model, 0.5, example_inputs=X)
    own = copy.deepcopy(model)
    for _ in range(3):
        torch.testing.assert_close(pruned(X), fxprune.mask(own, pruned.meta["fxprune"].plan)(X))
        own(X)
    assert int(pruned.get_buffer("calls")) == 3
    assert float(pruned.get_buffer("mean").detach().abs().sum()) > 0
    assert "calls" in pruned.state_dict()
