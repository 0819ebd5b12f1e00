"""Texts: what is read, how it is split, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from longrope_export.errors import ConfigError
from longrope_export.search.documents import split_documents, tokenize
from longrope_export.search.jobs import Document
from longrope_export.search.needles import make_needles
from longrope_export.texts import read_texts


def works(*lengths: int) -> list[tuple[str, list[int]]]:
    """Works whose tokens name them."""
    return [(f"work {k}", [k * 100_000 + i for i in range(n)]) for k, n in enumerate(lengths)]


def sources(documents: tuple[Document, ...]) -> set[int]:
    return {document.ids[-1] // 100_000 for document in documents}


def test_three_sets_of_different_works() -> None:
    split = split_documents(works(*[1000] * 7), 100, (5, 3, 4), np.random.default_rng(0))
    assert [len(split.search), len(split.validation), len(split.test)] == [5, 3, 4]
    groups = [sources(split.search), sources(split.validation), sources(split.test)]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]
    assert split.held_out == (
        "windows from different works: search 5 from 3, validation 3 from 2, test 4 from 2"
    )
    assert all(len(document.ids) == 100 for document in split.all)
    split = split_documents(works(*[1000] * 3, 99, 50), 100, (5, 3, 4), np.random.default_rng(0))
    assert split.held_out.endswith("; 2 work(s) shorter than a window, left out")


def test_a_work_that_is_given_twice_counts_once() -> None:
    given = works(1000, 1000, 1000)
    copies = [(f"copy of {name}", ids) for name, ids in given]
    split = split_documents([*given, *copies], 100, (5, 3, 4), np.random.default_rng(0))
    assert split.held_out.endswith("; 3 work(s) given twice, used once")
    assert not sources(split.search) & sources(split.test)
    same = split_documents([given[0]] * 3, 100, (2, 2, 2), np.random.default_rng(0))
    assert "different places of the same work; 2 work(s) given twice" in same.held_out


def test_windows_of_one_work_do_not_overlap_and_begin_with_the_start_ids() -> None:
    split = split_documents(works(1000), 100, (3, 2, 2), np.random.default_rng(0), start=(7,))
    assert "different places of the same work" in split.held_out
    seen: set[int] = set()
    for document in split.all:
        assert document.ids[0] == 7
        assert len(document.ids) == 100
        assert not seen & set(document.ids[1:])
        seen |= set(document.ids[1:])


def test_one_window_is_used_for_everything_and_the_note_says_so() -> None:
    split = split_documents(works(150, 60), 100, (5, 3, 3), np.random.default_rng(0))
    assert split.search == split.validation == split.test
    assert "nothing is held out" in split.held_out


def test_too_short_texts_are_refused_with_the_longest_length() -> None:
    with pytest.raises(ConfigError, match="longest of 2 works has 99 tokens, a window needs 100"):
        split_documents(works(99, 5), 100, (5, 3, 3), np.random.default_rng(0))


def test_the_split_depends_on_the_seed_alone() -> None:
    def split(seed: int) -> object:
        return split_documents(works(*[500] * 9), 100, (3, 3, 3), np.random.default_rng(seed))

    assert split(1) == split(1)
    assert split(1) != split(2)


def test_files_folders_and_jsonl_are_read(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "a.md").write_text("ay")
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    (tmp_path / "ignored.bin").write_bytes(b"\xff\xfe")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "d.TXT").write_text("dee")
    assert read_texts([str(tmp_path)]) == [
        ("a", "ay"),
        ("b", "bee"),
        ("c line 1", "one"),
        ("c line 3", "two"),
        ("d", "dee"),
    ]
    assert tokenize([("a", "ay")], lambda text: [ord(c) for c in text]) == [("a", [97, 121])]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.txt", b"\xff\xfe\x00", "cannot be read as UTF-8"),
        ("bad.jsonl", b'{"text": 5}\n', 'line 1: expected an object with a string "text"'),
        ("bad.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2"),
        ("bad.jsonl", b"not json\n", "line 1"),
    ],
)
def test_damaged_texts_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_texts([str(tmp_path / name)])


def test_an_empty_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no text in this folder"):
        read_texts([str(tmp_path)])
    with pytest.raises(ConfigError, match="no such file or folder"):
        read_texts([str(tmp_path / "none.txt")])


def test_a_dataset_in_a_local_folder_is_read(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "long ago"}) + "\n")
    assert [text for _, text in read_texts([f"dataset:{tmp_path}"])] == ["long ago"]


@pytest.mark.parametrize("num_keys", [1, 5])
def test_needles_are_asked_for_at_the_end_and_keep_the_length(num_keys: int) -> None:
    haystack = Document((9, *range(1000, 4000)), name="text")

    def encode(text: str) -> list[int]:
        return list(text.encode())

    document = make_needles(haystack, encode, num_keys, np.random.default_rng(0), start=(9,))
    assert len(document.ids) == len(haystack.ids)
    assert document.ids[0] == 9
    assert len(document.answers) == num_keys
    assert document.answers[-1][1] == len(document.ids)
    text = "".join(chr(i) if i < 256 else "\u25a1" for i in document.ids)
    for first, stop in document.answers:
        number = text[first:stop].strip(" .")
        assert len(number) == 7
        assert text.count(number) == 2  # said once, asked for once
        key = text[:first].rsplit("number for ", 1)[1].split(" ", 1)[0]
        assert f"numbers for {key} is: {number}" in text
    if num_keys == 1:
        assert text.index("numbers for") < 120  # at the beginning


def test_a_window_too_short_for_its_needles_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"too short for 5 needles.*: give --needle-keys with fewer"
    ):
        make_needles(
            Document(tuple(range(100))),
            lambda text: list(text.encode()),
            5,
            np.random.default_rng(0),
        )
