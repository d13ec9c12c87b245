"""Errors on images that were not fitted, against fits of one half that predict the other."""

import pytest
import torch
from torch import Tensor

import fxprune.calibration.held_out
from fxprune.calibration.held_out import PLENTY, RIDGES, choose_ridge, held_out_errors
from fxprune.calibration.least_squares import Part
from fxprune.calibration.samples import Samples

PARTS: list[Part] = [
    (torch.tensor([0, 3]), torch.tensor([5, 1, 9, 20, 2, 14])),
    (torch.tensor([2, 1]), torch.tensor([0, 1, 7, 8, 19, 3])),
]

EVERY = [(torch.arange(5), torch.arange(24))]


def problem(rows: int, noise: float = 0.5, unknowns: int = 24, filters: int = 5) -> tuple[Samples, Tensor]:
    """Samples, and dense weights that are near to the best ones."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(rows, unknowns, generator=generator)
    inputs[:, 1] += inputs[:, 5]
    prior = torch.randn(filters, unknowns, generator=generator).double()
    targets = inputs @ prior.float().T + noise * torch.randn(rows, filters, generator=generator)
    zero = torch.zeros(unknowns).double(), targets, torch.zeros(filters).double()
    return Samples(inputs, *zero, torch.ones(filters), torch.zeros(1, filters), centered=False), prior


def by_definition(samples: Samples, parts: list[Part], prior: Tensor, ridge: float) -> Tensor:
    errors = torch.zeros(len(prior)).double()
    first, second = samples.parts()
    for seen, unseen in ((first, second), (second, first)):
        gram = (seen.inputs.T @ seen.inputs / seen.rows).double()
        pull = ridge * float(gram.diagonal().mean())
        for outputs, columns in parts:
            rows, targets = seen.inputs[:, columns].double(), seen.targets[:, outputs].double()
            system = rows.T @ rows / len(rows) + pull * torch.eye(len(columns)).double()
            right = rows.T @ targets / len(rows) + pull * prior[outputs][:, columns].T
            found = unseen.inputs[:, columns].double() @ torch.linalg.solve(system, right)
            errors[outputs] += (unseen.targets[:, outputs].double() - found).square().mean(0) / 2
    return errors


@pytest.mark.parametrize("rows", [9, 300])
def test_errors_for_several_numbers_of_columns_are_those_of_fits_of_their_own(rows: int) -> None:
    samples, prior = problem(rows)
    counts = [1, 4, 6, 0]
    found = held_out_errors(samples, PARTS, prior, 0.01, counts)
    for count, errors in zip(counts, found, strict=True):
        parts = [(outputs, columns[:count]) for outputs, columns in PARTS]
        assert torch.allclose(errors, by_definition(samples, parts, prior, 0.01), rtol=1e-3, atol=1e-4)
        assert errors[4] == 0  # which is in no group
    assert not torch.allclose(found[2], found[0], rtol=0.1)
    backwards = held_out_errors(samples, [(o, c.flip(0)) for o, c in PARTS], prior, 0.01, counts)
    assert torch.allclose(backwards[2], found[2])
    assert not torch.allclose(backwards[1], found[1], rtol=0.01)  # the first columns are what counts


@pytest.mark.parametrize("rows", [8, 10, 13, 200])
@pytest.mark.parametrize("noise", [0.01, 3.0, 30.0])
def test_the_ridge_is_that_of_the_least_error_by_rows_and_by_columns(rows: int, noise: float) -> None:
    """With 10 rows or fewer the halves have fewer rows than a group has columns."""
    samples, prior = problem(rows, noise)
    errors = [float(by_definition(samples, PARTS, prior, ridge).sum()) for ridge in RIDGES]
    found = choose_ridge(samples, PARTS, prior)
    near = [errors[i] for i in range(5) if abs(i - RIDGES.index(found)) <= 1]
    assert errors[RIDGES.index(found)] == pytest.approx(min(near), rel=1e-3)


def test_noise_calls_for_a_stronger_pull() -> None:
    ridges = [choose_ridge(problem(200, noise)[0], EVERY, problem(200)[1] + 0.1) for noise in (0.01, 30.0)]
    assert ridges[0] < ridges[1]


def test_with_plenty_of_rows_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(fxprune.calibration.held_out, "_trials")
    samples, prior = problem(PLENTY * 24)
    assert choose_ridge(samples, PARTS, prior) == RIDGES[0]
    with pytest.raises(NameError, match="_trials"):
        choose_ridge(problem(PLENTY * 24 - 1)[0], PARTS, prior)


def test_inputs_that_float32_sees_as_singular_are_solved_all_the_same() -> None:
    samples, prior = problem(200)
    twin = samples.inputs.clone()
    twin[:, [1, 9, 20]] = 1e4 * twin[:, [5]]
    twin[:, 2] = twin[:, 14]
    samples = Samples(
        twin, samples.input_mean, samples.targets, samples.target_mean, samples.scale, samples.offset, False
    )
    assert choose_ridge(samples, PARTS, prior) in RIDGES
