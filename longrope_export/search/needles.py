"""Documents that ask for something said far before: only the answer counts for the loss.

The needle of LongRoPE2's fitness (arXiv 2502.20082, section 3.2; sentences in the manner of RULER)
stands at the beginning and is asked for at the end. Several keys at even depths are what a
choice between rules is also measured by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from longrope_export.errors import ConfigError
from longrope_export.search.jobs import Document

_ADJECTIVES = ("numerous", "quiet", "amber", "hollow", "distant", "gentle", "rusty", "early")
_NOUNS = ("kite", "harbor", "lantern", "meadow", "anvil", "orchard", "compass", "glacier")
MAX_KEYS = len(_ADJECTIVES) * len(_NOUNS)
FEWER = "give --needle-keys with fewer, or 0 for none"
_TASK = "Some special magic numbers are hidden in the following text. Memorize them.\n"
_NEEDLE = " One of the special magic numbers for {key} is: {value}. "
_QUESTION = "\nThe special magic number for {key} mentioned in the text is:"


def make_needles(
    haystack: Document,
    encode: Callable[[str], list[int]],
    num_keys: int,
    rng: np.random.Generator,
    start: Sequence[int] = (),
    *,
    way_out: str = FEWER,
) -> Document:
    """A document of the same length with keys in it and questions at its end.

    Args:
        haystack: supplies the text and the length.
        encode: token ids of a text, without special tokens.
        num_keys: 1 puts the needle at the beginning; more stand at even depths.
        start: ids in front of everything.
        way_out: what to do about a window that is too short, for the message.

    Raises:
        ConfigError: the window is too short for the sentences.
    """
    pairs = [f"{a}-{n}" for a in _ADJECTIVES for n in _NOUNS]
    keys = [pairs[int(i)] for i in rng.choice(len(pairs), num_keys, replace=False)]
    values = [str(int(rng.integers(10**6, 10**7))) for _ in keys]
    sentences = [encode(_NEEDLE.format(key=k, value=v)) for k, v in zip(keys, values, strict=True)]
    questions = [encode(_QUESTION.format(key=key)) for key in keys]
    answers = [encode(f" {value}.") for value in values]
    head = [*start, *encode(_TASK)]
    fixed = sum(map(len, [head, *sentences, *questions, *answers]))
    room = len(haystack.ids) - fixed
    if room < num_keys:
        raise ConfigError(
            f"a window of {len(haystack.ids)} tokens is too short for {num_keys} needles, which "
            f"take {fixed} tokens: {way_out}"
        )
    text = haystack.ids[len(start) : len(start) + room]
    ids = list(head)
    for number, sentence in enumerate(sentences):
        begin, end = room * number // num_keys, room * (number + 1) // num_keys
        ids += [*sentence, *text[begin:end]]
    spans = []
    for question, answer in zip(questions, answers, strict=True):
        ids += question
        spans.append((len(ids), len(ids) + len(answer)))
        ids += answer
    return Document(tuple(ids), tuple(spans), f"{num_keys} needle(s) in {haystack.name}")
