"""`longrope-export safetensors`: a Hugging Face folder with the factors in its settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from longrope_export.cli.common import (
    CONTEXT_SETTINGS,
    OUTPUT_PATH,
    byte_progress,
    check_dry_run,
    factor_options,
    force_option,
    given_factors,
    input_files,
    json_option,
    model_options,
    say,
    say_report,
    switch_option,
    verify_option,
)

if TYPE_CHECKING:
    from longrope_converters.to_safetensors.convert import SafetensorsOptions
    from longrope_export.config import LongRopeConfig
    from longrope_export.models.model import Model

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@click.command(context_settings=CONTEXT_SETTINGS)
@model_options
@factor_options
@switch_option
@click.option("-o", "--output", type=OUTPUT_PATH, help="Folder [MODEL-longrope beside MODEL].")
@click.option(
    "--remote-code",
    is_flag=True,
    help="Ship a modelling file that computes the whole config under trust_remote_code=True.",
)
@click.option(
    "--approximate",
    is_flag=True,
    help="Write the nearest stock config, and report what was dropped.",
)
@click.option("--link", is_flag=True, help="Hard-link the weights instead of copying them.")
@click.option(
    "--dtype",
    type=click.Choice(["f32", "f16", "bf16"]),
    help="Of the weights from a GGUF [its own; bf16 if quantized].",
)
@click.option("--max-shard-size", help="Of the weights from a GGUF, as 500MB [5GB].")
@click.option("--threads", type=click.IntRange(min=1), help="Worker threads [CPUs, at most 8].")
@click.option("--dry-run", is_flag=True, help="Check everything, write nothing.")
@verify_option
@force_option
@json_option
def command(
    model: str,
    revision: str | None,
    local_files_only: bool,
    factors: Path | None,
    tiers: tuple[str, ...],
    switch: str | None,
    output: Path | None,
    remote_code: bool,
    approximate: bool,
    link: bool,
    dtype: str | None,
    max_shard_size: str | None,
    threads: int | None,
    dry_run: bool,
    verify: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write a Hugging Face folder that every engine loads.

    MODEL is a Hugging Face folder (weights stay byte for byte), a GGUF (dequantized), or a hub id.
    Without factors, what the source itself declares is carried over.

    \b
    longrope-export safetensors model/ --factors f.json -o model-32k
    longrope-export safetensors model/ --factors ladder.json --remote-code -o model-32k
    longrope-export safetensors model.gguf --dtype bf16 -o model
    """
    from longrope_converters.to_safetensors.convert import SafetensorsConverter, SafetensorsOptions
    from longrope_export.models.hf_config import refuse_quantized
    from longrope_export.models.model import find_model, load_model
    from longrope_export.outputs import check_output_folder
    from longrope_export.stock_rope import DEFINITION_FILE

    check_dry_run(dry_run, verify=verify, as_json=as_json)
    source = load_model(find_model(model, revision=revision, local_files_only=local_files_only))
    if verify:  # a folder's weights are only copied, but then they are computed with
        refuse_quantized(source.path)
    config = given_factors(factors, tiers, source, switch)
    target = (output or _default_output(source.path)).absolute()
    options = SafetensorsOptions(
        remote_code=remote_code,
        approximate=approximate,
        link=link,
        dtype=dtype,
        max_shard_bytes=None if max_shard_size is None else _read_size(max_shard_size),
        threads=threads,
        force=force,
    )
    converter = SafetensorsConverter(options)
    converter.check(source, config)
    inputs = input_files(source.path, factors, tiers)
    check_output_folder(target, inputs, force=force, marker=DEFINITION_FILE)
    if dry_run:
        converter.dry_run(source, config)
        say(f"{target}: would be written from {source.path}")
        return
    with byte_progress(target.name, converter.output_bytes(source)) as progress:
        report = converter.convert(source, config, target, progress)
    length = None if report.config is None else report.config.max_position_embeddings
    say_report(report, length, as_json=as_json)
    if verify:
        _verify(source, config, report.output, options)


def _verify(
    source: Model, config: LongRopeConfig | None, output: Path, options: SafetensorsOptions
) -> None:
    """On what will run the folder: its own modelling file, or our live runtime and stock's class."""
    from longrope_export.cli.verify import verify_after

    if options.remote_code:  # the code that we have just written
        verify_after(source, config, [f"transformers-remote={output}"])
        return
    stock = "transformers-stock"
    several = len((config or source.native).tiers) > 1 and not options.approximate
    if several:
        say(
            "transformers alone keeps cached keys of the tier before when a sequence crosses a border "
            "(docs/safetensors.md): its misses are shown and do not count"
        )
    exports = [f"transformers={output}", f"{stock}={output}"]
    verify_after(source, config, exports, only_shown=[stock] if several else [])


def _default_output(path: Path) -> Path:
    """Beside the source: model/ -> model-longrope/, model.gguf -> model/."""
    if path.is_file():
        return path.with_suffix("")
    resolved = path.resolve()
    return resolved.with_name(f"{resolved.name}-longrope")


def _read_size(text: str) -> int:
    """Bytes of "5GB", "500MB" or a plain number, as transformers' max_shard_size."""
    from longrope_export.errors import OutputError

    digits = text.upper().rstrip("GMKB")
    unit = text.upper()[len(digits) :]
    if not digits.isdecimal() or unit not in _UNITS or int(digits) == 0:
        raise OutputError(f"--max-shard-size {text}: expected a size such as 5GB or 500MB")
    return int(digits) * _UNITS[unit]
