"""onnxruntime-genai: one tier per sequence, picked by the length that it allocates."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from longrope_export.config import LongRopeConfig
from longrope_export.errors import LongRopeError, ModelError, ToolError
from longrope_export.runtimes.base import DEFAULT_CHUNK, Logits, RuntimeInfo, Tokens

P = ParamSpec("P")
R = TypeVar("R")


def _own_errors(call: Callable[P, R]) -> Callable[P, R]:
    """What genai raises, which are kinds of its own, becomes a ModelError."""

    @wraps(call)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return call(*args, **kwargs)
        except LongRopeError:
            raise
        except Exception as error:
            raise ModelError(
                f"onnxruntime-genai cannot run a sequence: {error}: it may be longer than the folder "
                "was made for"
            ) from error

    return wrapped


class GenaiModel:
    """A folder with genai_config.json, ours or one that onnxruntime-genai's builder made.

    Args:
        folder: the folder.
        max_length: tokens to allocate; in folders of ours the tier follows from it. None leaves
            what genai_config.json says.
        threads: of ONNX Runtime; None leaves what genai_config.json says.

    Raises:
        ToolError: onnxruntime-genai is not installed.
        ModelError: it cannot load the folder.
    """

    def __init__(
        self, folder: Path, *, max_length: int | None = None, threads: int | None = None
    ) -> None:
        try:
            import onnxruntime_genai
        except ImportError as error:
            raise ToolError("this needs: pip install onnxruntime-genai") from error
        from longrope_export.onnx_metadata import read_config, read_precision

        self.genai: Any = onnxruntime_genai
        self.max_length = max_length
        try:
            self.config: LongRopeConfig | None = read_config(folder)
            precision = read_precision(folder)
        except ModelError:  # not one of ours
            self.config, precision = None, "unknown"
        self.info = RuntimeInfo(
            name="onnxruntime-genai",
            version=f"onnxruntime-genai {onnxruntime_genai.__version__}",
            path=folder,
            precision=precision,
            switching="once, by max_length" if self.config else "by the folder's own graph",
            any_position=False,
            rows_apart=True,
            batches=False,
            float32_angles=self.config is None,  # ours have float64 tables in the graph
        )
        try:
            settings = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
            self._default_length = int(settings["search"]["max_length"])
            chosen = self.genai.Config(str(folder))
            if threads is not None:
                options = {"intra_op_num_threads": threads}
                chosen.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            self.model = self.genai.Model(chosen)
        except Exception as error:  # genai raises its own, and the file may lack or be damaged
            raise ModelError(f"{folder}: onnxruntime-genai cannot load it: {error}") from error

    @_own_errors
    def start(
        self,
        *,
        declared_length: int | None = None,
        chunk_size: int = DEFAULT_CHUNK,
        first_position: int = 0,
    ) -> GenaiSequence:
        """An empty sequence, under the tier of max_length or, without one, the declared length.

        Raises:
            ModelError: first_position is not 0, or genai cannot allocate that much.
        """
        if first_position:
            raise ModelError("onnxruntime-genai counts positions from 0")
        length = self.max_length or declared_length or self._default_length
        settings = self.genai.GeneratorParams(self.model)
        settings.set_search_options(max_length=length, do_sample=False)
        return GenaiSequence(self.genai.Generator(self.model, settings), chunk_size)

    def batch(self, sequences: Sequence[Tokens], keep: int) -> list[Logits]:
        """One after the other: genai hands out no logits of the inside of a padded batch."""
        return [self.start(declared_length=len(s)).append(s, keep=keep) for s in sequences]

    def tokenize(self, text: str) -> list[int] | None:
        """By genai's own tokenizer; None if the folder has none."""
        try:
            tokenizer = self.genai.Tokenizer(self.model)
            tokenizer.update_options(add_special_tokens="true")
            return [int(token) for token in tokenizer.encode(text)]
        except Exception:  # genai's own kinds
            return None

    def detokenize(self, tokens: Tokens) -> str | None:
        """See Runtime."""
        try:
            return str(self.genai.Tokenizer(self.model).decode(np.asarray(tokens, np.int32)))
        except Exception:  # genai's own kinds
            return None

    def close(self) -> None:
        """Forget the model."""
        del self.model


class GenaiSequence:
    """One generator. Made by GenaiModel.start."""

    def __init__(self, generator: Any, chunk_size: int) -> None:
        self._generator, self._chunk = generator, chunk_size
        self.length = 0

    @_own_errors
    def append(self, tokens: Tokens, *, keep: int | None = None) -> Logits:
        """See RunningSequence; genai gives the last logits of a call, so kept tokens go singly."""
        ids = np.asarray(tokens, np.int32)
        wanted = len(ids) if keep is None else min(keep, len(ids))
        first_kept = len(ids) - wanted  # its call may begin before it
        for begin in range(0, first_kept + 1, self._chunk):
            self._run(ids[begin : min(begin + self._chunk, first_kept + 1)])
        kept = [self._last_logits()]
        for token in ids[first_kept + 1 :]:
            self._run(token[None])
            kept.append(self._last_logits())
        self.length += len(ids)
        return np.stack(kept)

    def _run(self, ids: npt.NDArray[np.int32]) -> None:
        self._generator.append_tokens(ids[None])

    def _last_logits(self) -> Logits:
        logits: Logits = np.asarray(self._generator.get_logits())[0, -1].astype(np.float32)
        return logits
