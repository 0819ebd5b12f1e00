"""By what a report is known as ours, so that nothing else is replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from longrope_export.errors import OutputError

MADE_BY = "made by longrope-export report"  # in every file that the command writes
COMMENT = f"<!-- {MADE_BY} -->"


def check_ours(outputs: Mapping[str, Sequence[Path]], *, force: bool) -> None:
    """Refuse to replace files that `report` did not write.

    Args:
        outputs: by the name of the option.
        force: replace them all the same.

    Raises:
        OutputError: nothing has been written yet.
    """
    for option, files in outputs.items():
        for file in files:
            if not force and file.exists() and not _is_ours(file):
                raise OutputError(
                    f"{option}: {file} exists, and `report` did not write it: give another name, or "
                    "--force to replace it"
                )


def _is_ours(file: Path) -> bool:
    try:
        return MADE_BY.encode() in file.read_bytes()
    except OSError:
        return False
