"""A model behind an HTTP server: llama-server, or vLLM and others with /v1/completions.

A server answers with the log probabilities of the next token, so each row costs one request, which
carries all tokens before it; the server's own prompt cache makes that cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from longrope_export.config import LongRopeConfig
from longrope_export.errors import ModelError
from longrope_export.runtimes.base import DEFAULT_CHUNK, Logits, Tokens
from longrope_export.runtimes.http_client import JsonClient
from longrope_export.runtimes.http_servers import Server, open_server


class HttpModel:
    """What runs behind an address.

    Args:
        url: `http://127.0.0.1:8080`, with or without a `/v1` behind it.
        vocabulary: tokens that the model has to have. llama-server says its own; the rows of other
            servers get this width.
        named: tokens to ask for in each row, the likeliest; None for all. Fewer make the answers
            shorter: one with all 49152 tokens of SmolLM2 has 4.7 MB, one with 1000 of them 80 kB.
        timeout: seconds of silence after which a request has failed.

    Raises:
        ModelError: the server cannot be reached, is still loading, serves another model, or names
            tokens by their texts.
    """

    config: LongRopeConfig | None = None

    def __init__(
        self,
        url: str,
        *,
        vocabulary: int | None = None,
        named: int | None = None,
        timeout: float = 600,
    ) -> None:
        self._server = open_server(JsonClient(url, timeout), vocabulary, named)
        self.info = self._server.info

    def start(
        self,
        *,
        declared_length: int | None = None,
        chunk_size: int = DEFAULT_CHUNK,
        first_position: int = 0,
    ) -> HttpSequence:
        """An empty sequence. A server can be told neither a length nor a chunk size.

        Raises:
            ModelError: first_position is not 0.
        """
        if first_position:
            raise ModelError("a server counts positions from 0")
        return HttpSequence(self._server, 0)

    def batch(self, sequences: Sequence[Tokens], keep: int) -> list[Logits]:
        """All at once, from one thread each; the server computes together what it has slots for."""
        with ThreadPoolExecutor(len(sequences)) as pool:
            waiting = [
                pool.submit(HttpSequence(self._server, number).append, tokens, keep=keep)
                for number, tokens in enumerate(sequences)
            ]
            return [row.result() for row in waiting]

    def tokenize(self, text: str) -> list[int] | None:
        """By the server's tokenizer; None if it offers none."""
        return self._server.tokenize(text)

    def detokenize(self, tokens: Tokens) -> str | None:
        """By the server's /detokenize; None if it offers none."""
        return self._server.detokenize([int(token) for token in tokens])

    def close(self) -> None:
        """Nothing: the server goes on."""


class HttpSequence:
    """One sequence, of which the server keeps what it likes. Made by HttpModel.start."""

    def __init__(self, server: Server, slot: int) -> None:
        self._server, self._slot = server, slot
        self._tokens: list[int] = []
        self._fresh = True

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self._tokens)

    def append(self, tokens: Tokens, *, keep: int | None = None) -> Logits:
        """See RunningSequence; rows hold log probabilities, NaN where the server named none.

        The first request asks the server to compute all from nothing, those after it to go on.
        """
        added = [int(token) for token in tokens]
        wanted = len(added) if keep is None else min(keep, len(added))
        self._tokens += added
        rows = np.full((wanted, self._server.vocabulary), np.nan, np.float32)
        for row, end in enumerate(range(self.length - wanted + 1, self.length + 1)):
            found = self._server.next_token(self._tokens[:end], self._fresh, self._slot)
            self._fresh = False
            rows[row, list(found)] = list(found.values())
        return rows
