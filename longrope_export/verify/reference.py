"""The definition, written down once more: slow, float32 with float64 angles, without a cache.

It shares no formula, no table and no code with rope.py, the live runtime or any exporter, so that an
agreement means something. A transformers model supplies everything but the rotation: its own is
switched off, and the attention below rotates queries and keys by the tier of each query.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from longrope_export.config import LongRopeConfig
from longrope_export.models.torch_model import load_torch_model

if TYPE_CHECKING:
    from torch import Tensor

_SCORES = 1 << 20  # attention scores held at once: 4 MB of float32 stay in a cache
_NAME = "longrope_reference"


class Reference:
    """A model under a definition.

    Args:
        path: a Hugging Face folder or a GGUF; its weights are used in float32.
        config: the definition.
        progress: called after each layer with the share of the pass that is done, 0 to 1.

    Raises:
        UnsupportedError: torch or transformers is not installed.
        ModelError: transformers cannot load the model.
    """

    def __init__(
        self,
        path: Path,
        config: LongRopeConfig,
        progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        self.config, self._progress = config, progress
        self.model, _ = load_torch_model(path)

    def logits(
        self,
        tokens: Sequence[int] | npt.NDArray[Any],
        *,
        keep: Sequence[int] | None = None,
        length: int | None = None,
        first_position: int = 0,
    ) -> npt.NDArray[np.float32]:
        """Logits of one sequence, in one pass.

        Args:
            tokens: (n,) ids.
            keep: indices of the tokens whose logits are wanted; None for all.
            length: the final length that picks the tier under `sequence`; that of the last token
                if None.
            first_position: of tokens[0].

        Returns:
            (len(keep) or n, vocabulary) float32.
        """
        result = reference_logits(
            self.model,
            self.config,
            tokens,
            keep=keep,
            positions=range(first_position, first_position + len(tokens)),
            length=length,
            progress=self._progress,
        )
        logits: npt.NDArray[np.float32] = result.numpy()
        return logits

    def layer_outputs(
        self,
        tokens: Sequence[int] | npt.NDArray[Any],
        count: int,
        *,
        length: int | None = None,
        first_position: int = 0,
    ) -> npt.NDArray[np.float32]:
        """(layers, count, width) float32: what each layer hands to the next one.

        Args:
            tokens, length, first_position: see logits.
            count: of the last tokens, whose outputs are wanted.
        """
        outputs: list[Tensor] = []

        def keep(module: Any, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            outputs.append(hidden[0, -count:].float())

        handles = [layer.register_forward_hook(keep) for layer in self.model.get_decoder().layers]
        try:
            last = [len(tokens) - 1]
            self.logits(tokens, keep=last, length=length, first_position=first_position)
        finally:
            for handle in handles:
                handle.remove()
        return np.stack([output.numpy() for output in outputs])

    def generate(self, tokens: Sequence[int] | npt.NDArray[Any], count: int) -> list[int]:
        """`count` greedy tokens, every step from nothing."""
        out = [int(token) for token in tokens]
        for _ in range(count):
            out.append(int(self.logits(out, keep=[len(out) - 1])[-1].argmax()))
        return out[len(tokens) :]


def reference_logits(
    model: Any,
    config: LongRopeConfig,
    tokens: Sequence[int] | npt.NDArray[Any],
    *,
    keep: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    length: int | None = None,
    tier_at: Callable[[int], int] | None = None,
    gradients: bool = False,
    progress: Callable[[float], None] = lambda share: None,
) -> Tensor:
    """As Reference.logits, for a model in memory; (len(keep) or n, vocabulary) float32.

    Args:
        positions: (n,) rising; 0..n-1 if None.
        tier_at: the index of the tier of a position, instead of the config's rule.
        gradients: keep what a backward pass needs.
    """
    import torch

    n = len(tokens)
    at = torch.arange(n) if positions is None else torch.tensor(list(positions))
    final = int(at[-1]) + 1 if length is None else length
    tiers = [tier_at(int(p)) if tier_at else tier_of(config, int(p), final) for p in at]
    attention = _Attention(model, config, at, tiers, progress)
    wanted = torch.arange(n) if keep is None else torch.tensor(list(keep))
    grad = torch.set_grad_enabled(gradients)
    with grad, _without_rotation(model), attention.installed():
        result = model(
            torch.tensor([[int(token) for token in tokens]]),
            position_ids=at[None],
            use_cache=False,
            logits_to_keep=wanted,
        )
    logits: Tensor = result.logits[0].float()
    return logits


def cos_sin(
    positions: Tensor, theta: float, dim: int, factors: Sequence[float], start: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(n, dim / 2) float32 each, from float64 angles: LongRoPE (arXiv 2402.13753), equation 2.

    Args:
        start: positions below it are not rescaled.
        scale: attention factor, on all of them.
    """
    import torch

    frequencies = torch.tensor(
        [theta ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64
    )
    plain = positions[:, None].double() * frequencies
    slow = plain / torch.tensor(factors, dtype=torch.float64)
    angle = torch.where(positions[:, None] < start, plain, slow)
    return (angle.cos() * scale).float(), (angle.sin() * scale).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (batch, heads, n, head_dim), half-split layout; channels behind 2 * cos.shape[-1] pass."""
    import torch

    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def tier_of(config: LongRopeConfig, position: int, length: int) -> int:
    """Index of the tier that a token is computed under: verify's own choice, apart from the config's.

    Args:
        position: of the token; decides under `causal`.
        length: of the whole sequence, the position behind its last token; decides under `sequence`.
    """
    wanted = position + 1 if config.switch == "causal" else length
    for index, tier in enumerate(config.tiers):
        if wanted <= tier.max_length:
            return index
    return len(config.tiers) - 1


class _Attention:
    """Takes the place of transformers' attention functions for one pass."""

    def __init__(
        self,
        model: Any,
        config: LongRopeConfig,
        at: Tensor,
        tiers: list[int],
        progress: Callable[[float], None],
    ) -> None:
        self.model, self.config, self.at = model, config, at
        self.tiers, self.progress = tiers, progress
        self.num_layers = int(model.config.get_text_config().num_hidden_layers)
        self.local_theta = _local_theta(model)

    @contextmanager
    def installed(self) -> Iterator[None]:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS[_NAME] = self
        before = self.model.config._attn_implementation
        self.model.config._attn_implementation = _NAME
        try:
            yield
        finally:
            self.model.config._attn_implementation = before
            del ALL_ATTENTION_FUNCTIONS[_NAME]

    def __call__(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """q, k, v: (1, heads, n, head_dim), not rotated yet; returns (1, n, heads, head_dim)."""
        import torch

        layer = module.layer_idx
        window = kwargs.get("sliding_window")
        q = q * self._log_scale(layer)[:, None]
        group = q.shape[1] // k.shape[1]
        out = torch.zeros_like(q)
        for tier in sorted(set(self.tiers)):
            rows = torch.tensor([i for i, other in enumerate(self.tiers) if other == tier])
            seen = int(rows[-1]) + 1
            cos, sin = self._cos_sin(layer, tier, window, self.at[:seen])
            keys = rotate(k[:, :, :seen], cos, sin).transpose(2, 3)
            for block in torch.split(rows, max(1, _SCORES // seen)):
                end = int(block[-1]) + 1
                queries = rotate(q[:, :, block], cos[block], sin[block])
                unseen = self._unseen(block, end, window)
                for head in range(q.shape[1]):
                    seen_keys = keys[:, head // group, :, :end]
                    weights = _weights(queries[:, head], seen_keys, unseen, kwargs)
                    out[:, head, block] = weights @ v[:, head // group, :end]
        self.progress((layer + 1) / self.num_layers)
        return out.transpose(1, 2).contiguous(), None

    def _unseen(self, rows: Tensor, end: int, window: int | None) -> Tensor:
        """(rows, end) keys that a query must not see."""
        here, there = self.at[rows][:, None], self.at[:end][None, :]
        unseen = there > here
        if window:
            unseen |= there <= here - window
        return unseen

    def _cos_sin(
        self, layer: int, tier: int, window: int | None, at: Tensor
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        local = window is not None and self.local_theta is not None
        if not local and (config.layers is None or layer in config.layers):
            chosen = config.tiers[tier]
            return cos_sin(
                at,
                config.rope_theta,
                config.rotary_dim,
                chosen.rescale_factors,
                chosen.num_start_tokens,
                chosen.attention_factor,
            )
        theta = (self.local_theta if local else None) or config.rope_theta
        return cos_sin(at, theta, config.rotary_dim, [1.0] * config.num_pairs, 0, 1.0)

    def _log_scale(self, layer: int) -> Tensor:
        """(n,) Entropy-ABF (arXiv 2401.07004), section 3.2."""
        import torch

        scaling = self.config.logit_scaling
        if scaling is None or layer in scaling.exempt_layers:
            return torch.ones(len(self.at))
        base = math.log(scaling.base_length)
        return torch.tensor([max(math.log(int(p) + 1) / base, 1.0) for p in self.at])


def _weights(q: Tensor, keys: Tensor, unseen: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """(1, rows, end) attention of one head."""
    import torch

    scores = (q * (kwargs.get("scaling") or q.shape[-1] ** -0.5)) @ keys
    softcap = kwargs.get("softcap")
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    return torch.softmax(scores.masked_fill_(unseen, -torch.inf), -1)


def _local_theta(model: Any) -> float | None:
    """The base of layers with a sliding window where they have their own (gemma3)."""
    block = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    local = block.get("sliding_attention")
    return float(local["rope_theta"]) if local else None


@contextmanager
def _without_rotation(model: Any) -> Iterator[None]:
    """The model's rotary embeddings answer cos = 1 and sin = 0."""
    import torch

    rotary = [m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")]
    before = [module.forward for module in rotary]

    def silenced(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            cos, sin = original(*args, **kwargs)
            return torch.ones_like(cos), torch.zeros_like(sin)

        return forward

    for module, original in zip(rotary, before, strict=True):
        module.forward = silenced(original)
    try:
        yield
    finally:
        for module, original in zip(rotary, before, strict=True):
            module.forward = original
