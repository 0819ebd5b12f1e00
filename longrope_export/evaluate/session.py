"""One cell after another on the runtime that is open."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from longrope_export.errors import ConfigError, ModelError
from longrope_export.evaluate.end_tokens import end_tokens
from longrope_export.evaluate.memory_use import PeakMemory
from longrope_export.evaluate.needle import (
    DIGITS,
    MULTIKEY,
    MULTIVALUE,
    Puzzle,
    beginning,
    fit_prompt,
    make_puzzle,
    open_ended,
)
from longrope_export.evaluate.perplexity import score_text
from longrope_export.evaluate.questions import answer_greedily, compare_answers
from longrope_export.evaluate.scoring import READ_CHUNK, Generation
from longrope_export.evaluate.settings import LM_EVAL, PERPLEXITY, Cell, Settings, Text
from longrope_export.evaluate.subjects import Subject
from longrope_export.runtimes.base import Runtime


@dataclass(frozen=True)
class Options:
    """How runtimes are run.

    Attributes:
        threads: of the runtime.
        build: compile llama.cpp where it is missing.
        include_path: folder of lm-eval's task files.
        limit: samples of each lm-eval task; None for all.
    """

    threads: int | None = None
    build: bool = False
    include_path: Path | None = None
    limit: int | None = None


class Session:
    """The runtime that is loaded now, and the token ids of every text under its tokenizer."""

    def __init__(self, texts: Sequence[Text], settings: Settings, options: Options) -> None:
        self._texts = {text.name: text.content for text in texts}
        self._settings, self.options = settings, options
        self._subject: Subject | None = None
        self._length = 0
        self._runtime: Runtime | None = None
        self._tokens: dict[str, list[int]] = {}
        self._ends = frozenset[int]()  # of the runtime

    def open(self, subject: Subject, length: int) -> Runtime:
        """The runtime of a subject; the one before it is closed where it has to be."""
        same = subject is self._subject
        if self._runtime is not None and same and (length == self._length or not subject.allocates):
            return self._runtime
        if not same:
            self._tokens = {}
        self.close()
        context = length if subject.allocates else self._settings.lengths[-1]
        self._runtime = subject.open(
            context, threads=self.options.threads, build=self.options.build
        )
        self._subject, self._length = subject, length
        self._ends = end_tokens(self._runtime.info.path)
        return self._runtime

    def close(self) -> None:
        if self._runtime is not None:
            self._runtime.close()
        self._runtime, self._subject = None, None

    def measure(self, runtime: Runtime, cell: Cell, step: Callable[[int], None]) -> dict[str, Any]:
        """The result of a cell, as JSON values."""
        info = runtime.info
        if info.longest is not None and cell.length > info.longest:
            raise ModelError(
                f"{info.path}: {info.name} has room for {info.longest} tokens, --lengths has "
                f"{cell.length}: start it with more room, or give shorter ones"
            )
        memory = PeakMemory(info.process_id)
        if cell.task == PERPLEXITY:
            result = self._perplexity(runtime, cell, step)
        elif cell.task == LM_EVAL:
            from longrope_export.evaluate.tasks import run_task

            result = run_task(
                runtime,
                cell.text,
                longest=cell.length,
                include_path=self.options.include_path,
                limit=self.options.limit,
                seed=self._settings.seed,
            )
        else:
            result = self._needle(runtime, cell)
        local = isinstance(info.path, Path)
        names = ("name", "version", "precision", "switching")
        return {
            **result,
            "peak_memory_bytes": memory.peak_bytes() if local else None,
            "runtime": {name: getattr(info, name) for name in names},
        }

    def check(self, runtime: Runtime, cells: Iterable[Cell]) -> None:
        """Refuse texts that are too short for the longest cells, before the others take hours.

        Args:
            cells: of the open subject, by rising length.

        Raises:
            ConfigError: says which text, and how many tokens it has.
            ModelError: the export has no tokenizer.
        """
        longest = {(cell.task, cell.text): cell for cell in cells if cell.task != LM_EVAL}
        for cell in longest.values():
            if cell.task == PERPLEXITY:
                self._text_tokens(runtime, cell)
            else:
                self._prompt(cell, open_ended(partial(tokenize, runtime)))

    def _text_tokens(self, runtime: Runtime, cell: Cell) -> list[int]:
        """Those that a perplexity reads."""
        assert cell.num_tokens is not None
        if cell.text not in self._tokens:
            self._tokens[cell.text] = tokenize(runtime, self._texts[cell.text])
        tokens = self._tokens[cell.text]
        if len(tokens) < cell.num_tokens:
            raise ConfigError(
                f"text {cell.text} has {len(tokens)} tokens, expected at least {cell.num_tokens}: give "
                "a longer --text, shorter --lengths, or fewer --tokens"
            )
        return tokens[: cell.num_tokens]

    def _perplexity(
        self, runtime: Runtime, cell: Cell, step: Callable[[int], None]
    ) -> dict[str, Any]:
        tokens = self._text_tokens(runtime, cell)
        score = score_text(
            runtime,
            tokens,
            cell.length,
            stride=self._settings.stride,
            beginning=beginning(partial(tokenize, runtime)),
            num_stretches=self._settings.num_stretches,
            step=step,
        )
        # two models whose tokens differ have perplexities that cannot be compared
        digest = hashlib.sha256(np.asarray(tokens, "<i4").tobytes()).hexdigest()
        return {**score.to_json(), "tokens_sha256": digest}

    def _prompt(self, cell: Cell, ids: Callable[[str], list[int]]) -> tuple[Puzzle, list[int]]:
        """What is asked, and the prompt that ends with the first question, by an open-ended tokenizer."""
        counts = {MULTIKEY: self._settings.num_keys, MULTIVALUE: self._settings.num_values}
        puzzle = make_puzzle(
            cell.task,
            cell.length,
            cell.trial or 0,
            self._settings.seed,
            depth=0.5 if cell.depth is None else cell.depth,
            count=counts.get(cell.task, 1),
        )
        haystack = self._texts[cell.text]
        prompt, _ = fit_prompt(puzzle, haystack, cell.length, ids)
        return puzzle, prompt

    def _needle(self, runtime: Runtime, cell: Cell) -> dict[str, Any]:
        ids = open_ended(partial(tokenize, runtime))
        puzzle, prompt = self._prompt(cell, ids)

        sequence = runtime.start(declared_length=cell.length, chunk_size=READ_CHUNK)
        generation = Generation(runtime, sequence, self._ends)
        ask = compare_answers if cell.task == MULTIKEY else answer_greedily
        answers = list(ask(generation, puzzle, prompt, ids))
        asked = sum(len(answer.expected) for answer in answers)
        numbers = sum(answer.numbers for answer in answers)
        losses = [answer.loss for answer in answers if answer.loss is not None]
        read, made = generation.read, generation.made
        return {
            "digits_right": sum(answer.digits for answer in answers),
            "digits": DIGITS * asked,
            "numbers_right": numbers,
            "numbers": asked,
            "exact": numbers == asked,
            "loss": sum(losses) / asked if len(losses) == len(answers) else None,
            "prompt_tokens": len(prompt),
            "answers": [{"expected": list(a.expected), "answer": a.text} for a in answers],
            "seconds": round(read[1] + made[1] + generation.compared[1], 3),
            "tokens_per_second": read[0] / max(read[1], 1e-9),
            "generated_per_second": made[0] / made[1] if made[0] else None,
        }


def tokenize(runtime: Runtime, text: str) -> list[int]:
    """Token ids by the tokenizer that the export carries.

    Raises:
        ModelError: it carries none.
    """
    tokens = runtime.tokenize(text)
    if tokens is None:
        raise ModelError(
            f"{runtime.info.path} carries no tokenizer: add tokenizer.json to it, or export it again "
            "from a source that has one"
        )
    return tokens
