"""Wavelengths of every pair against the windows: in the terminal and as a picture.

A pair whose wavelength is longer than the trained window has been seen over a part of its turn
only; that is where a longer context goes wrong, and what the factors have to mend.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from longrope_export.config import FactorTier, LongRopeConfig
from longrope_export.report.drawing import new_figure, save_png
from longrope_export.rope import FloatArray, compute_inv_freq, compute_wavelengths

MAX_CURVES = 6


def original_wavelengths(config: LongRopeConfig) -> FloatArray:
    """(pairs,) tokens per turn of the plain base."""
    return compute_wavelengths(compute_inv_freq(config.rope_theta, config.rotary_dim))


def tier_wavelengths(config: LongRopeConfig, tier: FactorTier) -> FloatArray:
    """(pairs,) tokens per turn behind the start-token window."""
    return original_wavelengths(config) * np.asarray(tier.rescale_factors, dtype=np.float64)


def shown_tiers(config: LongRopeConfig) -> list[FactorTier]:
    """At most MAX_CURVES tiers of a ladder, evenly chosen, first and last included."""
    count = min(MAX_CURVES, len(config.tiers))
    chosen = np.unique(np.linspace(0, len(config.tiers) - 1, count).round().astype(int))
    return [config.tiers[index] for index in chosen]


def terminal_plot(config: LongRopeConfig, width: int = 90, rows: int = 32) -> str:
    """The wavelengths as text: one line per pair, tokens per turn to the right on a log scale.

    Args:
        width: columns of the terminal.
        rows: at most so many pairs are shown, evenly chosen.
    """
    plain, last = original_wavelengths(config), tier_wavelengths(config, config.tiers[-1])
    label_width = 26
    axis = width - label_width
    low, high = np.log(min(plain.min(), last.min())), np.log(max(plain.max(), last.max()))

    def column(tokens: float) -> int:
        return int(np.clip(round((np.log(tokens) - low) / (high - low) * (axis - 1)), 0, axis - 1))

    window = config.original_max_position_embeddings
    target = config.max_position_embeddings
    lines = [f"{'pair':>4} {'plain':>9} {'last tier':>9}  tokens per turn, log scale"]
    chosen = np.linspace(0, config.num_pairs - 1, min(rows, config.num_pairs)).round().astype(int)
    for pair in np.unique(chosen):
        marks = [" "] * axis
        marks[column(window)], marks[column(target)] = "\u250a", ":"
        start, end = sorted((column(plain[pair]), column(last[pair])))
        marks[start:end] = "\u2500" * (end - start)
        marks[column(last[pair])], marks[column(plain[pair])] = "\u25cf", "\u25cb"
        label = f"{pair:>4} {plain[pair]:>9.4g} {last[pair]:>9.4g}  "
        lines.append(label + "".join(marks).rstrip())
    lines.append(
        f"\u25cb plain RoPE   \u25cf up to {target} tokens   \u250a trained window {window}   : target {target}"
    )
    return "\n".join(lines)


def write_png(config: LongRopeConfig, output: Path) -> None:
    """Wavelengths (above) and factors (below) of up to six tiers, 150 dpi.

    Raises:
        ToolError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    save_png(draw_wavelengths(config), output)


def draw_wavelengths(config: LongRopeConfig, size: tuple[float, float] = (8, 7)) -> Any:
    """The matplotlib Figure of write_png.

    Args:
        size: width and height in inches.

    Raises:
        ToolError: matplotlib is not installed.
    """
    figure, (above, below) = new_figure(size, rows=2)
    from matplotlib import rcParams

    ink = rcParams["text.color"]
    pairs = np.arange(config.num_pairs)
    above.plot(pairs, original_wavelengths(config), color="0.6", lw=4, label="plain RoPE")
    for tier in shown_tiers(config):
        label = f"up to {tier.max_length:,} tokens"
        above.plot(pairs, tier_wavelengths(config, tier), label=label)
        below.plot(pairs, tier.rescale_factors, label=label)
    for length, name, style in (
        (config.original_max_position_embeddings, "trained window", "--"),
        (config.max_position_embeddings, "target", ":"),
    ):
        above.axhline(length, color=ink, lw=1, ls=style)
        above.annotate(f"{name} {length:,}", (0, length), (0, 3), textcoords="offset points")
    above.set(yscale="log", ylabel="tokens per turn")
    below.set(xlabel="pair (0 turns fastest)", ylabel="rescale factor")
    above.legend(fontsize="small")
    above.set_title(
        f"rope_theta {config.rope_theta:g}, tiers: {len(config.tiers)}, switch {config.switch}"
    )
    return figure
