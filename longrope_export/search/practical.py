"""The practical search: what finds good factors with a small part of the paper's evaluations.

A smooth family of five parameters first, by a quadratic model of the loss (COBYQA); then the factors
one by one, by the loss's own gradient; then start-token windows and the paper's mutations for as
long as the budget lasts. Every proposal after the first stage has to win a race on whole windows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from longrope_export.config import FactorTier
from longrope_export.errors import ConfigError
from longrope_export.rope import FloatArray, yarn_attention_factor
from longrope_export.search.evaluator import BudgetSpentError, Difference, Fitness
from longrope_export.search.family import STARTS, from_coordinates, minimise
from longrope_export.search.scorer import GRADIENT_COST
from longrope_export.search.space import SearchSpace, with_start

HOPELESS = 0.15  # nats behind the best on the cheap fitness: such a candidate sees no whole window
CLEARLY = 2.0  # standard errors behind the champion at which a challenger leaves a race
FAR = 0.03  # nats behind after one document, when there is no standard error yet
GRADIENT_BATCH = 2  # documents per step
RACES = 2  # of mutations, times the patience after which a practical search has converged
# turns at the end of the target by which a pair moves, in the first and the last step
LEARNING_RATE = (0.04, 0.004)
ATTENTION_RATE = 0.2  # of that, for ln(attention factor)


@dataclass(frozen=True)
class PracticalSettings:
    """How much each stage may do.

    Attributes:
        family_evaluations: members of the smooth family that are tried; 0 leaves it out.
        gradient_steps: steps along the gradient; 0 leaves it out.
        litter: challengers of one race of the last stage.
        patience: races of the last stage without a new champion after which the search has
            converged.
    """

    family_evaluations: int = 40
    gradient_steps: int = 24
    litter: int = 8
    patience: int = 4

    def challengers(self, start_windows: int) -> int:
        """Roughly how many will race: other start windows, mutations until it has converged."""
        return start_windows - 1 + RACES * self.patience * self.litter

    def expected_jobs(self, seeds: int, documents: int, start_windows: int) -> int:
        """Roughly how many passes there will be: a race sees two documents of each challenger."""
        whole = (seeds + self.family_evaluations) * documents
        raced = 2 * self.challengers(start_windows)
        return seeds + whole + self.gradient_steps * GRADIENT_BATCH + raced

    def __post_init__(self) -> None:
        for name in ("family_evaluations", "gradient_steps"):
            if getattr(self, name) < 0:
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} must be 0 or more, got {getattr(self, name)}")


@dataclass
class Champion:
    """The best so far.

    Attributes:
        tier: the individual.
        losses: (documents,) on the search documents.
        origin: the stage that found it.
    """

    tier: FactorTier
    losses: FloatArray
    origin: str

    @property
    def mean(self) -> float:
        return float(self.losses.mean())


@dataclass
class PracticalSearch:
    """One practical search for one tier.

    Args:
        space: bounds, start-token windows, the range of the attention factor.
        fitness: whole windows of the search documents.
        cheap: moved blocks, only to throw out the hopeless; None without.
        rng: drives the last stage.
        on_champion: told of each new champion.
        on_seeds: told the losses of the seeds that were not hopeless.
    """

    space: SearchSpace
    fitness: Fitness
    cheap: Fitness | None
    rng: np.random.Generator
    settings: PracticalSettings = field(default_factory=PracticalSettings)
    on_champion: Callable[[Champion], None] = lambda champion: None
    on_seeds: Callable[[dict[str, float]], None] = lambda losses: None
    champions: list[Champion] = field(default_factory=list)

    def run(self, seeds: dict[str, FactorTier]) -> list[Champion]:
        """All champions, the last one the best; at least the best seed.

        Args:
            seeds: named closed forms and whatever else to begin with.
        """
        with contextlib.suppress(BudgetSpentError):
            self._seed(seeds)
            self._family()
            self._gradient()
            self._start_tokens()
            self._evolve()
        return self.champions

    @property
    def best(self) -> Champion:
        """The champion."""
        return self.champions[-1]

    def _crown(self, tier: FactorTier, losses: FloatArray, origin: str) -> None:
        self.champions.append(Champion(tier, losses, origin))
        self.on_champion(self.best)

    def _seed(self, seeds: dict[str, FactorTier]) -> None:
        names = list(seeds)
        if self.cheap is not None:
            cheap = np.asarray(self.cheap([seeds[name] for name in names]))
            names = [
                n for n, loss in zip(names, cheap, strict=True) if loss < cheap.min() + HOPELESS
            ]
        losses = self.fitness.losses([seeds[name] for name in names])
        self.on_seeds(dict(zip(names, losses.mean(axis=1).tolist(), strict=True)))
        order = int(losses.mean(axis=1).argmin())
        self._crown(seeds[names[order]], losses[order], f"seed {names[order]}")

    def _family(self) -> None:
        """Minimise over the smooth family; the same documents for all, so there is no noise."""
        if not self.settings.family_evaluations:
            return

        def loss(point: FloatArray) -> float:
            member = from_coordinates(point)
            lambdas = member.lambdas(speeds, self.space.window, self.space.length)
            relative = yarn_attention_factor(self.space.ratio, member.attention_strength)
            tier = self.space.tier(
                self.space.clip(lambdas),
                self.best.tier.num_start_tokens,
                self.space.clip_attention(relative),
            )
            losses = self.fitness.losses([tier])[0]
            if losses.mean() < self.best.mean:
                self._crown(tier, losses, "smooth family")
            return float(losses.mean())

        speeds = np.asarray(self.space.inv_freq)
        start = min(STARTS, key=lambda point: loss(np.asarray(point)))
        minimise(loss, np.asarray(start), self.settings.family_evaluations)

    def _gradient(self) -> None:
        """Adam on ln(factor), in units of a pair's turns at the end of the target.

        Where a pair turns often, a small change of its factor moves its phase there by much, and the
        loss oscillates with it: equal steps in phase keep every pair where its slope still holds.
        """
        steps = self.settings.gradient_steps
        if not steps:
            return
        start = self.best.tier
        slowed = np.asarray(self.space.inv_freq) / self.space.lambdas(start)
        turns = slowed * self.space.length / (2 * np.pi)
        weight = np.minimum(1.0, 1.0 / turns)
        weight = np.append(weight, ATTENTION_RATE if self.space.attention_range else 0.0)
        point = np.log(np.append(self.space.lambdas(start), start.attention_factor))
        first, second = np.zeros(len(point)), np.zeros(len(point))
        documents = self.fitness.documents
        evaluator, proposals, last = self.fitness.evaluator, [start], start
        for step in range(steps):
            passes = GRADIENT_BATCH * GRADIENT_COST + len(proposals) * len(documents)
            if evaluator.tokens_left < passes * self.space.length:
                break  # what was found has to be raced as well
            batch = [
                documents[(step * GRADIENT_BATCH + k) % len(documents)]
                for k in range(GRADIENT_BATCH)
            ]
            jobs = [
                self.fitness.job(self._tier_at(point, start), d, gradient=True)
                for d in dict.fromkeys(batch)
            ]
            scores = evaluator.scores(jobs)
            slope = np.mean([score.gradient for score in scores], axis=0) * weight
            first, second = 0.8 * first + 0.2 * slope, 0.95 * second + 0.05 * slope**2
            unbiased = first / (1 - 0.8 ** (step + 1))
            size = np.sqrt(second / (1 - 0.95 ** (step + 1))) + 1e-8
            high, low = LEARNING_RATE
            rate = high + (low - high) * step / max(steps - 1, 1)
            point = point - rate * weight * unbiased / size
            if (step + 1) % max(steps // 4, 1) == 0:
                proposals.append(self._tier_at(point, start))
            last = self._tier_at(point, start)
        self._race([*proposals, last], "gradient")

    def _tier_at(self, point: FloatArray, start: FactorTier) -> FactorTier:
        """The individual at ln(lambda) and ln(attention factor), brought into order and bounds."""
        lambdas = self.space.clip(np.exp(point[:-1]).round(6))
        attention = round(float(np.exp(point[-1])) / self.space.own_attention, 6)
        return self.space.tier(
            lambdas, start.num_start_tokens, self.space.clip_attention(attention)
        )

    def _start_tokens(self) -> None:
        others = [n for n in self.space.start_tokens if n != self.best.tier.num_start_tokens]
        self._race([with_start(self.best.tier, n) for n in others], "start tokens")

    def _evolve(self) -> None:
        misses = 0
        while misses < self.settings.patience:
            chance = 0.3 / (1 + misses)
            litter = [
                self.space.mutate(self.best.tier, self.rng, chance)
                for _ in range(self.settings.litter)
            ]
            misses = 0 if self._race(litter, "mutation") else misses + 1

    def _race(self, challengers: Sequence[FactorTier], origin: str) -> bool:
        """Run challengers over the documents against the champion; whether one took its place."""
        alive = list(dict.fromkeys(tier for tier in challengers if tier != self.best.tier))
        winner = race(self.fitness, self.best.losses, alive)
        if winner is None:
            return False
        self._crown(*winner, origin)
        return True


def race(
    fitness: Fitness, champion: FloatArray, challengers: Sequence[FactorTier]
) -> tuple[FactorTier, FloatArray] | None:
    """The challenger that beats the champion by most over all documents, with its losses.

    Document by document, whoever is clearly behind the champion on the documents so far leaves,
    and so does the worse half of the rest (successive halving).

    Args:
        champion: (documents,) losses of the champion.
    """
    alive = {tier: np.empty(0) for tier in challengers}
    for count, document in enumerate(fitness.documents, start=1):
        if not alive:
            return None
        jobs = [fitness.job(tier, document) for tier in alive]
        for tier, score in zip(alive, fitness.evaluator.scores(jobs), strict=True):
            alive[tier] = np.append(alive[tier], score.mean)
        means = {tier: Difference.of(losses, champion[:count]) for tier, losses in alive.items()}
        hopeful = [
            tier
            for tier, d in means.items()
            if d.mean <= (FAR if count == 1 else max(CLEARLY * d.error, 0.0))
        ]
        hopeful.sort(key=lambda tier: means[tier].mean)
        if count < len(fitness.documents):
            hopeful = hopeful[: max(1, (len(alive) + 1) // 2)]
        alive = {tier: alive[tier] for tier in hopeful}
    best = min(alive, key=lambda tier: alive[tier].mean(), default=None)
    if best is None or not alive[best].mean() < champion.mean():
        return None
    return best, alive[best]
