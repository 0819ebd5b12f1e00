"""Attention where queries of different tiers see differently rotated keys.

Registered with transformers under one name; it stands in front of the model's own attention
function (eager, sdpa, flash) and hands over to it, once per segment where a forward has several.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

NAME = f"longrope:{__name__}"
MASK_ROWS = 1024  # queries per explicit causal mask
Attention = Callable[..., tuple[Tensor, Tensor | None]]


class AttentionConfig:
    """Stands for the model's config inside one attention module and asks for our function.

    Attributes:
        original: the model's config, which goes on ruling everything else.
        eager: the eager attention function of the model's family.
        module: the attention module under that config, for functions that read it (flash).
        is_rescaled: whether the tiers apply to this layer.
        is_exempt: whether the queries of this layer are left out of log scaling.
    """

    _attn_implementation = NAME

    def __init__(self, module: nn.Module, is_rescaled: bool, is_exempt: bool) -> None:
        self.original: Any = module.config
        self.eager = sys.modules[type(module).__module__].eager_attention_forward
        self.module = ModuleView(module, module.config)
        self.is_rescaled, self.is_exempt = is_rescaled, is_exempt

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "original":
            raise AttributeError(name)
        return getattr(self.original, name)

    def own_attention(self) -> tuple[str, Attention]:
        """Name and function of the attention that the module would have called."""
        name = self.original._attn_implementation
        return name, ALL_ATTENTION_FUNCTIONS.get_interface(name, self.eager)


class ModuleView:
    """An attention module under another config."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_module":
            raise AttributeError(name)
        return getattr(self._module, name)


def longrope_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    longrope_pass: Any = None,
    longrope_query_scale: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query (batch, heads, n, head_dim), keys alike.

    Args:
        longrope_pass: a SegmentedPass where this forward has more than one segment.
        longrope_query_scale: (batch, n) float32, log scaling of the queries.
    """
    config: Any = module.config
    found: tuple[str, Attention] = config.own_attention()
    name, attend = found
    owner = module if name in ("sdpa", "eager") else config.module
    if longrope_query_scale is not None and not config.is_exempt:
        query = (query.float() * longrope_query_scale[:, None, :, None]).to(query.dtype)
    if longrope_pass is None or not config.is_rescaled:
        return attend(owner, query, key, value, attention_mask, **kwargs)
    joined: tuple[Tensor, Tensor | None] = longrope_pass.attend(
        name, attend, owner, query, key, value, attention_mask, kwargs
    )
    return joined


class SegmentedPass:
    """One forward whose rows cross a border; every layer calls `attend`.

    Args:
        plan: with segments and key positions.
        turn: (positions, tiers before, tiers after, device) -> cos, sin for `rotate`.
        rotate: turns vectors.
        keep: whether the layers share the cos and sin of each segment.
        error: what to raise for an attention that cannot be cut.
    """

    def __init__(
        self,
        plan: Any,
        turn: Callable[..., Any],
        rotate: Callable[..., Tensor],
        keep: bool,
        error: type[Exception],
    ) -> None:
        self.plan, self.turn, self.rotate, self.keep, self.error = plan, turn, rotate, keep, error

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend(
        self,
        name: str,
        attend: Attention,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """The attention of one layer, segment by segment, joined."""
        self.check(name, module, mask, kwargs)
        cached, width = self.plan.num_cached, key.shape[2]
        # sliding-window layers hold the last keys only, static caches have free columns at the end
        first = max(self.plan.key_positions.shape[1] - width, 0)
        filled = min(self.plan.key_positions.shape[1], width)
        outputs, weights = [], []
        for segment in self.plan.segments:
            stop = cached + segment.stop - first  # one past the last key that these queries see
            if self.permits_later_keys(mask, segment, stop):
                stop = filled
            keys, queries = key[:, :, :stop], query[:, :, segment.start : segment.stop]
            if not torch.equal(segment.tiers, self.plan.rows):
                cos, sin = self.turn_of(segment, query.device)
                seen = slice(first, first + stop)
                keys = self.rotate(keys, cos[:, seen], sin[:, seen])
                new = slice(cached + segment.start, cached + segment.stop)
                queries = self.rotate(queries, cos[:, new], sin[:, new])
            for start, end in self.blocks(segment, name, mask):
                rows = slice(start - segment.start, end - segment.start)
                output, weight = attend(
                    module,
                    queries[:, :, rows],
                    keys,
                    value[:, :, :stop],
                    self.mask_of(name, mask, start, end, stop, cached - first, query.device),
                    **self.kwargs_of(kwargs, start, end),
                )
                outputs.append(output)
                if weight is not None:
                    weights.append(nn.functional.pad(weight, (0, width - stop)))
        return torch.cat(outputs, dim=1), torch.cat(weights, dim=2) if weights else None

    def turn_of(self, segment: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        if segment.turn is not None and segment.turn[0].device == device:
            return segment.turn  # type: ignore[no-any-return]
        turn: tuple[Tensor, Tensor] = self.turn(
            self.plan.key_positions, self.plan.rows[:, None], segment.tiers[:, None], device
        )
        if self.keep:
            segment.turn = turn
        return turn

    @staticmethod
    def permits_later_keys(mask: Any, segment: Any, stop: int) -> bool:
        """Whether a 4D mask shows the queries of a segment any key from `stop` on.

        Prefix-LM masks and bidirectional attention do. An additive mask hides with the lowest
        number of its dtype or with -inf.
        """
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            return False
        later = mask[:, :, segment.start : segment.stop, stop:]
        if later.dtype != torch.bool:
            later = later > torch.finfo(later.dtype).min
        return bool(later.any())

    def check(self, name: str, module: Any, mask: Any, kwargs: dict[str, Any]) -> None:
        is_flash = "flash" in name
        known = is_flash or name in ("eager", "sdpa")
        if not known or not (mask is None or isinstance(mask, Tensor)):
            raise self.error(
                f"attention {name!r} cannot be cut at a tier border; use eager, sdpa or flash "
                f"attention (model.set_attn_implementation('sdpa'))"
            )
        is_causal = kwargs.get("is_causal")
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        if not is_causal and (mask is None or mask.ndim != 4):
            raise self.error(
                "bidirectional attention can be cut at a tier border only with a 4D mask; use "
                "model.set_attn_implementation('sdpa') and give attention_mask in 4D"
            )
        positions = self.plan.positions
        if is_flash and (
            kwargs.get("cu_seq_lens_q") is not None
            or (mask is None and bool((positions[:, 1:] != positions[:, :-1] + 1).any()))
        ):
            raise self.error(
                "packed documents that cross a tier border cannot be cut for flash attention; "
                "use model.set_attn_implementation('sdpa')"
            )

    @staticmethod
    def blocks(segment: Any, name: str, mask: Any) -> list[tuple[int, int]]:
        """The segment, cut further where its causal masks have to be written out."""
        if mask is not None or "flash" in name or segment.start == 0:
            return [(segment.start, segment.stop)]
        starts = range(segment.start, segment.stop, MASK_ROWS)
        return [(start, min(start + MASK_ROWS, segment.stop)) for start in starts]

    @staticmethod
    def mask_of(
        name: str, mask: Any, start: int, end: int, stop: int, offset: int, device: torch.device
    ) -> Any:
        """The part of the mask for queries start..end and the first `stop` keys."""
        if isinstance(mask, Tensor):
            return mask[:, :, start:end, :stop] if mask.ndim == 4 else mask[:, :stop]
        if "flash" in name or start == 0:
            return None  # causal, aligned at the last query and key
        visible = torch.ones(end - start, stop, dtype=torch.bool, device=device)
        return visible.tril(start + offset)[None, None]

    @staticmethod
    def kwargs_of(kwargs: dict[str, Any], start: int, end: int) -> dict[str, Any]:
        position_ids = kwargs.get("position_ids")
        if position_ids is None:
            return kwargs
        return {**kwargs, "position_ids": position_ids[:, start:end]}


AttentionInterface.register(NAME, longrope_attention)
