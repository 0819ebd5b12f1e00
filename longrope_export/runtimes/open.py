"""Which runtime runs a given export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from longrope_export.config import LongRopeConfig
from longrope_export.errors import ModelError
from longrope_export.models.hf_config import is_hf_folder, refuse_quantized
from longrope_export.runtimes.base import Runtime

RUNS_CODE = "transformers-remote"  # from the export's folder

RUNTIMES = {
    "llama.cpp": "the patched llama.cpp, for a GGUF",
    "llama.cpp-stock": "llama.cpp without our patch",
    "onnxruntime": "ONNX Runtime through longrope_export.runtimes.onnx",
    "genai": "onnxruntime-genai",
    "transformers": "our live runtime on transformers' classes",
    "transformers-stock": "transformers alone",
    RUNS_CODE: "the modelling file that lies in the folder (runs its code)",
    "server": "a running llama-server or vLLM, for an http:// address",
}


@dataclass(frozen=True)
class Export:
    """A path, or the address of a server, and the runtime that is to run it.

    Attributes:
        runtime: a name in RUNTIMES.
        path: a file or a folder; the address as text.
    """

    runtime: str
    path: Path | str

    def __str__(self) -> str:
        return f"{self.runtime}={self.path}"


def parse_export(text: str) -> Export:
    """`PATH` or `http://HOST:PORT`, or `RUNTIME=PATH` for another than the path's usual runtime.

    Raises:
        ModelError: there is no such path or runtime, or the path is none of the known kinds.
        UnsupportedError: a folder for transformers holds quantized weights.
    """
    export = _parse_export(text)
    if export.runtime.startswith("transformers"):
        refuse_quantized(Path(export.path))
    return export


def _parse_export(text: str) -> Export:
    address = text.removeprefix("server=")
    if address.startswith(("http://", "https://")):
        return Export("server", address)
    name, separator, rest = text.partition("=")
    if separator and name in RUNTIMES and name != "server":
        path = Path(rest)
        if not path.exists():
            raise ModelError(f"{text}: no such file or folder as {path}")
        return Export(name, path)
    path = Path(text)
    if path.is_file():
        return Export("llama.cpp", path)
    if (path / "model.onnx").is_file():
        return Export("onnxruntime", path)
    if path.is_dir() and is_hf_folder(path):
        return Export("transformers", path)
    raise ModelError(
        f"{text}: expected a GGUF, a folder with model.onnx or config.json, http://HOST:PORT, or "
        f"RUNTIME=PATH with a runtime of {', '.join(RUNTIMES)}"
    )


def open_runtime(
    export: Export,
    *,
    context: int,
    config: LongRopeConfig | None = None,
    vocabulary: int | None = None,
    threads: int | None = None,
    build: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
) -> Runtime:
    """Load an export.

    Args:
        context: tokens that have to fit; what llama.cpp and genai allocate.
        config: for the live runtime on a folder that carries no definition.
        vocabulary: tokens that a server has to know.
        threads: of the runtime; for transformers' they are torch's, in the whole process.
        build: compile llama.cpp where it is missing.
        dtype, device: of transformers' runtimes, see HfModel.

    Raises:
        LongRopeError: the runtime is not installed, or refuses the export.
    """
    from longrope_export.runtimes.genai import GenaiModel
    from longrope_export.runtimes.hf import Flavour, HfModel
    from longrope_export.runtimes.http import HttpModel
    from longrope_export.runtimes.llama_cpp import LlamaCppModel
    from longrope_export.runtimes.onnx import OnnxModel

    if export.runtime == "server":
        return HttpModel(str(export.path), vocabulary=vocabulary)
    path = Path(export.path)
    if threads is not None and export.runtime.startswith("transformers"):
        import torch

        torch.set_num_threads(threads)
    match export.runtime:
        case "llama.cpp" | "llama.cpp-stock":
            patched = export.runtime == "llama.cpp"
            return LlamaCppModel(
                path, context=context, patched=patched, threads=threads or 2, build=build
            )
        case "onnxruntime":
            return OnnxModel(path, threads=threads)
        case "genai":
            return GenaiModel(path, threads=threads)
        case "transformers":
            return HfModel(path, config=config, dtype=dtype, device=device)
        case "transformers-stock":
            return HfModel(path, flavour=Flavour.STOCK, dtype=dtype, device=device)
        case "transformers-remote":
            return HfModel(path, flavour=Flavour.REMOTE, dtype=dtype, device=device)
    raise ModelError(f"{export}: no runtime of that name; known are {', '.join(RUNTIMES)}")
