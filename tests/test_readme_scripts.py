"""The scripts that write the numbers of README.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from longrope_export.evaluate.results import Table, markdown_table
from scripts.readme import README, write_block
from scripts.update_readme import PARTS


def test_a_block_is_replaced_and_the_rest_is_kept(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n", encoding="utf-8")
    for _ in range(2):
        write_block("x", "| new |", readme)
    text = readme.read_text(encoding="utf-8")
    assert text == "# a\n<!-- x: begin -->\n\n| new |\n\n<!-- x: end -->\nb\n"
    with pytest.raises(SystemExit, match="y: begin"):
        write_block("y", "", readme)
    assert readme.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("marks", ["<!-- x: end -->a<!-- x: begin -->b", "<!-- x: begin -->b" * 2])
def test_a_damaged_block_loses_nothing(tmp_path: Path, marks: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(marks, encoding="utf-8")
    with pytest.raises(SystemExit, match="put them back"):
        write_block("x", "new", readme)
    assert readme.read_text(encoding="utf-8") == marks


@pytest.mark.parametrize("name", PARTS)
def test_the_readme_has_its_blocks_and_they_are_not_empty(name: str) -> None:
    block = README.read_text(encoding="utf-8").partition(f"{name}: begin -->")[2]
    assert block.partition("<!--")[0].count("\n|") >= 3


def test_every_block_of_the_readme_is_written_by_a_part() -> None:
    blocks = re.findall(r"<!-- (\S+): begin -->", README.read_text(encoding="utf-8"))
    assert set(blocks) == set(PARTS)


def test_a_table_is_markdown() -> None:
    table = Table("title", ("a", "b"), (("1", "2"),))
    assert markdown_table(table) == "| a | b |\n|---|---:|\n| 1 | 2 |\n"
