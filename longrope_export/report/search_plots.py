"""Pictures of a search: how the loss fell, and what was found against the closed forms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longrope_export.config import FactorTier, LongRopeConfig
from longrope_export.report.drawing import as_label, new_figure, save_png

CONVERGENCE = "convergence.png"
FACTORS = "factors.png"
SIZE = (8.0, 4.5)  # inches


def write_search_plots(
    result: Mapping[str, Any], config: LongRopeConfig, forms: Mapping[str, FactorTier], folder: Path
) -> list[Path]:
    """convergence.png and factors.png, 150 dpi.

    Args:
        result: what result.json holds.
        config: what was found.
        forms: closed forms for the same length.

    Raises:
        ToolError: matplotlib is not installed.
        OutputError: a file cannot be written.
    """
    pictures = {CONVERGENCE: draw_convergence(result), FACTORS: _factors(config, forms)}
    for name, figure in pictures.items():
        save_png(figure, folder / name)
    return [folder / name for name in pictures]


def draw_convergence(result: Mapping[str, Any], size: tuple[float, float] = SIZE) -> Any:
    """A figure of the best loss over forward tokens, with the best seeds.

    Args:
        result: what result.json holds.
        size: inches.

    Raises:
        ToolError: matplotlib is not installed.
    """
    figure, axes = new_figure(size)
    history = result["history"]
    phases = list(dict.fromkeys(entry["phase"] for entry in history))
    if phases:
        # a ladder's later phases score other tokens: their losses are no continuation
        shown = [entry for entry in history if entry["phase"] == phases[0]]
        end = result["spent"]["tokens"] if len(phases) == 1 else shown[-1]["tokens"]
        tokens = [*(entry["tokens"] for entry in shown), end]
        losses = [math.exp(entry["loss"]) for entry in shown]
        axes.step(tokens, [*losses, losses[-1]], where="post", lw=2, label="best so far")
    best_seeds = sorted(result["seeds"].items(), key=lambda entry: entry[1])[:4]
    for number, (name, loss) in enumerate(best_seeds):
        axes.axhline(math.exp(loss), color=f"C{number + 1}", lw=1, ls="--", label=as_label(name))
    axes.set(xlabel="forward tokens", ylabel="exp(loss) on the search documents")
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 6))
    if phases or best_seeds:
        axes.legend(fontsize="small")
    axes.set_title(as_label(phases[0]) if phases else "nothing was found within the budget")
    return figure


def _factors(config: LongRopeConfig, forms: Mapping[str, FactorTier]) -> Any:
    figure, axes = new_figure(SIZE)
    pairs = np.arange(config.num_pairs)
    for name, tier in forms.items():
        label = f"{name}, attention factor {tier.attention_factor:.3f}"
        axes.plot(pairs, tier.rescale_factors, lw=1, ls="--", label=label)
    last = config.tiers[-1]
    label = f"searched, attention factor {last.attention_factor:.3f}"
    if last.num_start_tokens:
        label += f", {last.num_start_tokens} start tokens"
    axes.plot(pairs, last.rescale_factors, lw=2, color="black", label=label)
    axes.set(yscale="log", xlabel="pair (0 turns fastest)", ylabel="rescale factor")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_title(f"factors for {config.max_position_embeddings:,} tokens")
    axes.legend(fontsize="small")
    return figure
