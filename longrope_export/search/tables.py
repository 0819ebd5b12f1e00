"""What a search reports, as rows of text for terminals and pages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

FORMAT = "longrope-search-result"
HEADER = ("factors", "perplexity", "nats against the baseline", "standard errors")


def test_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """The test documents' table, one row for each set of factors, in the columns of HEADER.

    Args:
        result: what result.json holds.
    """
    for row in result["test"]:
        against = row["against_baseline"]
        if against is None:
            yield str(row["name"]), f"{row['perplexity']:.4f}", "(baseline)", ""
            continue
        error = against["error"]
        certainty = f"{against['mean'] / error:+.1f}" if error else ""
        yield (
            str(row["name"]),
            f"{row['perplexity']:.4f}",
            f"{against['mean']:+.4f}",
            certainty,
        )
