"""A search worker of two processes that share every pass: the same numbers as one process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_search_run import arguments, with_tokenizer  # noqa: F401
from test_search_workers import collect
from tiny_models import make_model
from worker_setups import WINDOW, config

from longrope_export.cli import main
from longrope_export.config import FactorTier, SwitchPolicy
from longrope_export.errors import LongRopeError, UnsupportedError
from longrope_export.search.jobs import Document, Job, Score
from longrope_export.search.pool import Setup
from longrope_export.search.workers import ProcessWorkers, make_workers

IDS = tuple((index * index + 7 * index + 3) % 300 + 2 for index in range(95))  # no multiple of 4
SHORT = FactorTier(64, (1.0,) * 8)
TWO_TIERS = replace(config(3.0), tiers=(SHORT, *config(3.0).tiers))
CAUSAL = replace(TWO_TIERS, switch=SwitchPolicy.CAUSAL)


def setup_of(folder: Path, family: str) -> Setup:
    make_model(folder, family, dtype="float32")
    documents = (Document(IDS), Document(IDS[:30]), Document(IDS, answers=((20, 23), (90, 95))))
    return Setup(folder, documents, WINDOW)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_two_ranks_score_as_one_process_though_one_is_killed(family: str, tmp_path: Path) -> None:
    setup = setup_of(tmp_path, family)
    jobs = [Job(c, d) for c in (config(1.5), TWO_TIERS) for d in range(3)] + [Job(CAUSAL, 1)]
    scorer = setup.load("cpu")
    expected = [scorer.score(job) for job in jobs]
    assert expected[0].losses != pytest.approx(expected[3].losses, rel=1e-4)

    def kill_one(count: int) -> None:
        if count == 1:
            process, _ = workers._processes[0, 1]
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)

    with contextlib.closing(ProcessWorkers(setup, ["cpu", "cpu"], 2)) as workers:
        found: list[Score] = collect(workers, jobs, kill_one)
    assert not workers._processes
    for one, other in zip(found, expected, strict=True):
        assert (one.counts, one.hits, one.tokens) == (other.counts, other.hits, other.tokens)
        assert one.losses == pytest.approx(other.losses, rel=1e-5)


def test_what_ranks_cannot_share_is_refused(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, "llama")
    with contextlib.closing(ProcessWorkers(setup, ["cpu", "cpu"], 2)) as workers:
        for job, told in (
            (Job(config(), 0, gradient=True), "has a gradient: ranks share whole passes only"),
            (Job(config(), 0, ((40, 56),), config()), "has blocks"),
            (Job(CAUSAL, 0), "95 tokens under the causal rule belong to 2 tiers"),
        ):
            with pytest.raises(UnsupportedError, match=told):
                collect(workers, [job])
            assert not workers._processes
    with pytest.raises(LongRopeError, match="expected 2 devices for each worker"):
        ProcessWorkers(setup, ["cpu"] * 3, 2)
    with pytest.raises(LongRopeError, match="and no Ray"):
        make_workers(setup, sequence_parallel=2)


def test_the_command_finds_the_same_factors(with_tokenizer: Path, tmp_path: Path) -> None:  # noqa: F811
    more = ["--switch", "sequence", "--device", "cpu"]
    shared = ["--device", "cpu", "--sequence-parallel", "2"]
    for name, given in (("one", more), ("two", [*more, *shared])):
        result = CliRunner().invoke(main, arguments(with_tokenizer, tmp_path / name, *given))
        assert result.exit_code == 0, result.stderr
    one, two = (json.loads((tmp_path / n / "factors.json").read_text()) for n in ("one", "two"))
    assert one["tiers"] == two["tiers"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--algorithm", "longrope"], "give --switch"),
        (["--ladder", "64,128"], "--ladder has blocks behind prefixes"),
    ],
)
def test_searches_that_cannot_be_shared_end_before_they_begin(
    with_tokenizer: Path,  # noqa: F811
    tmp_path: Path,
    more: list[str],
    told: str,
) -> None:
    shared = ["--device", "cpu", "--device", "cpu", "--sequence-parallel", "2"]
    given = arguments(with_tokenizer, tmp_path / "run", *more, *shared)
    result = CliRunner().invoke(main, given)
    assert result.exit_code == 2
    assert told in result.stderr
    assert not (tmp_path / "run").exists()
