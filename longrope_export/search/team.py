"""The processes of one worker: one, or several ranks that share every pass."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from longrope_export.search.jobs import Job
from longrope_export.search.pool import Host, Outcome, Setup
from longrope_export.search.sharded import Shard

GRACE_SECONDS = 5  # for a closed pipe's process to be gone; for ranks beside one that raised


class Team:
    """One process per device, spawned; together one worker.

    They end with this process, however it ends.

    Args:
        name: of the worker, for the list of processes.
        devices: one for each rank.
    """

    def __init__(self, name: str, devices: Sequence[str]) -> None:
        self._name, self._devices = name, devices
        self._processes: list[SpawnProcess] = []
        self._connections: list[Connection] = []
        self._meeting: tempfile.TemporaryDirectory[str] | None = None
        self._answers: dict[int, Outcome] = {}  # by rank, to the latest message
        self._deadline: float | None = None  # once a rank has raised

    def start(self, setup: Setup, sharing: int) -> None:
        """Begin the processes, and let them load.

        Args:
            sharing: processes that share the cores of this machine.
        """
        context = multiprocessing.get_context("spawn")
        ranks = len(self._devices)
        if ranks > 1:
            self._meeting = tempfile.TemporaryDirectory(prefix="longrope-ranks-")
        for rank, device in enumerate(self._devices):
            ours, theirs = context.Pipe()
            self._connections.append(ours)
            process = context.Process(
                target=_serve, args=(theirs, device, sharing), name=f"{self._name}.{rank}",
                daemon=True,
            )  # fmt: skip
            process.start()
            self._processes.append(process)
            theirs.close()  # else the end of the process would not end the pipe
            if self._meeting is not None:
                meeting = Path(self._meeting.name) / "store"
                setup = replace(setup, shard=Shard(rank, ranks, meeting))
            # not among the arguments: a process that dies before it reads them blocks start()
            self._put(ours, setup)

    def send(self, job: Job) -> None:
        """Give a job to every rank."""
        for connection in self._connections:
            self._put(connection, job)

    @property
    def silent(self) -> list[Connection]:
        """Of the ranks that have not answered yet."""
        return [c for rank, c in enumerate(self._connections) if rank not in self._answers]

    def receive(self, connection: Connection) -> None:
        """Take the answer that has come, or the death of the rank."""
        rank = self._connections.index(connection)
        try:
            self._answers[rank] = connection.recv()
        except (EOFError, OSError):
            self._answers[rank] = Outcome(death=self._autopsy(rank))
        if self._answers[rank].error is not None and self._deadline is None:
            self._deadline = time.monotonic() + GRACE_SECONDS

    @property
    def patience_seconds(self) -> float | None:
        """After which `outcome` will not wait for the other ranks any more; None: for ever."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def outcome(self) -> Outcome | None:
        """What the worker answers, once that is known: a death before an error before a score.

        Ranks beside one that is gone or has raised wait for it in vain. One whose partner has died
        may raise a moment before that death is seen here, hence the grace.
        """
        answers = [answer for _, answer in sorted(self._answers.items())]
        deaths = [answer for answer in answers if answer.death]
        errors = [answer for answer in answers if answer.error is not None]
        is_whole = bool(answers) and len(answers) == len(self._devices)
        if not (deaths or is_whole or self.patience_seconds == 0):
            return None
        self._answers, self._deadline = {}, None
        first: Outcome = [*deaths, *errors, *answers][0]
        return replace(first, place=" + ".join(answer.place for answer in answers))

    def stop(self) -> None:
        """End all ranks, whatever they do, and leave nothing of them."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()  # nothing is worth waiting for
        for process in self._processes:
            process.join()
            process.close()
        if self._meeting is not None:
            self._meeting.cleanup()

    def _put(self, connection: Connection, message: Setup | Job) -> None:
        with contextlib.suppress(OSError):  # it is dead, and its pipe will say so
            connection.send(message)

    def _autopsy(self, rank: int) -> str:
        process = self._processes[rank]
        process.join(GRACE_SECONDS)
        where = f", rank {rank} on {self._devices[rank]}" if len(self._devices) > 1 else ""
        code = process.exitcode
        if code is None:
            return f"it closed its pipe{where}"
        death = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return death + where


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
