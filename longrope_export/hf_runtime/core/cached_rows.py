"""What the runtime knows of a cache: the tokens behind its columns and the tier of each row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from longrope_export.hf_runtime.core.rotation import TierTables, rotate

KEEP_ABOVE = 8  # tiers; as many turns in bf16 add up to four times the rounding of one
ROTATABLE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


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
        first_keys: layer -> keys of the first columns as they were computed, where they are kept
            so that rounding does not add up from border to border.
        first_tiers: (batch, columns) the tiers under which those were computed.
        definition: whose tiers these are, or None while empty.
        is_broken: whether a change of tier began and did not end; only a reset clears it then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tiers: Tensor | None = None
        self.first_keys: dict[int, Tensor] = {}
        self.first_tiers: Tensor | None = None
        self.definition: Mapping[str, Any] | None = None
        self.is_broken = False
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

    def extend(self, columns: Columns, tiers: Tensor, definition: Mapping[str, Any]) -> None:
        """Add the tokens of a forward, after which all keys of a row stand under its tier."""
        self.definition = definition
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
        self.first_keys, self.first_tiers, self.definition = {}, None, None
        self.is_broken = False

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
            if self.first_tiers is not None:
                self.first_tiers = self.first_tiers[:, :keep]
                self.first_keys = {
                    layer: keys[:, :, :keep] for layer, keys in self.first_keys.items()
                }
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
        if self.first_tiers is not None:
            self.first_tiers = self.first_tiers[rows]
            self.first_keys = {
                layer: keys[rows.to(keys.device)] for layer, keys in self.first_keys.items()
            }

    def computed_tiers(self) -> Tensor:
        """(batch, columns) the tier under which each column was computed, as far as it is kept."""
        assert self.tiers is not None
        kept = 0 if self.first_tiers is None else self.first_tiers.shape[1]
        later = self.tiers[:, None].expand(-1, self._length - kept)
        return later if self.first_tiers is None else torch.cat((self.first_tiers, later), dim=1)


def known_rows(
    cache: Any, definition: Mapping[str, Any], error: type[Exception]
) -> CachedRows | None:
    """What the runtime knows of a cache that a forward is called with; None for an empty one.

    Raises:
        error: an unknown kind of cache, one that was filled or cut behind the runtime's back, one
            that was filled under another definition, or one whose last change of tier failed.
    """
    if cache is None:
        return None
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise error(f"cache of type {type(cache).__name__} is not known; use DynamicCache")
    rows, held = CachedRows.of(cache), int(cache.get_seq_length())
    if rows and rows.is_broken:
        raise error(
            "a forward failed while the keys of this cache were being brought to another tier, so "
            "they can no longer be told apart: start with an empty cache, or cache.reset()"
        )
    seen = rows.length if rows else 0
    if held != seen:
        raise error(
            f"the cache holds {held} tokens of which the runtime has seen {seen}: it must be "
            f"filled by this model after the runtime was put on it, and cut only with cache.crop"
        )
    if rows and rows.definition not in (None, definition):
        raise error(
            "the cache was filled under another LongRoPE definition than the one now on the "
            "model: start with an empty cache"
        )
    return rows


def turn_cache(
    cache: Any,
    rows: CachedRows,
    tiers: Tensor,
    layers: Iterable[int],
    tables: TierTables,
    keep_keys: bool | None,
    error: type[Exception],
) -> None:
    """Rotate the cached keys again, each row to its new tier; rows that stay turn by nothing.

    Args:
        tiers: (batch,) new tier indices.
        layers: the layers that are rescaled.
        keep_keys: whether to keep the keys as they were computed and always turn those; None does
            so for keys in half precision on a ladder of more than KEEP_ABOVE tiers.

    Raises:
        error: a layer of the cache does not hold its keys as plain tensors.
    """
    assert rows.tiers is not None
    held_layers = [(index, cache.layers[index]) for index in sorted(layers)]
    for index, layer in held_layers:
        if type(layer) not in ROTATABLE_LAYERS:
            raise error(
                f"layer {index} of the cache is a {type(layer).__name__}, whose keys cannot be "
                f"rotated again at a tier border; use DynamicCache or StaticCache"
            )
    if keep_keys is None:
        is_half = held_layers[0][1].keys.dtype.itemsize < 4
        keep_keys = is_half and len(tables.borders) > KEEP_ABOVE
    positions, computed = rows.columns().positions, rows.computed_tiers()
    turns: dict[Any, tuple[Tensor, Tensor]] = {}
    rows.is_broken = True  # until every layer is turned
    for index, layer in held_layers:
        keys = layer.keys
        # a sliding-window layer holds the last keys only; free columns of a static one come after
        held = min(keys.shape[2], rows.length)
        source = keys[:, :, :held]
        # what has left the window is not worth keeping
        kept = keep_keys and not layer.is_sliding
        if kept and index in rows.first_keys:
            first = rows.first_keys[index]
            source = torch.cat((first, source[:, :, first.shape[2] :]), dim=2)
        if (keys.device, kept) not in turns:
            before = computed if kept else rows.tiers[:, None]
            turns[keys.device, kept] = tables.turn(positions, before, tiers[:, None], keys.device)
        cos, sin = turns[keys.device, kept]
        turned = rotate(source, cos[:, -held:], sin[:, -held:])
        if isinstance(layer, StaticLayer):
            if kept and index not in rows.first_keys:
                source = source.clone()
            keys[:, :, :held] = turned
        else:
            layer.keys = turned
        if kept:
            rows.first_keys[index] = source
    if keep_keys:
        rows.first_tiers = computed
    rows.tiers, rows.is_broken = tiers, False


def recompute_cache(
    cache: Any, rows: CachedRows, text_model: Any, device: torch.device, error: type[Exception]
) -> None:
    """Fill a cache again from the tokens behind it.

    Args:
        device: where the model takes its input.

    Raises:
        error: tokens came as embeddings, which are not kept.
    """
    columns = rows.columns()
    if columns.input_ids is None:
        raise error(
            "a sequence outgrew its tier under switch = sequence, so its cache must be "
            "recomputed, but part of it came as inputs_embeds: pass pin_length to "
            "apply_longrope, or use input_ids"
        )
    cache.reset()
    try:
        text_model(
            input_ids=columns.input_ids.to(device),
            attention_mask=None if columns.real.all() else columns.real.long().to(device),
            position_ids=columns.positions.to(device),
            past_key_values=cache,
            use_cache=True,
        )
    except BaseException:
        rows.is_broken = True  # empty, or filled in some layers: not what the caller goes on from
        raise
