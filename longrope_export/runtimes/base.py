"""One interface over everything that runs a model: token ids in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from longrope_export.config import LongRopeConfig

Tokens = Sequence[int] | npt.NDArray[np.integer[Any]]
Logits = npt.NDArray[np.float32]
Hidden = npt.NDArray[np.float32]

DEFAULT_CHUNK = 1024


@dataclass(frozen=True)
class RuntimeInfo:
    """What a runtime is, for tables and certificates.

    Attributes:
        name: of the program: "llama.cpp, patched".
        version: of that program.
        path: the model that it runs, or the address of a server.
        precision: of the weights and of what is computed around them: fp32, fp16, bf16, q8_0, ...
        switching: when it changes tiers, in a few words.
        log_probabilities: None if its rows are logits. A number for a server: each row is
            computed as the end of a text of its own, and holds natural logarithms of
            probabilities, of so many tokens at most, NaN for the others.
        any_position: a sequence may begin at a position other than 0.
        rows_apart: it hands out the last logits of a call alone, so that all rows but the first of
            those that are kept are computed token by token.
        batches: it computes the sequences of a batch together, not one after the other.
        float32_angles: it multiplies positions and frequencies in float32, which the definition
            allows; far away that shows in the logits.
        longest: tokens of the longest sequence, where that was fixed before.
        process_id: of the program that computes, where it is not this one.
    """

    name: str
    version: str
    path: Path | str
    precision: str
    switching: str
    log_probabilities: int | None = None
    any_position: bool = True
    rows_apart: bool = False
    batches: bool = True
    float32_angles: bool = False
    longest: int | None = None
    process_id: int | None = None


class RunningSequence(Protocol):
    """One sequence with its cache."""

    @property
    def length(self) -> int:
        """Tokens so far."""
        ...

    def append(self, tokens: Tokens, *, keep: int | None = None) -> Logits:
        """Run more tokens behind those before.

        Args:
            tokens: (n,) token ids, at least one.
            keep: the logits of the last `keep` tokens alone; None for all of them.

        Returns:
            (n or keep, vocabulary) float32; row i is about the token after tokens[i].
        """
        ...


class Runtime(Protocol):
    """A loaded model."""

    @property
    def info(self) -> RuntimeInfo:
        """What it is."""
        ...

    @property
    def config(self) -> LongRopeConfig | None:
        """The definition that the export itself carries; None if it carries none."""
        ...

    def start(
        self,
        *,
        declared_length: int | None = None,
        chunk_size: int = DEFAULT_CHUNK,
        first_position: int = 0,
    ) -> RunningSequence:
        """An empty sequence; the one before it may end by this.

        Args:
            declared_length: position behind the last token that the sequence will have in the
                end, for the rule `sequence`.
            chunk_size: most tokens of one call of the runtime.
            first_position: of the first token; nothing lies before it.
        """
        ...

    def batch(self, sequences: Sequence[Tokens], keep: int) -> list[Logits]:
        """Logits of several sequences that are computed together, where the runtime can.

        Returns:
            (keep, vocabulary) float32 for each sequence: of its last tokens.
        """
        ...

    def tokenize(self, text: str) -> list[int] | None:
        """Token ids by the tokenizer that the export carries; None if it carries none."""
        ...

    def detokenize(self, tokens: Tokens) -> str | None:
        """The text of token ids, without special tokens; None without a tokenizer."""
        ...

    def close(self) -> None:
        """Give back what the runtime holds."""
        ...


@runtime_checkable
class TellsLayers(Protocol):
    """A Runtime that can show what happens inside of its model."""

    def layer_outputs(
        self,
        calls: Sequence[Tokens],
        wanted: range,
        *,
        declared_length: int | None = None,
        chunk_size: int = DEFAULT_CHUNK,
        first_position: int = 0,
    ) -> Hidden | None:
        """What each layer hands to the next one, at some tokens of a new sequence.

        Args:
            calls: tokens of one `append` each.
            wanted: indices in the sequence, from 0, of step 1.
            declared_length, chunk_size, first_position: see Runtime.start.

        Returns:
            (layers, len(wanted), width) float32, in front of the last norm; None if this model does not tell.
        """
        ...


class LayerOutputs:
    """Collects what layers hand out, call by call; what is computed again replaces the older.

    Args:
        wanted: indices of tokens in the sequence, of step 1.
    """

    def __init__(self, wanted: range) -> None:
        self.wanted = wanted
        self._layers: dict[int, Hidden] = {}

    def put(self, layer: int, begin: int, outputs: Hidden) -> None:
        """outputs (n, width) of the tokens from index `begin` on."""
        first = max(begin, self.wanted.start)
        stop = min(begin + len(outputs), self.wanted.stop)
        if first < stop:
            shape = (len(self.wanted), outputs.shape[1])
            kept = self._layers.setdefault(layer, np.full(shape, np.nan, np.float32))
            start = self.wanted.start
            kept[first - start : stop - start] = outputs[first - begin : stop - begin]

    def stacked(self) -> Hidden:
        """(layers, len(wanted), width); NaN where nothing came."""
        return np.stack([self._layers[layer] for layer in sorted(self._layers)])
