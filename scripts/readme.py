"""Blocks of README.md that scripts write: what stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`."""

from __future__ import annotations

from pathlib import Path

from longrope_export.outputs import write_text

README = Path(__file__).parent.parent / "README.md"


def write_block(name: str, text: str, readme: Path = README) -> None:
    """Put `text` in the place of what the block held.

    Raises:
        SystemExit: the README has no such block, or not just one.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    whole = readme.read_text(encoding="utf-8")
    before, _, rest = whole.partition(begin)
    _, found, after = rest.partition(end)
    if not found or begin in rest or end in before + after:
        raise SystemExit(f"{readme}: expected one {begin} and one {end} behind it: put them back")
    write_text(readme, f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}")
