"""Workers of one machine: this process, or one process per device; and the choice of workers."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from longrope_export.errors import LongRopeError
from longrope_export.models.torch_model import default_device
from longrope_export.search.dispatch import HeldPrefixes, JobQueue
from longrope_export.search.jobs import Job, Score, Workers
from longrope_export.search.pool import Host, Outcome, Pool, Scores, Setup, as_longrope_error

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
    """One process per device, each with the model loaded once.

    Processes are spawned, so a program that is not guarded by `if __name__ == "__main__"` runs
    again in each. They end with this process, however it ends.

    Args:
        setup: what each process loads.
        devices: as torch names them, one process for each entry: cuda:0, cuda:1, or cpu several
            times. Processes on the CPU divide torch's threads between them.

    Raises:
        LongRopeError: devices is empty.
    """

    def __init__(self, setup: Setup, devices: Sequence[str]) -> None:
        if not devices:
            raise LongRopeError("devices is empty, expected names such as cuda:0 or cpu")
        super().__init__([f"{index} on {device}" for index, device in enumerate(devices)])
        self._setup, self._devices = setup, list(devices)
        self._processes: dict[int, tuple[SpawnProcess, Connection]] = {}

    def _start(self, worker: int) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        device = self._devices[worker]
        sharing = sum(not other.startswith("cuda") for other in self._devices)
        process = context.Process(
            target=_serve, args=(theirs, device, sharing), name=f"worker {worker}", daemon=True
        )
        process.start()
        theirs.close()  # else the end of the process would not end the pipe
        self._processes[worker] = (process, ours)
        # not among the arguments: a process that dies before it reads them blocks start()
        self._put(worker, self._setup)

    def _send(self, worker: int, job: Job) -> None:
        self._put(worker, job)

    def _wait(self) -> list[tuple[int, Outcome]]:
        workers = {connection: worker for worker, (_, connection) in self._processes.items()}
        answers = []
        for connection in wait(list(workers)):
            assert isinstance(connection, Connection)
            worker = workers[connection]
            try:
                answers.append((worker, connection.recv()))
            except (EOFError, OSError):
                answers.append((worker, Outcome(death=self._autopsy(worker))))
        return answers

    def _stop(self, worker: int) -> None:
        if worker not in self._processes:
            return  # it could not even be started
        process, connection = self._processes.pop(worker)
        connection.close()
        process.kill()  # nothing is worth waiting for
        process.join()
        process.close()

    def _put(self, worker: int, message: Setup | Job) -> None:
        with contextlib.suppress(OSError):  # it is dead, and its pipe will say so
            self._processes[worker][1].send(message)

    def _autopsy(self, worker: int) -> str:
        process, _ = self._processes[worker]
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
) -> Workers:
    """The workers that the arguments ask for.

    Args:
        setup: what each worker loads.
        devices: one worker for each, on this machine; None: one, on a GPU if there is one.
        ray_address: "local", "auto" or host:port: Ray workers instead; see RayWorkers.
        num_workers, resources: of Ray workers.

    Raises:
        LongRopeError: the arguments exclude each other, or devices is empty.
        UnsupportedError: torch, or Ray where it is asked for, is not installed.
        ToolError: Ray cannot be reached, or is too small.
    """
    if ray_address is not None:
        if devices is not None:
            raise LongRopeError("use devices for this machine or ray_address, not both")
        from longrope_export.search.ray_workers import RayWorkers

        return RayWorkers(setup, ray_address, num_workers, resources)
    if num_workers is not None or resources is not None:
        raise LongRopeError("num_workers and resources are for Ray: they need ray_address")
    if devices is None:
        devices = [default_device()]
    if len(devices) == 1:
        return LocalWorkers(partial(setup.load, devices[0]))
    return ProcessWorkers(setup, devices)
