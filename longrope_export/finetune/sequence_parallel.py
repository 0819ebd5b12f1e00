"""Sequence parallelism: the ranks of a group hold slices of the same rows, for long windows.

Everything but attention works on a slice as on a row. A row of n tokens is cut into 2 * world
chunks; rank r holds chunks r and 2 * world - 1 - r, so that causal attention is equal work.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from longrope_export.errors import LongRopeError, UnsupportedError
from longrope_export.finetune.gathered_attention import (
    GatheredAttention,
    chunk_starts,
    gather,
    repeat_heads,
)
from longrope_export.models.token_losses import IGNORED

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed import ProcessGroup

BACKENDS = ("gather", "context")

_ROW_KEYS = ("input_ids", "position_ids", "attention_mask", "document_ids", "labels", "targets")
_counter = itertools.count()


def shard_row(batch: Mapping[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """What one rank computes of whole rows.

    Rows are padded on the right to a multiple of 2 * world; no real token sees that padding.

    Args:
        batch: tensors (batch, n) int64: `input_ids`, and where there are any
            `position_ids` (else the place in the row, padding not counted; they may jump, as in
            PoSE), `attention_mask` (0 for padding, on either side), `document_ids` (>= 0; tokens
            see their own document only), and `labels` as transformers takes them (the token at the
            same place, -100 for none) or `targets` (the token after it).

    Returns:
        (batch, ceil(n / (2 * world)) * 2): `input_ids`, `position_ids`; `targets`, the token that
        follows each place or -100, so that none is lost at the edge of a slice; and `document_ids`
        where the batch has documents or padding, with -1 for padding.

    Raises:
        LongRopeError: another key, both labels and targets, or tensors of other shapes.
    """
    import torch
    from torch.nn.functional import pad

    _check_row(batch, rank, world)
    ids = batch["input_ids"]
    mask, documents = batch.get("attention_mask"), batch.get("document_ids")
    if mask is not None and not mask.all():
        documents = torch.where(mask != 0, 0 if documents is None else documents, -1)
    if documents is None or mask is None:
        mask = torch.ones_like(ids)
    positions = batch.get("position_ids")
    if positions is None:
        positions = ((mask != 0).long().cumsum(1) - 1).clamp(min=0)
    targets = batch.get("targets")
    if (labels := batch.get("labels")) is not None:
        targets = pad(labels[:, 1:], (0, 1), value=IGNORED)
        if documents is not None:
            ends = documents != pad(documents[:, 1:], (0, 1), value=-1)
            targets = targets.masked_fill(ends | (documents < 0), IGNORED)
    missing = -ids.shape[1] % (2 * world)
    padded = {
        "input_ids": pad(ids, (0, missing)),
        "position_ids": torch.cat([positions, positions[:, -1:].expand(-1, missing)], dim=1),
    }
    if targets is not None:
        padded["targets"] = pad(targets, (0, missing), value=IGNORED)
    if documents is not None:
        padded["document_ids"] = pad(documents, (0, missing), value=-1)
    chunk = (ids.shape[1] + missing) // (2 * world)
    starts = chunk_starts(rank, world, chunk)
    return {
        name: torch.cat([tensor[:, start : start + chunk] for start in starts], dim=1)
        for name, tensor in padded.items()
    }


def _check_row(batch: Mapping[str, Tensor], rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise LongRopeError(f"shard_row: rank {rank} of {world} ranks; expected 0..{world - 1}")
    if "input_ids" not in batch or (unknown := sorted(set(batch) - set(_ROW_KEYS))):
        what = "no input_ids" if "input_ids" not in batch else f"unknown keys {unknown}"
        raise LongRopeError(
            f"shard_row: the batch has {what}; expected input_ids and any of "
            f"{', '.join(_ROW_KEYS[1:])}, each (batch, n)"
        )
    if "labels" in batch and "targets" in batch:
        raise LongRopeError("shard_row: the batch has labels and targets; give one of them")
    shape = batch["input_ids"].shape
    for name, tensor in batch.items():
        if tensor.shape != shape or tensor.ndim != 2:
            raise LongRopeError(
                f"shard_row: {name} has shape {tuple(tensor.shape)}, expected (batch, n) as "
                f"input_ids {tuple(shape)}"
            )


def count_targets(targets: Tensor, group: ProcessGroup | None = None) -> int:
    """Number of targets on all ranks of a group (None: of all ranks)."""
    import torch.distributed as dist

    count = (targets != IGNORED).sum()
    dist.all_reduce(count, group=group)
    return int(count)


def shard_loss(logits: Tensor, targets: Tensor, num_targets: int, num_ranks: int) -> Tensor:
    """This rank's part of the mean loss, times the number of ranks.

    Its mean over all ranks is the loss per target, whatever the slices hold, and the mean of its
    gradients is the gradient of that: DDP and FSDP take the mean over all ranks by themselves.

    Args:
        logits: (batch, n, vocabulary).
        targets: (batch, n), -100 for none.
        num_targets: on all ranks, over which gradients are averaged: count_targets(targets).
        num_ranks: those ranks; data-parallel replicas count too.

    Returns:
        A scalar, float32. 0 with gradient 0 where the slice has no target.
    """
    from torch.nn.functional import cross_entropy

    flat = logits.flatten(0, 1).float()
    total = cross_entropy(flat, targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total * (num_ranks / max(num_targets, 1))


class SequenceParallel:
    """A model whose rows are spread over a group; made by `sequence_parallel`.

    Attributes:
        group: the ranks that share a row.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def shard(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """shard_row for this rank; every rank of the group must give the same batch."""
        return shard_row(batch, self.group.rank(), self.group.size())

    def gather(self, shard: Tensor, length: int, dim: int = 1) -> Tensor:
        """The whole of what the ranks computed, without the padding; on every rank.

        Args:
            shard: with this rank's places along `dim`, as logits (batch, places, vocabulary).
            length: n of the rows.
        """
        return gather(shard, self.group, dim).narrow(dim, 0, length)


@contextlib.contextmanager
def sequence_parallel(
    model: nn.Module, group: ProcessGroup | None = None, backend: str = "gather"
) -> Iterator[SequenceParallel]:
    """Compute a model on shards of rows; forward and backward passes belong inside the context.

        with sequence_parallel(model) as parallel:
            shard = parallel.shard(batch)  # the same batch on every rank of the group
            targets = shard.pop("targets")
            loss = shard_loss(model(**shard).logits, targets, count_targets(targets), world_size)
            loss.backward()

    A config put on by apply_longrope, before or after, must have one tier or be frozen to one:
    a shard sees only a part of the positions. Load-balancing losses of mixture-of-experts models
    are those of the shards, not of the row.

    Args:
        model: any with a text model of a family that the runtime supports.
        group: ranks that share a row, all with the same weights; None: all ranks.
        backend: "gather": keys and values are gathered before each attention, on any device;
            GQA, log scaling, sliding windows, softcap and documents work. "context": torch's ring
            attention (torch.distributed.tensor.experimental.context_parallel), CUDA only, for
            whole causal rows; it patches scaled_dot_product_attention for the whole process.
            "context" is a prototype of torch, and was never run by us.

    Raises:
        LongRopeError: no process group, or no such backend.
        UnsupportedError: the model is not of a known family, or "context" on another device than
            CUDA; in forward: a tier that is not frozen, a cache, an attention mask or no
            position_ids, an odd length; with "context" also documents, windows and softcap.
    """
    import torch.distributed as dist
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from longrope_export.hf_runtime.core.runtime import find_text_model

    if backend not in BACKENDS:
        raise LongRopeError(f"backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    if not (dist.is_available() and dist.is_initialized()):
        raise LongRopeError(
            "sequence_parallel: this process is in no process group; start it under torchrun and "
            "enter longrope_export.finetune.distributed.process_group first"
        )
    group = dist.group.WORLD if group is None else group
    assert group is not None
    text_model = find_text_model(model, UnsupportedError)
    with _ring(model, group) if backend == "context" else contextlib.nullcontext():
        # transformers makes no masks for an attention that it does not know
        name = f"longrope_sequence_parallel_{next(_counter)}"
        attend = GatheredAttention(group) if backend == "gather" else _ring_attention
        original = text_model.config._attn_implementation
        ALL_ATTENTION_FUNCTIONS[name] = attend
        text_model.config._attn_implementation = name
        hook = text_model.register_forward_pre_hook(
            _Guard(text_model, group), with_kwargs=True, prepend=True
        )
        try:
            yield SequenceParallel(group)
        finally:
            hook.remove()
            text_model.config._attn_implementation = original
            del ALL_ATTENTION_FUNCTIONS[name]


class _Guard:
    """In front of the text model: refuses what a shard would compute wrongly."""

    def __init__(self, text_model: Any, group: ProcessGroup) -> None:
        self.names = list(inspect.signature(text_model.forward).parameters)
        self.group = group

    def __call__(self, text_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        runtime = getattr(text_model.rotary_emb, "runtime", None)
        planner = getattr(runtime, "planner", None)
        if planner is not None and planner.frozen is None and planner.pinned is None:
            count = len(planner.tables.borders)
            if count > 1:
                raise UnsupportedError(
                    f"sequence parallel: the config has {count} tiers and none is frozen, but a "
                    f"shard sees only a part of the positions; call freeze(tier_index) of what "
                    f"apply_longrope returned"
                )
        for name, advice in (
            ("past_key_values", "sequence parallelism is for whole rows, without a cache"),
            ("attention_mask", "give it to shard(), which turns it into document_ids"),
        ):
            if inputs.get(name) is not None:
                raise UnsupportedError(f"sequence parallel: {name} is given; {advice}")
        places: Any = inputs.get("position_ids")
        if places is None or places.shape[1] % 2:
            got = "none" if places is None else f"{places.shape[1]} of them"
            raise UnsupportedError(
                f"sequence parallel: expected position_ids of the whole row for two chunks of one "
                f"length, got {got}; call the model with what shard() returns"
            )
        if inputs.get("document_ids") is not None:
            inputs["document_ids"] = gather(inputs["document_ids"], self.group, dim=1)
        return (), {**inputs, "use_cache": False}


@contextlib.contextmanager
def _ring(model: nn.Module, group: ProcessGroup) -> Iterator[None]:
    """torch's context_parallel; it wants a buffer to deal out, though the shards are dealt."""
    import torch
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.experimental import context_parallel

    device = next(model.parameters()).device
    if device.type != "cuda":
        raise UnsupportedError(
            f"sequence parallel: backend 'context' needs CUDA, the model is on {device}: torch's "
            f"context_parallel has no rule for the attention of other devices; use 'gather'"
        )
    mesh = DeviceMesh.from_group(group, "cuda")
    dummy = torch.zeros(1, 2 * group.size(), device=device)
    with context_parallel(mesh, buffers=[dummy], buffer_seq_dims=[1], no_restore_buffers={dummy}):
        yield


def _ring_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface, by the attention that `_ring` has patched."""
    from torch.nn import functional

    for name in ("document_ids", "sliding_window", "softcap"):
        if kwargs.get(name) is not None:
            raise UnsupportedError(
                f"sequence parallel: backend 'context' knows no {name}; use 'gather'"
            )
    output = functional.scaled_dot_product_attention(
        query,
        repeat_heads(key, query.shape[1]),
        repeat_heads(value, query.shape[1]),
        dropout_p=kwargs.get("dropout", 0.0),
        is_causal=True,
        scale=kwargs.get("scaling"),
    )
    return output.transpose(1, 2).contiguous(), None
