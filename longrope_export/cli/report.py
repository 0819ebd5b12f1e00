"""`longrope-export report`: what was measured, as a page, as plots, as a model card."""

from __future__ import annotations

from pathlib import Path

import click

from longrope_export.cli.common import (
    CONTEXT_SETTINGS,
    OUTPUT_PATH,
    check_outputs,
    force_option,
    say,
)


@click.command(context_settings=CONTEXT_SETTINGS)
@click.argument(
    "inputs",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path, exists=True),
    metavar="INPUT...",
)
@click.option("-o", "--output", type=OUTPUT_PATH, help="Page to write, HTML.")
@click.option(
    "--plots",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the same plots as PNG and SVG.",
)
@click.option("--model-card", type=OUTPUT_PATH, help="Model card to write, Markdown.")
@click.option("--title", help="Of page and card.")
@click.option("--base-model", help="For the card: hub id of the model that was extended.")
@click.option("--license", "license_", help="For the card: as hubs spell it, apache-2.0.")
@force_option
def command(
    inputs: tuple[Path, ...],
    output: Path | None,
    plots: Path | None,
    model_card: Path | None,
    title: str | None,
    base_model: str | None,
    license_: str | None,
    force: bool,
) -> None:
    """Make an HTML page, plots or a model card of what was measured.

    Each INPUT is results.json of `evaluate`, a certificate of `verify`, a factors file, or the folder
    of a search run. The page needs nothing from elsewhere: no network, no script. What an earlier
    `report` wrote is replaced; --force replaces other files too.

    \b
    longrope-export report results.json certificate.json f.json -o report.html
    longrope-export report run/ results.json --plots plots/ --model-card README.md
    """
    if not (output or plots or model_card):
        raise click.UsageError("nothing to write: give -o, --plots or --model-card")
    if (base_model or license_) and not model_card:
        raise click.UsageError(
            "--base-model and --license are for --model-card, which is not given"
        )
    import os

    from longrope_export.errors import OutputError
    from longrope_export.outputs import write_text
    from longrope_export.report.drawing import plot_files, save_plots
    from longrope_export.report.figures import make_plots
    from longrope_export.report.html import DEFAULT_TITLE, make_page
    from longrope_export.report.inputs import read_inputs
    from longrope_export.report.model_card import make_model_card
    from longrope_export.report.ours import check_ours

    found = read_inputs(inputs)
    read = [file for path in inputs for file in ([path] if path.is_file() else path.iterdir())]
    check_outputs({"-o": output, "--model-card": model_card}, read)
    made = make_plots(found)
    files = {
        "-o": [output] if output else [],
        "--model-card": [model_card] if model_card else [],
        "--plots": plot_files(made, plots) if plots else [],
    }
    check_ours(files, force=force)
    name = title or DEFAULT_TITLE
    page = make_page(found, made, name) if output else None
    images: list[str] = []
    if plots is not None:
        try:
            plots.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"--plots {plots}: cannot make this folder: {error.strerror}; choose another"
            ) from error
        written = save_plots(made, plots)
        say(f"{plots}: {len(written)} files")
        if model_card is not None:
            pngs = [file for file in written if file.suffix == ".png"]
            images = [os.path.relpath(file, model_card.parent) for file in pngs]
    if output is not None and page is not None:
        write_text(output, page)
        say(f"{output}: {len(made)} plots")
    if model_card is not None:
        card = make_model_card(found, name, base_model=base_model, license=license_, images=images)
        write_text(model_card, card)
        say(f"{model_card}")
