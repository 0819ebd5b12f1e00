"""Hidden numbers asked for, on a running sequence: by greedy answers, or against the right ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from longrope_export.evaluate.needle import Puzzle, continuation, following
from longrope_export.evaluate.scoring import Generation

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Answer:
    """One question's.

    Attributes:
        expected: the numbers that are right.
        text: what the model says; compared with the right number, up to the first token that is wrong.
        digits: that are right.
        numbers: that are right as a whole.
        loss: -ln p of the right number, nats; None for greedy answers, or where a server did not
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
        tokenize: of the model, special tokens in front included.

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
    """What the model holds for likeliest where the right numbers stand.

    Each question has the right answers to those before it in front of it, so that a model that errs once, or
    repeats what it said, is not judged by that again and again. Tokens without digits, as the space before
    a number, are read and not judged. A number is right where each token of it is the likeliest behind those
    before it; digits count up to the first that is wrong, since behind it the right ones show the way.

    A model that copies any of k hidden numbers gets 1/k of them right, at ln k nats.

    Args:
        puzzle: with one number to a question.
        others: as of answer_greedily.

    Raises:
        ModelError: as Generation.compare, or the runtime has no tokenizer.
        ConfigError: as following.
    """
    given, before = prompt, ""
    for number, question in enumerate(puzzle.questions):
        (value,) = question.values
        if number:
            given = following(before, f".{question.text}", tokenize)
        answer = following(question.text, f" {value}", tokenize)
        likeliest, losses = generation.compare(given, answer)
        pieces = [generation.text([token]) for token in answer]
        judged = [any(map(str.isdigit, piece)) for piece in pieces]
        said, digits, is_right = [], 0, True
        for token, other, piece, counts in zip(answer, likeliest, pieces, judged, strict=True):
            said.append(other if counts else token)
            if counts and other != token:
                digits += _same_digits(generation.text([other]), piece)
                is_right = False
                break
            digits += len(_digits(piece))
        loss = float(losses[judged].sum())
        yield Answer(
            question.values,
            generation.text(said),
            digits,
            int(is_right),
            None if math.isnan(loss) else loss,
        )
        before = f"{question.text} {value}"


def _digits(text: str) -> str:
    return "".join(filter(str.isdigit, text))


def _same_digits(one: str, other: str) -> int:
    """How many digits two texts begin with alike."""
    pairs = zip(_digits(one), _digits(other), strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
