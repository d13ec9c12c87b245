"""SR-GKP: roughness, the snake, the beam search against a plain restatement, and whole layers."""

import importlib
import itertools
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fxprune.errors import PlanError
from fxprune.methods import Matrix, srgkp
from fxprune.methods.kernel_selection import equal_pairs, select_greedily, similarity
from fxprune.methods.srgkp import deal_in_snake_order, roughness, select_by_beam
from fxprune.plans import GroupedKernels

srgkp_module = importlib.import_module("fxprune.methods.srgkp")  # the package's attribute is the function


def random_weight(filters: int, channels: int, size: int = 3, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).standard_normal((filters, channels, size, size))


def rough_by_hand(kernel: Matrix) -> float:
    rows, columns = kernel.shape
    total = 0.0
    for i, j in itertools.product(range(rows), range(columns)):
        for k, m in itertools.product((i - 1, i, i + 1), (j - 1, j, j + 1)):
            if 0 <= k < rows and 0 <= m < columns:
                total += abs(kernel[i, j] ** 2 - kernel[k, m] ** 2)
    return float(total)


@pytest.mark.parametrize("shape", [(3, 3), (1, 1), (5, 5), (1, 3), (2, 4)])
def test_roughness_by_hand(shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(0).standard_normal((3, 2, *shape))
    by_hand = [[rough_by_hand(kernel) for kernel in row] for row in weight]
    np.testing.assert_allclose(roughness(weight), by_hand, rtol=1e-12)
    assert roughness(np.full((1, 1, *shape), 2.0)).item() == 0


def test_the_snake() -> None:
    assert deal_in_snake_order(np.arange(9.0), 3).tolist() == [0, 1, 2, 2, 1, 0, 0, 1, 2]
    assert deal_in_snake_order(np.array([5.0, 1, 1, 3]), 2).tolist() == [0, 0, 1, 1]
    assert deal_in_snake_order(np.arange(4.0), 4).tolist() == [0, 1, 2, 3]
    assert deal_in_snake_order(np.arange(4.0), 1).tolist() == [0, 0, 0, 0]


def test_the_snake_is_fairer_than_blocks() -> None:
    scores = np.random.default_rng(0).random(64)
    sums = np.bincount(deal_in_snake_order(scores, 8), weights=scores)
    blocks = np.sort(scores).reshape(8, 8).sum(axis=1)
    assert np.ptp(sums) < 0.1 * np.ptp(blocks)


def beam_by_hand(similar: Matrix, rough: Matrix, kept: int, cost_share: float = 0.9) -> set[int]:
    """The beam search on tuples, one set after the other."""
    channels = len(similar)
    first_ranked = min(kept, 4)
    outside = channels - first_ranked
    balance = first_ranked * (first_ranked - 1) / 2 / outside if outside else 0.0

    def cost(chosen: tuple[int, ...]) -> float:
        pairs = sum(similar[i, j] for i, j in itertools.combinations(sorted(chosen), 2))
        rest = [max(similar[p, j] for j in chosen) for p in range(channels) if p not in chosen]
        return round(float(pairs - balance * sum(rest)), 9)

    def roughness_of(chosen: tuple[int, ...]) -> float:
        return round(float(sum(rough[c] for c in sorted(chosen))), 9)

    candidates: list[tuple[int, ...]] = []
    for start in range(channels):
        beam: list[tuple[int, ...]] = [(start,)]
        for step in range(1, kept):
            grown: list[tuple[int, ...]] = []
            for chosen in beam:
                left = [c for c in range(channels) if c not in chosen]
                left.sort(key=lambda c: sum(similar[s, c] for s in chosen))
                grown += [(*chosen, c) for c in left[:2]]
            beam = grown
            if step % 3 == 0:
                by_cost = sorted(beam, key=cost, reverse=True)
                cost_rank = {chosen: rank for rank, chosen in enumerate(by_cost)}
                by_rough = sorted(by_cost, key=roughness_of, reverse=True)
                rank = {
                    chosen: cost_share * cost_rank[chosen] + (1 - cost_share) * rough_rank
                    for rough_rank, chosen in enumerate(by_rough)
                }
                beam = sorted(by_rough, key=lambda chosen: rank[chosen], reverse=True)[:2]
        candidates += beam
    best = min(candidates, key=cost)
    return set(best)


CASES = [(4, 2), (4, 4), (6, 4), (8, 5), (9, 8), (10, 7), (12, 6), (16, 8), (16, 9), (5, 1)]


def case(channels: int, seed: int) -> tuple[Matrix, Matrix]:
    weight = random_weight(2, channels, seed=seed) * 0.3
    return similarity(weight), roughness(weight).sum(axis=0)


@pytest.mark.parametrize("channels,kept", CASES)
@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_that_of_the_plain_search(channels: int, kept: int, seed: int) -> None:
    similar, rough = case(channels, seed)
    chosen = select_by_beam(similar, rough, kept)
    assert chosen.tolist() == sorted(beam_by_hand(similar, rough, kept))


def test_control_another_mix_of_ranks_is_seen() -> None:
    cases = [case(16, seed) for seed in range(10)]
    assert any(set(select_by_beam(*pair, 9)) != beam_by_hand(*pair, 9, cost_share=0.1) for pair in cases)


def test_smooth_kernels_are_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Roughness that is turned round makes the kept kernels rougher; its published share is too small to show it."""
    monkeypatch.setattr(srgkp_module, "COST_SHARE", 0.1)
    smooth, reverse = 0.0, 0.0
    for seed in range(20):
        similar, rough = case(12, seed)
        smooth += rough[select_by_beam(similar, rough, 5)].sum()
        reverse += rough[select_by_beam(similar, -rough, 5)].sum()
    assert smooth < reverse


def groups_of(out_order: tuple[int, ...], groups: int) -> set[frozenset[int]]:
    return {frozenset(row) for row in np.array(out_order).reshape(groups, -1).tolist()}


@pytest.mark.parametrize("size", [3, 5])
def test_a_layer(size: int) -> None:
    weight = random_weight(12, 8, size)
    clustering = srgkp(weight, 3, 5)
    labels = deal_in_snake_order(roughness(weight).sum(axis=1), 3)
    assert groups_of(clustering.out_order, 3) == {frozenset(np.flatnonzero(labels == g).tolist()) for g in range(3)}
    for members, kept in zip(np.array(clustering.out_order).reshape(3, 4), clustering.kept, strict=True):
        similar, rough = similarity(weight[members]), roughness(weight[members]).sum(axis=0)
        assert set(kept) == beam_by_hand(similar, rough, 5)
    assert srgkp(weight, 3, 5) == clustering


def test_kernels_of_one_entry_go_by_their_sum_and_the_greedy_search() -> None:
    weight = random_weight(8, 10, size=1)
    clustering = srgkp(weight, 2, 4)
    labels = deal_in_snake_order(-weight.sum(axis=(1, 2, 3)), 2)
    assert groups_of(clustering.out_order, 2) == {frozenset(np.flatnonzero(labels == g).tolist()) for g in range(2)}
    for members, kept in zip(np.array(clustering.out_order).reshape(2, 4), clustering.kept, strict=True):
        assert select_greedily(similarity(weight[members]), 4, 1, equal_pairs(10, 4, 1)).tolist() == list(kept)


@pytest.mark.parametrize("filters,groups,channels", [(6, 3, 5), (4, 1, 3), (4, 4, 2), (10, 2, 1)])
@pytest.mark.parametrize("size", [1, 3])
def test_odd_layers(filters: int, groups: int, channels: int, size: int) -> None:
    generator = np.random.default_rng(0)
    for weight in (
        generator.standard_normal((filters, channels, size, size)),
        np.zeros((filters, channels, size, size)),
        np.ones((filters, channels, size, size)),
    ):
        for kept in range(1, channels + 1):
            clustering = srgkp(weight, groups, kept)
            kernels = GroupedKernels(clustering.out_order, clustering.kept, channels, 0.5)
            assert (kernels.group_width, len(clustering.kept[0])) == (filters // groups, kept)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(PlanError, match="6 filters do not divide into 4 groups"):
        srgkp(random_weight(6, 3), 4, 2)
    for kept in (0, 4):
        with pytest.raises(PlanError, match=f"cannot keep {kept} of 3 channels"):
            srgkp(random_weight(6, 3), 3, kept)


@pytest.mark.shared
def test_resnet20() -> None:
    root = Path(os.environ.get("FXPRUNE_SHARED", Path(__file__).parents[3] / "shared"))
    if not (root / "weights").is_dir():
        pytest.skip("no trained weights; set FXPRUNE_SHARED to a folder that has them")
    state = torch.load(root / "weights/cifar10/resnet20_choH_sd.pt", map_location="cpu", weights_only=True)
    layers = [value.double().numpy() for key, value in state.items() if key.startswith("layer") and value.dim() == 4]
    assert len(layers) == 18
    start = time.perf_counter()
    for weight in layers:
        filters, channels = weight.shape[:2]
        clustering = srgkp(weight, 8, channels * 9 // 16)
        kernels = GroupedKernels(clustering.out_order, clustering.kept, channels, 7 / 16)
        assert (kernels.groups, kernels.group_width) == (8, filters // 8)
    print(f"\nSR-GKP, ResNet-20, 18 layers: {time.perf_counter() - start:.1f} s")
