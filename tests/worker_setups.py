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
from longrope_export.search.workers import ProcessWorkers

WINDOW = 48


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
    """Scores by arithmetic; the name of a document says what else happens."""

    def load(self, device: str, sharing: int = 1) -> Scores:
        self.pids.mkdir(exist_ok=True)
        (self.pids / str(os.getpid())).touch()
        if self.dtype == "deadly":
            os._exit(7)
        return ToyScorer(self)


class ToyScorer:
    def __init__(self, setup: Toy) -> None:
        self.setup = setup

    def score(self, job: Job) -> Score:
        name = self.setup.documents[job.document].name
        if name == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "raise ours":
            raise ModelError("the loss is nan")
        if name == "raise other":
            raise ValueError("odd")
        if name == "die once" and self.is_first(job):
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "break the GPU once" and self.is_first(job):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if name == "endless":
            time.sleep(600)
        return Score((float(job.document),), (1,), (0,), 1, 0.0)

    def is_first(self, job: Job) -> bool:
        mark = self.setup.path / f"seen-{job.document}"
        if mark.exists():
            return False
        mark.touch()
        return True


def toy(folder: Path, *names: str) -> Toy:
    documents = tuple(Document((1,), name=name) for name in names)
    return Toy(folder, documents, WINDOW, pids=folder / "pids")


def jobs_of(setup: Setup) -> Sequence[Job]:
    return [Job(config(), document) for document in range(len(setup.documents))]


def run_endlessly(folder: str) -> None:
    """For a process that is killed meanwhile."""
    setup = toy(Path(folder), "endless", "endless")
    ProcessWorkers(setup, ["cpu", "cpu"]).run(jobs_of(setup), lambda index, score: None)
