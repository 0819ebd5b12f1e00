"""Workers of several processes that share every pass: for windows too long for one device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longrope_export.config import LongRopeConfig, SwitchPolicy
from longrope_export.errors import UnsupportedError
from longrope_export.models.token_losses import token_losses
from longrope_export.search.jobs import Job, Score, spans_of
from longrope_export.search.pool import Scores, Setup
from longrope_export.search.scorer import Scorer, definition_on, score_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ShardedScorer(Scorer):
    """A Scorer on each rank of a group; all are given the same jobs and give the same scores.

    Each holds the whole model and its slice of a document; the keys and values of one layer are
    gathered at a time (finetune.sequence_parallel). Only whole passes under one tier can be cut so.

    Attributes:
        group: the ranks; None: all of the process group.
    """

    group: ProcessGroup | None = None

    def score(self, job: Job) -> Score:
        """Compute one job; every rank must be given it.

        Raises:
            ModelError: the loss is not a finite number.
            UnsupportedError: the definition does not fit the model, or the job has blocks, a
                prefix, a gradient, or tokens of several tiers.
        """
        if job.gradient or job.blocks or job.prefix is not None:
            kind = "a gradient" if job.gradient else "blocks"
            raise UnsupportedError(
                f"job {job.key} has {kind}: ranks share whole passes only; search without "
                f"--sequence-parallel, or with --algorithm longrope or longrope2 and no ladder"
            )
        return super().score(job)

    def _whole(self, job: Job) -> Score:
        from longrope_export.finetune.sequence_parallel import sequence_parallel

        ids = self._ids(job.document)
        tier = only_tier(job.config, len(ids))
        with definition_on(self.model, job.config) as runtime:
            runtime.freeze(tier)
            with sequence_parallel(self.model, self.group) as parallel:
                shard = parallel.shard({"input_ids": ids[None], "labels": ids[None]})
                following = shard.pop("targets")[0].clamp(min=0)  # padding is cut off again
                hidden = self.model.get_decoder()(**shard).last_hidden_state[0]
                losses = parallel.gather(token_losses(self.model, hidden, following), len(ids))
        spans = spans_of(self.documents[job.document], self.window)
        # place p predicts the token at p + 1
        return score_of([losses[:, max(a, 1) - 1 : b - 1] for a, b in spans], len(ids))


def only_tier(config: LongRopeConfig, length: int) -> int:
    """Index of the one tier that computes every token of a text.

    Raises:
        ConfigError: the text is longer than the last tier.
        UnsupportedError: under the causal rule its tokens belong to several tiers.
    """
    tier = config.tier_index(length)
    if config.switch is SwitchPolicy.CAUSAL and tier:
        raise UnsupportedError(
            f"{length} tokens under the causal rule belong to {tier + 1} tiers; ranks that share a "
            f"pass compute under one: use switch = sequence, or no --sequence-parallel"
        )
    return tier


@dataclass(frozen=True)
class ShardSetup(Setup):
    """What one rank of a worker loads.

    Attributes:
        rank, ranks: which of how many.
        meeting: a file that does not exist yet, by which the ranks find each other.
    """

    rank: int = 0
    ranks: int = 1
    meeting: Path = Path()

    def _make(self, device: str) -> Scores:
        import torch.distributed as dist

        dist.init_process_group(
            "nccl" if device.startswith("cuda") else "gloo",
            init_method=self.meeting.as_uri(),
            rank=self.rank,
            world_size=self.ranks,
        )
        return ShardedScorer(self.path, self.documents, self.window, self.dtype, device)


def shards_of(setup: Setup, ranks: int, meeting: Path) -> list[Setup]:
    """The setups of the ranks of one worker."""
    common = (setup.path, setup.documents, setup.window, setup.dtype)
    return [ShardSetup(*common, rank, ranks, meeting) for rank in range(ranks)]
