"""Other people's packages at versions that cannot live in the project's own environment.

Installed once into the user's cache, without their dependencies: those come from the environment
that runs the tests, behind them on the path.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from longrope_export.llama_cpp.cache import cache_folder, locked

TRANSFORMERS_4 = (
    "transformers==4.57.6",
    "huggingface_hub==0.36.2",
    "tokenizers==0.22.2",
)
MLX = ("mlx==0.32.4", "mlx-cpu==0.32.4", "mlx-lm==0.32.2")


class NotInstallableError(Exception):
    """pip found no such package for this machine, or no network."""


def install(requirements: tuple[str, ...]) -> Path:
    """The folder that holds these packages and nothing else."""
    words = "\n".join((*requirements, sys.version))
    key = hashlib.sha256(words.encode()).hexdigest()[:12]
    folder = cache_folder() / "peers" / f"{requirements[0].partition('=')[0]}-{key}"
    with locked(folder):
        if not folder.is_dir():
            partial = folder.with_suffix(".partial")
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            command += ["--no-compile", "--disable-pip-version-check", "--upgrade"]
            command += ["--target", str(partial), *requirements]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise NotInstallableError(done.stderr[-2000:])
            partial.rename(folder)
    return folder


def run_with(requirements: tuple[str, ...], script: Path, *arguments: object) -> None:
    """Run a Python script that finds the packages before the environment's own."""
    environment = {**os.environ, "PYTHONPATH": str(install(requirements)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
