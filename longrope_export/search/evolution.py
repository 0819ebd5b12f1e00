"""The evolution of LongRoPE (arXiv 2402.13753, Alg. 1) and of LongRoPE2 (2502.20082, Alg. 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from longrope_export.config import FactorTier
from longrope_export.errors import ConfigError

Score = Callable[[Sequence[FactorTier]], list[float]]
Scored = tuple[float, FactorTier]
LONG_TARGET = 256 * 1024  # above it the paper halves the population; it says "over 512k"
TOGETHER = 4  # individuals that are scored at once: a budget is looked at between them
TRIES = 20  # children that were seen before, after which a mutant is taken


@dataclass(frozen=True)
class EvolutionSettings:
    """Numbers of the paper (section 4.1); `for_length` gives the ones for a target.

    Attributes:
        population: individuals of the first generation.
        mutations, crossovers: children of each kind in each later one.
        chance: that a gene mutates.
        iterations: generations after the first.
        parents: how many of the best ever seen have children.
        documents: on which fitness is measured.
    """

    population: int = 64
    mutations: int = 16
    crossovers: int = 16
    chance: float = 0.3
    iterations: int = 40
    parents: int = 32
    documents: int = 5

    @property
    def individuals(self) -> int:
        """Of all generations."""
        return self.population + self.iterations * (self.mutations + self.crossovers)

    def __post_init__(self) -> None:
        if min(self.population, self.parents, self.documents) < 1 or self.iterations < 0:
            raise ConfigError(
                f"--population and --documents must be 1 or more, --iterations 0 or more: {self}"
            )

    @classmethod
    def for_length(cls, length: int) -> EvolutionSettings:
        """The paper's numbers; where it says nothing above 512k, half, and 40 iterations."""
        if length <= LONG_TARGET:
            return cls()
        return cls(population=32, mutations=8, crossovers=8, parents=16, documents=3)


class Variation(Protocol):
    """How individuals come about; SearchSpace and CriticalSpace have it."""

    def mutate(self, tier: FactorTier, rng: np.random.Generator, chance: float) -> FactorTier:
        """A changed copy; each gene changes with probability `chance`."""
        ...

    def cross(self, first: FactorTier, second: FactorTier, rng: np.random.Generator) -> FactorTier:
        """A child of two parents."""
        ...


def evolve(
    variation: Variation,
    seeds: Sequence[FactorTier],
    settings: EvolutionSettings,
    score: Score,
    rng: np.random.Generator,
    on_generation: Callable[[int, Scored], None] = lambda number, best: None,
    on_scored: Callable[[Scored], None] = lambda scored: None,
) -> list[Scored]:
    """Run the evolution.

    The first generation is the seeds and random mutations of them; each later one is mutants and
    crossings of the best ever seen. Only individuals that nobody has seen are scored.

    Args:
        seeds: at least one; the paper's are PI, NTK and YaRN.
        score: mean loss per token of each individual, lower is better. What it raises ends the
            search.
        rng: the same generator state gives the same search, bit for bit.
        on_generation: told of each generation: its number from 0, the best so far.
        on_scored: told of each individual that was scored.

    Returns:
        The best `settings.parents`, best first.
    """
    nursery = _Nursery(variation, settings, rng)
    generation = nursery.first(seeds)
    for number in range(settings.iterations + 1):
        scored: list[Scored] = []
        for first in range(0, len(generation), TOGETHER):
            part = generation[first : first + TOGETHER]
            scored += zip(score(part), part, strict=True)
            for entry in scored[first:]:
                on_scored(entry)
        nursery.best = sorted(nursery.best + scored, key=lambda entry: entry[0])
        nursery.best = nursery.best[: settings.parents]
        on_generation(number, nursery.best[0])
        if number < settings.iterations:
            generation = nursery.next()
    return nursery.best


class _Nursery:
    """Makes children that nobody has seen."""

    def __init__(
        self, variation: Variation, settings: EvolutionSettings, rng: np.random.Generator
    ) -> None:
        self.variation, self.settings, self.rng = variation, settings, rng
        self.best: list[Scored] = []
        self._seen: set[FactorTier] = set()

    def first(self, seeds: Sequence[FactorTier]) -> list[FactorTier]:
        generation = list(dict.fromkeys(seeds))
        self._seen.update(generation)
        count = len(generation)
        while len(generation) < self.settings.population:
            seed = generation[int(self.rng.integers(count))]
            generation.append(self._unseen(partial(self._mutant, seed)))
        return generation[: self.settings.population]

    def next(self) -> list[FactorTier]:
        mutants = [self._unseen(self._mutant) for _ in range(self.settings.mutations)]
        crossed = [self._unseen(self._crossed) for _ in range(self.settings.crossovers)]
        return mutants + crossed

    def _mutant(self, tier: FactorTier | None = None) -> FactorTier:
        if tier is None:
            tier = self.best[int(self.rng.integers(len(self.best)))][1]
        return self.variation.mutate(tier, self.rng, self.settings.chance)

    def _crossed(self) -> FactorTier:
        first, second = self.rng.choice(len(self.best), 2, replace=len(self.best) < 2)
        return self.variation.cross(self.best[first][1], self.best[second][1], self.rng)

    def _unseen(self, make: Callable[[], FactorTier]) -> FactorTier:
        """A new individual; after TRIES known ones a mutant, as in microsoft/LongRoPE."""
        for attempt in range(2 * TRIES):
            child = make() if attempt < TRIES or not self.best else self._mutant()
            if child not in self._seen:
                break
        self._seen.add(child)
        return child
