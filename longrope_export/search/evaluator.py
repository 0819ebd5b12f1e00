"""Scores candidates: from the log where they are there, else by the workers, within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from longrope_export.config import FactorTier, LongRopeConfig, SwitchPolicy
from longrope_export.errors import ConfigError
from longrope_export.rope import FloatArray
from longrope_export.search.jobs import Job, Score, Span, Workers, essence
from longrope_export.search.state import RunFolder


class BudgetSpentError(Exception):
    """The budget does not allow another evaluation; what was found so far stands."""


@dataclass(frozen=True)
class Budget:
    """When a search ends. None: no limit.

    Attributes:
        tokens: forward tokens, as Score counts them.
        seconds: wall time of the evaluations, summed over workers; what was logged by an earlier
            part of the run counts, so that a resumed run ends where an unbroken one does.
    """

    tokens: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("tokens", self.tokens), ("minutes", self.seconds)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"--budget-{name} must be above 0, got {value}")


@dataclass(frozen=True)
class Progress:
    """What an observer is told after each evaluation.

    Attributes:
        evaluations, tokens, seconds: spent so far.
        share: of the budget, or of what is expected, that is spent, 0 to 1; of this call's jobs where
            neither is known.
    """

    evaluations: int
    tokens: int
    seconds: float
    share: float


class Evaluator:
    """Answers jobs.

    Args:
        workers: compute what is not in the log.
        run: the log.
        budget: checked before each call that would compute something.
        observe: told after each evaluation.

    Attributes:
        evaluations, tokens, seconds: spent so far.
        expected: evaluations that there will be, as far as is known; for the progress alone.
    """

    def __init__(
        self,
        workers: Workers,
        run: RunFolder,
        budget: Budget | None = None,
        observe: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self._workers, self._run, self._observe = workers, run, observe
        self.budget = budget or Budget()
        self._counted: set[str] = set()
        self._prefixes: set[tuple[int, str]] = set()
        self.evaluations, self.tokens, self.seconds = 0, 0, 0.0
        self.expected: int | None = None
        self._call = (0, 1)  # evaluations before the call under way, and how many it adds

    def scores(self, jobs: Sequence[Job]) -> list[Score]:
        """One score for each job.

        Raises:
            BudgetSpentError: before anything is computed that the budget does not allow.
            LongRopeError: what a worker raised.
        """
        keys = [job.key for job in jobs]
        fresh = [key for key in keys if key not in self._counted]
        if fresh and self.is_spent:
            raise BudgetSpentError
        self._call = self.evaluations, max(1, len(set(fresh)))
        known = self._run.scores
        missing = {key: job for key, job in zip(keys, jobs, strict=True) if key not in known}
        names = list(missing)
        for key, job in zip(keys, jobs, strict=True):
            self._count_prefix(job)
            if key in known:
                self._count(key, known[key])

        def done(index: int, score: Score) -> None:
            self._run.add(names[index], score)
            self._count(names[index], score)

        if missing:
            self._workers.run(list(missing.values()), done)
        return [known[key] for key in keys]

    @property
    def is_spent(self) -> bool:
        """Whether the budget is used up."""
        return max(self._shares(), default=0.0) >= 1

    @property
    def tokens_left(self) -> float:
        """Forward tokens that the budget allows, of its minutes at the pace so far; may be infinite."""
        spent = max(self._shares(), default=0.0)
        return self.tokens * (1 / spent - 1) if spent else math.inf

    def allow(self, budget: Budget, share: float) -> None:
        """From here on, at most a share (above 0, at most 1) of what is left of a budget."""
        tokens, seconds = budget.tokens, budget.seconds
        if tokens is not None:
            tokens = self.tokens + math.ceil(max(tokens - self.tokens, 0) * share)
        if seconds is not None:
            seconds = self.seconds + max(seconds - self.seconds, 0) * share
        self.budget = Budget(tokens, seconds)

    def _shares(self) -> list[float]:
        shares = []
        if self.budget.tokens is not None:
            shares.append(self.tokens / self.budget.tokens)
        if self.budget.seconds is not None:
            shares.append(self.seconds / self.budget.seconds)
        return shares

    def _count_prefix(self, job: Job) -> None:
        if job.prefix is not None:
            name = (job.document, essence(job.prefix))
            if name not in self._prefixes:
                self._prefixes.add(name)
                self.tokens += job.blocks[-1][0]

    def _count(self, key: str, score: Score) -> None:
        if key in self._counted:
            return
        self._counted.add(key)
        self.evaluations += 1
        self.tokens += score.tokens
        self.seconds += score.seconds
        shares = self._shares()
        if self.expected:
            shares.append(self.evaluations / self.expected)
        if not shares:
            before, count = self._call
            shares.append((self.evaluations - before) / count)
        share = min(max(shares), 1.0)
        self._observe(Progress(self.evaluations, self.tokens, self.seconds, share))


class Fitness:
    """Mean loss of one-tier candidates on a set of documents, whole windows.

    Args:
        template: the config whose only tier a candidate becomes.
        documents: indices, in the order in which a race uses them.
        blocks, prefix: as in Job; none for whole documents.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        template: Callable[[FactorTier], LongRopeConfig],
        documents: Sequence[int],
        blocks: tuple[Span, ...] = (),
        prefix: LongRopeConfig | None = None,
    ) -> None:
        self.evaluator, self.template = evaluator, template
        self.documents, self.blocks, self.prefix = list(documents), blocks, prefix

    def job(self, tier: FactorTier, document: int, *, gradient: bool = False) -> Job:
        """The pass over one document."""
        return Job(self.template(tier), document, self.blocks, self.prefix, gradient)

    def losses(self, tiers: Sequence[FactorTier]) -> FloatArray:
        """(tiers, documents) mean loss in nats per token."""
        jobs = [self.job(tier, document) for tier in tiers for document in self.documents]
        means = [score.mean for score in self.evaluator.scores(jobs)]
        return np.asarray(means).reshape(len(tiers), len(self.documents))

    def __call__(self, tiers: Sequence[FactorTier]) -> list[float]:
        """Mean over the documents, as the evolution minimises it."""
        return [float(row.mean()) for row in self.losses(tiers)]


def single_tier(config: LongRopeConfig) -> Callable[[FactorTier], LongRopeConfig]:
    """Makes the config in which one tier computes everything, as the papers score candidates."""

    def template(tier: FactorTier) -> LongRopeConfig:
        return replace(
            config,
            tiers=(tier,),
            max_position_embeddings=tier.max_length,
            switch=SwitchPolicy.SEQUENCE,
        )

    return template


@dataclass(frozen=True)
class Difference:
    """A paired difference of losses: mean and standard error over documents, nats per token.

    Attributes:
        mean: below 0 the first is better.
        error: standard error of the mean; infinite for one document.
        documents: how many.
    """

    mean: float
    error: float
    documents: int

    @classmethod
    def of(cls, first: FloatArray, second: FloatArray) -> Difference:
        """Of two lists of losses on the same documents, each (documents,)."""
        difference = np.asarray(first) - np.asarray(second)
        count = len(difference)
        error = float(difference.std(ddof=1) / math.sqrt(count)) if count > 1 else math.inf
        return cls(float(difference.mean()), error, count)

    @property
    def errors(self) -> float:
        """The difference in standard errors."""
        return self.mean / self.error if self.error > 0 else math.copysign(math.inf, self.mean)
