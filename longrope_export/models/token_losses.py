"""Losses of a transformers model without a (length x vocabulary) tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

LOGIT_VALUES = 1 << 24  # of one chunk of logits, 64 MB of float32
IGNORED = -100  # a target that is none, as transformers and torch write it


def token_losses(model: Any, hidden: Tensor, following: Tensor) -> Tensor:
    """-ln p of each following token, and whether it was the most probable; (2, n) float32.

    Logits are made and forgotten in chunks; where gradients are recorded, they are made once more
    for the backward pass.

    Args:
        model: a causal language model of transformers; its output head and the caps and scales of
            Gemma 2 and Granite are used.
        hidden: (n, width) last hidden states.
        following: (n,) ids; IGNORED gives 0 and 0.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    rows = max(1, LOGIT_VALUES // model.config.get_text_config().vocab_size)
    parts = []
    for part, target in zip(torch.split(hidden, rows), torch.split(following, rows), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(_chunk_losses, model, part, target, use_reentrant=False))
        else:
            parts.append(_chunk_losses(model, part, target))
    return torch.cat(parts, dim=1)


def _chunk_losses(model: Any, hidden: Tensor, following: Tensor) -> Tensor:
    import torch
    from torch.nn.functional import cross_entropy

    settings = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden).float()
    scaling = getattr(settings, "logits_scaling", None)  # granite
    if scaling:
        logits = logits / scaling
    softcap = getattr(settings, "final_logit_softcapping", None)  # gemma2
    if softcap:
        logits = (logits / softcap).tanh() * softcap
    hits = logits.detach().argmax(-1) == following
    losses = cross_entropy(logits, following, reduction="none", ignore_index=IGNORED)
    return torch.stack([losses, hits.float()])
