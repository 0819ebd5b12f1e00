"""Attention in both flavours, with its key-value cache, masks and rotation."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from longrope_converters.to_onnx.description import Decoder
from longrope_converters.to_onnx.graph import MICROSOFT, Graph
from longrope_converters.to_onnx.rotation import (
    Rotation,
    make_rotation,
    plain_rope,
    query_scale,
    rotate,
)
from longrope_export.config import LongRopeConfig

_ROTARY_DIM_MULTIPLE = 16  # what the rotation inside GroupQueryAttention takes


class Attention:
    """What all layers share: caches, lengths, masks, tables, the scale of the queries.

    Args:
        standard: operators of the ONNX standard alone.
        mask: (batch, total) int64, 1 for tokens and 0 for padding.
        positions: (batch, tokens) int64, absolute.
        rope_length: (batch or 1, 1) int64; 0 for the longest sequence or the cache's capacity.
    """

    def __init__(
        self,
        graph: Graph,
        decoder: Decoder,
        config: LongRopeConfig,
        standard: bool,
        mask: ir.Value,
        positions: ir.Value,
        rope_length: ir.Value,
    ) -> None:
        self.graph, self.decoder, self.config = graph, decoder, config
        self.standard, self.mask, self.positions = standard, mask, positions
        self.present: list[tuple[Any, Any]] = []
        shape = self.cache_shape("past")
        self.past = [
            tuple(
                graph.input(f"past_key_values.{layer}.{part}", graph.type, shape)
                for part in ("key", "value")
            )
            for layer in range(decoder.num_layers)
        ]
        self._rotations: dict[str, Rotation] = {}
        self._masks: dict[int | None, ir.Value] = {}
        op, axis = graph.op, graph.constant([1], np.int64)
        lengths = op("ReduceSum", mask, axis, keepdims=1)  # (batch, 1)
        longest = op("ReduceMax", lengths, graph.constant([0], np.int64), keepdims=1)
        capacity = op("Shape", self.past[0][0], start=2, end=3)
        given = op("Greater", rope_length, graph.constant(0, np.int64))
        self.length = op("Where", given, rope_length, op("Max", longest, capacity))
        scaling = config.logit_scaling
        self.scale = None if scaling is None else query_scale(graph, scaling, positions)
        if not standard:
            last = op("Sub", lengths, graph.constant(1, np.int64))
            self.last_index = op("Cast", op("Squeeze", last, axis), to=ir.DataType.INT32)
            width = op("Squeeze", op("Shape", mask, start=1, end=2), graph.constant([0], np.int64))
            self.total = op("Cast", width, to=ir.DataType.INT32)

    def cache_shape(self, length: str) -> list[int | str]:
        """(batch, heads, `length`, head_dim)."""
        return ["batch", self.decoder.num_key_value_heads, length, self.decoder.head_dim]

    def scales(self, layer: int) -> bool:
        """Whether the queries of this layer are multiplied by the log scale."""
        scaling = self.config.logit_scaling
        return scaling is not None and layer not in scaling.exempt_layers

    def takes_packed(self, layer: int) -> bool:
        """Whether the layer wants q, k and v as one: nothing is done to them in front of it."""
        touched = self.standard or self.decoder.qk_norm or self.scales(layer)
        return not touched and self._rotates_inside(self._rotation(layer))

    def attend_packed(self, packed: ir.Value, layer: int) -> ir.Value:
        """packed is q, k and v, one behind the other in the last axis."""
        return self._group_query_attention(packed, None, None, layer, self._rotation(layer))

    def attend(self, q: ir.Value, k: ir.Value, v: ir.Value, layer: int) -> ir.Value:
        """(batch, tokens, heads * head_dim) each, neither scaled nor rotated."""
        decoder, rotation = self.decoder, self._rotation(layer)
        if self.scales(layer):
            q = self.graph.op("Mul", q, self.scale)
        if self.standard or not self._rotates_inside(rotation):
            q = rotate(self.graph, q, rotation, decoder.num_heads)
            k = rotate(self.graph, k, rotation, decoder.num_key_value_heads)
        if self.standard:
            return self._standard_attention(q, k, v, layer)
        return self._group_query_attention(q, k, v, layer, rotation)

    def _rotates_inside(self, rotation: Rotation) -> bool:
        """GroupQueryAttention reads tables itself, if its kernels can take their width."""
        return rotation.rows is not None and rotation.rotary_dim % _ROTARY_DIM_MULTIPLE == 0

    def _group_query_attention(
        self, q: ir.Value, k: ir.Value | None, v: ir.Value | None, layer: int, rotation: Rotation
    ) -> ir.Value:
        decoder, inside = self.decoder, self._rotates_inside(rotation)
        window = decoder.windows[layer]
        out, *present = self.graph.op(
            "GroupQueryAttention",
            q,
            k,
            v,
            *self.past[layer],
            self.last_index,
            self.total,
            *((rotation.cos, rotation.sin, rotation.rows) if inside else ()),
            domain=MICROSOFT,
            outputs=3,
            num_heads=decoder.num_heads,
            kv_num_heads=decoder.num_key_value_heads,
            scale=float(decoder.attention_scale),
            do_rotary=int(inside),
            rotary_interleaved=0,
            local_window_size=-1 if window is None else window,
        )
        self.present.append((present[0], present[1]))
        attended: ir.Value = out
        return attended

    def _standard_attention(self, q: ir.Value, k: ir.Value, v: ir.Value, layer: int) -> ir.Value:
        decoder = self.decoder
        out, *present = self.graph.op(
            "Attention",
            q,
            k,
            v,
            self._mask_for(decoder.windows[layer]),
            *self.past[layer],
            outputs=3,
            q_num_heads=decoder.num_heads,
            kv_num_heads=decoder.num_key_value_heads,
            scale=float(decoder.attention_scale),
        )
        self.present.append((present[0], present[1]))
        attended: ir.Value = out
        return attended

    def _mask_for(self, window: int | None) -> ir.Value:
        """(batch, 1, tokens, total) bool: a key that is no padding, not later, within the window."""
        if window in self._masks:
            return self._masks[window]
        graph, op = self.graph, self.graph.op
        first, one = graph.constant([0], np.int64), graph.constant(1, np.int64)
        total = op("Squeeze", op("Shape", self.mask, start=1, end=2), first)
        tokens = op("Squeeze", op("Shape", self.positions, start=1, end=2), first)
        columns = op("Range", graph.constant(0, np.int64), total, one)
        queries = op("Range", op("Sub", total, tokens), total, one)
        queries = op("Unsqueeze", queries, graph.constant([1], np.int64))
        allowed = op("LessOrEqual", columns, queries)
        if window is not None:
            distance = op("Sub", queries, columns)
            allowed = op("And", allowed, op("Less", distance, graph.constant(window, np.int64)))
        keys = op("Cast", self.mask, to=ir.DataType.BOOL)
        keys = op("Unsqueeze", keys, graph.constant([1, 2], np.int64))
        mask: ir.Value = op("And", allowed, keys)
        self._masks[window] = mask
        return mask

    def _rotation(self, layer: int) -> Rotation:
        """The tables of a layer; made for the first layer that needs them."""
        config, decoder = self.config, self.decoder
        local = decoder.local_theta is not None and decoder.windows[layer] is not None
        if local:
            name, rope = "local", plain_rope(config, decoder.local_theta)
        elif config.layers is None or layer in config.layers:
            name, rope = "rope", config
        else:
            name, rope = "plain", plain_rope(config)
        if name not in self._rotations:
            self._rotations[name] = make_rotation(
                self.graph, rope, self.positions, self.length, name
            )
        return self._rotations[name]
