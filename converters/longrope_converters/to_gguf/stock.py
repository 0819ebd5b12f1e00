"""Convert an architecture that is not built in with llama.cpp's own convert_hf_to_gguf.py.

The script runs in a process of its own, on the pinned source. It needs torch and transformers:
those of the running interpreter where it has them, else an environment that is made once in the
user's cache folder. Nothing from the model folder is executed: the script sees a folder of links
without Python files, without pickles and without `auto_map`.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

from longrope_converters.to_gguf.checkpoint import error_without_safetensors
from longrope_export.errors import ToolError
from longrope_export.llama_cpp.cache import cache_folder, locked
from longrope_export.models.hf_config import read_json_object

logger = logging.getLogger(__name__)

_SCRIPT = "convert_hf_to_gguf.py"
_REQUIREMENTS = ("requirements-convert_legacy_llama.txt", "requirements-convert_hf_to_gguf.txt")
# what the tree's gguf-py imports; the package itself comes from the tree
_GGUF_REQUIREMENTS = ("pyyaml", "requests", "tqdm", "safetensors")
_NEEDED_MODULES = ("torch", "transformers", "sentencepiece", "google.protobuf")
_SETTINGS_WITH_CODE = ("config.json", "tokenizer_config.json")
_TAIL_LINES = 15


def convert_with_stock(
    folder: Path,
    outtype: str,
    output: Path,
    *,
    name: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write `output` with llama.cpp's converter.

    Args:
        folder: a Hugging Face folder.
        outtype: f32, f16, bf16, q8_0 or auto.
        output: a temporary name; on failure it may hold a part of a file.
        name: general.name.
        trust_remote_code: let the script see the folder as it is, with code and pickles.

    Raises:
        ModelError: the folder holds no safetensors.
        ToolError: the script or the making of its environment failed, with the command to repeat.
    """
    from longrope_export.llama_cpp.source import fetch_source

    check_source(folder)
    tree = fetch_source()
    python = _interpreter(tree)
    with _without_code(folder, keep_code=trust_remote_code) as visible:
        command = [str(python), str(tree / _SCRIPT), str(visible)]
        command += ["--outfile", str(output), "--outtype", outtype]
        command += ["--model-name", name] if name else []
        environment = {"PYTHONPATH": str(tree / "gguf-py"), "PYTHONNOUSERSITE": "1"}
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        by_hand = [str(folder) if part == str(visible) else part for part in command]
        _run(command, {**environment, **offline}, by_hand)


def check_source(folder: Path) -> None:
    """Refuse a folder without safetensors weights.

    Raises:
        ModelError: it holds none; says what it holds instead.
    """
    if not any(folder.glob("*.safetensors")):
        raise error_without_safetensors(folder)


@contextmanager
def _without_code(folder: Path, *, keep_code: bool) -> Iterator[Path]:
    """A folder of the same name whose files are links, less what could run code when loaded."""
    if keep_code:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="longrope-stock-") as temporary:
        visible = Path(temporary) / folder.absolute().name
        visible.mkdir()
        for path in folder.absolute().iterdir():
            if path.suffix in (".py", ".pyc", ".bin", ".pth", ".pt", ".pkl"):
                continue
            if path.name in _SETTINGS_WITH_CODE:
                values = read_json_object(path)
                values.pop("auto_map", None)
                (visible / path.name).write_text(json.dumps(values), encoding="utf-8")
            else:
                (visible / path.name).symlink_to(path)
        yield visible


def _interpreter(tree: Path) -> Path:
    if all(_has_module(module) for module in _NEEDED_MODULES):
        return Path(sys.executable)
    return _own_environment(_requirements(tree))


def _has_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package of a dotted name is missing
        return False


def _requirements(tree: Path) -> list[str]:
    """What the tree pins for its converter, without package indexes and without gguf."""
    lines = [
        line.strip()
        for file_name in _REQUIREMENTS
        for line in (tree / "requirements" / file_name).read_text(encoding="utf-8").splitlines()
    ]
    pins = [line for line in lines if line and not line.startswith(("#", "-", "gguf"))]
    return [*pins, *_GGUF_REQUIREMENTS]


def _own_environment(requirements: Sequence[str]) -> Path:
    """The interpreter of a cached environment with these packages; made on first use."""
    key = sha256("\n".join([sys.version, *requirements]).encode()).hexdigest()[:16]
    environment = cache_folder() / "stock-converter" / key
    python, ready = environment / "bin" / "python", environment / "ready"
    with locked(environment):
        if not ready.is_file():
            logger.warning(
                "Installing torch and transformers for llama.cpp's converter into %s (once)",
                environment,
            )
            _run([sys.executable, "-m", "venv", "--clear", str(environment)], {})
            _run([str(python), "-m", "pip", "install", "--quiet", *requirements], {})
            ready.touch()
    return python


def _run(
    command: Sequence[str], environment: Mapping[str, str], by_hand: Sequence[str] | None = None
) -> None:
    """Run a program; `by_hand` is the command to show when it fails, if another one."""
    try:
        result = subprocess.run(
            command,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise ToolError(f"cannot start {command[0]}: {error.strerror}") from error
    if result.returncode:
        variables = [f"{key}={value}" for key, value in environment.items()]
        tail = "\n".join(result.stdout.splitlines()[-_TAIL_LINES:])
        raise ToolError(
            f"{Path(command[0]).name} ended with exit code {result.returncode}:\n{tail}\n"
            f"To repeat it by hand:\n  {shlex.join([*variables, *(by_hand or command)])}"
        )
