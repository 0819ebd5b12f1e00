"""Angles of every tier, and the rotation of queries and keys by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class TierTables:
    """The numbers of a definition as tensors: float64, one copy per device.

    Pair i of position p turns by p * theta_i below the tier's start-token count, else by
    p * theta_i / factor_i; cos and sin carry the tier's attention factor. Plain attributes, not
    buffers: neither model.half() nor loading on the meta device may touch them.

    Args:
        definition: the JSON shape of a factors file.
    """

    def __init__(self, definition: Mapping[str, Any]) -> None:
        tiers, width = definition["tiers"], definition["rotary_dim"]

        def column(values: Any, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device="cpu")

        exponents = column([-2 * pair / width for pair in range(width // 2)])
        self.original = column(definition["rope_theta"]) ** exponents  # (pairs,) radians per token
        factors = column([tier["rescale_factors"] for tier in tiers])
        self.rescaled = self.original / factors  # (tiers, pairs)
        starts = [tier.get("num_start_tokens", 0) for tier in tiers]
        self.num_start_tokens = column(starts)
        self.has_start_tokens = any(starts)
        self.attention_factors = column([tier.get("attention_factor", 1.0) for tier in tiers])
        # tier t serves positions below borders[t]
        self.borders = column([tier["max_length"] for tier in tiers], torch.int64)
        self._copies: dict[torch.device, TierTables] = {}

    def on(self, device: torch.device) -> TierTables:
        """These tables on a device; on the CPU for one without float64 (Apple's mps)."""
        if device.type in ("cpu", "mps"):
            return self
        if device not in self._copies:
            copy = object.__new__(TierTables)
            copy.__dict__ = {
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in vars(self).items()
            }
            self._copies[device] = copy
        return self._copies[device]

    def select(self, positions: Tensor) -> Tensor:
        """Index of the first tier with position < max_length; len(borders) beyond the last."""
        return torch.bucketize(positions, self.borders, right=True)

    def angles(self, positions: Tensor, tiers: Tensor) -> Tensor:
        """(batch, n, pairs) float64 radians for positions (batch, n), tiers (batch, n or 1)."""
        absolute = positions[..., None].double()
        turned = absolute * self.rescaled[tiers]
        if not self.has_start_tokens:
            return turned
        is_start = absolute < self.num_start_tokens[tiers][..., None]
        return torch.where(is_start, absolute * self.original, turned)

    def cos_sin(
        self, positions: Tensor, tiers: Tensor, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """cos and sin times the attention factor, each (batch, n, pairs) float32 on `device`."""
        tables, positions, tiers = self._placed(device, positions, tiers)
        angles = tables.angles(positions, tiers)
        scale = tables.attention_factors[tiers][..., None]
        return (angles.cos() * scale).float().to(device), (angles.sin() * scale).float().to(device)

    def plain_cos_sin(self, positions: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """The same for layers that are not rescaled: of the base alone."""
        tables, positions = self._placed(device, positions)
        angles = positions[..., None].double() * tables.original
        return angles.cos().float().to(device), angles.sin().float().to(device)

    def turn(
        self, positions: Tensor, before: Tensor, after: Tensor, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """What turns vectors from one tier to another, for use with `rotate`.

        Args:
            positions: (batch, n).
            before, after: (batch, n or 1) tier indices.
        """
        tables, positions, before, after = self._placed(device, positions, before, after)
        angles = tables.angles(positions, after) - tables.angles(positions, before)
        scale = (tables.attention_factors[after] / tables.attention_factors[before])[..., None]
        return (angles.cos() * scale).float().to(device), (angles.sin() * scale).float().to(device)

    def _placed(self, device: torch.device, *tensors: Tensor) -> tuple[Any, ...]:
        where = torch.device("cpu") if device.type == "mps" else device
        return self.on(device), *(tensor.to(where) for tensor in tensors)


def rotate(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the rotary channels of queries or keys, in float32.

    Args:
        vectors: (batch, heads, n, head_dim); pair i is channels i and i + pairs, the channels from
            2 * pairs on stay as they are.
        cos, sin: (batch, n, pairs).

    Returns:
        Same shape and dtype as vectors.
    """
    pairs = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    first, second = vectors[..., :pairs].float(), vectors[..., pairs : 2 * pairs].float()
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    turned = turned.to(vectors.dtype)
    if vectors.shape[-1] == 2 * pairs:
        return turned
    return torch.cat((turned, vectors[..., 2 * pairs :]), dim=-1)
