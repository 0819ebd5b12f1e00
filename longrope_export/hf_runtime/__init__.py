"""A LongRopeConfig on a live transformers model: both border rules, caches, training, generate().

Nothing of transformers is edited: the rotary embedding of the text model is replaced, two hooks
surround its forward, and where queries of one forward differ in tier, a registered attention
function stands in front of the model's own. docs/transformers.md says what is covered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longrope_export.config import LongRopeConfig
from longrope_export.errors import UnsupportedError
from longrope_export.factor_files import to_json

if TYPE_CHECKING:
    from torch import Tensor, nn


class LongRopeRuntime:
    """A definition that is at work on a model.

    Attributes:
        config: the definition.
        model: the model it was put on.
    """

    def __init__(self, model: nn.Module, config: LongRopeConfig, runtime: Any) -> None:
        self.model, self.config, self._runtime = model, config, runtime

    def freeze(self, tier_index: int | None) -> None:
        """Compute every token under one tier, whatever its position.

        For training with one factor set, and for sequence-parallel shards, which see only a part
        of the positions. A cache that goes on under another tier is brought to it first.

        Args:
            tier_index: 0 is the first tier, negative counts from the end; None ends it.

        Raises:
            UnsupportedError: there is no such tier.
        """
        self._runtime.freeze(tier_index)

    def tiers(self, cache: Any) -> Tensor | None:
        """(batch,) index of the tier under which the keys of each row of a cache stand.

        None for a cache that is empty or unknown to the runtime.
        """
        from longrope_export.hf_runtime.core.cached_rows import CachedRows

        rows = CachedRows.of(cache)
        return None if rows is None else rows.tiers


def apply_longrope(
    model: nn.Module,
    config: LongRopeConfig,
    *,
    pin_length: int | None = None,
    keep_keys: bool | None = None,
) -> LongRopeRuntime:
    """Put a config onto a transformers model, in place.

    From then on forward, training and generate() follow the definition: `causal` with keys rotated
    again at a border; `sequence` with the cache recomputed when a sequence outgrows its tier.

    Args:
        model: any model with a text model of a supported family inside (LlamaForCausalLM, ...).
        pin_length: only for switch = sequence: declares the final length in tokens of every
            sequence (prompt and everything generated). Its tier is used from the first token on,
            and nothing is recomputed; a longer sequence raises when its tier is full.
        keep_keys: only for switch = causal: keep the cached keys as they were computed beside the
            turned ones (half as much cache again, sliding-window layers apart), so that every
            border turns those and rounding does not add up. None does so where it matters: keys
            in half precision and more than 8 tiers.

    Raises:
        UnsupportedError: the model is not of a known family, or rope_theta, rotary_dim or a layer
            number of the config does not fit it; later, in forward: a sequence longer than the
            last tier, or a cache that cannot be brought to another tier.
    """
    try:
        from longrope_export.hf_runtime.core.runtime import install
    except ImportError as error:
        raise UnsupportedError(
            f"the live runtime needs torch and transformers 5: {error}; "
            f"pip install 'longrope-export[transformers]'"
        ) from error
    runtime = install(model, to_json(config), pin_length, keep_keys, UnsupportedError)
    return LongRopeRuntime(model, config, runtime)


def remove_longrope(model: nn.Module) -> None:
    """Take the config off again; the model is then as it was before apply_longrope.

    Raises:
        UnsupportedError: no config is at work on the model, or the one of its folder's own code
            (trust_remote_code).
    """
    from longrope_export.hf_runtime.core.runtime import find_text_model, has_definition

    text_model = find_text_model(model, UnsupportedError)
    if not has_definition(text_model, UnsupportedError):
        raise UnsupportedError(f"{type(model).__name__}: no LongRoPE config is at work on it")
    text_model.rotary_emb.runtime.remove()
