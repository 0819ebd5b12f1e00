"""rerotate.onnx: cached keys from the tier that they were rotated by to another one.

A cached key is a_old R(angle_old) k. R(angle_new - angle_old) times a_new / a_old makes it
a_new R(angle_new) k: exact but for rounding, whatever the model computed around it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from longrope_converters.to_onnx.description import Decoder
from longrope_converters.to_onnx.graph import Graph
from longrope_converters.to_onnx.rotation import computed_angles, tier_index
from longrope_export.config import LongRopeConfig


def build_rerotation(
    decoder: Decoder, config: LongRopeConfig, cache_type: np.dtype[np.generic]
) -> Graph:
    """A graph over the key caches of all layers that the config rescales.

    Inputs are position_ids (batch, cached) int64; from_length and to_length (batch or 1, 1) int64,
    sequence lengths that name the tiers; past_key_values.N.key (batch, heads, cached, head_dim).
    Outputs are present.N.key. Without such layers, or with one tier, there is nothing to do.
    """
    graph = Graph(np.float32, "rerotate")
    stored = ir.DataType.from_numpy(cache_type)
    positions = graph.input("position_ids", ir.DataType.INT64, ["batch", "cached"])
    tiers = [
        tier_index(graph, graph.input(f"{word}_length", ir.DataType.INT64, ["lengths", 1]), config)
        for word in ("from", "to")
    ]
    old, new = (computed_angles(graph, config, positions, tier) for tier in tiers)
    scales = graph.constant([tier.attention_factor for tier in config.tiers], np.float64)
    ratio = graph.op(
        "Div", graph.op("Gather", scales, tiers[1]), graph.op("Gather", scales, tiers[0])
    )
    ratio = graph.op("Unsqueeze", ratio, graph.constant([2], np.int64))
    angle = graph.op("Sub", new, old)
    cos, sin = (
        graph.op("Cast", graph.op("Mul", graph.op(part, angle), ratio), to=ir.DataType.FLOAT)
        for part in ("Cos", "Sin")
    )
    shape: list[int | str] = ["batch", decoder.num_key_value_heads, "cached", decoder.head_dim]
    for layer in rescaled_layers(decoder, config):
        key = graph.input(f"past_key_values.{layer}.key", stored, shape)
        wide = graph.op("Cast", key, to=ir.DataType.FLOAT)
        turned = graph.op(
            "RotaryEmbedding",
            wide,
            cos,
            sin,
            None,
            interleaved=0,
            rotary_embedding_dim=config.rotary_dim,
        )
        narrow = graph.op("Cast", turned, to=stored)
        graph.output(narrow, f"present.{layer}.key", stored, shape)
    return graph


def rescaled_layers(decoder: Decoder, config: LongRopeConfig) -> list[int]:
    """Layers whose keys depend on the tier."""
    layers = range(decoder.num_layers) if config.layers is None else config.layers
    return [
        layer for layer in layers if decoder.local_theta is None or decoder.windows[layer] is None
    ]
