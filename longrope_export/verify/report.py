"""A certificate for people: a terminal table, Markdown for a model card, curves over position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrope_export.errors import OutputError, ToolError
from longrope_export.outputs import replace_when_done

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("case", "tokens", "max |d|", "max KL", "mean KL", "top-1", "result")
SOURCE_WEIGHTS = "the source's"
_WORST = ("max_difference", "max_kl", "mean_kl")  # the columns behind "tokens"
_PLOTS = (".png", ".svg", ".pdf")
_FLOOR = 1e-12  # what a logarithmic axis shows for nothing


def table_rows(export: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Cells as COLUMNS names them: a row for each case of an export, and for each problem."""
    rows: list[tuple[str, ...]] = [
        (
            case["name"],
            str(case["length"]),
            *(_number(case[name]) for name in _WORST),
            f"{case['same_top_token']:.0%}",
            _verdict(case),
        )
        for case in export["cases"]
    ]
    rows += _from_source_rows(export)
    empty = [""] * (len(COLUMNS) - 2)
    return rows + [(" ".join(text.split()), *empty, "wrong") for text in export["problems"]]


def _from_source_rows(export: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row, or none: the largest differences of a quantized export from its source."""
    cases = [case["from_source"] for case in export["cases"] if case.get("from_source")]
    if not cases:
        return []
    top = min(case["same_top_token"] for case in cases)
    columns = [[case[name] for case in cases] for name in _WORST]
    numbers = (_number(None if None in column else max(column)) for column in columns)
    return [("all, from the source's weights", "", *numbers, f"{top:.0%}", "")]


def _number(value: float | None) -> str:
    """Two digits; a certificate has None for what is not finite."""
    return "nan" if value is None else f"{value:.2g}"


def _verdict(case: Mapping[str, Any]) -> str:
    if case["first_miss"] is None:
        return "ok"
    layer = case.get("first_layer")  # certificates of older versions have none
    where = "" if layer is None else f", layer {layer}"
    return f"misses from position {case['first_miss']}{where}"


def title_of(export: Mapping[str, Any]) -> str:
    """The runtime, what it runs and whether all is well, in one line."""
    precision = f", {export['precision']}" if export["precision"] else ""
    verdict = "passed" if export["passed"] else "FAILED"
    return f"{export['runtime']}{precision}, {Path(export['path']).name}: {verdict}"


def rich_tables(certificate: Mapping[str, Any]) -> Iterator[Table]:
    """For a terminal, one for each export."""
    from rich.markup import escape
    from rich.table import Table

    for export in certificate["exports"]:
        color = "green" if export["passed"] else "red"
        title = escape(title_of(export))
        table = Table(title=title, title_style=f"bold {color}", title_justify="left")
        for name in COLUMNS:
            table.add_column(name, justify="left" if name in ("case", "result") else "right")
        rows = table_rows(export)
        for row in rows[: len(rows) - len(export["problems"])]:
            table.add_row(*map(escape, row), style="red" if row[-1].startswith("misses") else None)
        lines = [*filter(None, [_weights(export)]), *export["problems"]]
        table.caption, table.caption_justify = escape("\n".join(lines)), "left"
        yield table


def markdown(certificate: Mapping[str, Any]) -> str:
    """A section for a model card, ending in a newline."""
    config = certificate["config"]
    lines = [
        "## Numerical parity",
        "",
        f"Each export ran {certificate['tokens']['count']} tokens and was compared with the "
        f"definition ({len(config['tiers'])} tiers up to {config['max_position_embeddings']} "
        f"tokens; rule at their borders: {config['switch']}), computed apart from it in float32. "
        "d is the difference of a logit; KL the divergence of the next-token distribution in "
        "nats; top-1 the rows whose likeliest token is the same.",
    ]
    for export in certificate["exports"]:
        lines += [
            "",
            f"### {title_of(export)}",
            "",
            _markdown_row(COLUMNS),
            "|---|" + "---:|" * (len(COLUMNS) - 2) + "---|",
            *map(_markdown_row, table_rows(export)),
            "",
            f"{export['runtime_version']}; {_what_ran(export)}. {_weights(export)}".rstrip(),
        ]
    made = f"{certificate['tool']}, {certificate['created'][:10]}, {certificate['platform']}."
    return "\n".join([*lines, "", made]) + "\n"


def _weights(export: Mapping[str, Any]) -> str:
    """Which weights the reference ran on, unless it was just the source's."""
    weights = export.get("reference_weights", SOURCE_WEIGHTS)
    return "" if weights == SOURCE_WEIGHTS else f"The reference ran on weights: {weights}."


def _what_ran(export: Mapping[str, Any]) -> str:
    if export["sha256"] is not None:
        return f"SHA-256 {export['sha256'][:16]}"
    named = export["log_probabilities"] or "some"
    return f"a server; d is of log probabilities, of {named} tokens in each row"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def check_plot(output: Path) -> None:
    """Refuse a name that no plot can have, before anything is run.

    Raises:
        OutputError: nothing has been written yet.
    """
    if output.suffix.lower() not in ("", *_PLOTS):
        raise OutputError(
            f"--plot {output}: cannot draw {output.suffix} files, expected {', '.join(_PLOTS)}"
        )


def save_plot(certificate: Mapping[str, Any], output: Path) -> None:
    """|difference| and KL of every compared row over its position, a colour for each export.

    Rows whose numbers are not finite are left out.

    Raises:
        ToolError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    figure = draw_differences(certificate)
    with replace_when_done(output) as temporary:
        figure.savefig(temporary, dpi=110, format=output.suffix.lstrip(".") or "png")


def draw_differences(certificate: Mapping[str, Any], size: tuple[float, float] = (10, 7)) -> Any:
    """The matplotlib Figure of save_plot.

    Args:
        size: width and height in inches.

    Raises:
        ToolError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ToolError("plots need: pip install 'longrope-export[plots]'") from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    for number, export in enumerate(certificate["exports"]):
        rows = [row for case in export["cases"] for row in case["rows"] if None not in row]
        if not rows:
            continue
        positions = [row[0] for row in rows]
        label = f"{export['runtime']}, {export['precision']}"
        many = len(rows) > 500  # megabytes in an SVG
        for axes, column in ((above, 2), (below, 3)):
            values = [max(row[column], _FLOOR) for row in rows]
            axes.plot(
                positions, values, ".", color=f"C{number}", label=label, alpha=0.6, rasterized=many
            )
    for axes, title in ((above, "largest |logit difference|"), (below, "KL divergence, nats")):
        axes.set_yscale("log")
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(alpha=0.3)
        for tier in certificate["config"]["tiers"][:12]:
            axes.axvline(tier["max_length"], color="0.6", linewidth=0.8, linestyle=":")
    largest = max(
        (row[0] for e in certificate["exports"] for c in e["cases"] for row in c["rows"]), default=1
    )
    below.set_xlim(-0.02 * largest, 1.02 * largest)
    below.set_xlabel("position of the token; dotted: tier borders")
    above.legend(fontsize=8)
    return figure
