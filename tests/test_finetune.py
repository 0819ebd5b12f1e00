"""Recipes, and trainings against a training loop in plain torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tuning import TARGET, VOCAB, make_source, make_two_tiers

from longrope_export.config import LongRopeConfig, SwitchPolicy
from longrope_export.errors import ConfigError, ModelError, UnsupportedError
from longrope_export.finetune import recipes
from longrope_export.finetune.metrics import Step, read_metrics
from longrope_export.finetune.model import TrainingModel
from longrope_export.finetune.recipes import Layout, Recipe, Rule, load_recipe, recipe_names
from longrope_export.finetune.rows import Row, RowSettings, TrainingRows
from longrope_export.finetune.samples import Sample
from longrope_export.finetune.training import Machine, passes_per_step, train
from longrope_export.models import token_losses
from longrope_export.models.torch_model import load_torch_model
from longrope_export.verify.reference import reference_logits

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
    return make_source(tmp_path_factory.mktemp("tuning") / "model")


@pytest.fixture(scope="module")
def config(model_path: Path) -> LongRopeConfig:
    return make_two_tiers(model_path)


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
        ("steps = 3\nlayout = 'packd'", "expected one of packed"),
        ("steps = 3\nlearning_rate = nan", "learning_rate is nan"),
        ("steps = 3\nbatch_size = 2.5", "batch_size is 2.5"),
        ("steps = 3\nbetas = [0.9, 1.0]", "betas"),
        ("steps = 3\nbetas = 0.9", "betas are 0.9"),
        ("steps = 3\nbetas = [0.9, false]", "betas"),
        ("steps = 3\nlearning_rate = true", "learning_rate is True"),
        ("steps = 3\nlearning_rate = '1'", "learning_rate is '1'"),
        ("steps = 3\ngradient_checkpointing = 'false'", "expected true or false"),
        ("steps = 3\nlayout = 'pose'\ntrue_places = 'false'", "true_places is 'false'"),
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
