"""Which tier computes each token of one forward. Works on the CPU, before the model runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

KEPT_TURNS = 1 << 24  # cos values that one forward may keep for its layers, 64 MB of float32


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

    A document begins where a position does not follow the one before it; padding stands alone.
    """
    counted = torch.where(real, positions, torch.full_like(positions, -2))
    begins = torch.ones_like(real)
    begins[:, 1:] = counted[:, 1:] != counted[:, :-1] + 1
    documents = begins.cumsum(-1) - 1
    last = torch.zeros_like(positions).scatter_reduce(1, documents, positions, "amax")
    return last.gather(1, documents)


def split_columns(tokens: Tensor) -> list[Segment]:
    """Cut (batch, n) tier indices into the longest stretches without a change in any row."""
    changes = (tokens[:, 1:] != tokens[:, :-1]).any(0).nonzero().flatten() + 1
    borders = [0, *changes.tolist(), tokens.shape[1]]
    return [
        Segment(start, stop, tokens[:, start])
        for start, stop in zip(borders[:-1], borders[1:], strict=True)
    ]
