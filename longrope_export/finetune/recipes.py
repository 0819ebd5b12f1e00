"""Recipes: how a published fine-tune was done, as data. The shipped ones lie in recipes/*.toml."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from longrope_export.errors import ConfigError
from longrope_export.finetune.toml_files import (
    did_you_mean,
    parse_toml,
    read_toml_file,
    shipped_names,
)

_WHOLE = {
    "window": 2, "tokens": 2, "steps": 1, "batch_size": 1, "warmup_steps": 0, "chunks": 1,
    "lora_rank": 0, "lora_alpha": 1, "retrieval_keys": 1,
}  # fmt: skip
_FLAGS = ("true_places", "gradient_checkpointing")
# whether 0 itself is left out
_REAL = {
    "epochs": True, "learning_rate": True, "short_share": False, "weight_decay": False,
    "max_grad_norm": False, "retrieval_share": False,
}  # fmt: skip


class Schedule(StrEnum):
    """How the learning rate goes after the warm-up, by the names of transformers."""

    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant_with_warmup"


class Layout(StrEnum):
    """How works become rows.

    - PACKED: works behind each other, cut into rows; positions and attention run across works
      (LongRoPE, arXiv 2402.13753, section 4.1).
    - DOCUMENTS: the same, but positions begin anew at each work and attention stays within it.
    - LONG: rows from within works of a window and more.
    - MIXED: works up to short_length as in DOCUMENTS, longer ones as in PACKED, in a fixed share
      of rows (LongRoPE2, arXiv 2502.20082, section 3.3).
    - POSE: short rows with positions spread over the window (PoSE, arXiv 2309.10400).
    - SINGLE: a work to a row, of its own length; a longer one is cut at the window, and a piece
      without targets is dropped (conversations in Entropy-ABF, arXiv 2401.07004).
    """

    PACKED = "packed"
    DOCUMENTS = "documents"
    LONG = "long"
    MIXED = "mixed"
    POSE = "pose"
    SINGLE = "single"


class Rule(StrEnum):
    """Under which factors a training token is computed.

    FROZEN: the last tier's, whatever its position; what the papers do, and all that a
        sequence-parallel shard can do.
    SEQUENCE: those of the tier that its document's length picks; LongRoPE2's mixed windows.
    CAUSAL: those of the tier of its own position.
    """

    FROZEN = "frozen"
    SEQUENCE = "sequence"
    CAUSAL = "causal"


@dataclass(frozen=True)
class Recipe:
    """One fine-tune.

    Attributes:
        name: of the file, without its suffix.
        source: where the numbers come from.
        reproduces: what the authors reached with it, in words.
        window: positions that a row of training spans, tokens; None for the factors' target.
        tokens: of a row under the layout pose, at most the window; None for all of it.
        steps: optimizer steps; None for `epochs` passes over the data.
        batch_size: rows of one step, over all devices and accumulated passes.
        learning_rate: its peak.
        warmup_steps: rising linearly from 0.
        betas: of AdamW.
        max_grad_norm: the gradient is scaled down to it; 0 for never.
        layout: of the rows, see Layout.
        chunks: pieces of a row under pose.
        true_places: under pose, whether pieces are taken from where they stand in a long work.
        short_share: of the rows under mixed that hold short documents.
        retrieval_share: of the rows under pose or long that hide numbers in their text and ask for
            them at the end; of these the answers alone are learned.
        retrieval_keys: numbers of such a row.
        rule: see Rule.
        lora_rank: of adapters on every linear layer; 0 tunes all weights.
        lora_alpha: adapters are scaled by alpha / rank; None for twice the rank.
        gradient_checkpointing: keep only each layer's input for the backward pass.
    """

    name: str
    source: str
    reproduces: str
    window: int | None = None
    tokens: int | None = None
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    learning_rate: float = 2e-5
    schedule: Schedule = Schedule.LINEAR
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    layout: Layout = Layout.PACKED
    chunks: int = 2
    true_places: bool = False
    short_share: float = 0.3
    retrieval_share: float = 0.0
    retrieval_keys: int = 5
    rule: Rule = Rule.FROZEN
    lora_rank: int = 0
    lora_alpha: int | None = None
    gradient_checkpointing: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", self._choice("schedule", Schedule))
        object.__setattr__(self, "layout", self._choice("layout", Layout))
        object.__setattr__(self, "rule", self._choice("rule", Rule))
        if (self.steps is None) == (self.epochs is None):
            raise self._error("give steps or epochs, one of them")
        for field, least in _WHOLE.items():
            value = getattr(self, field)
            if value is not None and (type(value) is not int or value < least):
                raise self._error(f"{field} is {value!r}, expected a whole number from {least} on")
        for field in _FLAGS:
            if not isinstance(getattr(self, field), bool):
                raise self._error(f"{field} is {getattr(self, field)!r}, expected true or false")
        for field, above in _REAL.items():
            value = getattr(self, field)
            is_number = type(value) in (float, int) and math.isfinite(value)
            if value is not None and not (is_number and (value > 0 if above else value >= 0)):
                raise self._error(f"{field} is {value!r}, expected a number {'above' if above else 'from'} 0")  # fmt: skip
        if not _are_betas(self.betas):
            raise self._error(f"betas are {self.betas!r}, expected two numbers in [0, 1)")
        object.__setattr__(self, "betas", tuple(self.betas))

    def _error(self, words: str) -> ConfigError:
        return ConfigError(f"recipe {self.name}: {words}")

    def _choice(self, field: str, kind: type[StrEnum]) -> StrEnum:
        value = getattr(self, field)
        try:
            return kind(value)
        except ValueError as error:
            raise self._error(f"{field} is {value!r}, expected one of {', '.join(kind)}") from error

    def with_values(self, values: Mapping[str, Any]) -> Recipe:
        """This recipe with some values changed; steps given take the place of epochs.

        Raises:
            ConfigError: a value that is none.
        """
        changed = {name: value for name, value in values.items() if value is not None}
        if changed.get("steps") and changed.get("epochs"):
            raise self._error("steps and epochs are two ways to say the same: give one")
        if "steps" in changed:
            changed["epochs"] = None
        elif "epochs" in changed:
            changed["steps"] = None
        return dataclasses.replace(self, **changed)

    def check_reach(self, target: int) -> None:
        """Refuse rows that span more than factors for `target` tokens know.

        Raises:
            ConfigError: naming both numbers.
        """
        if self.window and self.window > target:
            raise self._error(
                f"its rows have {self.window} positions, the factors reach {target}: make factors "
                f"for {self.window}, or give a window of {target}"
            )

    def row_tokens(self, target: int) -> int:
        """Tokens of the longest row, for factors that reach `target`."""
        window = self.window or target
        return min(self.tokens or window, window) if self.layout == "pose" else window

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self) | {"betas": list(self.betas)}


def _are_betas(values: Any) -> bool:
    if not isinstance(values, list | tuple) or len(values) != 2:
        return False
    return all(type(value) in (float, int) and 0 <= value < 1 for value in values)


def recipe_names() -> list[str]:
    """The shipped ones."""
    return shipped_names("recipes")


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by its name, or one's own by the path of its TOML file.

    Raises:
        ConfigError: there is none; it is no TOML; a key that no recipe has, or a value that is none.
    """
    text = read_toml_file("recipes", name, "--recipe")
    return _parse(name if name in recipe_names() else Path(name).stem, text)


def _parse(name: str, text: str) -> Recipe:
    values = parse_toml(text, f"recipe {name}")
    known = {field.name for field in dataclasses.fields(Recipe)} - {"name"}
    for key in values:
        if key not in known:
            raise ConfigError(f"recipe {name}: unknown key {key}{did_you_mean(key, known)}")
    layout = values.get("layout", "packed")
    unused = {
        "tokens": layout == "pose",
        "chunks": layout == "pose",
        "true_places": layout == "pose",
        "short_share": layout == "mixed",
        "retrieval_share": layout in ("pose", "long"),
        "retrieval_keys": bool(values.get("retrieval_share")),
        "lora_alpha": bool(values.get("lora_rank")),
    }
    for key, is_used in unused.items():
        if key in values and not is_used:
            raise ConfigError(
                f"recipe {name}: {key} would be ignored with its layout, lora_rank and retrieval_share"
            )
    try:
        return Recipe(name=name, **values)
    except TypeError as error:
        raise ConfigError(f"recipe {name}: {error}; source and reproduces have to be there") from error  # fmt: skip
