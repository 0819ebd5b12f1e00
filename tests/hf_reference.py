"""Toy models of every family, and the definition computed by verify's reference to compare with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor

from longrope_export.config import FactorTier, LogitScaling, LongRopeConfig, SwitchPolicy
from longrope_export.verify import reference

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
    "Gemma": {"head_dim": 16},
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


def reference_logits(model: Any, config: LongRopeConfig, ids: Tensor, tier: int | None) -> Tensor:
    """(n, vocab) logits of one unpadded sequence.

    Args:
        ids: (n,).
        tier: the tier of every token, or None for the causal rule, by position.
    """
    causal = replace(config, switch=SwitchPolicy.CAUSAL)
    tier_at = None if tier is None else lambda position: tier
    return reference.reference_logits(
        model, causal, ids.tolist(), tier_at=tier_at, gradients=torch.is_grad_enabled()
    )


def tier_index(config: LongRopeConfig, length: int) -> int:
    return next(i for i, tier in enumerate(config.tiers) if length <= tier.max_length)


def some_ids(rows: int, length: int) -> Tensor:
    """(rows, length) ids of the toy, always the same."""
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(9))
