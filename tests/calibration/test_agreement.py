"""What agreement is told: against a computation by hand, where it comes from, and what it leaves alone."""
# nn.Module.__call__ is typed to return Any; each net would need a cast.
# mypy: disable-error-code="no-any-return"

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import PoorAgreementWarning
from fxprune.calibration.agreement import FEW, MANY, Agreement, hold_out, interval, measure_agreement
from fxprune.calibration.judging import Judge
from fxprune.calibration.subject import Subject
from fxprune.exact.record import record_of
from fxprune.exact.reporting import Report
from fxprune.planning.lossy import masked_by


class Net(nn.Module):
    """Two convolutions and scores of ten classes."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.stem(x).relu()).relu().mean((2, 3)))


class Redundant(Net):
    """The same with channels that come in pairs: half of them can go."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            assert self.stem.bias is not None
            self.stem.weight[16:] = self.stem.weight[:16]
            self.stem.bias[16:] = self.stem.bias[:16]


class Values(Net):
    """No scores of classes: a map."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.stem(x).relu())


class DataDriven(Net):
    """Not traceable: it looks at its data."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            x = -x
        return super().forward(x)


def seeded(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind().eval()
    if isinstance(model, Net):
        with torch.no_grad():  # so that every class is some image's
            model.head.weight.mul_(30)
            model.head.bias.sub_(Net.forward(model, images(256)).mean(0))
    return model


def images(count: int, size: int = 8) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def agreement_of(pruned: nn.Module) -> Agreement:
    found = fxprune.report(pruned).agreement
    assert found is not None
    return found


# --- what is held back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, held",
    [((64,), 16), ((32, 32), 16), ((256,), 32), (8 * (256,), MANY), ((16,), 4), ((5,), 1), ((3, 1), 1), ((1, 1, 1), 0)],
)
def test_a_share_is_held_back_and_nothing_is_lost(sizes: Sequence[int], held: int) -> None:
    whole = torch.arange(sum(sizes)).float()[:, None]
    batches = [(part,) for part in torch.split(whole, list(sizes))]
    parts = hold_out(batches)
    if not held:
        assert parts is None
        return
    assert parts is not None
    fitted, judged = (torch.cat([batch[0] for batch in part]).flatten() for part in parts)
    assert len(judged) == held <= max(MANY, FEW)
    assert torch.equal(torch.cat([fitted, judged]).sort().values, whole.flatten())
    if held > 1:  # spread evenly: data may be sorted by class
        gaps = judged.sort().values.diff()
        assert gaps.max() - gaps.min() <= 1


def test_whole_batches_where_samples_cannot_be_told_apart() -> None:
    odd = [(torch.full((4, 1), i), torch.zeros(3)) for i in range(16)]
    for batches, sliceable in ((odd, True), ([(batch[0],) for batch in odd], False)):
        parts = hold_out(batches, sliceable)
        assert parts is not None
        assert [len(part) for part in parts] == [14, 2]
        assert all(batch[0].shape == (4, 1) for part in parts for batch in part)
        assert hold_out(batches[:7], sliceable) is None


# --- the number -----------------------------------------------------------------------------------------------------


def call(model: nn.Module, batch: Tensor) -> Any:
    return model(batch)


def test_classes_by_hand() -> None:
    dense, other = seeded(Net), copy.deepcopy(seeded(Net))
    assert isinstance(other, Net)
    with torch.no_grad():
        other.head.weight.add_(2 * torch.randn(other.head.weight.shape, generator=torch.Generator().manual_seed(2)))
    data = images(60)
    found = measure_agreement(dense, other, torch.split(data, 7), call, held_out=True)
    assert found is not None
    with torch.no_grad():
        a, b = dense(data), other(data)
    assert found.share == float((a.argmax(1) == b.argmax(1)).double().mean())
    assert 0.1 < found.share < 0.95  # neither by chance nor trivially
    apart = (a.softmax(1) - b.softmax(1)).abs().sum(1).mean() / 2
    assert found.distance == pytest.approx(float(apart), rel=1e-5)
    assert (found.inputs, found.held_out, found.classes) == (60, True, True)
    same = measure_agreement(dense, copy.deepcopy(dense), torch.split(data, 7), call, held_out=True)
    assert same == Agreement(1.0, 60, True, True, 0.0)
    assert "one class" not in str(same)
    one = measure_agreement(dense, other, [data[:1].expand(60, -1, -1, -1)], call, held_out=True)
    assert one is not None
    assert str(one).endswith("the dense network puts all of them into one class, so that this says little")


def test_values_by_hand() -> None:
    dense, other = seeded(Values), copy.deepcopy(seeded(Values))
    assert isinstance(other, Net)
    with torch.no_grad():
        other.conv.weight.mul_(0.8)
    data = images(12)
    found = measure_agreement(dense, other, torch.split(data, 5), call, held_out=False)
    assert found is not None
    with torch.no_grad():
        a, b = dense(data).double(), other(data).double()
    error = float((a - b).square().sum() / (a - a.mean()).square().sum())
    assert found.share == pytest.approx(1 - error, rel=1e-6)
    assert 0 < error < 0.5
    assert not found.classes
    assert "share of the variance of its output" in str(found)
    assert "on 12 calibration inputs, which were fitted and flatter" in str(found)


@pytest.mark.parametrize("share, inputs", [(14 / 15, 15), (1.0, 7), (0.0, 3), (0.5, 128)])
def test_the_interval_by_hand(share: float, inputs: int) -> None:
    z = 1.959964
    middle, half = share + z**2 / (2 * inputs), z * math.sqrt(share * (1 - share) / inputs + (z / (2 * inputs)) ** 2)
    low, high = ((middle + sign * half) / (1 + z**2 / inputs) for sign in (-1, 1))
    expected = f"{max(0, 100 * low):.0f} to {min(100, 100 * high):.0f}"
    assert interval(share, inputs) == expected
    found = Agreement(share, inputs, held_out=True, classes=True, distance=0.0)
    assert str(found).endswith(
        f"on {inputs} held-out calibration inputs: {100 * share:.1f} % (95 % interval {expected})"
    )
    assert found.figure == f"{100 * share:.1f} % ({expected})"
    assert interval(share, 100 * inputs) != expected, "control: more inputs know more"
    assert "interval" not in str(replace(found, classes=False)), "a share of a variance counts no inputs"


def test_what_cannot_be_compared_is_not() -> None:
    dense = seeded(Net)
    for other in (lambda x: torch.zeros(len(x), 9), lambda x: "nothing", lambda x: torch.zeros(len(x), 10).long()):
        assert measure_agreement(dense, other, [images(2)], call, held_out=True) is None  # type: ignore[arg-type]
    assert measure_agreement(dense, dense, [], call, held_out=True) is None


# --- what compile tells ---------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "graph": (Net, {}),
    "module": (Net, {"output": "module"}),
    "data-driven": (DataDriven, {}),
    "filters": (Net, {"granularity": "filter"}),
}


@pytest.mark.parametrize("name", KINDS)
def test_compile_tells_the_true_agreement_on_what_it_did_not_fit(name: str) -> None:
    kind, options = KINDS[name]
    model, data = seeded(kind), images(40)
    pruned = fxprune.compile(model, 0.5, calibration=data, example_inputs=data[:2], **options)
    found = agreement_of(pruned)
    parts = hold_out([(batch,) for batch in torch.split(data, 32)])
    assert parts is not None
    fitted, judged = ([batch[0] for batch in part] for part in parts)
    plan = record_of(pruned).plan
    every = fxprune.mask(model, plan, data, example_inputs=data[:2])  # whose pulls the other refit takes
    masked = masked_by(Subject(model, data[:2], fitted, "auto").refitted_as(every), plan).eval()
    with torch.no_grad():
        apart = sum(float((model(x).softmax(1) - masked(x).softmax(1)).abs().sum()) / 2 for x in judged)
        same = sum(int((model(x).argmax(1) == masked(x).argmax(1)).sum()) for x in judged)
    count = sum(map(len, judged))
    assert (found.inputs, found.held_out, found.share) == (count, True, same / count)
    assert found.distance == pytest.approx(apart / count, rel=1e-3)
    assert f"note: {found}" in str(fxprune.report(pruned))
    assert Report.from_dict(fxprune.report(pruned).to_dict()) == fxprune.report(pruned)


def test_mask_tells_what_compile_tells() -> None:
    model, data = seeded(Net), images(40)
    plan = fxprune.make_plan(model, 0.5, calibration=data)
    pruned = fxprune.rewrite(fxprune.mask(model, plan, data), plan, data[:2])
    assert agreement_of(pruned) == agreement_of(fxprune.compile(model, 0.5, calibration=data))


def test_without_data_nothing_is_told() -> None:
    report = fxprune.report(fxprune.compile(seeded(Net), 0.5, example_inputs=images(2)))
    assert report.agreement is None
    assert "agreement" not in str(report)


def test_one_image() -> None:
    both: tuple[dict[str, Any], ...] = {"ratio": 0.5}, {"macs": 0.6}
    for options in both:
        found = agreement_of(fxprune.compile(seeded(Net), calibration=images(1), **options))
        assert (found.inputs, found.held_out) == (1, False)
        assert "which were fitted" in str(found)


@pytest.mark.parametrize("count, held", [(8, 8), (2, 0)])
def test_batches_that_cannot_be_cut_are_held_out_whole(count: int, held: int) -> None:
    class Fixed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(8, 3, 8, 8))

    data = list(torch.split(images(8 * count), 8))
    pruned = fxprune.compile(seeded(Fixed), 0.5, calibration=data, example_inputs=data[0], output="graph", verify=False)
    found = agreement_of(pruned)
    assert (found.inputs, found.held_out) == ((held, True) if held else (16, False))


def test_poor_agreement_warns_and_says_what_to_try() -> None:
    data = images(64)
    with pytest.warns(
        PoorAgreementWarning,
        match=r"on 16 held-out calibration inputs: \d+\.\d % \(95 % interval \d+ to \d+\); more calibration images",
    ):
        fxprune.compile(seeded(Net), 0.9, calibration=data)
    with pytest.warns(PoorAgreementWarning):
        fxprune.mask(seeded(Net), fxprune.make_plan(seeded(Net), 0.9, calibration=data), data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned = fxprune.compile(seeded(Redundant), {"conv": 0.5}, form="overlap", calibration=data)
        assert agreement_of(pruned).share == 1
        fxprune.compile(seeded(Net), 0.9, example_inputs=data[:2])


@pytest.mark.parametrize("groups, advised", [(2, True), (8, False)])
def test_only_what_was_not_tried_is_advised(groups: int, advised: bool) -> None:
    data = images(64)
    asked: dict[str, Any] = {"ratio": 0.9, "groups": groups, "calibration": data}
    with pytest.warns(PoorAgreementWarning, match="more calibration images") as refitted:
        fxprune.compile(seeded(Net), **asked)
    with pytest.warns(PoorAgreementWarning, match="more calibration images") as recovered:
        fxprune.compile(seeded(Net), **asked, recover={"steps": 1})
    before, after = (str(caught[0].message) for caught in (refitted, recovered))
    assert ("8 groups for kernels" in before, "8 groups for kernels" in after) == (advised, advised)
    assert ("recover=True" in before, "recover=True" in after) == (True, False)


def test_the_model_is_left_alone() -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.get_buffer("calls").add_(1)
            x.mul_(1.0)
            return super().forward(x)

    model = seeded(Counting).train()
    state, data = copy.deepcopy(model.state_dict()), images(20)
    before, rng = data.clone(), torch.get_rng_state()
    subject = Subject(model, None, data, "graph")
    judge = Judge(subject)
    masked = copy.deepcopy(model)
    found = judge.agreement(masked)
    assert found is not None
    assert found.share == 1
    assert masked.training
    assert model.training
    assert torch.equal(data, before)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
