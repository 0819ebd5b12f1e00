"""What a search is told, and what it tells while it runs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from longrope_export.config import LongRopeConfig, SwitchPolicy
from longrope_export.definition import to_json
from longrope_export.errors import ConfigError
from longrope_export.ladder import attention_factor
from longrope_export.search.algorithms import Algorithm
from longrope_export.search.evaluator import Budget, Progress
from longrope_export.search.evolution import EvolutionSettings
from longrope_export.search.needles import MAX_KEYS
from longrope_export.search.practical import PracticalSettings

CLOSED_FORMS = ("pi", "ntk", "dynamic-ntk", "yarn")
CLOSED_LADDERS = ("yarn", "yarn-ladder", "yarn-ladder:0.6")
LADDER_DOCUMENTS = 3
SEARCHED_ATTENTION = "search"


@dataclass(frozen=True)
class SearchOptions:
    """Everything that the result of a search depends on, beside model and texts.

    Attributes:
        target_length: tokens.
        algorithm: whose search; a ladder and a recovery have their own.
        ladder: tier lengths as parse_ladder reads them; None searches for one tier.
        closed_forms: what the result is compared with, on validation and test documents: methods,
            and for a ladder METHOD-ladder or METHOD-ladder:STRENGTH; empty takes the usual ones.
        warm_start: a config whose last tier is one more individual to begin with.
        recover: lengths of short tiers of an extended model; nothing else is then searched.
        recover_cap: their largest lambda, as a multiple of the model's own factors.
        switch: the rule that is written; None measures both and writes the better.
        documents: wanted for search, validation and test; 0 for search takes the algorithm's own.
        attention: "longrope", "yarn", "none" or a number; "search" makes it a gene.
        start_tokens: whether start-token windows are searched.
        tier_tokens: of a ladder's tier, on which it is judged; None for all.
        refine: whether a ladder's tiers are searched one by one after its family.
        needle_keys: keys in the documents by which the rules are compared; 0 for none.
        seed: of everything random.
        dtype: of the model.
        evolution, practical: sizes of the algorithms.
    """

    target_length: int
    algorithm: Algorithm = Algorithm.LONGROPE
    ladder: str | None = None
    closed_forms: tuple[str, ...] = ()
    warm_start: LongRopeConfig | None = None
    recover: tuple[int, ...] = ()
    recover_cap: float = 1.0
    switch: SwitchPolicy | None = None
    documents: tuple[int, int, int] = (0, 3, 3)
    attention: str = "longrope"
    start_tokens: bool = True
    tier_tokens: int | None = None
    refine: bool = True
    needle_keys: int = 5
    seed: int = 0
    dtype: str = "float32"
    budget: Budget = field(default_factory=Budget)
    evolution: EvolutionSettings | None = None
    practical: PracticalSettings = field(default_factory=PracticalSettings)

    def __post_init__(self) -> None:
        if len(self.documents) != 3 or min(self.documents[1:]) < 1 or self.documents[0] < 0:
            raise ConfigError(
                "--documents: expected 3 numbers, at least one for validation and test, "
                f"got {self.documents}"
            )
        if not self.ladder and any("-ladder" in name for name in self.compared):
            raise ConfigError(f"--against {','.join(self.compared)}: ladders belong to --ladder")
        if self.warm_start is not None and (self.ladder or self.algorithm is Algorithm.LONGROPE2):
            raise ConfigError(
                "a warm start belongs to the algorithms longrope and practical without a ladder; "
                "here it would be ignored"
            )
        if self.ladder and self.algorithm is Algorithm.LONGROPE2:
            raise ConfigError("--ladder has its own search: --algorithm longrope2 would be ignored")
        if self.algorithm is Algorithm.LONGROPE2 and self.attention == SEARCHED_ATTENTION:
            raise ConfigError("longrope2 does not search the attention factor: give a number")
        if self.ladder and self.practical.family_evaluations < 1:
            raise ConfigError("--ladder needs --family-evaluations of 1 or more")
        if self.tier_tokens is not None and self.tier_tokens < 1:
            raise ConfigError(f"--tier-tokens must be 1 or more, got {self.tier_tokens}")
        if not 0 <= self.needle_keys <= MAX_KEYS:
            raise ConfigError(f"--needle-keys must be 0..{MAX_KEYS}, got {self.needle_keys}")
        if not 0 < self.recover_cap < math.inf:
            raise ConfigError(f"--recover-cap must be above 0 and finite, got {self.recover_cap}")
        if self.recover and min(self.recover) < 1:
            raise ConfigError(f"--recover: lengths must be 1 or more, got {self.recover}")
        if self.attention != SEARCHED_ATTENTION:
            attention_factor(self.attention, 2.0, 8192, 1.0)

    @property
    def compared(self) -> tuple[str, ...]:
        """The closed forms that were given, or the usual ones."""
        return self.closed_forms or (CLOSED_LADDERS if self.ladder else CLOSED_FORMS)

    @property
    def sizes(self) -> EvolutionSettings:
        """Of the evolution: what was given, else the paper's for the target length."""
        return self.evolution or EvolutionSettings.for_length(self.target_length)

    def at(self, length: int) -> SearchOptions:
        """The same for another length, whose sizes may be others."""
        return dataclasses.replace(self, target_length=length)

    @property
    def num_search_documents(self) -> int:
        """What was given, else the papers' numbers; for a ladder as many as have their caches kept."""
        if self.documents[0] or self.algorithm is Algorithm.LONGROPE:
            return self.documents[0] or (LADDER_DOCUMENTS if self.ladder else self.sizes.documents)
        return 10 if self.algorithm is Algorithm.LONGROPE2 else self.sizes.documents

    def to_json(self) -> dict[str, Any]:
        """As JSON values, for settings.json and provenance."""
        values = dataclasses.asdict(self)
        warm = self.warm_start
        return values | {"warm_start": None if warm is None else to_json(warm)}


@dataclass(frozen=True)
class Event:
    """What an observer of a search is told.

    Attributes:
        phase: what is being done.
        progress: spent so far; None between phases.
        best: the best loss on the search documents so far, nats per token.
        origin: where the best comes from.
        closed_forms: losses of the closed forms on the same documents, once they are known.
    """

    phase: str
    progress: Progress | None = None
    best: float | None = None
    origin: str = ""
    closed_forms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a search found.

    Attributes:
        config: the factors, their rule and where they come from.
        result: all that result.json holds, JSON values.
    """

    config: LongRopeConfig
    result: dict[str, Any]
