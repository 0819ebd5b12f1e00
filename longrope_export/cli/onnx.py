"""`longrope-export onnx`: a folder for ONNX Runtime and onnxruntime-genai."""

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
@click.option("-o", "--output", type=OUTPUT_PATH, help="Folder to write [beside MODEL].")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8", "int4"]),
    default="fp32",
    show_default=True,
    help="Of the weights; int8 and int4 compute in fp32 around them.",
)
@click.option(
    "--ops",
    type=click.Choice(["genai", "standard"]),
    default="genai",
    show_default=True,
    help="GroupQueryAttention and its kin, or the operators of the ONNX standard alone.",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=1),
    help="Tokens that onnxruntime-genai allocates, which also picks its tier [the target].",
)
@click.option(
    "--accuracy-level",
    type=click.Choice(["0", "4"]),
    default="4",
    show_default=True,
    help="int8 and int4: 4 multiplies with 8-bit activations, 0 in fp32.",
)
@click.option(
    "--embedding-bits",
    type=click.Choice(["4", "8"]),
    default="8",
    show_default=True,
    help="Of embedding and head in int4: 4 is smaller and faster, 8 closer to the model.",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder with tokenizer.json [MODEL; made from the keys of a GGUF].",
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
    precision: str,
    ops: str,
    max_length: int | None,
    accuracy_level: str,
    embedding_bits: str,
    tokenizer: Path | None,
    dry_run: bool,
    verify: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write an ONNX folder with the factors in the graph.

    MODEL is a Hugging Face folder, a GGUF, or a hub id. Without factors, what the source itself
    declares is carried over. The folder holds model.onnx, its weights, genai_config.json, the
    tokenizer, and for tiers under the causal rule rerotate.onnx.

    \b
    longrope-export onnx model/ --factors f.json -o model-onnx
    longrope-export onnx model/ --factors f.json -o model-int4 --precision int4 --max-length 32768
    """
    from longrope_converters.to_onnx.convert import OnnxConverter, OnnxOptions
    from longrope_converters.to_onnx.folder_output import check_folder
    from longrope_export.models.model import find_model, load_model

    check_dry_run(dry_run, verify=verify, as_json=as_json)
    source = load_model(find_model(model, revision=revision, local_files_only=local_files_only))
    config = given_factors(factors, tiers, source, switch)
    resolved = source.path.resolve()
    target = output or resolved.with_name(f"{resolved.name.removesuffix('.gguf')}-onnx")
    options = OnnxOptions(
        precision, ops, max_length, int(accuracy_level), int(embedding_bits), tokenizer, force
    )
    converter = OnnxConverter(options)
    check_folder(target, input_files(source.path, factors, tiers), force=force)
    total = converter.planned_bytes(source, config)
    if dry_run:
        say(f"{target}: would be written from {source.path}, {total:,} bytes of weights")
        return
    with byte_progress(target.name, total) as progress:
        report = converter.convert(source, config, target, progress)
    length = (config or source.native).max_position_embeddings
    say_report(report, length, as_json=as_json)
    if verify:
        from longrope_export.cli.verify import verify_after

        verify_after(source, config, [str(report.output)])
