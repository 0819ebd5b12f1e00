"""The smooth family against YaRN, and COBYQA on a loss that is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from longrope_export.config import FactorTier
from longrope_export.errors import ConfigError
from longrope_export.methods import yarn_factors
from longrope_export.rope import compute_inv_freq
from longrope_export.search.family import (
    LOWER,
    STARTS,
    UPPER,
    SmoothFamily,
    from_coordinates,
    minimise,
)

SPEEDS = compute_inv_freq(100000.0, 64)


@pytest.mark.parametrize("length", [16384, 32768, 1 << 20])
def test_its_centre_is_yarn_with_an_unrounded_ramp(length: int) -> None:
    ratio = length / 8192
    found = SmoothFamily().tier(length, SPEEDS, FactorTier(8192, (1.0,) * 32))
    assert found.rescale_factors == pytest.approx(
        yarn_factors(SPEEDS, ratio, 8192, ramp="code-exact").tolist()
    )
    assert found.attention_factor == pytest.approx(1 + 0.1 * np.log(ratio))
    assert from_coordinates(np.zeros(5)) == SmoothFamily()


def test_a_member_fits_every_length_and_grows_with_it() -> None:
    family = from_coordinates(np.asarray([-1.0, -1.0, 0.5, 1.0, -0.5]))
    tiers = [family.tier(n, SPEEDS, FactorTier(8192, (1.0,) * 32)) for n in (8193, 9000, 12000)]
    for before, after in itertools.pairwise(tiers):
        assert (np.asarray(before.rescale_factors) <= np.asarray(after.rescale_factors)).all()
        assert before.attention_factor < after.attention_factor
    assert max(tiers[0].rescale_factors) == pytest.approx(1.0, abs=1e-3)  # no step at the window


def test_every_coordinate_within_the_bounds_is_a_member_with_rising_factors() -> None:
    rng = np.random.default_rng(0)
    for point in [*STARTS, *rng.uniform(LOWER, UPPER, (200, 5))]:
        assert (np.asarray(point) >= LOWER).all() and (np.asarray(point) <= UPPER).all()
        lambdas = from_coordinates(point).lambdas(SPEEDS, 8192, 65536)
        assert (np.diff(lambdas) >= -1e-9).all()
        assert lambdas[0] >= 1.0


def test_members_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="beta_fast 1 must be above beta_slow 2"):
        SmoothFamily(beta_fast=1.0, beta_slow=2.0)
    with pytest.raises(ConfigError, match="bend must be positive, got nan"):
        SmoothFamily(bend=float("nan"))


def test_a_known_minimum_is_found_in_few_evaluations() -> None:
    wanted = np.asarray([-1.2, 0.8, 0.3, 0.5, -0.7])
    seen = []

    def loss(point: np.ndarray) -> float:
        seen.append(point.copy())
        return float((np.asarray([1, 2, 1, 3, 2]) * (point - wanted) ** 2).sum())

    minimise(loss, np.zeros(5), 40)
    assert len(seen) <= 40
    best = min(seen, key=lambda point: ((point - wanted) ** 2).sum())
    assert np.abs(best - wanted).max() < 0.1
