"""Hidden numbers asked for, on a running sequence: by greedy answers, or against the right ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from longrope_export.errors import ModelError
from longrope_export.evaluate.needle import Puzzle, continuation
from longrope_export.evaluate.scoring import Generation

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Answer:
    """One question's.

    Attributes:
        expected: the numbers that are right.
        text: what the model says.
        digits: that are right.
        numbers: that are right as a whole.
        loss: -ln p of the right answer, nats; None for greedy answers, or where a server did not
            name one of its tokens.
    """

    expected: tuple[str, ...]
    text: str
    digits: int
    numbers: int
    loss: float | None = None


def answer_greedily(
    generation: Generation, puzzle: Puzzle, prompt: Sequence[int], tokenize: Tokenize
) -> Iterator[Answer]:
    """What the model says to each question, in turn, behind its own answers to those before.

    Args:
        generation: an empty sequence.
        prompt: ids that end with the first question.
        tokenize: of the model, special tokens included.

    Raises:
        ModelError: as Generation.answer.
    """
    given = prompt
    for number, question in enumerate(puzzle.questions):
        if number:
            given = continuation(question.text, tokenize)
        _, text = generation.answer(given, question.most_tokens, question.is_answered)
        yield Answer(question.values, text, *question.score(text))


def compare_answers(
    generation: Generation, puzzle: Puzzle, prompt: Sequence[int], tokenize: Tokenize
) -> Iterator[Answer]:
    """What the model holds for likeliest at each token of the right answers.

    Each question has the right answers to those before it in front of it, and each token the right ones
    before it: a model that errs once, or repeats what it said, is not judged by that again and again. A
    number is right where all of its tokens are the likeliest, so where a greedy answer would begin with it.

    Args:
        puzzle: with one number to a question.
        others: as of answer_greedily.

    Raises:
        ModelError: as Generation.compare, or the runtime has no tokenizer.
    """
    given, before = prompt, ""
    for number, question in enumerate(puzzle.questions):
        (value,) = question.values
        if number:
            given = following(before, f".{question.text}", tokenize)
        answer = following(question.text, f" {value}", tokenize)
        likeliest, losses = generation.compare(given, answer)
        right = [one == other for one, other in zip(likeliest, answer, strict=True)]
        digits = [sum(map(str.isdigit, _text(generation, [token]))) for token in answer]
        loss = float(losses.sum())
        yield Answer(
            question.values,
            _text(generation, likeliest),
            sum(count for count, is_right in zip(digits, right, strict=True) if is_right),
            int(all(right)),
            None if math.isnan(loss) else loss,
        )
        before = f"{question.text} {value}"


def following(before: str, text: str, tokenize: Tokenize) -> list[int]:
    """Token ids of a text behind another, as a tokenizer cuts them that joins both."""
    return tokenize(before + text)[len(tokenize(before)) :]


def _text(generation: Generation, tokens: list[int]) -> str:
    text = generation.runtime.detokenize(tokens)
    if text is None:
        raise ModelError(f"{generation.runtime.info.path}: carries no tokenizer to read it with")
    return text
