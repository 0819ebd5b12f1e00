"""Cells of different variants that compute the same passes: one is run, the others take its numbers.

A ladder computes up to its first border what the model without factors does, and under `sequence`
what one set of factors for that length does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from longrope_export.config import LongRopeConfig, SwitchPolicy
from longrope_export.evaluate.journal import Journal
from longrope_export.evaluate.settings import Cell
from longrope_export.evaluate.subjects import Subject


def passes_of(config: LongRopeConfig, length: int) -> tuple[Any, ...]:
    """What a runtime computes with for `length` tokens; equal for two configs that compute the same.

    The tiers that such a sequence meets, each with the border at which the next one begins; none
    stands behind the last. A model without factors goes on with its last tier beyond its window.
    """
    last = config.tier_index(min(length, config.max_position_embeddings))
    first = 0 if config.switch is SwitchPolicy.CAUSAL else last
    met: list[tuple[int | None, Any]] = []
    for tier in config.tiers[first : last + 1]:
        start = 0 if tier.is_plain else tier.num_start_tokens
        factors = (tier.rescale_factors, tier.attention_factor, start)
        if met and met[-1][1] == factors:
            met.pop()
        met.append((tier.max_length, factors))
    met[-1] = (None, met[-1][1])
    return (config.rope_theta, config.rotary_dim, config.logit_scaling, config.layers, *met)


def are_twins(one: Subject, other: Subject, length: int) -> bool:
    """The same files in the same runtime and dtype, with the same passes at this length."""
    if one.definition is None or other.definition is None:
        return False
    names = ("export", "sha256", "dtype", "device")
    same = all(getattr(one, name) == getattr(other, name) for name in names)
    return same and passes_of(one.definition, length) == passes_of(other.definition, length)


def take_twins(
    journal: Journal, subject: Subject, others: Sequence[Subject], cells: Sequence[Cell]
) -> list[tuple[Cell, str]]:
    """Write down the missing cells of `subject` that another one has already computed.

    Args:
        others: that may have; `subject` may be among them.
        cells: of `subject`.

    Returns:
        Those cells, each with the label of its twin. Their times are the twin's.

    Raises:
        OutputError: as Journal.find and Journal.add.
    """
    taken = []
    for cell in cells:
        if journal.find(cell, subject.identity) is not None:
            continue
        for other in others:
            if other.label == subject.label or not are_twins(subject, other, cell.length):
                continue
            result = journal.find(replace(cell, model=other.label), other.identity)
            if result is not None:
                journal.add(cell, subject.identity, result)
                taken.append((cell, other.label))
                break
    return taken
