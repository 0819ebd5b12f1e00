"""Spaces, variation and the two evolutions, on losses that are known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope_export.config import FactorTier, LongRopeConfig
from longrope_export.errors import ConfigError
from longrope_export.search.evolution import EvolutionSettings, evolve
from longrope_export.search.longrope2 import CriticalSpace
from longrope_export.search.space import (
    START_TOKENS,
    SearchSpace,
    make_recovery_space,
    make_space,
    recovery_seeds,
)

WINDOW, DIM, THETA = 4096, 128, 10000.0


def plain(factors: tuple[float, ...] | None = None, length: int = WINDOW) -> LongRopeConfig:
    tier = FactorTier(length, factors or (1.0,) * (DIM // 2))
    return LongRopeConfig(THETA, DIM, WINDOW, length, (tier,))


def admits(space: SearchSpace, tier: FactorTier) -> bool:
    """Whether an individual keeps to the bounds and its lambda do not fall."""
    lambdas = space.lambdas(tier)
    within = lambdas.min() >= 1 - 1e-9 and (lambdas <= np.asarray(space.highest) + 1e-9).all()
    rising = (np.diff(lambdas) >= -1e-9).all()
    return bool(within and rising and tier.num_start_tokens in space.start_tokens)


@pytest.fixture
def space() -> SearchSpace:
    return make_space(plain(), 8 * WINDOW)


def test_the_space_is_that_of_the_papers_table_4(space: SearchSpace) -> None:
    assert space.highest == (10.0,) * 64
    assert space.start_tokens == START_TOKENS
    assert len(START_TOKENS) == 14
    assert space.attention == pytest.approx(math.sqrt(1 + math.log(8) / math.log(4096)))


def test_seeds_are_pi_ntk_and_yarn_and_keep_to_the_space(space: SearchSpace) -> None:
    seeds = space.seeds()
    assert set(seeds) == {"pi", "ntk", "yarn"}
    assert all(admits(space, tier) for tier in seeds.values())
    assert set(seeds["pi"].rescale_factors) == {8.0}
    assert seeds["ntk"].rescale_factors[0] == 1.0
    assert seeds["ntk"].rescale_factors[-1] == pytest.approx(8.0)
    assert seeds["yarn"].rescale_factors[20] == pytest.approx(1.0)  # LLaMA2: low 20, high 46
    assert seeds["yarn"].rescale_factors[46] == pytest.approx(8.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 1.0))
def test_variation_never_leaves_the_space(seed: int, chance: float) -> None:
    space = make_space(plain(), 8 * WINDOW, attention_range=(1.0, 1.5))
    rng = np.random.default_rng(seed)
    seeds = list(space.seeds().values())
    mutant = space.mutate(seeds[seed % 3], rng, chance)
    for _ in range(3):
        mutant = space.mutate(mutant, rng, chance)
    child = space.cross(mutant, seeds[(seed + 1) % 3], rng)
    assert admits(space, mutant)
    assert admits(space, child)
    assert 1.0 <= child.attention_factor <= 1.5


def test_mutated_lambda_stand_on_the_grid_and_change_with_the_given_chance(
    space: SearchSpace,
) -> None:
    rng = np.random.default_rng(0)
    ntk = space.seeds()["ntk"]
    shares = []
    for _ in range(200):
        mutant = space.mutate(ntk, rng, 0.3)
        changed = np.asarray(mutant.rescale_factors) != np.asarray(ntk.rescale_factors)
        shares.append(changed.mean())
        hundredths = np.asarray(mutant.rescale_factors)[changed] * 100
        # a gap between neighbours without a grid point in it leaves the lower neighbour
        near = np.abs(hundredths - hundredths.round()) < 1e-6
        assert near.mean() > 0.8
    assert np.mean(shares) == pytest.approx(0.3, abs=0.03)


def test_a_second_stage_multiplies_what_the_model_has() -> None:
    first = tuple(np.linspace(1, 32, 64).tolist())
    extended = plain(first, 32 * WINDOW)
    extended = replace(extended, tiers=(replace(extended.tiers[0], attention_factor=1.19),))
    space = make_space(extended, 8 * 32 * WINDOW)
    assert space.ratio == 8
    pi = space.seeds()["pi"]
    assert pi.rescale_factors == pytest.approx([8 * f for f in first])
    assert pi.attention_factor == pytest.approx(
        1.19 * math.sqrt(1 + math.log(8) / math.log(32 * WINDOW))
    )
    assert space.start_tokens == (0,)  # its own rope is not plain rope


def test_a_target_that_is_no_extension_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"handles 4096.*--recover"):
        make_space(plain(), WINDOW)


def test_recovery_stays_below_the_cap_and_begins_with_both_ends() -> None:
    factors = tuple(np.linspace(1, 32, 64).tolist())
    extended = plain(factors, 32 * WINDOW)
    space = make_recovery_space(extended, WINDOW, 0.5)
    seeds = recovery_seeds(space, extended)
    rng = np.random.default_rng(1)
    limit = np.maximum(0.5 * np.asarray(factors), 1.0)
    assert any(set(tier.rescale_factors) == {1.0} for tier in seeds.values())
    for tier in [*seeds.values(), *(space.mutate(t, rng, 0.5) for t in seeds.values())]:
        assert (np.asarray(tier.rescale_factors) <= limit + 1e-9).all()
    with pytest.raises(ConfigError, match="nothing to choose"):
        make_recovery_space(plain(), WINDOW // 2, 1.0)
    with pytest.raises(ConfigError, match="only shorter ones"):
        make_recovery_space(extended, 32 * WINDOW, 1.0)


# -- the evolutions


def distance(wanted: np.ndarray):  # type: ignore[no-untyped-def]
    """A loss with one minimum."""

    def score(tiers):  # type: ignore[no-untyped-def]
        logs = [np.log(np.asarray(tier.rescale_factors)) for tier in tiers]
        return [float(((values - wanted) ** 2).mean()) for values in logs]

    return score


def test_the_evolution_has_the_papers_numbers_and_budget() -> None:
    sizes = EvolutionSettings.for_length(131072)
    assert (sizes.population, sizes.mutations, sizes.crossovers) == (64, 16, 16)
    assert (sizes.chance, sizes.iterations, sizes.parents, sizes.documents) == (0.3, 40, 32, 5)
    halved = EvolutionSettings.for_length(1 << 20)
    assert (halved.population, halved.mutations, halved.crossovers) == (32, 8, 8)
    assert halved.documents == 3


def test_the_evolution_scores_1344_new_individuals_and_improves(space: SearchSpace) -> None:
    wanted = np.log(np.linspace(1, 8, 64))
    score, seen = distance(wanted), []

    def counting(tiers):  # type: ignore[no-untyped-def]
        seen.extend(tiers)
        return score(tiers)

    seeds = list(space.seeds().values())
    generations: list[float] = []
    best = evolve(
        space,
        seeds,
        EvolutionSettings(),
        counting,
        np.random.default_rng(0),
        on_generation=lambda number, best: generations.append(best[0]),
    )
    assert len(seen) == len(set(seen)) == 64 + 40 * 32  # method: 1,344 evaluations
    assert seen[:3] == seeds
    assert len(generations) == 41
    assert generations == sorted(generations, reverse=True)
    assert best[0][0] < 0.6 * min(score(seeds))
    assert all(admits(space, tier) for _, tier in best)


def test_the_same_seed_gives_the_same_search_bit_for_bit(space: SearchSpace) -> None:
    score = distance(np.log(np.linspace(1, 8, 64)))
    sizes = EvolutionSettings(population=12, mutations=4, crossovers=4, iterations=6, parents=6)

    def run(seed: int):  # type: ignore[no-untyped-def]
        seeds = list(space.seeds().values())
        return evolve(space, seeds, sizes, score, np.random.default_rng(seed))

    assert run(7) == run(7)
    assert run(7) != run(8)


def test_longrope2_individuals_have_its_shape(space: SearchSpace) -> None:
    critical = CriticalSpace.of(space)
    assert critical.highest == 46  # LLaMA2's theoretical critical pair
    rng = np.random.default_rng(3)
    for _ in range(50):
        tier = critical.draw(rng)
        for _ in range(3):
            tier = critical.mutate(tier, rng, 0.3)
        tier = critical.cross(tier, critical.draw(rng), rng)
        lambdas = np.asarray(tier.rescale_factors)
        c = critical.critical_of(tier)
        assert critical.lowest <= c <= critical.highest
        assert (lambdas[c:] >= 8.0 - 1e-9).all()
        assert (lambdas[c:] <= 16.0 + 1e-9).all()
        assert (np.diff(lambdas) >= -1e-9).all()
        expected = lambdas[c] ** (np.arange(c) / c)  # the base that lambda at c implies
        assert lambdas[:c] == pytest.approx(expected)


def test_longrope2_finds_the_critical_pair_of_a_known_optimum(space: SearchSpace) -> None:
    critical = CriticalSpace.of(space)
    wanted = critical.compose(38, np.full(26, 9.5), 0, 1.0)
    score = distance(np.log(np.asarray(wanted.rescale_factors)))
    rng = np.random.default_rng(0)
    sizes = EvolutionSettings(iterations=20)
    best = evolve(critical, [critical.draw(rng) for _ in range(64)], sizes, score, rng)
    # no mutation changes the critical pair: the winner is the best of those that were drawn
    assert abs(critical.critical_of(best[0][1]) - 38) <= 3


def test_phi_4_minis_published_factors_are_an_individual_of_longrope2() -> None:
    # its shipped factors are 32.03^(i/31) below pair 31 and rise to 47.77 from there on
    native = LongRopeConfig(10000.0, 96, 4096, 4096, (FactorTier(4096, (1.0,) * 48),))
    critical = CriticalSpace.of(make_space(native, 131072))
    tier = critical.compose(31, np.linspace(32.03, 47.77, 17), 0, 1.0)
    assert critical.critical_of(tier) == 31
    assert tier.rescale_factors[:3] == pytest.approx([1.0, 32.03 ** (1 / 31), 32.03 ** (2 / 31)])
