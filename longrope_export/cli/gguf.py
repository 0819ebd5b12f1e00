"""`longrope-export gguf`: a GGUF with the factors baked in."""

from __future__ import annotations

from pathlib import Path

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


@click.command(context_settings=CONTEXT_SETTINGS)
@model_options
@factor_options
@switch_option
@click.option(
    "-o",
    "--output",
    type=OUTPUT_PATH,
    help="GGUF file [beside MODEL; for a hub id in the current folder].",
)
@click.option(
    "--outtype",
    type=str.lower,
    help="f32, f16, bf16, q8_0, auto, or any type of llama-quantize (q4_k_m ...). "
    "[folder: auto; GGUF: tensors stay as they are]",
)
@click.option("--pre", help="Name of the BPE pre-tokenizer, where its hash is unknown.")
@click.option("--model-name", "name", help="general.name of the output.")
@click.option("--threads", type=click.IntRange(min=1), help="Worker threads [CPUs, at most 8].")
@click.option(
    "--in-place",
    is_flag=True,
    help="Edit the GGUF MODEL itself: fast, no second copy, but not safe against a crash.",
)
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Let llama.cpp's converter run code from the model folder (other architectures only).",
)
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
    outtype: str | None,
    pre: str | None,
    name: str | None,
    threads: int | None,
    in_place: bool,
    trust_remote_code: bool,
    dry_run: bool,
    verify: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write a GGUF with the factors baked in.

    MODEL is a Hugging Face folder, a GGUF (only its header is rewritten, tensors stay byte for
    byte), or a hub id. Without factors, what the source itself declares is carried over.

    \b
    longrope-export gguf model/ --factors f.json -o model.gguf --outtype q8_0
    longrope-export gguf model.gguf --factors f.json -o model-32k.gguf
    longrope-export gguf model.gguf --factors f.json --in-place
    longrope-export gguf model/ --tier 4096=4k.csv --tier 131072=128k.csv -o model.gguf
    """
    from longrope_converters.to_gguf.convert import GgufConverter, GgufOptions
    from longrope_export.errors import UnsupportedError
    from longrope_export.models.hf_config import refuse_quantized
    from longrope_export.models.model import ModelKind, find_model, load_model

    check_dry_run(dry_run, verify=verify, as_json=as_json)
    source = load_model(find_model(model, revision=revision, local_files_only=local_files_only))
    if verify:  # the export is compared with the source's own weights
        refuse_quantized(source.path)
    config = given_factors(factors, tiers, source, switch)
    if in_place and output is not None:
        raise UnsupportedError("--in-place writes to MODEL itself: leave out -o")
    target = output or _default_output(model, outtype, is_file=source.kind is ModelKind.GGUF)
    converter = GgufConverter(
        GgufOptions(
            outtype=outtype,
            pre=pre,
            name=name,
            threads=threads,
            force=force,
            in_place=in_place,
            trust_remote_code=trust_remote_code,
            other_inputs=tuple(input_files(source.path, factors, tiers)),
        )
    )
    if dry_run:
        converter.dry_run(source, config, target)
        say(f"{source.path if in_place else target}: would be written from {source.path}")
        return
    total = _source_bytes(source.path)
    with byte_progress(target.name, total) as progress:
        report = converter.convert(source, config, target, progress)
    length = None if config is None else config.max_position_embeddings
    say_report(report, length, as_json=as_json)
    if verify:
        from longrope_export.cli.verify import verify_after

        verify_after(source, config, [str(report.output)])


def _default_output(model: str, outtype: str | None, *, is_file: bool) -> Path:
    """model.gguf -> model-longrope.gguf, folder -> folder/../folder-TYPE.gguf, both beside the source.

    A hub id has no place of its own: owner/name -> name-TYPE.gguf in the current folder.
    """
    path = Path(model)
    if is_file:
        return path.with_name(f"{path.stem}-{outtype or 'longrope'}.gguf")
    if not path.exists():
        return Path(f"{path.name}-{outtype or 'auto'}.gguf")
    resolved = path.resolve()
    return resolved.parent / f"{resolved.name}-{outtype or 'auto'}.gguf"


def _source_bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(shard.stat().st_size for shard in path.glob("*.safetensors"))
