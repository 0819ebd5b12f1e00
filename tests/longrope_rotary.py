"""Angles of longrope worked out here, apart from the project's own formulas, for parity tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

Factors = Callable[[int], Sequence[float]]  # length of the sequence -> divisors of the frequencies


class Rotary(torch.nn.Module):
    """Stands in for a transformers rotary embedding: cos and sin from given divisors."""

    def __init__(self, theta: float, dim: int, factors: Factors, scale: float) -> None:
        super().__init__()
        self.theta, self.dim, self.factors, self.scale = theta, dim, factors, scale

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        length = int(position_ids.max()) + 1
        plain = layer_type == "sliding_attention"  # gemma3's local layers are never rescaled
        theta = 10000.0 if plain else self.theta
        divisors = [1.0] * (self.dim // 2) if plain else self.factors(length)
        pair = torch.arange(self.dim // 2, dtype=torch.float64)
        speed = theta ** (-2 * pair / self.dim) / torch.tensor(divisors, dtype=torch.float64)
        angles = position_ids.to(torch.float64)[..., None] * speed
        both = torch.cat((angles, angles), dim=-1)
        scale = 1.0 if plain else self.scale
        return (both.cos() * scale).to(x.dtype), (both.sin() * scale).to(x.dtype)


@torch.no_grad()
def reference_logits(
    folder: Path, theta: float, dim: int, factors: Factors, scale: float, lengths: Sequence[int]
) -> list[Any]:
    """float32 logits of transformers' own model of `folder` with the rotation replaced."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.get_decoder().rotary_emb = Rotary(theta, dim, factors, scale)
    return [model(tokens(length)).logits[0].numpy() for length in lengths]


def tokens(length: int) -> torch.Tensor:
    return (torch.arange(length) * 7919 % 311 + 3)[None]
