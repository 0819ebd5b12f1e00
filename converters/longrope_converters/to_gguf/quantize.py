"""K-quants and the other types of llama-quantize, with its own mix of types per tensor."""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path

from longrope_export.errors import ToolError

logger = logging.getLogger(__name__)

TOOL = "llama-quantize"


def check_quantizer(outtype: str) -> None:
    """Refuse an outtype that llama-quantize does not know, or that nothing here can make.

    Raises:
        ToolError: llama-quantize is not built, or it has no such type.
    """
    known = quantize_types()
    if outtype.upper() not in known:
        names = ", ".join(sorted(name.lower() for name in known))
        raise ToolError(f"--outtype {outtype}: llama-quantize has no such type; it knows {names}")


def quantize_types() -> set[str]:
    """Type names in upper case that the built llama-quantize lists.

    Raises:
        ToolError: it is not built.
    """
    help_text = _run([str(_tool()), "--help"], may_fail=True)
    types = set()
    for line in help_text.splitlines():
        parts = line.split()
        if len(parts) > 3 and parts[0].isdecimal() and parts[1] in ("or", ":"):
            types.add(parts[2].upper())
    return types - {"COPY"}


def quantize(source: Path, output: Path, outtype: str, threads: int | None = None) -> None:
    """Run llama-quantize; keys and F32 factor tensors pass through unchanged.

    Raises:
        ToolError: with the last lines of its output, and the command.
    """
    command = [str(_tool()), str(source), str(output), outtype.upper()]
    command.append(str(threads or os.cpu_count() or 1))
    _run(command)


def _tool() -> Path:
    from longrope_export.llama_cpp.binaries import require_binary

    return require_binary(TOOL)


def _run(command: list[str], *, may_fail: bool = False) -> str:
    logger.debug("%s", " ".join(command))
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    text = result.stdout + result.stderr
    if result.returncode and not may_fail:
        tail = "\n".join(text.strip().splitlines()[-12:])
        raise ToolError(f"{' '.join(command)}\nfailed with exit code {result.returncode}:\n{tail}")
    return text
