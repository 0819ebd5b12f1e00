"""A source model as transformers loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longrope_export.errors import ModelError, UnsupportedError


def load_torch_model(
    path: Path, dtype: str = "float32", *, trust_remote_code: bool = False
) -> tuple[Any, str]:
    """transformers' model of a folder or a GGUF, in eval mode, and the versions that loaded it.

    Args:
        dtype: float32, float16, bfloat16; a quantized GGUF is unpacked to it.
        trust_remote_code: run the modelling file that lies in the folder.

    Raises:
        UnsupportedError: torch or transformers is not installed.
        ModelError: transformers cannot load it.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UnsupportedError(
            f"this needs torch and transformers 5: {error}; "
            "pip install 'longrope-export[transformers]'"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    folder, extra = gguf_arguments(path)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, **extra
        )
    except Exception as error:  # many kinds, from many libraries
        raise ModelError(f"{path}: transformers cannot load it: {error}") from error
    return model.eval(), f"transformers {transformers.__version__}, torch {torch.__version__}"


def load_torch_tokenizer(path: Path) -> Any:
    """transformers' tokenizer of a folder or a GGUF.

    Raises:
        UnsupportedError: transformers is not installed.
        ModelError: there is no tokenizer, or transformers does not know it.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UnsupportedError(
            "a text needs: pip install 'longrope-export[transformers]'"
        ) from error
    folder, extra = gguf_arguments(path)
    try:
        return AutoTokenizer.from_pretrained(folder, **extra)
    except Exception as error:  # many kinds, from many libraries
        raise ModelError(f"{path}: transformers finds no tokenizer: {error}") from error


def encode_plainly(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text by a tokenizer of transformers, without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def gguf_arguments(path: Path) -> tuple[Path, dict[str, str]]:
    """The folder and further arguments that transformers' from_pretrained wants for a path."""
    return (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})


def default_device() -> str:
    """cuda where torch finds a GPU, else cpu.

    Raises:
        UnsupportedError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise UnsupportedError(
            f"this needs torch: {error}; pip install 'longrope-export[transformers]'"
        ) from error
    return "cuda" if torch.cuda.is_available() else "cpu"
