"""Runs a training: a recipe's settings as transformers' arguments, from the last whole checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrope_export.errors import UnsupportedError
from longrope_export.finetune.checkpoints import last_checkpoint, step_of
from longrope_export.finetune.metrics import Metrics, Step
from longrope_export.finetune.recipes import Recipe

if TYPE_CHECKING:
    from longrope_export.finetune.rows import TrainingRows

CHECKPOINTS = "checkpoints"
KEPT_CHECKPOINTS = 2  # the last one stays while the next is written


@dataclass(frozen=True)
class Machine:
    """How steps are computed; what is learned depends on it by rounding only.

    Attributes:
        device: cpu or cuda; under torchrun each process takes its own.
        dtype: float32, or bfloat16 for the products of matrices (autocast; weights stay float32).
        rows_per_pass: rows that one device computes at once; the rest of a batch is accumulated.
        save_steps: a checkpoint after so many steps.
        more: further arguments of transformers.TrainingArguments.
    """

    device: str = "cpu"
    dtype: str = "float32"
    rows_per_pass: int = 1
    save_steps: int = 50
    more: dict[str, Any] = field(default_factory=dict)


def train(
    model: Any,
    rows: TrainingRows,
    recipe: Recipe,
    folder: Path,
    machine: Machine,
    *,
    steps: int,
    seed: int,
    pad_id: int,
    on_step: Callable[[Step], None] = lambda step: None,
) -> list[Step]:
    """Train, from the last whole checkpoint of the folder where there is one.

    Args:
        model: TrainingModel.model.
        rows: step i computes the rows from i * recipe.batch_size on.
        folder: gets metrics.jsonl and checkpoints/. A training that was killed and goes on gives the
            losses of an unbroken one.
        steps: optimizer steps.

    Returns:
        All steps, those before a kill included.

    Raises:
        UnsupportedError: accelerate is not installed; a batch that the processes cannot divide.
        ModelError: the loss is not a finite number.
        OutputError: the disk is full.
    """
    passes = passes_per_step(recipe.batch_size, machine.rows_per_pass)
    try:
        from transformers import PrinterCallback, TrainingArguments

        from longrope_export.finetune.row_trainer import RowTrainer

        arguments = TrainingArguments(
            output_dir=str(folder / CHECKPOINTS),
            max_steps=steps,
            per_device_train_batch_size=machine.rows_per_pass,
            gradient_accumulation_steps=passes,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type=recipe.schedule.value,
            warmup_steps=recipe.warmup_steps,
            weight_decay=recipe.weight_decay,
            adam_beta1=recipe.betas[0],
            adam_beta2=recipe.betas[1],
            max_grad_norm=recipe.max_grad_norm,
            activation_checkpointing=recipe.gradient_checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False},
            bf16=machine.dtype == "bfloat16",
            use_cpu=machine.device == "cpu",
            train_sampling_strategy="sequential",
            save_strategy="steps",
            save_steps=machine.save_steps,
            save_total_limit=KEPT_CHECKPOINTS,
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            seed=seed,
            **machine.more,
        )
    except ImportError as error:
        raise UnsupportedError(
            f"training needs transformers and accelerate: {error}; "
            f"pip install 'longrope-export[finetune]'"
        ) from error
    checkpoint = last_checkpoint(folder / CHECKPOINTS)
    first = step_of(checkpoint) if checkpoint else 0
    metrics = Metrics(folder, first, is_writer=int(os.environ.get("RANK", "0")) == 0)

    def keep(step: Step) -> None:
        metrics.add(step)
        on_step(step)

    trainer = RowTrainer(model, arguments, rows, steps * recipe.batch_size, pad_id, keep)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return metrics.steps


def passes_per_step(batch_size: int, rows_per_pass: int) -> int:
    """Passes that each process accumulates for one step.

    Raises:
        UnsupportedError: the batch cannot be divided evenly.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun sets it
    passes, rest = divmod(batch_size, rows_per_pass * processes)
    if rest or not passes:
        raise UnsupportedError(
            f"a batch of {batch_size} rows cannot be divided evenly among {processes} process(es) "
            f"that compute {rows_per_pass} row(s) at once: change --batch-size or --rows-per-pass"
        )
    return passes
