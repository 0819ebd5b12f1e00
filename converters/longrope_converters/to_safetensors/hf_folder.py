"""From one Hugging Face folder to another: settings changed, everything else carried along."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope_converters.to_gguf.checkpoint import INDEX_NAME, read_checkpoint
from longrope_converters.to_safetensors.weights import (
    Progress,
    copy_file,
    copy_with_definition,
    link_file,
    read_definition,
)
from longrope_export.hf_runtime.remote_code import FILE_NAME as CODE_FILE
from longrope_export.models.hf_config import read_json_object
from longrope_export.stock_rope import DEFINITION_FILE, DEFINITION_KEY
from longrope_export.verify.certificate import FILE_NAME as CERTIFICATE

# weights in other forms, and their indexes: the safetensors files are the model
_OTHER_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".onnx", ".onnx_data"),
    *(".msgpack", ".h5", ".ot", ".tflite", ".npz"),
)
_CARRIED_FOLDERS = ("additional_chat_templates",)


@dataclass(frozen=True)
class SourceFolder:
    """What a model folder holds.

    Attributes:
        values: config.json as it stands.
        shards: the safetensors files, by name.
        carried: other files to take along, relative to the folder.
        left: what is not taken along, relative to the folder.
    """

    folder: Path
    values: Mapping[str, Any]
    shards: tuple[Path, ...]
    carried: tuple[Path, ...]
    left: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return sum(shard.stat().st_size for shard in self.shards)


def read_source_folder(folder: Path) -> SourceFolder:
    """List and check a folder; only headers are read.

    Raises:
        ModelError: no safetensors weights, a missing or damaged shard, an index that disagrees.
    """
    values = read_json_object(folder / "config.json")
    shards = tuple(sorted({tensor.path for tensor in read_checkpoint(folder).values()}))
    rewritten = {"config.json", DEFINITION_FILE}
    if DEFINITION_KEY in values:
        rewritten.add(CODE_FILE)
    carried: list[Path] = []
    left: list[str] = []
    for path in sorted(folder.iterdir()):
        if path in shards or path.name in rewritten or path.name.startswith("."):
            continue
        if path.is_dir():
            if path.name in _CARRIED_FOLDERS:
                inside = [file for file in sorted(path.iterdir()) if file.is_file()]
                carried += [file.relative_to(folder) for file in inside]
            else:
                left.append(f"{path.name}/")
        elif _is_other_weight(path.name) or path.name == CERTIFICATE or not path.is_file():
            left.append(path.name)
        else:
            carried.append(path.relative_to(folder))
    return SourceFolder(folder, values, shards, tuple(carried), tuple(left))


def foreign_code(values: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json's auto_map names, but for the modelling file of an earlier export of ours."""
    auto_map = values.get("auto_map")
    if not isinstance(auto_map, Mapping):
        return {}
    ours = f"{CODE_FILE.removesuffix('.py')}."
    return {
        name: entry
        for name, entry in auto_map.items()
        if DEFINITION_KEY not in values or not str(entry).startswith(ours)
    }


def copy_weights(
    source: SourceFolder, output: Path, definition: str, *, link: bool, progress: Progress
) -> tuple[str, ...]:
    """Bring the shards into `output`; the definition goes into the first one unless linked.

    A shard that holds another definition is never linked, but copied with the new one. Returns
    notes.
    """
    notes = []
    for number, shard in enumerate(source.shards):
        target = output / shard.name
        held = read_definition(shard)
        is_outdated = held is not None and held != definition
        if link and not is_outdated:
            link_file(shard, target)
            progress(shard.stat().st_size)
        elif number == 0 or is_outdated:
            copy_with_definition(shard, target, definition, progress)
        else:
            copy_file(shard, target, progress)
        if link and is_outdated:
            notes.append(f"{shard.name} is copied, not linked: its metadata held other factors")
    return tuple(notes)


def copy_other_files(source: SourceFolder, output: Path, target_length: int) -> tuple[str, ...]:
    """Tokenizer, templates, generation config, index, code: whatever is small. Returns notes.

    One number changes: a model_max_length in tokenizer_config.json below the target is raised to
    it, since vLLM serves no more than that.
    """
    notes = []
    for name in source.carried:
        path = source.folder / name
        (output / name).parent.mkdir(exist_ok=True)
        if name.name == "tokenizer_config.json":
            settings = read_json_object(path)
            stated = settings.get("model_max_length")
            if isinstance(stated, int | float) and stated < target_length:
                settings["model_max_length"] = target_length
                text = json.dumps(settings, indent=2, ensure_ascii=False)
                (output / name).write_text(text + "\n", encoding="utf-8")
                notes.append(f"{name}: model_max_length is {target_length} now, and was {stated}")
                continue
        copy_file(path, output / name, lambda _: None)
    return tuple(notes)


def _is_other_weight(name: str) -> bool:
    if name.endswith(".index.json"):
        return name != INDEX_NAME
    return any(name.endswith(suffix) for suffix in _OTHER_WEIGHTS)
