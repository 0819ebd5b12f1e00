"""Facts hidden in a long text, and questions about them.

`passkey` is the task of Mohtashami and Jaggi (arXiv 2305.16300), with the given text in place of
their repeated sentences; `multikey` and `multivalue` follow RULER (arXiv 2404.06654), whose sentences they use. All
words are completed, not chatted: base models answer too.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from longrope_export.errors import ConfigError

DIGITS = 6  # of every hidden number
KINDS = PASSKEY, MULTIKEY, MULTIVALUE = ("passkey", "multikey", "multivalue")
_TOKENS_PER_NUMBER = 2 * DIGITS  # digit by digit, with words between
_SENTENCE = 400  # characters within which the end of a sentence is looked for
_SLACK = 8  # tokens that a prompt may be shorter than asked for

_PASSKEY = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n\n",
    "The pass key is {value}. Remember it. {value} is the pass key.",
    "\n\nWhat is the pass key? The pass key is",
)
_MAGIC = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about the numbers afterwards.\n\n",
    "One of the special magic numbers for {key} is: {value}.",
)
_ASK_ONE = (
    "\n\nWhat is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is:"
)
_ASK_ALL = (
    "\n\nWhat are all the special magic numbers for {key} mentioned in the provided text? "
    "The special magic numbers for {key} mentioned in the provided text are:"
)
_ADJECTIVES = [
    "brave",
    "calm",
    "clever",
    "eager",
    "gentle",
    "happy",
    "jolly",
    "kind",
    "lively",
    "lucky",
    "quiet",
    "quick",
    "silly",
    "swift",
    "tidy",
    "wise",
]
_NOUNS = [
    "apple",
    "bridge",
    "candle",
    "falcon",
    "garden",
    "harbor",
    "island",
    "kettle",
    "ladder",
    "meadow",
    "ocean",
    "pencil",
    "river",
    "saddle",
    "tunnel",
    "window",
]


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        text: stands behind everything before it, and ends where the answer begins.
        values: numbers that a right answer names, as text.
    """

    text: str
    values: tuple[str, ...]

    @property
    def most_tokens(self) -> int:
        """Tokens that an answer may have."""
        return _TOKENS_PER_NUMBER * len(self.values)

    def is_answered(self, text: str) -> bool:
        """Whether no further word can change the score of an answer that begins like this."""
        if len(self.values) == 1:
            return re.search(r"\d\D", text) is not None
        return "\n" in text.strip()

    def score(self, text: str) -> tuple[int, int]:
        """(digits that are right, numbers that are right) of an answer.

        One number: its digits are compared place by place with the first digits of the answer.
        Several: a number counts, with all its digits, where the answer names it, in any order.
        """
        named = re.findall(r"\d+", text)
        if len(self.values) == 1:
            got = named[0] if named else ""
            same = sum(a == b for a, b in zip(got, self.values[0], strict=False))
            return same, int(got == self.values[0])
        found = len(set(self.values) & set(named))
        return DIGITS * found, found


@dataclass(frozen=True)
class Puzzle:
    """Facts, where they stand, and what is asked about them.

    Attributes:
        head: what comes first.
        facts: (depth, sentence), by rising depth: 0 is the beginning of the text, 1 its end.
        questions: asked in turn, each behind an answer to the one before.
    """

    head: str
    facts: tuple[tuple[float, str], ...]
    questions: tuple[Question, ...]


def make_puzzle(
    kind: str, length: int, trial: int, seed: int, *, depth: float = 0.5, count: int = 1
) -> Puzzle:
    """The same for the same arguments, on every machine.

    Args:
        kind: passkey: one number at `depth`. multikey: `count` keys with a number each, spread over
            the text, all asked for, a question each. multivalue: `count` numbers of one key, spread, asked for at once.
        length: tokens of the prompt; only makes the numbers differ.

    Raises:
        ConfigError: an unknown kind, or too many keys.
    """
    if kind not in KINDS:
        raise ConfigError(f"task {kind} is not known, expected one of {', '.join(KINDS)}")
    names = [f"{a}-{n}" for a in _ADJECTIVES for n in _NOUNS]
    if not 1 <= count <= len(names):
        raise ConfigError(f"{kind} takes 1 to {len(names)} numbers, got {count}")
    place = [seed, zlib.crc32(kind.encode()), length, trial, round(depth * 10**6), count]
    rng = np.random.default_rng(place)
    low, high = 10 ** (DIGITS - 1), 10**DIGITS
    values = [str(value) for value in rng.choice(high - low, count, replace=False) + low]
    if kind == "passkey":
        head, fact, ask = _PASSKEY
        sentence = fact.format(value=values[0])
        return Puzzle(head, ((depth, sentence),), (Question(ask, (values[0],)),))
    head, fact = _MAGIC
    chosen = rng.choice(len(names), count if kind == "multikey" else 1, replace=False)
    keys = [names[index] for index in chosen]
    depths = (np.arange(count) + rng.random(count)) / count
    owners = keys if kind == "multikey" else keys * count
    facts = tuple(
        (float(at), fact.format(key=key, value=value))
        for at, key, value in zip(depths, owners, values, strict=True)
    )
    if kind == "multivalue":
        return Puzzle(head, facts, (Question(_ASK_ALL.format(key=keys[0]), tuple(values)),))
    questions = [
        Question(_ASK_ONE.format(key=key), (value,))
        for key, value in zip(keys, values, strict=True)
    ]
    order = rng.permutation(count)
    return Puzzle(head, facts, tuple(questions[index] for index in order))


def prompt_text(puzzle: Puzzle, haystack: str, characters: int) -> str:
    """The head, the first `characters` of the haystack with the facts in it; no question."""
    parts, begin = [puzzle.head], 0
    for depth, sentence in puzzle.facts:
        place = max(begin, _end_of_sentence(haystack, round(depth * characters), characters))
        parts += [haystack[begin:place], " ", sentence, " "]
        begin = place
    return "".join([*parts, haystack[begin:characters]])


def _end_of_sentence(text: str, place: int, end: int) -> int:
    """The first place from `place` on, before `end`, behind a sentence; else behind a word."""
    if place <= 0:
        return 0
    for pattern in (r"[.!?]\s", r"\s"):
        found = re.compile(pattern).search(text, place, min(place + _SENTENCE, end))
        if found:
            return found.end()
    return min(place, end)


def fit_prompt(
    puzzle: Puzzle,
    haystack: str,
    length: int,
    tokenize: Callable[[str], Sequence[int]],
) -> tuple[list[int], int]:
    """The token ids of a prompt that fills `length` tokens with its questions and answers.

    Args:
        haystack: the text to hide the facts in.
        length: tokens of prompt, questions and longest answers together.
        tokenize: of the model, special tokens included.

    Returns:
        (n,) ids of the prompt with the first question, and the tokens left for what follows.

    Raises:
        ConfigError: the haystack is too short, or the length for the questions.
    """
    first, *others = puzzle.questions
    room = sum(question.most_tokens for question in puzzle.questions)
    room += sum(len(tokenize(question.text)) for question in others)
    budget = length - room

    def ids(characters: int) -> list[int]:
        return list(tokenize(prompt_text(puzzle, haystack, characters) + first.text))

    found = ids(0)
    least = len(found)
    if least > budget:
        raise ConfigError(
            f"length {length} is too short for {len(puzzle.facts)} hidden numbers, which take "
            f"{least + room} tokens with their questions: give longer --lengths or fewer numbers"
        )
    low, high = 0, len(haystack) + 1  # characters that fit, and that do not
    rate = 4.0  # characters of a token
    for attempt in range(64):
        if budget - len(found) <= _SLACK or high - low == 1:
            break
        wanted = (low + high) // 2 if attempt > 8 else round(rate * (budget - least - _SLACK / 2))
        guess = min(max(wanted, low + 1), high - 1)
        tried = ids(guess)
        rate = guess / max(len(tried) - least, 1)
        if len(tried) <= budget:
            low, found = guess, tried
        else:
            high = guess
    if low == len(haystack) and budget - len(found) > _SLACK:
        raise ConfigError(
            f"the text is too short to hide numbers in {length} tokens: with all of it the prompt "
            f"has {len(found) + room}; give a longer --text or shorter --lengths"
        )
    return found, length - len(found)


def continuation(text: str, tokenize: Callable[[str], Sequence[int]]) -> list[int]:
    """Token ids of a text in the middle of another: without what begins every text."""
    return list(tokenize(text))[len(beginning(tokenize)) :]


def beginning(tokenize: Callable[[str], Sequence[int]]) -> list[int]:
    """The special tokens that a tokenizer puts in front of every text; often one, or none."""
    # SentencePiece begins a text with a space, which is a token where it does not melt into a word
    found = [list(tokenize(word)) for word in ("a", "b", "the", "The")]
    shared = zip(*found, strict=False)
    return [ids[0] for ids in itertools.takewhile(lambda ids: len(set(ids)) == 1, shared)]


def open_ended(tokenize: Callable[[str], Sequence[int]]) -> Callable[[str], list[int]]:
    """A tokenizer without the special tokens that it puts behind every text."""
    found = [list(reversed(tokenize(word))) for word in ("a", "b", "the", "The")]
    shared = zip(*found, strict=False)
    count = len(list(itertools.takewhile(lambda ids: len(set(ids)) == 1, shared)))
    return lambda text: list(tokenize(text))[: -count or None]


def following(before: str, text: str, tokenize: Callable[[str], Sequence[int]]) -> list[int]:
    """Token ids of a text behind another, as a tokenizer cuts them that reads both.

    Args:
        tokenize: open ended.

    Raises:
        ConfigError: it joins the end of the first with the beginning of the second.
    """
    head, whole = list(tokenize(before)), list(tokenize(before + text))
    if whole[: len(head)] != head:
        raise ConfigError(
            f"this model's tokenizer does not cut {before[-20:] + text[:20]!r} between both: leave multikey "
            "out (--keys 0)"
        )
    return whole[len(head) :]
