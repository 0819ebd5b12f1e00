"""Reference logits of all rows of a plan, on the source's weights or on those of an export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from longrope_export.config import LongRopeConfig, SwitchPolicy
from longrope_export.verify.layers import MOST_TOKENS, Hidden
from longrope_export.verify.own_weights import use_weights_of
from longrope_export.verify.plan import Case, Row, rows_of
from longrope_export.verify.reference import Reference

Say = Callable[[str, float], None]  # (what is being done, share that is done, 0 to 1)


class ReferenceRows:
    """Reference logits of every row that any case asks for, computed once.

    Args:
        path: the source model.
        tokens: (n,) ids of the text.
        say: progress.
        own_weights: an export whose quantized weights, unpacked, take the place of the source's.

    Attributes:
        path: the source model.
        problems: of own_weights: what is no rounding of the source's.

    Raises:
        UnsupportedError: own_weights cannot be unpacked into the model.
        LongRopeError: the model cannot be loaded.
    """

    def __init__(
        self,
        path: Path,
        config: LongRopeConfig,
        tokens: Sequence[int],
        cases: Sequence[Case],
        say: Say = lambda what, share: None,
        own_weights: Path | None = None,
    ) -> None:
        wanted = {row for case in cases for row in rows_of(case, config)}
        self.path, self._config, self._tokens, self._say = path, config, tokens, say
        self._causal = causal = config.switch is SwitchPolicy.CAUSAL
        self._own_weights = own_weights
        self.problems: list[str] = []
        self._logits: dict[Row, npt.NDArray[np.float32]] = {}
        self._layers: dict[Row, Hidden] = {}
        self._again: Reference | None = None
        reference = self._load()
        # one pass serves all rows of a sequence that is long enough; under `sequence`, of a tier
        passes: dict[tuple[int, int | None], list[Row]] = {}
        for row in sorted(wanted, key=lambda row: row.position):
            passes.setdefault((row.origin, None if causal else row.tier), []).append(row)
        for (origin, tier), rows in passes.items():
            keep = [row.position - origin for row in rows]
            logits = reference.logits(
                tokens[: keep[-1] + 1],
                keep=keep,
                length=self._length_of(tier),
                first_position=origin,
            )
            self._logits.update(zip(rows, logits, strict=True))

    def _load(self) -> Reference:
        name = "reference" if self._own_weights is None else "reference on unpacked weights"
        reference = Reference(self.path, self._config, lambda share: self._say(name, share))
        if self._own_weights is not None:
            self.problems = use_weights_of(reference.model, self._own_weights)
        return reference

    def on_weights_of(self, export: Path, cases: Sequence[Case]) -> ReferenceRows:
        """The same on a quantized export's own weights; raises as the constructor does."""
        return ReferenceRows(self.path, self._config, self._tokens, cases, self._say, export)

    def _length_of(self, tier: int | None) -> int | None:
        return None if tier is None else self._config.tiers[tier].max_length

    def layer_outputs(self, row: Row) -> Hidden:
        """(layers, n, width): what each layer hands to the next one, up to a row's token.

        Loads the model again, which `forget_model` then drops.
        """
        if row not in self._layers:
            self._again = self._again or self._load()
            count = row.position - row.origin + 1
            self._layers[row] = self._again.layer_outputs(
                self._tokens[:count],
                min(count, MOST_TOKENS),
                length=self._length_of(None if self._causal else row.tier),
                first_position=row.origin,
            )
        return self._layers[row]

    def forget_model(self) -> None:
        """Give back its memory; rows and outputs of layers stay."""
        self._again = None

    @property
    def vocabulary(self) -> int:
        """Tokens that a row of logits is about."""
        return len(next(iter(self._logits.values())))

    def of(self, rows: Sequence[Row]) -> npt.NDArray[np.float32]:
        """(len(rows), vocabulary)."""
        return np.stack([self._logits[row] for row in rows])
