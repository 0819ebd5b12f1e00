"""What of a text or a chat is learned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from chats import AS_MESSAGES, MESSAGES

from longrope_export.errors import ConfigError, ModelError
from longrope_export.finetune.samples import Sample, make_samples
from longrope_export.texts import Work

# targets

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
)
PLAIN = (  # no token ends a turn: the line does
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
FORGETFUL = (  # as templates that drop the thoughts of earlier turns
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last %}<think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
)


def make_tokenizer(template: str | None = None, **special: str | None) -> Any:
    """Bytes are tokens, but for two line ends, which are one, and special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: k for k, letter in enumerate(letters)} | {"ĊĊ": 256}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ("<bos>", "<eos>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    given = {"bos_token": "<bos>", "eos_token": "<eos>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **given)


def targets_of(sample: Sample, tokenizer: Any) -> list[str]:
    """Runs of targets, as text."""
    runs, was_target = [], False
    for token, is_target in zip(sample.ids.tolist(), sample.is_target.tolist(), strict=True):
        if is_target and not was_target:
            runs.append([])
        if is_target:
            runs[-1].append(token)
        was_target = is_target
    return [tokenizer.decode(run) for run in runs]


def test_a_text_stands_between_the_tokens_that_the_tokenizer_has() -> None:
    told: list[tuple[int, int]] = []
    works = [Work("a", "xyz"), Work("nothing", ""), Work("b", "pq")]
    tokenizer = make_tokenizer()
    first, second = make_samples(works, tokenizer, lambda *done: told.append(done))
    assert (first.name, second.name) == ("a", "b")
    assert first.ids.dtype == np.int32
    assert first.is_target.dtype == np.bool_
    assert tokenizer.decode(first.ids) == "<bos>xyz<eos>"
    assert first.is_target.tolist() == [False, True, True, True, True]
    assert told == [(1, 5), (2, 5), (3, 9)]
    (bare,) = make_samples(works[:1], make_tokenizer(bos_token=None, eos_token=None))
    assert len(bare) == 3
    assert bare.is_target.all()


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHATML, ["four<|im_end|>", "five <|im_end|>"]),  # "\n\n" of the last is one token
        (MARKED, ["four<|im_end|>", "\n\nfive <|im_end|>"]),
        (PLAIN, ["four\n", "\nfive \n"]),
    ],
)
def test_only_answers_and_the_ends_of_their_turns_are_targets(
    template: str, answers: list[str]
) -> None:
    tokenizer = make_tokenizer(template)
    (sample,) = make_samples([Work("chat", "", tuple(MESSAGES))], tokenizer)
    assert sample.ids.tolist() == tokenizer.apply_chat_template(MESSAGES, return_dict=False)
    assert targets_of(sample, tokenizer) == answers


def test_an_answer_to_nothing_is_no_target_and_a_chat_without_answers_is_left_out() -> None:
    tokenizer = make_tokenizer(CHATML)
    chats = [
        Work("greeting", "", ({"role": "assistant", "content": "Hello"}, *AS_MESSAGES)),
        Work("question", "", AS_MESSAGES[:1]),
    ]
    (sample,) = make_samples(chats, tokenizer)
    assert targets_of(sample, tokenizer) == ["Hello<|im_end|>"]
    assert sample.is_target.nonzero()[0][0] > 20


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        (None, ModelError, "chat: a conversation, and the tokenizer has no chat template"),
        (FORGETFUL, ModelError, "chat: turn 3 looks otherwise"),
        ("{{ raise_exception('no system') }}", ConfigError, "chat: .*refuses.*no system"),
    ],
)
def test_chat_templates_that_do_not_tell_the_answers_are_refused(
    template: str | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_samples([Work("chat", "", tuple(MESSAGES))], make_tokenizer(template))
