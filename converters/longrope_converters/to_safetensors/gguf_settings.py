"""config.json for the model in a GGUF file, and which of its tensors is which.

The table of tensors is to_gguf's, read backwards; gemma2 and gemma3, which are written by
llama.cpp's own converter there, have theirs here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from longrope_converters.to_gguf.checkpoint import name_some
from longrope_converters.to_gguf.families import NATIVE, ExpectedTensor, expected_tensors
from longrope_converters.to_gguf.shards import read_shards
from longrope_export.errors import GgufError, UnsupportedError
from longrope_export.gguf_format import GgufHeader, TensorInfo
from longrope_export.gguf_keys import LLAMA3_TENSOR, LONG_TENSOR, SHORT_TENSOR
from longrope_export.gguf_values import tensor_bytes
from longrope_export.models.hf_config import HfConfig
from longrope_export.models.model import Model, header_of

_FACTOR_TENSORS = {LLAMA3_TENSOR, LONG_TENSOR, SHORT_TENSOR}  # read with the settings
# number of layers by which llama.cpp knows the one size that scales queries in its own way
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file under its name in transformers.

    Attributes:
        path, offset_bytes: where its data lies.
        shape: row major, as in transformers.
        num_heads: its rows are in llama.cpp's interleaved order, within this many groups.
        minus_one: the file holds w + 1 (norms of gemma).
    """

    name: str
    path: Path
    offset_bytes: int
    ggml_type: GGMLQuantizationType
    shape: tuple[int, ...]
    num_heads: int | None = None
    minus_one: bool = False


@dataclass(frozen=True)
class GgufModel:
    """What an export needs of a GGUF: settings without RoPE, and all tensors in file order."""

    header: GgufHeader
    values: dict[str, Any]
    tensors: tuple[GgufTensor, ...]


def read_gguf_model(model: Model) -> GgufModel:
    """Read and check headers; no weights.

    Raises:
        UnsupportedError: an architecture or a quantization that is not known here, tensors that
            a model of this architecture does not have.
        GgufError: missing keys or tensors, shapes that do not fit.
    """
    headers = read_shards(header_of(model))
    header, family = headers[0], model.family.name
    found = {info.name: (file, info) for file in headers for info in file.tensors}
    if header.architecture != family or family not in (*NATIVE, *_GEMMAS) or family == "minicpm":
        known = sorted({*NATIVE, *_GEMMAS} - {"minicpm", "mistral"})
        raise UnsupportedError(
            f"{model.path}: architecture {header.architecture!r} cannot be turned into a folder; "
            f"known are {', '.join(known)}"
        )
    if header.arch_get("expert_count"):
        raise UnsupportedError(f"{model.path}: it is a mixture of experts, which is not known here")
    values = _settings(model, header, set(found))
    config = HfConfig(model.path, model.family, values)
    if family in NATIVE:
        expected = expected_tensors(config, NATIVE[family])
    else:
        expected = dict(_gemma_tensors(config, qk_norm=family == "gemma3"))
    return GgufModel(header, values, tuple(_match(model, found, expected, family in _GEMMAS)))


def _match(
    model: Model,
    found: dict[str, tuple[GgufHeader, TensorInfo]],
    expected: dict[str, ExpectedTensor],
    is_gemma: bool,
) -> Iterator[GgufTensor]:
    names = {entry.gguf_name: name for name, entry in expected.items()}
    missing = [e.gguf_name for e in expected.values() if e.required and e.gguf_name not in found]
    if missing:
        raise GgufError(f"{model.path}: tensors are missing: {name_some(missing)}")
    unknown = [name for name in found if name not in names and name not in _FACTOR_TENSORS]
    if unknown:
        raise UnsupportedError(
            f"{model.path}: a {model.family.name} model has no such tensors: {name_some(unknown)}"
        )
    for gguf_name, (header, info) in found.items():
        if gguf_name in _FACTOR_TENSORS:
            continue
        name = names[gguf_name]
        entry, shape = expected[name], tuple(reversed(info.shape))
        if shape != entry.shape:
            raise GgufError(
                f"{header.path}: tensor {gguf_name} has shape {list(shape)}, expected "
                f"{list(entry.shape)} by the file's own keys"
            )
        yield GgufTensor(
            name,
            header.path,
            header.data_start_bytes + info.offset_bytes,
            _readable_type(header.path, info),
            shape,
            entry.num_heads,
            is_gemma and gguf_name.endswith("norm.weight"),
        )


def _readable_type(path: Path, info: TensorInfo) -> GGMLQuantizationType:
    """The type, if the gguf package can dequantize it: one block of zeros tells."""
    try:
        kind = GGMLQuantizationType(info.ggml_type)
        block = tensor_bytes(info.shape[:1], info.ggml_type) or 0
        dequantize(np.zeros((1, block), np.uint8), kind)
    except (NotImplementedError, ValueError) as error:
        raise UnsupportedError(
            f"{path}: tensor {info.name} is of type {info.ggml_type}, which the gguf package "
            f"cannot dequantize: {error}"
        ) from error
    return kind


def _settings(model: Model, header: GgufHeader, names: set[str]) -> dict[str, Any]:
    """config.json without RoPE, dtype and token ids."""
    family = model.family
    for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        value = header.arch_get(name)
        if isinstance(value, np.ndarray) and len(set(value.tolist())) > 1:
            raise UnsupportedError(
                f"{model.path}: {header.architecture}.{name} differs by layer, which no "
                f"transformers class of this family can say"
            )
    if header.arch_get("attention.value_length", model.head_dim) != model.head_dim:
        raise UnsupportedError(f"{model.path}: values and keys have heads of different sizes")
    vocab = next((i.shape[-1] for i in header.tensors if i.name == "token_embd.weight"), 0)
    if not vocab:
        raise GgufError(f"{model.path}: tensor token_embd.weight is missing")
    add_settings = _FAMILY_SETTINGS.get(family.name)
    return {
        "architectures": [family.hf_architectures[0]],
        "model_type": family.name,
        "hidden_size": _int(header, "embedding_length"),
        "intermediate_size": _int(header, "feed_forward_length"),
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.window,
        "rms_norm_eps": _float(header, "attention.layer_norm_rms_epsilon"),
        "vocab_size": vocab,
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in names,
        **(add_settings(model, header, names) if add_settings else {}),
    }


def _llama(model: Model, header: GgufHeader, names: set[str]) -> dict[str, Any]:
    return {
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
    }


def _granite(model: Model, header: GgufHeader, names: set[str]) -> dict[str, Any]:
    return {
        **_llama(model, header, names),
        "attention_multiplier": _float(header, "attention.scale", model.head_dim**-0.5),
        "embedding_multiplier": _float(header, "embedding_scale", 1.0),
        "residual_multiplier": _float(header, "residual_scale", 1.0),
        "logits_scaling": _float(header, "logit_scale", 1.0),
    }


def _phi3(model: Model, header: GgufHeader, names: set[str]) -> dict[str, Any]:
    return {"sliding_window": header.arch_get("attention.sliding_window") or None}


def _gemma(model: Model, header: GgufHeader, names: set[str]) -> dict[str, Any]:
    name, hidden = header.architecture, _int(header, "embedding_length")
    is_27b = model.num_layers == _GEMMA_27B_LAYERS[name]
    values = {
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": hidden // model.num_heads if is_27b else model.head_dim,
        "sliding_window": _int(header, "attention.sliding_window"),
    }
    if name == "gemma2":
        values["attn_logit_softcapping"] = _float(header, "attn_logit_softcapping", 50.0)
        values["final_logit_softcapping"] = _float(header, "final_logit_softcapping", 30.0)
        return values
    layers = set(model.native.layers or ())
    kinds = ("sliding_attention", "full_attention")
    values["model_type"] = "gemma3_text"
    values["rope_local_base_freq"] = _float(header, "rope.freq_base_swa", 10000.0)
    values["layer_types"] = [kinds[layer in layers] for layer in range(model.num_layers)]
    return values


_GEMMAS = ("gemma2", "gemma3")
_FAMILY_SETTINGS: dict[str, Callable[[Model, GgufHeader, set[str]], dict[str, Any]]] = {
    "llama": _llama,
    "granite": _granite,
    "phi3": _phi3,
    "gemma2": _gemma,
    "gemma3": _gemma,
}


def _gemma_tensors(config: HfConfig, *, qk_norm: bool) -> Iterator[tuple[str, ExpectedTensor]]:
    hidden, inner = config.require_int("hidden_size"), config.require_int("intermediate_size")
    vocab, head_dim = config.require_int("vocab_size"), config.head_dim
    q_rows = config.require_int("num_attention_heads") * head_dim
    kv_rows = config.num_key_value_heads * head_dim
    layer = {
        "input_layernorm": ("attn_norm", (hidden,)),
        "post_attention_layernorm": ("post_attention_norm", (hidden,)),
        "pre_feedforward_layernorm": ("ffn_norm", (hidden,)),
        "post_feedforward_layernorm": ("post_ffw_norm", (hidden,)),
        "self_attn.q_proj": ("attn_q", (q_rows, hidden)),
        "self_attn.k_proj": ("attn_k", (kv_rows, hidden)),
        "self_attn.v_proj": ("attn_v", (kv_rows, hidden)),
        "self_attn.o_proj": ("attn_output", (hidden, q_rows)),
        "mlp.gate_proj": ("ffn_gate", (inner, hidden)),
        "mlp.up_proj": ("ffn_up", (inner, hidden)),
        "mlp.down_proj": ("ffn_down", (hidden, inner)),
    }
    if qk_norm:
        layer["self_attn.q_norm"] = ("attn_q_norm", (head_dim,))
        layer["self_attn.k_norm"] = ("attn_k_norm", (head_dim,))
    yield "model.embed_tokens.weight", ExpectedTensor("token_embd.weight", (vocab, hidden))
    yield "model.norm.weight", ExpectedTensor("output_norm.weight", (hidden,))
    yield "lm_head.weight", ExpectedTensor("output.weight", (vocab, hidden), required=False)
    for block in range(config.require_int("num_hidden_layers")):
        for name, (gguf_name, shape) in layer.items():
            yield (
                f"model.layers.{block}.{name}.weight",
                ExpectedTensor(f"blk.{block}.{gguf_name}.weight", shape),
            )


def _int(header: GgufHeader, name: str) -> int:
    value = header.arch_get(name)
    if isinstance(value, np.ndarray) and len(value):  # one value per layer, all the same
        value = int(value[0])
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise GgufError(
            f"{header.path}: key {header.architecture}.{name} must be a positive integer, "
            f"got {value!r}"
        )
    return value


def _float(header: GgufHeader, name: str, default: float | None = None) -> float:
    """The shortest number that is the file's float32: 1e-05, not 9.999999747378752e-06."""
    value = header.arch_get(name, default)
    if not isinstance(value, float) or not math.isfinite(value):
        raise GgufError(
            f"{header.path}: key {header.architecture}.{name} must be a number, got {value!r}"
        )
    return float(str(np.float32(value)))
