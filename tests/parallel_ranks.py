"""What the processes of test_finetune_parallel.py run, under torchrun; results go to files."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hf_reference import VOCAB, toy_config, toy_model
from torch import Tensor

from longrope_export.finetune import gathered_attention
from longrope_export.finetune.distributed import (
    Place,
    enable_fsdp_on_cpu,
    fsdp_arguments,
    process_group,
    sequence_group,
)
from longrope_export.finetune.sequence_parallel import (
    count_targets,
    sequence_parallel,
    shard_loss,
)
from longrope_export.hf_runtime import apply_longrope

LENGTH = 21  # not a multiple of 4, the chunks of two ranks
STEPS = 4


@dataclass(frozen=True)
class Case:
    """A model and rows.

    Attributes:
        switch: of the three-tier config, frozen to its last tier; None for no config.
        rows: "plain", "jumping" positions, "packed" documents, or "padded" on the left.
        model, config: changes.
        sharded: by FSDP2, with checkpointed layers.
        mask_values: of one block.
        fault: "local positions".
    """

    family: str = "Llama"
    switch: str | None = "causal"
    rows: str = "plain"
    model: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    sharded: bool = False
    mask_values: int = 1 << 25
    fault: str = ""


_WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
CASES = {
    "tiers, log scaling, start tokens": Case(),
    "tiers, no log scaling": Case(config={"plain_logits": True}),
    "sequence rule": Case(switch="sequence", config={"plain_logits": True}),
    "no config": Case(switch=None),
    "small blocks": Case(mask_values=50),
    "jumping positions": Case(rows="jumping"),
    "packed documents": Case(rows="packed", mask_values=50),
    "padding on the left": Case(rows="padded"),
    "FSDP2 and checkpoints": Case(sharded=True),
    "Qwen2 with windows": Case("Qwen2", model=_WINDOWS),
    "Mistral": Case("Mistral", mask_values=50),
    "Gemma2": Case("Gemma2", rows="packed"),
    "Gemma3": Case("Gemma3"),
    "Qwen3Moe": Case("Qwen3Moe"),
    "local positions": Case(fault="local positions"),
}


def make(case: Case) -> Any:
    model = toy_model(case.family, noise=0.05, **case.model)
    if case.switch is not None:
        config = toy_config(model, case.switch, **case.config)
        apply_longrope(model, config).freeze(-1)
    return model


def rows(case: Case) -> dict[str, Tensor]:
    """What is given to shard(), (2, LENGTH) each."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, VOCAB, (2, LENGTH), generator=generator)
    batch = {"input_ids": ids, "labels": ids.clone()}
    batch["labels"][0, 3:5] = -100
    places = torch.arange(LENGTH)
    if case.rows == "jumping":
        batch["position_ids"] = torch.stack([places + 3 * (places > 8), places + 2 * (places > 2)])
    elif case.rows == "packed":
        ends = torch.tensor([[7, 15], [11, 12]])
        batch["document_ids"] = (places[None, :, None] >= ends[:, None]).sum(2)
        starts = torch.cat([torch.zeros(2, 1, dtype=torch.long), ends], dim=1)
        batch["position_ids"] = places - starts.gather(1, batch["document_ids"])
    elif case.rows == "padded":
        batch["attention_mask"] = (places >= torch.tensor([[0], [6]])).long()
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def compute(case: Case) -> dict[str, Any] | None:
    """Logits, loss and gradients by two ranks; on the first."""
    gathered_attention.MASK_VALUES = case.mask_values
    model, batch = make(case), rows(case)
    if case.sharded:
        from torch.distributed.fsdp import fully_shard

        model.train()
        model.gradient_checkpointing_enable()
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    group = sequence_group(2)
    with sequence_parallel(model, group) as parallel:
        shard = parallel.shard(batch)
        targets = shard.pop("targets")
        if case.fault == "local positions":
            shard["position_ids"] = torch.arange(targets.shape[1]).expand(2, -1)
        logits = model(**shard).logits
        loss = shard_loss(logits, targets, count_targets(targets), dist.get_world_size())
        loss.backward()
        whole = parallel.gather(logits.detach(), LENGTH)
    gradients = {
        name: averaged(parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {"logits": whole, "loss": averaged(loss.detach()), "gradients": gradients}


def averaged(value: Any) -> Tensor:
    """As DDP and FSDP do it; FSDP has done it already."""
    if hasattr(value, "full_tensor"):
        whole: Tensor = value.full_tensor()
        return whole
    dist.all_reduce(value)
    mean: Tensor = value / dist.get_world_size()
    return mean


def sequence(place: Place, folder: Path) -> None:
    results = {name: compute(case) for name, case in CASES.items()}
    if place.is_first:
        torch.save(results, folder / "results.pt")


def train(place: Place, folder: Path) -> None:
    """STEPS steps by transformers' Trainer, and again from the checkpoint in their middle."""
    import json

    histories = {}
    for name in ("whole", "resumed"):
        trainer = make_trainer(place, folder, activation_checkpointing=name == "resumed")
        trainer.train(
            resume_from_checkpoint=str(folder / f"checkpoint-{STEPS // 2}")
            if name == "resumed"
            else None
        )
        trainer.save_model(str(folder / name))
        histories[name] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        histories[f"{name} parts"] = [type(part).__name__ for part in trainer.model.modules()]
    if place.is_first:
        (folder / "histories.json").write_text(json.dumps(histories))


def make_trainer(place: Place, folder: Path, activation_checkpointing: bool) -> Any:
    from transformers import Trainer, TrainingArguments

    model = make(Case()).train()
    generator = torch.Generator().manual_seed(5)
    data = [
        {"input_ids": ids, "labels": ids, "position_ids": torch.arange(len(ids))}
        for ids in torch.randint(2, VOCAB, (4 * STEPS, 16), generator=generator)
    ]
    sharding: dict[str, Any] = {}
    if place.world > 1:
        sharding = fsdp_arguments(activation_checkpointing=activation_checkpointing)
    arguments = TrainingArguments(
        str(folder), use_cpu=True, max_steps=STEPS, per_device_train_batch_size=4 // place.world,
        learning_rate=3e-3, logging_steps=1, save_steps=STEPS // 2, report_to=[],
        disable_tqdm=True, **sharding,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)
    if place.world > 1:
        enable_fsdp_on_cpu(trainer)
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group("cpu") as here:
        {"sequence": sequence, "train": train}[sys.argv[1]](here, Path(sys.argv[2]))
