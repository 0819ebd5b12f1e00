"""Computes jobs on a transformers model: losses without a (length x vocabulary) tensor."""

from __future__ import annotations

import contextlib
import copy
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrope_export.config import FactorTier, LongRopeConfig, SwitchPolicy
from longrope_export.errors import ModelError
from longrope_export.hf_runtime import LongRopeRuntime, apply_longrope, remove_longrope
from longrope_export.models.hf_config import refuse_quantized
from longrope_export.models.offload import Offload, load_offloaded_model
from longrope_export.models.token_losses import token_losses
from longrope_export.models.torch_model import load_torch_model
from longrope_export.search.jobs import Document, Job, Score, essence, spans_of

if TYPE_CHECKING:
    from torch import Tensor

MLP_TOKENS = 4096  # that an MLP computes at once
PIECE_TOKENS = 1024  # of a block, whose mask is pieces x (prefix + piece)
KEPT_CACHES = 4  # prefixes held at a time
GRADIENT_COST = 4  # forward, forward again from the checkpoints, and a backward of about two


class Scorer:
    """A model and the documents of a search.

    Memory beside the weights: the hidden states of one document, and for blocks behind a prefix
    the keys and values of KEPT_CACHES prefixes. Nothing grows with length times vocabulary, nor with length
    squared, but for families with a sliding window, whose masks transformers writes out.

    Args:
        path: a Hugging Face folder or a GGUF.
        documents: what jobs name by index.
        window: tokens that the model handles as it is.
        dtype: float32, bfloat16 or float16.
        device: as torch names it.
        offload: where the layers' weights are while they are not used; None: on the device.

    Raises:
        ConfigError, UnsupportedError: the offload does not fit; see Offload.check.
        UnsupportedError: torch or transformers is not installed, the family is not known, or the
            weights are quantized.
        ModelError: transformers cannot load the model.
    """

    def __init__(
        self,
        path: Path,
        documents: Sequence[Document],
        window: int,
        dtype: str = "float32",
        device: str = "cpu",
        offload: Offload | None = None,
    ) -> None:
        refuse_quantized(path)
        if offload is None:
            model = load_torch_model(path, dtype)[0].to(device)
        else:
            model = load_offloaded_model(path, dtype, device, offload)
        self._init(model, documents, window)

    @classmethod
    def of_model(cls, model: Any, documents: Sequence[Document], window: int) -> Scorer:
        """On a model in memory, in eval mode; it is used where it is."""
        scorer = cls.__new__(cls)
        scorer._init(model, documents, window)
        return scorer

    def _init(self, model: Any, documents: Sequence[Document], window: int) -> None:
        self.model, self.documents, self.window = model, documents, window
        self._caches: OrderedDict[tuple[int, str], Any] = OrderedDict()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        _split_mlps(model.get_decoder())

    def score(self, job: Job) -> Score:
        """Compute one job.

        Raises:
            ModelError: the loss is not a finite number.
            UnsupportedError: the definition does not fit the model.
        """
        import torch

        begin = time.perf_counter()
        if job.gradient:
            score = self._gradient(job)
        else:
            with torch.inference_mode():
                if job.prefix is not None:
                    score = self._behind_prefix(job, job.prefix)
                elif job.blocks:
                    score = self._skipping(job)
                else:
                    score = self._whole(job)
        return replace(score, seconds=time.perf_counter() - begin)

    # -- the three kinds of passes

    def _whole(self, job: Job) -> Score:
        ids = self._ids(job.document)
        with definition_on(self.model, job.config):
            hidden = self.model.get_decoder()(ids[None], use_cache=False).last_hidden_state[0]
        spans = spans_of(self.documents[job.document], self.window)
        # the token at position p is predicted by the one before it: its loss belongs to p
        places = [slice(max(a, 1), b) for a, b in spans]
        losses = [
            token_losses(self.model, hidden[p.start - 1 : p.stop - 1], ids[p]) for p in places
        ]
        return score_of(losses, len(ids))

    def _skipping(self, job: Job) -> Score:
        import torch

        positions = torch.cat([torch.arange(a, b) for a, b in job.blocks])
        ids = self._ids(job.document)[: len(positions) + 1]
        where = positions[None].to(ids.device)
        mask = torch.ones_like(where)  # says that these are one text, whatever the positions jump
        with definition_on(self.model, job.config):
            hidden = self.model.get_decoder()(
                ids[None, :-1], position_ids=where, attention_mask=mask, use_cache=False
            ).last_hidden_state[0]
        losses = token_losses(self.model, hidden, ids[1:])
        return score_of(torch.split(losses, [b - a for a, b in job.blocks], dim=1), len(positions))

    def _behind_prefix(self, job: Job, prefix: LongRopeConfig) -> Score:
        import torch

        ids = self._ids(job.document)
        cache = self._prefix(job.document, prefix, job.blocks[-1][0])
        held = prefix.select_tier(cache.get_seq_length())
        losses = []
        for first, stop in job.blocks:
            config = _behind(job.config, held, first)
            fork = _fork(cache, first, config)
            parts = []
            with definition_on(self.model, config):
                for part in torch.split(ids[None, first:stop], PIECE_TOKENS, dim=1):
                    output = self.model.get_decoder()(part, past_key_values=fork, use_cache=True)
                    parts.append(output.last_hidden_state[0])
            hidden, following = torch.cat(parts), ids[first + 1 : stop + 1]
            losses.append(token_losses(self.model, hidden[: len(following)], following))
        return score_of(losses, sum(stop - first for first, stop in job.blocks))

    def _prefix(self, document: int, config: LongRopeConfig, length: int) -> Any:
        """A cache of at least the first `length` tokens of a document."""
        key = (document, essence(config))
        found = self._caches.get(key)
        if found is not None and found.get_seq_length() >= length:
            self._caches.move_to_end(key)
            return found
        from transformers import DynamicCache

        ids, cache = self._ids(document)[:length], DynamicCache()
        with definition_on(self.model, config):
            self.model.get_decoder()(ids[None], past_key_values=cache, use_cache=True)
        self._caches[key] = cache
        while len(self._caches) > KEPT_CACHES:
            self._caches.popitem(last=False)
        return cache

    def _gradient(self, job: Job) -> Score:
        from longrope_export.search.gradient import differentiate

        ids = self._ids(job.document)

        def mean_loss() -> Tensor:
            hidden = self.model.get_decoder()(ids[None], use_cache=False).last_hidden_state[0]
            return token_losses(self.model, hidden[:-1], ids[1:])[0].mean()

        return gradient_score(*differentiate(self.model, job.config, mean_loss), len(ids))

    # -- what they share

    def _ids(self, document: int) -> Tensor:
        import torch

        return torch.tensor(self.documents[document].ids, device=self.model.device)


@contextlib.contextmanager
def definition_on(model: Any, config: LongRopeConfig) -> Iterator[LongRopeRuntime]:
    """A model under a config, until the context ends."""
    runtime = apply_longrope(model, config)
    try:
        yield runtime
    finally:
        remove_longrope(model)


def score_of(losses: Sequence[Tensor], tokens: int) -> Score:
    """The score of a pass.

    Args:
        losses: for each span (2, n): -ln p of its tokens, and whether they were the most probable.
        tokens: that were computed.

    Raises:
        ModelError: a loss is not a finite number.
    """
    sums = tuple(float(part[0].double().sum()) for part in losses)
    for value in sums:
        _check_finite(value)
    hits = tuple(int(part[1].sum()) for part in losses)
    return Score(sums, tuple(part.shape[1] for part in losses), hits, tokens, 0.0)


def gradient_score(loss: float, slopes: Sequence[float], tokens: int) -> Score:
    """The score of a gradient over a document.

    Args:
        loss: nats per token.
        slopes: see Score.
        tokens: of the document.

    Raises:
        ModelError: one of them is not a finite number.
    """
    for value in (loss, *slopes):
        _check_finite(value)
    count = tokens - 1
    return Score((loss * count,), (count,), (0,), GRADIENT_COST * tokens, 0.0, tuple(slopes))


def _check_finite(loss: float) -> None:
    if not abs(loss) < float("inf"):
        raise ModelError(
            f"the loss is {loss}: the model does not compute in this precision; use --dtype float32 "
            f"or bfloat16 and another -o (a run keeps its precision), or check the weights"
        )


def _behind(config: LongRopeConfig, held: FactorTier, first: int) -> LongRopeConfig:
    """The causal definition in which a cache under `held` meets tokens from `first` on."""
    if config.switch is SwitchPolicy.CAUSAL:
        later = [tier for tier in config.tiers if tier.max_length > first]
    else:
        later = [config.tiers[-1]]
    before = [replace(held, max_length=first)]
    return replace(config, tiers=(*before, *later), switch=SwitchPolicy.CAUSAL)


def _fork(cache: Any, length: int, config: LongRopeConfig) -> Any:
    """A cache of the first `length` tokens that shares memory with `cache` and leaves it as it is.

    Its keys are said to stand under the first tier of `config`.
    """
    import torch
    from transformers import DynamicCache

    from longrope_export.definition import to_json
    from longrope_export.hf_runtime.core.cached_rows import CachedRows, Columns

    fork = DynamicCache()
    for layer in cache.layers[:-1]:
        part = copy.copy(layer)
        part.keys, part.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        fork.layers.append(part)
    rows = CachedRows()
    positions = torch.arange(length)[None]
    columns = Columns(positions, torch.ones_like(positions, dtype=torch.bool), None)
    rows.extend(columns, torch.zeros(1, dtype=torch.int64), to_json(config))
    fork.layers.append(rows)
    return fork


def _split_mlps(decoder: Any) -> None:
    """Let plain MLPs take long texts in pieces, so that their inner width does not count."""
    import torch

    for layer in decoder.layers:
        mlp = getattr(layer, "mlp", None)
        if mlp is None or not type(mlp).__name__.endswith("MLP"):
            continue
        whole = mlp.forward

        def in_pieces(hidden: Tensor, whole: Any = whole) -> Tensor:
            parts = [whole(part) for part in torch.split(hidden, MLP_TOKENS, dim=1)]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

        mlp.forward = in_pieces
