"""llama.cpp, our build or the stock one, through the driver program: exact logits, no sampling."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from longrope_export.config import LongRopeConfig, SwitchPolicy
from longrope_export.errors import ModelError, ToolError
from longrope_export.gguf_format import read_header
from longrope_export.gguf_shards import shard_paths
from longrope_export.llama_cpp.binaries import require_binaries
from longrope_export.llama_cpp.driver import require_driver
from longrope_export.llama_cpp.options import BuildOptions
from longrope_export.llama_cpp.source import VERSION
from longrope_export.models.model import load_model
from longrope_export.runtimes.base import (
    DEFAULT_CHUNK,
    Hidden,
    LayerOutputs,
    Logits,
    RuntimeInfo,
    Tokens,
)

_STOCK = BuildOptions(patched=False)
_PROGRAMS = ("llama-completion",)  # brings the shared libraries along
_MOST_SEQUENCES = 4
_PADDING = 256  # of a context, in tokens


class LlamaCppModel:
    """A GGUF in llama.cpp.

    Args:
        path: the file.
        context: tokens to allocate for all sequences together; stock llama.cpp chooses short or
            long factors by it.
        patched: False runs stock llama.cpp.
        cache_type: of keys and values: f32, f16, bf16, q8_0, q4_0.
        flash_attention: on or off; a quantized cache needs it.
        threads: of llama.cpp.
        build: compile llama.cpp first where it is missing (minutes).

    Raises:
        ToolError: llama.cpp is not built, or cannot be.
        ModelError: llama.cpp refuses the file; holds what it said.
    """

    def __init__(
        self,
        path: Path,
        *,
        context: int,
        patched: bool = True,
        cache_type: str = "f32",
        flash_attention: bool = False,
        threads: int = 2,
        build: bool = False,
    ) -> None:
        model = load_model(path)
        self.config: LongRopeConfig | None = model.native
        self._reprocesses = patched and model.native.switch is SwitchPolicy.SEQUENCE
        self.info = RuntimeInfo(
            name="llama.cpp, patched" if patched else "llama.cpp",
            version=f"llama-cpp-python {VERSION}",
            path=path,
            precision=weight_precision(path),
            switching="by the file's rule" if patched else "once, by the allocated context",
            float32_angles=True,
        )
        libraries = require_binaries(_PROGRAMS, None if patched else _STOCK, build=build)
        self._scratch = tempfile.TemporaryDirectory()
        self._output = output = Path(self._scratch.name) / "logits"
        output.touch()
        self._errors = (Path(self._scratch.name) / "errors").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [require_driver(libraries), path, output],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={"LD_LIBRARY_PATH": str(libraries), "DYLD_LIBRARY_PATH": str(libraries)},
            text=True,
        )
        self.info = replace(self.info, process_id=self._process.pid)
        self._logits = output.open("rb")
        self.vocabulary = int(self.ask("vocab")[0])
        context = -(-context // _PADDING) * _PADDING
        self.tell(
            f"ctx n_ctx={context} n_batch={context} n_ubatch=512 n_seq_max={_MOST_SEQUENCES} "
            f"unified=1 type_k={cache_type} type_v={cache_type} fa={int(flash_attention)} "
            f"n_threads={threads}"
        )

    def start(
        self,
        *,
        declared_length: int | None = None,
        chunk_size: int = DEFAULT_CHUNK,
        first_position: int = 0,
    ) -> LlamaCppSequence:
        """An empty sequence; the sequence before it is forgotten."""
        return LlamaCppSequence(self, self._declare(declared_length), chunk_size, first_position)

    def _declare(self, length: int | None) -> int | None:
        self.tell("clear")
        return (length or 0) if self._reprocesses else None

    def batch(self, sequences: Sequence[Tokens], keep: int) -> list[Logits]:
        """At most four sequences, in one call of llama_decode."""
        if len(sequences) > _MOST_SEQUENCES:
            raise ToolError(f"at most {_MOST_SEQUENCES} sequences at once, got {len(sequences)}")
        self.tell("clear")
        for number, tokens in enumerate(sequences):
            if self._reprocesses:
                self.tell(f"length {number} {len(tokens)}")
            self.add(tokens[:-keep], 0, number)
        for number, tokens in enumerate(sequences):
            self.add(tokens[-keep:], len(tokens) - keep, number)
        return np.split(self.decode(keep * len(sequences)), len(sequences))

    def layer_outputs(
        self,
        calls: Sequence[Tokens],
        wanted: range,
        *,
        declared_length: int | None = None,
        chunk_size: int = DEFAULT_CHUNK,
        first_position: int = 0,
    ) -> Hidden:
        """See TellsLayers."""
        declared = self._declare(declared_length)
        sequence = _WatchedSequence(self, declared, chunk_size, first_position)
        sequence.outputs = LayerOutputs(wanted)
        for tokens in calls:
            sequence.append(tokens, keep=1)
        return sequence.outputs.stacked()

    def tokenize(self, text: str) -> list[int]:
        """By the GGUF's own vocabulary, with the special tokens that it asks for."""
        self.tell(f"tokenize {text.encode().hex() or '20'}")
        return [int(word) for word in self.ask("tokens")]

    def detokenize(self, tokens: Tokens) -> str:
        """By the GGUF's own vocabulary."""
        self.tell(f"detokenize {' '.join(str(int(token)) for token in tokens)}")
        return bytes.fromhex("".join(self.ask("text"))).decode(errors="replace")

    def close(self) -> None:
        """End the program."""
        with contextlib.suppress(OSError):
            self._process.communicate()
        self._logits.close()
        self._errors.close()
        self._scratch.cleanup()

    def add(self, tokens: Tokens, position: int, sequence: int = 0) -> None:
        self.tell(f"add {sequence} {position} {' '.join(str(int(token)) for token in tokens)}")

    def decode(self, keep: int) -> Logits:
        """(keep, vocabulary): the logits of the last tokens of what was added."""
        self.tell(f"decode {keep}")
        self.ask("time")
        return self._read(keep, self.vocabulary)

    def decode_layers(self, count: int) -> Hidden:
        """(layers, count, width): the outputs of all layers at the `count` tokens that were added."""
        self.tell("layers")
        num_layers, width = map(int, self.ask("layers"))
        self.ask("time")
        return self._read(num_layers * count, width).reshape(num_layers, count, width)

    def _read(self, rows: int, columns: int) -> Logits:
        data = self._logits.read(4 * rows * columns)
        # what was read becomes a hole: the program writes on behind it, and the disk stays empty
        os.truncate(self._output, 0)
        return np.frombuffer(data, np.float32).reshape(rows, columns)

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: `ask` says why
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def ask(self, answer: str) -> list[str]:
        """The words of the next line that begins with `answer`, without it.

        Raises:
            ModelError: the program has ended.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            words = line.split()
            if words and words[0] == answer:
                return words[1:]
        self._process.wait()
        self._errors.seek(0)
        said = "\n".join(self._errors.read().strip().splitlines()[-12:])
        raise ModelError(f"{self.info.path}: {self.info.name} stopped: {said}")


class LlamaCppSequence:
    """The one sequence of a LlamaCppModel. Made by LlamaCppModel.start."""

    def __init__(
        self, model: LlamaCppModel, declared: int | None, chunk_size: int, first_position: int
    ) -> None:
        self.model, self._chunk, self._first = model, chunk_size, first_position
        self._declared = declared  # None: nothing is ever declared or computed again
        self.tokens: list[int] = []

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self.tokens)

    def append(self, tokens: Tokens, *, keep: int | None = None) -> Logits:
        """See RunningSequence; under the rule `sequence` all is computed again where it must be."""
        added = [int(token) for token in tokens]
        wanted = len(added) if keep is None else min(keep, len(added))
        if self._declared is not None:
            end = self._first + self.length + len(added)
            added = self._moved_to_tier_of(max(end, self._declared)) + added
        kept = []
        while added:
            count = min(self._chunk, len(added))
            rest = len(added) - count
            self.model.add(added[:count], self._first + self.length)
            kept.append(self._decode(count, min(max(wanted - rest, 0), count)))
            self.tokens += added[:count]
            added = added[count:]
        return np.concatenate(kept)

    def _decode(self, count: int, keep: int) -> Logits:
        return self.model.decode(keep)

    def _moved_to_tier_of(self, total: int) -> list[int]:
        """Declare a length; the tokens that have to be computed again, taken out of the sequence."""
        again: list[int] = []
        if self.tokens:
            self.model.tell(f"must 0 {total}")
            if self.model.ask("must") == ["1"]:
                again, self.tokens = self.tokens, []
                self.model.tell("clear")
        self.model.tell(f"length 0 {total}")
        return again


class _WatchedSequence(LlamaCppSequence):
    """Hands out no logits from the wanted tokens on, but the outputs of layers."""

    outputs: LayerOutputs

    def _decode(self, count: int, keep: int) -> Logits:
        if self.length + count <= self.outputs.wanted.start:
            return super()._decode(count, keep)
        for layer, hidden in enumerate(self.model.decode_layers(count)):
            self.outputs.put(layer, self.length, hidden)
        return np.zeros((keep, self.model.vocabulary), np.float32)


def weight_precision(path: Path) -> str:
    """The type that most bytes of a GGUF's tensors have: fp32, fp16, bf16, or ggml's own name.

    Of a split model those of all its files count, the first of which may hold none.

    Raises:
        GgufError: a file is missing or damaged.
        ModelError: there are no tensors.
    """
    from gguf import GGMLQuantizationType

    sizes: Counter[int] = Counter()
    for shard in shard_paths(path):
        for tensor in read_header(shard).tensors:
            sizes[tensor.ggml_type] += tensor.num_bytes or 0
    if not sizes:
        raise ModelError(f"{path}: holds no tensors: fetch it again")
    name = GGMLQuantizationType(sizes.most_common(1)[0][0]).name.lower()
    return {"f32": "fp32", "f16": "fp16"}.get(name, name)
