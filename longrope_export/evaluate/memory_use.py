"""The most memory that a stretch of work has held, in this process and in others."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from pathlib import Path

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h
_LARGE_BYTES = 1 << 20


def give_back_large_blocks() -> None:
    """Let malloc return blocks of 1 MiB and more to the system as soon as they are freed.

    glibc keeps freed blocks of up to 32 MiB. A cache that is copied to a larger one in every call
    leaves holes among them, which grew to ten times the cache in a window of 16384 tokens. Other
    C libraries are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)


class PeakMemory:
    """Counts from its construction on. Linux alone says it; elsewhere the peak is None.

    Args:
        process_id: of a program that computes for this one; its peak is since its own start.
    """

    def __init__(self, process_id: int | None = None) -> None:
        self._processes = [os.getpid(), *([] if process_id is None else [process_id])]
        with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak since the start
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def peak_bytes(self) -> int | None:
        """Resident bytes at the peak, of all processes together."""
        peaks = [_peak_of(process) for process in self._processes]
        return sum(peak for peak in peaks if peak) or None


def _peak_of(process: int) -> int | None:
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), None)
