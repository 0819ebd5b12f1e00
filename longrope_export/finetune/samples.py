"""Tokenized works with the tokens that a model is to learn."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from longrope_export.errors import ConfigError, ModelError
from longrope_export.models.torch_model import encode_plainly
from longrope_export.texts import Work

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, eq=False)
class Sample:
    """The tokens of one work.

    Attributes:
        name: of the work.
        ids: (n,) int32 token ids.
        is_target: (n,) bool, False where a token is not to be learned: all of a chat but the
            assistant's answers, and the begin-of-text token.
    """

    name: str
    ids: np.ndarray
    is_target: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def make_samples(
    works: Iterable[Work],
    tokenizer: Any,
    progress: Callable[[int, int], None] = lambda works, tokens: None,
) -> list[Sample]:
    """Tokenize every work once; a work without a token that can be learned is left out.

    A text stands between bos_token_id and eos_token_id, as far as the tokenizer has them. A
    conversation is what the chat template makes of it, and the assistant's answers are its
    targets, with the token that ends a turn: by the template's own {% generation %} marks if it
    has some, else what each answer adds to the prompt before it.

    Args:
        tokenizer: of transformers.
        progress: told of works and tokens so far.

    Raises:
        ModelError: a conversation, and the tokenizer has no chat template, or one whose turns
            change when a turn follows, or cannot tell which characters a token stands for.
        ConfigError: the chat template refuses a conversation.
    """
    samples, tokens = [], 0
    for number, work in enumerate(works, start=1):
        ids, is_target = _chat(work, tokenizer) if work.messages else _text(work.text, tokenizer)
        if is_target[1:].any():  # nothing stands before the first
            samples.append(Sample(work.name, ids, is_target))
            tokens += len(ids)
        progress(number, tokens)
    return samples


def hash_of(samples: Iterable[Sample]) -> str:
    """SHA-256 of all tokens and of which of them are learned, hex."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.ids.tobytes())
        digest.update(sample.is_target.tobytes())
    return digest.hexdigest()


def _text(text: str, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    ids = encode_plainly(tokenizer, text)
    begin, end = (
        [] if token is None else [token]
        for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    )
    whole = np.array([*begin, *ids, *end], np.int32)
    is_target = np.full(len(whole), bool(ids))  # nothing is learned from an empty text
    is_target[: len(begin)] = False
    return whole, is_target


def _chat(work: Work, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            f"{work.name}: a conversation, and the tokenizer has no chat template: take the "
            f"tokenizer of the instruction-tuned model, or give texts"
        )
    if not tokenizer.is_fast:
        raise ModelError(
            f"{work.name}: a conversation needs a fast tokenizer, which says which characters a "
            f"token stands for; got {type(tokenizer).__name__}"
        )
    messages = list(work.messages)
    try:
        if _GENERATION.search(tokenizer.get_chat_template()):
            marked = tokenizer.apply_chat_template(
                messages,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"verbose": False},
            )
            is_target = np.array(marked["assistant_masks"], bool)
            return np.array(marked["input_ids"], np.int32), is_target
        text, answers = _find_answers(work, tokenizer)
    except ModelError:
        raise
    except Exception as error:  # jinja2's, and whatever a template's code raises
        raise ConfigError(
            f"{work.name}: the chat template refuses this conversation: {error}"
        ) from error
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.array(encoded.input_ids, np.int32)
    begins = np.array(encoded.offset_mapping, np.int64).reshape(-1, 2)[:, 0]
    special = np.isin(ids, [*tokenizer.added_tokens_decoder])
    is_target = np.zeros(len(ids), bool)
    for first, stop in answers:
        is_target |= (begins >= first) & (begins < _end_of_turn(text, first, stop, begins, special))
    return ids, is_target


def _find_answers(work: Work, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The whole conversation as text, and the spans of characters that each answer adds to it."""

    def render(count: int, **options: Any) -> str:
        turns = list(work.messages[:count])
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **options))

    text, answers = render(len(work.messages)), []
    for k, message in enumerate(work.messages):
        if message["role"] != "assistant" or k == 0:  # an answer to nothing cannot be asked for
            continue
        prompt, answered = render(k, add_generation_prompt=True), render(k + 1)
        if not (text.startswith(answered) and answered.startswith(prompt)):
            raise ModelError(
                f"{work.name}: turn {k + 1} looks otherwise when the chat template has seen the "
                f"turns after it, so that its tokens cannot be told from the prompt's: give a "
                f"template with {{% generation %}} marks"
            )
        answers.append((len(prompt), len(answered)))
    return text, answers


def _end_of_turn(text: str, first: int, stop: int, begins: np.ndarray, special: np.ndarray) -> int:
    """`stop` without the white space that a template puts behind the token that ends a turn."""
    end = first + len(text[first:stop].rstrip())
    last = np.flatnonzero((begins >= first) & (begins < end))
    return end if len(last) and special[last[-1]] else stop
