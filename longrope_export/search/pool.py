"""Workers outside this process: how jobs reach them, and what happens when one dies."""

from __future__ import annotations

import os
import socket
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Protocol

from longrope_export.errors import LongRopeError, ToolError
from longrope_export.models.offload import Offload
from longrope_export.search.dispatch import MAX_RETRIES, HeldPrefixes, JobQueue
from longrope_export.search.jobs import Document, Job, Score
from longrope_export.search.scorer import Scorer
from longrope_export.search.sharded import Shard, ShardedScorer


class Scores(Protocol):
    """What a worker has: a Scorer."""

    def score(self, job: Job) -> Score:
        """Compute one job."""
        ...


@dataclass(frozen=True)
class Setup:
    """What every worker of a search loads: the arguments of Scorer, but for the device.

    Attributes:
        path: a Hugging Face folder or a GGUF, the same path for every worker.
        documents: what jobs name by index.
        window: tokens that the model handles as it is.
        dtype: float32, bfloat16 or float16.
        offload: where the layers' weights are while they are not used; None: on the device.
        shard: for one of several processes that share every pass.
    """

    path: Path
    documents: tuple[Document, ...]
    window: int
    dtype: str = "float32"
    offload: Offload | None = field(default=None, kw_only=True)
    shard: Shard | None = field(default=None, kw_only=True)

    def load(self, device: str, sharing: int = 1) -> Scores:
        """Load the model; for a process of its own, since settings of torch change.

        Args:
            device: as torch names it.
            sharing: processes that share the cores of this machine.

        Raises:
            UnsupportedError: torch or transformers is not installed, or the family is not known.
            ModelError: transformers cannot load the model.
        """
        if device.startswith("cuda:"):
            import torch

            torch.cuda.set_device(device)  # kernels that do not look at their tensors' device
        elif sharing > 1:
            import torch

            torch.set_num_threads(max(1, torch.get_num_threads() // sharing))
        make = Scorer
        if self.shard is not None:
            self.shard.join(device)
            make = ShardedScorer
        return make(self.path, self.documents, self.window, self.dtype, device, self.offload)


@dataclass(frozen=True)
class Outcome:
    """What a worker answers; without a score and an error: it has loaded the model.

    Attributes:
        score: of its job.
        error: to be raised in the caller.
        death: why the worker is no longer good for anything; "" while it is.
        place: where it runs, once that is known, for messages.
    """

    score: Score | None = None
    error: LongRopeError | None = None
    death: str = ""
    place: str = ""


class Host:
    """The worker's own side."""

    def __init__(self) -> None:
        self._scorer: Scores | None = None
        self._place = ""

    def load(self, setup: Setup, device: str, sharing: int) -> Outcome:
        """Load the model."""
        self._place = f"{device}, process {os.getpid()} on {socket.gethostname()}"
        try:
            self._scorer = setup.load(device, sharing)
        except Exception as error:
            return self._failure(error, f"load {setup.path}")
        return Outcome(place=self._place)

    def score(self, job: Job) -> Outcome:
        """Compute one job."""
        assert self._scorer is not None
        try:
            return Outcome(score=self._scorer.score(job))
        except Exception as error:
            return self._failure(error, f"compute job {job.key}")

    def _failure(self, error: Exception, what: str) -> Outcome:
        text = f"{type(error).__name__}: {error}"
        # after a CUDA error every later call in this process fails too; memory may be free in a new one
        if "CUDA error" in str(error) or type(error).__name__ == "OutOfMemoryError":
            return Outcome(death=text)
        return Outcome(error=as_longrope_error(error, f"worker {self._place} cannot {what}"))


def as_longrope_error(error: Exception, what: str) -> LongRopeError:
    """The error itself, or a ToolError that tells it; where it was raised is in its notes."""
    told = (
        error
        if isinstance(error, LongRopeError)
        else ToolError(f"{what}: {type(error).__name__}: {error}")
    )
    told.add_note("".join(traceback.format_exception(error)))
    return told


class _State(Enum):
    ABSENT = auto()
    LOADING = auto()
    FREE = auto()
    BUSY = auto()


class Pool(ABC):
    """The loop that process and Ray workers share.

    A worker that dies is replaced, and its job given to whoever is free, at most MAX_RETRIES
    times for each job; a worker may also die as often in a row without a job. After an error, and
    after close, no worker is left; another run starts new ones.

    Args:
        names: one for each worker, for messages.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._places = list(names)
        self._names = list(names)
        self._states = [_State.ABSENT] * len(names)
        self._idle_deaths = [0] * len(names)
        self._held = HeldPrefixes(len(names))

    def run(self, jobs: Sequence[Job], done: Callable[[int, Score], None]) -> None:
        """Compute all jobs.

        Args:
            done: called in this thread for each finished job with its index, in any order.

        Raises:
            LongRopeError: what the scorer raised, with its type.
            ToolError: a worker died too often, or the scorer raised something else.
        """
        queue = JobQueue(jobs, self._held)
        try:
            while not queue.is_done:
                self._start_missing(queue.waiting)
                for worker, index in queue.assign(self._with(_State.FREE)):
                    self._states[worker] = _State.BUSY
                    self._send(worker, jobs[index])
                for worker, outcome in self._wait():
                    self._take(queue, worker, outcome, done)
        except BaseException:
            self._stop_all()
            raise

    def close(self) -> None:
        """End all workers."""
        self._stop_all()

    # -- what a kind of workers has to know

    @abstractmethod
    def _start(self, worker: int) -> None:
        """Begin a new worker that loads the model."""

    @abstractmethod
    def _send(self, worker: int, job: Job) -> None:
        """Give a job to a free worker. That it is dead is reported by _wait."""

    @abstractmethod
    def _wait(self) -> list[tuple[int, Outcome]]:
        """Wait until some workers have answered or died; each at most once."""

    @abstractmethod
    def _stop(self, worker: int) -> None:
        """End a worker, whatever it does, and leave nothing of it."""

    # -- the loop's parts

    def _with(self, *states: _State) -> list[int]:
        return [worker for worker, state in enumerate(self._states) if state in states]

    def _start_missing(self, waiting: int) -> None:
        """No more workers than jobs: loading a model is dear."""
        coming = len(self._with(_State.LOADING, _State.FREE))
        for worker in self._with(_State.ABSENT)[: max(0, waiting - coming)]:
            self._states[worker] = _State.LOADING
            self._start(worker)

    def _take(
        self, queue: JobQueue, worker: int, outcome: Outcome, done: Callable[[int, Score], None]
    ) -> None:
        if outcome.error is not None:
            raise outcome.error
        if outcome.death:
            self._bury(queue, worker, outcome.death)
            return
        self._states[worker] = _State.FREE
        if outcome.score is None:
            self._places[worker] = f"{self._names[worker]} ({outcome.place})"
        else:
            self._idle_deaths[worker] = 0
            done(queue.finished(worker), outcome.score)

    def _bury(self, queue: JobQueue, worker: int, death: str) -> None:
        state, place = self._states[worker], self._places[worker]
        self._stop(worker)
        self._states[worker], self._places[worker] = _State.ABSENT, self._names[worker]
        queue.lost(worker, f"worker {place} died ({death})")
        if state is _State.BUSY:
            return
        self._idle_deaths[worker] += 1
        if self._idle_deaths[worker] > MAX_RETRIES:
            doing = "while it loaded the model" if state is _State.LOADING else "without a job"
            raise ToolError(
                f"worker {place} died ({death}) {doing}, {self._idle_deaths[worker]} times in a "
                f"row; look for a lack of memory (dmesg, nvidia-smi), or leave that device out"
            )

    def _stop_all(self) -> None:
        for worker, state in enumerate(self._states):
            if state is not _State.ABSENT:
                self._stop(worker)
            self._states[worker], self._places[worker] = _State.ABSENT, self._names[worker]
            self._idle_deaths[worker] = 0
            self._held.forget(worker)
