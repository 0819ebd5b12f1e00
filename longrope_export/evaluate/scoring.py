"""Losses and greedy tokens from the rows of any runtime; never a row for every token at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from longrope_export.errors import ModelError
from longrope_export.runtimes.base import Logits, RunningSequence, Runtime
from longrope_export.verify.compare import Floats, log_softmax

READ_CHUNK = 512  # tokens of a call: fewer cost time, since transformers repeats the cache in each
_FIRST_CHUNK = 128  # of a call whose rows are looked at, before their width is known
_ROW_BYTES = 128 << 20  # of all rows that one call hands out
_BLOCK = 16  # rows that are held in float64


@dataclass(frozen=True)
class Losses:
    """-ln p of some tokens.

    Attributes:
        values: (count,) nats.
        seconds: that the runtime took; what is done with its rows is not counted.
        tokens: that the runtime was handed.
    """

    values: Floats
    seconds: float
    tokens: int


def window_losses(
    runtime: Runtime,
    tokens: Sequence[int],
    count: int,
    *,
    declared_length: int | None = None,
    step: Callable[[int], None] = lambda tokens: None,
) -> Losses:
    """The losses of the last `count` tokens of a window, each given all before it in the window.

    Args:
        runtime: gets the tokens from position 0 on, at most READ_CHUNK in a call.
        tokens: (length,) ids, at least two.
        count: 1 to length - 1: nothing comes before the first token.
        declared_length: of the sequence, for the rule `sequence`; None for that of the window. The
            last token is scored and not run.
        step: told how many tokens each call had.

    Raises:
        ModelError: logits that are not numbers; a server did not name a token's probability.
    """
    sequence = runtime.start(declared_length=declared_length or len(tokens), chunk_size=READ_CHUNK)
    are_logits = runtime.info.log_probabilities is None
    first = len(tokens) - 1 - count  # row of the first scored token
    values = []
    seconds = 0.0
    position, chunk = 0, _FIRST_CHUNK
    while position < len(tokens) - 1:
        scored = position >= first
        end = (
            min(position + chunk, len(tokens) - 1) if scored else min(position + READ_CHUNK, first)
        )
        begun = time.perf_counter()
        rows = sequence.append(tokens[position:end], keep=None if scored else 1)
        seconds += time.perf_counter() - begun
        if scored:
            chunk = max(1, min(READ_CHUNK, _ROW_BYTES // rows[0].nbytes))
            values.append(_losses(rows, tokens[position + 1 : end + 1], are_logits))
        step(end - position)
        position = end
    found = np.concatenate(values)
    if np.isnan(found).any():
        if are_logits:
            raise _not_numbers(runtime, first + 1 + int(np.isnan(found).argmax()))
        raise ModelError(
            f"{runtime.info.path} names {runtime.info.log_probabilities} tokens in each row, and a "
            "token of the text was not among them: let it name all (vLLM: --max-logprobs -1)"
        )
    return Losses(found, seconds, len(tokens) - 1)


def _not_numbers(runtime: Runtime, position: int) -> ModelError:
    info = runtime.info
    return ModelError(
        f"{info.path}: {info.name} ({info.precision}) gave logits that are not numbers for position "
        f"{position}: half precision may have overflowed (try --dtype float32, or an export of more "
        "bits), or weights or factors are damaged (longrope-export verify)"
    )


def _losses(rows: Logits, following: Sequence[int], are_logits: bool) -> Floats:
    targets = np.asarray(following, np.int64)
    found = np.empty(len(rows), np.float64)
    for first in range(0, len(rows), _BLOCK):
        block = rows[first : first + _BLOCK].astype(np.float64)
        log_p = log_softmax(block) if are_logits else block
        inside = targets[first : first + _BLOCK]
        found[first : first + _BLOCK] = -log_p[np.arange(len(inside)), inside]
    return found


@dataclass
class Generation:
    """A sequence that is read, and continued greedily or compared with right answers, in turn.

    Attributes:
        sequence: of a runtime.
        end_tokens: ids that end an answer.
        read: tokens that were given to it, and the seconds they took.
        made: tokens that it made, and the seconds.
        compared: tokens of right answers that it was given, and the seconds.
    """

    runtime: Runtime
    sequence: RunningSequence
    end_tokens: frozenset[int] = frozenset()
    read: tuple[int, float] = (0, 0.0)
    made: tuple[int, float] = (0, 0.0)
    compared: tuple[int, float] = (0, 0.0)
    _waiting: int | None = None  # a token that was made and not yet appended

    def answer(
        self, tokens: Sequence[int], most: int, is_enough: Callable[[str], bool]
    ) -> tuple[list[int], str]:
        """Read tokens, then make tokens until their text is enough, the likeliest each time.

        A token of `end_tokens` ends the answer too; it is no part of it, and what is read next
        follows what was made before it.

        Args:
            tokens: at least one.
            most: tokens to make at most, at least one.
            is_enough: asked after each token.

        Returns:
            The tokens that were made, none if an end token comes first, and their text.

        Raises:
            ModelError: the runtime has no tokenizer, or gives logits that are not numbers.
        """
        rows = self._read(tokens)
        made: list[int] = []
        text = ""
        while True:
            if np.isnan(rows[-1]).all():
                raise _not_numbers(self.runtime, self.sequence.length)
            token = int(np.nanargmax(rows[-1]))
            if token in self.end_tokens:
                return made, text
            made.append(token)
            text = self.text(made)
            if len(made) == most or is_enough(text):
                self._waiting = token
                return made, text
            begun = time.perf_counter()
            rows = self.sequence.append([token], keep=1)
            self.made = (self.made[0] + 1, self.made[1] + time.perf_counter() - begun)

    def compare(self, tokens: Sequence[int], answer: Sequence[int]) -> tuple[list[int], Floats]:
        """Read tokens and the right answer to them, and see what the model would have said.

        The last token of the answer is read with what comes next.

        Args:
            tokens, answer: at least one of each.

        Returns:
            In place of each token of the answer, given all that are right before it, the likeliest
            token; and (len(answer),) -ln p of the right one, nats, NaN where a server did not name it.

        Raises:
            ModelError: the runtime gives logits that are not numbers.
        """
        rows = self._read(tokens)
        if len(answer) > 1:
            begun = time.perf_counter()
            rows = np.concatenate([rows, self.sequence.append(answer[:-1])])
            seconds = self.compared[1] + time.perf_counter() - begun
            self.compared = (self.compared[0] + len(answer) - 1, seconds)
        self._waiting = answer[-1]
        broken = np.isnan(rows).all(axis=1)
        if broken.any():
            first = self.sequence.length - len(rows) + 1 + int(broken.argmax())
            raise _not_numbers(self.runtime, first)
        likeliest = [int(token) for token in np.nanargmax(rows, axis=1)]
        return likeliest, _losses(rows, answer, self.runtime.info.log_probabilities is None)

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens say.

        Raises:
            ModelError: the runtime has no tokenizer.
        """
        said = self.runtime.detokenize(tokens)
        if said is None:
            raise ModelError(f"{self.runtime.info.path}: carries no tokenizer to read it with")
        return said

    def _read(self, tokens: Sequence[int]) -> Logits:
        """The last row."""
        given = [*([] if self._waiting is None else [self._waiting]), *tokens]
        self._waiting = None
        begun = time.perf_counter()
        rows = self.sequence.append(given, keep=1)
        self.read = (self.read[0] + len(given), self.read[1] + time.perf_counter() - begun)
        return rows
