"""Runs cpp_patch/driver/longrope-driver.cpp, the program that runs a model by a script."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt


@dataclass
class Driver:
    """cpp_patch/driver/longrope-driver.cpp, which runs a model by a script."""

    program: Path
    libraries: dict[bool, Path]  # patched or not -> folder of the shared libraries
    scratch: Path

    def run(
        self, model: Path, script: Iterable[str], *, patched: bool = True
    ) -> tuple[npt.NDArray[np.float32], str]:
        """What the script wrote, flat, and what it printed.

        Raises:
            AssertionError: the driver failed; holds what it said.
        """
        output = self.scratch / "logits.bin"
        # two threads of a program that waits busily are slow beside another test
        lines = [
            f"{line} n_threads=1" if line.startswith("ctx ") and "n_threads" not in line else line
            for line in script
        ]
        result = subprocess.run(
            [self.program, model, output],
            input="\n".join(lines) + "\n",
            env={"LD_LIBRARY_PATH": str(self.libraries[patched])},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-2000:]
        return np.fromfile(output, np.float32), result.stdout


def add(sequence: int | str, position: int, tokens: Iterable[int]) -> str:
    return f"add {sequence} {position} {' '.join(map(str, tokens))}"
