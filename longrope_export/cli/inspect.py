"""`longrope-export inspect`: what a model or a factors file says about RoPE."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longrope_export.cli.common import (
    CONTEXT_SETTINGS,
    factor_options,
    force_option,
    given_factors,
    input_files,
    json_option,
    model_options,
    print_json,
    say,
)

if TYPE_CHECKING:
    from rich.console import Console

    from longrope_export.config import LongRopeConfig
    from longrope_export.models.model import Model

MAX_TIER_ROWS = 12
COLUMN_WIDTH = 25  # of one runtime


@click.command(context_settings=CONTEXT_SETTINGS)
@model_options
@factor_options
@click.option("--plot", type=click.Path(path_type=Path), help="Write the wavelengths as a PNG.")
@click.option("--no-plot", is_flag=True, help="No plot in the terminal.")
@force_option
@json_option
def command(
    model: str,
    revision: str | None,
    local_files_only: bool,
    factors: Path | None,
    tiers: tuple[str, ...],
    plot: Path | None,
    no_plot: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Show a model's RoPE, its tiers, and what each runtime honours.

    MODEL is a Hugging Face folder, a GGUF file, a hub id, or a factors file alone; an ONNX folder
    of ours is read as a factors file.

    \b
    longrope-export inspect model.gguf
    longrope-export inspect model/ --factors f.json --plot wavelengths.png
    longrope-export inspect f.json
    longrope-export inspect model-onnx/
    """
    from longrope_export.errors import FactorFileError
    from longrope_export.factor_files import read_factors, to_json
    from longrope_export.models.model import find_model, load_model
    from longrope_export.onnx_metadata import is_onnx
    from longrope_export.outputs import check_output

    path = find_model(model, revision=revision, local_files_only=local_files_only, weights=False)
    source: Model | None = None
    if path.suffix.lower() == ".json" or is_onnx(path):
        if factors or tiers:
            raise FactorFileError(f"{path} is factors itself: leave out --factors and --tier")
        config = read_factors(path)
    else:
        source = load_model(path)
        config = given_factors(factors, tiers, source) or source.native
    if plot is not None:
        check_output(plot, input_files(path, factors, tiers), force=force)
        from longrope_export.report.wavelengths import write_png

        write_png(config, plot)
        say(f"{plot}: written")
    if as_json:
        print_json(
            {"model": _geometry(source), "config": to_json(config), **_honours(config, source)}
        )
        return
    _print_tables(config, source, show_plot=not no_plot)


def _geometry(model: Model | None) -> dict[str, Any] | None:
    if model is None:
        return None
    return {
        "path": str(model.path),
        "kind": model.kind.value,
        "family": model.family.name,
        "architecture": model.architecture,
        "num_layers": model.num_layers,
        "num_heads": model.num_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "rotary_dim": model.native.rotary_dim,
        "rope_theta": model.native.rope_theta,
        "window": model.window,
        "rope": model.native.provenance.get("method"),
        "fingerprint": model.fingerprint,
    }


def _honours(config: LongRopeConfig, model: Model | None) -> dict[str, Any]:
    from longrope_export.honours import honours

    if model is None:
        return {}
    return {
        "honours": {
            runtime: {name: {"verdict": c.verdict, "note": c.note} for name, c in cells.items()}
            for runtime, cells in honours(config, model).items()
        }
    }


def _print_tables(config: LongRopeConfig, model: Model | None, *, show_plot: bool) -> None:
    from rich.console import Console

    from longrope_export.report.wavelengths import terminal_plot

    console = Console()
    if model is not None:
        _print_geometry(console, model)
    _print_tiers(console, config)
    if show_plot:
        width = min(console.width, 100)
        click.echo(terminal_plot(config, width=width))
    if model is not None:
        print_honours(console, config, model)


def _print_geometry(console: Console, model: Model) -> None:
    from rich.table import Table

    console.print(str(model.path), style="bold", markup=False, soft_wrap=True)
    table = Table(show_header=False)
    values = _geometry(model) or {}
    for name, value in values.items():
        if name not in ("path", "fingerprint"):
            table.add_row(
                name.replace("_", " "), f"{value:g}" if isinstance(value, float) else str(value)
            )
    console.print(table)


def _print_tiers(console: Console, config: LongRopeConfig) -> None:
    from rich.table import Table

    table = Table(
        title=f"{len(config.tiers)} tiers, switch {config.switch}, trained window "
        f"{config.original_max_position_embeddings}",
        title_justify="left",
    )
    for name in (
        "up to tokens",
        "start tokens",
        "attention factor",
        "factors: first",
        "middle",
        "last",
    ):
        table.add_column(name, justify="right")
    tiers = list(config.tiers)
    hidden = len(tiers) - MAX_TIER_ROWS if len(tiers) > MAX_TIER_ROWS + 1 else 0
    for index, tier in enumerate(tiers):
        if hidden > 0 and MAX_TIER_ROWS // 2 <= index < MAX_TIER_ROWS // 2 + hidden:
            if index == MAX_TIER_ROWS // 2:
                table.add_row(f"... {hidden} more", *[""] * 5)
            continue
        factors = tier.rescale_factors
        table.add_row(
            f"{tier.max_length}",
            f"{tier.num_start_tokens}",
            f"{tier.attention_factor:.5g}",
            *(f"{factor:.4g}" for factor in (factors[0], factors[len(factors) // 2], factors[-1])),
        )
    console.print(table)
    if config.logit_scaling is not None:
        scaling = config.logit_scaling
        exempt = ", ".join(map(str, scaling.exempt_layers)) or "none"
        console.print(
            f"queries times ln(position) / ln({scaling.base_length}); exempt layers: {exempt}"
        )


def print_honours(console: Console, config: LongRopeConfig, model: Model) -> None:
    """Tables of fields and runtimes, as many runtimes beside each other as the terminal has room for."""
    from rich.table import Table

    from longrope_export.honours import FIELDS, Verdict, honours

    cells = honours(config, model)
    styles = {Verdict.YES: "green", Verdict.PARTLY: "yellow", Verdict.NO: "red"}
    runtimes = list(cells)
    tables = math.ceil(len(runtimes) / max(2, console.width // COLUMN_WIDTH))
    beside = math.ceil(len(runtimes) / tables)
    title = "What each runtime honours"
    for start in range(0, len(runtimes), beside):
        table = Table(title=title if start == 0 else None, title_justify="left")
        table.add_column("", ratio=1)
        for runtime in runtimes[start : start + beside]:
            table.add_column(runtime, overflow="fold", ratio=1)
        for name in next(iter(cells.values())):
            row = []
            for runtime in runtimes[start : start + beside]:
                cell = cells[runtime][name]
                note = f"\n[dim]{cell.note}[/dim]" if cell.note else ""
                row.append(f"[{styles[cell.verdict]}]{cell.verdict}[/]{note}")
            table.add_row(FIELDS[name], *row)
        console.print(table)
