"""Which checkpoints of a training are whole, and so fit to go on from after a kill."""

from __future__ import annotations

import shutil
from pathlib import Path

from longrope_export.outputs import sync_tree, write_text

COMPLETE = "complete"  # lies in a checkpoint whose files are all on disk


def mark_complete(checkpoint: Path) -> None:
    """Sync a checkpoint that has been written, and say so inside it."""
    sync_tree(checkpoint)
    write_text(checkpoint / COMPLETE, "")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None; one that a kill has torn counts nothing."""
    whole = [marker.parent for marker in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(whole, key=step_of, default=None)


def remove_torn(folder: Path) -> None:
    """Remove what a kill has left half written; it would count where old checkpoints make room."""
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / COMPLETE).is_file():
            shutil.rmtree(checkpoint)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])
