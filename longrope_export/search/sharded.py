"""A scorer of several processes that share every pass: for windows too long for one device."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from longrope_export.config import LongRopeConfig, SwitchPolicy
from longrope_export.errors import UnsupportedError
from longrope_export.models.token_losses import token_losses
from longrope_export.search.jobs import Job, Score, spans_of
from longrope_export.search.scorer import Scorer, definition_on, gradient_score, score_of

if TYPE_CHECKING:
    from torch import Tensor

    from longrope_export.finetune.sequence_parallel import SequenceParallel

# for a rank that hangs; one that dies or raises is seen by the process that started it
PATIENCE = timedelta(hours=1)


@dataclass(frozen=True)
class Shard:
    """Which part of every pass a process computes.

    Attributes:
        rank: 0 <= rank < ranks.
        ranks: processes that share a pass.
        meeting: a file that does not exist yet, of this machine; the ranks find each other by it.
    """

    rank: int
    ranks: int
    meeting: Path

    def join(self, device: str) -> None:
        """Become a rank of the process group; returns when all are there.

        Args:
            device: as torch names it, one of its own for each rank if it is a GPU.
        """
        import torch.distributed as dist
        from torch._C._distributed_c10d import FileStore

        dist.init_process_group(
            "nccl" if device.startswith("cuda") else "gloo",
            store=FileStore(str(self.meeting), self.ranks),
            rank=self.rank,
            world_size=self.ranks,
            timeout=PATIENCE,
        )


class ShardedScorer(Scorer):
    """A Scorer on each rank of the process group; all are given the same jobs, and answer alike.

    Each holds the whole model and its slice of a document (finetune.sequence_parallel); the keys
    and values of one layer are gathered at a time. Whole passes and gradients are shared; moved
    blocks are few tokens, which each rank computes for itself.
    """

    def score(self, job: Job) -> Score:
        """Compute one job; every rank must be given it.

        Raises:
            ModelError: the loss is not a finite number.
            UnsupportedError: the definition does not fit the model, or the job has a prefix or
                tokens of several tiers.
        """
        if job.prefix is not None:
            raise UnsupportedError(
                f"job {job.key} has blocks behind a prefix, whose cache ranks do not share: search "
                f"a ladder without --sequence-parallel"
            )
        return super().score(job)

    def _whole(self, job: Job) -> Score:
        from longrope_export.finetune.sequence_parallel import sequence_parallel

        ids = self._ids(job.document)
        tier = only_tier(job.config, len(ids))
        with definition_on(self.model, job.config) as runtime:
            runtime.freeze(tier)
            with sequence_parallel(self.model) as parallel:
                losses = parallel.gather(self._own_losses(ids, parallel), len(ids))
        spans = spans_of(self.documents[job.document], self.window)
        # place p predicts the token at p + 1
        return score_of([losses[:, max(a, 1) - 1 : b - 1] for a, b in spans], len(ids))

    def _gradient(self, job: Job) -> Score:
        import torch
        import torch.distributed as dist

        from longrope_export.finetune.sequence_parallel import sequence_parallel
        from longrope_export.search.gradient import differentiate

        ids = self._ids(job.document)
        with sequence_parallel(self.model) as parallel:
            own, slopes = differentiate(
                self.model,
                job.config,
                lambda: self._own_losses(ids, parallel)[0].sum() / (len(ids) - 1),
            )
        sums = torch.tensor([own, *slopes], dtype=torch.float64, device=self.model.device)
        dist.all_reduce(sums)
        return gradient_score(sums[0].item(), sums[1:].tolist(), len(ids))

    def _own_losses(self, ids: Tensor, parallel: SequenceParallel) -> Tensor:
        """(2, places) of token_losses, of this rank's slice; 0 where no token follows."""
        shard = parallel.shard({"input_ids": ids[None], "labels": ids[None]})
        following = shard.pop("targets")[0]
        hidden = self.model.get_decoder()(**shard).last_hidden_state[0]
        return token_losses(self.model, hidden, following)


def only_tier(config: LongRopeConfig, length: int) -> int:
    """Index of the one tier that computes every token of a text.

    Raises:
        ConfigError: the text is longer than the last tier.
        UnsupportedError: under the causal rule its tokens belong to several tiers.
    """
    tier = config.tier_index(length)
    if config.switch is SwitchPolicy.CAUSAL and tier:
        raise UnsupportedError(
            f"{length} tokens under the causal rule belong to {tier + 1} tiers, and ranks that "
            f"share a pass compute under one: give --switch sequence, or no --sequence-parallel"
        )
    return tier
