"""Perplexity over windows of a text: whole, sliding, and by position in the window.

Sliding windows as LongRoPE, YaRN and Press et al. (arXiv 2108.12409, appendix B) evaluate: windows of
`length` tokens, each `stride` tokens further, of which only those that no window scored before count.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longrope_export.errors import ConfigError
from longrope_export.evaluate.scoring import window_losses
from longrope_export.runtimes.base import Runtime


@dataclass(frozen=True)
class Window:
    """Tokens begin..end of a text (end exclusive), of which the last `scored` count."""

    begin: int
    end: int
    scored: int


def make_windows(
    num_tokens: int, length: int, stride: int, *, num_special: int = 0
) -> list[Window]:
    """Windows that score every token of a text but those with nothing before them in their window.

    With stride = length they lie side by side, and the first token of each is not scored. The last
    window ends with the text, and has `length` tokens too.

    Args:
        num_tokens: of the text, at least `length`.
        length: tokens of a window, at least 2, and more than `num_special`.
        stride: 1 to length.
        num_special: places at the beginning of each window that are not the text's.

    Raises:
        ConfigError: one of them is out of range.
    """
    if not 2 <= length <= num_tokens:
        raise ConfigError(f"a window of {length} tokens does not fit a text of {num_tokens}")
    most = length - max(num_special, 1)
    if most < 1:
        raise ConfigError(
            f"a window of {length} tokens has no room behind the {num_special} special tokens that "
            "begin every text: give longer --lengths"
        )
    if not 1 <= stride <= length:
        raise ConfigError(f"--stride must be 1 to {length}, the length of a window, got {stride}")
    ends = [*range(length, num_tokens, stride), num_tokens]
    windows = [Window(0, length, most)]
    for before, end in itertools.pairwise(ends):
        windows.append(Window(end - length, end, min(end - before, most)))
    return windows


@dataclass(frozen=True)
class Stretch:
    """Scored tokens at positions begin..end of their windows (end exclusive).

    Attributes:
        loss: mean, nats.
        tokens: how many were scored, at least one.
    """

    begin: int
    end: int
    loss: float
    tokens: int


@dataclass(frozen=True)
class TextScore:
    """What a text costs a model at one window length.

    Attributes:
        loss: mean -ln p of the scored tokens, nats.
        standard_error: of it, with tokens taken as independent.
        scored_tokens: how many.
        stretches: by position in the window, rising; stretches without a scored token are left out.
        window_losses: mean of each window.
        seconds, run_tokens: what the runtime took for how many tokens.
    """

    loss: float
    standard_error: float
    scored_tokens: int
    stretches: tuple[Stretch, ...]
    window_losses: tuple[float, ...]
    seconds: float
    run_tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity_of(self.loss)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; `tokens_per_second` and `perplexity` included."""
        return {
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "loss": self.loss,
            "standard_error": self.standard_error,
            "scored_tokens": self.scored_tokens,
            "stretches": [[s.begin, s.end, s.loss, s.tokens] for s in self.stretches],
            "window_losses": list(self.window_losses),
            "seconds": round(self.seconds, 3),
            "tokens_per_second": self.run_tokens / max(self.seconds, 1e-9),
        }


def perplexity_of(loss: float) -> float:
    """exp of a mean loss in nats; infinite where a double cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def score_text(
    runtime: Runtime,
    tokens: Sequence[int],
    length: int,
    *,
    stride: int | None = None,
    beginning: Sequence[int] = (),
    num_stretches: int = 16,
    step: Callable[[int], None] = lambda tokens: None,
) -> TextScore:
    """Run a text through a runtime, window by window.

    Memory does not depend on how many tokens or windows there are, but for one float64 a token.

    Args:
        tokens: (n,) ids, at least `length`.
        length: tokens of a window.
        stride: tokens between windows; None for `length`, windows side by side.
        beginning: special tokens that begin every text. They take the first places of each window,
            as in llama-perplexity, and are not scored.
        num_stretches: into how many parts of equal size a window is cut for `stretches`.
        step: told of every call how many tokens it had.

    Raises:
        ConfigError: length or stride is out of range.
        ModelError: the runtime fails.
    """
    edges = np.linspace(0, length, min(num_stretches, length) + 1).round().astype(int)
    sums, counts = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1, np.int64)
    squares, seconds, run = 0.0, 0.0, 0
    means = []
    count = len(beginning)
    for window in make_windows(len(tokens), length, stride or length, num_special=count):
        inside = [*beginning, *tokens[window.begin + count : window.end]]
        found = window_losses(runtime, inside, window.scored, step=step)
        positions = np.arange(length - window.scored, length)
        places = np.searchsorted(edges, positions, side="right") - 1
        sums += np.bincount(places, found.values, len(sums))
        counts += np.bincount(places, minlength=len(sums))
        squares += float(np.square(found.values).sum())
        means.append(float(found.values.mean()))
        seconds, run = seconds + found.seconds, run + found.tokens
    total = int(counts.sum())
    loss = float(sums.sum()) / total
    variance = max(squares / total - loss * loss, 0.0)
    stretches = tuple(
        Stretch(int(edges[i]), int(edges[i + 1]), float(sums[i] / counts[i]), int(counts[i]))
        for i in range(len(sums))
        if counts[i]
    )
    error = math.sqrt(variance / total)
    return TextScore(loss, error, total, stretches, tuple(means), seconds, run)
