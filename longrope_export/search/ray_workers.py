"""Workers on a Ray cluster: one actor each."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longrope_export.errors import LongRopeError, ModelError, ToolError, UnsupportedError
from longrope_export.search.jobs import Job
from longrope_export.search.pool import Host, Outcome, Pool, Setup

LOOK_SECONDS = 20  # between looks at whether the cluster could place a worker
ABSENCE_SECONDS = 300  # without room for any: a lost node may come back
CONNECT_SECONDS = 10
OPTIONS = {
    "CPU": "num_cpus",
    "GPU": "num_gpus",
    "memory": "memory",
}  # what actors call these resources


class RayWorkers(Pool):
    """One Ray actor per worker.

    The model is not sent: its path must lead to the same files on every node (a shared file
    system, or a copy in the same place), and longrope-export with its transformers extra must be
    installed on every node in the same version. Documents are put into the object store once.
    An actor that is lost with its process or its node is replaced wherever there is room; a
    cluster that has none for five minutes ends the run with a ToolError.

    Args:
        setup: what each actor loads.
        address: "local" starts a cluster on this machine, and close ends it; "auto" joins the one
            that this machine is a node of (or that this process has already joined); else what
            ray.init takes, host:port.
        num_workers: None: as many as the cluster's GPUs; without GPUs one per node.
        resources: what each actor asks for, in the words of ray.cluster_resources(), such as
            {"GPU": 1}; None: one GPU, or where the cluster has none, a share of a node's CPUs.

    Raises:
        UnsupportedError: Ray is not installed.
        ToolError: the cluster cannot be reached, or has no room for so many workers.
        LongRopeError: num_workers is below 1.
    """

    def __init__(
        self,
        setup: Setup,
        address: str,
        num_workers: int | None = None,
        resources: Mapping[str, float] | None = None,
    ) -> None:
        if num_workers is not None and num_workers < 1:
            raise LongRopeError(f"num_workers must be 1 or more, got {num_workers}")
        try:
            import ray
        except ImportError as error:
            raise UnsupportedError(
                f"Ray workers need ray: {error}; pip install 'longrope-export[ray]'"
            ) from error
        self._ray: Any = ray
        self._owns = _connect(ray, address)
        try:
            self._resources = dict(resources or _default_resources(ray, num_workers))
            room = _room(ray, self._resources)
            count = num_workers or room
            if not 0 < count <= room:
                raise ToolError(
                    f"the Ray cluster at {address} has room for {room} workers with "
                    f"{self._resources} each, expected {max(count, 1)}; ask for fewer workers, "
                    f"for less with resources, or wait until nodes have joined"
                )
            self._device = "cuda" if self._resources.get("GPU") else "cpu"
            super().__init__([f"{index} on Ray" for index in range(count)])
            self._setup = ray.put(setup)
        except BaseException:
            self._disconnect()
            raise
        self._actors: dict[int, Any] = {}
        self._answers: dict[Any, int] = {}
        self._is_open = True

    def close(self) -> None:
        """End all actors, and the connection or the cluster if it was made here.

        No further run is possible.
        """
        super().close()
        self._is_open = False
        self._disconnect()

    def _disconnect(self) -> None:
        if self._owns:
            self._ray.shutdown()
            self._owns = False

    def _start(self, worker: int) -> None:
        if not self._is_open:  # Ray would start a cluster unasked
            raise ToolError("these Ray workers are closed")
        options = {OPTIONS[n]: value for n, value in self._resources.items() if n in OPTIONS}
        custom = {n: value for n, value in self._resources.items() if n not in OPTIONS}
        # replacing is done here, where a job's losses are counted
        actor = (
            self._ray.remote(_NodeHost)
            .options(resources=custom, max_restarts=0, max_task_retries=0, **options)
            .remote()
        )
        self._actors[worker] = actor
        # Ray itself holds torch to the CPUs of an actor: sharing is 1
        self._answers[actor.load.remote(self._setup, self._device, 1)] = worker

    def _send(self, worker: int, job: Job) -> None:
        self._answers[self._actors[worker].score.remote(job)] = worker

    def _wait(self) -> list[tuple[int, Outcome]]:
        references = list(self._answers)
        last_room = time.monotonic()
        while True:
            ready, _ = self._ray.wait(references, timeout=LOOK_SECONDS)
            if ready:
                return [(self._answers.pop(one), self._answer(one)) for one in ready]
            if _room(self._ray, self._resources):
                last_room = time.monotonic()
            elif time.monotonic() - last_room > ABSENCE_SECONDS:
                raise ToolError(
                    f"for {ABSENCE_SECONDS} s no node of the Ray cluster has had "
                    f"{self._resources}; resume the run when one is back"
                )

    def _answer(self, reference: Any) -> Outcome:
        try:
            answer = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:  # the process or the node is gone
            return Outcome(death=" ".join(str(error).split()))
        assert isinstance(answer, Outcome)
        return answer

    def _stop(self, worker: int) -> None:
        self._answers = {one: other for one, other in self._answers.items() if other != worker}
        actor = self._actors.pop(worker, None)
        if actor is not None:
            self._ray.kill(actor)


class _NodeHost(Host):
    """A Host whose node may lack the model."""

    def load(self, setup: Setup, device: str, sharing: int) -> Outcome:
        if not setup.path.exists():
            import ray

            node = ray.util.get_node_ip_address()
            return Outcome(
                error=ModelError(
                    f"{setup.path}: not there on the Ray node {node}; every node must find the "
                    f"model under this path: use a shared file system or copy it to each"
                )
            )
        return super().load(setup, device, sharing)


def _connect(ray: Any, address: str) -> bool:
    """Whether a connection was made that has to be ended.

    Raises:
        ToolError: it cannot be made.
    """
    if address == "auto" and ray.is_initialized():
        return False
    _check_listens(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to Ray's makers
    settings: dict[str, Any] = {"address": address, "log_to_driver": False}
    if address == "local":
        # actors find what this process finds; other machines have their own installation
        paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        settings["runtime_env"] = {"env_vars": {"PYTHONPATH": paths}}
        settings["include_dashboard"] = False
    try:
        ray.init(**settings)
    except Exception as error:  # ConnectionError, RuntimeError, ValueError: by the kind of address
        raise ToolError(f"cannot reach a Ray cluster at {address}: {error}") from error
    return True


def _check_listens(address: str) -> None:
    """Refuse a dead host:port at once; ray.init tries for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        return  # ray.init knows what it is, or says what is wrong
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ToolError(f"cannot reach a Ray cluster at {address}: {error}") from error


def _nodes(ray: Any) -> list[dict[str, float]]:
    """The resources of each living node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _default_resources(ray: Any, num_workers: int | None) -> dict[str, float]:
    nodes = _nodes(ray)
    if any(node.get("GPU") for node in nodes):
        return {"GPU": 1}
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not cores:
        return {"CPU": 1}
    workers_per_node = -(-(num_workers or len(cores)) // len(cores))
    return {"CPU": max(1, min(cores) // workers_per_node)}


def _room(ray: Any, resources: Mapping[str, float]) -> int:
    """How many workers the nodes could hold if nobody else used them."""
    return sum(
        min(int(node.get(name, 0) // amount) for name, amount in resources.items() if amount)
        for node in _nodes(ray)
    )
