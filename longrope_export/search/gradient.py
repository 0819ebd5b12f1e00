"""Derivatives of a document's loss by the factors of one tier."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from longrope_export.config import LongRopeConfig
from longrope_export.errors import UnsupportedError
from longrope_export.rope import compute_inv_freq

if TYPE_CHECKING:
    from torch import Tensor


def differentiate(
    model: Any,
    config: LongRopeConfig,
    mean_loss: Callable[[], Tensor],
) -> tuple[float, tuple[float, ...]]:
    """A loss of a pass, and its slopes.

    Layers are checkpointed: memory is that of one layer and of the hidden states between layers.

    Args:
        config: one tier for all positions and all layers.
        mean_loss: runs the model over whole rows from position 0, without a cache, to a scalar.

    Returns:
        That scalar, and (pairs + 1,) its derivatives by ln(factor) of each pair and by
        ln(attention factor).

    Raises:
        UnsupportedError: the config has several tiers, log scaling or a choice of layers.
    """
    import torch

    if len(config.tiers) != 1 or config.logit_scaling or config.layers is not None:
        raise UnsupportedError(
            "gradients are there for one tier on all layers, without log scaling; got "
            f"{len(config.tiers)} tiers, layers {config.layers}, scaling {config.logit_scaling}"
        )
    decoder = model.get_decoder()
    tier = config.tiers[0]
    logs = torch.tensor([*tier.rescale_factors, tier.attention_factor], dtype=torch.float64).log()
    logs.requires_grad_()
    speeds = torch.as_tensor(compute_inv_freq(config.rope_theta, config.rotary_dim))
    with _replaced(decoder, _rotary(logs, speeds, tier.num_start_tokens)), torch.enable_grad():
        loss = mean_loss()
        (slopes,) = torch.autograd.grad(loss, logs)
    return float(loss.detach()), tuple(slopes.tolist())


@contextlib.contextmanager
def _replaced(decoder: Any, rotary: Any) -> Iterator[None]:
    """The decoder with another rotary embedding, and with layers that are computed again for the
    backward pass instead of being kept.

    To the end: a layer that stopped early would not give back its offloaded weights.
    """
    from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

    original = decoder.rotary_emb
    decoder.rotary_emb = rotary
    before = [vars(layer).get("forward") for layer in decoder.layers]  # accelerate sets one
    for layer in decoder.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        with set_checkpoint_early_stop(False):
            yield
    finally:
        decoder.rotary_emb = original
        for layer, forward in zip(decoder.layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _rotary(logs: Tensor, speeds: Tensor, num_start_tokens: int) -> Any:
    """A rotary embedding, LongRoPE eq. 3, whose cos and sin depend on `logs` differentiably."""
    import torch
    from torch import nn

    class Differentiable(nn.Module):
        def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
            where = torch.device("cpu") if x.device.type == "mps" else x.device
            positions = position_ids[..., None].to(where, torch.float64)
            plain = positions * speeds.to(where)
            factors, scale = logs[:-1].exp().to(where), logs[-1].exp().to(where)
            angles = torch.where(positions < num_start_tokens, plain, plain / factors)
            both = torch.cat((angles, angles), dim=-1)
            cos, sin = both.cos() * scale, both.sin() * scale
            return cos.to(x.device, x.dtype), sin.to(x.device, x.dtype)

    return Differentiable()
