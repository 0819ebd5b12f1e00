"""What an ONNX folder holds, and which existing folder an export may replace."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from longrope_export.errors import OutputError
from longrope_export.verify.certificate import FILE_NAME as CERTIFICATE

MARKER = "model.onnx"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
#: every name that an export writes, and --verify after it
EXPORTED = frozenset(
    {
        *(MARKER, "model.onnx.data", "rerotate.onnx", "genai_config.json", CERTIFICATE),
        *TOKENIZER_FILES,
    }
)


def check_folder(output: Path, inputs: Sequence[Path], *, force: bool) -> None:
    """Refuse a folder that must not be replaced.

    Args:
        inputs: files and folders that are read.
        force: allow an export to be replaced: a folder with model.onnx and nothing foreign.

    Raises:
        OutputError: with what to do about it. Nothing has been written yet.
    """
    parent = output.absolute().parent
    if not parent.is_dir():
        raise OutputError(
            f"output folder {parent} does not exist: create it first (mkdir -p {parent})"
        )
    if not os.access(parent, os.W_OK):
        raise OutputError(f"output folder {parent} is not writable: choose another with -o")
    resolved = output.resolve()
    for source in inputs:
        if resolved == source.resolve() or resolved in source.resolve().parents:
            raise OutputError(
                f"output {output} is or holds the input {source}: choose another name with -o"
            )
    if not output.exists():
        return
    if not output.is_dir():
        raise OutputError(f"output {output} is a file: an ONNX export is a folder")
    if not any(output.iterdir()):
        return
    if not (output / MARKER).is_file():
        raise OutputError(
            f"output folder {output} is not empty and holds no {MARKER}: it is not replaced, "
            f"with --force neither; choose another name with -o"
        )
    strangers = sorted({path.name for path in output.iterdir()} - EXPORTED)
    if strangers:
        raise OutputError(
            f"output folder {output} holds what no export writes ({', '.join(strangers[:5])}), "
            f"which would be lost: move it away, or choose another name with -o"
        )
    if not force:
        raise OutputError(
            f"output {output} exists: use --force to replace it, or another name with -o"
        )
