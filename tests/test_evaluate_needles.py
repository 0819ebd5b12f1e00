"""evaluate: hidden numbers, prompts and answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from evaluated import HELP, Scripted, make_root
from tiny_models import add_bpe_tokenizer, make_model

from longrope_converters.to_gguf.convert import GgufConverter, GgufOptions
from longrope_export.errors import ConfigError
from longrope_export.evaluate.end_tokens import end_tokens
from longrope_export.evaluate.needle import (
    Puzzle,
    Question,
    beginning,
    continuation,
    fit_prompt,
    following,
    make_puzzle,
    open_ended,
)
from longrope_export.evaluate.questions import compare_answers
from longrope_export.evaluate.scoring import Generation
from longrope_export.models.model import load_model
from longrope_export.runtimes.hf import HfModel
from longrope_export.runtimes.onnx import OnnxModel


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("needles"))


@pytest.mark.parametrize("kind", ["passkey", "multikey", "multivalue"])
def test_prompts_fill_their_length_and_hold_what_is_asked(root: Path, kind: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "m")
    count = 1 if kind == "passkey" else 3
    puzzle = make_puzzle(kind, 6000, 0, 7, depth=0.5, count=count)
    assert puzzle == make_puzzle(kind, 6000, 0, 7, depth=0.5, count=count)
    assert puzzle != make_puzzle(kind, 6000, 1, 7, depth=0.5, count=count)
    tokens, room = fit_prompt(puzzle, HELP, 6000, lambda text: tokenizer(text).input_ids)
    later = sum(len(tokenizer(q.text).input_ids) for q in puzzle.questions[1:])
    needed = later + sum(q.most_tokens for q in puzzle.questions)
    assert needed <= room <= needed + 8 and len(tokens) + room == 6000
    text = tokenizer.decode(tokens)
    values = [value for question in puzzle.questions for value in question.values]
    assert len(set(values)) == count and all(len(value) == 6 for value in values)
    for (depth, sentence), value in zip(puzzle.facts, sorted(values, key=text.index), strict=True):
        assert sentence in text and value in sentence
        assert abs(text.index(sentence) / len(text) - depth) < 0.1
    assert text.endswith(puzzle.questions[0].text)


def test_prompts_that_do_not_fit(root: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "m")
    puzzle = make_puzzle("multikey", 100, 0, 0, count=5)
    with pytest.raises(ConfigError, match="too short for 5 hidden"):
        fit_prompt(puzzle, HELP, 100, lambda text: tokenizer(text).input_ids)
    with pytest.raises(ConfigError, match="text is too short"):
        fit_prompt(puzzle, HELP[:300], 2000, lambda text: tokenizer(text).input_ids)
    with pytest.raises(ConfigError, match="task riddle is not known"):
        make_puzzle("riddle", 100, 0, 0)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (" 123456. Remember", (6, 1)),
        (" 123499", (4, 0)),
        (" 1234567", (6, 0)),
        (" none", (0, 0)),
        (" is 923456 or 123456", (5, 0)),
    ],
)
def test_digits_are_compared_place_by_place(answer: str, score: tuple[int, int]) -> None:
    assert Question("?", ("123456",)).score(answer) == score


def test_several_values_count_in_any_order() -> None:
    question = Question("?", ("111111", "222222", "333333"))
    assert question.score(" 333333, 111111 and 444444.") == (12, 2)
    assert question.is_answered(" 111111\nAnd") and not question.is_answered("\n 111111, 2")
    assert Question("?", ("111111",)).is_answered(" 111111.")


def test_a_later_question_has_no_beginning_of_text() -> None:
    assert continuation("cd", lambda text: [1, *map(ord, text)]) == [99, 100]
    assert continuation("cd", lambda text: list(map(ord, text))) == [99, 100]
    words = {"the": [3], "a": [9, 4], "b": [9, 5], "The": [9, 6]}  # 9 is SentencePiece's space
    assert beginning(lambda text: [1, *words[text], 2]) == [1]


@pytest.mark.parametrize("name", ["m", "m-onnx"])
def test_answers_are_what_transformers_generates(root: Path, name: str) -> None:
    """Two questions in one sequence, against generate() on the whole text each time."""
    runtime = HfModel(root / "m") if name == "m" else OnnxModel(root / "m-onnx", threads=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "m", dtype=torch.float32)
    prompt, more = runtime.tokenize(HELP)[:100], runtime.tokenize(" And then?")
    generation = Generation(runtime, runtime.start())
    text: list[int] = []
    for given in (prompt, more):
        made, said = generation.answer(given, 8, lambda _: False)
        text += given
        ids = torch.tensor([text])
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        # min_new_tokens forbids the end token: ours would go on behind it
        assert made == expected[0, len(text) :].tolist()
        assert said == runtime.detokenize(made)
        text += made
    assert generation.sequence.length == len(text) - 1
    assert generation.read[0] + generation.made[0] == len(text) - 1


def test_right_answers_are_compared_as_in_one_forward_of_all(tmp_path: Path) -> None:
    """Every token of every answer, in the whole text with all right answers in it."""
    settings = {"initializer_range": 0.15, "max_position_embeddings": 1024}
    folder = make_model(tmp_path / "m", dtype="float32", **settings)
    add_bpe_tokenizer(folder)
    runtime = HfModel(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    puzzle = make_puzzle("multikey", 900, 0, 0, count=3)
    prompt, _ = fit_prompt(puzzle, HELP, 900, lambda text: tokenizer(text).input_ids)
    generation = Generation(runtime, runtime.start())
    found = list(compare_answers(generation, puzzle, prompt, lambda t: tokenizer(t).input_ids))
    dialogue, places = "", []
    for question in puzzle.questions:
        dialogue += question.text
        places.append((len(dialogue), len(dialogue) + 7))
        dialogue += f" {question.values[0]}."
    said = tokenizer(dialogue, return_offsets_mapping=True)
    head = len(prompt) - len(tokenizer(puzzle.questions[0].text).input_ids)
    ids = [*prompt[:head], *said.input_ids[:-1]]  # without the last full stop
    assert ids[: len(prompt)] == prompt
    spans = [
        [
            head + n
            for n, (begin, end) in enumerate(said.offset_mapping)
            if first <= begin < end <= last
        ]
        for first, last in places
    ]
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for span, answer, question in zip(spans, found, puzzle.questions, strict=True):
        rows, right = log_p[torch.tensor(span) - 1], torch.tensor(ids)[span]
        assert tokenizer.decode(right) == f" {question.values[0]}" and len(span) > 3
        hits = [bool(hit) for hit in rows.argmax(-1) == right]
        loss = -rows[range(len(span)), right]
        begins = [i for i, token in enumerate(right) if tokenizer.decode(token).strip()]
        assert answer.loss == pytest.approx(loss[begins].sum().item(), rel=1e-4)
        assert answer.numbers == int(all(hits[i] for i in begins))
        miss = next((i for i in begins if not hits[i]), None)
        until = [*right[:miss], rows[miss].argmax()] if miss is not None else right
        assert answer.text == tokenizer.decode(until)
    assert generation.sequence.length == len(ids) - 1 <= 900


class Knowing:
    """Says what comes next in one text, but for one place; begins texts with token 0, ends them with 1.

    Args:
        size: characters of a token, if they are digits; other tokens are single characters.
        wrong: in whose place it says `?` and then zeros.
    """

    def __init__(self, text: str, size: int, wrong: str) -> None:
        self.size, self.pieces = size, ["", "", "?", "?0", "?00", "?000"]
        self.ids = self.tokenize(text)[:-1]
        self.wrong = self.ids.index(self.pieces.index(wrong)) if wrong else -1
        self.length = 0
        self.info = SimpleNamespace(log_probabilities=None)

    def tokenize(self, text: str) -> list[int]:
        pieces = re.findall(rf"\d{{1,{self.size}}}|\D", text)
        self.pieces += [piece for piece in dict.fromkeys(pieces) if piece not in self.pieces]
        return [0, *map(self.pieces.index, pieces), 1]

    def append(self, tokens: list[int], *, keep: int | None = None) -> Any:
        assert tokens == self.ids[self.length : self.length + len(tokens)]
        self.length += len(tokens)
        rows = np.zeros((len(tokens), len(self.pieces)), np.float32)
        for row, place in enumerate(range(self.length - len(tokens) + 1, self.length + 1)):
            rows[row, self.ids[place] if place != self.wrong else 1 + self.size] = 30.0
        return rows[-keep:] if keep else rows

    def detokenize(self, tokens: list[int]) -> str:
        return "".join(self.pieces[token] for token in tokens)


@pytest.mark.parametrize(
    ("size", "wrong", "expected"),
    [
        (1, "", [(" 123456", 6, 1), (" 987650", 6, 1)]),
        (1, "3", [(" 12?", 2, 0), (" 987650", 6, 1)]),
        (3, "", [(" 123456", 6, 1), (" 987650", 6, 1)]),
        (3, "987", [(" 123456", 6, 1), (" ?00", 0, 0)]),
        (3, "456", [(" 123?00", 3, 0), (" 987650", 6, 1)]),
        (1, "9", [(" 123456", 6, 1), (" ?", 0, 0)]),
        (1, "A", [(" 123456", 6, 1), (" 987650", 6, 1)]),
    ],
)
def test_an_error_costs_what_is_behind_it_in_its_number(
    size: int, wrong: str, expected: list[tuple[str, int, int]]
) -> None:
    questions = (Question("A is:", ("123456",)), Question("B is:", ("987650",)))
    knowing: Any = Knowing("Some text. A is: 123456.B is: 987650.", size, wrong)
    tokenize = open_ended(knowing.tokenize)
    prompt = tokenize("Some text. A is:")
    answers = list(
        compare_answers(Generation(knowing, knowing), Puzzle("", (), questions), prompt, tokenize)
    )
    assert [(a.text, a.digits, a.numbers) for a in answers] == expected
    for answer in answers:
        assert answer.loss == pytest.approx(0 if answer.numbers else 30, abs=1e-3)
    assert knowing.length == len(knowing.ids) - 2  # the last token and the full stop are not read


def test_digits_within_a_token_count_up_to_the_first_that_is_wrong() -> None:
    knowing: Any = Knowing("A is: 123456.", 3, "456")
    knowing.pieces[4] = "459"
    asked = Puzzle("", (), (Question("A is:", ("123456",)),))
    tokenize = open_ended(knowing.tokenize)
    (answer,) = compare_answers(Generation(knowing, knowing), asked, tokenize("A is:"), tokenize)
    assert (answer.text, answer.digits, answer.numbers) == (" 123459", 5, 0)


def test_a_space_before_a_number_is_not_judged() -> None:
    knowing: Any = Knowing("A_is: 123456.", 1, " ")
    asked = Puzzle("", (), (Question("A_is:", ("123456",)),))
    tokenize = open_ended(knowing.tokenize)
    (answer,) = compare_answers(Generation(knowing, knowing), asked, tokenize("A_is:"), tokenize)
    assert (answer.text, answer.digits, answer.numbers) == (" 123456", 6, 1)
    assert answer.loss == pytest.approx(0, abs=1e-3)


def test_a_number_that_a_server_does_not_name_has_no_loss() -> None:
    knowing: Any = Knowing("A is: 123456.", 1, "3")
    append = knowing.append
    knowing.append = lambda *given, **how: np.where((rows := append(*given, **how)) > 1, rows, np.nan)  # fmt: skip
    knowing.info = SimpleNamespace(log_probabilities=1)
    asked = Puzzle("", (), (Question("A is:", ("123456",)),))
    tokenize = open_ended(knowing.tokenize)
    (answer,) = compare_answers(Generation(knowing, knowing), asked, tokenize("A is:"), tokenize)
    assert (answer.digits, answer.numbers, answer.loss) == (2, 0, None)


def test_a_tokenizer_that_joins_question_and_answer_is_refused() -> None:
    def tokenize(text: str) -> list[int]:
        return list(map(ord, text.replace(": ", "\0")))

    assert following("A is", ": 5", tokenize) == [0, ord("5")]
    with pytest.raises(ConfigError, match="leave multikey out"):
        following("A is:", " 5", tokenize)


def test_nothing_is_taken_from_texts_of_a_tokenizer_that_adds_nothing() -> None:
    assert open_ended(lambda text: list(map(ord, text)))("cd") == [99, 100]
    assert open_ended(lambda text: [*map(ord, text), 1, 2])("cd") == [99, 100]


def test_an_end_token_ends_an_answer(tmp_path: Path) -> None:
    runtime, question = Scripted(tmp_path), Question("?", ("42",))
    generation = Generation(runtime, runtime.start(), end_tokens(tmp_path))
    made, text = generation.answer([1], 12, question.is_answered)
    assert (made, text) == ([2, 3], "42") and question.score(text) == (2, 1)
    assert generation.answer([1, 1], 2, question.is_answered) == ([4, 4], "99")
    assert runtime.read == [1, 2, 3, 1, 1, 4]  # the end token is not read
    runtime._answers = [0]
    assert generation.answer([1], 2, question.is_answered) == ([], "")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": [5, 6]}, "config.json": {"eos_token_id": 7}}, {5, 6}),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 7}}, {7}),
        ({"config.json": {"text_config": {"eos_token_id": 8}}}, {8}),
        ({"genai_config.json": {"model": {"eos_token_id": 0}}}, {0}),
        ({"config.json": {"eos_token_id": None}}, set()),
        ({}, set()),
    ],
)  # fmt: skip
def test_what_names_end_tokens(files: dict[str, Any], expected: set[int], tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert end_tokens(tmp_path) == expected


def test_end_tokens_of_the_same_model(root: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "m.gguf"
    GgufConverter(GgufOptions(outtype="f32", pre="gpt-2")).convert(
        load_model(root / "m"), None, gguf, lambda _: None
    )
    assert end_tokens(root / "m") == end_tokens(root / "m-onnx") == end_tokens(gguf) == {1}
    assert end_tokens("http://127.0.0.1:1") == set()
