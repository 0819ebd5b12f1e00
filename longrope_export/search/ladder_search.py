"""A whole ladder: first as one smooth family, then tier by tier, each on the tokens it serves."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from longrope_export.config import FactorTier, LongRopeConfig, SwitchPolicy
from longrope_export.models.model import Model
from longrope_export.rope import FloatArray, compute_inv_freq
from longrope_export.search.evaluator import BudgetSpentError, Evaluator
from longrope_export.search.family import SmoothFamily, from_coordinates, minimise
from longrope_export.search.jobs import Job, Span

# the closed-form ladder that was best on SmolLM2: YaRN at each length, 0.6 of its logarithm
START = (0.0, 0.0, 0.0, 0.0, -0.5)
START_NAME = "yarn-ladder:0.6"
NEAR_LENGTHS = (0.85, 1.2)  # a tier is also tried with the factors of these multiples of its length
NEAR_ATTENTION = (-0.02, 0.02)  # and with its attention factor moved by these


@dataclass(frozen=True)
class LadderSettings:
    """How a ladder is searched.

    Attributes:
        lengths: of the tiers that are searched, rising, the last one the target.
        family_evaluations: members of the family that are tried.
        block_tokens: of each block in which the family is measured.
        num_blocks: blocks over the whole target, each behind its own prefix.
        tier_tokens: most tokens of each tier on which it is judged, from its beginning on; None
            for all of them.
        refine: whether single tiers are searched after the family.
    """

    lengths: tuple[int, ...]
    family_evaluations: int = 30
    block_tokens: int = 128
    num_blocks: int = 6
    tier_tokens: int | None = None
    refine: bool = True

    def expected_jobs(self, documents: int) -> int:
        """Passes of both stages."""
        candidates = 1 + len(NEAR_LENGTHS) + len(NEAR_ATTENTION)
        refined = candidates * len(self.lengths) if self.refine else 0
        return (self.family_evaluations + refined) * documents


class LadderSearch:
    """One search for a ladder.

    Args:
        model: the source.
        evaluator: answers jobs.
        documents: indices of the search documents, each as long as the target.
        on_best: told of each new best: loss in nats per token and where it comes from.
        on_seeds: told the loss of the closed form that the search begins at.
    """

    def __init__(
        self,
        model: Model,
        evaluator: Evaluator,
        documents: Sequence[int],
        settings: LadderSettings,
        on_best: Callable[[float, str], None] = lambda loss, origin: None,
        on_seeds: Callable[[dict[str, float]], None] = lambda losses: None,
    ) -> None:
        self.model, self.evaluator, self.documents = model, evaluator, list(documents)
        self.settings, self._on_best, self._on_seeds = settings, on_best, on_seeds
        native = model.native
        self._own = native.tiers[-1]
        self._speeds = compute_inv_freq(native.rope_theta, native.rotary_dim) / np.asarray(
            self._own.rescale_factors
        )

    def config(self, tiers: Sequence[FactorTier]) -> LongRopeConfig:
        """The model's own tiers and these, under `causal`."""
        return replace(
            self.model.native,
            tiers=(*self.model.native.tiers, *tiers),
            max_position_embeddings=tiers[-1].max_length,
            switch=SwitchPolicy.CAUSAL,
        )

    def member(self, family: SmoothFamily) -> LongRopeConfig:
        """The ladder of one member of the family."""
        return self.config([family.tier(n, self._speeds, self._own) for n in self.settings.lengths])

    def find_family(self) -> SmoothFamily:
        """The member with the lowest loss in blocks all over the target.

        Text before a block is computed once, under the member at START; beyond the first tier
        that leaves out how other factors would change its hidden states.
        """
        prefix = self.member(from_coordinates(np.asarray(START)))
        blocks = self._blocks()
        best = (np.inf, from_coordinates(np.asarray(START)))

        def loss(point: FloatArray) -> float:
            nonlocal best
            family = from_coordinates(point)
            config = self.member(family)
            jobs = [Job(config, document, blocks, prefix) for document in self.documents]
            mean = float(np.mean([score.mean for score in self.evaluator.scores(jobs)]))
            if best[0] == np.inf:
                self._on_seeds({START_NAME: mean})
            if mean < best[0]:
                best = mean, family
                self._on_best(mean, "smooth family")
            return mean

        with contextlib.suppress(BudgetSpentError):
            minimise(loss, np.asarray(START), self.settings.family_evaluations)
        return best[1]

    def refine(self, family: SmoothFamily) -> list[FactorTier]:
        """The tiers of a member, each in turn replaced by what serves its own tokens better.

        Earlier tiers are fixed when a later one is judged, and the cache before it is filled under
        them, so every comparison is exact.
        """
        found: list[FactorTier] = []
        window = self._own.max_length
        for begin, length in itertools.pairwise((window, *self.settings.lengths)):
            tier = family.tier(length, self._speeds, self._own)
            try:
                found.append(self._best_tier(found, begin, tier, family))
            except BudgetSpentError:
                found.append(tier)
        return found

    def _best_tier(
        self, found: list[FactorTier], begin: int, tier: FactorTier, family: SmoothFamily
    ) -> FactorTier:
        end = tier.max_length
        if self.settings.tier_tokens is not None:
            end = min(end, begin + self.settings.tier_tokens)
        prefix = replace(self.model.native, switch=SwitchPolicy.CAUSAL)
        if found:
            prefix = self.config(found)
        candidates = [tier, *self._near(tier, family)]
        configs = [self.config([*found, candidate]) for candidate in candidates]
        jobs = [Job(c, d, ((begin, end),), prefix) for c in configs for d in self.documents]
        losses = [score.mean for score in self.evaluator.scores(jobs)]
        means = np.reshape(losses, (len(candidates), -1)).mean(axis=1)
        best = int(means.argmin())
        self._on_best(float(means[best]), f"tier {tier.max_length}")
        return candidates[best]

    def _near(self, tier: FactorTier, family: SmoothFamily) -> list[FactorTier]:
        """The same tier with factors of neighbouring lengths, and with other attention factors."""
        near = []
        for multiple in NEAR_LENGTHS:
            length = max(round(tier.max_length * multiple), self._own.max_length + 1)
            other = family.tier(length, self._speeds, self._own)
            near.append(replace(tier, rescale_factors=other.rescale_factors))
        for step in NEAR_ATTENTION:
            near.append(replace(tier, attention_factor=round(tier.attention_factor + step, 6)))
        return near

    def _blocks(self) -> tuple[Span, ...]:
        """Blocks spread evenly from the model's window to the end of the target."""
        first, last = self._own.max_length, self.settings.lengths[-1]
        size = max(1, min(self.settings.block_tokens, (last - first) // self.settings.num_blocks))
        count = min(self.settings.num_blocks, last - first)
        starts = np.linspace(first, last - size, count).round().astype(int)
        return tuple((int(start), int(start) + size) for start in starts)
