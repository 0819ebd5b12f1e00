"""Run an exported folder with plain ONNX Runtime, under the rule that its config declares.

A sequence of calls, with its tiers and its cache, is in onnx_sequence.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longrope_export.config import FactorTier
from longrope_export.errors import ConfigError, ModelError, ToolError
from longrope_export.onnx_metadata import MODEL_FILE, parse_config
from longrope_export.runtimes.base import (
    DEFAULT_CHUNK,
    Hidden,
    LayerOutputs,
    Logits,
    RuntimeInfo,
    Tokens,
)
from longrope_export.runtimes.onnx_layers import with_layer_outputs
from longrope_export.runtimes.onnx_sequence import OnnxSequence, WatchedSequence, present_name

_SEVERITY_ERROR = 3
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"


class OnnxModel:
    """A folder written by `longrope-export onnx`.

    Args:
        folder: holds model.onnx, and rerotate.onnx where the config asks for one.
        providers: execution providers of ONNX Runtime, in order of preference.
        threads: of ONNX Runtime; None for its default.

    Raises:
        ToolError: onnxruntime is not installed.
        ModelError: no such folder, a damaged file, or a model that is not one of ours.
    """

    def __init__(
        self,
        folder: Path,
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int | None = None,
    ) -> None:
        self.folder = folder
        self._open = _session_opener(providers, threads)
        self.session = self._open(folder / MODEL_FILE)
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.config = parse_config(metadata, folder / MODEL_FILE)
        self.ops: str = metadata.get("longrope.ops", "")
        self.precision: str = metadata.get("longrope.precision", "")
        self.info = RuntimeInfo(
            name="ONNX Runtime, standard operators" if self.ops == "standard" else "ONNX Runtime",
            version=f"onnxruntime {_runtime_version()}",
            path=folder,
            precision=self.precision,
            switching="by the file's rule",
            batches=False,
        )
        self.caches = {
            value.name: value
            for value in self.session.get_inputs()
            if value.name.startswith("past")
        }
        self._rerotation: Any = None

    def start(
        self,
        *,
        declared_length: int | None = None,
        chunk_size: int = DEFAULT_CHUNK,
        first_position: int = 0,
    ) -> OnnxSequence:
        """An empty sequence.

        Args:
            declared_length: position behind the last token that the sequence will have in the
                end. Under `sequence` it picks the tier from the beginning, so that nothing is
                recomputed; under `causal` it changes nothing.
            chunk_size: most tokens of one call; smaller needs less memory.
            first_position: of the first token; nothing lies before it.
        """
        return OnnxSequence(self, declared_length, chunk_size, first_position)

    def logits(self, tokens: Tokens, *, chunk_size: int = DEFAULT_CHUNK) -> Logits:
        """(len(tokens), vocabulary) float32 logits of one sequence.

        Raises:
            ConfigError: no tokens, or more than the config's target.
        """
        return self.start(declared_length=len(tokens), chunk_size=chunk_size).append(tokens)

    def logits_of_batch(self, input_ids: npt.ArrayLike, attention_mask: npt.ArrayLike) -> Logits:
        """Logits of padded sequences, each with positions from 0; the padding may be on any side.

        Rows are run one by one: ONNX Runtime's attention takes no padding on the left, and only
        sequences under one tier together.

        Args:
            input_ids: (batch, tokens) integers.
            attention_mask: (batch, tokens), 1 for tokens, 0 for padding.

        Returns:
            (batch, tokens, vocabulary) float32, zero at the padding.

        Raises:
            ConfigError: the shapes differ, or a mask has holes or no token.
        """
        ids, mask = np.asarray(input_ids), np.asarray(attention_mask).astype(bool)
        if ids.ndim != 2 or ids.shape != mask.shape:
            raise ConfigError(
                f"input_ids and attention_mask must be (batch, tokens), got {ids.shape} and {mask.shape}"
            )
        rows = []
        for row, used in zip(ids, mask, strict=True):
            places = np.flatnonzero(used)
            if not len(places) or len(places) != places[-1] - places[0] + 1:
                raise ConfigError("attention_mask: each row must be one run of ones, without holes")
            rows.append((places, self.logits(row[used])))
        out = np.zeros((*ids.shape, rows[0][1].shape[-1]), np.float32)
        for index, (places, logits) in enumerate(rows):
            out[index, places] = logits
        return out

    def batch(self, sequences: Sequence[Tokens], keep: int) -> list[Logits]:
        """One after the other, see logits_of_batch."""
        return [
            self.start(declared_length=len(tokens)).append(tokens, keep=keep)
            for tokens in sequences
        ]

    def layer_outputs(
        self,
        calls: Sequence[Tokens],
        wanted: range,
        *,
        declared_length: int | None = None,
        chunk_size: int = DEFAULT_CHUNK,
        first_position: int = 0,
    ) -> Hidden | None:
        """See TellsLayers; a second session, whose weights are read again."""
        session, names = self._watching_session
        if not names:
            return None
        sequence = WatchedSequence(self, declared_length, chunk_size, first_position)
        sequence.session, sequence.names = session, names
        sequence.outputs = LayerOutputs(wanted)
        for tokens in calls:
            sequence.append(tokens, keep=1)
        return sequence.outputs.stacked()

    @cached_property
    def _watching_session(self) -> tuple[Any, list[str]]:
        model, names = with_layer_outputs(self.folder / MODEL_FILE, len(self.caches) // 2)
        return (self._open(model, self.folder) if names else None), names

    def tokenize(self, text: str) -> list[int] | None:
        """By tokenizer.json in the folder; None if there is none."""
        return None if self.tokenizer is None else list(self.tokenizer.encode(text).ids)

    def detokenize(self, tokens: Tokens) -> str | None:
        """See Runtime."""
        if self.tokenizer is None:
            return None
        return str(self.tokenizer.decode(list(map(int, tokens))))

    @cached_property
    def tokenizer(self) -> Any:
        """tokenizers' Tokenizer of tokenizer.json in the folder; None if there is none.

        Raises:
            ModelError: the file is damaged.
        """
        from tokenizers import Tokenizer

        path = self.folder / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise ModelError(f"{path}: damaged tokenizer: {error}") from error

    def close(self) -> None:
        """Forget the weights."""
        del self.session
        self.__dict__.pop("_watching_session", None)
        self._rerotation = None

    def generate(
        self,
        tokens: Tokens,
        max_new_tokens: int,
        *,
        end_tokens: Sequence[int] = (),
        choose: Callable[[Logits], int] = lambda logits: int(logits.argmax()),
        declared_length: int | None = None,
        chunk_size: int = DEFAULT_CHUNK,
    ) -> Iterator[int]:
        """New tokens, one at a time, the end token included.

        Args:
            choose: the next token from (vocabulary,) float32 logits; greedy without it.
            declared_length: see start; without it a `sequence` config moves to a longer tier,
                and recomputes, only when it must.
        """
        sequence = self.start(declared_length=declared_length, chunk_size=chunk_size)
        logits = sequence.append(tokens, keep=1)
        for count in range(max_new_tokens):
            token = choose(logits[-1])
            yield token
            if token in end_tokens or count + 1 == max_new_tokens:
                return
            logits = sequence.append([token])

    def rerotate(
        self,
        keys: dict[str, Any],
        positions: npt.NDArray[np.int64],
        old: FactorTier,
        new: FactorTier,
    ) -> None:
        """Run rerotate.onnx on key caches (name -> OrtValue), in place of the old values.

        Args:
            positions: of the columns of the caches.
        """
        if self._rerotation is None:
            self._rerotation = self._open(self.folder / "rerotate.onnx")
        session = self._rerotation
        binding = session.io_binding()
        binding.bind_cpu_input("position_ids", positions[None])
        binding.bind_cpu_input("from_length", np.asarray([[old.max_length]], np.int64))
        binding.bind_cpu_input("to_length", np.asarray([[new.max_length]], np.int64))
        names = [value.name for value in session.get_inputs() if value.name.startswith("past")]
        for name in names:
            binding.bind_ortvalue_input(name, keys[name])
            binding.bind_output(present_name(name))
        session.run_with_iobinding(binding)
        for name, value in zip(names, binding.get_outputs(), strict=True):
            keys[name] = value


def _runtime_version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def _session_opener(providers: Sequence[str], threads: int | None) -> Callable[..., Any]:
    try:
        import onnxruntime
    except ImportError as error:
        raise ToolError("running ONNX needs: pip install 'longrope-export[onnx]'") from error

    def open_session(model: Path | bytes, data_folder: Path | None = None) -> Any:
        """Of a file, or of a serialized model whose weights lie in data_folder."""
        path = model if isinstance(model, Path) else data_folder
        if isinstance(model, Path) and not model.is_file():
            raise ModelError(f"{path}: no such file; make it with `longrope-export onnx`")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _SEVERITY_ERROR  # optional inputs draw a warning each
        if threads is not None:
            options.intra_op_num_threads = threads
        if data_folder is not None:
            options.add_session_config_entry(_DATA_FOLDER, str(data_folder))
        try:
            return onnxruntime.InferenceSession(model, options, providers=list(providers))
        except Exception as error:  # ONNX Runtime's own classes share no base but Exception
            raise ModelError(f"{path}: ONNX Runtime cannot load it: {error}") from error

    return open_session
