"""The GGUF exporter: chooses the route from source to file.

- a GGUF: the header is rewritten, the tensor bytes are moved ("bake");
- a Hugging Face folder of a known family: our own streaming writer ("native");
- any other folder: llama.cpp's own converter, then a bake ("stock");
- an outtype beyond f32, f16, bf16 and q8_0: one of the above, then llama-quantize.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longrope_converters.base import ExportReport, Progress
from longrope_converters.to_gguf.bake import apply_edit
from longrope_converters.to_gguf.in_place import bake_in_place
from longrope_converters.to_gguf.longrope import edit_for
from longrope_converters.to_gguf.notes import make_notes
from longrope_converters.to_gguf.shards import bake_split, is_own_link, read_shards, shard_outputs
from longrope_export.config import LongRopeConfig
from longrope_export.errors import UnsupportedError
from longrope_export.gguf_format import GgufHeader, read_header
from longrope_export.honours import gguf_architecture, honours
from longrope_export.models.hf_config import read_hf_config
from longrope_export.models.model import Model, ModelKind, check_fits, header_of, load_model
from longrope_export.outputs import check_output, replace_when_done

if TYPE_CHECKING:
    from longrope_converters.to_gguf.plan import GgufPlan

STREAMED_OUTTYPES = ("f32", "f16", "bf16", "q8_0")
OUTTYPES = (*STREAMED_OUTTYPES, "auto")

_ROUTES = {
    "bake": "its header is edited, its tensors stay as they are",
    "native": "a family that is converted here",
    "stock": "converted by llama.cpp's own converter",
}


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
        other_inputs: files besides the model that no output may replace.
    """

    outtype: str | None = None
    pre: str | None = None
    name: str | None = None
    threads: int | None = None
    force: bool = False
    in_place: bool = False
    trust_remote_code: bool = False
    other_inputs: tuple[Path, ...] = ()


class GgufConverter:
    """Converter to GGUF. `check` touches nothing; `convert` writes the output whole or not."""

    def __init__(self, options: GgufOptions | None = None) -> None:
        self.options = options or GgufOptions()

    def check(self, model: Model, config: LongRopeConfig | None) -> None:
        """Refuse what cannot be written, and options that would be ignored.

        Raises:
            UnsupportedError: options that contradict each other or the source.
            ToolError: an outtype that needs llama-quantize, and it is not built.
        """
        options = self.options
        if options.in_place and (model.kind is ModelKind.HF or options.outtype):
            raise UnsupportedError(
                "--in-place edits a GGUF source and keeps its tensors as they are"
            )
        if options.in_place and config is None:
            raise UnsupportedError("--in-place needs factors: give --factors or --tier")
        if model.kind is ModelKind.GGUF:
            if config is None and options.outtype is None:
                raise UnsupportedError(
                    f"{model.path}: nothing to do for a GGUF without --factors or --outtype"
                )
            if options.outtype == "auto":
                raise UnsupportedError("--outtype auto is for folders; leave it out for a GGUF")
        self._refuse_ignored_options(model)
        quantized = self._quantized_type(model)
        if quantized is not None:
            from longrope_converters.to_gguf.quantize import check_quantizer

            check_quantizer(quantized)

    def _refuse_ignored_options(self, model: Model) -> None:
        options, route = self.options, _route(model)
        uses = (
            ("--pre", options.pre, route == "native"),
            ("--model-name", options.name, route != "bake"),
            ("--threads", options.threads, route == "native" or self._quantized_type(model)),
            ("--trust-remote-code", options.trust_remote_code, route == "stock"),
            ("--force", options.force, not options.in_place),
        )
        for flag, value, is_used in uses:
            if value and not is_used:
                raise UnsupportedError(
                    f"{flag} is ignored for {model.path} ({_ROUTES[route]}): leave it out"
                )

    def convert(
        self, model: Model, config: LongRopeConfig | None, output: Path, progress: Progress
    ) -> ExportReport:
        """Write the file.

        Args:
            config: factors, or None to carry over what the source itself declares.
            output: final name; for split sources the first shard's. Not used by an edit in place.

        Raises:
            LongRopeError: see check; or the source is damaged, or the output cannot be written.
        """
        self.check(model, config)
        shards = _shards(model)
        if config is None and model.has_longrope:
            config = model.native
        if self.options.in_place:
            bake_in_place(shards[0], edit_for(shards, config))
            return self._report(model, shards, config, model.path, "in place")
        self._check_outputs(model, shards, output)
        quantized = self._quantized_type(model)
        if quantized is None:
            written, route = self._write(
                model, shards, config, output, self.options.outtype, progress
            )
        else:
            written, route = (
                output,
                self._write_quantized(model, shards, config, output, quantized, progress),
            )
        return self._report(model, shards, config, written, route)

    def dry_run(self, model: Model, config: LongRopeConfig | None, output: Path) -> None:
        """Everything of convert but the writing: reads headers, settings and vocabulary.

        Raises:
            LongRopeError: what convert would raise before it writes.
        """
        self.check(model, config)
        shards = _shards(model)
        if not self.options.in_place:
            self._check_outputs(model, shards, output)
        if shards:
            apply_edit(shards[0], edit_for(shards, config))
        elif _route(model) == "native":
            from longrope_converters.to_gguf.stream import plan_layout

            plan_layout(self._plan(model, config, self.options.outtype))
        else:
            from longrope_converters.to_gguf.stock import check_source

            check_source(model.path)

    def _check_outputs(self, model: Model, shards: Sequence[GgufHeader], output: Path) -> None:
        inputs = [shard.path for shard in shards] or sorted(model.path.iterdir())
        is_split = len(shards) > 1 and self._quantized_type(model) is None
        outputs = shard_outputs(output, len(shards)) if is_split else (output,)
        for number, path in enumerate(outputs):
            if number and self.options.force and is_own_link(path, shards[number]):
                continue
            check_output(path, [*inputs, *self.options.other_inputs], force=self.options.force)

    def _plan(self, model: Model, config: LongRopeConfig | None, outtype: str | None) -> GgufPlan:
        from longrope_converters.to_gguf.hf_plan import plan_hf_folder
        from longrope_converters.to_gguf.plan import add_to_plan

        plan = plan_hf_folder(
            read_hf_config(model.path),
            outtype if outtype in OUTTYPES else "auto",
            pre=self.options.pre,
            name=self.options.name,
            keep_rope_scaling=config is None,
        )
        return plan if config is None else add_to_plan(plan, config)

    def _quantized_type(self, model: Model) -> str | None:
        outtype = self.options.outtype
        if outtype is None or (outtype in OUTTYPES and model.kind is ModelKind.HF):
            return None
        return outtype

    def _write(
        self,
        model: Model,
        shards: Sequence[GgufHeader],
        config: LongRopeConfig | None,
        output: Path,
        outtype: str | None,
        progress: Progress,
    ) -> tuple[Path, str]:
        """Write without llama-quantize; returns the file (the first shard's) and the route."""
        route = _route(model)
        if route == "bake":
            outputs = shard_outputs(output, len(shards))
            bake_split(shards, outputs, edit_for(shards, config), progress)
            return outputs[0], route
        if route == "stock":
            self._write_with_stock(model, config, output, outtype or "auto", progress)
            return output, route
        # a bake needs none of this, and starts sooner without
        from longrope_converters.to_gguf.stream import write_gguf

        plan = self._plan(model, config, outtype)
        with replace_when_done(output) as temporary:
            write_gguf(plan, temporary, self.options.threads, progress)
        return output, route

    def _write_with_stock(
        self,
        model: Model,
        config: LongRopeConfig | None,
        output: Path,
        outtype: str,
        progress: Progress,
    ) -> None:
        from tempfile import TemporaryDirectory

        from longrope_converters.to_gguf.stock import convert_with_stock

        with TemporaryDirectory(dir=output.parent, prefix=".longrope-") as folder:
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
                header = read_header(plain)
                check_fits(config, load_model(plain), "the factors")
                bake_split([header], [output], edit_for([header], config), progress)

    def _write_quantized(
        self,
        model: Model,
        shards: Sequence[GgufHeader],
        config: LongRopeConfig | None,
        output: Path,
        outtype: str,
        progress: Progress,
    ) -> str:
        from tempfile import TemporaryDirectory

        from longrope_converters.to_gguf.quantize import quantize

        with TemporaryDirectory(dir=output.parent, prefix=".longrope-") as folder:
            source, route = model.path, "bake"
            if model.kind is ModelKind.HF or config is not None:
                full = Path(folder) / "full.gguf"
                source, route = self._write(model, shards, config, full, None, progress)
            with replace_when_done(output) as temporary:
                quantize(source, temporary, outtype, self.options.threads)
        return f"{route}, llama-quantize {outtype}"

    def _report(
        self,
        model: Model,
        shards: Sequence[GgufHeader],
        config: LongRopeConfig | None,
        written: Path,
        route: str,
    ) -> ExportReport:
        named = model
        if config is not None and not gguf_architecture(model):
            named = load_model(written)  # llama.cpp's converter has given the architecture a name
        return ExportReport(
            output=written,
            source=model.path,
            format="gguf",
            route=route,
            num_bytes=written.stat().st_size,
            config=config,
            notes=make_notes(named, config, shards[0] if shards else read_header(written)),
            honours={} if config is None else honours(config, named),
        )


def _route(model: Model) -> str:
    """One of _ROUTES: how the tensors get from the source into a GGUF."""
    if model.kind is ModelKind.GGUF:
        return "bake"
    from longrope_converters.to_gguf.hf_plan import is_native

    return "native" if is_native(read_hf_config(model.path)) else "stock"


def _shards(model: Model) -> tuple[GgufHeader, ...]:
    return read_shards(header_of(model)) if model.kind is ModelKind.GGUF else ()
