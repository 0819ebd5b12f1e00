"""Toy models of every family, and the definition computed by itself to compare with.

The reference shares no code with the runtime: the model's rotary embedding is switched off, and an
attention function written here rotates queries and keys in float64, once per tier, all keys by the
same tier as the query, without cache, padding or batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface

from longrope_export.config import FactorTier, LogitScaling, LongRopeConfig, SwitchPolicy

THETA = 10000.0
VOCAB = 96
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rope_theta": THETA,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "attention_dropout": 0.0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_TWO_KINDS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 6},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Phi3": {"partial_rotary_factor": 0.75, "hidden_size": 64},
    "Gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, **_TWO_KINDS},
    "Gemma3": {"head_dim": 16, "query_pre_attn_scalar": 16, **_TWO_KINDS},
    "Granite": {"attention_multiplier": 0.3},
    "Mixtral": _LOCAL,
    "Qwen2Moe": {**_EXPERTS, "shared_expert_intermediate_size": 16},
    "Qwen3Moe": {**_EXPERTS, "head_dim": 8},
    "GraniteMoe": {**_LOCAL, "attention_multiplier": 0.3},
    "Phimoe": _LOCAL,
}


def toy_model(family: str = "Llama", *, noise: float = 0.2, **changes: Any) -> Any:
    """A random fp32 model in eval mode, with attention sharp enough to notice a wrong angle."""
    settings = {**_SIZES, **FAMILIES[family], **changes}
    if family in ("Phi3", "Phimoe"):  # above any length here: Phi-3 drops its cache when it passes
        settings.setdefault("original_max_position_embeddings", 64)
    name = "Gemma3Text" if family == "Gemma3" else family
    torch.manual_seed(7)
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return model.eval()


def rotary_dim(model: Any) -> int:
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    block = config.rope_parameters.get("full_attention", config.rope_parameters)
    return int(head_dim * block.get("partial_rotary_factor", 1.0))


def toy_config(
    model: Any,
    switch: str = "causal",
    *,
    plain_logits: bool = False,
    lengths: tuple[int, ...] = (6, 13, 24),
    **changes: Any,
) -> LongRopeConfig:
    """Three tiers that use every field of a definition."""
    width = rotary_dim(model)
    ramp = [pair / max(width // 2 - 1, 1) for pair in range(width // 2)]
    tiers = tuple(
        FactorTier(
            length,
            tuple(1 + index * (0.4 + 2.5 * x) for x in ramp),
            num_start_tokens=(0, 3, 2)[index],
            attention_factor=(1.0, 1.2, 1.35)[index],
        )
        for index, length in enumerate(lengths)
    )
    fields: dict[str, Any] = {
        "rope_theta": THETA,
        "rotary_dim": width,
        "original_max_position_embeddings": lengths[0],
        "max_position_embeddings": lengths[-1],
        "tiers": tiers,
        "switch": SwitchPolicy(switch),
        "logit_scaling": None if plain_logits else LogitScaling(5, (0,)),
        "layers": (1,) if "Gemma3" in type(model).__name__ else None,
    }
    return LongRopeConfig(**{**fields, **changes})


class _NoRotary(nn.Module):
    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        if layer_type == "sliding_attention":
            return self.original(x, position_ids, layer_type)
        cos, sin = self.original(x, position_ids, *([layer_type] if layer_type else []))
        return torch.ones_like(cos), torch.zeros_like(sin)


def _rotated(x: Tensor, positions: Tensor, width: int, tier: FactorTier | None) -> Tensor:
    """x (heads, n, head_dim) float64; the formula of design section 3, token by token and pair by pair."""
    result = x.clone()
    half = width // 2
    for pair in range(half):
        theta = THETA ** (-2 * pair / width)
        angle = positions.double() * theta
        scale = 1.0
        if tier is not None:
            long = angle / tier.rescale_factors[pair]
            angle = torch.where(positions < tier.num_start_tokens, angle, long)
            scale = tier.attention_factor
        a, b = x[..., pair], x[..., pair + half]
        result[..., pair] = (a * angle.cos() - b * angle.sin()) * scale
        result[..., pair + half] = (a * angle.sin() + b * angle.cos()) * scale
    return result


@contextmanager
def _reference_attention(
    model: Any, config: LongRopeConfig, positions: Tensor, tier_of: Tensor
) -> Iterator[None]:
    """tier_of: (n,) the tier index of each query."""
    width = config.rotary_dim

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        layer = module.layer_idx
        q, k, v = (part[0].double() for part in (query, key, value))
        groups = len(q) // len(k)
        scaling = config.logit_scaling
        if scaling is not None and layer not in scaling.exempt_layers:
            log = torch.log(positions.double() + 1) / math.log(scaling.base_length)
            q = q * torch.clamp(log, min=1.0)[:, None]
        output = torch.zeros(query.shape[2], len(q), v.shape[-1], dtype=torch.float64)
        n = torch.arange(query.shape[2])
        visible = n[:, None] >= n[None, :]
        window = kwargs.get("sliding_window")
        if window is not None:
            visible = visible & (n[:, None] - n[None, :] < window)
        is_local = "Gemma3" in type(module).__name__ and module.is_sliding
        for index, tier in enumerate(config.tiers):
            if not is_local:
                listed = config.layers is None or layer in config.layers
                used = tier if listed else None
                rotated_q = _rotated(q, positions, width, used)
                rotated_k = _rotated(k, positions, width, used)
            else:
                rotated_q, rotated_k = q, k  # the model's own rotation, done before
            for head in range(len(q)):
                logits = rotated_q[head] @ rotated_k[head // groups].T * kwargs["scaling"]
                if kwargs.get("softcap") is not None:
                    logits = torch.tanh(logits / kwargs["softcap"]) * kwargs["softcap"]
                weights = torch.softmax(logits.masked_fill(~visible, -torch.inf), dim=-1)
                rows = tier_of == index
                output[rows, head] = (weights @ v[head // groups])[rows]
        return output[None].to(query.dtype), None

    AttentionInterface.register("reference", attention)
    text, own = model.model, model.config._attn_implementation
    rotary = text.rotary_emb
    text.rotary_emb = _NoRotary(rotary)
    model.config._attn_implementation = "reference"
    try:
        yield
    finally:
        text.rotary_emb = rotary
        model.config._attn_implementation = own


def reference_logits(model: Any, config: LongRopeConfig, ids: Tensor, tier: int | None) -> Tensor:
    """(n, vocab) logits of one unpadded sequence.

    Args:
        ids: (n,).
        tier: the tier of every token, or None for the causal rule, by position.
    """
    positions = torch.arange(len(ids))
    if tier is None:
        lengths = [t.max_length for t in config.tiers]
        tier_of = torch.tensor([next(i for i, m in enumerate(lengths) if p < m) for p in positions])
    else:
        tier_of = torch.full((len(ids),), tier)
    with _reference_attention(model, config, positions, tier_of):
        logits: Tensor = model(ids[None], use_cache=False).logits[0]
    return logits


def tier_index(config: LongRopeConfig, length: int) -> int:
    return next(i for i, tier in enumerate(config.tiers) if length <= tier.max_length)
