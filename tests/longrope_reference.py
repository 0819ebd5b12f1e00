"""The definition, computed the plain way: transformers' model, with attention written out here.

Every query is rotated by its own tier and every key by the query's tier, from unrotated queries and
keys, without a cache, in float32 with float64 angles. Nothing of the project is used but the numbers
in a LongRopeConfig.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from longrope_export.config import LongRopeConfig

NAME = "longrope_reference"


class Reference:
    """A model folder under a config.

    Args:
        local_theta: base of the layers with a sliding window (gemma3), where they have their own.
    """

    def __init__(
        self, folder: Path, config: LongRopeConfig, local_theta: float | None = None
    ) -> None:
        self.config, self.local_theta = config, local_theta
        transformers.AttentionInterface.register(NAME, self._attention)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=NAME
        ).eval()
        self.model.model.rotary_emb = _NoRotation(config.rotary_dim)

    def logits(self, tokens: Any) -> np.ndarray:
        """(n, vocabulary) of one whole sequence."""
        transformers.AttentionInterface.register(NAME, self._attention)
        with torch.no_grad():
            ids = torch.as_tensor(np.asarray(tokens))[None]
            return self.model(ids, use_cache=False).logits[0].numpy()

    def generate(self, tokens: Any, count: int) -> list[int]:
        """Greedy, every step from nothing."""
        out = list(map(int, tokens))
        for _ in range(count):
            out.append(int(self.logits(out)[-1].argmax()))
        return out[len(tokens) :]

    def _tiers(self, length: int) -> list[int]:
        borders = [tier.max_length for tier in self.config.tiers]

        def first(n: int) -> int:
            return next(index for index, border in enumerate(borders) if n <= border)

        if self.config.switch == "sequence":
            return [first(length)] * length
        return [first(position + 1) for position in range(length)]

    def _rotate(self, x: torch.Tensor, positions: torch.Tensor, tier: int | None, theta: float):
        """x (heads, n, head_dim); tier None is the original rotation."""
        half = self.config.rotary_dim // 2
        angle = torch.empty(len(positions), half, dtype=torch.float64)
        scale = 1.0
        for pair in range(half):
            original = positions.double() * theta ** (-2.0 * pair / (2 * half))
            angle[:, pair] = original
            if tier is not None:
                setting = self.config.tiers[tier]
                rescaled = original / setting.rescale_factors[pair]
                angle[:, pair] = torch.where(
                    positions < setting.num_start_tokens, original, rescaled
                )
                scale = setting.attention_factor
        cos, sin = (angle.cos() * scale).float(), (angle.sin() * scale).float()
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        turned = (first * cos - second * sin, second * cos + first * sin, rest)
        return torch.cat(turned, dim=-1)

    def _attention(self, module, query, key, value, mask, scaling=None, dropout=0.0, **kwargs):
        """transformers hands over (1, heads, n, head_dim), not rotated."""
        layer, length = module.layer_idx, query.shape[2]
        window = getattr(module, "sliding_window", None) or kwargs.get("sliding_window")
        config, positions = self.config, torch.arange(length)
        groups = query.shape[1] // key.shape[1]
        keys = key[0].repeat_interleave(groups, 0)
        values = value[0].repeat_interleave(groups, 0)
        queries = query[0]
        log = config.logit_scaling
        if log is not None and layer not in log.exempt_layers:
            factors = [max(math.log(p + 1) / math.log(log.base_length), 1.0) for p in range(length)]
            queries = queries * torch.tensor(factors)[:, None]
        local = window is not None and self.local_theta is not None
        theta = self.local_theta if local else config.rope_theta
        rescaled = not local and (config.layers is None or layer in config.layers)
        tiers = torch.tensor(self._tiers(length))
        out = torch.empty_like(queries)
        for tier in tiers.unique().tolist():
            rows = torch.nonzero(tiers == tier)[:, 0]
            choice = tier if rescaled else None
            turned = self._rotate(keys, positions, choice, theta)
            scores = self._rotate(queries[:, rows], positions[rows], choice, theta)
            scores = scores @ turned.transpose(1, 2) * scaling
            distance = positions[rows][:, None] - positions[None]
            visible = distance >= 0
            if window is not None:
                visible &= distance < window
            scores = scores.masked_fill(~visible, -torch.inf)
            out[:, rows] = scores.softmax(-1) @ values
        return out.transpose(0, 1)[None], None


class _NoRotation(torch.nn.Module):
    def __init__(self, rotary_dim: int) -> None:
        super().__init__()
        self.rotary_dim = rotary_dim

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *_: Any) -> Any:
        shape = (1, position_ids.shape[1], self.rotary_dim)
        return torch.ones(shape), torch.zeros(shape)
