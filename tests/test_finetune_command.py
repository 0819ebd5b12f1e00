"""What the command `finetune` promises: alone, on two processes, killed, and wrongly used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from processes import end, start_until
from tiny_models import SENTENCES
from tuning import make_source, make_two_tiers

from longrope_export.cli import main
from longrope_export.config import LongRopeConfig
from longrope_export.factor_files import read_factors, write_factors
from longrope_export.finetune.metrics import read_metrics
from longrope_export.models.model import load_model
from longrope_export.models.torch_model import load_torch_model
from longrope_export.search.needles import MAX_KEYS


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("tuning") / "model")


@pytest.fixture(scope="module")
def config(model_path: Path) -> LongRopeConfig:
    return make_two_tiers(model_path)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(3):
        (folder / f"{number}.txt").write_text(" ".join(SENTENCES[number:] * 30))
    return folder


@pytest.fixture(scope="module")
def factors(config: LongRopeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("factors") / "f.json"
    write_factors(config, path)
    return path


def arguments(model: Path, factors: Path, texts: Path, output: Path, *more: str) -> list[str]:
    given = ["finetune", str(model), "--factors", str(factors), "-o", str(output)]
    given += ["--recipe", "small", "--text", str(texts), "--steps", "6", "--batch-size", "2"]
    return [*given, "--save-steps", "2", *more]


def run_command(args: Sequence[str], code: int = 0) -> Any:
    result = CliRunner().invoke(main, list(args))
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize(
    "more",
    [
        pytest.param((), id="FSDP2"),
        pytest.param(("--sequence-parallel", "2"), id="shared rows"),
        pytest.param(("--sequence-parallel", "2", "--layout", "documents"), id="shared, packed"),
        pytest.param(("--lora", "2", "--gradient-checkpointing"), id="adapters"),
    ],
)
def test_two_processes_train_as_one(
    model_path: Path, factors: Path, texts: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    same = [word for word in more if word not in ("--sequence-parallel", "2") or "--lora" in more]
    run_command(arguments(model_path, factors, texts, tmp_path / "one", *same))
    given = arguments(model_path, factors, texts, tmp_path / "two", *more, "--device", "cpu")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    result = subprocess.run(
        [sys.executable, *launcher, "longrope_export", *given],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert [s.loss for s in two] == pytest.approx([s.loss for s in one], abs=1e-4)
    assert [(s.targets, s.tokens) for s in two] == [(s.targets, s.tokens) for s in one]
    assert [s.gradient_norm for s in two] == pytest.approx([s.gradient_norm for s in one], rel=1e-2)
    first, second = (load_torch_model(tmp_path / name / "model")[0] for name in ("one", "two"))
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-4), name


def test_the_command_tunes_measures_and_writes_a_model_that_carries_its_factors(
    model_path: Path, factors: Path, texts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    more = ("--validation-text", str(texts / "1.txt"), "--needle-keys", "0", "--json")
    printed = run_command(arguments(model_path, factors, texts, output, *more))
    result = json.loads(printed.stdout)
    for when in ("before", "after"):
        assert set(result[when]) == {"causal", "sequence"}
    # it has learned these texts
    assert result["after"]["sequence"]["perplexity"] < result["before"]["sequence"]["perplexity"]
    written, carried = read_factors(output / "factors.json"), load_model(output / "model").native
    asked = read_factors(factors)
    assert written.tiers == asked.tiers == carried.tiers
    best = min(result["after"], key=lambda rule: np.mean(result["after"][rule]["losses"]))
    assert written.switch == carried.switch == result["switch"]
    assert best == result["switch"] or len(result["validation"]) > 1
    assert written.provenance["finetune"]["steps"] == 6
    assert (output / "loss.png").stat().st_size > 1000
    assert not (output / "checkpoints").exists()
    assert load_model(output / "model").is_extended
    assert "next: longrope-export gguf" in printed.stderr
    assert "warning: not held out, since --text has them too: 1\n" in printed.stderr
    again = run_command(arguments(model_path, factors, texts, output, *more, "--resume"))
    assert json.loads(again.stdout) == result
    page = tmp_path / "page.html"
    run_command(["report", str(output), "-o", str(page)])
    text = page.read_text()
    assert "Fine-tuning" in text
    assert "causal, after" in text


def test_rows_that_ask_for_numbers_teach_their_answers_alone(
    model_path: Path, config: LongRopeConfig, texts: Path, tmp_path: Path
) -> None:
    far = replace(config.tiers[-1], max_length=1024)
    longer = replace(config, max_position_embeddings=1024, tiers=(*config.tiers[:-1], far))
    write_factors(longer, tmp_path / "f.json")
    more = ["--recipe", "pose-lora-retrieval", "--tokens", "400", "--retrieval-keys", "1"]
    more += ["--retrieval-share", "1", "--steps", "2"]
    run_command(arguments(model_path, tmp_path / "f.json", texts, tmp_path / "run", *more))
    steps = read_metrics(tmp_path / "run")
    assert len(steps) == 2
    for step in steps:
        assert step.tokens == 800 and 0 < step.targets < 40  # two times ` 1234567.`


def test_the_command_killed_at_any_moment_goes_on_to_the_same_losses(
    model_path: Path, factors: Path, texts: Path, tmp_path: Path
) -> None:
    run_command(arguments(model_path, factors, texts, tmp_path / "whole"))
    cut = arguments(model_path, factors, texts, tmp_path / "cut")
    program = [sys.executable, "-m", "longrope_export", *cut]
    end(start_until(program, lambda: len(read_metrics(tmp_path / "cut")) >= 3))
    assert not (tmp_path / "cut" / "factors.json").exists()
    run_command([*cut, "--resume"])
    one, two = (read_metrics(tmp_path / name) for name in ("whole", "cut"))
    assert [s.loss for s in one] == [s.loss for s in two]
    weights = [
        (tmp_path / n / "model" / "model.safetensors").read_bytes() for n in ("whole", "cut")
    ]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--window", "200"], "its rows have 200 positions, the factors reach 96"),
        (["--batch-size", "3", "--rows-per-pass", "2"], "cannot be divided evenly"),
        (["--recipe", "smal"], "no such file, and none of"),
        (["--validation-text", "missing.txt"], "no such file"),
        (["--layout", "mixed", "--rule", "frozen", "--short-share", "2"], "short_share"),
        (["--layout", "pose", "--rule", "sequence"], "give --rule causal"),
        (["--short-share", "0.5"], "--short-share belongs to --layout mixed"),
        (["--tokens", "16"], "--tokens belongs to --layout pose"),
        (["--retrieval-share", "1"], "--retrieval-share belongs to --layout pose or long"),
        (["--retrieval-keys", "2"], "--retrieval-keys belongs to --retrieval-share"),
        (["--backend", "gather"], "--backend belongs to --sequence-parallel"),
        (["--needle-keys", "0"], "--needle-keys belongs to --validation-text"),
        (["--validation-text", "a.txt", "--validation-documents", "0", "--needle-keys", "3"],
         "--needle-keys belongs to --validation-documents above 0"),
        (["--validation-text", "a.txt", "--validation-documents", "0", "--validation-length", "9"],
         "--validation-length belongs to --validation-documents above 0"),
        (["--needle-keys", "65"], f"65 is not in the range 0<=x<={MAX_KEYS}"),
        (["--seed", "99999999999"], "not in the range 0<=x<=4294967295"),
        (["--learning-rate", "-1"], "learning_rate is -1"),
        (["--resume"], "no run to resume"),
        (["--sequence-parallel", "2"], "a divisor of the 1 process(es)"),
        (["--sequence-parallel", "2", "--rule", "causal"], "use --rule frozen"),
    ],
)  # fmt: skip
def test_wrong_use_says_what_to_do(
    model_path: Path, factors: Path, texts: Path, tmp_path: Path, more: list[str], said: str
) -> None:
    result = run_command(arguments(model_path, factors, texts, tmp_path / "run", *more), 2)
    assert said in result.output, result.output
    assert not (tmp_path / "run" / "model").exists()


def test_changed_settings_and_a_missing_package_are_named(
    model_path: Path, factors: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(model_path, factors, texts, tmp_path / "run")
    run_command(given)
    assert "holds a run already" in run_command(given, 2).output
    changed = run_command([*given, "--learning-rate", "0.5", "--resume"], 2).output
    assert "learning_rate = 0.0003, now it is 0.5" in changed
    monkeypatch.setitem(sys.modules, "peft", None)
    lora = [*arguments(model_path, factors, texts, tmp_path / "other"), "--lora", "2"]
    assert "pip install 'longrope-export[finetune]'" in run_command(lora, 2).output


def test_memory_that_is_too_small_is_told_before_anything_is_read(
    model_path: Path, factors: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longrope_export.finetune.hardware.free_bytes", lambda *given: 1_000_000)
    given = arguments(model_path, factors, texts, tmp_path / "run")
    said = run_command(given, 2).output
    assert "recipe small needs about 0.1 GB of memory" in said
    assert "--no-memory-check" in said
    assert not (tmp_path / "run").exists()
    run_command([*given, "--steps", "1", "--no-memory-check"])


def test_a_full_disk_is_one_clear_error_and_the_run_goes_on_where_there_is_room(
    model_path: Path, factors: Path, texts: Path, small_disk: Path, tmp_path: Path
) -> None:
    run = small_disk / "run"
    (small_disk / "filler").write_bytes(bytes(500_000))
    told = run_command(arguments(model_path, factors, texts, run), code=2).output
    last = told.strip().splitlines()[-1]
    assert f"Error: {run / 'checkpoints'}: the checkpoint of step 2 cannot be written" in last
    assert "--resume" in last
    shutil.copytree(run, tmp_path / "run")
    run_command(arguments(model_path, factors, texts, tmp_path / "run", "--resume"))
    steps = read_metrics(tmp_path / "run")
    assert [step.step for step in steps] == list(range(1, 7))


def test_a_folder_inside_the_model_is_refused(model_path: Path, factors: Path, texts: Path) -> None:
    said = run_command(arguments(model_path, factors, texts, model_path / "tuned"), 2).output
    assert "lies in the model" in said
    assert not (model_path / "tuned").exists()


def test_a_gguf_is_unpacked_in_the_run_and_another_one_is_refused(
    model_path: Path, factors: Path, texts: Path, tmp_path: Path
) -> None:
    for name, outtype in (("a", "f32"), ("b", "f16")):
        file = str(tmp_path / f"{name}.gguf")
        run_command(["gguf", str(model_path), "-o", file, "--outtype", outtype, "--pre", "gpt-2"])
    given = arguments(tmp_path / "a.gguf", factors, texts, tmp_path / "run", "--steps", "2")
    run_command(given)
    plain = arguments(model_path, factors, texts, tmp_path / "plain", "--steps", "2")
    run_command(plain)
    one, two = (read_metrics(tmp_path / name) for name in ("run", "plain"))
    assert [s.loss for s in one] == pytest.approx([s.loss for s in two], abs=1e-5)
    assert not (tmp_path / "run" / "source").exists()
    other = [given[0], str(tmp_path / "b.gguf"), *given[2:], "--resume"]
    assert "model_sha256" in run_command(other, 2).output
    again = [given[0], str(tmp_path / "b.gguf"), *given[2:]]
    assert "holds a run already" in run_command(again, 2).output
    assert load_model(tmp_path / "run" / "model").is_extended
