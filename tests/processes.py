"""Programs that are started, watched until they have come far enough, and killed."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

SECONDS = 120  # that a program may take to come so far


def start_until(
    command: Sequence[str], reached: Callable[[], bool], env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """A program that runs and has reached something; it must not end before."""
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE)
    deadline = time.monotonic() + SECONDS
    while not reached():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


def end(process: subprocess.Popen[bytes], sent: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal, and wait until the program has ended."""
    process.send_signal(sent)
    process.wait()
    if process.stderr:
        process.stderr.close()
