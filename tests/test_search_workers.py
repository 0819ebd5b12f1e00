"""Search workers: the same numbers from everyone, and nothing lost or left when one dies."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_models import SENTENCES, add_bpe_tokenizer, make_model
from worker_setups import WINDOW, Toy, Watched, config, jobs_of, toy

from longrope_export.cli import main
from longrope_export.errors import LongRopeError, ModelError, ToolError
from longrope_export.factor_files import read_factors
from longrope_export.search import dispatch
from longrope_export.search.dispatch import HeldPrefixes, JobQueue
from longrope_export.search.jobs import Document, Job, Score, Workers
from longrope_export.search.pool import Setup
from longrope_export.search.workers import LocalWorkers, ProcessWorkers, make_workers


def collect(
    workers: Workers, jobs: Sequence[Job], watch: Callable[[int], None] = lambda count: None
) -> list[Score]:
    """The scores by index of their jobs, each of which must come once and in this thread."""
    found: dict[int, Score] = {}
    here = threading.get_ident()

    def done(index: int, score: Score) -> None:
        assert threading.get_ident() == here
        assert index not in found
        found[index] = score
        watch(len(found))

    workers.run(jobs, done)
    return [found[index] for index in range(len(jobs))]


def pids(setup: Watched) -> list[int]:
    """Of the processes that have loaded it and still exist, as zombies or not."""
    found = [int(path.name) for path in setup.pids.iterdir()]
    return [pid for pid in found if Path(f"/proc/{pid}").exists()]


def kill_one(setup: Watched) -> Callable[[int], None]:
    """Kills a worker when the first score has come."""

    def watch(count: int) -> None:
        if count == 1:
            os.kill(pids(setup)[0], signal.SIGKILL)

    return watch


# -- the same numbers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), dtype="float32")


@pytest.fixture(scope="module")
def setup(model: Path) -> Watched:
    tokens = itertools.cycle([5, 70, 9, 131, 200, 17, 42, 300, 3, 88, 250])
    documents = [Document(tuple(itertools.islice(tokens, 96))) for _ in range(3)]
    return Watched(model, tuple(documents), WINDOW, pids=model / "pids")


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    whole = [Job(config(factor), document) for factor in (1.5, 3.0) for document in range(3)]
    blocks = ((40, 56), (80, 95))
    skipping = [Job(config(), 1, blocks)]
    behind = [Job(config(factor), d, blocks, config()) for factor in (1.5, 3.0) for d in range(3)]
    return [*whole, *skipping, *behind, Job(config(), 2, gradient=True)]


@pytest.fixture(scope="module")
def expected(setup: Watched, jobs: list[Job]) -> list[Score]:
    scorer = Setup.load(setup, "cpu")
    return [scorer.score(job) for job in jobs]


def check_equal(found: Sequence[Score], expected: Sequence[Score]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.counts == other.counts
        assert one.losses == pytest.approx(other.losses, rel=1e-6)
        assert one.gradient == pytest.approx(other.gradient, rel=1e-5, abs=1e-8)


def test_local_workers_agree_with_the_scorer(
    setup: Watched, jobs: list[Job], expected: list[Score]
) -> None:
    workers = LocalWorkers(lambda: Setup.load(setup, "cpu"))
    check_equal(collect(workers, jobs), expected)
    workers.close()


def test_processes_agree_though_one_is_killed(
    setup: Watched, jobs: list[Job], expected: list[Score]
) -> None:
    with contextlib.closing(ProcessWorkers(setup, ["cpu", "cpu"])) as workers:
        check_equal(collect(workers, jobs, kill_one(setup)), expected)
    assert not pids(setup)


# -- processes that die, without a model


def test_a_process_killed_in_its_job_is_replaced_and_nothing_is_lost(tmp_path: Path) -> None:
    setup = toy(tmp_path, "", "die once", "", "die once", "die once", "die once")
    with contextlib.closing(ProcessWorkers(setup, ["cpu"])) as workers:
        scores = collect(workers, jobs_of(setup))
        assert [score.mean for score in scores] == [0, 1, 2, 3, 4, 5]
        assert len(list(setup.pids.iterdir())) == 5
        assert len(pids(setup)) == 1, "the killed ones are zombies"
        # the same process serves the next call
        collect(workers, jobs_of(setup))
        assert len(list(setup.pids.iterdir())) == 5
    assert not pids(setup)


def test_a_job_that_kills_every_worker_is_given_up(tmp_path: Path) -> None:
    setup = toy(tmp_path, "", "die")
    jobs = jobs_of(setup)
    workers = ProcessWorkers(setup, ["cpu"])
    with pytest.raises(ToolError, match=r"on cpu .*died \(signal SIGKILL\).*document 1") as caught:
        collect(workers, jobs)
    assert jobs[1].key in str(caught.value)
    assert len(list(setup.pids.iterdir())) == 3
    assert not pids(setup)


def test_a_worker_that_always_dies_while_it_loads_is_given_up(tmp_path: Path) -> None:
    setup = Toy(tmp_path, (Document((1,)),), WINDOW, "deadly", tmp_path / "pids")
    workers = ProcessWorkers(setup, ["cpu"])
    with pytest.raises(ToolError, match=r"exit code 7\) while it loaded the model, 3 times"):
        collect(workers, jobs_of(setup))
    assert not pids(setup)


@pytest.mark.parametrize("name", ["break the GPU once", "run out of memory once"])
def test_a_broken_cuda_context_counts_as_a_death(tmp_path: Path, name: str) -> None:
    setup = toy(tmp_path, "", name, "")
    with contextlib.closing(ProcessWorkers(setup, ["cpu"])) as workers:
        assert [score.mean for score in collect(workers, jobs_of(setup))] == [0, 1, 2]
    assert len(list(setup.pids.iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("raise ours", ModelError, "the loss is nan"),
        ("raise other", ToolError, r"worker cpu, process \d+ .*ValueError: odd"),
    ],
)
def test_an_exception_in_the_scorer_reaches_the_caller(
    name: str, kind: type[LongRopeError], text: str, tmp_path: Path
) -> None:
    setup = toy(tmp_path, "endless", name)
    workers = ProcessWorkers(setup, ["cpu", "cpu"])
    with pytest.raises(kind, match=text) as caught:
        collect(workers, jobs_of(setup))
    assert "in score" in caught.value.__notes__[0], "where it was raised"
    assert not pids(setup)
    local = LocalWorkers(lambda: setup.load("cpu"))
    with pytest.raises(kind, match=text.split()[-1]):
        collect(local, jobs_of(setup)[1:])


def test_an_interrupt_leaves_no_process(tmp_path: Path) -> None:
    setup = toy(tmp_path, "", "endless")

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(ProcessWorkers(setup, ["cpu", "cpu"]), jobs_of(setup), interrupt)
    assert not pids(setup)


def test_processes_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    code = f"import worker_setups; worker_setups.run_endlessly({str(tmp_path)!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
    started = tmp_path / "pids"
    try:
        wait_for(lambda: started.exists() and len(list(started.iterdir())) == 2, 60)
    finally:
        parent.kill()
        parent.wait()
    found = [int(path.name) for path in started.iterdir()]
    wait_for(lambda: not any(map(is_running, found)), 60)


def is_running(pid: int) -> bool:
    """A process of nobody may stay as a zombie where init does not collect them."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it ends while it is looked at
        return False


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


# -- Ray


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster of this machine; workers at "auto" join it."""
    pytest.importorskip("ray", reason="pip install 'longrope-export[ray]'")
    from longrope_export.search.ray_workers import RayWorkers

    owner = RayWorkers(toy(tmp_path_factory.mktemp("owner")), "local", 2)
    yield
    owner.close()


@pytest.mark.usefixtures("cluster")
def test_ray_agrees(setup: Watched, jobs: list[Job], expected: list[Score]) -> None:
    workers = make_workers(setup, ray_address="auto", num_workers=1)
    with contextlib.closing(workers):
        check_equal(collect(workers, jobs), expected)


@pytest.mark.usefixtures("cluster")
def test_ray_replaces_what_was_killed_and_says_what_went_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = toy(tmp_path, "", "die once", "", "raise ours", "die")
    jobs = jobs_of(setup)
    workers = make_workers(setup, ray_address="auto", num_workers=1)
    with contextlib.closing(workers):
        assert [score.mean for score in collect(workers, jobs[:3])] == [0, 1, 2]
        assert len(list(setup.pids.iterdir())) == 2
        with pytest.raises(ModelError, match="the loss is nan"):
            collect(workers, jobs[3:])
        monkeypatch.setattr(dispatch, "MAX_RETRIES", 0)  # an actor takes seconds to start
        with pytest.raises(ToolError, match=r"on Ray \(cpu, .*died.*document 4 .*lost 1 worker"):
            collect(workers, jobs[4:])


@pytest.mark.usefixtures("cluster")
def test_the_command_on_ray_finds_what_it_finds_here(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", dtype="float32", max_position_embeddings=64)
    add_bpe_tokenizer(model)
    (tmp_path / "books").mkdir()
    for number in range(3):
        (tmp_path / "books" / f"{number}.txt").write_text(" ".join(SENTENCES[number:] * 30))
    words = ["search", str(model), "--target-length", "128", "--text", str(tmp_path / "books")]
    words += [
        "--documents",
        "2,1,1",
        "--population",
        "4",
        "--iterations",
        "1",
        "--switch",
        "causal",
    ]
    found = []
    for name, more in (("here", []), ("ray", ["--ray", "auto", "--ray-workers", "1"])):
        run = tmp_path / name
        result = CliRunner().invoke(main, [*words, "-o", str(run), *more])
        assert result.exit_code == 0, result.stderr
        found.append(read_factors(run / "factors.json").tiers)
    assert found[0] == found[1]


def test_a_ray_node_without_the_model_is_named(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="pip install 'longrope-export[ray]'")
    from longrope_export.search.ray_workers import _NodeHost

    error = _NodeHost().load(toy(tmp_path / "elsewhere"), "cpu", 1).error
    assert isinstance(error, ModelError)
    assert "elsewhere: not there on the Ray node" in str(error)


@pytest.mark.usefixtures("cluster")
def test_ray_refuses_more_workers_than_it_can_place(tmp_path: Path) -> None:
    setup, resources = toy(tmp_path, ""), {"CPU": 1.0}
    with pytest.raises(ToolError, match=r"room for \d+ workers .*expected 9999"):
        make_workers(setup, ray_address="auto", num_workers=9999, resources=resources)


def test_a_ray_cluster_that_is_not_there_is_named_at_once(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="pip install 'longrope-export[ray]'")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ToolError, match=f"cannot reach a Ray cluster at {address}"):
            make_workers(toy(tmp_path), ray_address=address)


# -- who gets which job


def behind(document: int, tokens: int = 10, prefix: int = 100) -> Job:
    return Job(config(), document, ((prefix, prefix + tokens),), config())


def test_jobs_go_to_the_holder_of_their_prefix() -> None:
    held = HeldPrefixes(2)
    jobs = [behind(document) for _ in range(3) for document in (0, 1)]
    queue = JobQueue(jobs, held)
    order: dict[int, list[int]] = {0: [], 1: []}
    while not queue.is_done:
        for worker, index in queue.assign([0, 1]):
            order[worker].append(jobs[index].document)
        for worker in (0, 1):
            queue.finished(worker)
    assert order == {0: [0, 0, 0], 1: [1, 1, 1]}
    # also in the next call
    assert dict(JobQueue([behind(1), behind(0)], held).assign([0, 1])) == {0: 1, 1: 0}


def test_a_prefix_is_computed_twice_only_where_that_is_shorter() -> None:
    few = JobQueue([behind(0) for _ in range(10)], HeldPrefixes(2))
    assert few.assign([0, 1]) == [(0, 0)]
    many = JobQueue([behind(0) for _ in range(15)], HeldPrefixes(2))
    assert many.assign([0, 1]) == [(0, 0), (1, 1)]


def test_a_lost_worker_holds_nothing() -> None:
    queue = JobQueue([behind(0), behind(0)], HeldPrefixes(2))
    assert queue.assign([0]) == [(0, 0)]
    queue.lost(0, "worker 0")
    assert queue.assign([1]) == [(1, 0)]


# -- the choice


def test_make_workers_follows_its_arguments(tmp_path: Path) -> None:
    setup = toy(tmp_path, "")
    assert isinstance(make_workers(setup), LocalWorkers)
    assert isinstance(make_workers(setup, ["cpu"]), LocalWorkers)
    assert isinstance(make_workers(setup, ["cpu", "cpu"]), ProcessWorkers)
    for wrong in ({"devices": []}, {"num_workers": 2}, {"ray_address": "auto", "devices": ["cpu"]}):
        with pytest.raises(LongRopeError):
            make_workers(setup, **wrong)  # type: ignore[arg-type]
