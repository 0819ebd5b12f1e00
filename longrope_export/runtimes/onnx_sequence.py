"""A sequence on plain ONNX Runtime: its calls, its tiers and its key-value cache.

ONNX Runtime runs one call at a time and knows nothing of tiers. What makes a sequence of calls
right is done here: the tier of every call is named, a prompt is cut at the borders, and cached keys
are rotated again (`causal`) or recomputed (`sequence`) when a sequence crosses one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from longrope_export.config import FactorTier, SwitchPolicy
from longrope_export.errors import ConfigError
from longrope_export.runtimes.base import LayerOutputs, Logits, Tokens

if TYPE_CHECKING:
    from longrope_export.runtimes.onnx import OnnxModel

_SMALLEST_CAPACITY = 256
_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}


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
                binding.bind_ortvalue_output(present_name(name), cache)
            else:
                binding.bind_output(present_name(name))
        for name in more:
            binding.bind_output(name)
        session.run_with_iobinding(binding)
        outputs: list[Any] = binding.get_outputs()
        if not self._shares_buffers:
            caches = outputs[1 : 1 + len(self._caches)]
            self._caches = dict(zip(self._caches, caches, strict=True))
        return outputs


class WatchedSequence(OnnxSequence):
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


def present_name(past_name: str) -> str:
    """Name of the output that continues a cache, by the name of its input."""
    return past_name.replace("past_key_values", "present")


def _empty_cache(value: Any, capacity: int) -> npt.NDArray[Any]:
    _, heads, _, head_dim = value.shape
    return np.zeros((1, heads, capacity, head_dim), np.dtype(_TYPES[value.type]))
