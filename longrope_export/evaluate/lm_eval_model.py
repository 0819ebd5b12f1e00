"""A runtime as lm-eval sees a model. Imports lm_eval: only where that is known to be there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from longrope_export.errors import ConfigError, ModelError
from longrope_export.evaluate.end_tokens import end_tokens
from longrope_export.evaluate.needle import beginning, continuation, open_ended
from longrope_export.evaluate.scoring import READ_CHUNK, Generation, window_losses
from longrope_export.gguf_format import read_header
from longrope_export.models.torch_model import load_torch_tokenizer
from longrope_export.runtimes.base import Runtime
from longrope_export.verify.compare import log_softmax

_MOST_GENERATED = 256  # lm-eval's own default


class RuntimeLM(TemplateLM):  # type: ignore[misc]
    """lm-eval's three questions, asked of any runtime, one request at a time.

    Args:
        runtime: with a tokenizer.
        longest: tokens of a request; what lies before is cut off.
    """

    def __init__(self, runtime: Runtime, longest: int) -> None:
        super().__init__()
        self._runtime, self._longest = runtime, longest
        self._ends = end_tokens(runtime.info.path)

    @cached_property
    def eot_token_id(self) -> int:
        """The token that stands before a text: the beginning of a text, else its end.

        Raises:
            ModelError: the export names neither.
        """
        token = _begin_token(self._runtime)
        if token is None:
            raise ModelError(
                f"{self._runtime.info.path} names no token that begins or ends a text, which "
                "a request without context needs"
            )
        return token

    @property
    def max_length(self) -> int:
        """Tokens of a request."""
        return self._longest

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; what begins every text is left out if `add_special_tokens` is False."""
        if add_special_tokens is False:
            return continuation(string, self._ids)
        return self._ids(string)

    @cached_property
    def _ids(self) -> Callable[[str], list[int]]:
        return open_ended(self._tokenize)

    def _tokenize(self, text: str) -> list[int]:
        tokens = self._runtime.tokenize(text)
        if tokens is None:
            raise ModelError(f"{self._runtime.info.path} carries no tokenizer")
        return tokens

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        found = []
        for _strings, context, wanted in requests:
            if len(wanted) >= self._longest:
                raise ConfigError(
                    f"a request continues with {len(wanted)} tokens: give --lengths above that"
                )
            tokens = (context + wanted)[-self._longest - 1 :]  # the last one is not run
            sequence = self._runtime.start(declared_length=len(tokens) - 1, chunk_size=READ_CHUNK)
            rows = sequence.append(tokens[:-1], keep=len(wanted)).astype(np.float64)
            if self._runtime.info.log_probabilities is None:
                rows = log_softmax(rows)
            log_p = float(rows[np.arange(len(wanted)), wanted].sum())
            greedy = bool((np.nan_to_num(rows, nan=-np.inf).argmax(1) == wanted).all())
            found.append((log_p, greedy))
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """ln p of whole texts, in lm-eval's own windows, which lie side by side."""
        found = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                self._ids(text), self.eot_token_id, self._longest, context_len=1
            )
            total = 0.0
            for context, wanted in map(make_disjoint_window, windows):
                tokens = context + wanted
                losses = window_losses(
                    self._runtime, tokens, len(wanted), declared_length=len(tokens) - 1
                )
                total -= float(losses.values.sum())
            found.append(total)
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, up to an end token or the first of the words that end them."""
        found = []
        for request in requests:
            context, options = request.args
            if options.get("do_sample") and options.get("temperature", 1.0) > 0:
                raise ConfigError("this task samples its answers: evaluate is greedy")
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else list(until)
            most = int(options.get("max_gen_toks", _MOST_GENERATED))
            tokens = self._ids(context)[-(self._longest - most) :]
            if most >= self._longest:
                raise ConfigError(f"this task makes up to {most} tokens: give --lengths above that")
            sequence = self._runtime.start(
                declared_length=len(tokens) + most, chunk_size=READ_CHUNK
            )

            def ended(text: str, until: list[str] = until) -> bool:
                return any(word in text for word in until)

            _, text = Generation(self._runtime, sequence, self._ends).answer(tokens, most, ended)
            for word in until:
                text = text.split(word)[0]
            found.append(text)
        return found


def _begin_token(runtime: Runtime) -> int | None:
    if special := beginning(lambda text: runtime.tokenize(text) or []):
        return special[0]
    path = runtime.info.path
    if isinstance(path, str):
        return None
    if path.is_file():
        header = read_header(path)
        names = (header.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
        return next((value for value in names if isinstance(value, int)), None)
    try:
        tokenizer = load_torch_tokenizer(path)
    except ModelError:
        return None
    if tokenizer.bos_token_id is not None:
        return int(tokenizer.bos_token_id)
    return None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
