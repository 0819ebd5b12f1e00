"""Where the tensors of a Hugging Face folder lie: safetensors headers and the shard index.

Only headers are read. Pickled checkpoints (pytorch_model.bin) are never opened.
"""

from __future__ import annotations

from pathlib import Path

from gguf.utility import SafetensorsLocal
from safetensors import SafetensorError, safe_open

from longrope_converters.to_gguf.plan import SourceTensor
from longrope_export.errors import ModelError
from longrope_export.models.hf_config import read_json_object

INDEX_NAME = "model.safetensors.index.json"
_NAMES_IN_MESSAGE = 5


def read_checkpoint(folder: Path) -> dict[str, SourceTensor]:
    """All tensors of a folder, shard by shard and by name within a shard.

    Raises:
        ModelError: no safetensors file, a missing or damaged shard, an index that does not agree
            with the shards, a tensor that stands in two of them.
    """
    index = _read_index(folder)
    shards = sorted(set(index.values())) if index else _shards_without_index(folder)
    tensors: dict[str, SourceTensor] = {}
    for shard in shards:
        for name, tensor in _read_shard(folder / shard).items():
            if name in tensors:
                raise ModelError(
                    f"{folder}: tensor {name} stands in {tensors[name].path.name} and in {shard}; "
                    "remove the stale file"
                )
            tensors[name] = tensor
    if index:
        _check_index(folder, index, tensors)
    return tensors


def name_some(names: list[str]) -> str:
    """The first few of many names, for a message."""
    shown = ", ".join(names[:_NAMES_IN_MESSAGE])
    hidden = len(names) - _NAMES_IN_MESSAGE
    return f"{shown} and {hidden} more" if hidden > 0 else shown


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX_NAME
    if not path.is_file():
        return {}
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path}: weight_map must be an object that maps tensors to files")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ModelError(
                f"{path}: tensor {name} must name a file of this folder, got {shard!r}"
            )
    return weight_map


def error_without_safetensors(folder: Path) -> ModelError:
    """What to tell about a folder that holds no safetensors file."""
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        return ModelError(
            f"{folder}: only pickled weights (*.bin, *.pth), which can run code when they are "
            "loaded; convert the checkpoint to safetensors first, for example with transformers: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    return ModelError(f"{folder}: no model*.safetensors file and no {INDEX_NAME}")


def _shards_without_index(folder: Path) -> list[str]:
    shards = sorted(path.name for path in folder.glob("model*.safetensors"))
    if not shards:
        raise error_without_safetensors(folder)
    return shards


def _read_shard(path: Path) -> dict[str, SourceTensor]:
    if not path.is_file():
        raise ModelError(
            f"{path}: {INDEX_NAME} names this file but it is missing; download it again"
        )
    try:
        # safe_open checks sizes, offsets and the header's length; it does not tell offsets
        with safe_open(path, framework="numpy"):
            local = SafetensorsLocal(path).tensors
    except (SafetensorError, ValueError, OSError) as error:
        raise ModelError(
            f"{path}: damaged or truncated safetensors file ({error}); download it again"
        ) from error
    return {
        name: SourceTensor(
            path, tensor.data_range.offset, tensor.data_range.size, tensor.dtype, tensor.shape
        )
        for name, tensor in local.items()
    }


def _check_index(folder: Path, index: dict[str, str], tensors: dict[str, SourceTensor]) -> None:
    missing = sorted(set(index) - set(tensors))
    if missing:
        raise ModelError(
            f"{folder}: {INDEX_NAME} lists tensors that no file holds: {name_some(missing)}; "
            f"the first should be in {index[missing[0]]}"
        )
    unlisted = sorted(set(tensors) - set(index))
    if unlisted:
        raise ModelError(
            f"{folder}: files hold tensors that {INDEX_NAME} does not list: {name_some(unlisted)}"
        )
    for name, tensor in tensors.items():
        if tensor.path.name != index[name]:
            raise ModelError(
                f"{folder}: {INDEX_NAME} puts {name} into {index[name]}, "
                f"it is in {tensor.path.name}"
            )
