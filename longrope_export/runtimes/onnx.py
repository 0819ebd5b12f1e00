"""Run an exported folder with plain ONNX Runtime, under the rule that its config declares.

ONNX Runtime runs one call at a time and knows nothing of tiers. What makes a sequence of calls
right is done here: the tier of every call is named, a prompt is cut at the borders, and cached keys
are rotated again (`causal`) or recomputed (`sequence`) when a sequence crosses one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longrope_export.config import FactorTier, SwitchPolicy
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

_SMALLEST_CAPACITY = 256
_SEVERITY_ERROR = 3
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}


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
        sequence = _WatchedSequence(self, declared_length, chunk_size, first_position)
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
            binding.bind_output(_present(name))
        session.run_with_iobinding(binding)
        for name, value in zip(names, binding.get_outputs(), strict=True):
            keys[name] = value


class OnnxSequence:
    """One sequence with its key-value cache. Made by OnnxModel.start."""

    def __init__(
        self,
        model: OnnxModel,
        declared_length: int | None,
        chunk_size: int,
        first_position: int = 0,
    ) -> None:
        if chunk_size < 1:
            raise ConfigError(f"chunk_size must be at least 1 token, got {chunk_size}")
        if declared_length is not None:
            model.config.select_tier(declared_length)
        self.model = model
        self.tokens: list[int] = []
        self.tier: FactorTier | None = None
        self._declared, self._chunk = declared_length or 0, chunk_size
        self._first = first_position
        self._caches: dict[str, Any] = {}
        self._capacity = 0

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self.tokens)

    def append(self, tokens: Tokens, *, keep: int | None = None) -> Logits:
        """Run more tokens behind those before.

        Args:
            tokens: (n,) token ids, at least one.
            keep: return the logits of the last `keep` tokens alone; None for all of them.

        Returns:
            (n or keep, vocabulary) float32.

        Raises:
            ConfigError: no tokens, or more than the config's target. The sequence is as before.
        """
        added = [int(token) for token in tokens]
        if not added:
            raise ConfigError("append needs at least one token")
        total = self.length + len(added)
        config = self.model.config
        final = config.select_tier(max(self._first + total, self._declared))
        wanted = len(added) if keep is None else min(keep, len(added))
        if config.switch is SwitchPolicy.SEQUENCE and self.tier is not final:
            self.tier = final  # the whole sequence under the new tier, keys and values anew
            added, self.tokens, self._caches, self._capacity = self.tokens + added, [], {}, 0
        self._reserve(total)
        kept = []
        while added:
            count = self._next_count(len(added))
            rest = len(added) - count
            self._enter_tier(self.length + count)
            logits = self._run(added[:count], min(max(wanted - rest, 1), count))
            if wanted > rest:
                kept.append(logits)
            self.tokens += added[:count]
            added = added[count:]
        return np.concatenate(kept)

    def _next_count(self, waiting: int) -> int:
        """Tokens of the next call: up to a chunk, and under `causal` up to the next border."""
        count = min(waiting, self._chunk)
        config = self.model.config
        if config.switch is SwitchPolicy.CAUSAL:
            begin = self._first + self.length
            count = min(count, config.select_tier(begin + 1).max_length - begin)
        return count

    def _enter_tier(self, length: int) -> None:
        if self.model.config.switch is SwitchPolicy.SEQUENCE:
            return
        tier = self.model.config.select_tier(self._first + length)
        if self.tier is not None and tier is not self.tier:
            positions = np.arange(self._first, self._first + self._filled(), dtype=np.int64)
            self.model.rerotate(self._caches, positions, self.tier, tier)
        self.tier = tier

    def _filled(self) -> int:
        """Columns of the cache: all that is allocated, or what the sequence has."""
        return self._capacity if self._shares_buffers else self.length

    @property
    def _shares_buffers(self) -> bool:
        return self.model.ops == "genai"

    def _reserve(self, length: int) -> None:
        """Allocate caches of at least `length` tokens, twice as much each time."""
        from onnxruntime import OrtValue

        if not self._caches and not self._shares_buffers:
            self._caches = {
                name: OrtValue.ortvalue_from_numpy(_empty_cache(value, 0))
                for name, value in self.model.caches.items()
            }
        if not self._shares_buffers or length <= self._capacity:
            return
        limit = self.model.config.max_position_embeddings
        declared = self._declared - self._first
        capacity = max(length, declared, _SMALLEST_CAPACITY, 2 * self._capacity)
        capacity = max(length, min(capacity, limit))
        for name, value in self.model.caches.items():
            larger = _empty_cache(value, capacity)
            smaller = self._caches.get(name)  # numpy() is a view: its owner has to live on
            if smaller is not None:
                larger[:, :, : self._capacity] = smaller.numpy()
            self._caches[name] = OrtValue.ortvalue_from_numpy(larger)
        self._capacity = capacity

    def _run(self, tokens: list[int], keep: int) -> Logits:
        outputs = self._outputs(self.model.session, tokens, keep)
        logits: Logits = outputs[0].numpy()[0].astype(np.float32)
        return logits

    def _outputs(
        self, session: Any, tokens: list[int], keep: int, more: Sequence[str] = ()
    ) -> list[Any]:
        """OrtValues: the logits, the caches, and the outputs named by `more`."""
        from onnxruntime import OrtValue

        assert self.tier is not None
        start, total = self.length, self.length + len(tokens)
        binding = session.io_binding()
        for name, array in (
            ("input_ids", np.asarray([tokens], np.int64)),
            ("attention_mask", np.ones((1, total), np.int64)),
            ("position_ids", np.arange(start, total, dtype=np.int64)[None] + self._first),
            ("rope_length", np.asarray([[self.tier.max_length]], np.int64)),
            ("num_logits_to_keep", np.asarray([keep], np.int64)),
        ):
            # bind_cpu_input knows no optional inputs
            binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array))
        binding.bind_output("logits")
        for name, cache in self._caches.items():
            binding.bind_ortvalue_input(name, cache)
            if self._shares_buffers:
                binding.bind_ortvalue_output(_present(name), cache)
            else:
                binding.bind_output(_present(name))
        for name in more:
            binding.bind_output(name)
        session.run_with_iobinding(binding)
        outputs: list[Any] = binding.get_outputs()
        if not self._shares_buffers:
            caches = outputs[1 : 1 + len(self._caches)]
            self._caches = dict(zip(self._caches, caches, strict=True))
        return outputs


class _WatchedSequence(OnnxSequence):
    """Runs a session with more outputs: those of layers."""

    session: Any
    names: list[str]
    outputs: LayerOutputs

    def _run(self, tokens: list[int], keep: int) -> Logits:
        outputs = self._outputs(self.session, tokens, keep, self.names)
        for layer, value in enumerate(outputs[-len(self.names) :]):
            self.outputs.put(layer, self.length, value.numpy()[0].astype(np.float32))
        logits: Logits = outputs[0].numpy()[0].astype(np.float32)
        return logits


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


def _present(past_name: str) -> str:
    return past_name.replace("past_key_values", "present")


def _empty_cache(value: Any, capacity: int) -> npt.NDArray[Any]:
    _, heads, _, head_dim = value.shape
    return np.zeros((1, heads, capacity, head_dim), np.dtype(_TYPES[value.type]))
