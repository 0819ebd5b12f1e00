"""Workers of one machine: this process, or one process per device; and the choice of workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait

from longrope_export.errors import LongRopeError
from longrope_export.models.torch_model import default_device
from longrope_export.search.dispatch import HeldPrefixes, JobQueue
from longrope_export.search.jobs import Job, Score, Workers
from longrope_export.search.pool import Outcome, Pool, Scores, Setup, as_longrope_error
from longrope_export.search.team import Team


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
            neighbouring devices are one worker. See ShardedScorer for what they can share.

    Raises:
        LongRopeError: devices is empty, or cannot be shared so; see check_sharing.
    """

    def __init__(self, setup: Setup, devices: Sequence[str], ranks: int = 1) -> None:
        if not devices:
            raise LongRopeError("devices is empty, expected names such as cuda:0 or cpu")
        check_sharing(ranks, devices)
        groups = [devices[first : first + ranks] for first in range(0, len(devices), ranks)]
        super().__init__([f"{index} on {' + '.join(group)}" for index, group in enumerate(groups)])
        self._setup, self._groups = setup, groups
        self._sharing = sum(not device.startswith("cuda") for device in devices)
        self._teams: dict[int, Team] = {}

    def _start(self, worker: int) -> None:
        self._teams[worker] = Team(f"worker {worker}", self._groups[worker])
        self._teams[worker].start(self._setup, self._sharing)

    def _send(self, worker: int, job: Job) -> None:
        self._teams[worker].send(job)

    def _wait(self) -> list[tuple[int, Outcome]]:
        while True:
            outcomes = [(worker, team.outcome()) for worker, team in self._teams.items()]
            found = [(worker, outcome) for worker, outcome in outcomes if outcome is not None]
            if found:
                return found
            teams = {rank: team for team in self._teams.values() for rank in team.silent}
            patience = [team.patience_seconds for team in self._teams.values()]
            limits = [seconds for seconds in patience if seconds is not None]
            for connection in wait(list(teams), min(limits, default=None)):
                assert isinstance(connection, Connection)
                teams[connection].receive(connection)

    def _stop(self, worker: int) -> None:
        self._teams.pop(worker).stop()


def check_sharing(
    ranks: int, devices: Sequence[str] | None, ray_address: str | None = None
) -> None:
    """Refuse devices that cannot share passes so; one rank takes any.

    Args:
        ranks: processes that share every pass.
        devices: as the workers get them; None if none are named.

    Raises:
        LongRopeError: saying what is expected.
    """
    what = f"--sequence-parallel {ranks}"
    if ranks < 1:
        raise LongRopeError(f"{what}: expected 1 or more")
    if ranks == 1:
        return
    if ray_address is not None:
        raise LongRopeError(f"{what} shares passes between devices of this machine, not by --ray")
    if not devices or len(devices) % ranks:
        raise LongRopeError(
            f"{what} on {len(devices or ())} devices: expected {ranks} for each worker, as "
            f"--device cuda:0 --device cuda:1"
        )
    gpus = [device for device in devices if device.startswith("cuda:")]
    if set(devices) != {"cpu"} and not len(set(gpus)) == len(devices):
        raise LongRopeError(
            f"{what} on {', '.join(devices)}: expected a GPU of its own for each rank, as "
            f"--device cuda:0 --device cuda:1, or cpu for all"
        )


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
        sequence_parallel: devices that share every pass, see ranks of ProcessWorkers; more than 1
            need devices, and no Ray.

    Raises:
        LongRopeError: the arguments exclude each other, or devices is empty.
        UnsupportedError: torch, or Ray where it is asked for, is not installed.
        ToolError: Ray cannot be reached, or is too small.
    """
    check_sharing(sequence_parallel, devices, ray_address)
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
