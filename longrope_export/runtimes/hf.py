"""transformers: our live runtime, its own stock model, or a folder's own modelling file."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longrope_export.config import LongRopeConfig, SwitchPolicy
from longrope_export.errors import ConfigError, ModelError
from longrope_export.models.hf_config import refuse_quantized
from longrope_export.models.model import load_model
from longrope_export.models.torch_model import load_torch_model, load_torch_tokenizer
from longrope_export.runtimes.base import (
    DEFAULT_CHUNK,
    Hidden,
    LayerOutputs,
    Logits,
    RuntimeInfo,
    Tokens,
)

if TYPE_CHECKING:
    from torch import Tensor

_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class Flavour(StrEnum):
    """Whose code computes the model."""

    OURS = "transformers, longrope"
    STOCK = "transformers"
    REMOTE = "transformers, remote code"


_SWITCHING = {
    Flavour.OURS: "by the file's rule",
    Flavour.STOCK: "short or long, by the longest position of a call",
    Flavour.REMOTE: "by the file's rule",
}


class HfModel:
    """A folder or a GGUF in transformers.

    Args:
        path: the folder or the file.
        flavour: OURS puts the definition onto transformers' class; REMOTE runs the modelling file
            that lies in the folder.
        config: for OURS: the definition of a model that carries none, or plain RoPE.
        dtype: float32, float16, bfloat16.
        device: as torch names it.

    Raises:
        UnsupportedError: torch or transformers is not installed, a config does not fit, or the weights
            are quantized.
        ModelError: transformers cannot load the model.
        ConfigError: torch has no such device here, or it is too small.
    """

    def __init__(
        self,
        path: Path,
        *,
        flavour: Flavour = Flavour.OURS,
        config: LongRopeConfig | None = None,
        dtype: str = "float32",
        device: str = "cpu",
    ) -> None:
        from longrope_export.hf_runtime import apply_longrope

        refuse_quantized(path)
        self._path = path
        source = load_model(path)
        carries = source.has_definition or source.has_longrope
        self.config: LongRopeConfig | None = source.native if carries else None
        self._used = source.native if source.is_extended or config is None else config
        model, version = load_torch_model(path, dtype, trust_remote_code=flavour is Flavour.REMOTE)
        try:
            self.model = model.to(device)
        except (RuntimeError, AssertionError) as error:  # an unknown device, or none here
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"--device {device}: {path} cannot be put there: {reason}; give cpu, or a device of "
                "torch that this machine has, as cuda or cuda:1"
            ) from error
        if flavour is Flavour.OURS:
            apply_longrope(model, self._used)
        # a modelling file of ours has the same runtime inside
        self._runtime = getattr(model.get_decoder().rotary_emb, "runtime", None)
        self.info = RuntimeInfo(
            name=str(flavour),
            version=version,
            path=path,
            precision=_PRECISIONS[dtype],
            switching=_SWITCHING[flavour],
            float32_angles=flavour is Flavour.STOCK,
        )

    def start(
        self,
        *,
        declared_length: int | None = None,
        chunk_size: int = DEFAULT_CHUNK,
        first_position: int = 0,
    ) -> HfSequence:
        """An empty sequence; under `sequence` a declared length freezes its tier until the next."""
        pinned = declared_length and self._used.switch is SwitchPolicy.SEQUENCE
        self._freeze(self._used.tier_index(declared_length or 0) if pinned else None)
        return HfSequence(self, chunk_size, first_position)

    def batch(self, sequences: Sequence[Tokens], keep: int) -> list[Logits]:
        """One forward, padded on the left."""
        import torch

        self._freeze(None)
        longest = max(map(len, sequences))
        ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(sequences):
            ids[row, longest - len(tokens) :] = torch.as_tensor(np.asarray(tokens))
            mask[row, longest - len(tokens) :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        device = self.model.device
        with torch.no_grad():
            logits = self.model(
                ids.to(device),
                attention_mask=mask.to(device),
                position_ids=positions.to(device),
                use_cache=False,
                logits_to_keep=keep,
            ).logits
        return [as_logits(row) for row in logits]

    def layer_outputs(
        self,
        calls: Sequence[Tokens],
        wanted: range,
        *,
        declared_length: int | None = None,
        chunk_size: int = DEFAULT_CHUNK,
        first_position: int = 0,
    ) -> Hidden:
        """See TellsLayers."""
        sequence = self.start(
            declared_length=declared_length, chunk_size=chunk_size, first_position=first_position
        )
        layers = self.model.get_decoder().layers
        outputs = LayerOutputs(wanted)

        def keep(number: int) -> Any:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                outputs.put(number, sequence.length, as_logits(hidden[0]))

            return hook

        handles = [layer.register_forward_hook(keep(n)) for n, layer in enumerate(layers)]
        try:
            for tokens in calls:
                sequence.append(tokens, keep=1)
        finally:
            for handle in handles:
                handle.remove()
        return outputs.stacked()

    def tokenize(self, text: str) -> list[int] | None:
        """By transformers' tokenizer of the folder or the GGUF; None where there is none."""
        if self.tokenizer is None:
            return None
        ids: list[int] = self.tokenizer(text, verbose=False).input_ids
        return ids

    def detokenize(self, tokens: Tokens) -> str | None:
        """See Runtime."""
        if self.tokenizer is None:
            return None
        return str(self.tokenizer.decode(list(map(int, tokens)), skip_special_tokens=True))

    @cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of the folder or the GGUF; None where there is none."""
        try:
            return load_torch_tokenizer(self._path)
        except ModelError:
            return None

    def close(self) -> None:
        """Forget the weights."""
        del self.model

    def _freeze(self, tier_index: int | None) -> None:
        if self._runtime is not None:
            self._runtime.freeze(tier_index)


class HfSequence:
    """One sequence with its DynamicCache. Made by HfModel.start."""

    def __init__(self, model: HfModel, chunk_size: int, first_position: int) -> None:
        from transformers import DynamicCache

        self.model, self._chunk, self._first = model, chunk_size, first_position
        self._cache: Any = DynamicCache(config=model.model.config)
        self.length = 0

    def append(self, tokens: Tokens, *, keep: int | None = None) -> Logits:
        """See RunningSequence."""
        import torch

        ids = torch.as_tensor(np.asarray(tokens, dtype=np.int64))[None]
        wanted = ids.shape[1] if keep is None else min(keep, ids.shape[1])
        kept = []
        for first in range(0, ids.shape[1], self._chunk):
            part = ids[:, first : first + self._chunk].to(self.model.model.device)
            rest = ids.shape[1] - first - part.shape[1]
            count = min(max(wanted - rest, 0), part.shape[1])
            begin = self._first + self.length
            positions = torch.arange(begin, begin + part.shape[1], device=part.device)
            with torch.no_grad():
                logits = self.model.model(
                    part,
                    position_ids=positions[None],
                    past_key_values=self._cache,
                    use_cache=True,
                    logits_to_keep=max(count, 1),
                ).logits[0]
            if count:
                kept.append(as_logits(logits))
            self.length += part.shape[1]
        return np.concatenate(kept)


def as_logits(logits: Tensor) -> Logits:
    """float32 on the CPU."""
    values: Logits = logits.float().cpu().numpy()
    return values
