"""Every plot of a report, as a matplotlib figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from longrope_export.evaluate.needle import MULTIKEY, MULTIVALUE, PASSKEY
from longrope_export.evaluate.perplexity import perplexity_of
from longrope_export.evaluate.results import (
    cells_of,
    labels,
    lengths_of,
    pooled_loss,
    pooled_stretches,
)
from longrope_export.evaluate.settings import PERPLEXITY
from longrope_export.report.drawing import COLOURS, Plot, as_label, new_figure
from longrope_export.report.finetune_plots import draw_training
from longrope_export.report.inputs import ReportInputs
from longrope_export.report.search_plots import draw_convergence
from longrope_export.report.wavelengths import draw_wavelengths
from longrope_export.verify.report import draw_differences

_SIZE = (5.6, 3.5)  # inches: at the width of a phone the text is still read


def make_plots(inputs: ReportInputs) -> list[Plot]:
    """All plots that the inputs have data for."""
    plots = []
    for number, (name, config) in enumerate(inputs.configs(), 1):
        draw = partial(draw_wavelengths, config, (_SIZE[0], 5.0))
        plots.append(Plot(f"wavelengths-{number}", "wavelengths", f"Wavelengths, {name}", draw))
    for number, run in enumerate(inputs.searches, 1):
        draw = partial(draw_convergence, run.result, (_SIZE[0], 3.0))
        plots.append(Plot(f"search-{number}", "search", f"Search, {run.name}", draw))
    for number, tuned in enumerate(inputs.finetunes, 1):
        draw = partial(draw_training, tuned.steps, (_SIZE[0], 4.0))
        plots.append(Plot(f"training-{number}", "training", f"Loss, {tuned.name}", draw))
    for number, (_, results) in enumerate(inputs.results, 1):
        plots += _result_plots(results, number)
    for number, (name, certificate) in enumerate(inputs.certificates, 1):
        if any(case["rows"] for export in certificate["exports"] for case in export["cases"]):
            draw = partial(draw_differences, certificate, (_SIZE[0], 4.6))
            title = f"Differences over position, {name}"
            plots.append(Plot(f"parity-{number}", "parity", title, draw))
    return plots


def _result_plots(results: Mapping[str, Any], number: int) -> Iterator[Plot]:
    lengths = lengths_of(results, PERPLEXITY)
    if len(lengths) > 1:
        title, draw = "Perplexity by window length", partial(by_length, results)
        yield Plot(f"perplexity-{number}", "perplexity", title, draw)
    for length in lengths:
        title = f"Perplexity by position in a window of {length:,} tokens"
        draw = partial(by_position, results, length)
        yield Plot(f"position-{length}-{number}", "perplexity", title, draw)
    for place, model in enumerate(labels(results), 1):
        if cells_of(results, PASSKEY, model):
            title = f"Passkey, digits right, {model}"
            draw = partial(_heat_map, results, model)
            yield Plot(f"passkey-{number}-{place}", "needles", title, draw)
    for kind in (MULTIKEY, MULTIVALUE):
        if cells_of(results, kind):
            draw = partial(_found, results, kind)
            yield Plot(f"{kind}-{number}", "needles", f"{kind}, digits right", draw)


def _new_figure(height: float = _SIZE[1]) -> tuple[Any, Any]:
    return new_figure((_SIZE[0], height))


def _length_axis(axes: Any, lengths: list[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [_short(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel(label)


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"


def _perplexity_axis(axes: Any) -> None:
    """Logarithmic where a model falls apart, so that the others are still told apart."""
    from matplotlib.ticker import LogFormatter

    low, high = axes.get_ylim()
    if high > 4 * max(low, 1e-9):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        # within two decades some of the lines between are labelled, within 0.7 all of them
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.7)))
    axes.set_ylabel("perplexity")


def _legend_below(figure: Any) -> None:
    """Where no curve runs through it; a line has room for some 75 characters, 6 of them a handle's."""
    longest = max((len(text) for text in figure.axes[0].get_legend_handles_labels()[1]), default=0)
    figure.legend(loc="outside lower center", ncols=max(1, min(3, 75 // (longest + 6))))


def by_length(results: Mapping[str, Any]) -> Any:
    """Perplexity of every model over the window length; a matplotlib Figure."""
    figure, axes = _new_figure()
    lengths = lengths_of(results, PERPLEXITY)
    for place, model in enumerate(labels(results)):
        points = [
            (length, perplexity_of(pooled_loss(cells)))
            for length in lengths
            if (cells := cells_of(results, PERPLEXITY, model, length))
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=f"C{place}", label=as_label(model))
    _length_axis(axes, lengths, "window, tokens")
    _perplexity_axis(axes)
    _legend_below(figure)
    return figure


def by_position(results: Mapping[str, Any], length: int) -> Any:
    """Perplexity of every model along a window of `length` tokens; a matplotlib Figure."""
    figure, axes = _new_figure()
    for place, model in enumerate(labels(results)):
        stretches = pooled_stretches(cells_of(results, PERPLEXITY, model, length))
        if stretches:
            middles = [(begin + end) / 2 for begin, end, _ in stretches]
            values = [perplexity_of(loss) for _, _, loss in stretches]
            axes.plot(middles, values, ".-", color=f"C{place}", label=as_label(model))
    axes.set_xlim(0, length)
    axes.set_xlabel("position of the token in its window")
    _perplexity_axis(axes)
    _legend_below(figure)
    return figure


def _heat_map(results: Mapping[str, Any], model: str) -> Any:
    cells = cells_of(results, PASSKEY, model)
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    figure, axes = _new_figure(0.9 + 0.36 * len(depths))
    for column, length in enumerate(lengths):
        for row, depth in enumerate(depths):
            here = [c for c in cells if (c["length"], c["depth"]) == (length, depth)]
            if not here:
                continue
            share = sum(c["digits_right"] for c in here) / sum(c["digits"] for c in here)
            axes.add_patch(_square(column, row, share))
            axes.text(column, row, f"{share:.0%}", ha="center", va="center")
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_ylim(len(depths) - 0.5, -0.5)
    axes.set_xticks(range(len(lengths)), [_short(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("prompt, tokens")
    axes.set_ylabel("depth")
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _square(column: int, row: int, share: float) -> Any:
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    colour = to_rgba(COLOURS[2], 0.08 + 0.8 * share)
    return Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, facecolor=colour)


def _found(results: Mapping[str, Any], kind: str) -> Any:
    figure, axes = _new_figure(3.2)
    lengths = lengths_of(results, kind)
    for place, model in enumerate(labels(results)):
        points = [
            (n, sum(c["digits_right"] for c in cells) / sum(c["digits"] for c in cells))
            for n in lengths
            if (cells := cells_of(results, kind, model, n))
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=f"C{place}", label=as_label(model))
    _length_axis(axes, lengths, "prompt, tokens")
    axes.set_ylim(-0.04, 1.04)
    axes.set_ylabel("digits right")
    _legend_below(figure)
    return figure
