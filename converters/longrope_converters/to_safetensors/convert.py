"""The safetensors exporter: a Hugging Face folder that every engine loads.

- from a folder: settings are rewritten, weights copied or hard-linked, the rest carried along;
- from a GGUF: weights are dequantized, settings and tokenizer made from its keys.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope_converters.base import ExportReport, Progress
from longrope_converters.to_safetensors.hf_folder import (
    copy_other_files,
    copy_weights,
    foreign_code,
    read_source_folder,
)
from longrope_converters.to_safetensors.notes import rope_notes, source_notes, stock_losses
from longrope_export.config import LongRopeConfig
from longrope_export.definition import dump_factors, to_json
from longrope_export.errors import UnsupportedError
from longrope_export.hf_runtime.remote_code import ARCHITECTURES, modeling_source
from longrope_export.honours import honours
from longrope_export.models.hf_config import read_hf_config
from longrope_export.models.model import Model, ModelKind
from longrope_export.outputs import check_output_folder, replace_folder_when_done
from longrope_export.stock_rope import (
    DEFINITION_FILE,
    DEFINITION_KEY,
    write_stock_rope,
)

DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class SafetensorsOptions:
    """How the folder is written.

    Attributes:
        remote_code: ship a modelling file that computes the whole config (used only by those who
            load with trust_remote_code=True).
        approximate: write the nearest stock config where stock code cannot compute the whole one.
        link: hard-link the weights of a folder instead of copying them.
        dtype: of the weights made from a GGUF; None for the file's own, or bf16 if quantized.
        max_shard_bytes: largest file of weights made from a GGUF; None for 5 GB.
        threads: worker threads for a GGUF, None for the number of CPUs up to 8.
        force: replace an earlier export.
    """

    remote_code: bool = False
    approximate: bool = False
    link: bool = False
    dtype: str | None = None
    max_shard_bytes: int | None = None
    threads: int | None = None
    force: bool = False


class SafetensorsConverter:
    """Converter to a folder. `check` touches nothing; `convert` writes the folder whole or not."""

    def __init__(self, options: SafetensorsOptions | None = None) -> None:
        self.options = options or SafetensorsOptions()

    def check(self, model: Model, config: LongRopeConfig | None) -> None:
        """Refuse what cannot be written.

        Raises:
            UnsupportedError: options that contradict each other or the source, a family that is not
                known here, or a config that stock code cannot compute while neither remote_code
                nor approximate is set.
        """
        options = self.options
        if options.remote_code and options.approximate:
            raise UnsupportedError(
                "--remote-code ships the whole config, --approximate drops a part of it: give one"
            )
        if model.kind is ModelKind.HF:
            if options.dtype is not None:
                raise UnsupportedError(
                    "--dtype is for a GGUF source: the weights of a folder stay byte for byte"
                )
            if options.threads is not None or options.max_shard_bytes is not None:
                raise UnsupportedError(
                    "--threads and --max-shard-size are for a GGUF source: leave them out"
                )
        elif options.link:
            raise UnsupportedError("--link is for folders: the weights of a GGUF are rewritten")
        definition = self._definition(model, config)
        if definition is None:
            if options.remote_code:
                raise UnsupportedError("--remote-code has nothing to compute: no factors are given")
            return
        if not model.family.hf_architectures or not model.family.gguf_architectures:
            raise UnsupportedError(
                f"{model.path}: it is not known here whether {model.architecture!r} in "
                f"transformers applies longrope factors"
            )
        if options.remote_code:
            modeling_source(_architecture(model))
        lost = stock_losses(definition, model)
        if lost and not options.remote_code and not options.approximate:
            fields = "\n".join(f"  {name}: {note}" for name, note in lost.items())
            raise UnsupportedError(
                f"stock transformers cannot compute all of this config:\n{fields}\nChoose "
                f"--remote-code (a modelling file in the folder computes it, for those who load "
                f"with trust_remote_code=True) or --approximate (the nearest stock config)"
            )

    def convert(
        self, model: Model, config: LongRopeConfig | None, output: Path, progress: Progress
    ) -> ExportReport:
        """Write the folder.

        Args:
            config: factors, or None to carry over what the source itself declares.
            output: final name of the folder.

        Raises:
            LongRopeError: see check; or the source is damaged, or the output cannot be written.
        """
        self.check(model, config)
        check_output_folder(output, [model.path], force=self.options.force, marker=DEFINITION_FILE)
        definition = self._definition(model, config)
        if model.kind is ModelKind.GGUF:
            return self._convert_gguf(model, definition, output, progress)
        source = read_source_folder(model.path)
        partial = read_hf_config(model.path).rope.partial_rotary_factor
        with replace_folder_when_done(output) as folder:
            self._write_settings(folder, source.values, partial, definition, model)
            target = (definition or model.native).max_position_embeddings
            notes = copy_other_files(source, folder, target)
            text = _definition_text(definition)
            link = self.options.link
            notes += copy_weights(source, folder, text, link=link, progress=progress)
        route = "linked" if self.options.link else "copied"
        notes = (*notes, *source_notes(source, remote_code=self.options.remote_code))
        return self._report(model, definition, output, route, notes)

    def _convert_gguf(
        self, model: Model, definition: LongRopeConfig | None, output: Path, progress: Progress
    ) -> ExportReport:
        # a folder as source needs neither the gguf package's kernels nor tokenizers
        from longrope_converters.to_safetensors.dequantize import own_dtype, write_weights
        from longrope_converters.to_safetensors.gguf_folder import all_settings, write_small_files
        from longrope_converters.to_safetensors.gguf_settings import read_gguf_model

        source = read_gguf_model(model)
        dtype = self.options.dtype or own_dtype(source.tensors)
        partial = model.native.rotary_dim / model.head_dim
        with replace_folder_when_done(output) as folder:
            values = all_settings(source, model, dtype)
            self._write_settings(folder, values, partial, definition, model)
            target = (definition or model.native).max_position_embeddings
            notes = write_small_files(source.header, folder, target)
            write_weights(
                source.tensors,
                folder,
                dtype,
                definition=_definition_text(definition),
                max_shard_bytes=self.options.max_shard_bytes or DEFAULT_SHARD_BYTES,
                threads=self.options.threads,
                progress=progress,
            )
        return self._report(model, definition, output, f"dequantized to {dtype}", notes)

    def dry_run(self, model: Model, config: LongRopeConfig | None) -> None:
        """Everything of convert but the writing.

        Raises:
            LongRopeError: what convert would raise before it writes.
        """
        self.check(model, config)
        self.output_bytes(model)

    def output_bytes(self, model: Model) -> int:
        """Bytes that convert will report to its progress callback, about; checks the source.

        Raises:
            LongRopeError: weights or settings that are missing, damaged or not known here.
        """
        if model.kind is ModelKind.HF:
            return read_source_folder(model.path).num_bytes
        from longrope_converters.to_safetensors.dequantize import own_dtype
        from longrope_converters.to_safetensors.gguf_settings import read_gguf_model

        tensors = read_gguf_model(model).tensors
        item_bytes = 4 if (self.options.dtype or own_dtype(tensors)) == "f32" else 2
        return item_bytes * sum(math.prod(tensor.shape) for tensor in tensors)

    def _definition(self, model: Model, config: LongRopeConfig | None) -> LongRopeConfig | None:
        """The config to be written, or None for a GGUF that is plain and stays so."""
        if config is not None:
            return config
        tiers = model.native.tiers
        if model.kind is ModelKind.HF:
            if not model.has_longrope:
                raise UnsupportedError(
                    f"{model.path}: nothing to do for a folder without longrope factors: give "
                    f"--factors or --tier"
                )
            return model.native
        return None if len(tiers) == 1 and tiers[0].is_plain else model.native

    def _write_settings(
        self,
        folder: Path,
        values: Mapping[str, Any],
        partial_rotary_factor: float,
        definition: LongRopeConfig | None,
        model: Model,
    ) -> None:
        """config.json, longrope.json, and the modelling file if asked for."""
        replaced = (DEFINITION_KEY, "auto_map")
        settings = {key: value for key, value in values.items() if key not in replaced}
        if code := foreign_code(values):
            settings["auto_map"] = code
        text = json.dumps(settings, indent=2)
        if definition is not None:
            settings = write_stock_rope(
                settings, definition, model.family, model.head_dim, partial_rotary_factor
            )
            if self.options.remote_code:
                settings["auto_map"] = _write_code(folder, _architecture(model))
            # the whole config on one line: a ladder has thousands of numbers
            whole = json.dumps(to_json(definition))
            text = json.dumps(settings, indent=2)[:-2] + f',\n  "{DEFINITION_KEY}": {whole}\n}}'
        # of a plain model too: by this file --force knows a folder of ours
        full = dump_factors(definition or model.native)
        (folder / DEFINITION_FILE).write_text(full, encoding="utf-8")
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")

    def _report(
        self,
        model: Model,
        definition: LongRopeConfig | None,
        output: Path,
        route: str,
        notes: tuple[str, ...],
    ) -> ExportReport:
        if definition is not None:
            notes = (*rope_notes(definition, model, remote_code=self.options.remote_code), *notes)
        return ExportReport(
            output=output,
            source=model.path,
            format="safetensors",
            route=route,
            num_bytes=sum(file.stat().st_size for file in output.rglob("*") if file.is_file()),
            config=definition,
            notes=notes,
            honours={} if definition is None else honours(definition, model),
        )


def _definition_text(definition: LongRopeConfig | None) -> str:
    return "" if definition is None else json.dumps(to_json(definition))


def _architecture(model: Model) -> str:
    """The class in transformers.

    Of the family, where the model names none: a GGUF, and a config.json without `architectures`.
    """
    family = model.family
    only_type = model.architecture == (family.text_model_type or family.name)
    if model.kind is ModelKind.HF and not only_type:
        return model.architecture
    known = (name for name in family.hf_architectures if name in ARCHITECTURES)
    return next(known, family.hf_architectures[0])


def _write_code(folder: Path, architecture: str) -> dict[str, str]:
    """The modelling file, and its entry in auto_map."""
    file_name, class_name, text = modeling_source(architecture)
    (folder / file_name).write_text(text, encoding="utf-8")
    return {"AutoModelForCausalLM": f"{file_name.removesuffix('.py')}.{class_name}"}
