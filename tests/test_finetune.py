"""Fine-tuning against a training loop in plain torch, and what a run promises."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny_models import SENTENCES, add_bpe_tokenizer, make_model
from torch import Tensor
from torch.nn.functional import cross_entropy

from longrope_export.cli import main
from longrope_export.config import FactorTier, LongRopeConfig, SwitchPolicy
from longrope_export.errors import ConfigError, ModelError, OutputError, UnsupportedError
from longrope_export.factor_files import read_factors, write_factors
from longrope_export.finetune import recipes
from longrope_export.finetune.metrics import Step, read_metrics
from longrope_export.finetune.model import TrainingModel
from longrope_export.finetune.recipes import Recipe, Rule, load_recipe, recipe_names
from longrope_export.finetune.rows import Layout, Row, RowSettings, TrainingRows
from longrope_export.finetune.samples import Sample
from longrope_export.finetune.training import Machine, passes_per_step, train
from longrope_export.models import token_losses
from longrope_export.models.model import load_model
from longrope_export.models.torch_model import load_torch_model
from longrope_export.verify.reference import reference_logits

WINDOW, TARGET, VOCAB = 32, 96, 320
TINY = Recipe(
    "tiny",
    "this test",
    "nothing",
    steps=4,
    batch_size=2,
    learning_rate=1e-3,
    schedule=recipes.Schedule.LINEAR,
    warmup_steps=1,
    weight_decay=0.1,
    max_grad_norm=0.7,
    gradient_checkpointing=False,
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tuning") / "model"
    make_model(path, dtype="float32", max_position_embeddings=WINDOW)
    add_bpe_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def config(model_path: Path) -> LongRopeConfig:
    native = load_model(model_path).native
    pairs = np.arange(native.num_pairs)
    far = FactorTier(TARGET, tuple(1.0 + 0.4 * pairs), num_start_tokens=3, attention_factor=1.2)
    return replace(
        native,
        max_position_embeddings=TARGET,
        tiers=(*native.tiers, far),
        switch=SwitchPolicy.SEQUENCE,
    )


@pytest.fixture(scope="module")
def rows() -> TrainingRows:
    samples = [  # something that can be learned: steps of 7 through a few tokens
        Sample(f"work {k}", (3 + 7 * np.arange(n) % 40).astype(np.int32), np.ones(n, dtype=bool))
        for k, n in enumerate((700, 50, 260, 20, 400))
    ]
    return TrainingRows(samples, RowSettings(TARGET, Layout.PACKED), seed=5)


def run_training(
    path: Path,
    config: LongRopeConfig,
    rows: TrainingRows,
    recipe: Recipe,
    folder: Path,
    machine: Machine | None = None,
) -> tuple[TrainingModel, list[Step]]:
    folder.mkdir(exist_ok=True)
    model = TrainingModel(path, config, recipe, seed=0)
    trained = train(
        model.model,
        rows,
        recipe,
        folder,
        machine or Machine(),
        steps=recipe.steps or 1,
        seed=0,
        pad_id=0,
    )
    return model, trained.steps


def plain_losses(
    path: Path, config: LongRopeConfig, rows: TrainingRows, recipe: Recipe
) -> tuple[list[float], list[float], Any]:
    """The same training, written out: the reference's logits, AdamW, a linear schedule, clipping.

    Returns:
        loss and gradient norm of every step, and the model.
    """
    model, _ = load_torch_model(path)
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1]
    others = [p for n, p in model.named_parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas)
    losses, norms = [], []
    assert recipe.steps is not None
    for step in range(recipe.steps):
        warm, count = recipe.warmup_steps, recipe.steps
        share = step / warm if step < warm else (count - step) / (count - warm)
        total, targets = torch.zeros(()), 0
        for number in range(recipe.batch_size):
            row = rows.row(step * recipe.batch_size + number)
            logits = frozen_logits(model, config, row)
            labels = torch.from_numpy(row.targets[1:]).long()
            total = total + cross_entropy(logits[:-1], labels, reduction="sum", ignore_index=-100)
            targets += int((labels != -100).sum())
        loss = total / targets
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        for group in adam.param_groups:
            group["lr"] = recipe.learning_rate * share
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms, model


def frozen_logits(model: Any, config: LongRopeConfig, row: Row) -> Tensor:
    """(n, vocabulary) under the last tier alone, by verify's reference."""
    last = len(config.tiers) - 1
    return reference_logits(
        model, config, row.ids.tolist(), tier_at=lambda position: last, gradients=True
    )


def test_shipped_recipes_name_source_and_result() -> None:
    assert {"longrope-llama2-128k", "longrope-llama2-256k", "longrope-mistral", "longrope2-mixed", "entropy-abf", "yarn", "pi"} <= set(recipe_names())  # fmt: skip
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.source and recipe.reproduces
        assert Layout(recipe.layout)
    first = load_recipe("longrope-llama2-128k")
    assert (first.steps, first.batch_size, first.learning_rate, first.window) == (400, 32, 2e-5, 131072)  # fmt: skip
    assert load_recipe("longrope2-mixed").rule is Rule.SEQUENCE


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps = 3\nlerning_rate = 1", "did you mean learning_rate"),
        ("steps = 0", "steps is 0"),
        ("steps = 3\nepochs = 1.0", "steps or epochs"),
        ("", "steps or epochs"),
        ("steps = 3\nschedule = 'sine'", "expected one of linear"),
        ("steps = 3\nlearning_rate = nan", "learning_rate is nan"),
        ("steps = 3\nbatch_size = 2.5", "batch_size is 2.5"),
        ("steps = 3\nbetas = [0.9, 1.0]", "betas"),
        ("steps = 3\nlora_alpha = 4", "lora_alpha would be ignored"),
        ("steps = 3\nlayout = 'packed'\ntokens = 64", "tokens would be ignored"),
        ("steps = ", "not TOML"),
    ],
)
def test_wrong_recipes_are_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'source = "me"\nreproduces = "it"\n{text}\n')
    with pytest.raises(ConfigError, match=said):
        load_recipe(str(path))
    with pytest.raises(ConfigError, match="none of entropy-abf"):
        load_recipe("no-such")


def test_training_is_what_plain_torch_computes(
    model_path: Path, config: LongRopeConfig, rows: TrainingRows, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(token_losses, "LOGIT_VALUES", VOCAB * 20)  # several chunks of logits
    losses, norms, expected = plain_losses(model_path, config, rows, TINY)
    trained, steps = run_training(model_path, config, rows, TINY, tmp_path / "run")
    assert [s.loss for s in steps] == pytest.approx(losses, abs=2e-5)
    assert [s.gradient_norm for s in steps] == pytest.approx(norms, rel=1e-3)
    drawn = [rows.row(0), rows.row(1)]
    assert steps[0].targets == sum(int((row.targets[1:] != -100).sum()) for row in drawn)
    trained.save(model_path, tmp_path / "saved")
    saved, _ = load_torch_model(tmp_path / "saved")
    for (name, one), (_, other) in zip(
        saved.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-4), name
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("change", [{"gradient_checkpointing": True}, {"batch_size": 2}])
def test_checkpointing_and_rows_at_once_change_nothing(
    model_path: Path, config: LongRopeConfig, rows: TrainingRows, tmp_path: Path, change: Any
) -> None:
    _, one = run_training(model_path, config, rows, TINY, tmp_path / "one")
    recipe = replace(TINY, **change)
    machine = Machine(rows_per_pass=recipe.batch_size)
    _, other = run_training(model_path, config, rows, recipe, tmp_path / "other", machine)
    assert [s.loss for s in other] == pytest.approx([s.loss for s in one], abs=1e-5)


def test_rules_train_under_their_own_factors(
    model_path: Path, config: LongRopeConfig, rows: TrainingRows, tmp_path: Path
) -> None:
    recipe = replace(TINY, steps=1)
    first = {}
    for rule in Rule:
        _, steps = run_training(
            model_path, config, rows, replace(recipe, rule=rule), tmp_path / rule
        )
        first[rule] = steps[0].loss
    model, _ = load_torch_model(model_path)
    drawn = [rows.row(0), rows.row(1)]

    def mean(under: LongRopeConfig) -> float:
        total, count = 0.0, 0
        for row in drawn:
            logits = reference_logits(model, under, row.ids.tolist())
            labels = torch.from_numpy(row.targets[1:]).long()
            total += float(cross_entropy(logits[:-1], labels, reduction="sum", ignore_index=-100))
            count += int((labels != -100).sum())
        return total / count

    with torch.no_grad():
        assert first[Rule.SEQUENCE] == pytest.approx(mean(config), abs=2e-5)
        causal = mean(replace(config, switch=SwitchPolicy.CAUSAL))
    assert first[Rule.CAUSAL] == pytest.approx(causal, abs=2e-5)
    # rows of the target length: the last tier serves all of them under both
    assert first[Rule.FROZEN] == pytest.approx(first[Rule.SEQUENCE], abs=2e-5)
    assert abs(first[Rule.CAUSAL] - first[Rule.FROZEN]) > 1e-4


def test_adapters_learn_and_are_merged(
    model_path: Path, config: LongRopeConfig, rows: TrainingRows, tmp_path: Path
) -> None:
    recipe = replace(TINY, lora_rank=4, learning_rate=2e-2, steps=6, gradient_checkpointing=True)
    trained, steps = run_training(model_path, config, rows, recipe, tmp_path / "run")
    assert steps[-1].loss < steps[0].loss - 0.01
    tuned = sum(p.numel() for p in trained.model.parameters() if p.requires_grad)
    assert tuned < 0.3 * sum(p.numel() for p in trained.model.parameters())
    row = rows.row(0)
    ids = torch.from_numpy(row.ids).long()[None]
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        inner = trained.model.get_base_model()
        before = inner.get_decoder()(ids, position_ids=positions, use_cache=False)
        logits = inner.get_output_embeddings()(before.last_hidden_state)[0]
    trained.save(model_path, tmp_path / "saved")
    merged, _ = load_torch_model(tmp_path / "saved")
    assert torch.allclose(frozen_logits(merged, config, row), logits, atol=2e-4)
    assert (tmp_path / "saved" / "tokenizer.json").is_file()


def test_a_cut_training_goes_on_to_the_same_losses_and_weights(
    model_path: Path, config: LongRopeConfig, rows: TrainingRows, tmp_path: Path
) -> None:
    recipe, machine = replace(TINY, steps=6), Machine(save_steps=2)
    whole, steps = run_training(model_path, config, rows, recipe, tmp_path / "whole", machine)
    whole.save(model_path, tmp_path / "whole.saved")

    class CutError(Exception):
        pass

    def cut(step: Step) -> None:
        if step.step == 5:
            raise CutError

    (tmp_path / "cut").mkdir()
    with pytest.raises(CutError):
        model = TrainingModel(model_path, config, recipe, seed=0)
        train(model.model, rows, recipe, tmp_path / "cut", machine, steps=6, seed=0, pad_id=0, on_step=cut)  # fmt: skip
    torn = tmp_path / "cut" / "checkpoints" / "checkpoint-5"  # as a kill while saving leaves it
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "los')
    other, resumed = run_training(model_path, config, rows, recipe, tmp_path / "cut", machine)
    assert [replace(s, seconds=0) for s in resumed] == [replace(s, seconds=0) for s in steps]
    assert [s.loss for s in read_metrics(tmp_path / "cut")] == [s.loss for s in steps]
    other.save(model_path, tmp_path / "cut.saved")
    one, two = (
        (tmp_path / f"{n}.saved" / "model.safetensors").read_bytes() for n in ("whole", "cut")
    )
    assert one == two


def test_a_loss_that_is_no_number_ends_the_training(
    model_path: Path, config: LongRopeConfig, rows: TrainingRows, tmp_path: Path
) -> None:
    recipe = replace(TINY, learning_rate=1e18, warmup_steps=0, max_grad_norm=0.0)
    with pytest.raises(
        ModelError, match=r"step [2-4]: the loss is (nan|inf).*--learning-rate|lower"
    ):
        run_training(model_path, config, rows, recipe, tmp_path / "run")


def test_a_batch_has_to_be_divisible() -> None:
    assert passes_per_step(8, 2, world=1, ranks=1) == 4
    assert passes_per_step(8, 2, world=2, ranks=1) == 2
    assert passes_per_step(8, 2, world=4, ranks=2) == 2
    with pytest.raises(UnsupportedError, match="--batch-size or --rows-per-pass"):
        passes_per_step(6, 2, world=2, ranks=1)
    with pytest.raises(UnsupportedError, match="cannot be divided"):
        passes_per_step(1, 2, world=1, ranks=1)
    with pytest.raises(UnsupportedError, match="a divisor of the 4"):
        passes_per_step(6, 2, world=4, ranks=3)


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
    assert [(s.targets, s.tokens) for s in two if "--sequence-parallel" not in more] == [
        (s.targets, s.tokens) for s in one if "--sequence-parallel" not in more
    ]
    assert [s.gradient_norm for s in two] == pytest.approx([s.gradient_norm for s in one], rel=1e-2)
    first, second = (load_torch_model(tmp_path / name / "model")[0] for name in ("one", "two"))
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-4), name


# -- the command


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
    again = run_command(arguments(model_path, factors, texts, output, *more, "--resume"))
    assert json.loads(again.stdout) == result
    page = tmp_path / "page.html"
    run_command(["report", str(output), "-o", str(page)])
    text = page.read_text()
    assert "Fine-tuning" in text
    assert "causal, after" in text


def test_the_command_killed_at_any_moment_goes_on_to_the_same_losses(
    model_path: Path, factors: Path, texts: Path, tmp_path: Path
) -> None:
    run_command(arguments(model_path, factors, texts, tmp_path / "whole"))
    cut = arguments(model_path, factors, texts, tmp_path / "cut")
    process = subprocess.Popen(
        [sys.executable, "-m", "longrope_export", *cut], stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while len(read_metrics(tmp_path / "cut")) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if process.stderr:
        process.stderr.close()
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
        (["--short-share", "0.5"], "--short-share belongs to --layout mixed"),
        (["--tokens", "16"], "--tokens belongs to --layout pose"),
        (["--backend", "gather"], "--backend belongs to --sequence-parallel"),
        (["--needle-keys", "0"], "--needle-keys belongs to --validation-text"),
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


def test_a_folder_inside_the_model_is_refused(model_path: Path, factors: Path, texts: Path) -> None:
    with pytest.raises(OutputError):
        CliRunner().invoke(
            main,
            arguments(model_path, factors, texts, model_path / "tuned"),
            catch_exceptions=False,
            standalone_mode=False,
        )
        raise OutputError  # the command line turned it into a message: the folder must not be there
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
