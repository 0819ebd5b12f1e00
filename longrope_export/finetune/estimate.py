"""What a forward pass, a search and a training cost: arithmetic, memory, device-hours.

Only headers of weight files are read. Nothing is timed: hours follow from a device's peak rate and the
share of it that is reached (model FLOP utilization).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from longrope_export.errors import ConfigError
from longrope_export.finetune.hardware import Hardware
from longrope_export.gguf_format import read_header
from longrope_export.models.hf_config import read_hf_config
from longrope_export.models.model import Model, ModelKind
from longrope_export.models.safetensors_header import read_tensor_types
from longrope_export.models.token_losses import LOGIT_VALUES
from longrope_export.verify.tokens import vocabulary_size

# values per token that one layer's backward pass needs: 34 bytes per channel in two-byte
# numbers, attention's matrix recomputed (Korthikanti et al. 2022, arXiv 2205.05198, equation 1)
LAYER_VALUES = 17
# of a pass of the search, whose MLPs work in pieces: residual and normed input, queries and keys
# before and after their rotation, values, attention's output
FORWARD_VALUES = 8
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_EMBEDDINGS = ("embed_tokens.weight", "token_embd.weight")
_HEADS = ("lm_head.weight", "output.weight")


@dataclass(frozen=True)
class Geometry:
    """What costs depend on.

    Attributes:
        num_layers, num_heads, num_key_value_heads, head_dim, hidden_size, vocabulary_size: of the
            model.
        num_parameters: all that are stored.
        num_multiplied: those that every token is multiplied by: all but the embedding's rows, which
            are looked up; a tied embedding is the head, and counts. All experts of a mixture count.
    """

    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int
    vocabulary_size: int
    num_parameters: int
    num_multiplied: int


def geometry_of(model: Model) -> Geometry:
    """From the headers of the weights; where a folder holds none yet, from config.json as a Llama.

    Raises:
        ModelError: a damaged header, or a config.json without what is needed.
    """
    shapes = _gguf_shapes(model.path) if model.kind is ModelKind.GGUF else _hf_shapes(model.path)
    embedding = next((s for n, s in shapes.items() if n.endswith(_EMBEDDINGS)), None)
    if embedding is None:
        config = read_hf_config(model.path)
        hidden, vocabulary = config.require_int("hidden_size"), vocabulary_size(model)
        attention = 2 * hidden * (model.num_heads + model.num_key_value_heads) * model.head_dim
        layer = attention + 3 * hidden * config.require_int("intermediate_size")
        multiplied = model.num_layers * layer + vocabulary * hidden
        parameters = multiplied
        if not config.get("tie_word_embeddings", False):
            parameters += vocabulary * hidden
    else:
        vocabulary, hidden = max(embedding), min(embedding)
        parameters = sum(map(math.prod, shapes.values()))
        tied = not any(name.endswith(_HEADS) for name in shapes)
        multiplied = parameters - (0 if tied else vocabulary * hidden)
    return Geometry(
        model.num_layers, model.num_heads, model.num_key_value_heads, model.head_dim, hidden,
        vocabulary, parameters, multiplied,
    )  # fmt: skip


def forward_flops(geometry: Geometry, length: int) -> float:
    """Floating-point operations of a forward pass, per token of a sequence.

    2 for each weight that a token is multiplied by, and for attention two products (queries with keys,
    weights with values), each 2 * heads * head_dim for every earlier token, of which there are
    length / 2 on the mean: 2 N + 2 layers length heads head_dim (Kaplan et al. 2020, arXiv
    2001.08361, section 2.1 and table 1). Korthikanti et al. (2022), appendix A, count the masked half
    of attention too, which is not computed here. Sliding windows are not looked at.

    Args:
        length: tokens of the sequence.
    """
    return 2.0 * geometry.num_multiplied + _attention_flops(geometry, length)


def training_flops(
    geometry: Geometry, length: int, *, checkpointing: bool = True, adapters: bool = False
) -> float:
    """Floating-point operations of forward and backward pass, per token.

    The backward pass takes twice the forward's: once for the inputs of each product, once for its
    weights (Kaplan et al. 2020, section 2.1); with frozen weights (LoRA) only once for those.
    Checkpoints cost one more forward pass.
    """
    forward = forward_flops(geometry, length)
    backward = 2 * forward - (2.0 * geometry.num_multiplied if adapters else 0.0)
    return forward * (2 if checkpointing else 1) + backward


def _attention_flops(geometry: Geometry, length: int) -> float:
    width = geometry.num_heads * geometry.head_dim
    return 4.0 * geometry.num_layers * width * (length / 2)


@dataclass(frozen=True)
class Memory:
    """Bytes, summed over all devices.

    Attributes:
        weights: as they are held while computing.
        gradients: of what is trained.
        optimizer: AdamW's two moments, float32.
        activations: what the backward pass needs; without one, a layer's values or the cache.
        logits: one chunk of them, and its gradient; never length times vocabulary.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def forward_memory(geometry: Geometry, tokens: int, dtype: str = "float32") -> Memory:
    """Of a pass over a whole text without a cache, as the search makes it."""
    size = BYTES[dtype]
    values = FORWARD_VALUES * tokens * geometry.hidden_size * size
    return Memory(geometry.num_parameters * size, 0, 0, values, 4 * LOGIT_VALUES)


def cache_memory(geometry: Geometry, tokens: int, dtype: str = "float32") -> Memory:
    """Of a text that is read in pieces behind a cache of keys and values, as `evaluate` does."""
    size = BYTES[dtype]
    width = geometry.num_key_value_heads * geometry.head_dim
    cache = 2 * geometry.num_layers * width * tokens * size
    return Memory(geometry.num_parameters * size, 0, 0, cache, 4 * LOGIT_VALUES)


def training_memory(
    geometry: Geometry,
    tokens: int,
    *,
    dtype: str = "float32",
    checkpointing: bool = True,
    trained: int | None = None,
) -> Memory:
    """Of a training with AdamW: weights, gradients and moments in float32.

    With checkpoints each layer's input is kept, and one layer's values while it is computed again.

    Args:
        tokens: that are computed at once: rows of one pass times their length.
        dtype: of the activations; bfloat16 is autocast's.
        trained: parameters; None for all of them.
    """
    size, count = BYTES[dtype], geometry.num_parameters if trained is None else trained
    kept = LAYER_VALUES * geometry.num_layers
    if checkpointing:
        kept = geometry.num_layers + LAYER_VALUES
    activations = kept * tokens * geometry.hidden_size * size
    return Memory(
        4 * geometry.num_parameters, 4 * count, 8 * count, activations, 2 * 4 * LOGIT_VALUES
    )


def adapter_parameters(geometry: Geometry, rank: int) -> int:
    """Of LoRA on every linear layer: rank * (inputs + outputs) each, with the products that N counts.

    Each layer has four attention products and three of the MLP, whose width follows from N.
    """
    hidden, width = geometry.hidden_size, geometry.num_heads * geometry.head_dim
    narrow = geometry.num_key_value_heads * geometry.head_dim
    layer = (geometry.num_multiplied - geometry.vocabulary_size * hidden) / geometry.num_layers
    inner = max(0.0, (layer - 2 * hidden * (width + narrow)) / (3 * hidden))
    sides = 2 * (hidden + width) + 2 * (hidden + narrow) + 3 * (hidden + inner)
    return round(rank * sides * geometry.num_layers)


def device_hours(flops: float, hardware: Hardware, utilization: float | None = None) -> float:
    """Hours that one of the devices would take.

    Args:
        utilization: share of the peak that is reached; None for the device's usual one.

    Raises:
        ConfigError: it is not in (0, 1].
    """
    share = hardware.utilization if utilization is None else utilization
    if not 0 < share <= 1:
        raise ConfigError(f"--utilization {share}: expected a share above 0, at most 1")
    return flops / (hardware.peak_flops * share) / 3600


def check_memory(needed_bytes: int, available_bytes: int, what: str) -> None:
    """Refuse what does not fit, before it has run for hours.

    Args:
        needed_bytes: Memory.total.
        available_bytes: hardware.free_bytes().
        what: the training, for the message.

    Raises:
        ConfigError: with what to do about it.
    """
    if needed_bytes > available_bytes:
        raise ConfigError(
            f"{what} needs about {needed_bytes / 1e9:.1f} GB of memory, here are "
            f"{available_bytes / 1e9:.1f} GB free: take adapters (lora), a shorter window or fewer "
            f"tokens per row (layout pose), more devices; or try all the same (--no-memory-check)"
        )


def _gguf_shapes(path: Path) -> Mapping[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in read_header(path).tensors}


def _hf_shapes(folder: Path) -> Mapping[str, tuple[int, ...]]:
    """Shapes from the header of every safetensors file."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name.startswith("consolidated"):  # Mistral's own file, the same weights again
            continue
        shapes |= {name: shape for name, (_, shape) in read_tensor_types(path).items()}
    return shapes
