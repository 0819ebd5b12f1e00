"""The ONNX exporter: a folder with model.onnx, its data, rerotate.onnx and the genai files."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrope_converters.base import ExportReport, Progress
from longrope_converters.to_onnx.folder_output import check_folder
from longrope_export import __version__
from longrope_export.config import LongRopeConfig, SwitchPolicy
from longrope_export.errors import ToolError, UnsupportedError
from longrope_export.factor_files import to_json
from longrope_export.honours import honours
from longrope_export.models.model import Model, ModelKind
from longrope_export.outputs import replace_folder_when_done

if TYPE_CHECKING:
    from longrope_converters.to_onnx.description import Decoder
    from longrope_converters.to_onnx.graph import Graph
    from longrope_converters.to_onnx.source import Source


@dataclass(frozen=True)
class OnnxOptions:
    """How the folder is written.

    Attributes:
        precision: "fp32", "fp16", "int8" or "int4".
        ops: "genai" (GroupQueryAttention) or "standard" (opset 23 alone).
        max_length: tokens that onnxruntime-genai allocates its cache for; None for the target.
        accuracy_level: of MatMulNBits (int8, int4): 0 computes in fp32, 4 with int8 activations.
        embedding_bits: of embedding and head in int4; int8 has 8.
        tokenizer: folder of the tokenizer's files; None for the source's own.
        force: replace an existing export.
    """

    precision: str = "fp32"
    ops: str = "genai"
    max_length: int | None = None
    accuracy_level: int = 4
    embedding_bits: int = 8
    tokenizer: Path | None = None
    force: bool = False


class OnnxConverter:
    """Converter to ONNX. `check` touches nothing; `convert` writes the folder whole or not."""

    def __init__(self, options: OnnxOptions | None = None) -> None:
        self.options = options or OnnxOptions()

    def check(self, model: Model, config: LongRopeConfig | None) -> None:
        """Refuse what cannot be written, by building the graph without reading a weight.

        Raises:
            UnsupportedError: a family, a field or an option that the exporter does not know.
            ModelError: the checkpoint does not hold what its settings promise.
            ToolError: a package of the `onnx` extra is missing.
        """
        self._build(model, config or model.native)

    def planned_bytes(self, model: Model, config: LongRopeConfig | None) -> int:
        """Size of the weights that `convert` will write, in bytes; raises what `check` does."""
        plan = self._build(model, config or model.native)
        return sum(tensor.num_bytes for tensor in plan.graph.tensors)

    def convert(
        self, model: Model, config: LongRopeConfig | None, output: Path, progress: Progress
    ) -> ExportReport:
        """Write the folder.

        Args:
            config: factors, or None for what the source itself declares.
            output: name of the folder.

        Raises:
            LongRopeError: see check; or the source is damaged, or the output cannot be written.
        """
        from longrope_converters.to_onnx.genai import (
            genai_notes,
            write_tokenizer_files,
        )
        from longrope_converters.to_onnx.graph import DATA_NAME
        from longrope_converters.to_onnx.weights import write_data

        rope = config or model.native
        check_folder(output, find_inputs(model), force=self.options.force)
        plan = self._build(model, rope)
        metadata = self._metadata(model, rope)
        max_length = self.options.max_length or rope.max_position_embeddings
        with replace_folder_when_done(output) as folder:
            write_data(plan.graph.tensors, folder / DATA_NAME, progress)
            plan.graph.save(folder / "model.onnx", metadata)
            if plan.rerotation is not None:
                plan.rerotation.save(folder / "rerotate.onnx", metadata)
            text = json.dumps(plan.genai, indent=2)
            (folder / "genai_config.json").write_text(text, encoding="utf-8")
            tokenizer_notes = write_tokenizer_files(
                plan.source, folder, rope.max_position_embeddings
            )
            num_bytes = sum(path.stat().st_size for path in folder.iterdir())
        notes = genai_notes(
            plan.decoder, rope, self.options.ops, max_length, plan.graph.dtype.itemsize
        )
        return ExportReport(
            output=output,
            source=model.path,
            format="onnx",
            route=f"{self.options.precision}, {self.options.ops}",
            num_bytes=num_bytes,
            config=rope,
            notes=notes + tokenizer_notes,
            honours=honours(rope, model),
        )

    def _build(self, model: Model, rope: LongRopeConfig) -> _Plan:
        require_packages()
        from longrope_converters.to_onnx.decoder import GraphOptions, build_decoder
        from longrope_converters.to_onnx.families import describe
        from longrope_converters.to_onnx.genai import genai_config
        from longrope_converters.to_onnx.rerotate import build_rerotation
        from longrope_converters.to_onnx.source import open_source

        length = self.options.max_length
        if length is not None and length > rope.max_position_embeddings:
            raise UnsupportedError(
                f"--max-length {length} is beyond the factors' target of "
                f"{rope.max_position_embeddings} tokens"
            )
        if self.options.embedding_bits != 8 and self.options.precision != "int4":
            raise UnsupportedError(
                f"--embedding-bits {self.options.embedding_bits} is for --precision int4, "
                f"not {self.options.precision}"
            )
        source = open_source(model)
        if self.options.tokenizer is not None:
            source = replace(source, tokenizer=self.options.tokenizer)
        decoder = describe(source.settings)
        # a cache of standard operators has no spare room, so its capacity cannot tell a length
        pinned = length or rope.max_position_embeddings if self.options.ops == "standard" else 0
        options = GraphOptions(
            self.options.precision,
            self.options.ops,
            pinned,
            self.options.accuracy_level,
            self.options.embedding_bits,
        )
        graph = build_decoder(decoder, rope, source.weights, options)
        rerotation = None
        if rope.switch is SwitchPolicy.CAUSAL and len(rope.tiers) > 1:
            rerotation = build_rerotation(decoder, rope, graph.dtype)
        maximum = length or rope.max_position_embeddings
        genai = genai_config(source, decoder, rope, self.options.ops, maximum)
        return _Plan(source, decoder, graph, rerotation, genai)

    def _metadata(self, model: Model, rope: LongRopeConfig) -> dict[str, str]:
        """What model.onnx says of itself; longrope.config is a whole factors file."""
        return {
            "longrope.config": json.dumps(to_json(rope)),
            "longrope.ops": self.options.ops,
            "longrope.precision": self.options.precision,
            "longrope.family": model.family.name,
            "longrope.model_fingerprint": model.fingerprint,
            "longrope.tool_version": __version__,
        }


@dataclass(frozen=True)
class _Plan:
    source: Source
    decoder: Decoder
    graph: Graph
    rerotation: Graph | None
    genai: dict[str, Any]


def require_packages() -> None:
    """Refuse to go on without the `onnx` extra.

    Raises:
        ToolError: with the pip line.
    """
    try:
        import onnx_ir  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ToolError(
            f"the ONNX exporter needs {error.name}: pip install 'longrope-export[onnx]'"
        ) from error


def find_inputs(model: Model) -> list[Path]:
    """The files that an export reads, none of which may be inside the output."""
    if model.kind is ModelKind.GGUF:
        return [model.path]
    return [model.path, *sorted(path for path in model.path.iterdir() if path.is_file())]
