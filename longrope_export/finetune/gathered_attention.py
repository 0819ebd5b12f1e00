"""Attention of one shard of a row on the keys and values of all shards, in blocks of queries."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

MASK_VALUES = 1 << 25  # of one block's mask (32 MB of bool), or of its weights under a softcap


class GatheredAttention:
    """transformers' attention interface over a group of ranks.

    Queries stay where they are; keys and values are gathered, and their gradients are summed over
    the ranks and scattered. Who sees whom goes by the place in the row, not by position: a token
    sees those before it, in its own document and within the layer's sliding window. No mask is
    larger than MASK_VALUES, and none is kept for the backward pass, which computes each block
    again.

    Args:
        group: the ranks that share a row; each holds the places that `chunk_starts` names.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.rank, self.world = group, group.rank(), group.size()

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        document_ids: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            query: (batch, heads, n / world, head_dim).
            key, value: (batch, key heads, n / world, head_dim).
            document_ids: (batch, n), of the whole row.

        Returns:
            (batch, n / world, heads, head_dim), and no weights.
        """
        import torch
        from torch.utils.checkpoint import checkpoint

        both = gather(torch.stack((key, value)), self.group, dim=3)
        chunk = query.shape[2] // 2
        of_mask = (1 if document_ids is None else len(query)) * (query.shape[1] if softcap else 1)
        parts = []
        for part, begin in enumerate(chunk_starts(self.rank, self.world, chunk)):
            rows = max(1, MASK_VALUES // (of_mask * (begin + chunk)))
            for start in range(begin, begin + chunk, rows):
                stop = min(start + rows, begin + chunk)
                first = 0 if sliding_window is None else max(0, start + 1 - sliding_window)
                documents = None if document_ids is None else document_ids[:, first:stop]
                own = slice(part * chunk + start - begin, part * chunk + stop - begin)
                block = partial(
                    _attend, documents=documents, window=sliding_window, softcap=softcap,
                    scaling=scaling, dropout=dropout,
                )  # fmt: skip
                tensors = query[:, :, own], both[0, :, :, first:stop], both[1, :, :, first:stop]
                if torch.is_grad_enabled():
                    keep = dropout > 0
                    parts.append(
                        checkpoint(block, *tensors, use_reentrant=False, preserve_rng_state=keep)
                    )
                else:
                    parts.append(block(*tensors))
        return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    documents: Tensor | None,
    window: int | None,
    softcap: float | None,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """Attention of the last places of a stretch on all of it.

    Args:
        query: (batch, heads, rows, head_dim), the last `rows` of the `columns` places.
        key, value: (batch, key heads, columns, head_dim).
        documents: (batch, columns).
    """
    from torch.nn import functional

    # on the CPU and with a mask, kernels know no grouped heads, or fall back on a full product
    key, value = (repeat_heads(part, query.shape[1]) for part in (key, value))
    mask = _visible(query.shape[2], key.shape[2], documents, window, bool(softcap), query.device)
    if not softcap:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
        )
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (scores / softcap).tanh() * softcap  # gemma2
    weights = scores.float().masked_fill(~mask, float("-inf")).softmax(-1).to(query.dtype)
    return functional.dropout(weights, dropout) @ value


def _visible(
    rows: int,
    columns: int,
    documents: Tensor | None,
    window: int | None,
    written_out: bool,
    device: Any,
) -> Any:
    """(rows, columns) or (batch, 1, rows, columns) bool: what the last `rows` places see.

    Where that is everything before, torch's own causal bias, for which CUDA needs no mask.
    """
    import torch
    from torch.nn.attention.bias import causal_lower_right

    if documents is None and window is None and not written_out:
        return causal_lower_right(rows, columns)
    places = torch.arange(columns, device=device)
    behind = places[-rows:, None] - places
    visible = behind >= 0
    if window is not None:
        visible &= behind < window
    if documents is None:
        return visible
    return (visible & (documents[:, -rows:, None] == documents[:, None]))[:, None]


def repeat_heads(vectors: Tensor, heads: int) -> Tensor:
    """(batch, heads, n, head_dim) of (batch, key heads, n, head_dim), each key head in a row."""
    times = heads // vectors.shape[1]
    return vectors if times == 1 else vectors.repeat_interleave(times, dim=1)


def chunk_starts(rank: int, world: int, chunk: int) -> tuple[int, int]:
    """First places of the two chunks of a row that a rank holds, in the order it holds them.

    A row is 2 * world chunks; a rank has one from the front and its mirror image from the back,
    so that causal attention is the same work for all. torch's context_parallel deals alike.
    """
    return rank * chunk, (2 * world - 1 - rank) * chunk


def gather(shard: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """The whole row of a shard, in order; differentiable, each rank has the row's full gradient.

    Args:
        shard: two chunks along `dim`, of one shape on all ranks.

    Returns:
        `world` times as long along `dim`.
    """
    import torch

    parts = _gathered()(shard.contiguous(), group)
    halves = [part.chunk(2, dim) for part in parts.unbind(0)]
    fronts, backs = [front for front, _ in halves], [back for _, back in reversed(halves)]
    return torch.cat([*fronts, *backs], dim)


@cache
def _gathered() -> Any:
    """(shard, group) -> (world, *shard.shape)."""
    import torch
    import torch.distributed as dist

    class Gathered(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, shard: Tensor, group: ProcessGroup) -> Tensor:
            context.group = group
            parts = shard.new_empty(group.size(), *shard.shape)
            dist.all_gather(list(parts.unbind(0)), shard, group=group)
            return parts

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
            own = torch.empty_like(gradient[0])
            dist.reduce_scatter(own, list(gradient.contiguous().unbind(0)), group=context.group)
            return own, None

    return Gathered.apply
