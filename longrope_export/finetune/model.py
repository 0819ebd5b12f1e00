"""A model made ready for training: factors put on, adapters added, the loss chunked; and saved again."""

from __future__ import annotations

import shutil
import types
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrope_export.config import LongRopeConfig, SwitchPolicy
from longrope_export.errors import ModelError, UnsupportedError
from longrope_export.finetune.recipes import Recipe, Rule
from longrope_export.hf_runtime import LongRopeRuntime, apply_longrope, remove_longrope
from longrope_export.models.hf_config import refuse_quantized
from longrope_export.models.token_losses import IGNORED, token_losses
from longrope_export.models.torch_model import load_torch_model
from longrope_export.verify.certificate import FILE_NAME as CERTIFICATE

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".safetensors.index.json")


class TrainingModel:
    """A model of transformers under a config, whose forward gives a loss and no logits.

    Args:
        path: a Hugging Face folder.
        config: the definition; under Rule.FROZEN its last tier computes everything.
        recipe: what is tuned, and under which rule.
        seed: of the adapters' first values.
        device: as torch names it.

    Attributes:
        model: what the trainer gets; with adapters a PeftModel.
        runtime: the definition at work, frozen or not.

    Raises:
        UnsupportedError: torch, transformers or peft is not installed; the config does not fit;
            the weights are quantized.
        ModelError: transformers cannot load it.
    """

    def __init__(
        self, path: Path, config: LongRopeConfig, recipe: Recipe, seed: int, device: str = "cpu"
    ) -> None:
        import torch

        refuse_quantized(path)
        causal_lm, _ = load_torch_model(path, "float32")
        self.model = causal_lm.to(device).train()
        self._stored_dtype = stored_dtype(path)
        switch = SwitchPolicy.CAUSAL if recipe.rule is Rule.CAUSAL else SwitchPolicy.SEQUENCE
        self.runtime: LongRopeRuntime = apply_longrope(self.model, replace(config, switch=switch))
        if recipe.rule is Rule.FROZEN:
            self.runtime.freeze(-1)
        causal_lm.forward = types.MethodType(_loss_forward, causal_lm)
        causal_lm.config.use_cache = False
        self._causal_lm = causal_lm
        if recipe.lora_rank:
            torch.manual_seed(seed)
            self.model = _with_adapters(causal_lm, recipe)

    def load(self, state: dict[str, Any]) -> None:
        """Take over the weights of a training of several processes."""
        self.model.load_state_dict(state, strict=False)  # tied weights may stand in it once

    def save(self, source: Path, folder: Path) -> None:
        """Write a plain Hugging Face folder, adapters merged, in the dtype that the source is stored in.

        Afterwards the model is no longer fit for training.

        Args:
            source: the folder that it was loaded from; tokenizer and all other small files are
                copied from it.
            folder: made if needed.
        """
        if self.model is not self._causal_lm:
            self.model = self.model.merge_and_unload()
        del self._causal_lm.forward
        remove_longrope(self._causal_lm)
        self._causal_lm.config.use_cache = True
        self._causal_lm.to(self._stored_dtype).save_pretrained(folder)
        for file in sorted(source.iterdir()):
            is_other = not file.name.endswith(WEIGHT_FILES) and file.name != CERTIFICATE
            if file.is_file() and is_other and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


def stored_dtype(path: Path) -> Any:
    """torch's dtype of the first weights in a folder's safetensors files; float32 without such."""
    import torch
    from safetensors import safe_open

    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()
            return tensors.get_slice(names[0])[:1].dtype if names else torch.float32
    return torch.float32


def _loss_forward(
    self: Any,
    input_ids: Tensor,
    position_ids: Tensor,
    shift_labels: Tensor,
    attention_mask: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    labels: Tensor | None = None,
    document_ids: Tensor | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """In place of a causal language model's forward.

    Args:
        input_ids, position_ids: (rows, n).
        shift_labels: (rows, n) the token that follows each place; IGNORED for none.
        num_items_in_batch: targets of the whole step, over which the loss is a mean; None for this
            batch's own.
        labels: not used; the trainer counts by it.
        document_ids: (rows, n) where rows are shared between processes, see shard_row.

    Returns:
        loss, a scalar.
    """
    documents = {} if document_ids is None else {"document_ids": document_ids}
    hidden = self.get_decoder()(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=attention_mask,
        use_cache=False,
        **documents,
    ).last_hidden_state
    losses = token_losses(self, hidden.flatten(0, 1), shift_labels.flatten())[0]
    count = num_items_in_batch
    if count is None:
        count = shift_labels.ne(IGNORED).sum()
    return {"loss": losses.sum() / max(int(count), 1)}


def _with_adapters(model: Any, recipe: Recipe) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UnsupportedError(
            f"adapters need peft: {error}; pip install 'longrope-export[finetune]'"
        ) from error
    settings = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha or 2 * recipe.lora_rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(model, settings)
    except ValueError as error:
        raise ModelError(f"peft cannot add adapters to {type(model).__name__}: {error}") from error
    # with checkpointing, gradients reach the adapters of the first layers only through the inputs
    adapted.enable_input_require_grads()
    return adapted
