"""Whole searches on toys: what is chosen, held out, logged, resumed and refused."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import edit_json, make_model

from longrope_export.config import FactorTier, LongRopeConfig, SwitchPolicy
from longrope_export.errors import ConfigError, LongRopeError, OutputError
from longrope_export.factor_files import read_factors
from longrope_export.ladder import make_config
from longrope_export.models.model import load_model
from longrope_export.search.algorithms import Algorithm
from longrope_export.search.evaluator import Budget, Difference
from longrope_export.search.evolution import EvolutionSettings
from longrope_export.search.jobs import Document, Job, Workers
from longrope_export.search.judge import losses_of
from longrope_export.search.options import Event, SearchOptions
from longrope_export.search.practical import PracticalSettings
from longrope_export.search.recovery import RecoveryRun
from longrope_export.search.run import SearchRun
from longrope_export.search.run_base import Run, Texts
from longrope_export.search.scorer import Scorer
from longrope_export.search.workers import LocalWorkers

WINDOW, TARGET = 64, 256
SMALL = EvolutionSettings(
    population=8, mutations=3, crossovers=3, iterations=3, parents=4, documents=2
)
PRACTICAL = PracticalSettings(family_evaluations=10, gradient_steps=4, litter=3, patience=2)
OPTIONS = SearchOptions(TARGET, evolution=SMALL, documents=(2, 2, 2), needle_keys=0)
BY_ALGORITHM = {
    "longrope": OPTIONS,
    "longrope2": replace(OPTIONS, algorithm=Algorithm.LONGROPE2),
    "practical": replace(
        OPTIONS, algorithm=Algorithm.PRACTICAL, attention="search", practical=PRACTICAL
    ),
    "ladder": replace(OPTIONS, ladder="64,128,256", practical=PRACTICAL),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("search") / "model"
    return make_model(path, dtype="float32", max_position_embeddings=WINDOW)


@pytest.fixture(scope="module")
def texts() -> Texts:
    rng = np.random.default_rng(3)
    works = [(f"work {k}", rng.integers(3, 300, 600).tolist()) for k in range(6)]
    return Texts(works, lambda text: [3 + ord(c) % 200 for c in text[::6]])


def start(
    folder: Path,
    texts: Texts,
    options: SearchOptions,
    run: Path,
    kind: type[Run] = SearchRun,
    **given: Any,
) -> Run:
    def workers(documents: Sequence[Document]) -> Workers:
        return LocalWorkers(lambda: Scorer(folder, documents, WINDOW))

    return kind(load_model(folder), texts, options, run, workers, **given)


@pytest.mark.parametrize("name", BY_ALGORITHM)
def test_a_search_writes_factors_that_everything_reads(
    folder: Path, texts: Texts, tmp_path: Path, name: str
) -> None:
    run = start(folder, texts, BY_ALGORITHM[name], tmp_path / "run")
    outcome = run.execute()
    run.close()
    config = read_factors(tmp_path / "run" / "factors.json", load_model(folder))
    assert config == outcome.config
    assert config.max_position_embeddings == TARGET
    assert config.tiers[0].max_length == WINDOW
    assert config.tiers[0].is_plain
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    rows = {row["name"]: row for row in result["test"]}
    assert {"yarn", "result"} <= set(rows)
    assert result["baseline"] in rows
    chosen = next(row for row in result["validation"] if row["name"] == result["chosen"])
    # nothing that was looked at on the validation documents is better than what was chosen
    assert chosen["loss"] == min(row["loss"] for row in result["validation"])
    names = [set(result["documents"][part]) for part in ("search", "validation", "test")]
    assert not (names[0] & names[1] or names[0] & names[2] or names[1] & names[2])
    assert config.provenance["search"]["chosen"] == result["chosen"]
    losses = {rule["switch"]: sum(rule["losses"]) for rule in result["rules"]}
    assert set(losses) == {"causal", "sequence"}


@pytest.mark.parametrize("name", BY_ALGORITHM)
def test_a_run_that_was_cut_anywhere_ends_as_an_unbroken_one(
    folder: Path, texts: Texts, tmp_path: Path, name: str
) -> None:
    options = replace(BY_ALGORITHM[name], budget=Budget(tokens=40 * TARGET))
    place = tmp_path / "run"
    run = start(folder, texts, options, place)
    whole = run.execute()
    run.close()
    log = (place / "log.jsonl").read_bytes()
    for share in (0.0, 0.3, 0.7, 0.95):  # most of them cut a line in two
        (place / "log.jsonl").write_bytes(log[: int(share * len(log))])
        (place / "factors.json").unlink()
        run = start(folder, texts, options, place, resume=True)
        again = run.execute()
        run.close()
        assert again.config.tiers == whole.config.tiers
        assert again.config.switch == whole.config.switch
        for part in ("test", "validation", "chosen", "seeds"):
            assert again.result[part] == whole.result[part]
        for one, other in zip(again.result["history"], whole.result["history"], strict=True):
            assert {**one, "seconds": 0} == {**other, "seconds": 0}
        assert again.result["spent"]["tokens"] == whole.result["spent"]["tokens"]


def test_the_same_seed_gives_the_same_factors(folder: Path, texts: Texts, tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        run = start(folder, texts, OPTIONS, tmp_path / name)
        found.append(run.execute().config.tiers)
        run.close()
    assert found[0] == found[1]


def test_a_budget_ends_the_search_and_not_the_report(
    folder: Path, texts: Texts, tmp_path: Path
) -> None:
    options = replace(BY_ALGORITHM["practical"], budget=Budget(tokens=12 * TARGET))
    run = start(folder, texts, options, tmp_path / "run")
    result = run.execute().result
    run.close()
    # the batch under way is finished: here the seeds, on both documents
    assert 12 * TARGET <= result["spent"]["tokens"] <= 26 * TARGET
    assert result["test"]
    assert result["notes"] == ["the budget ended the search"]


def test_a_budget_that_ends_among_gradients_leaves_room_to_race_what_they_found(
    folder: Path, texts: Texts, tmp_path: Path
) -> None:
    stages = PracticalSettings(family_evaluations=0, gradient_steps=24, litter=3, patience=2)
    options = replace(BY_ALGORITHM["practical"], practical=stages, budget=Budget(64 * TARGET))
    run = start(folder, texts, options, tmp_path / "run")
    sent = count_jobs(run)
    run.execute()
    run.close()
    searched = sent[: run.searching.evaluations]
    gradients = [number for number, job in enumerate(searched) if job.gradient]
    assert 2 <= len(gradients) < 48
    raced = [job for job in searched[gradients[-1] + 1 :] if not job.gradient]
    assert len(raced) >= 2
    assert run.searching.tokens <= 90 * TARGET  # the batch under way is finished


@pytest.mark.parametrize("switch", list(SwitchPolicy))
def test_the_choice_is_made_under_the_rule_that_is_written(
    folder: Path, texts: Texts, tmp_path: Path, switch: SwitchPolicy
) -> None:
    options = replace(BY_ALGORITHM["ladder"], switch=switch, budget=Budget(tokens=4 * TARGET))
    run = start(folder, texts, options, tmp_path / "run")
    outcome = run.execute()
    (loss,) = losses_of(run.judging, [outcome.config], run.indices("validation")).mean(axis=1)
    run.close()
    rows = {row["name"]: row["loss"] for row in outcome.result["validation"]}
    assert rows[outcome.result["chosen"]] == loss == min(rows.values())
    names = [row["name"] for row in outcome.result["test"]]
    alone = "ladder" not in outcome.result["baseline"]
    assert (f"{outcome.result['baseline']}, causal" in names) == (alone and switch == "causal")


@pytest.mark.parametrize("passes", [1, 7, 20])
def test_the_papers_search_looks_at_its_budget_between_individuals(
    folder: Path, texts: Texts, tmp_path: Path, passes: int
) -> None:
    sizes = replace(SMALL, population=32)
    options = replace(OPTIONS, evolution=sizes, budget=Budget(tokens=passes * TARGET))
    run = start(folder, texts, options, tmp_path / "run")
    outcome = run.execute()
    run.close()
    # the three seeds and every four individuals are scored together, on two documents
    assert outcome.result["spent"]["tokens"] <= (passes + 8) * TARGET
    assert outcome.result["history"]
    found = [row for row in outcome.result["validation"] if row["name"].startswith("searched")]
    assert found


def test_practical_candidates_keep_to_the_space(folder: Path, texts: Texts, tmp_path: Path) -> None:
    options = replace(BY_ALGORITHM["practical"], attention="1.2", budget=Budget())
    run = start(folder, texts, options, tmp_path / "run")
    seen: list[FactorTier] = []
    inner = run.workers.run
    run.workers.run = lambda jobs, done: (  # type: ignore[method-assign]
        seen.extend(job.config.tiers[-1] for job in jobs if job.gradient or not job.blocks),
        inner(jobs, done),
    )[1]
    run.searching.budget = Budget(tokens=60 * TARGET)
    run.execute()
    run.close()
    assert len(seen) > 20
    closed = {tier for tier in seen if tier.attention_factor != 1.2}
    assert len(closed) <= 5  # the closed forms of the table, and the model's own tiers
    for tier in set(seen) - closed:
        assert max(tier.rescale_factors) <= 1.25 * TARGET / WINDOW + 1e-6


def test_a_model_with_layers_apart_is_searched_without_gradients_and_says_so(
    texts: Texts, tmp_path: Path
) -> None:
    folder = make_model(
        tmp_path / "model", "gemma3", dtype="float32", max_position_embeddings=WINDOW
    )
    run = start(folder, texts, BY_ALGORITHM["practical"], tmp_path / "run")
    result = run.execute().result
    run.close()
    assert result["notes"] == [
        "no gradient stage: the model scales its logits, or ropes layers apart"
    ]


def test_needles_choose_what_longrope2_found(folder: Path, texts: Texts, tmp_path: Path) -> None:
    run = start(folder, texts, BY_ALGORITHM["longrope2"], tmp_path / "run")
    result = run.execute().result
    run.close()
    assert len(result["test_needles"]) == len(result["test"])
    chosen = next(row for row in result["validation"] if row["name"] == result["chosen"])
    assert chosen["loss"] == min(row["loss"] for row in result["validation"])


def test_a_second_search_in_the_same_folder_is_refused(
    folder: Path, texts: Texts, tmp_path: Path
) -> None:
    run = start(folder, texts, OPTIONS, tmp_path / "run")
    with pytest.raises(OutputError, match="another process is at work"):
        start(folder, texts, OPTIONS, tmp_path / "run", resume=True)
    run.close()
    start(folder, texts, OPTIONS, tmp_path / "run", resume=True).close()


def test_a_run_inside_the_model_is_refused(folder: Path, texts: Texts) -> None:
    with pytest.raises(OutputError, match="lies in the model"):
        start(folder, texts, OPTIONS, folder / "run")
    assert not (folder / "run").exists()


def test_a_line_without_its_end_is_torn_even_if_it_reads_well(
    folder: Path, texts: Texts, tmp_path: Path
) -> None:
    run = start(folder, texts, OPTIONS, tmp_path / "run")
    whole = run.execute()
    run.close()
    log = tmp_path / "run" / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-1])
    for _ in range(2):
        run = start(folder, texts, OPTIONS, tmp_path / "run", resume=True)
        assert run.execute().result["test"] == whole.result["test"]
        run.close()


def test_a_rule_that_is_given_is_written_and_not_measured(
    folder: Path, texts: Texts, tmp_path: Path
) -> None:
    options = replace(OPTIONS, switch=SwitchPolicy.SEQUENCE)
    run = start(folder, texts, options, tmp_path / "run")
    outcome = run.execute()
    run.close()
    assert outcome.config.switch is SwitchPolicy.SEQUENCE
    assert outcome.result["rules"] == []


def test_a_warm_start_is_one_of_the_seeds(folder: Path, texts: Texts, tmp_path: Path) -> None:
    warm = make_config(load_model(folder), "longrope2", 512)
    run = start(folder, texts, replace(OPTIONS, warm_start=warm), tmp_path / "run")
    seeds = run.execute().result["seeds"]
    run.close()
    assert {name.split(",")[0] for name in seeds} == {"warm start", "pi", "ntk", "yarn"}
    # one that leaves the bounds
    far = replace(warm, tiers=(replace(warm.tiers[-1], rescale_factors=(50.0,) * 8),))
    run = start(folder, texts, replace(OPTIONS, warm_start=far), tmp_path / "far")
    seeds = run.execute().result["seeds"]
    run.close()
    assert "warm start, brought into the bounds" in {
        name.rsplit(", attention")[0] for name in seeds
    }
    # one that is a seed already
    same = make_config(load_model(folder), "yarn", TARGET)
    options = replace(OPTIONS, warm_start=same, attention=str(same.tiers[0].attention_factor))
    run = start(folder, texts, options, tmp_path / "same")
    assert run.execute().result["test"]
    run.close()


def make_extended(folder: Path) -> FactorTier:
    """A model that was extended from WINDOW to TARGET; its long tier."""
    make_model(folder, dtype="float32", max_position_embeddings=WINDOW)
    long = make_config(load_model(folder), "yarn", TARGET, switch=SwitchPolicy.SEQUENCE)
    tier = long.tiers[0]
    edit_json(
        folder / "config.json",
        max_position_embeddings=TARGET,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + pair / 10 for pair in range(len(tier.rescale_factors))],
            "long_factor": list(tier.rescale_factors),
            "attention_factor": tier.attention_factor,
            "original_max_position_embeddings": WINDOW,
        },
    )
    return tier


def test_short_tiers_of_an_extended_model_are_recovered(texts: Texts, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tier = make_extended(folder)
    options = replace(OPTIONS, recover=(32, 64))
    run = start(folder, texts, options, tmp_path / "run", RecoveryRun)
    outcome = run.execute()
    run.close()
    assert [t.max_length for t in outcome.config.tiers] == [32, 64, TARGET]
    assert outcome.config.tiers[-1].rescale_factors == pytest.approx(tier.rescale_factors)
    for recovered, result in zip(outcome.config.tiers, outcome.result["recovered"], strict=False):
        assert (
            np.asarray(recovered.rescale_factors) <= np.asarray(tier.rescale_factors) + 1e-6
        ).all()
        assert {"long factors", "plain RoPE"} <= {row["name"] for row in result["test"]}
    kinds = ("long factors", "plain RoPE", "the model's own short factors", "result")
    rows = [row["name"] for row in outcome.result["test"]]
    assert rows == [f"{length}: {kind}" for length in (32, 64) for kind in kinds]
    assert outcome.result["chosen"].startswith("32: ")
    history = outcome.result["history"]  # its plot shows the first length, beside these seeds
    first = [entry["loss"] for entry in history if entry["phase"] == "recovering 32 tokens"]
    assert min(outcome.result["seeds"].values()) in first
    with pytest.raises(ConfigError, match="expected --target-length 256"):
        start(folder, texts, replace(options, target_length=512), tmp_path / "b", RecoveryRun)


def test_each_length_that_is_recovered_has_its_share_of_the_budget(
    texts: Texts, tmp_path: Path
) -> None:
    folder, place = tmp_path / "model", tmp_path / "run"
    make_extended(folder)
    options = replace(OPTIONS, recover=(32, 64), budget=Budget(tokens=3000))
    run = start(folder, texts, options, place, RecoveryRun)
    whole = run.execute().result
    run.close()
    phases = {entry["phase"] for entry in whole["history"]}
    assert phases == {"recovering 32 tokens", "recovering 64 tokens"}
    assert whole["notes"] == [
        f"{length}: its share of the budget ended the search" for length in (32, 64)
    ]
    assert whole["spent"]["tokens"] < 4000
    log = (place / "log.jsonl").read_bytes()
    for share in (0.2, 0.6):
        (place / "log.jsonl").write_bytes(log[: int(share * len(log))])
        run = start(folder, texts, options, place, RecoveryRun, resume=True)
        again = run.execute().result
        run.close()
        for part in ("test", "chosen", "recovered", "notes"):
            assert again[part] == whole[part]


# -- refusals


def test_another_model_other_texts_or_options_on_resume_are_refused(
    texts: Texts, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "model", dtype="float32", max_position_embeddings=WINDOW)
    place = tmp_path / "run"
    start(folder, texts, OPTIONS, place).close()
    with pytest.raises(OutputError, match="holds a run already: --resume"):
        start(folder, texts, OPTIONS, place)
    with pytest.raises(ConfigError, match="begun with seed = 0, now it is 1"):
        start(folder, texts, replace(OPTIONS, seed=1), place, resume=True)
    works = [(name, [*ids[1:], 5]) for name, ids in texts.works]
    with pytest.raises(ConfigError, match="begun with documents_sha256"):
        start(folder, replace(texts, works=works), OPTIONS, place, resume=True)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # one bit of one weight; size and settings stay
    weights.write_bytes(data)
    with pytest.raises(ConfigError, match="begun with model_sha256"):
        start(folder, texts, OPTIONS, place, resume=True)


def test_nothing_to_resume_and_foreign_folders_are_refused(
    folder: Path, texts: Texts, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match="no run to resume"):
        start(folder, texts, OPTIONS, tmp_path / "none", resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(OutputError, match="is not empty"):
        start(folder, texts, OPTIONS, tmp_path / "mine")


def test_a_damaged_log_is_refused(folder: Path, texts: Texts, tmp_path: Path) -> None:
    start(folder, texts, OPTIONS, tmp_path / "run").close()
    (tmp_path / "run" / "log.jsonl").write_text('{"key": "a"}\n{"key": "b"}\n')
    with pytest.raises(ConfigError, match=r"log\.jsonl, byte 0: not a line of a search log"):
        start(folder, texts, OPTIONS, tmp_path / "run", resume=True)


def test_a_full_disk_loses_nothing(
    folder: Path, texts: Texts, small_disk: Path, tmp_path: Path
) -> None:
    unbroken = start(folder, texts, OPTIONS, tmp_path / "run")
    whole = unbroken.execute().result
    unbroken.close()
    ballast = small_disk / "ballast"
    place = small_disk / "run"

    def fill(event: Event) -> None:
        if event.progress is not None and event.progress.evaluations == 20:
            with ballast.open("ab") as file, pytest.raises(OSError, match="No space left"):
                while True:
                    os.write(file.fileno(), b"x" * 4096)

    run = start(folder, texts, OPTIONS, place, observe=fill)
    with pytest.raises(OutputError, match=r"go on with --resume|cannot write"):
        run.execute()
    run.close()
    kept = (place / "log.jsonl").read_bytes().count(b"\n")
    assert kept >= 20
    ballast.unlink()
    again = start(folder, texts, OPTIONS, place, resume=True)
    sent = count_jobs(again)
    assert again.execute().result["test"] == whole["test"]
    again.close()
    total = (tmp_path / "run" / "log.jsonl").read_bytes().count(b"\n")
    assert len(sent) == total - kept


def count_jobs(run: Run) -> list[Job]:
    """Grows by every job that its workers get."""
    sent: list[Job] = []
    inner = run.workers.run
    run.workers.run = lambda jobs, done: (sent.extend(jobs), inner(jobs, done))[1]  # type: ignore[method-assign]
    return sent


def test_targets_that_are_no_extension_and_short_texts_are_refused(
    folder: Path, texts: Texts, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="the model's own window is 64 already"):
        start(folder, texts, replace(OPTIONS, target_length=64), tmp_path / "a")
    with pytest.raises(ConfigError, match="longest of 6 works has 600 tokens"):
        start(folder, texts, replace(OPTIONS, target_length=1024), tmp_path / "b")
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def test_options_that_would_be_ignored_are_refused() -> None:
    warm = replace(
        make_space_config(), tiers=(FactorTier(TARGET, (1.0,) * 8),), max_position_embeddings=TARGET
    )
    with pytest.raises(ConfigError, match="warm start"):
        replace(OPTIONS, algorithm=Algorithm.LONGROPE2, warm_start=warm)
    with pytest.raises(ConfigError, match="at least one"):
        replace(OPTIONS, documents=(1, 0, 1))
    with pytest.raises(LongRopeError, match="--attention-factor 'much'"):
        replace(OPTIONS, attention="much")


def make_space_config() -> LongRopeConfig:
    return LongRopeConfig(10000.0, 16, WINDOW, WINDOW, (FactorTier(WINDOW, (1.0,) * 8),))


def test_paired_differences_have_the_standard_error_of_their_mean() -> None:
    first, second = np.asarray([1.0, 2.0, 4.0]), np.asarray([1.5, 2.7, 4.3])
    difference = Difference.of(first, second)
    assert difference.mean == pytest.approx(-0.5)
    assert difference.error == pytest.approx(0.2 / np.sqrt(3))
    assert difference.errors == pytest.approx(-0.5 / (0.2 / np.sqrt(3)))
    assert Difference.of(first[:1], second[:1]).error == np.inf
