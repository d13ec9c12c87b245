"""Recovery after the refit: what it may change and what not, that it gets closer, and that it can be stopped."""

import copy
import logging
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from equality import randomize
from recovery_harness import NETS, PLANS, differing, images, net_of, state_of
from torch import Tensor, nn

import fxprune
from fxprune import CalibrationError, FxpruneError, PlanError, PrunePlan, StorageError
from fxprune.calibration import recovery, relative_steps
from fxprune.calibration.recovery import RECOVERED, Recovered, Recovery
from fxprune.graph.tracing import trace
from fxprune.plans.masking import kept_entries

Subject = tuple[nn.Module, nn.Module, PrunePlan, Tensor]


@cache
def _subject(net: str, kind: str) -> Subject:
    model, data = net_of(net), images()
    plan = fxprune.make_plan(model, calibration=data, example_inputs=data[:2], **PLANS[kind])
    return model, fxprune.mask(model, plan, data), plan, data


def masked_only(net: str = "residual", kind: str = "kernels") -> Subject:
    """The same without a refit: far from the dense net, so that a few steps help."""
    model, _, plan, data = subject(net, kind)
    return model, fxprune.mask(model, plan), plan, data


def subject(net: str = "residual", kind: str = "kernels") -> Subject:
    """A dense net, its refit, the plan and the images; the nets are copies."""
    model, masked, plan, data = _subject(net, kind)
    return copy.deepcopy(model), copy.deepcopy(masked), plan, data


def recovered(model: nn.Module) -> Recovered:
    done = getattr(model, RECOVERED)
    assert isinstance(done, Recovered)
    return done


# --- what it does ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("net", NETS)
def test_it_gets_closer_and_keeps_to_the_plan(net: str, kind: str) -> None:
    model, masked, plan, data = subject(net, kind)
    before = state_of(model), state_of(masked)
    result = fxprune.recover(model, masked, plan, data, steps=100)
    assert not differing(model, before[0])
    assert not differing(masked, before[1])
    done = recovered(result)
    assert done.steps == 100
    assert done.after < done.before
    fresh = images(64, seed=2)
    losses = [recovered(fxprune.recover(model, some, plan, fresh, steps=1)).before for some in (result, masked)]
    assert losses[0] < losses[1]
    state = result.state_dict()
    assert all((state[name][~stays] == 0).all() for name, stays in kept_entries(result, plan).items())
    fxprune.verify(fxprune.rewrite(result, plan, data[:2]), result, data[:2])


def test_it_undoes_most_of_what_masking_did_where_there_was_no_refit() -> None:
    model, masked, plan, data = masked_only()
    done = recovered(fxprune.recover(model, masked, plan, data, steps=100))
    assert done.after < 0.5 * done.before


def test_compile_tells_how_it_is_after_recovery(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = net_of("residual"), images()
    asked: dict[str, Any] = {"calibration": data, "recover": {"steps": 5}, "verify": False}
    monkeypatch.setattr("fxprune.calibration.agreement.GOOD", 0.0)
    pruned = fxprune.compile(model, 0.25, **asked)
    found = fxprune.report(pruned).agreement
    (held,) = [batch[0] for batch, _ in recovery.drawn_from([(data,)], 0).held_out()]
    with torch.no_grad():
        same = (model(held).argmax(1) == pruned(held).argmax(1)).double().mean()
    assert found is not None
    assert (found.inputs, found.held_out, found.share) == (10, False, float(same))
    assert "10 calibration inputs, which were fitted and flatter" in str(fxprune.report(pruned))
    monkeypatch.setattr("fxprune.calibration.agreement.GOOD", 1.1)
    with pytest.warns(fxprune.PoorAgreementWarning, match="more calibration images help most"):
        fxprune.compile(model, 0.25, **asked)


def test_statistics_flags_and_modes_stay() -> None:
    model, masked, plan, data = masked_only()
    masked.train()
    masked.get_submodule("second").eval()
    masked.get_parameter("stem.weight").requires_grad_(False)
    result = fxprune.recover(model, masked, plan, data, steps=4)
    buffers = dict(masked.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in result.named_buffers())
    assert [m.training for m in result.modules()] == [m.training for m in masked.modules()]
    flags = {name: parameter.requires_grad for name, parameter in masked.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in result.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in result.parameters())
    assert differing(result, state_of(masked))  # control: something was trained


def test_what_comes_behind_the_last_block_stays() -> None:
    model, masked, plan, data = masked_only()
    result = fxprune.recover(model, masked, plan, data, steps=10)
    changed = differing(result, state_of(masked))
    assert "second.3.weight" in changed
    assert not any(name.startswith("head") for name in changed)


def test_equal_arguments_give_equal_weights_and_leave_random_numbers_alone() -> None:
    model, masked, plan, data = masked_only()
    torch.manual_seed(3)
    first = fxprune.recover(model, masked, plan, data, steps=4, augment="flip+crop")
    drawn = torch.rand(1)
    second = fxprune.recover(model, masked, plan, data, steps=4, augment="flip+crop")
    assert not differing(second, state_of(first))
    other = fxprune.recover(model, masked, plan, data, steps=4, augment="flip+crop", seed=1)
    assert differing(other, state_of(first))
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)


def test_the_batches_of_a_loader_make_no_difference() -> None:
    model, masked, plan, data = masked_only()
    first = fxprune.recover(model, masked, plan, data, steps=3)
    labelled = [(part, torch.zeros(len(part))) for part in torch.split(data, 7)]
    assert not differing(fxprune.recover(model, masked, plan, labelled, steps=3), state_of(first))


# --- what it falls back to ------------------------------------------------------------------------------------------


def test_where_nothing_improves_the_refit_is_returned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, masked, plan, data = subject()
    monkeypatch.setattr(recovery, "STRETCH", 1e6)
    with caplog.at_level(logging.WARNING, "fxprune"):
        result = fxprune.recover(model, masked, plan, data, steps=8)
    assert not differing(result, state_of(masked))
    done = recovered(result)
    assert done.best == 0
    assert done.after == done.before
    assert "no step of 8 lowered the loss" in caplog.text


def test_the_best_state_is_kept_not_the_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, masked, plan, data = masked_only()
    monkeypatch.setattr(recovery, "DIVERGED", float("inf"))
    monkeypatch.setattr(recovery, "schedule", lambda done: 1.0 if done < 0.5 else 100.0)
    result = fxprune.recover(model, masked, plan, data, steps=20)
    done = recovered(result)
    assert 0 < done.best <= 10
    assert done.after < done.before
    last = fxprune.recover(model, masked, plan, data, steps=20, checkpoint=tmp_path / "state.pt")
    assert not differing(last, state_of(result))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    kept = dict(result.named_parameters())
    assert all(torch.equal(kept[name], value) for name, value in state["best"].items())
    assert not all(torch.equal(kept[name], weight["value"]) for name, weight in state["weights"].items())  # control


def test_where_it_diverges_it_goes_on_with_smaller_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, masked, plan, data = masked_only()
    monkeypatch.setattr(recovery, "STRETCH", 1e4)
    assert recovered(fxprune.recover(model, masked, plan, data, steps=200)).best > 0
    monkeypatch.setattr(recovery, "DIVERGED", float("inf"))  # control
    assert recovered(fxprune.recover(model, masked, plan, data, steps=200)).best == 0


# --- stopping and going on ------------------------------------------------------------------------------------------


class Killed(KeyboardInterrupt):
    pass


class Kill:
    """An augmentation that changes nothing and kills the run at one of its calls."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.calls = at, 0

    def __call__(self, batch: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise Killed
        return batch + 0.01 * torch.randn_like(batch)


def test_after_a_kill_it_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    model, masked, plan, data = masked_only()
    whole = fxprune.recover(model, masked, plan, data, steps=12, augment=Kill())
    file = tmp_path / "sub" / "recovery.pt"
    with pytest.raises(Killed):
        fxprune.recover(model, masked, plan, data, steps=12, augment=Kill(8), checkpoint=file)
    rest = Kill()
    resumed = fxprune.recover(model, masked, plan, data, steps=12, augment=rest, checkpoint=str(file))
    assert rest.calls == 12 - 7  # what was made is not made again
    assert not differing(resumed, state_of(whole))
    assert recovered(resumed).after == recovered(whole).after
    finished = Kill()
    fxprune.recover(model, masked, plan, data, steps=12, augment=finished, checkpoint=file)
    assert finished.calls == 0


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    model, masked, plan, data = subject()
    file = tmp_path / "recovery.pt"
    arguments: dict[str, Any] = {"steps": 2, "checkpoint": file}
    fxprune.recover(model, masked, plan, data, **arguments)
    for other in ({"steps": 3}, {"seed": 1}, {"augment": "flip"}):
        with pytest.raises(StorageError, match="of a recovery of other weights, with other images or settings; remove"):
            fxprune.recover(model, masked, plan, data, **arguments | other)
    with pytest.raises(StorageError, match="other images"):
        fxprune.recover(model, masked, plan, data + 1, **arguments)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(StorageError, match="no checkpoint of a recovery"):
        fxprune.recover(model, masked, plan, data, **arguments)
    with pytest.raises(StorageError, match="cannot be written"):
        fxprune.recover(model, masked, plan, data, steps=2, checkpoint=file / "below")


def test_the_time_is_kept() -> None:
    model, masked, plan, data = subject()
    done = recovered(fxprune.recover(model, masked, plan, data, seconds=0.5))
    assert 0.5 <= done.seconds < 5
    assert done.steps > 1
    assert recovered(fxprune.recover(model, masked, plan, data, seconds=60, steps=2)).steps == 2
    assert Recovery().limits == (recovery.STEPS, recovery.SECONDS)


# --- where it is called from ----------------------------------------------------------------------------------------


def test_compile_recovers() -> None:
    model, masked, plan, data = subject()
    arguments: dict[str, Any] = {"calibration": data, **PLANS["kernels"]}
    before = state_of(model)
    pruned = fxprune.compile(model, recover={"steps": 100}, **arguments)
    by_hand = fxprune.rewrite(fxprune.recover(model, masked, plan, data, steps=100), plan, data[:2])
    assert torch.equal(pruned(data), by_hand(data))
    assert not differing(model, before)
    refitted = fxprune.compile(model, **arguments)
    assert not torch.equal(refitted(data), pruned(data))


def test_it_recovers_what_was_pruned_in_training() -> None:
    model, _, _, data = subject()
    trained = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(trained.parameters(), 1e-4)
    sparsifier = fxprune.sparsify(trained, "one-shot", steps=4, ratio=0.5, optimizer=optimizer, example_inputs=data[:2])
    for _ in range(4):
        optimizer.zero_grad()
        trained(data).square().mean().backward()
        optimizer.step()
    result = fxprune.recover(model, trained, sparsifier.plan, data, steps=20)
    assert recovered(result).after < recovered(result).before
    assert result.training
    fxprune.rewrite(result, sparsifier.plan, data[:2])


@pytest.mark.parametrize("outer", ["no_grad", "inference_mode", "enable_grad"])
def test_the_mode_of_the_caller_does_not_matter(outer: str) -> None:
    model, masked, plan, data = masked_only()
    expected = fxprune.recover(model, masked, plan, data, steps=4)
    with getattr(torch, outer)():
        given = images()  # made in this mode
        found = fxprune.recover(model, masked, plan, given, steps=4)
        assert torch.is_grad_enabled() == (outer == "enable_grad")
    assert not differing(found, state_of(expected))
    assert not any(parameter.is_inference() for parameter in found.parameters())


def test_under_autocast_it_computes_in_bfloat16_and_learns() -> None:
    model, masked, plan, data = masked_only()
    plainly = fxprune.recover(model, masked, plan, data, steps=40)
    with torch.autocast("cpu", torch.bfloat16):
        found = fxprune.recover(model, masked, plan, data, steps=40)
        assert torch.is_autocast_enabled("cpu")
    assert differing(found, state_of(plainly))
    assert recovered(found).after == pytest.approx(recovered(plainly).after, rel=0.1)
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"maps": self.head(torch.relu(self.left(x)) + self.right(y))}


def test_several_inputs_and_images_of_several_sizes() -> None:
    model = TwoInputs().eval()
    batches = [tuple(torch.randn(8, 16, size, size) for _ in range(2)) for size in (6, 6, 8)]
    plan = fxprune.make_plan(model, 0.5, calibration=batches, form="overlap", groups=2)
    masked = fxprune.mask(model, plan)
    seen = []

    def augment(arguments: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        seen.append(tuple(tensor.shape for tensor in arguments))
        return arguments

    result = fxprune.recover(model, masked, plan, batches, steps=20, augment=augment)
    assert recovered(result).after < recovered(result).before
    assert {shapes[0][2] for shapes in seen} == {6, 8}
    assert all(first == second for first, second in seen)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_too() -> None:
    model, masked, plan, data = subject()
    here = fxprune.recover(model, masked, plan, data, steps=40)
    there = fxprune.recover(model.cuda(), masked.cuda(), plan, data, steps=40)
    assert {parameter.device.type for parameter in there.parameters()} == {"cuda"}
    assert recovered(there).after == pytest.approx(recovered(here).after, rel=0.05)
    with torch.autocast("cuda", torch.bfloat16):
        half = fxprune.recover(model, masked, plan, data.cuda(), steps=40)
    assert recovered(half).after == pytest.approx(recovered(here).after, rel=0.1)


# --- bad input ------------------------------------------------------------------------------------------------------


def test_bad_calibration_data_is_told_and_nothing_is_lost(tmp_path: Path) -> None:
    model, masked, plan, data = subject()
    before = state_of(model), state_of(masked)
    nothing = data.clone()
    nothing[3, 0, 0, 0] = float("nan")
    for wrong, message in (
        (data[:1], "the calibration data holds one sample; recovery learns from some and judges by others: pass at"),
        (nothing, "calibration batch 0 holds NaN or infinity; drop or repair these samples"),
        (data[:, :2], "calibration batch 0 does not fit the model"),
        ([data, data[:, :2]], "calibration batch 1 does not fit the model"),
        ([], "calibration holds no batch"),
    ):
        with pytest.raises(CalibrationError, match=message):
            fxprune.recover(model, masked, plan, wrong, steps=2, checkpoint=tmp_path / "none.pt")
    assert not (tmp_path / "none.pt").exists()
    assert not differing(model, before[0])
    assert not differing(masked, before[1])


def test_a_bad_augmentation_is_told() -> None:
    model, masked, plan, data = subject()

    def fails(batch: Tensor) -> Tensor:
        raise RuntimeError("no luck")

    for augment, message in (
        (
            lambda batch: batch[:, :, 1:],
            "augment gives float32 .* for a batch of float32 .*; it must keep shapes and ty",
        ),
        (lambda batch: batch.double(), "augment gives float64"),
        (lambda batch: None, "augment gives no tensor"),
        (lambda batch: batch / 0, "augment gives NaN or infinity"),
        (fails, "augment fails on a batch: no luck; repair it, or leave it out"),
    ):
        with pytest.raises(CalibrationError, match=message):
            fxprune.recover(model, masked, plan, data, steps=2, augment=augment)
    with pytest.raises(PlanError, match=r"augment is 'fliip' \(near: 'flip'"):
        fxprune.recover(model, masked, plan, data, augment="fliip")  # type: ignore[arg-type]
    two = TwoInputs().eval()
    batches = [(torch.randn(4, 16, 6, 6), torch.randn(4, 16, 6, 6))]
    plan = fxprune.make_plan(two, 0.5, calibration=batches)
    with pytest.raises(CalibrationError, match="augment='flip' is for networks that read one tensor of images"):
        fxprune.recover(two, fxprune.mask(two, plan), plan, batches, steps=2, augment="flip")


def test_what_does_not_fit_together_is_told() -> None:
    model, masked, plan, data = subject()
    with pytest.raises(PlanError, match=r"the plan drops entries that are not zero; pass what fxprune\.mask gave"):
        fxprune.recover(model, model, plan, data, steps=2)
    with pytest.raises(FxpruneError):
        fxprune.recover(model, net_of("plain"), plan, data, steps=2)
    with pytest.raises(PlanError, match="steps is 0; it must be a number of steps, 1 or more"):
        fxprune.recover(model, masked, plan, data, steps=0)
    with pytest.raises(PlanError, match="seconds is inf"):
        fxprune.recover(model, masked, plan, data, seconds=float("inf"))
    with pytest.raises(CalibrationError, match="recover learns from calibration data; pass calibration="):
        fxprune.compile(model, recover=True)
    with pytest.raises(
        CalibrationError, match="which cannot hold the small steps of a recovery; recover the model in f"
    ):
        fxprune.recover(model.bfloat16(), masked.bfloat16(), plan, data.bfloat16(), steps=2)


def test_images_on_which_the_dense_network_overflows_are_told() -> None:
    model, masked, plan, data = subject()
    with pytest.raises(CalibrationError, match="the blocks give NaN or infinity; check the data and the model"):
        fxprune.recover(model, masked, plan, data * 1e30, steps=2)


class Blind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y: Tensor = self.b(self.a(x))
        return y


def test_a_network_without_gradients_is_told() -> None:
    model, data = Blind().eval(), torch.randn(8, 16, 6, 6)
    plan = fxprune.make_plan(model, 0.5, calibration=data)
    with pytest.raises(CalibrationError, match="no gradient reaches the weights"):
        fxprune.recover(model, fxprune.mask(model, plan), plan, data, steps=2)


# --- steps ----------------------------------------------------------------------------------------------------------


def test_a_step_is_a_share_of_its_filter_whatever_the_scale() -> None:
    conv = nn.Conv2d(4, 3, 3)
    with torch.no_grad():
        conv.weight[0] *= 1e-3
        conv.weight[1] = 0
    kept = {id(conv.weight): torch.ones_like(conv.weight, dtype=torch.bool)}
    small = relative_steps.Moments(torch.zeros(4), torch.full((4,), 1e-6))
    large = relative_steps.Moments(torch.zeros(3), torch.ones(3))
    unit = relative_steps._units(conv, kept, small, large)["weight"]
    rms = conv.weight.detach().flatten(1).square().mean(1).sqrt()
    assert torch.allclose(unit[:, 0, 0, 0], rms)
    assert rms[0] < 1e-2 * rms[2]
    weight = relative_steps.Weight(conv.get_parameter("weight"), unit)
    before = conv.weight.detach().clone()
    conv.weight.grad = torch.randn_like(conv.weight) * 1e5
    weight.move(0.01)
    moved = (conv.weight.detach() - before).flatten(1).square().mean(1).sqrt()
    assert torch.allclose(moved, 0.01 * rms, rtol=1e-3)


def test_a_filter_that_takes_differences_of_large_inputs_moves_less() -> None:
    conv = nn.Conv2d(4, 4, 3, groups=2)
    small, large = (relative_steps.Moments(torch.zeros(4), torch.full((4,), size)) for size in (1e-4, 1e4))
    unit = relative_steps._units(conv, {}, large, small)["weight"]
    assert torch.allclose(unit, torch.tensor(1e-2 / (1e4 * 2 * 9) ** 0.5))


@pytest.mark.parametrize("normed", [False, True])
def test_a_step_leaves_the_mean_of_the_output_to_the_bias(normed: bool) -> None:
    layers = [nn.Conv2d(4, 6, 1, bias=not normed)] + [nn.BatchNorm2d(6)] * normed
    net = trace(randomize(nn.Sequential(*layers)).float().eval(), torch.zeros(2, 4, 3, 3)).module
    x = torch.rand(8, 4, 3, 3) + 5
    weights = relative_steps.weights_of(net, {}, lambda: net(x))
    before = net(x).detach()
    net(x).square().sum().backward()
    weights["0.weight"].move(0.1)
    after = net(x).detach()
    assert (after - before).abs().max() > 1e-3
    assert torch.allclose(after.mean((0, 2, 3)), before.mean((0, 2, 3)), atol=1e-4)
    weights["0.weight"].shift = None  # control
    weights["0.weight"].move(0.1)
    assert (net(x).mean((0, 2, 3)) - after.mean((0, 2, 3))).abs().max() > 1e-2


def test_steps_grow_and_shrink() -> None:
    assert relative_steps.schedule(0.0) == 0
    assert relative_steps.schedule(relative_steps.WARM_UP) == 1
    assert relative_steps.schedule(1.0) == pytest.approx(0)
