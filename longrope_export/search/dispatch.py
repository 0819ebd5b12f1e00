"""Who computes which job next, and who has lost one too often."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Sequence

from longrope_export.errors import ToolError
from longrope_export.search.jobs import Job, essence
from longrope_export.search.scorer import KEPT_CACHES

MAX_RETRIES = 2  # of a job after its first worker died

Prefix = tuple[int, str]  # of a document, and the definition that its cache was filled under


class HeldPrefixes:
    """What the scorer of each worker still holds, seen from outside.

    Args:
        workers: how many there are.
    """

    def __init__(self, workers: int) -> None:
        self._held: list[OrderedDict[Prefix, None]] = [OrderedDict() for _ in range(workers)]

    def note(self, worker: int, prefix: Prefix) -> None:
        """A job with this prefix went to the worker."""
        held = self._held[worker]
        held[prefix] = None
        held.move_to_end(prefix)
        while len(held) > KEPT_CACHES:
            held.popitem(last=False)

    def forget(self, worker: int) -> None:
        """The worker starts anew."""
        self._held[worker].clear()

    def of(self, worker: int) -> list[Prefix]:
        """Latest first."""
        return list(reversed(self._held[worker]))

    def is_held(self, prefix: Prefix) -> bool:
        """Whether any worker has it."""
        return any(prefix in held for held in self._held)


class JobQueue:
    """Jobs that wait and jobs that are out.

    Jobs are grouped by prefix. A free worker gets a job whose prefix it holds, else one whose
    prefix nobody holds, else one whose holder has so many of them waiting that computing the
    prefix a second time is the shorter way.

    Args:
        held: outlives the queue, as the caches do.
    """

    def __init__(self, jobs: Sequence[Job], held: HeldPrefixes) -> None:
        self._jobs, self._held = jobs, held
        self._groups: dict[Prefix | None, deque[int]] = {}
        names: dict[int, str] = {}  # by identity: many jobs share one prefix, and text is slow
        self._prefixes: list[Prefix | None] = []
        for index, job in enumerate(jobs):
            prefix: Prefix | None = None
            if job.prefix is not None:
                name = names.setdefault(id(job.prefix), "") or essence(job.prefix)
                names[id(job.prefix)] = name
                prefix = (job.document, name)
            self._prefixes.append(prefix)
            self._groups.setdefault(prefix, deque()).append(index)
        self._out: dict[int, int] = {}
        self._losses = [0] * len(jobs)

    @property
    def waiting(self) -> int:
        """Jobs that nobody computes yet."""
        return sum(map(len, self._groups.values()))

    @property
    def is_done(self) -> bool:
        """Nothing waits, nothing is out."""
        return not self._groups and not self._out

    def assign(self, free: Collection[int]) -> list[tuple[int, int]]:
        """(worker, index of its job) for the free workers that get one."""
        given: list[tuple[int, int]] = []
        left = sorted(free)
        # first whoever holds something, so that nobody else is faster
        for choose in (self._held_by, self._held_by_nobody, self._worth_twice):
            for worker in list(left):
                prefix, found = choose(worker)
                if found:
                    given.append((worker, self._give(worker, prefix)))
                    left.remove(worker)
        return given

    def finished(self, worker: int) -> int:
        """Index of the job that the worker is done with."""
        return self._out.pop(worker)

    def lost(self, worker: int, what: str) -> None:
        """The worker is gone: its job, if it had one, waits again.

        Args:
            what: names the worker and what happened to it.

        Raises:
            ToolError: the job was lost more than MAX_RETRIES times.
        """
        self._held.forget(worker)
        index = self._out.pop(worker, None)
        if index is None:
            return
        self._losses[index] += 1
        if self._losses[index] > MAX_RETRIES:
            raise ToolError(
                f"{what} while it computed {describe(self._jobs[index])}; it has now lost "
                f"{self._losses[index]} workers; look for a lack of memory (dmesg, nvidia-smi), "
                f"or leave that device out"
            )
        self._groups.setdefault(self._prefixes[index], deque()).appendleft(index)

    def _held_by(self, worker: int) -> tuple[Prefix | None, bool]:
        for prefix in self._held.of(worker):
            if prefix in self._groups:
                return prefix, True
        return None, False

    def _held_by_nobody(self, worker: int) -> tuple[Prefix | None, bool]:
        for prefix in self._groups:
            if prefix is None or not self._held.is_held(prefix):
                return prefix, True
        return None, False

    def _worth_twice(self, worker: int) -> tuple[Prefix | None, bool]:
        gains = {prefix: self._gain(group) for prefix, group in self._groups.items()}
        best = max(gains, key=lambda prefix: gains[prefix], default=None)
        return best, bool(gains) and gains[best] > 0

    def _gain(self, group: Collection[int]) -> int:
        """Tokens that wait for the holder, less those of another worker's first job."""
        waiting = [sum(b - a for a, b in self._jobs[index].blocks) for index in group]
        first = self._jobs[next(iter(group))]
        return sum(waiting) - waiting[0] - first.blocks[-1][0]

    def _give(self, worker: int, prefix: Prefix | None) -> int:
        group = self._groups[prefix]
        index = group.popleft()
        if not group:
            del self._groups[prefix]
        if prefix is not None:
            self._held.note(worker, prefix)
        self._out[worker] = index
        return index


def describe(job: Job) -> str:
    """A job in an error message."""
    kind = "a gradient" if job.gradient else "the whole of"
    if job.blocks:
        kind = f"positions {', '.join(f'{a}-{b - 1}' for a, b in job.blocks)} of"
    elif job.gradient:
        kind += " over"
    return f"{kind} document {job.document} (job {job.key})"
