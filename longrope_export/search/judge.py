"""The held-out part of a search: what is chosen on validation documents and reported on test ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from longrope_export.config import LongRopeConfig, SwitchPolicy
from longrope_export.rope import FloatArray
from longrope_export.search.evaluator import Difference, Evaluator, single_tier
from longrope_export.search.jobs import Job, Score


@dataclass(frozen=True)
class Row:
    """One config on a set of documents.

    Attributes:
        name: what it is.
        loss: mean of the documents' mean losses, nats per token.
        against: the paired difference to the baseline; None for the baseline itself.
    """

    name: str
    loss: float
    against: Difference | None

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    def to_json(self) -> dict[str, Any]:
        against = None if self.against is None else asdict(self.against)
        if against and not math.isfinite(against["error"]):
            against["error"] = None  # of one document there is none, and JSON has no infinity
        return {
            "name": self.name,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "against_baseline": against,
        }


@dataclass(frozen=True)
class RuleRow:
    """One rule at a tier border on the validation documents.

    Attributes:
        switch: the rule.
        losses: (documents,) mean loss.
        stretches: perplexity of each stretch of one window, over all documents.
        needle_loss: nats per token of the answers to several keys.
        needle_hits, needle_tokens: tokens of those answers that were the most probable, and all.
    """

    switch: SwitchPolicy
    losses: tuple[float, ...]
    stretches: tuple[float, ...]
    needle_loss: float
    needle_hits: int
    needle_tokens: int


def losses_of(
    evaluator: Evaluator, configs: Sequence[LongRopeConfig], documents: Sequence[int]
) -> FloatArray:
    """(configs, documents) mean loss of whole passes, nats per token."""
    jobs = [Job(_computed(config), document) for config in configs for document in documents]
    means = [score.mean for score in evaluator.scores(jobs)]
    return np.asarray(means).reshape(len(configs), len(documents))


def tabulate(
    evaluator: Evaluator,
    configs: Mapping[str, LongRopeConfig],
    documents: Sequence[int],
    baseline: str,
) -> list[Row]:
    """One row for each config, with paired differences to the baseline."""
    losses = dict(
        zip(configs, losses_of(evaluator, list(configs.values()), documents), strict=True)
    )
    return [
        Row(
            name,
            float(row.mean()),
            None if name == baseline else Difference.of(row, losses[baseline]),
        )
        for name, row in losses.items()
    ]


def choose(
    evaluator: Evaluator, configs: Mapping[str, LongRopeConfig], documents: Sequence[int]
) -> str:
    """The name of the config with the lowest mean loss; of equals, the first."""
    means = losses_of(evaluator, list(configs.values()), documents).mean(axis=1)
    return list(configs)[int(means.argmin())]


def measure_rules(
    evaluator: Evaluator,
    config: LongRopeConfig,
    documents: Sequence[int],
    needles: Sequence[int],
    length: int | None = None,
) -> list[RuleRow]:
    """Both rules on documents and on several-key needles; of one tier there is one rule.

    Args:
        length: tokens of each document and needle text; None for the config's last length.
    """
    rows = []
    for switch in SwitchPolicy if len(config.tiers) > 1 else (config.switch,):
        under = _computed(replace(config, switch=switch), length)
        scores = evaluator.scores([Job(under, document) for document in documents])
        found = evaluator.scores([Job(under, document) for document in needles])
        tokens = sum(sum(score.counts) for score in found)
        rows.append(
            RuleRow(
                switch,
                tuple(score.mean for score in scores),
                _stretches(scores),
                sum(sum(score.losses) for score in found) / max(tokens, 1),
                sum(sum(score.hits) for score in found),
                tokens,
            )
        )
    return rows


def better_rule(rows: Sequence[RuleRow]) -> SwitchPolicy:
    """The rule with the lower loss on texts; within two standard errors, on needles."""
    if len(rows) == 1:
        return rows[0].switch
    first, second = rows
    difference = Difference.of(np.asarray(first.losses), np.asarray(second.losses))
    decided = abs(difference.errors) > 2 if len(first.losses) > 1 else difference.mean != 0
    if decided or first.needle_loss == second.needle_loss:
        return first.switch if difference.mean <= 0 else second.switch
    return first.switch if first.needle_loss < second.needle_loss else second.switch


def _computed(config: LongRopeConfig, length: int | None = None) -> LongRopeConfig:
    """What computes a document: under `sequence`, the one tier of its length (None: the last)."""
    if config.switch is SwitchPolicy.CAUSAL:
        return config
    tier = config.tiers[-1] if length is None else config.select_tier(length)
    return single_tier(config)(tier)


def _stretches(scores: Sequence[Score]) -> tuple[float, ...]:
    sums = np.sum([score.losses for score in scores], axis=0)
    counts = np.sum([score.counts for score in scores], axis=0)
    return tuple(np.exp(sums / np.maximum(counts, 1)).tolist())
