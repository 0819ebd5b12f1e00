"""What is computed where texts are judged under both rules at a border."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest

from longrope_export.config import FactorTier, LongRopeConfig, SwitchPolicy
from longrope_export.search.jobs import Job, Score
from longrope_export.search.judge import measure_rules

TIERS = tuple(FactorTier(64 * 2**k, (1.0 + k,) * 4) for k in range(3))
CONFIG = LongRopeConfig(10000.0, 8, 64, 256, TIERS)


class Listener:
    """An evaluator that keeps what it is asked for."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def scores(self, jobs: Sequence[Job]) -> list[Score]:
        self.jobs += jobs
        return [Score((1.0,), (1,), (0,), 1, 0.0) for _ in jobs]


@pytest.mark.parametrize(("length", "place"), [(None, 2), (256, 2), (128, 1), (65, 1), (64, 0)])
def test_sequence_computes_a_text_under_the_tier_of_its_length(
    length: int | None, place: int
) -> None:
    listener = Listener()
    measure_rules(cast(Any, listener), CONFIG, [0], [1], length)
    by_rule = {SwitchPolicy.CAUSAL: TIERS, SwitchPolicy.SEQUENCE: TIERS[place : place + 1]}
    factors = [[tier.rescale_factors for tier in job.config.tiers] for job in listener.jobs]
    expected = [[tier.rescale_factors for tier in by_rule[rule]] for rule in SwitchPolicy]
    assert factors == [rows for rows in expected for _ in range(2)]
