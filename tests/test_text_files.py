"""Texts and conversations read from files, folders and datasets, and refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from chats import AS_MESSAGES, MESSAGES

from longrope_export.errors import ConfigError, UnsupportedError
from longrope_export.texts import Work, read_texts, read_works

SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)


def test_texts_and_conversations_are_read_from_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ay")
    lines = [{"text": "one"}, {"messages": MESSAGES}, {"id": 7, "conversations": SHAREGPT}]
    (tmp_path / "b.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    write_parquet(tmp_path / "c.parquet", [{"text": "two", "id": 1}] * 600)
    write_parquet(tmp_path / "d.parquet", [{"conversations": SHAREGPT, "text": None}])
    works = list(read_works([str(tmp_path)]))
    assert works[:4] == [
        Work("a", "ay"),
        Work("b line 1", "one"),
        Work("b line 3", "", tuple(MESSAGES)),
        Work("b line 5", "", AS_MESSAGES),
    ]
    assert [work.name for work in works[4:604]] == [f"c row {k}" for k in range(1, 601)]
    assert {work.text for work in works[4:604]} == {"two"}
    assert works[604:] == [Work("d row 1", "", AS_MESSAGES)]


def test_a_dataset_gives_conversations_and_a_named_column(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    row = {"messages": MESSAGES, "body": "long ago", "number": 5}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    name = f"dataset:{tmp_path}"
    assert [work.messages for work in read_works([name])] == [tuple(MESSAGES)]
    assert read_texts([f"{name}:train:body"]) == [(f"{tmp_path} 0", "long ago")]
    for column in ("number", "none"):
        with pytest.raises(ConfigError, match=r"row 0: .* (\"number\" is int|it has)"):
            list(read_works([f"{name}:train:{column}"]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "b"}', "it has body"),
        ('{"text": ["a"]}', '"text" is list'),
        ('{"messages": []}', '"messages" is list'),
        ('{"messages": "a"}', '"messages" is str'),
        ('{"messages": ["a"]}', "a turn is no object"),
        ('{"messages": [{"role": "user"}]}', "a turn is"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "a turn is"),
        ('{"messages": [{"role": "a", "content": "", "tool_calls": [1]}]}', "tool calls"),
        ('{"conversations": [{"from": "bing", "value": "a"}]}', "a turn is .*bing"),
        ('["text"]', "it is no object"),
        ("nonsense", "Expecting value"),
    ],
)
def test_a_row_that_is_no_work_is_refused_with_its_line(
    tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=f"b.jsonl, line 2: expected an object with.*{message}"):
        list(read_works([str(path)]))


def test_parquet_files_are_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    write_parquet(tmp_path / "other.parquet", [{"body": "b"}])
    write_parquet(tmp_path / "empty.parquet", [{"text": "a"}, {"text": None}])
    for name, message in (
        ("bad", "cannot be read as parquet"),
        ("other", "it has body"),
        ("empty", "row 2: expected"),
    ):
        with pytest.raises(ConfigError, match=message):
            list(read_works([str(tmp_path / f"{name}.parquet")]))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UnsupportedError, match="pip install pyarrow"):
        list(read_works([str(tmp_path / "other.parquet")]))


def test_a_search_takes_no_conversation_and_a_missing_file_is_told_before_reading(
    tmp_path: Path,
) -> None:
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": MESSAGES}))
    with pytest.raises(ConfigError, match="b line 1: a conversation, expected a text"):
        read_texts([str(tmp_path)])
    with pytest.raises(ConfigError, match="no such file"):
        read_works([str(tmp_path), "none.txt"])  # not iterated
