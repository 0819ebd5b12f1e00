"""A search worker of two processes that share every pass: the same numbers as one process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from processes import end, start_until
from test_search_command import arguments, with_tokenizer  # noqa: F401
from test_search_run import (  # the fixtures are used by name
    BY_ALGORITHM,
    TARGET,
    folder,  # noqa: F401
    make_extended,
    start,
    texts,  # noqa: F401
)
from test_search_run import WINDOW as RUN_WINDOW
from test_search_workers import collect, is_running, pids, wait_for
from tiny_models import make_model
from worker_setups import WINDOW, Watched, Zoo, config, jobs_of, toy

from longrope_export.cli import main
from longrope_export.config import FactorTier, LogitScaling, LongRopeConfig, SwitchPolicy
from longrope_export.errors import LongRopeError, ModelError, ToolError, UnsupportedError
from longrope_export.factor_files import read_factors
from longrope_export.models.model import load_model
from longrope_export.search import team
from longrope_export.search.evaluator import Budget
from longrope_export.search.jobs import Document, Job, Score, Workers
from longrope_export.search.options import Outcome, SearchOptions
from longrope_export.search.pool import Setup
from longrope_export.search.recovery import RecoveryRun
from longrope_export.search.run import SearchRun
from longrope_export.search.run_base import Run, Texts
from longrope_export.search.sharded import ShardedScorer
from longrope_export.search.workers import ProcessWorkers, check_sharing, make_workers

PER_TOKEN = 1e-5  # nats by which the sums of the ranks may differ from those of one process
IDS = tuple((index * index + 7 * index + 3) % 300 + 2 for index in range(95))
# none a multiple of 4, the chunks of two ranks: the ranks get 24, 8, 9 and 1 places in a chunk
DOCUMENTS = (
    Document(IDS),
    Document(IDS[:30]),
    Document(IDS[:33], answers=((20, 23), (30, 33))),
    Document(IDS[:3]),
)
# the last has a weight that is no number
FAMILIES = ("llama", "mistral", "gemma2", "gemma3", "llama")


def configs_of(path: Path) -> dict[str, LongRopeConfig]:
    """Definitions for a model, each with something else in it."""
    native = load_model(path).native
    pairs = native.num_pairs
    tier = FactorTier(512, (1.0, *[1.5] * (pairs - 1)), 0, 1.1)
    plain = replace(
        native, tiers=(tier,), max_position_embeddings=512, switch=SwitchPolicy.SEQUENCE
    )
    short = FactorTier(64, (1.0,) * pairs)
    return {
        "plain": plain,
        "other factors": replace(plain, tiers=(replace(tier, rescale_factors=(3.0,) * pairs),)),
        "attention factor": replace(plain, tiers=(replace(tier, attention_factor=1.3),)),
        # the first rank has the first 24 places of the long document, the second the next 48
        "start tokens of one rank": replace(plain, tiers=(replace(tier, num_start_tokens=13),)),
        "start tokens of both": replace(plain, tiers=(replace(tier, num_start_tokens=50),)),
        "log scaling": replace(plain, logit_scaling=LogitScaling(16, (0,))),
        "two tiers": replace(plain, tiers=(short, tier)),
    }


def make_zoo(place: Path) -> Zoo:
    """Models whose attention is sharp enough for the factors to matter."""
    from safetensors.torch import load_file, save_file

    paths = []
    for number, family in enumerate(FAMILIES):
        path = make_model(place / f"{number}", family, dtype="float32")
        weights = load_file(path / "model.safetensors")
        for name in weights:
            if "self_attn" in name:
                weights[name] *= 40 if "norm" in name else 4
        if number == len(FAMILIES) - 1:
            weights["model.norm.weight"][5] = torch.nan
        save_file(weights, path / "model.safetensors", {"format": "pt"})
        paths.append(path)
    documents = (*DOCUMENTS, Document(IDS, name="die once")) * len(FAMILIES)
    return Zoo(paths[0], documents, WINDOW, pids=place / "pids", paths=tuple(paths))


def zoo_jobs(zoo: Zoo) -> list[Job]:
    jobs = []
    for number, path in enumerate(zoo.paths[:-1]):
        first = number * (len(DOCUMENTS) + 1)
        configs = configs_of(path)
        jobs += [Job(c, first + d) for c in configs.values() for d in range(len(DOCUMENTS))]
        causal = replace(configs["two tiers"], switch=SwitchPolicy.CAUSAL)
        jobs += [Job(causal, first + 1), Job(configs["plain"], first, ((40, 56), (80, 94)))]
        if configs["plain"].layers is None:
            for name in ("plain", "start tokens of one rank", "attention factor"):
                jobs.append(Job(configs[name], first, gradient=True))
    return [*jobs, Job(configs_of(zoo.path)["plain"], len(DOCUMENTS))]  # the deadly one


def test_two_ranks_score_as_one_process_though_one_is_killed_in_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "of a name with spaces"))
    (tmp_path / "of a name with spaces").mkdir()
    zoo = make_zoo(tmp_path)
    jobs = zoo_jobs(zoo)
    alone = zoo.load("cpu")
    expected = [alone.score(job) for job in jobs]
    for number in range(len(FAMILIES) - 1):  # no part of a definition could be forgotten unseen
        second = number * len(zoo.documents) // len(FAMILIES) + 1
        means = [s.mean for s, j in zip(expected, jobs, strict=True) if j.document == second]
        plain, *others = means[: len(configs_of(zoo.path))]
        assert min(abs(plain - other) for other in others) > 10 * PER_TOKEN
    before = len(list(zoo.pids.iterdir()))
    with contextlib.closing(ProcessWorkers(zoo, ["cpu", "cpu"], 2)) as workers:
        check_equal(collect(workers, jobs), expected)
        assert (tmp_path / "0" / "seen").exists()
        assert len(list(zoo.pids.iterdir())) == before + 4, "both ranks are replaced"
        with pytest.raises(ModelError, match="the loss is nan"):
            collect(workers, [Job(config(), len(zoo.documents) - 1)])
    assert pids(zoo) == [os.getpid()]
    assert not list((tmp_path / "of a name with spaces").iterdir())


def check_equal(found: Sequence[Score], expected: Sequence[Score]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.counts, one.hits, one.tokens) == (other.counts, other.hits, other.tokens)
        for loss, count, true in zip(one.losses, one.counts, other.losses, strict=True):
            assert abs(loss - true) <= PER_TOKEN * count
        assert one.gradient == pytest.approx(other.gradient, rel=1e-4, abs=1e-6)


def test_what_ranks_cannot_share_is_refused_before_the_pass(tmp_path: Path) -> None:
    scorer = ShardedScorer(make_model(tmp_path, dtype="float32"), [Document(IDS)], WINDOW)
    with pytest.raises(UnsupportedError, match="search a ladder without --sequence-parallel"):
        scorer.score(Job(config(), 0, ((40, 56),), config()))
    tiers = (FactorTier(64, (1.0,) * 8), *config().tiers)
    causal = replace(config(), tiers=tiers, switch=SwitchPolicy.CAUSAL)
    with pytest.raises(UnsupportedError, match="95 tokens under the causal rule belong to 2 tiers"):
        scorer.score(Job(causal, 0))


# -- processes that die or raise, without a model


def test_all_ranks_are_replaced_when_one_dies_and_nothing_is_lost(tmp_path: Path) -> None:
    setup = toy(tmp_path, "", "rank 1: die once", "", "rank 1: die late once")
    with contextlib.closing(ProcessWorkers(setup, ["cpu", "cpu"], 2)) as workers:
        assert [score.mean for score in collect(workers, jobs_of(setup))] == [0, 1, 2, 3]
        assert len(list(setup.pids.iterdir())) == 6
        survivors = pids(setup)
        assert len(survivors) == 2
        os.kill(survivors[0], signal.SIGKILL)  # while there is no job
        collect(workers, jobs_of(setup))
        assert len(pids(setup)) == 2
        assert not set(survivors) & set(pids(setup))
    assert not pids(setup)


def when_all_are_there(setup: Watched, count: int) -> Callable[[int], None]:
    """After the first job waits until so many processes have loaded."""

    def watch(number: int) -> None:
        if number == 1:
            wait_for(lambda: len(pids(setup)) == count, 60)
        assert number < 90, "the answers of the other team have put off an error"

    return watch


def test_several_teams_divide_the_jobs(tmp_path: Path) -> None:
    setup = toy(tmp_path, *["slow"] * 9)
    with contextlib.closing(ProcessWorkers(setup, ["cpu"] * 4, 2)) as workers:
        scores = collect(workers, jobs_of(setup), when_all_are_there(setup, 4))
        assert [score.mean for score in scores] == list(range(9))
    assert not pids(setup)


def test_the_rank_that_always_dies_is_named(tmp_path: Path) -> None:
    setup = toy(tmp_path, "rank 1: die")
    told = r"0 on cpu \+ cpu \(cpu, .* \+ cpu, .*\) died \(signal SIGKILL, rank 1 on cpu\) while .*"
    with pytest.raises(ToolError, match=told + "document 0 .*lost 3 workers"):
        collect(ProcessWorkers(setup, ["cpu", "cpu"], 2), jobs_of(setup))
    assert not pids(setup)


def test_a_rank_that_raises_ends_the_run_though_the_others_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(team, "GRACE_SECONDS", 0.5)
    setup = toy(tmp_path, *["slow"] * 10, "rank 1: raise ours", *["slow"] * 90)
    with pytest.raises(ModelError, match="the loss is nan"):
        collect(ProcessWorkers(setup, ["cpu"] * 4, 2), jobs_of(setup), when_all_are_there(setup, 4))
    assert not pids(setup)


@pytest.mark.parametrize(
    ("dtype", "kind", "told"),
    [
        ("rank 1: broken", ModelError, "no weights here"),
        ("rank 0: deadly", ToolError, r"exit code 7, rank 0 on cpu\) while it loaded the model, 3"),
    ],
)
def test_a_rank_that_cannot_load_is_not_waited_for(
    dtype: str,
    kind: type[LongRopeError],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(team, "GRACE_SECONDS", 0.3)
    setup = toy(tmp_path, "", dtype=dtype)
    with pytest.raises(kind, match=told):
        collect(ProcessWorkers(setup, ["cpu", "cpu"], 2), jobs_of(setup))
    assert not pids(setup)


# -- whole searches


class Kept:
    """Two ranks for every run in turn: processes are slow to start."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.ranks: ProcessWorkers | None = None

    def made(self, documents: Sequence[Document]) -> Workers:
        setup = Setup(self.model, tuple(documents), RUN_WINDOW)
        self.ranks = self.ranks or ProcessWorkers(setup, ["cpu", "cpu"], 2)
        return self

    def run(self, jobs: Sequence[Job], done: Callable[[int, Score], None]) -> None:
        assert self.ranks is not None
        self.ranks.run(jobs, done)

    def close(self) -> None:
        pass


def test_a_practical_search_that_was_cut_ends_as_an_unbroken_one(
    folder: Path,  # noqa: F811
    texts: Texts,  # noqa: F811
    tmp_path: Path,
) -> None:
    options = replace(
        BY_ALGORITHM["practical"],
        switch=SwitchPolicy.SEQUENCE,
        budget=Budget(tokens=150 * TARGET),
    )
    alone = start(folder, texts, options, tmp_path / "alone")
    expected = alone.execute().result
    alone.close()
    kept, place = Kept(folder), tmp_path / "run"

    def execute(**given: bool) -> Outcome:
        run = SearchRun(load_model(folder), texts, options, place, kept.made, **given)
        outcome = run.execute()
        run.close()
        return outcome

    whole = execute()
    log = (place / "log.jsonl").read_bytes()
    assert any(json.loads(line)["gradient"] for line in log.splitlines()), "no gradient was taken"
    for name, loss in expected["seeds"].items():
        assert whole.result["seeds"][name] == pytest.approx(loss, abs=PER_TOKEN)
    for share in (0.3, 0.7):
        (place / "log.jsonl").write_bytes(log[: int(share * len(log))])
        again = execute(resume=True)
        assert again.config.tiers == whole.config.tiers
        for part in ("test", "validation", "chosen", "seeds"):
            assert again.result[part] == whole.result[part]
    assert kept.ranks is not None
    kept.ranks.close()


def unshared_jobs(
    folder: Path,  # noqa: F811
    texts: Texts,  # noqa: F811
    options: SearchOptions,
    place: Path,
    kind: type[Run] = SearchRun,
) -> tuple[int, int]:
    """How many passes of a search are there, and how many of them ranks cannot share."""
    run = start(folder, texts, options, place, kind)
    inner, seen = run.workers.run, list[bool]()

    def watched(jobs: Sequence[Job], done: Callable[[int, Score], None]) -> None:
        for job in jobs:
            causal = job.config.switch is SwitchPolicy.CAUSAL and len(job.config.tiers) > 1
            seen.append(job.prefix is not None or causal)
        inner(jobs, done)

    run.workers.run = watched  # type: ignore[method-assign]
    run.execute()
    run.close()
    return len(seen), sum(seen)


@pytest.mark.parametrize("name", ["longrope", "longrope2", "practical", "recover"])
def test_what_is_not_refused_has_only_passes_that_ranks_share(
    folder: Path,  # noqa: F811
    texts: Texts,  # noqa: F811
    tmp_path: Path,
    name: str,
) -> None:
    kind: type[Run] = SearchRun
    if name == "recover":
        folder, kind = tmp_path / "model", RecoveryRun
        make_extended(folder)
        options = replace(BY_ALGORITHM["practical"], recover=(32, 64))
    else:
        options = replace(BY_ALGORITHM[name], switch=SwitchPolicy.SEQUENCE)
    passes, unshared = unshared_jobs(folder, texts, options, tmp_path / "run", kind)
    assert passes > 20
    assert unshared == 0


@pytest.mark.parametrize(
    "options",
    [
        BY_ALGORITHM["longrope"],
        replace(BY_ALGORITHM["longrope"], switch=SwitchPolicy.CAUSAL),
        replace(BY_ALGORITHM["ladder"], switch=SwitchPolicy.SEQUENCE),
    ],
    ids=["both rules", "causal", "ladder"],
)
def test_what_is_refused_has_passes_that_ranks_cannot_share(
    folder: Path,  # noqa: F811
    texts: Texts,  # noqa: F811
    tmp_path: Path,
    options: SearchOptions,
) -> None:
    assert unshared_jobs(folder, texts, options, tmp_path / "run")[1] > 0


SHARED = ["--switch", "sequence", "--device", "cpu", "--device", "cpu", "--sequence-parallel", "2"]


def test_the_command_killed_leaves_no_rank_and_resumes_to_the_same_result(
    with_tokenizer: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    alone = arguments(with_tokenizer, tmp_path / "alone", "--switch", "sequence", "--device", "cpu")
    result = CliRunner().invoke(main, alone)
    assert result.exit_code == 0, result.stderr
    given = arguments(with_tokenizer, tmp_path / "cut", *SHARED)
    log = tmp_path / "cut" / "log.jsonl"
    process = start_until(
        [sys.executable, "-m", "longrope_export", *given],
        lambda: log.is_file() and log.read_bytes().count(b"\n") >= 3,
    )
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    end(process)
    assert not (tmp_path / "cut" / "factors.json").exists()
    assert len(ranks) >= 2
    wait_for(lambda: not any(is_running(int(pid)) for pid in ranks), 10)
    result = CliRunner().invoke(main, [*given, "--resume"])
    assert result.exit_code == 0, result.stderr
    one, two = (read_factors(tmp_path / n / "factors.json", None) for n in ("alone", "cut"))
    assert one.tiers == two.tiers


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (SHARED[2:], "give --switch sequence"),
        (["--switch", "causal", *SHARED[2:]], "give --switch sequence"),
        (["--ladder", "64,128", *SHARED], "--ladder computes blocks behind cached prefixes"),
        ([*SHARED, "--ray", "local"], "not by --ray"),
        (SHARED[:4] + SHARED[6:], "on 1 devices: expected 2 for each worker"),
        (SHARED[:2] + SHARED[6:], "on 0 devices: expected 2 for each worker"),
        ([*SHARED, "--device", "cpu"], "on 3 devices: expected 2 for each worker"),
    ],
)
def test_searches_that_cannot_be_shared_end_before_they_begin(
    with_tokenizer: Path,  # noqa: F811
    tmp_path: Path,
    more: list[str],
    told: str,
) -> None:
    result = CliRunner().invoke(main, arguments(with_tokenizer, tmp_path / "run", *more))
    assert result.exit_code == 2
    assert told in result.stderr
    assert not (tmp_path / "run").exists()


def test_ranks_need_devices_of_their_own(tmp_path: Path) -> None:
    check_sharing(2, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"])
    check_sharing(1, None, "auto")
    for devices in (["cuda:0", "cuda:0"], ["cuda", "cuda"], ["cpu", "cuda:0"], ["mps", "mps"]):
        with pytest.raises(LongRopeError, match="expected a GPU of its own for each rank"):
            check_sharing(2, devices)
    for wrong in (None, [], ["cpu"]):
        with pytest.raises(LongRopeError, match="expected 2 for each worker"):
            make_workers(toy(tmp_path), wrong, sequence_parallel=2)
    with pytest.raises(LongRopeError, match="expected 1 or more"):
        ProcessWorkers(toy(tmp_path), ["cpu"], 0)
