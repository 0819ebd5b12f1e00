"""The definition, written down once more for tests: slow, fp32, and no code shared with the package.

A transformers model supplies everything but the rotation: its own is switched off, and the attention
below rotates queries and keys by the tier of each query.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longrope_export.config import LongRopeConfig


def cos_sin(
    positions: torch.Tensor,
    theta: float,
    dim: int,
    factors: Sequence[float],
    start: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, dim/2) each, float64 angles."""
    freq = torch.tensor([theta ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
    plain = positions[:, None].double() * freq
    scaled = plain / torch.tensor(factors, dtype=torch.float64)
    angle = torch.where(positions[:, None] < start, plain, scaled)
    return (angle.cos() * scale).float(), (angle.sin() * scale).float()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (batch, heads, n, head_dim), half-split layout; channels behind 2 * cos.shape[-1] pass."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def tier_of(config: LongRopeConfig, position: int, length: int) -> int:
    wanted = position + 1 if config.switch == "causal" else length
    return next(
        (i for i, tier in enumerate(config.tiers) if wanted <= tier.max_length),
        len(config.tiers) - 1,
    )


@contextmanager
def _without_rotation(model: Any) -> Iterator[None]:
    saved = []
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            original = module.forward
            saved.append((module, original))

            def forward(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
                cos, sin = _original(*args, **kwargs)
                return torch.ones_like(cos), torch.zeros_like(sin)

            module.forward = forward
    try:
        yield
    finally:
        for module, original in saved:
            module.forward = original


@torch.no_grad()
def reference_logits(
    model: Any,
    config: LongRopeConfig,
    tokens: Sequence[int],
    *,
    positions: Sequence[int] | None = None,
    length: int | None = None,
    local_theta: float | None = None,
    tier_at: Callable[[int], int] | None = None,
) -> torch.Tensor:
    """Logits (n, vocab) of one sequence in one pass, without a cache.

    Args:
        length: the final length that picks the tier under `sequence`; the number of tokens if None.
        local_theta: base of the layers that the config does not rescale; its own base if None.
        tier_at: overrides the tier of a position.
    """
    n = len(tokens)
    at = torch.tensor(list(range(n)) if positions is None else list(positions))
    final = int(at[-1]) + 1 if length is None else length
    tiers = [tier_at(int(p)) if tier_at else tier_of(config, int(p), final) for p in at]
    log_scale = torch.ones(n)
    if config.logit_scaling is not None:
        base = config.logit_scaling.base_length
        log_scale = torch.tensor([max(math.log(int(p) + 1) / math.log(base), 1.0) for p in at])

    def attention(
        module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        layer = module.layer_idx
        groups = q.shape[1] // k.shape[1]
        window = kwargs.get("sliding_window")
        scaling = kwargs.get("scaling") or q.shape[-1] ** -0.5
        softcap = kwargs.get("softcap")
        if config.logit_scaling is None or layer not in config.logit_scaling.exempt_layers:
            q = q * log_scale[:, None]
        out = torch.zeros_like(q)
        for tier in sorted(set(tiers)):
            rows = torch.tensor([i for i, t in enumerate(tiers) if t == tier])
            chosen = config.tiers[tier]
            local = window is not None and local_theta is not None
            if not local and (config.layers is None or layer in config.layers):
                theta, factors = config.rope_theta, list(chosen.rescale_factors)
                start, scale = chosen.num_start_tokens, chosen.attention_factor
            else:
                theta, factors = local_theta or config.rope_theta, [1.0] * config.num_pairs
                start, scale = 0, 1.0
            cos, sin = cos_sin(at, theta, config.rotary_dim, factors, start, scale)
            keys = rotate(k, cos, sin).repeat_interleave(groups, 1)
            queries = rotate(q[:, :, rows], cos[rows], sin[rows])
            scores = queries @ keys.transpose(2, 3) * scaling
            if softcap:
                scores = torch.tanh(scores / softcap) * softcap
            seen = at[None, :] <= at[rows][:, None]
            if window:
                seen &= at[None, :] > at[rows][:, None] - window
            scores = scores.masked_fill(~seen, -torch.inf)
            out[:, :, rows] = functional.softmax(scores, -1) @ v.repeat_interleave(groups, 1)
        return out.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS["longrope_reference"] = attention
    before = model.config._attn_implementation
    model.config._attn_implementation = "longrope_reference"
    try:
        with _without_rotation(model):
            ids = torch.tensor([list(tokens)])
            result = model(ids, position_ids=at[None], use_cache=False)
    finally:
        model.config._attn_implementation = before
    return result.logits[0].float()


class Reference:
    """The definition for a model folder.

    Args:
        local_theta: base of the layers with a sliding window (gemma3), where they have their own.
    """

    def __init__(
        self, folder: Path, config: LongRopeConfig, local_theta: float | None = None
    ) -> None:
        self.config, self.local_theta = config, local_theta
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        ).eval()

    def logits(self, tokens: Any) -> npt.NDArray[np.float32]:
        """(n, vocabulary) of one whole sequence."""
        ids = [int(token) for token in tokens]
        logits = reference_logits(self.model, self.config, ids, local_theta=self.local_theta)
        return logits.numpy()

    def generate(self, tokens: Any, count: int) -> list[int]:
        """Greedy, every step from nothing."""
        out = [int(token) for token in tokens]
        for _ in range(count):
            out.append(int(self.logits(out)[-1].argmax()))
        return out[len(tokens) :]
