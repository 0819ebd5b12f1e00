"""Plan a GGUF file from a Hugging Face folder, without torch and without transformers.

The result holds what llama.cpp's own converter writes for the same folder, tensor for tensor and
key for key, except for LongRoPE: of that nothing is written here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

from gguf.constants import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    LlamaFileType,
)
from gguf.gguf_writer import GGUFWriter

from longrope_converters.to_gguf.checkpoint import name_some, read_checkpoint
from longrope_converters.to_gguf.families import (
    ExpectedTensor,
    NativeFamily,
    expected_tensors,
    is_ignored,
    native_family,
    reason_against_native,
)
from longrope_converters.to_gguf.hf_keys import (
    add_general_keys,
    add_model_keys,
    collected_key_values,
    rope_tensors,
)
from longrope_converters.to_gguf.plan import GgufPlan, PlannedTensor, SourceTensor
from longrope_converters.to_gguf.vocabulary import add_vocabulary
from longrope_export.errors import ModelError, UnsupportedError
from longrope_export.models.hf_config import HfConfig

logger = logging.getLogger(__name__)

# outtype -> what the file says of itself, type of its matrices
_OUTTYPES = {
    "f32": (LlamaFileType.ALL_F32, GGMLQuantizationType.F32),
    "f16": (LlamaFileType.MOSTLY_F16, GGMLQuantizationType.F16),
    "bf16": (LlamaFileType.MOSTLY_BF16, GGMLQuantizationType.BF16),
    "q8_0": (LlamaFileType.MOSTLY_Q8_0, GGMLQuantizationType.Q8_0),
}
OUTTYPES = (*_OUTTYPES, "auto")
# what a JSON value of another type or shape than expected raises where it is used
_MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_SOURCE_DTYPES = ("BF16", "F16", "F32")


def is_native(config: HfConfig) -> bool:
    """Whether plan_hf_folder knows this kind of model; cheap, no weights are looked at."""
    return reason_against_native(config) is None


def plan_hf_folder(
    config: HfConfig,
    outtype: str,
    *,
    pre: str | None = None,
    name: str | None = None,
    keep_rope_scaling: bool = True,
) -> GgufPlan:
    """Work out keys and tensors of the GGUF file for a model folder.

    Args:
        config: the folder's config.json.
        outtype: "f32", "f16", "bf16", "q8_0", or "auto" for the 16-bit type of the source.
        pre: name of the BPE pre-tokenizer (tokenizer.ggml.pre), where its hash is not known.
        name: general.name; derived from the model card or the folder's name when absent.
        keep_rope_scaling: write the scaling that config.json asks for (linear, yarn, llama3).
            LongRoPE is left out in any case.

    Raises:
        UnsupportedError: see is_native; an unknown pre-tokenizer; a RoPE type or a tensor that
            GGUF has no place for.
        ModelError: missing, damaged or contradictory files.
    """
    if outtype not in OUTTYPES:
        raise UnsupportedError(f"outtype must be one of {', '.join(OUTTYPES)}, got {outtype!r}")
    family = native_family(config)
    _check_head_dim(config, family)
    checkpoint = read_checkpoint(config.folder)
    file_type, matrix_type = _OUTTYPES[_guess_outtype(checkpoint) if outtype == "auto" else outtype]
    generated = rope_tensors(config) if keep_rope_scaling else ()
    tensors = (*generated, *_plan_tensors(config, family, checkpoint, matrix_type))
    _warn_of_other_types(tensors, matrix_type)

    writer = GGUFWriter(path=None, arch=family.gguf_architecture)
    add_general_keys(writer, config, name, sum(math.prod(tensor.shape) for tensor in tensors))
    try:
        add_model_keys(writer, config, file_type, keep_rope_scaling)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        add_vocabulary(writer, config, family, pre)
    except _MALFORMED as error:
        raise ModelError(
            f"{config.folder}: a tokenizer file or {config.path.name} is malformed: {error!r}"
        ) from error
    return GgufPlan(collected_key_values(writer), tensors)


def _warn_of_other_types(
    tensors: tuple[PlannedTensor, ...], matrix_type: GGMLQuantizationType
) -> None:
    others = [
        tensor.name
        for tensor in tensors
        if len(tensor.shape) > 1 and tensor.target_type != matrix_type
    ]
    if others:
        logger.warning(
            "%d tensors stay F16, since their rows are no multiple of the block of %s: %s",
            len(others),
            matrix_type.name,
            name_some(others),
        )


def _guess_outtype(checkpoint: dict[str, SourceTensor]) -> str:
    for tensor in checkpoint.values():
        if len(tensor.shape) >= 2 and tensor.dtype in ("BF16", "F16"):
            return tensor.dtype.lower()
    return "f16"


def _check_head_dim(config: HfConfig, family: NativeFamily) -> None:
    """RoPE turns pairs; and granite and phi3 files have no place for a head_dim of its own."""
    if config.head_dim % 2:
        raise ModelError(f"{config.path}: head_dim must be even, got {config.head_dim}")
    if family.gguf_architecture not in ("granite", "phi3"):
        return
    derived = config.require_int("hidden_size") // config.require_int("num_attention_heads")
    if config.head_dim != derived:
        raise UnsupportedError(
            f"{config.path}: head_dim {config.head_dim} is not hidden_size / num_attention_heads "
            f"= {derived}, which is all that GGUF files of {family.gguf_architecture} can hold"
        )


def _plan_tensors(
    config: HfConfig,
    family: NativeFamily,
    checkpoint: dict[str, SourceTensor],
    matrix_type: GGMLQuantizationType,
) -> Iterator[PlannedTensor]:
    layers = config.require_int("num_hidden_layers")
    if layers > len(checkpoint):
        raise ModelError(
            f"{config.path}: num_hidden_layers is {layers}, but the checkpoint holds "
            f"{len(checkpoint)} tensors"
        )
    expected = expected_tensors(config, family)
    present = {name: tensor for name, tensor in checkpoint.items() if not is_ignored(name)}
    _check_complete(config, expected, present)
    for name, tensor in present.items():
        entry = expected[name]
        _check_tensor(name, entry, tensor)
        target_type = _target_type(entry, tensor, matrix_type)
        yield PlannedTensor(entry.gguf_name, tensor, target_type, entry.num_heads)


def _check_complete(
    config: HfConfig, expected: dict[str, ExpectedTensor], present: dict[str, SourceTensor]
) -> None:
    missing = [name for name, entry in expected.items() if entry.required and name not in present]
    if missing:
        raise ModelError(
            f"{config.folder}: tensors that {config.path.name} asks for are missing: "
            f"{name_some(missing)}"
        )
    unknown = [name for name in present if name not in expected]
    if unknown:
        raise UnsupportedError(
            f"{config.folder}: a {config.family.name} model has no such tensors: "
            f"{name_some(unknown)}"
        )


def _check_tensor(name: str, entry: ExpectedTensor, tensor: SourceTensor) -> None:
    if tensor.dtype not in _SOURCE_DTYPES:
        raise ModelError(
            f"{tensor.path}: tensor {name} has dtype {tensor.dtype}, expected one of "
            f"{', '.join(_SOURCE_DTYPES)}; save the model in one of these first"
        )
    if tensor.shape != entry.shape:
        raise ModelError(
            f"{tensor.path}: tensor {name} must have shape {list(entry.shape)} by config.json, "
            f"got {list(tensor.shape)}"
        )


def _target_type(
    entry: ExpectedTensor, tensor: SourceTensor, matrix_type: GGMLQuantizationType
) -> GGMLQuantizationType:
    if len(tensor.shape) == 1:
        return GGMLQuantizationType.F32
    block_size, _ = GGML_QUANT_SIZES[matrix_type]
    return matrix_type if tensor.shape[-1] % block_size == 0 else GGMLQuantizationType.F16
