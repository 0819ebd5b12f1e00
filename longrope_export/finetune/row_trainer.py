"""transformers' Trainer over our rows: their order, what a step gave, whole checkpoints.

Imported only where a training begins: it subclasses classes of torch and transformers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from longrope_export.errors import ModelError, OutputError
from longrope_export.finetune.checkpoints import mark_complete
from longrope_export.finetune.metrics import Step
from longrope_export.finetune.rows import Row, TrainingRows, batch
from longrope_export.models.token_losses import IGNORED


class RowDataset(Dataset[Row]):
    """The first `count` rows of a training, in order, each once for every process that shares it.

    Args:
        at_once: rows of a batch of one process.
        world: processes; batch k goes to process k % world.
        ranks: neighbouring processes that get the same batches.
    """

    def __init__(
        self, rows: TrainingRows, count: int, at_once: int, world: int, ranks: int
    ) -> None:
        self.rows, self.count = rows, count
        self.at_once, self.world, self.ranks = at_once, world, ranks

    def __len__(self) -> int:
        return self.count * self.ranks

    def __getitem__(self, index: int) -> Row:
        batch, place = divmod(index, self.at_once)
        turn, process = divmod(batch, self.world)
        shared = turn * (self.world // self.ranks) + process // self.ranks
        return self.rows.row(shared * self.at_once + place)


def collate(rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
    """input_ids, position_ids, labels and shift_labels (rows, n), attention_mask where rows have one.

    shift_labels holds at each place the target of the next one; the last place has none.
    """
    arrays = batch(rows, pad_id)
    tensors = {name: torch.from_numpy(array).long() for name, array in arrays.items()}
    labels = tensors["labels"]
    tensors["shift_labels"] = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return tensors


class RowTrainer(Trainer):
    """Tells what each step gave, and ends at the first loss that is no number.

    Args:
        model: its forward returns a loss, a mean over num_items_in_batch targets.
        arguments: of transformers.
        rows, count: what is trained on.
        pad_id: fills rows of a batch up to one length.
        ranks: neighbouring processes that share each row.
        on_step: told of every step, in every process.

    Attributes:
        shard: where rows are shared, what a process computes of a batch; see shard_row.
    """

    def __init__(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        rows: TrainingRows,
        count: int,
        pad_id: int,
        ranks: int,
        on_step: Callable[[Step], None],
    ) -> None:
        at_once, world = arguments.per_device_train_batch_size, arguments.world_size
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=RowDataset(rows, count, at_once, world, ranks),
            data_collator=lambda parts: collate(parts, pad_id),
            callbacks=[_Watch(self)],
        )
        self.model_accepts_loss_kwargs = True
        self.ranks, self.on_step = ranks, on_step
        self.shard: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
        self.begin_step()

    def begin_step(self) -> None:
        """Forget what the last step gave."""
        self._loss, self._targets, self._tokens, self._norm = 0.0, 0, 0, 0.0
        self._begin = time.monotonic()

    def finish_step(self) -> None:
        """Tell what the step that has ended gave, over all processes."""
        kept = torch.tensor(
            [self._loss, self._targets, self._tokens], dtype=torch.float64, device=self.args.device
        )
        # each process's loss is its share times their number (Trainer.compute_loss)
        loss, targets, tokens = self.accelerator.gather(kept[None]).mean(0).tolist()
        self.on_step(
            Step(
                step=self.state.global_step,
                steps=self.state.max_steps,
                loss=loss,
                learning_rate=self._rate,
                gradient_norm=self._norm,
                targets=round(targets * self.args.world_size / self.ranks),
                tokens=round(tokens * self.args.world_size / self.ranks),
                seconds=time.monotonic() - self._begin,
            )
        )

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:  # fmt: skip
        """See Trainer.

        Raises:
            ModelError: the loss is not a finite number.
        """
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        if not math.isfinite(float(loss)):
            raise ModelError(
                f"step {self.state.global_step + 1}: the loss is {float(loss)}: begin anew with a "
                f"lower learning rate (now {self.args.learning_rate:g}), a longer warm-up or "
                f"--dtype float32; resuming with the same settings ends here again"
            )
        self._loss += float(loss)
        self._targets += int(inputs["shift_labels"].ne(IGNORED).sum())
        self._tokens += inputs["input_ids"].numel()
        return loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        if self.shard is None:
            return prepared
        names = ("input_ids", "position_ids", "attention_mask", "labels")
        batch = {name: prepared[name] for name in names if name in prepared}
        if "attention_mask" not in batch:  # packed: a document begins where positions do not go on
            places = batch["position_ids"]
            begins = places[:, 1:] != places[:, :-1] + 1
            batch["document_ids"] = nn.functional.pad(begins.long().cumsum(1), (1, 0))
        shard = self.shard(batch)
        return {**shard, "shift_labels": shard.pop("targets")}

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        # torch's writer raises a RuntimeError where the disk is full
        except (OSError, RuntimeError, SafetensorError) as error:
            raise OutputError(
                f"{self.args.output_dir}: the checkpoint of step {self.state.global_step} cannot be "
                f"written: {error}; make room, then go on with --resume"
            ) from error

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> Any:
        count = super()._get_num_items_in_batch(*args, **kwargs)
        return None if count is None else count / self.ranks  # every sharer has counted the row

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._norm, self._rate = float(norm), float(self._get_learning_rate())
        return norm


class _Watch(TrainerCallback):
    def __init__(self, trainer: RowTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.finish_step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")
