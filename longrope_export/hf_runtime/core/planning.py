"""Which tier computes each token of one forward. Works on the CPU, before the model runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from longrope_export.hf_runtime.core.rotation import TierTables


@dataclass
class Segment:
    """Columns of a forward in which each row has one tier.

    Attributes:
        start, stop: first column of the forward, and one past the last.
        tiers: (batch,) tier index of each row.
        turn: cos and sin from the rows' cached tiers to these, once they have been computed.
    """

    start: int
    stop: int
    tiers: Tensor
    turn: tuple[Tensor, Tensor] | None = None


@dataclass
class Plan:
    """One forward. All tensors are on the CPU.

    Attributes:
        num_cached: columns that stand in the cache already.
        positions: (batch, n) absolute positions of the new tokens.
        real: (batch, n) False for padding.
        tokens: (batch, n) tier of each new token, padding included; (batch, 1) if all are equal.
        rows: (batch,) tier under which all keys of a row stand after this forward.
        segments: not empty if the tokens of a row differ in tier under the causal rule: then keys
            stand under `rows` and attention is computed segment by segment.
        key_positions: (batch, num_cached + n), only where there are segments.
    """

    num_cached: int
    positions: Tensor
    real: Tensor
    tokens: Tensor
    rows: Tensor
    segments: list[Segment] = field(default_factory=list)
    key_positions: Tensor | None = None


def find_real_tokens(mask: Any, batch: int, num_cached: int, num_new: int) -> Tensor:
    """(batch, num_new) bool: False for padding, as far as the attention mask tells.

    Args:
        mask: what the text model was called with: None, (batch, columns), a prepared 4D mask
            (bool or additive), or a dict of those per layer type.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention")
    columns = slice(num_cached, num_cached + num_new)
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= num_cached + num_new:
        return mask[:, columns].cpu().bool().expand(batch, -1)
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[-1] >= num_cached + num_new:
        # a token that may not even see itself is padding
        own = mask[:, 0].diagonal(num_cached, dim1=-2, dim2=-1)[:, :num_new].cpu()
        return (own if own.dtype == torch.bool else own == 0).expand(batch, -1)
    return torch.ones(batch, num_new, dtype=torch.bool)


def find_positions(
    position_ids: Tensor | None, mask: Any, batch: int, num_cached: int, num_new: int
) -> Tensor:
    """(batch, num_new) absolute positions; where the caller names none, padding does not count."""
    if position_ids is not None:
        return position_ids.cpu().expand(batch, -1)
    columns = slice(num_cached, num_cached + num_new)
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= num_cached + num_new:
        counted = (mask.cpu() != 0).long().cumsum(-1) - 1
        return counted.clamp(min=0)[:, columns].expand(batch, -1)
    return torch.arange(num_cached, num_cached + num_new).expand(batch, -1)


def last_positions(positions: Tensor, real: Tensor) -> Tensor:
    """(batch, n) last position of the document that each token belongs to.

    A document begins where a position does not follow that of the last real token before it:
    padding in the middle of a document does not end it.
    """
    places = torch.arange(real.shape[1], device=real.device)
    columns = torch.where(real, places, -1).cummax(1).values  # of that token
    before = torch.where(columns < 0, -2, positions.gather(1, columns.clamp(min=0)))
    begins = real.clone()
    begins[:, 1:] &= positions[:, 1:] != before[:, :-1] + 1
    begins[:, 0] = True
    documents = begins.cumsum(-1) - 1
    counted = torch.where(real, positions, 0)
    last = torch.zeros_like(positions).scatter_reduce(1, documents, counted, "amax")
    return last.gather(1, documents)


def split_columns(tokens: Tensor) -> list[Segment]:
    """Cut (batch, n) tier indices into the longest stretches without a change in any row."""
    changes = (tokens[:, 1:] != tokens[:, :-1]).any(0).nonzero().flatten() + 1
    borders = [0, *changes.tolist(), tokens.shape[1]]
    return [Segment(start, stop, tokens[:, start]) for start, stop in pairwise(borders)]


class Planner:
    """Chooses the tier of every token by the rule of the definition.

    Args:
        definition: the JSON shape of a factors file.
        pin_length: the declared final length in tokens of every sequence, or None.
        error: the exception class of every refusal.

    Attributes:
        is_causal: the rule, else `sequence`.
        frozen: the one tier of every token, or None.
    """

    def __init__(
        self,
        definition: Mapping[str, Any],
        tables: TierTables,
        pin_length: int | None,
        error: type[Exception],
    ) -> None:
        self.tables, self.error = tables, error
        self.is_causal = definition.get("switch", "causal") == "causal"
        self.last_position = int(tables.borders[-1]) - 1
        self.frozen: int | None = None
        self.pinned: int | None = None
        if pin_length is None:
            return
        if self.is_causal:
            raise error("pin_length is for switch = sequence; under causal no length is declared")
        if not 1 <= pin_length <= self.last_position + 1:
            raise error(f"pin_length must be 1..{self.last_position + 1} tokens, got {pin_length}")
        self.pinned = int(tables.select(torch.tensor(pin_length - 1)))
        self.last_position = int(tables.borders[self.pinned]) - 1

    def freeze(self, tier: int | None) -> None:
        count = len(self.tables.borders)
        if tier is not None and not -count <= tier < count:
            raise self.error(f"freeze: no tier {tier}; use 0..{count - 1}, or None")
        self.frozen = None if tier is None else tier % count

    def plan(
        self, positions: Tensor, real: Tensor, num_cached: int, cached_tiers: Tensor | None
    ) -> Plan:
        """The plan of one forward.

        Args:
            positions, real: (batch, n), see Plan.
            num_cached: columns in the cache.
            cached_tiers: (batch,) tiers of the cached rows, or None for no cache.

        Raises:
            error: a real token stands beyond the last tier, or beyond the pinned one.
        """
        if self.frozen is None:
            self._check_length(positions, real)
        fixed = self.pinned if self.frozen is None else self.frozen
        if fixed is not None:
            tiers = torch.full((len(positions),), fixed)
            return Plan(num_cached, positions, real, tiers[:, None], tiers)
        if self.is_causal:
            tokens = self.tables.select(positions.clamp(max=self.last_position))
            rows = torch.where(real, tokens, -1).amax(1)
        else:
            if num_cached:
                last = torch.where(real, positions, 0).amax(1, keepdim=True).expand_as(positions)
            else:
                last = last_positions(positions, real)
            tokens = self.tables.select(last.clamp(max=self.last_position))
            # of packed documents the last one decides: only that one can go on with the cache
            newest = torch.where(real, torch.arange(real.shape[1]), 0).amax(1, keepdim=True)
            rows = tokens.gather(1, newest)[:, 0]
        if not real.all():  # padding goes with its row, a row of nothing but padding stays as it is
            before = torch.zeros_like(rows) if cached_tiers is None else cached_tiers
            rows = torch.where(real.any(1), rows, before)
            tokens = torch.where(real, tokens, rows[:, None])
        if torch.equal(tokens, rows[:, None].expand_as(tokens)):
            return Plan(num_cached, positions, real, rows[:, None], rows)
        if self.is_causal:
            segments = split_columns(tokens)
            return Plan(num_cached, positions, real, rows[:, None], rows, segments)
        return Plan(num_cached, positions, real, tokens, rows)

    def _check_length(self, positions: Tensor, real: Tensor) -> None:
        if int(positions.max()) <= self.last_position:
            return
        beyond = int(torch.where(real, positions, 0).max())
        if beyond <= self.last_position:
            return
        if self.pinned is None:
            what = "the last tier ends at max_position_embeddings ="
            advice = "make factors for a longer target"
        else:
            what, advice = "pin_length chose the tier that ends at", "declare a larger pin_length"
        raise self.error(
            f"a sequence has {beyond + 1} tokens, {what} {self.last_position + 1}: {advice}"
        )
