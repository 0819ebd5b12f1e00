"""From a space to finalists: LongRoPE's search, LongRoPE2's, and the practical one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from longrope_export.config import FactorTier
from longrope_export.search.evaluator import BudgetSpentError, Fitness
from longrope_export.search.evolution import EvolutionSettings, Scored, Variation, evolve
from longrope_export.search.longrope2 import CriticalSpace
from longrope_export.search.practical import Champion, PracticalSearch, PracticalSettings
from longrope_export.search.space import SearchSpace

FINALISTS = 3


class Algorithm(StrEnum):
    """Whose search.

    LONGROPE: arXiv 2402.13753 Alg. 1, as written.
    LONGROPE2: arXiv 2502.20082 Alg. 2.
    PRACTICAL: family, gradient and raced mutations; see practical.py.
    """

    LONGROPE = "longrope"
    LONGROPE2 = "longrope2"
    PRACTICAL = "practical"


@dataclass(frozen=True)
class Finalist:
    """What validation chooses from.

    Attributes:
        tier: the individual.
        loss: mean on the search documents, nats per token.
        origin: where it comes from.
    """

    tier: FactorTier
    loss: float
    origin: str


def find_finalists(
    algorithm: Algorithm,
    space: SearchSpace,
    seeds: Mapping[str, FactorTier],
    fitness: Fitness,
    cheap: Fitness | None,
    rng: np.random.Generator,
    *,
    evolution: EvolutionSettings,
    practical: PracticalSettings,
    on_best: Callable[[Finalist], None],
    on_seeds: Callable[[dict[str, float]], None],
) -> list[Finalist]:
    """Run one search for one tier.

    Args:
        seeds: named individuals to begin with.
        fitness, cheap: see PracticalSearch; the papers' searches use `fitness` alone.
        on_best: told of each new best individual.
        on_seeds: told the losses of the seeds that saw whole windows.

    Returns:
        At most FINALISTS, best first.
    """
    if algorithm is Algorithm.PRACTICAL:
        search = PracticalSearch(space, fitness, cheap, rng, practical)
        search.on_champion = lambda champion: on_best(_finalist(champion))
        search.on_seeds = on_seeds
        champions = search.run(dict(seeds))
        return [_finalist(champion) for champion in champions[::-1][:FINALISTS]]
    variation: Variation = space
    individuals = list(seeds.values())
    if algorithm is Algorithm.LONGROPE2:
        variation = CriticalSpace.of(space)
        individuals = [variation.draw(rng) for _ in range(evolution.population)]
    keeper = _Keeper(on_best)
    with contextlib.suppress(BudgetSpentError):
        if algorithm is Algorithm.LONGROPE:
            losses = fitness(individuals)
            for scored in zip(losses, individuals, strict=True):
                keeper.add(scored)
            on_seeds(dict(zip(seeds, losses, strict=True)))
        evolve(variation, individuals, evolution, fitness, rng, on_scored=keeper.add)
    return [Finalist(tier, loss, str(algorithm)) for loss, tier in keeper.best]


class _Keeper:
    """The best individuals of an evolution, also of one that the budget ends."""

    def __init__(self, on_best: Callable[[Finalist], None]) -> None:
        self.best: list[Scored] = []
        self._on_best = on_best

    def add(self, scored: Scored) -> None:
        if scored in self.best:
            return
        is_best = not self.best or scored[0] < self.best[0][0]
        self.best = sorted([*self.best, scored], key=lambda entry: entry[0])[:FINALISTS]
        if is_best:
            self._on_best(Finalist(scored[1], scored[0], "evolution"))


def _finalist(champion: Champion) -> Finalist:
    return Finalist(champion.tier, champion.mean, champion.origin)
