"""Run llama.cpp's own converter on many folders in one process, since its imports take seconds.

A program of its own: PYTHONPATH must hold the llama.cpp source tree and its gguf-py. It reads a
JSON list of jobs from stdin: {"folder", "outtype", "output", "pre", "name"}; `pre` replaces the
hash look-up.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import sys
from pathlib import Path
from typing import Any


def keep_vocabulary(model: Any, kept: dict[str, Any]) -> None:
    """Let get_vocab_base answer from `kept`, by folder; the writer may change the lists it gets."""
    original, folder = model.get_vocab_base, str(model.dir_model)

    def get_vocab_base() -> Any:
        if folder not in kept:
            kept[folder] = original()
        tokens, types, pre = kept[folder]
        return list(tokens), list(types), pre

    model.get_vocab_base = get_vocab_base


def main() -> None:
    import gguf
    import torch
    import transformers

    conversion: Any = importlib.import_module("conversion")

    logging.disable(logging.WARNING)
    # the tokenizer of a folder is loaded once, not for each output type; so is what is made of it
    loader: Any = transformers.AutoTokenizer
    loader.from_pretrained = functools.lru_cache(loader.from_pretrained)
    file_types = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "bf16": gguf.LlamaFileType.MOSTLY_BF16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
        "auto": gguf.LlamaFileType.GUESSED,
    }
    vocabularies: dict[str, Any] = {}
    for job in json.load(sys.stdin):
        folder = Path(job["folder"])
        architecture = conversion.get_model_architecture(
            conversion.ModelBase.load_hparams(folder, False), conversion.ModelType.TEXT
        )
        model_class = conversion.get_model_class(architecture)
        model = model_class(
            folder, file_types[job["outtype"]], Path(job["output"]), model_name=job["name"]
        )
        if job["pre"]:
            model.get_vocab_base_pre = lambda tokenizer, name=job["pre"]: name
        keep_vocabulary(model, vocabularies)
        with torch.inference_mode():
            model.write()


if __name__ == "__main__":
    main()
