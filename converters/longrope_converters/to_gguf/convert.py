"""The GGUF exporter: chooses the route from source to file.

- a GGUF: the header is rewritten, the tensor bytes are moved ("bake");
- a Hugging Face folder of a known family: our own streaming writer ("native");
- any other folder: llama.cpp's own converter, then a bake ("stock");
- an outtype beyond f32, f16, bf16 and q8_0: one of the above, then llama-quantize.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longrope_converters.base import ExportReport, Progress
from longrope_converters.to_gguf.bake import HeaderEdit, apply_edit
from longrope_converters.to_gguf.in_place import bake_in_place
from longrope_converters.to_gguf.longrope import add_to_plan, edit_for
from longrope_converters.to_gguf.plan import GgufPlan
from longrope_converters.to_gguf.shards import bake_split, find_shards, shard_outputs
from longrope_export.config import LongRopeConfig
from longrope_export.errors import UnsupportedError
from longrope_export.gguf_format import read_header
from longrope_export.gguf_keys import (
    LLAMA3_TENSOR,
    LONG_TENSOR,
    SHORT_TENSOR,
    has_stock_fields,
)
from longrope_export.honours import Verdict, honours
from longrope_export.models.hf_config import read_hf_config
from longrope_export.models.model import Model, ModelKind
from longrope_export.outputs import check_output, replace_when_done

STREAMED_OUTTYPES = ("f32", "f16", "bf16", "q8_0")
OUTTYPES = (*STREAMED_OUTTYPES, "auto")


@dataclass(frozen=True)
class GgufOptions:
    """How the file is written.

    Attributes:
        outtype: a llama.cpp type name in lower case, "auto" for the source's 16-bit type; None
            keeps the tensors of a GGUF as they are, and means "auto" for a folder.
        pre: name of the BPE pre-tokenizer, where its hash is unknown.
        name: general.name of the output.
        threads: worker threads, None for the number of CPUs up to 8.
        force: replace an existing output.
        in_place: edit the source GGUF itself; not crash-safe.
        trust_remote_code: let llama.cpp's converter run code from the model folder.
    """

    outtype: str | None = None
    pre: str | None = None
    name: str | None = None
    threads: int | None = None
    force: bool = False
    in_place: bool = False
    trust_remote_code: bool = False


class GgufConverter:
    """Converter to GGUF. `check` touches nothing; `convert` writes the output whole or not."""

    def __init__(self, options: GgufOptions | None = None) -> None:
        self.options = options or GgufOptions()

    def check(self, model: Model, config: LongRopeConfig | None) -> None:
        """Refuse what cannot be written.

        Raises:
            UnsupportedError: options that contradict each other or the source.
            ToolError: an outtype that needs llama-quantize, and it is not built.
        """
        options = self.options
        if model.kind is ModelKind.GGUF:
            if config is None and options.outtype is None:
                raise UnsupportedError(
                    f"{model.path}: nothing to do for a GGUF without --factors or --outtype"
                )
            for flag, value in (("--pre", options.pre), ("--model-name", options.name)):
                if value is not None:
                    raise UnsupportedError(f"{flag} is ignored for a GGUF source: leave it out")
            if options.outtype == "auto":
                raise UnsupportedError("--outtype auto is for folders; leave it out for a GGUF")
        if options.in_place and (model.kind is ModelKind.HF or options.outtype):
            raise UnsupportedError(
                "--in-place edits a GGUF source and keeps its tensors as they are"
            )
        quantized = self._quantized_type(model)
        if quantized is not None:
            from longrope_converters.to_gguf.quantize import check_quantizer

            check_quantizer(quantized)

    def convert(
        self, model: Model, config: LongRopeConfig | None, output: Path, progress: Progress
    ) -> ExportReport:
        """Write the file.

        Args:
            config: factors, or None to carry over what the source itself declares.
            output: final name; for split sources the first shard's.

        Raises:
            LongRopeError: see check; or the source is damaged, or the output cannot be written.
        """
        self.check(model, config)
        if config is None and model.has_longrope:
            config = model.native
        if self.options.in_place:
            bake_in_place(model.path, _edit(model.path, config))
            return self._report(model, config, model.path, "in place")
        for path in self.outputs(model, output):
            check_output(path, find_inputs(model), force=self.options.force)
        quantized = self._quantized_type(model)
        if quantized is None:
            route = self._write(model, config, output, self.options.outtype, progress)
        else:
            route = self._write_quantized(model, config, output, quantized, progress)
        return self._report(model, config, output, route)

    def dry_run(self, model: Model, config: LongRopeConfig | None) -> None:
        """Everything of convert but the writing: reads headers, settings and vocabulary.

        Raises:
            LongRopeError: what convert would raise before it writes.
        """
        self.check(model, config)
        if model.kind is ModelKind.GGUF:
            apply_edit(read_header(model.path), _edit(model.path, config))
            return
        from longrope_converters.to_gguf.hf_plan import is_native
        from longrope_converters.to_gguf.stream import plan_layout

        if is_native(read_hf_config(model.path)):
            plan_layout(self._plan(model, config, self.options.outtype))

    def _plan(self, model: Model, config: LongRopeConfig | None, outtype: str | None) -> GgufPlan:
        from longrope_converters.to_gguf.hf_plan import plan_hf_folder

        plan = plan_hf_folder(
            read_hf_config(model.path),
            outtype if outtype in OUTTYPES else "auto",
            pre=self.options.pre,
            name=self.options.name,
            keep_rope_scaling=config is None,
        )
        return plan if config is None else add_to_plan(plan, config)

    def outputs(self, model: Model, output: Path) -> tuple[Path, ...]:
        """Every file that convert writes: one, or as many as the split source has shards."""
        if model.kind is ModelKind.HF or self._quantized_type(model):
            return (output,)
        return shard_outputs(output, len(find_shards(model.path)))

    def _quantized_type(self, model: Model) -> str | None:
        outtype = self.options.outtype
        if outtype is None or (outtype in OUTTYPES and model.kind is ModelKind.HF):
            return None
        return outtype

    def _write(
        self,
        model: Model,
        config: LongRopeConfig | None,
        output: Path,
        outtype: str | None,
        progress: Progress,
    ) -> str:
        if model.kind is ModelKind.GGUF:
            shards = find_shards(model.path)
            outputs = shard_outputs(output, len(shards))
            bake_split(shards, outputs, _edit(model.path, config), progress)
            return "bake"
        # a bake needs none of these, and starts in half the time without them
        from longrope_converters.to_gguf.hf_plan import is_native
        from longrope_converters.to_gguf.stream import write_gguf

        if not is_native(read_hf_config(model.path)):
            return self._write_with_stock(model, config, output, outtype or "auto", progress)
        plan = self._plan(model, config, outtype)
        with replace_when_done(output) as temporary:
            write_gguf(plan, temporary, self.options.threads, progress)
        return "native"

    def _write_with_stock(
        self,
        model: Model,
        config: LongRopeConfig | None,
        output: Path,
        outtype: str,
        progress: Progress,
    ) -> str:
        from longrope_converters.to_gguf.stock import convert_with_stock

        if self.options.pre is not None:
            raise UnsupportedError(
                f"--pre is ignored by llama.cpp's converter, which {model.path} needs: leave it out"
            )
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".longrope-") as folder:
            plain = Path(folder) / "stock.gguf"
            convert_with_stock(
                model.path,
                outtype,
                plain,
                name=self.options.name,
                trust_remote_code=self.options.trust_remote_code,
            )
            if config is None:
                with replace_when_done(output) as temporary:
                    plain.replace(temporary)
            else:
                bake_split([plain], [output], _edit(plain, config), progress)
        return "stock"

    def _write_quantized(
        self,
        model: Model,
        config: LongRopeConfig | None,
        output: Path,
        outtype: str,
        progress: Progress,
    ) -> str:
        from longrope_converters.to_gguf.quantize import quantize

        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".longrope-") as folder:
            full = Path(folder) / "full.gguf"
            source, route = model.path, "bake"
            if model.kind is ModelKind.HF or config is not None:
                route = self._write(model, config, full, None, progress)
                shards = 1 if model.kind is ModelKind.HF else len(find_shards(model.path))
                source = shard_outputs(full, shards)[0]
            with replace_when_done(output) as temporary:
                quantize(source, temporary, outtype, self.options.threads)
        return f"{route}, llama-quantize {outtype}"

    def _report(
        self, model: Model, config: LongRopeConfig | None, output: Path, route: str
    ) -> ExportReport:
        written = output if self.options.in_place else self.outputs(model, output)[0]
        return ExportReport(
            output=written,
            source=model.path,
            format="gguf",
            route=route,
            num_bytes=written.stat().st_size,
            config=config,
            notes=_notes(model, config, read_header(written).architecture),
            honours={} if config is None else honours(config, model),
        )


def _edit(path: Path, config: LongRopeConfig | None) -> HeaderEdit:
    if config is None:
        return HeaderEdit()
    _refuse_factors_in_later_shards(find_shards(path))
    return edit_for(read_header(path), config)


def _refuse_factors_in_later_shards(shards: Sequence[Path]) -> None:
    for shard in shards[1:]:
        names = {info.name for info in read_header(shard).tensors}
        if names & {LLAMA3_TENSOR, LONG_TENSOR, SHORT_TENSOR}:
            raise UnsupportedError(
                f"{shard}: holds rope factors, which are expected in the first shard: join the "
                f"files with llama-gguf-split --merge first"
            )


def find_inputs(model: Model) -> list[Path]:
    """The files that a conversion reads, none of which may be an output."""
    if model.kind is ModelKind.GGUF:
        return list(find_shards(model.path))
    return sorted(path for path in model.path.iterdir() if path.is_file())


def _notes(model: Model, config: LongRopeConfig | None, architecture: str) -> tuple[str, ...]:
    """What a user of an unpatched llama.cpp has to know."""
    if config is None:
        if model.native.provenance.get("method") == "model (dynamic)":
            return (
                "the source's dynamic NTK scaling has no place in a GGUF: the file is unscaled; "
                "make factors with `longrope-export factors dynamic-ntk` and pass --factors",
            )
        return ()
    if not has_stock_fields(architecture):
        return (
            f"stock llama.cpp has no factors for architecture {architecture!r}: it runs this file "
            f"as the base model, unscaled; the keys are for a patched build",
        )
    cells = honours(config, model)["llama.cpp"]
    lost = [
        f"{name}: {cell.note}" for name, cell in cells.items() if cell.verdict is not Verdict.YES
    ]
    return tuple(f"stock llama.cpp, {line}" for line in lost)
