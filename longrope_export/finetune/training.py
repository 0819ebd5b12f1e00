"""Runs a training: a recipe's settings as transformers' arguments, from the last whole checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrope_export.errors import UnsupportedError
from longrope_export.finetune.checkpoints import last_checkpoint, remove_torn, step_of
from longrope_export.finetune.distributed import (
    enable_fsdp_on_cpu,
    fsdp_arguments,
    rank_and_world,
    sequence_group,
    wait_for_all,
)
from longrope_export.finetune.metrics import Metrics, Step
from longrope_export.finetune.recipes import Recipe
from longrope_export.finetune.sequence_parallel import sequence_parallel

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
        sequence_ranks: processes that share each row, for windows that one device cannot hold.
        backend: of their attention, see sequence_parallel.
    """

    device: str = "cpu"
    dtype: str = "float32"
    rows_per_pass: int = 1
    save_steps: int = 50
    sequence_ranks: int = 1
    backend: str = "gather"


@dataclass(frozen=True)
class Trained:
    """What a training gave.

    Attributes:
        steps: all of them, those before a kill included.
        state: of several processes, the whole state dict, in the first of them; None where the
            model that was trained holds it.
    """

    steps: list[Step]
    state: dict[str, Any] | None


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
) -> Trained:
    """Train, from the last whole checkpoint of the folder where there is one.

    Args:
        model: TrainingModel.model.
        rows: step i computes the rows from i * recipe.batch_size on.
        folder: gets metrics.jsonl and checkpoints/. A training that was killed and goes on gives the
            losses of an unbroken one.
        steps: optimizer steps.

    Raises:
        UnsupportedError: accelerate is not installed; a batch that the processes cannot divide.
        ModelError: the loss is not a finite number.
        OutputError: the disk is full.
    """
    world = rank_and_world()[1]
    passes = passes_per_step(
        recipe.batch_size, machine.rows_per_pass, world, machine.sequence_ranks
    )
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
            **(fsdp_arguments() if world > 1 else {}),
        )
        if world == 1:  # else Trainer wraps the model for all GPUs of the machine by itself
            arguments._n_gpu = min(arguments.n_gpu, 1)
    except ImportError as error:
        raise UnsupportedError(
            f"training needs transformers and accelerate: {error}; "
            f"pip install 'longrope-export[finetune]'"
        ) from error
    if rank_and_world()[0] == 0:
        remove_torn(folder / CHECKPOINTS)
    wait_for_all()
    checkpoint = last_checkpoint(folder / CHECKPOINTS)
    first = step_of(checkpoint) if checkpoint else 0
    metrics = Metrics(folder, first, is_writer=rank_and_world()[0] == 0)

    def keep(step: Step) -> None:
        metrics.add(step)
        on_step(step)

    ranks = machine.sequence_ranks
    trainer = RowTrainer(model, arguments, rows, steps * recipe.batch_size, pad_id, ranks, keep)
    trainer.remove_callback(PrinterCallback)
    if world > 1 and machine.device == "cpu":
        enable_fsdp_on_cpu(trainer)
    with contextlib.ExitStack() as stack:
        if ranks > 1:
            group = sequence_group(ranks)
            shared = stack.enter_context(sequence_parallel(model, group, machine.backend))
            trainer.shard = shared.shard
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    whole = trainer.accelerator.get_state_dict(trainer.model_wrapped) if world > 1 else None
    return Trained(metrics.steps, whole)


def passes_per_step(batch_size: int, rows_per_pass: int, world: int, ranks: int) -> int:
    """Passes that each process accumulates for one step.

    Args:
        world: processes.
        ranks: of them, that share each row.

    Raises:
        UnsupportedError: the batch, or the processes, cannot be divided evenly.
    """
    if world % ranks:
        raise UnsupportedError(
            f"--sequence-parallel {ranks}: expected a divisor of the {world} process(es) that "
            f"torchrun started"
        )
    passes, rest = divmod(batch_size, rows_per_pass * (world // ranks))
    if rest or not passes:
        raise UnsupportedError(
            f"a batch of {batch_size} rows cannot be divided evenly among {world // ranks} group(s) "
            f"of processes that compute {rows_per_pass} row(s) at once: change --batch-size or "
            f"--rows-per-pass"
        )
    return passes
