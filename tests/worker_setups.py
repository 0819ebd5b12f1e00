"""What worker processes of the tests load; apart, since they import this and not torch."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longrope_export.config import FactorTier, LongRopeConfig, SwitchPolicy
from longrope_export.errors import ModelError
from longrope_export.search.jobs import Document, Job, Score
from longrope_export.search.pool import Scores, Setup
from longrope_export.search.scorer import Scorer
from longrope_export.search.workers import ProcessWorkers

WINDOW = 48


class OutOfMemoryError(RuntimeError):
    """Named as torch's, which does not have to be imported for it."""


def config(factor: float = 2.0) -> LongRopeConfig:
    tiers = (FactorTier(512, (1.0, *[factor] * 7), 0, 1.1),)
    return LongRopeConfig(10000.0, 16, WINDOW, 512, tiers, SwitchPolicy.SEQUENCE)


@dataclass(frozen=True)
class Watched(Setup):
    """A Setup that leaves the pid of each process that loads it."""

    pids: Path = Path()

    def load(self, device: str, sharing: int = 1) -> Scores:
        self.pids.mkdir(exist_ok=True)
        (self.pids / str(os.getpid())).touch()
        return super().load(device, sharing)


@dataclass(frozen=True)
class Toy(Watched):
    """Scores by arithmetic; the name of a document says what else happens.

    With "rank 1: " in front only that rank does it; the others wait for it, as in a collective.
    A dtype "deadly" or "broken", or "rank 1: deadly", says it of loading.
    """

    @property
    def rank(self) -> int:
        return self.shard.rank if self.shard else 0

    def load(self, device: str, sharing: int = 1) -> Scores:
        self.pids.mkdir(exist_ok=True)
        (self.pids / str(os.getpid())).touch()
        what = self.own_part(self.dtype)
        if what == "deadly":
            os._exit(7)
        if what == "broken":
            raise ModelError("no weights here")
        if what == "endless":
            time.sleep(600)
        return ToyScorer(self)

    def own_part(self, text: str) -> str:
        """What this rank does of it."""
        who, _, what = text.rpartition(": ")
        if who in ("", f"rank {self.rank}"):
            return what
        if what == "die late once":  # its partners notice before anyone outside
            return "lose a partner once"
        return "wait once" if what.endswith("once") else "endless"


class ToyScorer:
    def __init__(self, setup: Toy) -> None:
        self.setup = setup

    def score(self, job: Job) -> Score:
        name = self.setup.own_part(self.setup.documents[job.document].name)
        if name == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "raise ours":
            raise ModelError("the loss is nan")
        if name == "raise other":
            raise ValueError("odd")
        if name == "die once" and self.is_first(job):
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "die late once" and self.is_first(job):
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "lose a partner once" and self.is_first(job):
            raise RuntimeError("Connection closed by peer")
        if name == "break the GPU once" and self.is_first(job):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if name == "run out of memory once" and self.is_first(job):
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if name == "endless" or (name == "wait once" and self.is_first(job)):
            time.sleep(600)
        if name == "slow":
            time.sleep(0.1)
        return Score((float(job.document),), (1,), (0,), 1, 0.0)

    def is_first(self, job: Job) -> bool:
        return is_first(self.setup.path / f"seen-{job.document}-{self.setup.rank}")


def is_first(mark: Path) -> bool:
    """Whether nobody has asked this before."""
    if mark.exists():
        return False
    mark.touch()
    return True


@dataclass(frozen=True)
class Zoo(Watched):
    """Several models, each with an equal part of the documents in turn.

    A document named "die once" ends rank 1 while the others compute it.
    """

    paths: tuple[Path, ...] = ()

    def load(self, device: str, sharing: int = 1) -> Scores:
        own = super().load(device, sharing)
        assert isinstance(own, Scorer)
        more = [
            type(own)(path, self.documents, self.window, self.dtype, device)
            for path in self.paths[1:]
        ]
        return ZooScorer(self, [own, *more])


class ZooScorer:
    def __init__(self, setup: Zoo, scorers: Sequence[Scorer]) -> None:
        self.setup, self.scorers = setup, scorers

    def score(self, job: Job) -> Score:
        setup = self.setup
        name, shard = setup.documents[job.document].name, setup.shard
        if name == "die once" and shard and shard.rank == 1 and is_first(setup.path / "seen"):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.scorers[job.document * len(self.scorers) // len(setup.documents)].score(job)


def toy(folder: Path, *names: str, dtype: str = "float32") -> Toy:
    documents = tuple(Document((1,), name=name) for name in names)
    return Toy(folder, documents, WINDOW, dtype, folder / "pids")


def jobs_of(setup: Setup) -> Sequence[Job]:
    return [Job(config(), document) for document in range(len(setup.documents))]


def run_endlessly(folder: str) -> None:
    """For a process that is killed meanwhile."""
    setup = toy(Path(folder), "endless", "endless")
    ProcessWorkers(setup, ["cpu", "cpu"]).run(jobs_of(setup), lambda index, score: None)
