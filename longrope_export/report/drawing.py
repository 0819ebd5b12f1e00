"""How plots look, and plots as SVG that take a page's colours, or as files."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope_export.errors import ToolError
from longrope_export.outputs import replace_when_done
from longrope_export.report.ours import MADE_BY

COLOURS = ("#3b82c4", "#e07b39", "#2a9d74", "#c65b9b", "#8a7bd1", "#b39b2d", "#5fa8b8", "#a0524f")
_INK = "#010203"  # stands for the colour of the page's text
_DPI = 180


@dataclass(frozen=True)
class Plot:
    """A figure that has not been drawn yet.

    Attributes:
        name: of a file, without its suffix.
        section: of the page: wavelengths, search, training, perplexity, needles, parity.
        title: what it shows.
        draw: makes the matplotlib Figure.
    """

    name: str
    section: str
    title: str
    draw: Callable[[], Any]


def new_figure(size: tuple[float, float], rows: int = 1) -> tuple[Any, Any]:
    """A matplotlib Figure and its axes, one or a column of them with one x axis.

    Args:
        size: inches.

    Raises:
        ToolError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ToolError(
            "PNG plots need matplotlib: pip install 'longrope-export[plots]'"
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, 1, sharex=True)


def as_label(text: str) -> str:
    """A text of files as matplotlib is to show it: dollars are no mathematics."""
    return text.replace("$", r"\$")


def save_png(figure: Any, output: Path) -> None:
    """Write a figure as it is, 150 dpi.

    Raises:
        OutputError: the file cannot be written.
    """
    with replace_when_done(output) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


@contextmanager
def style() -> Iterator[None]:
    """A context in which matplotlib draws as the page looks.

    Raises:
        ToolError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from cycler import cycler
    except ImportError as error:
        raise ToolError("plots need: pip install 'longrope-export[plots]'") from error
    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings: Any = dict.fromkeys(ink, _INK)
    settings |= {
        "axes.prop_cycle": cycler(color=COLOURS),
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": _INK,
        "grid.alpha": 0.15,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "font.size": 9,
        "legend.fontsize": 8,
        "legend.framealpha": 0,
        "legend.edgecolor": "none",
        "lines.linewidth": 1.6,
        "lines.markersize": 4,
        "svg.fonttype": "none",
        "svg.hashsalt": "longrope-export",
    }
    with matplotlib.rc_context(settings):
        yield


def inline_svg(plot: Plot) -> str:
    """The plot as an SVG element for a page: text in the page's colour, transparent, no links out.

    Raises:
        ToolError: matplotlib is not installed.
    """
    with style():
        import matplotlib

        matplotlib.rcParams["svg.hashsalt"] = plot.name  # ids of two plots on a page differ
        buffer = io.StringIO()
        plot.draw().savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text, count=1)  # fmt: skip
    text = text.replace("xlink:href", "href")
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "sans-serif", text)
    text = re.sub(r'id="(figure|axes|patch|line2d|text|matplotlib|xtick|ytick|legend|PathCollection|QuadMesh|LineCollection)[\w.]*"', "", text)  # fmt: skip
    return text.replace(_INK, "currentColor").strip()


def save_plots(plots: Sequence[Plot], folder: Path) -> list[Path]:
    """PNG and SVG of each plot, dark on white.

    Raises:
        ToolError: matplotlib is not installed.
        OutputError: a file cannot be written.
    """
    options: dict[str, Any] = {
        ".png": {"dpi": _DPI, "metadata": {"Software": MADE_BY}},
        ".svg": {"metadata": {"Date": None, "Creator": MADE_BY}},
    }
    for plot in plots:
        for output in plot_files([plot], folder):
            suffix = output.suffix
            with style(), replace_when_done(output) as temporary:
                figure = plot.draw()
                figure.savefig(temporary, format=suffix[1:], facecolor="white", **options[suffix])
    return plot_files(plots, folder)


def plot_files(plots: Sequence[Plot], folder: Path) -> list[Path]:
    """What save_plots writes."""
    return [folder / f"{plot.name}.{suffix}" for plot in plots for suffix in ("png", "svg")]
