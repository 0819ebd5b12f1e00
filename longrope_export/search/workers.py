"""Workers of one machine: this process, or one process per device; and the choice of workers."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from longrope_export.errors import LongRopeError
from longrope_export.models.torch_model import default_device
from longrope_export.search.dispatch import HeldPrefixes, JobQueue
from longrope_export.search.jobs import Job, Score, Workers
from longrope_export.search.pool import Host, Outcome, Pool, Scores, Setup, as_longrope_error
from longrope_export.search.sharded import shards_of

GRACE_SECONDS = 5  # for a process that closed its pipe to be gone


class LocalWorkers:
    """Computes jobs in this process, one after the other, jobs of one prefix together.

    Args:
        load: makes the Scorer; called once, by the first run.
    """

    def __init__(self, load: Callable[[], Scores]) -> None:
        self._load = load
        self._scorer: Scores | None = None
        self._held = HeldPrefixes(1)

    def run(self, jobs: Sequence[Job], done: Callable[[int, Score], None]) -> None:
        """Compute all jobs.

        Args:
            done: called for each finished job with its index, in any order.

        Raises:
            LongRopeError: what the scorer raised, with its type.
            ToolError: the scorer raised something else.
        """
        queue = JobQueue(jobs, self._held)
        while not queue.is_done:
            for worker, index in queue.assign([0]):
                score = self._score(jobs[index])
                done(queue.finished(worker), score)

    def close(self) -> None:
        """Give back the model."""
        self._scorer = None
        self._held.forget(0)

    def _score(self, job: Job) -> Score:
        what = f"cannot compute job {job.key}"
        try:
            if self._scorer is None:
                what = "cannot load the model"
                self._scorer = self._load()
                what = f"cannot compute job {job.key}"
            return self._scorer.score(job)
        except LongRopeError:
            raise
        except Exception as error:
            raise as_longrope_error(error, what) from error


class ProcessWorkers(Pool):
    """One process per device, each with the model loaded once; or several to a worker.

    Processes are spawned, so a program that is not guarded by `if __name__ == "__main__"` runs
    again in each. They end with this process, however it ends.

    Args:
        setup: what each process loads.
        devices: as torch names them, one process for each entry: cuda:0, cuda:1, or cpu several
            times. Processes on the CPU divide torch's threads between them.
        ranks: processes that share every pass, for texts too long for one device: so many
            neighbouring devices are one worker. More than 1: whole passes under one tier only.

    Raises:
        LongRopeError: devices is empty, or cannot be divided so.
    """

    def __init__(self, setup: Setup, devices: Sequence[str], ranks: int = 1) -> None:
        if not devices:
            raise LongRopeError("devices is empty, expected names such as cuda:0 or cpu")
        if ranks < 1 or len(devices) % ranks:
            raise LongRopeError(
                f"workers of {ranks} ranks on {len(devices)} devices ({', '.join(devices)}): "
                f"expected {ranks} devices for each worker, as --device cuda:0 --device cuda:1"
            )
        teams = [devices[first : first + ranks] for first in range(0, len(devices), ranks)]
        super().__init__([f"{index} on {' + '.join(team)}" for index, team in enumerate(teams)])
        self._setup, self._teams, self._ranks = setup, teams, ranks
        # by worker and rank
        self._processes: dict[tuple[int, int], tuple[SpawnProcess, Connection]] = {}
        self._answers: dict[tuple[int, int], Outcome] = {}
        self._meetings: dict[int, tempfile.TemporaryDirectory[str]] = {}

    def _start(self, worker: int) -> None:
        context = multiprocessing.get_context("spawn")
        devices = [device for team in self._teams for device in team]
        sharing = sum(not device.startswith("cuda") for device in devices)
        for rank, setup in enumerate(self._setups(worker)):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(theirs, self._teams[worker][rank], sharing),
                name=f"worker {worker}.{rank}",
                daemon=True,
            )
            process.start()
            theirs.close()  # else the end of the process would not end the pipe
            self._processes[worker, rank] = (process, ours)
            # not among the arguments: a process that dies before it reads them blocks start()
            self._put(worker, rank, setup)

    def _setups(self, worker: int) -> list[Setup]:
        if self._ranks == 1:
            return [self._setup]
        folder = tempfile.TemporaryDirectory(prefix="longrope-")
        self._meetings[worker] = folder
        return shards_of(self._setup, self._ranks, Path(folder.name) / "ranks")

    def _send(self, worker: int, job: Job) -> None:
        for rank in range(self._ranks):
            self._put(worker, rank, job)

    def _wait(self) -> list[tuple[int, Outcome]]:
        found: list[tuple[int, Outcome]] = []
        while not found:
            failed = any(answer.error is not None for answer in self._answers.values())
            ranks = {
                connection: key
                for key, (_, connection) in self._processes.items()
                if key not in self._answers
            }
            # the ranks of one that failed wait for it in vain, unless they fail too or it was they
            ready = wait(list(ranks), GRACE_SECONDS if failed else None)
            for connection in ready:
                assert isinstance(connection, Connection)
                self._answers[ranks[connection]] = self._answer(*ranks[connection])
            for worker in sorted({worker for worker, _ in self._answers}):
                outcome = self._joined(worker, is_over=not ready)
                if outcome is not None:
                    found.append((worker, outcome))
        return found

    def _answer(self, worker: int, rank: int) -> Outcome:
        try:
            answer: Outcome = self._processes[worker, rank][1].recv()
        except (EOFError, OSError):
            return Outcome(death=self._autopsy(worker, rank))
        return answer

    def _joined(self, worker: int, is_over: bool) -> Outcome | None:
        """What a worker answers, once its ranks have; a death or an error before a score."""
        keys = [key for key in self._answers if key[0] == worker]
        answers = [self._answers[key] for key in sorted(keys)]
        deaths = [answer for answer in answers if answer.death]
        errors = [answer for answer in answers if answer.error is not None]
        if not (deaths or len(answers) == self._ranks or (is_over and errors)):
            return None
        for key in keys:
            del self._answers[key]
        return [*deaths, *errors, *answers][0]

    def _stop(self, worker: int) -> None:
        for rank in range(self._ranks):
            self._answers.pop((worker, rank), None)
            if (worker, rank) not in self._processes:
                continue  # it could not even be started
            process, connection = self._processes.pop((worker, rank))
            connection.close()
            process.kill()  # nothing is worth waiting for
            process.join()
            process.close()
        if worker in self._meetings:
            self._meetings.pop(worker).cleanup()

    def _put(self, worker: int, rank: int, message: Setup | Job) -> None:
        with contextlib.suppress(OSError):  # it is dead, and its pipe will say so
            self._processes[worker, rank][1].send(message)

    def _autopsy(self, worker: int, rank: int) -> str:
        process, _ = self._processes[worker, rank]
        process.join(GRACE_SECONDS)
        code = process.exitcode
        if code is None:
            return "it closed its pipe"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _serve(connection: Connection, device: str, sharing: int) -> None:
    """A worker process, from its start to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    host = Host()
    try:
        connection.send(host.load(connection.recv(), device, sharing))
        while True:
            connection.send(host.score(connection.recv()))
    except (EOFError, ConnectionError):
        pass  # the parent closed the pipe


def _end_with_parent() -> None:
    """Also in the middle of a job, when nobody looks at the pipe."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def make_workers(
    setup: Setup,
    devices: Sequence[str] | None = None,
    *,
    ray_address: str | None = None,
    num_workers: int | None = None,
    resources: Mapping[str, float] | None = None,
    sequence_parallel: int = 1,
) -> Workers:
    """The workers that the arguments ask for.

    Args:
        setup: what each worker loads.
        devices: one worker for each, on this machine; None: one, on a GPU if there is one.
        ray_address: "local", "auto" or host:port: Ray workers instead; see RayWorkers.
        num_workers, resources: of Ray workers.
        sequence_parallel: devices that share every pass; see ranks of ProcessWorkers.

    Raises:
        LongRopeError: the arguments exclude each other, or devices is empty.
        UnsupportedError: torch, or Ray where it is asked for, is not installed.
        ToolError: Ray cannot be reached, or is too small.
    """
    if sequence_parallel > 1 and (devices is None or ray_address is not None):
        raise LongRopeError(
            f"sequence_parallel = {sequence_parallel} needs as many devices of this machine for "
            f"each worker, as --device cuda:0 --device cuda:1, and no Ray"
        )
    if ray_address is not None:
        if devices is not None:
            raise LongRopeError("use devices for this machine or ray_address, not both")
        from longrope_export.search.ray_workers import RayWorkers

        return RayWorkers(setup, ray_address, num_workers, resources)
    if num_workers is not None or resources is not None:
        raise LongRopeError("num_workers and resources are for Ray: they need ray_address")
    if devices is None:
        devices = [default_device()]
    if len(devices) == 1 and sequence_parallel == 1:
        return LocalWorkers(partial(setup.load, devices[0]))
    return ProcessWorkers(setup, devices, sequence_parallel)
