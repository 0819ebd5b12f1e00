"""The graph of a decoder: one vocabulary of blocks for every family.

Two flavours. "genai": GroupQueryAttention and SkipSimplifiedLayerNormalization, which ONNX Runtime
and onnxruntime-genai run fastest, with a key-value cache that may be larger than its content.
"standard": only operators of the ONNX standard, opset 23.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from longrope_converters.to_onnx.description import Decoder
from longrope_converters.to_onnx.graph import MICROSOFT, NUMPY_TYPES, Graph
from longrope_converters.to_onnx.quantize import QuantizedMatrix
from longrope_converters.to_onnx.rotation import (
    Rotation,
    make_rotation,
    plain_rope,
    query_scale,
    rotate,
)
from longrope_converters.to_onnx.source import Weights
from longrope_converters.to_onnx.weights import AddOne, RowRange, Rows
from longrope_export.config import LongRopeConfig
from longrope_export.errors import UnsupportedError

PRECISIONS = ("fp32", "fp16", "int8", "int4")
OPS = ("genai", "standard")
_BITS = {"int8": 8, "int4": 4}
_EMBEDDING_BITS = 8  # int4, too: the head is the most sensitive matrix
_ROTARY_DIM_MULTIPLE = 16  # what the kernels of GroupQueryAttention take
_ALL_TOKENS = np.iinfo(np.int64).max


@dataclass(frozen=True)
class GraphOptions:
    """
    Attributes:
        precision: "fp32", "fp16", "int8" or "int4" (weights; the rest is fp32).
        ops: "genai" or "standard".
        pinned_length: length that picks the tier where nothing else says it; 0 for the length of
            the sequence or, if larger, the capacity of the key-value cache.
        accuracy_level: of MatMulNBits: 0 computes in fp32, 4 quantizes activations to int8.
    """

    precision: str = "fp32"
    ops: str = "genai"
    pinned_length: int = 0
    accuracy_level: int = 4


def build_decoder(
    decoder: Decoder, config: LongRopeConfig, weights: Weights, options: GraphOptions
) -> Graph:
    """The whole graph; weights are planned, not read.

    Raises:
        ModelError: a weight is missing or has another shape than the settings say.
        UnsupportedError: a weight that the graph has no place for.
    """
    builder = _Builder(decoder, config, weights, options)
    builder.build()
    ignored = ("lm_head.weight",) if decoder.tied else ()
    weights.refuse_rest(also_ignore=ignored)
    return builder.graph


class _Builder:
    def __init__(
        self, decoder: Decoder, config: LongRopeConfig, weights: Weights, options: GraphOptions
    ) -> None:
        self.decoder, self.config, self.weights, self.options = decoder, config, weights, options
        self.bits = _BITS.get(options.precision)
        self.standard = options.ops == "standard"
        if self.standard and self.bits:
            raise UnsupportedError(
                f"--precision {options.precision} needs MatMulNBits, which is no operator of the "
                f"ONNX standard: leave out --ops standard"
            )
        self.graph = Graph(NUMPY_TYPES.get(options.precision, np.dtype(np.float32)), "decoder")
        self._rotations: dict[str, Rotation] = {}

    def build(self) -> None:
        graph, decoder = self.graph, self.decoder
        tokens = graph.input("input_ids", ir.DataType.INT64, ["batch", "tokens"])
        self.mask = graph.input("attention_mask", ir.DataType.INT64, ["batch", "total"])
        self.positions = graph.input("position_ids", ir.DataType.INT64, ["batch", "tokens"])
        shape: list[int | str] = ["batch", decoder.num_key_value_heads, "past", decoder.head_dim]
        self.past = [
            tuple(
                graph.input(f"past_key_values.{layer}.{part}", graph.type, shape)
                for part in ("key", "value")
            )
            for layer in range(decoder.num_layers)
        ]
        pinned = np.full((1, 1), self.options.pinned_length, np.int64)
        rope_length = graph.optional_input("rope_length", pinned, ["rope_batch", 1])
        keep = graph.optional_input("num_logits_to_keep", np.asarray([_ALL_TOKENS], np.int64), [1])
        self._prepare(rope_length)
        present: list[int | str] = [*shape[:2], "capacity", decoder.head_dim]
        final = self._layers(self._embed(tokens))
        self._head(final, keep)
        for layer, (key, value) in enumerate(self.present):
            name = f"present.{layer}"
            graph.output(key, f"{name}.key", graph.type, present)
            graph.output(value, f"{name}.value", graph.type, present)

    def _prepare(self, rope_length: ir.Value) -> None:
        """What all layers share: lengths, masks, the scale of the queries."""
        graph, op = self.graph, self.graph.op
        axis = graph.constant([1], np.int64)
        lengths = op("ReduceSum", self.mask, axis, keepdims=1)  # (batch, 1)
        capacity = op("Shape", self.past[0][0], start=2, end=3)
        longest = op("ReduceMax", lengths, graph.constant([0], np.int64), keepdims=1)
        zero = graph.constant(0, np.int64)
        self.length = op(
            "Where", op("Greater", rope_length, zero), rope_length, op("Max", longest, capacity)
        )
        self.present: list[tuple[Any, Any]] = []
        scaling = self.config.logit_scaling
        self.scale = None if scaling is None else query_scale(graph, scaling, self.positions)
        self._masks: dict[int | None, ir.Value] = {}
        if self.standard:
            return
        last = op("Sub", lengths, graph.constant(1, np.int64))
        last = op("Squeeze", last, axis)
        self.last_index = op("Cast", last, to=ir.DataType.INT32)
        width = op("Shape", self.mask, start=1, end=2)
        width = op("Squeeze", width, graph.constant([0], np.int64))
        self.total = op("Cast", width, to=ir.DataType.INT32)

    def _layers(self, stream: ir.Value) -> ir.Value:
        decoder = self.decoder
        normed = self._norm(stream, "model.layers.0.input_layernorm")
        behind = "pre_feedforward" if decoder.sandwich_norms else "post_attention"
        for layer in range(decoder.num_layers):
            prefix = f"model.layers.{layer}"
            added = self._attention(normed, layer)
            if decoder.sandwich_norms:
                added = self._norm(added, f"{prefix}.post_attention_layernorm")
            stream, normed = self._add_and_norm(stream, added, f"{prefix}.{behind}_layernorm")
            added = self._mlp(normed, f"{prefix}.mlp")
            if decoder.sandwich_norms:
                added = self._norm(added, f"{prefix}.post_feedforward_layernorm")
            following = (
                f"model.layers.{layer + 1}.input_layernorm"
                if layer + 1 < decoder.num_layers
                else "model.norm"
            )
            stream, normed = self._add_and_norm(stream, added, following)
        return normed

    def _attention(self, x: ir.Value, layer: int) -> ir.Value:
        decoder, prefix = self.decoder, f"model.layers.{layer}.self_attn"
        q, k, v = self._query_key_value(x, prefix)
        if decoder.qk_norm:
            q = self._head_norm(q, f"{prefix}.q_norm", decoder.num_heads)
            k = self._head_norm(k, f"{prefix}.k_norm", decoder.num_key_value_heads)
        scaling = self.config.logit_scaling
        if scaling is not None and layer not in scaling.exempt_layers:
            q = self.graph.op("Mul", q, self.scale)
        rotation = self._rotation(layer)
        attend = self._standard_attention if self.standard else self._group_query_attention
        out = attend(q, k, v, layer, rotation)
        width = decoder.num_heads * decoder.head_dim
        return self._linear(
            out, f"{prefix}.o_proj", (decoder.hidden_size, width), decoder.output_bias
        )

    def _query_key_value(self, x: ir.Value, prefix: str) -> tuple[ir.Value, ir.Value, ir.Value]:
        decoder = self.decoder
        q_rows = decoder.num_heads * decoder.head_dim
        kv_rows = decoder.num_key_value_heads * decoder.head_dim
        if decoder.fused:
            parts = self._split(x, f"{prefix}.qkv_proj", (q_rows, kv_rows, kv_rows))
            return parts[0], parts[1], parts[2]
        q, k, v = (
            self._linear(
                x, f"{prefix}.{letter}_proj", (rows, decoder.hidden_size), decoder.qkv_bias
            )
            for letter, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows))
        )
        return q, k, v

    def _group_query_attention(
        self, q: ir.Value, k: ir.Value, v: ir.Value, layer: int, rotation: Rotation
    ) -> ir.Value:
        """Tables are read inside the operator, if its kernels can; else q and k come rotated."""
        decoder = self.decoder
        inside = rotation.rows is not None and rotation.rotary_dim % _ROTARY_DIM_MULTIPLE == 0
        if not inside:
            q = rotate(self.graph, q, rotation, decoder.num_heads)
            k = rotate(self.graph, k, rotation, decoder.num_key_value_heads)
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

    def _standard_attention(
        self, q: ir.Value, k: ir.Value, v: ir.Value, layer: int, rotation: Rotation
    ) -> ir.Value:
        decoder = self.decoder
        out, *present = self.graph.op(
            "Attention",
            rotate(self.graph, q, rotation, decoder.num_heads),
            rotate(self.graph, k, rotation, decoder.num_key_value_heads),
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
        config, decoder = self.config, self.decoder
        rescaled = config.layers is None or layer in config.layers
        local = decoder.local_theta is not None and decoder.windows[layer] is not None
        name = "local" if local else "rope" if rescaled else "plain"
        if name not in self._rotations:
            rope = (
                config
                if name == "rope"
                else plain_rope(config, decoder.local_theta if local else None)
            )
            self._rotations[name] = make_rotation(
                self.graph, rope, self.positions, self.length, name
            )
        return self._rotations[name]

    def _mlp(self, x: ir.Value, prefix: str) -> ir.Value:
        decoder, op = self.decoder, self.graph.op
        inner, hidden = decoder.intermediate_size, decoder.hidden_size
        if decoder.fused:
            gate, up = self._split(x, f"{prefix}.gate_up_proj", (inner, inner))
        else:
            gate, up = (
                self._linear(x, f"{prefix}.{name}_proj", (inner, hidden), decoder.mlp_bias)
                for name in ("gate", "up")
            )
        if decoder.activation == "silu":
            active = op("Mul", gate, op("Sigmoid", gate))
        else:
            active = op("Gelu", gate, approximate="tanh")
        product = op("Mul", active, up)
        return self._linear(product, f"{prefix}.down_proj", (hidden, inner), decoder.mlp_bias)

    def _split(self, x: ir.Value, name: str, parts: tuple[int, ...]) -> list[ir.Value]:
        """The parts of a fused matrix, as matrices of their own."""
        whole = self.weights.take(f"{name}.weight", (sum(parts), self.decoder.hidden_size))
        values, start = [], 0
        for index, count in enumerate(parts):
            values.append(self._matmul(x, RowRange(whole, start, count), f"{name}.{index}.weight"))
            start += count
        return values

    def _linear(self, x: ir.Value, name: str, shape: tuple[int, int], has_bias: bool) -> ir.Value:
        out = self._matmul(x, self.weights.take(f"{name}.weight", shape), f"{name}.weight")
        if has_bias:
            bias = self.weights.take(f"{name}.bias", shape[:1])
            out = self.graph.op("Add", out, self.graph.rows(f"{name}.bias", bias))
        return out

    def _matmul(self, x: ir.Value, rows: Rows, name: str) -> ir.Value:
        graph = self.graph
        if self.bits is None:
            out: ir.Value = graph.op("MatMul", x, graph.transposed(name, rows))
            return out
        return self._matmul_nbits(x, *self._quantized(rows, name, self.bits), rows, self.bits)

    def _quantized(self, rows: Rows, name: str, bits: int) -> tuple[ir.Value, ir.Value]:
        matrix = QuantizedMatrix(rows, bits)
        packed = self.graph.weight(
            f"{name}.q{bits}", np.uint8, matrix.packed_shape, matrix.packed_pieces
        )
        scales = self.graph.weight(
            f"{name}.scales", np.float32, matrix.scales_shape, matrix.scale_pieces
        )
        return packed, scales

    def _matmul_nbits(
        self, x: ir.Value, packed: ir.Value, scales: ir.Value, rows: Rows, bits: int
    ) -> ir.Value:
        out: ir.Value = self.graph.op(
            "MatMulNBits",
            x,
            packed,
            scales,
            domain=MICROSOFT,
            N=rows.shape[0],
            K=rows.shape[1],
            bits=bits,
            block_size=QuantizedMatrix(rows, bits).block_size,
            accuracy_level=self.options.accuracy_level or None,
        )
        return out

    def _embed(self, tokens: ir.Value) -> ir.Value:
        decoder, graph, name = self.decoder, self.graph, "model.embed_tokens.weight"
        self.embedding = self.weights.take(name, (decoder.vocab_size, decoder.hidden_size))
        if self.bits is None:
            self.table = graph.rows(name, self.embedding)
            x = graph.op("Gather", self.table, tokens)
        else:
            x = self._embed_quantized(tokens, name)
        return self._times(x, decoder.embedding_multiplier)

    def _embed_quantized(self, tokens: ir.Value, name: str) -> ir.Value:
        graph, bits = self.graph, _EMBEDDING_BITS
        self.table, self.table_scales = self._quantized(self.embedding, name, bits)
        matrix = QuantizedMatrix(self.embedding, bits)
        if self.embedding.shape[1] % matrix.block_size:
            raise UnsupportedError(
                f"{self.weights.where}: hidden_size {self.embedding.shape[1]} is no multiple of "
                f"{matrix.block_size}, the block of --precision {self.options.precision}"
            )
        planned = next(t for t in graph.tensors if t.name == self.table.name)
        flat = graph.view(planned, f"{name}.flat", self.embedding.shape)
        x: ir.Value = graph.op(
            "GatherBlockQuantized",
            flat,
            tokens,
            self.table_scales,
            domain=MICROSOFT,
            bits=bits,
            block_size=matrix.block_size,
            gather_axis=0,
            quantize_axis=1,
        )
        return x

    def _head(self, x: ir.Value, keep: ir.Value) -> None:
        graph, op, decoder = self.graph, self.graph.op, self.decoder
        ends, axis = graph.constant([_ALL_TOKENS], np.int64), graph.constant([1], np.int64)
        x = op("Slice", x, op("Neg", keep), ends, axis)
        rows, name = self.embedding, "model.embed_tokens.weight"
        if not decoder.tied:
            rows = self.weights.take("lm_head.weight", rows.shape)
            name = "lm_head.weight"
        if self.bits is None:
            # Gemm reads the rows as the checkpoint has them, and so shares a tied embedding
            table = self.table if decoder.tied else graph.rows(name, rows)
            flat = op("Reshape", x, graph.constant([-1, decoder.hidden_size], np.int64))
            logits = op("Gemm", flat, table, transB=1)
            shape = op(
                "Concat", op("Shape", x, start=0, end=2), graph.constant([-1], np.int64), axis=0
            )
            logits = op("Reshape", logits, shape)
        else:
            pair = (self.table, self.table_scales)
            if not decoder.tied:
                pair = self._quantized(rows, name, _EMBEDDING_BITS)
            logits = self._matmul_nbits(x, *pair, rows, _EMBEDDING_BITS)
        logits = self._times(logits, 1 / decoder.logits_divisor)
        if decoder.softcap:
            bounded = op("Tanh", self._times(logits, 1 / decoder.softcap))
            logits = self._times(bounded, decoder.softcap)
        self.graph.output(logits, "logits", graph.type, ["batch", "kept", decoder.vocab_size])

    def _norm(self, x: ir.Value, name: str) -> ir.Value:
        out: ir.Value = self.graph.op(
            "RMSNormalization",
            x,
            self._norm_weight(name, self.decoder.hidden_size),
            axis=-1,
            epsilon=self.decoder.norm_epsilon,
        )
        return out

    def _head_norm(self, x: ir.Value, name: str, num_heads: int) -> ir.Value:
        graph, op, size = self.graph, self.graph.op, self.decoder.head_dim
        heads = op("Reshape", x, graph.constant([0, 0, num_heads, size], np.int64))
        weight = self._norm_weight(name, size)
        heads = op("RMSNormalization", heads, weight, axis=-1, epsilon=self.decoder.norm_epsilon)
        out: ir.Value = op("Reshape", heads, graph.constant([0, 0, num_heads * size], np.int64))
        return out

    def _add_and_norm(
        self, stream: ir.Value, added: ir.Value, name: str
    ) -> tuple[ir.Value, ir.Value]:
        """(stream + added * residual_multiplier, its norm)."""
        added = self._times(added, self.decoder.residual_multiplier)
        if self.standard:
            stream = self.graph.op("Add", stream, added)
            return stream, self._norm(stream, name)
        normed, _, _, stream = self.graph.op(
            "SkipSimplifiedLayerNormalization",
            added,
            stream,
            self._norm_weight(name, self.decoder.hidden_size),
            domain=MICROSOFT,
            outputs=4,
            epsilon=self.decoder.norm_epsilon,
        )
        return stream, normed

    def _norm_weight(self, name: str, size: int) -> ir.Value:
        rows = self.weights.take(f"{name}.weight", (size,))
        stored = AddOne(rows) if self.decoder.norm_plus_one else rows
        return self.graph.rows(f"{name}.weight", stored)

    def _times(self, x: ir.Value, factor: float) -> ir.Value:
        if factor == 1.0:
            return x
        out: ir.Value = self.graph.op("Mul", x, self.graph.constant(factor, self.graph.dtype))
        return out
