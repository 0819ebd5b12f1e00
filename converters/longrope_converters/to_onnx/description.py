"""What a decoder is made of, in the words that all families share."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from longrope_export.errors import UnsupportedError
from longrope_export.models.hf_config import HfConfig

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Decoder:
    """One decoder-only model.

    Attributes:
        activation: of the gate, "silu" or "gelu_tanh".
        qkv_bias, output_bias, mlp_bias: which linear layers have a bias.
        fused: q, k and v are one matrix of the checkpoint, gate and up another (phi3).
        qk_norm: q and k are normalised per head, before the rotation (qwen3, gemma3).
        norm_plus_one: norm weights are stored as distance from one (gemma3).
        sandwich_norms: attention and MLP are normalised behind, too (gemma3).
        embedding_multiplier, residual_multiplier: factors of the embeddings, and of what a block
            adds to the residual stream (granite).
        logits_divisor: divides the logits (granite).
        softcap: c in c * tanh(logits / c), or None.
        attention_scale: factor of q k^T.
        windows: per layer, how many tokens a query sees, itself included; None for all.
        local_theta: rope_theta of the layers with a window where they have their own (gemma3).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    norm_epsilon: float
    activation: str
    tied: bool
    windows: tuple[int | None, ...]
    attention_scale: float
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    fused: bool = False
    qk_norm: bool = False
    norm_plus_one: bool = False
    sandwich_norms: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    softcap: float | None = None
    local_theta: float | None = None

    @property
    def num_layers(self) -> int:
        return len(self.windows)

    def but(self, **changes: object) -> Decoder:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


def describe_common(config: HfConfig) -> Decoder:
    """What every family reads from config.json in the same way.

    Raises:
        ModelError: a size is missing or no positive integer.
        UnsupportedError: an activation that is not built here.
    """
    activation = str(config.get("hidden_act", "silu"))
    if activation not in ACTIVATIONS:
        raise UnsupportedError(
            f"{config.path}: hidden_act is {activation!r}; the ONNX exporter builds "
            f"{', '.join(sorted(ACTIVATIONS))}"
        )
    return Decoder(
        vocab_size=config.require_int("vocab_size"),
        hidden_size=config.require_int("hidden_size"),
        intermediate_size=config.require_int("intermediate_size"),
        num_heads=config.require_int("num_attention_heads"),
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        activation=ACTIVATIONS[activation],
        tied=bool(config.get("tie_word_embeddings", False)),
        windows=(None,) * config.require_int("num_hidden_layers"),
        attention_scale=1 / math.sqrt(config.head_dim),
    )


def same_window(window: int | None, decoder: Decoder) -> Decoder:
    """One sliding window for all layers, or none (mistral, phi3)."""
    return decoder.but(windows=(window,) * decoder.num_layers) if window else decoder
