"""RoPE in the graph: which tier a call runs under, its cos and sin, the scale of the queries.

Two forms. "rows": tables of cos and sin, the tiers one behind the other, and a row number
position + first row of the tier; choosing a tier costs one addition. "computed": for ladders whose
tables would be too large, cos and sin of the call's positions, from float64 angles (a float32 angle
is wrong by 0.1 rad at position 2,000,000).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from longrope_converters.to_onnx.graph import Graph
from longrope_export.config import FactorTier, LogitScaling, LongRopeConfig
from longrope_export.rope import compute_cos_sin, compute_inv_freq

#: more rows than this in all tiers together are computed instead (128 pairs: 256 MiB in fp32)
MAX_TABLE_ROWS = 1 << 18
_ROWS_AT_ONCE = 1 << 12


@dataclass(frozen=True)
class Rotation:
    """What RotaryEmbedding or GroupQueryAttention takes.

    Attributes:
        cos, sin: (rows, pairs) tables, or (batch, tokens, pairs) values.
        rows: (batch, tokens) int64, rows of the tables; None for values.
    """

    cos: ir.Value
    sin: ir.Value
    rows: ir.Value | None
    rotary_dim: int


def uses_tables(config: LongRopeConfig) -> bool:
    """Whether the tiers of this config are few and short enough for tables."""
    return sum(tier.max_length for tier in config.tiers) <= MAX_TABLE_ROWS


def plain_rope(config: LongRopeConfig, rope_theta: float | None = None) -> LongRopeConfig:
    """The same model without rescaling: for the layers that a config leaves alone."""
    length = config.max_position_embeddings
    return LongRopeConfig(
        rope_theta=rope_theta or config.rope_theta,
        rotary_dim=config.rotary_dim,
        original_max_position_embeddings=length,
        max_position_embeddings=length,
        tiers=(FactorTier(length, (1.0,) * config.num_pairs),),
    )


def tier_index(graph: Graph, length: ir.Value, config: LongRopeConfig) -> ir.Value:
    """Number of the first tier with length <= max_length, the last one beyond it.

    Args:
        length: (batch or 1, 1) int64, tokens.

    Returns:
        (batch or 1, 1) int64.
    """
    borders = graph.constant([[tier.max_length for tier in config.tiers[:-1]]], np.int64)
    passed = graph.op("Cast", graph.op("Greater", length, borders), to=ir.DataType.INT64)
    one = graph.constant([1], np.int64)
    total: ir.Value = graph.op("ReduceSum", passed, one, keepdims=1)
    return total


def make_rotation(
    graph: Graph, config: LongRopeConfig, positions: ir.Value, length: ir.Value, name: str
) -> Rotation:
    """cos and sin for a call.

    Args:
        positions: (batch, tokens) int64, absolute.
        length: (batch or 1, 1) int64, the sequence length that picks the tier.
        name: of the tables.
    """
    if not uses_tables(config):
        tier = tier_index(graph, length, config)
        cos, sin = computed_cos_sin(graph, config, positions, tier)
        return Rotation(cos, sin, None, config.rotary_dim)
    rows = positions
    if len(config.tiers) > 1:
        lengths = [tier.max_length for tier in config.tiers]
        first_rows = graph.constant(np.cumsum([0, *lengths[:-1]]), np.int64)
        first = graph.op("Gather", first_rows, tier_index(graph, length, config))
        rows = graph.op("Add", positions, first)
    shape = (sum(tier.max_length for tier in config.tiers), config.num_pairs)
    tables = [
        graph.weight(
            f"{name}.{part}_cache",
            graph.dtype,
            shape,
            lambda part=part: _table_pieces(config, part, graph.dtype),
        )
        for part in ("cos", "sin")
    ]
    return Rotation(tables[0], tables[1], rows, config.rotary_dim)


def _table_pieces(
    config: LongRopeConfig, part: str, dtype: npt.DTypeLike
) -> Iterator[npt.NDArray[np.generic]]:
    for tier in config.tiers:
        for start in range(0, tier.max_length, _ROWS_AT_ONCE):
            positions = np.arange(start, min(start + _ROWS_AT_ONCE, tier.max_length))
            pair = compute_cos_sin(positions, config.rope_theta, config.rotary_dim, tier)
            yield pair[part == "sin"].astype(dtype)


def computed_cos_sin(
    graph: Graph, config: LongRopeConfig, positions: ir.Value, tier: ir.Value
) -> tuple[Any, Any]:
    """(batch, tokens, pairs) cos and sin in the graph's type, attention factor included."""
    angle = computed_angles(graph, config, positions, tier)
    scales = graph.constant([t.attention_factor for t in config.tiers], np.float64)
    scale = graph.op("Unsqueeze", graph.op("Gather", scales, tier), graph.constant([2], np.int64))
    return tuple(
        graph.op("Cast", graph.op("Mul", graph.op(part, angle), scale), to=graph.type)
        for part in ("Cos", "Sin")
    )


def computed_angles(
    graph: Graph, config: LongRopeConfig, positions: ir.Value, tier: ir.Value
) -> ir.Value:
    """(batch, tokens, pairs) float64 radians; as longrope_export.rope.compute_angles.

    Args:
        positions: (batch, tokens) int64.
        tier: (batch or 1, 1) int64.
    """
    original = compute_inv_freq(config.rope_theta, config.rotary_dim)
    factors = np.asarray([t.rescale_factors for t in config.tiers], np.float64)
    # (batch or 1, 1, pairs)
    inv_freq = graph.op("Gather", graph.constant(original / factors, np.float64), tier)
    if config.num_start_tokens:
        windows = graph.constant([t.num_start_tokens for t in config.tiers], np.int64)
        inside = graph.op("Less", positions, graph.op("Gather", windows, tier))
        inside = graph.op("Unsqueeze", inside, graph.constant([2], np.int64))
        inv_freq = graph.op("Where", inside, graph.constant(original, np.float64), inv_freq)
    absolute = graph.op("Cast", positions, to=ir.DataType.DOUBLE)
    absolute = graph.op("Unsqueeze", absolute, graph.constant([2], np.int64))
    angles: ir.Value = graph.op("Mul", absolute, inv_freq)
    return angles


def rotate(graph: Graph, heads: ir.Value, rotation: Rotation, num_heads: int) -> ir.Value:
    """RotaryEmbedding of (batch, tokens, num_heads * head_dim) queries or keys."""
    rotated: ir.Value = graph.op(
        "RotaryEmbedding",
        heads,
        rotation.cos,
        rotation.sin,
        rotation.rows,
        num_heads=num_heads,
        rotary_embedding_dim=rotation.rotary_dim,
        interleaved=0,
    )
    return rotated


def query_scale(graph: Graph, scaling: LogitScaling, positions: ir.Value) -> ir.Value:
    """(batch, tokens, 1): max(ln(position + 1) / ln(base_length), 1)."""
    one_based = graph.op("Add", positions, graph.constant(1, np.int64))
    logarithm = graph.op("Log", graph.op("Cast", one_based, to=ir.DataType.FLOAT))
    scaled = graph.op(
        "Mul", logarithm, graph.constant(1 / math.log(scaling.base_length), np.float32)
    )
    scale = graph.op("Max", scaled, graph.constant(1, np.float32))
    scale = graph.op("Unsqueeze", scale, graph.constant([2], np.int64))
    cast: ir.Value = graph.op("Cast", scale, to=graph.type)
    return cast
