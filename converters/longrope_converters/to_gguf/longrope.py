"""Work out the edits that put a LongRopeConfig into an existing file."""

from __future__ import annotations

from collections.abc import Sequence

from longrope_converters.to_gguf.bake import HeaderEdit
from longrope_export.config import LongRopeConfig
from longrope_export.errors import UnsupportedError
from longrope_export.gguf_format import GgufHeader
from longrope_export.gguf_keys import (
    LLAMA3_TENSOR,
    LONG_TENSOR,
    SHORT_TENSOR,
    GgufLongRope,
    encode_config,
)


def edit_for(shards: Sequence[GgufHeader], config: LongRopeConfig | None) -> HeaderEdit:
    """The edit of the first shard that gives a model these factors, whatever it had before.

    Llama 3's rope_freqs.weight makes room for the short factors: stock llama.cpp would prefer it
    to both sets, and refuse the file for a tensor that it did not expect.

    Raises:
        UnsupportedError: the model holds factor tensors where nothing could load or change them.
    """
    if config is None:
        return HeaderEdit()
    _refuse_factors_in_later_shards(shards)
    header = shards[0]
    encoded = encode_config(config, header.architecture)
    _refuse_another_temperature(header, encoded)
    present = {info.name for info in header.tensors}
    if not encoded.tensors and present & {LONG_TENSOR, SHORT_TENSOR}:
        raise UnsupportedError(
            f"{header.path}: architecture {header.architecture} has no place for {LONG_TENSOR} in "
            f"stock llama.cpp, yet the file holds it: bake the file it was made from instead"
        )
    replaced = {name: name for name in encoded.tensors if name in present}
    if encoded.tensors and LLAMA3_TENSOR in present:
        if replaced:
            raise UnsupportedError(
                f"{header.path}: holds {LLAMA3_TENSOR} and {', '.join(replaced)}; stock llama.cpp "
                f"loads no such file, and neither can it be baked"
            )
        replaced[LLAMA3_TENSOR] = SHORT_TENSOR
    return HeaderEdit(encoded.set_keys, encoded.remove_keys, encoded.tensors, replaced)


def _refuse_factors_in_later_shards(shards: Sequence[GgufHeader]) -> None:
    for shard in shards[1:]:
        if {info.name for info in shard.tensors} & {LLAMA3_TENSOR, LONG_TENSOR, SHORT_TENSOR}:
            raise UnsupportedError(
                f"{shard.path}: holds rope factors, which are expected in the first shard: join "
                f"the files with llama-gguf-split --merge first"
            )


def _refuse_another_temperature(header: GgufHeader, encoded: GgufLongRope) -> None:
    """mistral3 counts its attention temperature in units of the original context length."""
    if header.architecture != "mistral3" or not header.arch_get("attention.temperature_scale"):
        return
    name = "mistral3.rope.scaling.original_context_length"
    old = header.get(name, header.arch_get("context_length"))
    new = next((entry.value for entry in encoded.set_keys if entry.key == name), old)
    if new != old:
        raise UnsupportedError(
            f"{header.path}: its attention temperature depends on {name} = {old}, and these "
            f"factors need {new}: make them with a first tier of {old} tokens"
        )
