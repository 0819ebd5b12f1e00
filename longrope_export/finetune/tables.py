"""The result of a fine-tune as a table: both rules, before and after, on text and on needles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from longrope_export.evaluate.results import number

FORMAT = "longrope-finetune"
HEADER = ("rule", "perplexity", "by stretch of the window", "needles", "needle digits right")


def rule_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Cells of each measured row of a result.json.

    Args:
        result: with "before" and "after", each by rule.
    """
    for when in ("before", "after"):
        for switch, row in result[when].items():
            found = row["needle_tokens"]
            yield (
                f"{switch}, {when}",
                number(row["perplexity"]),
                _short(row["stretches"]),
                f"{row['needle_loss']:.3f} nats" if found else "-",
                f"{row['needle_hits']} of {found}" if found else "-",
            )


def _short(stretches: Sequence[float], most: int = 4) -> str:
    """A few stretches, the first and the last among them."""
    step = max(1, -(-(len(stretches) - 1) // (most - 1)))
    shown = [*stretches[:-1:step], stretches[-1]]
    return " ".join(map(number, shown))


def words(result: Mapping[str, Any]) -> str:
    """What was trained, in one sentence."""
    recipe = result["recipe"]
    return (
        f"Recipe {recipe['name']}: {result['steps']} steps of {recipe['batch_size']} rows, "
        f"{result['tokens']:,} tokens, rule {recipe['rule']}, "
        + (f"adapters of rank {recipe['lora_rank']}" if recipe["lora_rank"] else "all weights")
        + f"; loss {result['first_loss']:.3f} at the first step, {result['last_loss']:.3f} at the last."
    )
