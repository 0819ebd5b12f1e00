"""What the runtime knows of a cache: the tokens behind its columns and the tier of each row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DummyLayer


@dataclass
class Columns:
    """Tokens of one forward, or of a whole cache; all on the CPU.

    Attributes:
        positions: (batch, n) absolute positions, int64.
        real: (batch, n) False for padding.
        input_ids: (batch, n), or None where the caller gave embeddings or nobody will ask.
    """

    positions: Tensor
    real: Tensor
    input_ids: Tensor | None


class CachedRows(DummyLayer):  # type: ignore[misc]
    """A layer without keys at the end of cache.layers, so that it follows every cache operation.

    Beam search, assisted decoding, deepcopy and reset treat it like the layers before it: its
    columns are cropped, its rows reordered, repeated and selected along with the keys.

    Attributes:
        tiers: (batch,) the tier under which the keys of each row stand, or None while empty.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tiers: Tensor | None = None
        self._parts: list[Columns] = []
        self._length = 0

    @staticmethod
    def of(cache: Cache) -> CachedRows | None:
        """The rows of a cache; None for a cache that this runtime has not filled."""
        last = cache.layers[-1] if cache.layers else None
        return last if isinstance(last, CachedRows) else None

    @property
    def length(self) -> int:
        """Number of cached columns, padding included."""
        return self._length

    def extend(self, columns: Columns, tiers: Tensor) -> None:
        """Add the tokens of a forward, after which all keys of a row stand under its tier."""
        self._parts.append(columns)
        self._length += columns.positions.shape[1]
        self.tiers = tiers

    def columns(self) -> Columns:
        """All cached tokens in order."""
        if len(self._parts) > 1:
            ids = [part.input_ids for part in self._parts if part.input_ids is not None]
            self._parts = [
                Columns(
                    torch.cat([part.positions for part in self._parts], dim=1),
                    torch.cat([part.real for part in self._parts], dim=1),
                    torch.cat(ids, dim=1) if len(ids) == len(self._parts) else None,
                )
            ]
        return self._parts[0]

    def reset(self) -> None:
        self.tiers, self._parts, self._length = None, [], 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and self._length:
            keep = self._length - abs(tokens_to_remove)
            if keep <= 0:
                return self.reset()
            whole = self.columns()
            ids = whole.input_ids
            self._parts = [
                Columns(
                    whole.positions[:, :keep],
                    whole.real[:, :keep],
                    None if ids is None else ids[:, :keep],
                )
            ]
            self._length = keep
        return None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.tiers is not None:
            self.batch_select_indices(torch.arange(len(self.tiers)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.tiers is None:
            return
        rows = torch.as_tensor(indices).cpu()
        whole = self.columns()
        ids = whole.input_ids
        self._parts = [
            Columns(whole.positions[rows], whole.real[rows], None if ids is None else ids[rows])
        ]
        self.tiers = self.tiers[rows]
