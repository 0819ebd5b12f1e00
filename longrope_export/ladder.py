"""From a closed form to a config: which tiers there are, and what stands in each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from longrope_export import __version__, methods
from longrope_export.config import (
    MAX_LENGTH,
    FactorTier,
    LogitScaling,
    LongRopeConfig,
    SwitchPolicy,
)
from longrope_export.errors import ConfigError
from longrope_export.models.model import Model
from longrope_export.rope import (
    FloatArray,
    compute_inv_freq,
    longrope_attention_factor,
    yarn_attention_factor,
)

MAX_TIERS = 100_000
ENTROPY_ABF_BASE_RATIO = 50.0  # 10,000 -> 500,000, arXiv 2401.07004 table 1
ENTROPY_ABF_EXEMPT_LAYERS = (0, 1)


@dataclass(frozen=True)
class MethodOptions:
    """Everything a method may be told; each one ignores nothing (see METHODS for what it takes).

    Attributes:
        attention: "none", "yarn", "longrope", a number as text, or None for the method's default.
        attention_strength: scales the logarithm inside the yarn and longrope formulas; 1 is theirs.
        base: new rope base of abf and entropy-abf, or None for the method's own choice.
        dynamic_factor: the config factor of dynamic-ntk, or None for target over window.
    """

    attention: str | None = None
    attention_strength: float = 1.0
    ramp: str = "code"
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    base: float | None = None
    dynamic_factor: float | None = None
    critical: int | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Extension:
    """One tier to be filled: from `window` to `length`, on the way to `target` tokens."""

    inv_freq: FloatArray
    rope_theta: float
    window: int
    length: int
    target: int

    @property
    def ratio(self) -> float:
        return self.length / self.window


@dataclass(frozen=True)
class Method:
    """A closed form: its factors, its default attention factor, and the options it takes."""

    summary: str
    factors: Callable[[Extension, MethodOptions], FloatArray]
    attention: str = "none"
    options: frozenset[str] = frozenset()


def _abf(extension: Extension, options: MethodOptions) -> FloatArray:
    base = options.base
    if base is None:
        base = methods.critical_base(extension.rope_theta, extension.window, extension.length)
    return methods.abf_factors(extension.inv_freq, base / extension.rope_theta)


def _entropy_abf(extension: Extension, options: MethodOptions) -> FloatArray:
    base_ratio = ENTROPY_ABF_BASE_RATIO
    if options.base is not None:
        base_ratio = options.base / extension.rope_theta
    return methods.abf_factors(extension.inv_freq, base_ratio)


METHODS: dict[str, Method] = {
    "pi": Method(
        "position interpolation: every pair slower by the ratio",
        lambda e, o: methods.pi_factors(e.inv_freq, e.ratio),
    ),
    "ntk": Method(
        "NTK-aware: a larger base, the first pair kept, the last slower by the ratio",
        lambda e, o: methods.ntk_factors(e.inv_freq, e.ratio),
    ),
    "dynamic-ntk": Method(
        "the base that transformers' dynamic NTK has at each tier's length",
        lambda e, o: methods.dynamic_ntk_factors(
            e.inv_freq,
            e.ratio,
            e.target / e.window if o.dynamic_factor is None else o.dynamic_factor,
        ),
        options=frozenset({"dynamic_factor"}),
    ),
    "yarn": Method(
        "YaRN: fast pairs kept, slow ones interpolated, a ramp between; attention factor",
        lambda e, o: methods.yarn_factors(
            e.inv_freq, e.ratio, e.window, o.beta_fast, o.beta_slow, o.ramp
        ),
        attention="yarn",
        options=frozenset({"ramp", "beta_fast", "beta_slow"}),
    ),
    "llama3": Method(
        "Llama 3.1: YaRN's ramp between two wavelengths, no attention factor",
        lambda e, o: methods.llama3_factors(
            e.inv_freq, e.ratio, e.window, o.low_freq_factor, o.high_freq_factor
        ),
        options=frozenset({"low_freq_factor", "high_freq_factor"}),
    ),
    "abf": Method(
        "a new base (--base), by default the one that fits the critical dimension",
        _abf,
        options=frozenset({"base"}),
    ),
    "entropy-abf": Method(
        "Entropy-ABF: base times 50 and logits scaled by the logarithm of the position",
        _entropy_abf,
        options=frozenset({"base"}),
    ),
    "longrope2": Method(
        "LongRoPE2's starting form: NTK below the critical pair, the full ratio from it on",
        lambda e, o: methods.longrope2_factors(e.inv_freq, e.ratio, e.window, o.critical, o.scale),
        attention="longrope",
        options=frozenset({"critical", "scale"}),
    ),
}


def parse_ladder(text: str, window: int, target: int) -> list[int]:
    """Tier lengths in tokens: "8192,16384,32768", "every:2048" or "x1.25".

    The first is always the window, the last the target.

    Raises:
        ConfigError: not one of these forms, lengths out of order or out of range.
    """
    try:
        if text.startswith("every:"):
            step = int(text.removeprefix("every:"))
            if step <= 0 or (target - window) / step > MAX_TIERS:
                raise ConfigError(f"--ladder {text}: the step gives no usable number of tiers")
            lengths = [*range(window, target, step), target]
        elif text.startswith("x"):
            ratio = float(text.removeprefix("x"))
            if not ratio > 1 or math.log(target / window, ratio) > MAX_TIERS:
                raise ConfigError(f"--ladder {text}: the ratio must be above 1")
            count = math.ceil(math.log(target / window, ratio) - 1e-9)
            lengths = [round(window * ratio**k) for k in range(count)] + [target]
        else:
            lengths = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"--ladder {text}: expected lengths (8192,16384,32768), every:STEP or xRATIO"
        ) from error
    lengths = list(dict.fromkeys(lengths))
    if lengths != sorted(lengths):
        raise ConfigError(f"--ladder {text}: lengths must rise")
    if lengths[0] != window:
        raise ConfigError(
            f"--ladder {text}: starts at {lengths[0]}, expected the model's own window {window}: "
            f"the first tier keeps the model as it is"
        )
    if lengths[-1] != target:
        raise ConfigError(f"--ladder {text}: ends at {lengths[-1]}, expected the target {target}")
    return lengths


def make_config(
    model: Model,
    method_name: str,
    target: int,
    *,
    ladder: str | None = None,
    switch: SwitchPolicy = SwitchPolicy.CAUSAL,
    options: MethodOptions | None = None,
    num_start_tokens: int | None = None,
) -> LongRopeConfig:
    """Factors of a closed form for a model.

    Without a ladder one tier serves every length, as the methods are published. With one, the
    tiers that the model brings along stay as they are and each longer length gets the closed form
    for that length.

    Args:
        target: new maximum length in tokens, above the model's window.
        ladder: see parse_ladder.
        num_start_tokens: start-token window of the tiers that are made; None keeps the model's.

    Raises:
        ConfigError: a target that is no extension, an option that the method does not take.
    """
    options = options or MethodOptions()
    method = METHODS.get(method_name)
    if method is None:
        raise ConfigError(f"method {method_name!r} is not known; known are {', '.join(METHODS)}")
    _check_options(method_name, method, options)
    native = model.native
    if num_start_tokens is None:
        num_start_tokens = native.tiers[-1].num_start_tokens
    elif num_start_tokens and any(f != 1 for f in native.tiers[-1].rescale_factors):
        raise ConfigError(
            "--num-start-tokens: start tokens turn as in plain RoPE, which is not what this model "
            "was trained with: its own factors are not 1"
        )
    if target > MAX_LENGTH:
        raise ConfigError(f"--target-length must be at most {MAX_LENGTH} tokens")
    if target <= model.window:
        raise ConfigError(
            f"--target-length {target}: the model's own window is {model.window} already"
        )
    lengths = [target] if ladder is None else parse_ladder(ladder, model.window, target)[1:]
    kept = native.tiers if ladder is not None else ()
    made = tuple(
        _make_tier(native, method, length, target, options, num_start_tokens) for length in lengths
    )
    scaling = native.logit_scaling
    if method_name == "entropy-abf" and scaling is not None:
        raise ConfigError(
            "the model scales its logits already: entropy-abf cannot be put on top of that"
        )
    if method_name == "entropy-abf":
        exempt = tuple(layer for layer in ENTROPY_ABF_EXEMPT_LAYERS if layer < model.num_layers)
        scaling = LogitScaling(model.window, exempt)
    return LongRopeConfig(
        rope_theta=native.rope_theta,
        rotary_dim=native.rotary_dim,
        original_max_position_embeddings=model.window,
        max_position_embeddings=target,
        tiers=kept + made,
        switch=switch,
        logit_scaling=scaling,
        layers=native.layers,
        provenance={
            "method": method_name,
            "target_length": target,
            "ladder": ladder,
            "options": _changed_options(options),
            "model_fingerprint": model.fingerprint,
            "tool": f"longrope-export {__version__}",
        },
    )


def attention_factor(
    policy: str, ratio: float, window: int, strength: float, where: str = "--attention-factor"
) -> float:
    """The attention factor of a tier: "none", "yarn", "longrope" or a number as text.

    Raises:
        ConfigError: none of these.
    """
    if policy == "none":
        return 1.0
    if policy == "yarn":
        return yarn_attention_factor(ratio, strength)
    if policy == "longrope":
        return longrope_attention_factor(ratio, window, strength)
    try:
        return float(policy)
    except ValueError as error:
        raise ConfigError(
            f"{where} {policy!r}: expected none, yarn, longrope or a number"
        ) from error


def _make_tier(
    native: LongRopeConfig,
    method: Method,
    length: int,
    target: int,
    options: MethodOptions,
    num_start_tokens: int,
) -> FactorTier:
    base = native.tiers[-1]
    own = np.asarray(base.rescale_factors)
    extension = Extension(
        inv_freq=compute_inv_freq(native.rope_theta, native.rotary_dim) / own,
        rope_theta=native.rope_theta,
        window=base.max_length,
        length=length,
        target=target,
    )
    factors = own * method.factors(extension, options)
    attention = base.attention_factor * attention_factor(
        options.attention or method.attention,
        extension.ratio,
        base.max_length,
        options.attention_strength,
    )
    return FactorTier(length, tuple(factors.tolist()), num_start_tokens, attention)


def _changed_options(options: MethodOptions) -> dict[str, object]:
    defaults = MethodOptions()
    return {
        name: value for name, value in vars(options).items() if value != getattr(defaults, name)
    }


def _check_options(name: str, method: Method, options: MethodOptions) -> None:
    general = {"attention", "attention_strength"}
    for option in _changed_options(options):
        if option not in method.options | general:
            raise ConfigError(
                f"method {name} takes no --{option.replace('_', '-')}; it would be ignored"
            )
    for option in ("base", "dynamic_factor"):
        value = getattr(options, option)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{option.replace('_', '-')} must be above 0, got {value}")
    policy = options.attention or method.attention
    if options.attention_strength != 1.0 and policy not in ("yarn", "longrope"):
        raise ConfigError(
            f"--attention-strength scales a logarithm, and the attention factor of {name} is "
            f"{policy!r}: add --attention-factor yarn or longrope"
        )
    if not options.attention_strength >= 0:
        raise ConfigError("--attention-strength must be 0 or more")
