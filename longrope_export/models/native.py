"""The RoPE that a Hugging Face folder brings along, as a LongRopeConfig (a GGUF: native_gguf).

A plain model has one tier with factors of 1. A model that was scaled before (Llama 3.1, YaRN,
Phi-3's longrope, a file that we wrote) has the tiers it was trained or exported with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from longrope_export import methods
from longrope_export.config import FactorTier, LongRopeConfig, SwitchPolicy
from longrope_export.definition import from_json
from longrope_export.errors import ConfigError, ModelError, UnsupportedError
from longrope_export.models.hf_config import HfConfig, read_json_object
from longrope_export.rope import (
    FloatArray,
    compute_inv_freq,
    longrope_attention_factor,
    yarn_attention_factor,
)
from longrope_export.stock_rope import (
    DEFINITION_FILE,
    DEFINITION_KEY,
    first_difference,
    stock_config,
)

MAX_LAYERS = 1 << 16

# what numbers of absurd size or values of the wrong kind raise on their way through the formulas
MALFORMED = (TypeError, ValueError, OverflowError, ZeroDivisionError)


def native_of_hf(config: HfConfig) -> LongRopeConfig:
    """The RoPE that config.json declares, as transformers 5 computes it.

    "dynamic" becomes a ladder, since its base moves with the length. A folder that we exported
    holds the whole config beside what stock code reads (longrope.json): that is the one returned.

    Raises:
        ModelError: a rope type that is not known here, values that do not fit, or a longrope.json
            that contradicts config.json.
    """
    declared = declared_by_hf(config)
    definition = read_definition(config)
    if definition is None:
        return declared
    difference = first_difference(stock_config(definition), declared)
    if difference is not None:
        raise ModelError(
            f"{config.path}: contradicts {DEFINITION_FILE} beside it: {difference}. If config.json "
            f"was changed on purpose, remove {DEFINITION_FILE} and the key {DEFINITION_KEY!r}; "
            f"else export the folder again"
        )
    return definition


def read_definition(config: HfConfig) -> LongRopeConfig | None:
    """longrope.json, or the same under a key of config.json; None without either."""
    path, inside = config.folder / DEFINITION_FILE, config.values.get(DEFINITION_KEY)
    found = []
    if path.is_file():
        found.append(from_json(read_json_object(path), str(path)))
    if isinstance(inside, dict):
        found.append(from_json(inside, f"{config.path}: {DEFINITION_KEY}"))
    if len(found) == 2 and found[0] != found[1]:
        raise ModelError(
            f"{config.path}: its key {DEFINITION_KEY!r} and {DEFINITION_FILE} hold different "
            f"factors: remove the stale one, or export the folder again"
        )
    return found[0] if found else None


def declared_by_hf(config: HfConfig) -> LongRopeConfig:
    """native_of_hf without a look at longrope.json; raises as it does."""
    rope = config.rope
    if not 0 < rope.partial_rotary_factor <= 1:
        raise ModelError(
            f"{config.path}: partial_rotary_factor must be above 0 and at most 1, "
            f"got {rope.partial_rotary_factor}"
        )
    declared = config.require_int("max_position_embeddings")
    reader = _HfScaling(config, declared)
    builders = {
        "default": reader.plain,
        "linear": reader.linear,
        "dynamic": reader.dynamic,
        "yarn": reader.yarn,
        "longrope": reader.longrope,
        "llama3": reader.llama3,
    }
    if rope.rope_type not in builders:
        raise ModelError(
            f"{config.path}: rope type {rope.rope_type!r} is not known; "
            f"known are {', '.join(sorted(builders))}"
        )
    try:
        window, tiers = builders[rope.rope_type]()
        return LongRopeConfig(
            rope_theta=rope.rope_theta,
            rotary_dim=rope.rotary_dim,
            original_max_position_embeddings=window,
            max_position_embeddings=tiers[-1].max_length,
            tiers=tiers,
            switch=SwitchPolicy.SEQUENCE,
            layers=_global_layers(config),
            provenance={"method": f"model ({rope.rope_type})"},
        )
    except (ConfigError, *MALFORMED) as error:
        raise ModelError(f"{config.path}: the rope settings make no sense: {error}") from error


_Tiers = tuple[int, tuple[FactorTier, ...]]


class _HfScaling:
    """One method per rope type: the trained window and the tiers."""

    def __init__(self, config: HfConfig, declared: int) -> None:
        self.config, self.declared = config, declared
        self.rope = config.rope
        self.block: Mapping[str, Any] = self.rope.parameters
        self.inv_freq = compute_inv_freq(self.rope.rope_theta, self.rope.rotary_dim)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.block.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ModelError(
                f"{self.config.path}: rope {key} must be a number above 0, got {value!r}"
            )
        return float(value)

    def tier(self, length: int, factors: FloatArray, attention_factor: float = 1.0) -> FactorTier:
        return FactorTier(length, tuple(factors.tolist()), 0, attention_factor)

    def plain(self) -> _Tiers:
        return self.declared, (self.tier(self.declared, np.ones_like(self.inv_freq)),)

    def linear(self) -> _Tiers:
        factor = self.number("factor")
        window = self.rope.original_max_position_embeddings or round(self.declared / factor)
        return window, (self.tier(self.declared, methods.pi_factors(self.inv_freq, factor)),)

    def dynamic(self) -> _Tiers:
        if self.block.get("alpha") is not None:
            raise UnsupportedError(
                f"{self.config.path}: rope type 'dynamic' with alpha {self.block['alpha']!r:.60} "
                f"(HunYuan) is a fixed base of another formula, which is not known here; expected "
                f"a block without alpha"
            )
        factor, window = self.number("factor"), self.declared
        step = max(window // 16, 1)
        target = round(window * factor)
        if factor > 1024:
            raise ConfigError(f"dynamic factor {factor:g} is beyond any use (at most 1024)")
        if target <= window:
            return self.plain()
        tiers = [self.tier(window, np.ones_like(self.inv_freq))]
        for length in [*range(window + step, target, step), target]:
            ratio = length / window
            factors = methods.dynamic_ntk_factors(self.inv_freq, ratio, factor)
            tiers.append(self.tier(length, factors))
        return window, tuple(tiers)

    def yarn(self) -> _Tiers:
        window = self.rope.original_max_position_embeddings or self.declared
        # an explicit null means the quotient, a missing key is an error, as in transformers
        factor = self.number("factor", self.declared / window if "factor" in self.block else None)
        factors = methods.yarn_factors(
            self.inv_freq,
            factor,
            window,
            self.number("beta_fast", 32.0),
            self.number("beta_slow", 1.0),
            "code" if self.block.get("truncate", True) else "code-exact",
        )
        target = max(self.declared, round(window * factor))
        return window, (self.tier(target, factors, self._yarn_attention(factor)),)

    def _yarn_attention(self, factor: float) -> float:
        if self.block.get("attention_factor") is not None:
            return self.number("attention_factor")
        if self.block.get("mscale") and self.block.get("mscale_all_dim"):
            # DeepSeek's form: the quotient of two YaRN factors with scaled logarithms
            above = yarn_attention_factor(factor, self.number("mscale"))
            return above / yarn_attention_factor(factor, self.number("mscale_all_dim"))
        return yarn_attention_factor(factor)

    def llama3(self) -> _Tiers:
        factors = methods.llama3_factors(
            self.inv_freq,
            self.number("factor"),
            self.rope.original_max_position_embeddings or self.declared,
            self.number("low_freq_factor", 1.0),
            self.number("high_freq_factor", 4.0),
        )
        window = self.rope.original_max_position_embeddings or self.declared
        return window, (self.tier(self.declared, factors),)

    def longrope(self) -> _Tiers:
        window = self.rope.original_max_position_embeddings or self.declared
        long = self._factor_list("long_factor")
        short = self._factor_list("short_factor")
        long_attention, short_attention = self._longrope_attention(window)
        if self.declared <= window:
            return self.declared, (FactorTier(self.declared, short, 0, short_attention),)
        tiers = (
            FactorTier(window, short, 0, short_attention),
            FactorTier(self.declared, long, 0, long_attention),
        )
        return window, tiers if tiers[0] != _with_length(tiers[1], window) else tiers[1:]

    def _factor_list(self, key: str) -> tuple[float, ...]:
        values = self.block.get(key)
        pairs = len(self.inv_freq)
        if not isinstance(values, list) or len(values) != pairs:
            got = f"{len(values)} values" if isinstance(values, list) else repr(values)
            raise ModelError(
                f"{self.config.path}: {key} must list rotary_dim / 2 = {pairs} numbers, got {got}"
            )
        return tuple(values)

    def _longrope_attention(self, window: int) -> tuple[float, float]:
        """(long, short): attention_factor, else the two mscales, else the sqrt formula."""
        given = self.block.get("attention_factor")
        scales = (self.block.get("long_mscale"), self.block.get("short_mscale"))
        if given is not None:
            if any(scale is not None and scale != given for scale in scales):
                raise ModelError(
                    f"{self.config.path}: attention_factor {given} contradicts long_mscale / "
                    f"short_mscale {scales}: transformers reads the first, vLLM the others; "
                    f"make them equal or remove one"
                )
            return self.number("attention_factor"), self.number("attention_factor")
        if None not in scales:
            return self.number("long_mscale"), self.number("short_mscale")
        ratio = self.number("factor", self.declared / window)
        formula = longrope_attention_factor(ratio, window)
        return formula, formula


def _with_length(tier: FactorTier, length: int) -> FactorTier:
    return FactorTier(length, tier.rescale_factors, tier.num_start_tokens, tier.attention_factor)


def _global_layers(config: HfConfig) -> tuple[int, ...] | None:
    """Layers with full attention, for families where only those are rescaled."""
    if not config.family.global_layers_only:
        return None
    layers = config.require_int("num_hidden_layers")
    if layers > MAX_LAYERS:
        raise ConfigError(f"num_hidden_layers {layers} is beyond any model")
    types = config.get("layer_types")
    if isinstance(types, list):
        return tuple(i for i, kind in enumerate(types) if kind == "full_attention")
    pattern = int(config.get("sliding_window_pattern") or 6)
    return tuple(i for i in range(layers) if (i + 1) % pattern == 0)
