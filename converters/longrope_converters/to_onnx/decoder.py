"""The graph of a decoder: one vocabulary of blocks for every family.

Two flavours. "genai": GroupQueryAttention and SkipSimplifiedLayerNormalization, which ONNX Runtime
and onnxruntime-genai run fastest, with a key-value cache that may be larger than its content.
"standard": only operators of the ONNX standard, opset 23.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from longrope_converters.to_onnx.attention import Attention
from longrope_converters.to_onnx.description import Decoder
from longrope_converters.to_onnx.graph import MICROSOFT, NUMPY_TYPES, Graph
from longrope_converters.to_onnx.linear import Linear, stack
from longrope_converters.to_onnx.source import Weights
from longrope_converters.to_onnx.weights import AddOne
from longrope_export.config import LongRopeConfig
from longrope_export.errors import UnsupportedError

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
        embedding_bits: of embedding and head in int8 and int4.
    """

    precision: str = "fp32"
    ops: str = "genai"
    pinned_length: int = 0
    accuracy_level: int = 4
    embedding_bits: int = 8


def build_decoder(
    decoder: Decoder, config: LongRopeConfig, weights: Weights, options: GraphOptions
) -> Graph:
    """The whole graph; weights are planned, not read.

    Raises:
        ModelError: a weight is missing or has another shape than the settings say.
        UnsupportedError: a weight that the graph has no place for; int8 or int4 weights with
            standard operators.
    """
    graph = Graph(NUMPY_TYPES.get(options.precision, np.dtype(np.float32)), "decoder")
    linear = Linear(
        graph, weights, options.precision, options.accuracy_level, options.embedding_bits
    )
    standard = options.ops == "standard"
    if standard and linear.bits:
        raise UnsupportedError(
            f"--precision {options.precision} needs MatMulNBits, which is no operator of the "
            f"ONNX standard: leave out --ops standard"
        )
    tokens = graph.input("input_ids", ir.DataType.INT64, ["batch", "tokens"])
    mask = graph.input("attention_mask", ir.DataType.INT64, ["batch", "total"])
    positions = graph.input("position_ids", ir.DataType.INT64, ["batch", "tokens"])
    pinned = np.full((1, 1), options.pinned_length, np.int64)
    rope_length = graph.optional_input("rope_length", pinned, ["rope_batch", 1])
    attention = Attention(graph, decoder, config, standard, mask, positions, rope_length)
    all_tokens = np.asarray([_ALL_TOKENS], np.int64)
    keep = graph.optional_input("num_logits_to_keep", all_tokens, [1])
    logits = _Blocks(graph, decoder, linear, attention, weights).logits(tokens, keep)
    graph.output(logits, "logits", graph.type, ["batch", "kept", decoder.vocab_size])
    shape = attention.cache_shape("capacity")
    for layer, present in enumerate(attention.present):
        for part, value in zip(("key", "value"), present, strict=True):
            graph.output(value, f"present.{layer}.{part}", graph.type, shape)
    weights.refuse_rest(also_ignore=("lm_head.weight",) if decoder.tied else ())
    return graph


class _Blocks:
    """Layers, from the tokens to the logits."""

    def __init__(
        self,
        graph: Graph,
        decoder: Decoder,
        linear: Linear,
        attention: Attention,
        weights: Weights,
    ) -> None:
        self.graph, self.decoder, self.linear = graph, decoder, linear
        self.attention, self.weights = attention, weights

    def logits(self, tokens: ir.Value, keep: ir.Value) -> ir.Value:
        """The whole model; logits of the last `keep` tokens."""
        decoder, graph = self.decoder, self.graph
        shape = (decoder.vocab_size, decoder.hidden_size)
        x, table = self.linear.embed(tokens, "model.embed_tokens", shape)
        final = self._layers(self._times(x, decoder.embedding_multiplier))
        ends, axis = graph.constant([_ALL_TOKENS], np.int64), graph.constant([1], np.int64)
        final = graph.op("Slice", final, graph.op("Neg", keep), ends, axis)
        logits = self.linear.head(final, table if decoder.tied else None, "lm_head", shape)
        logits = self._times(logits, 1 / decoder.logits_divisor)
        if decoder.softcap:
            bounded = graph.op("Tanh", self._times(logits, 1 / decoder.softcap))
            logits = self._times(bounded, decoder.softcap)
        return logits

    def _layers(self, stream: ir.Value) -> ir.Value:
        decoder = self.decoder
        normed = self._norm(stream, "model.layers.0.input_layernorm")
        middle = "pre_feedforward" if decoder.sandwich_norms else "post_attention"
        for layer in range(decoder.num_layers):
            prefix = f"model.layers.{layer}"
            added = self._attend(normed, layer)
            if decoder.sandwich_norms:
                added = self._norm(added, f"{prefix}.post_attention_layernorm")
            stream, normed = self._add_and_norm(stream, added, f"{prefix}.{middle}_layernorm")
            added = self._mlp(normed, f"{prefix}.mlp")
            if decoder.sandwich_norms:
                added = self._norm(added, f"{prefix}.post_feedforward_layernorm")
            is_last = layer + 1 == decoder.num_layers
            following = "model.norm" if is_last else f"model.layers.{layer + 1}.input_layernorm"
            stream, normed = self._add_and_norm(stream, added, following)
        return normed

    def _attend(self, x: ir.Value, layer: int) -> ir.Value:
        decoder, linear = self.decoder, self.linear
        prefix = f"model.layers.{layer}.self_attn"
        q_rows = decoder.num_heads * decoder.head_dim
        kv_rows = decoder.num_key_value_heads * decoder.head_dim
        hidden, counts = decoder.hidden_size, (q_rows, kv_rows, kv_rows)
        if decoder.fused:
            matrices = linear.parts(f"{prefix}.qkv_proj", counts, hidden)
        else:
            matrices = [
                linear.matrix(f"{prefix}.{letter}_proj", (rows, hidden), decoder.qkv_bias)
                for letter, rows in zip("qkv", counts, strict=True)
            ]
        if self.attention.takes_packed(layer):
            packed = linear.apply(x, stack(f"{prefix}.qkv_proj", matrices))
            out = self.attention.attend_packed(packed, layer)
        else:
            q, k, v = (linear.apply(x, matrix) for matrix in matrices)
            if decoder.qk_norm:
                q = self._head_norm(q, f"{prefix}.q_norm", decoder.num_heads)
                k = self._head_norm(k, f"{prefix}.k_norm", decoder.num_key_value_heads)
            out = self.attention.attend(q, k, v, layer)
        output = linear.matrix(f"{prefix}.o_proj", (hidden, q_rows), decoder.output_bias)
        return linear.apply(out, output)

    def _mlp(self, x: ir.Value, prefix: str) -> ir.Value:
        decoder, linear, op = self.decoder, self.linear, self.graph.op
        inner, hidden = decoder.intermediate_size, decoder.hidden_size
        if decoder.fused:
            matrices = linear.parts(f"{prefix}.gate_up_proj", (inner, inner), hidden)
        else:
            matrices = [
                linear.matrix(f"{prefix}.{name}_proj", (inner, hidden), decoder.mlp_bias)
                for name in ("gate", "up")
            ]
        gate, up = (linear.apply(x, matrix) for matrix in matrices)
        if decoder.activation == "silu":
            active = op("Mul", gate, op("Sigmoid", gate))
        else:
            active = op("Gelu", gate, approximate="tanh")
        down = linear.matrix(f"{prefix}.down_proj", (hidden, inner), decoder.mlp_bias)
        return linear.apply(op("Mul", active, up), down)

    def _norm(self, x: ir.Value, name: str) -> ir.Value:
        weight = self._norm_weight(name, self.decoder.hidden_size)
        epsilon = self.decoder.norm_epsilon
        out: ir.Value = self.graph.op("RMSNormalization", x, weight, axis=-1, epsilon=epsilon)
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
        if self.attention.standard:
            stream = self.graph.op("Add", stream, added)
            return stream, self._norm(stream, name)
        normed, _, _, stream = self.graph.op(
            "SkipSimplifiedLayerNormalization",
            added,
            stream,
            self._norm_weight(name, self.decoder.hidden_size),
            domain=MICROSOFT,
            outputs=4,
            unused=(1, 2),  # mean and inverse deviation
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
