"""Which runtime honours which field of a config: facts, read in their sources or measured.

An export is judged by this table, and people see it in `inspect` and after every export.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from longrope_export.config import LongRopeConfig, SwitchPolicy
from longrope_export.gguf_keys import has_stock_fields, stock_switch_length
from longrope_export.models.model import Model, ModelKind
from longrope_export.stock_rope import has_formula_attention_factor


class Verdict(StrEnum):
    YES = "yes"
    PARTLY = "partly"
    NO = "no"


@dataclass(frozen=True)
class Cell:
    """One field on one runtime; the note says what the runtime does instead."""

    verdict: Verdict
    note: str = ""


YES = Cell(Verdict.YES)

FIELDS: dict[str, str] = {
    "first_tier": "factors of the first tier",
    "last_tier": "factors of the last tier",
    "middle_tiers": "tiers in between",
    "switch": "rule at a tier border",
    "attention_factor": "attention factors",
    "num_start_tokens": "start-token window",
    "logit_scaling": "log scaling of queries",
    "layers": "choice of layers",
}


def fields_in_use(config: LongRopeConfig) -> list[str]:
    """The names in FIELDS that this config makes use of."""
    tiers = config.tiers
    used = ["last_tier"]
    if len(tiers) > 1:
        used += ["first_tier", "switch"]
    if len(tiers) > 2:
        used.append("middle_tiers")
    if any(tier.attention_factor != 1 for tier in tiers):
        used.append("attention_factor")
    if config.num_start_tokens:
        used.append("num_start_tokens")
    if config.logit_scaling is not None:
        used.append("logit_scaling")
    if config.layers is not None:
        used.append("layers")
    return [name for name in FIELDS if name in used]


def honours(config: LongRopeConfig, model: Model) -> dict[str, dict[str, Cell]]:
    """runtime -> field -> cell, for the fields that the config uses."""
    used = fields_in_use(config)
    return {
        runtime: {name: cells(config, model)[name] for name in used}
        for runtime, cells in RUNTIMES.items()
    }


def gguf_architecture(model: Model) -> str:
    """general.architecture of the model's GGUF, or an empty string for an unknown family."""
    if model.kind is ModelKind.GGUF:
        return model.architecture
    return next(iter(model.family.gguf_architectures), "")


def _llama_cpp(config: LongRopeConfig, model: Model) -> dict[str, Cell]:
    if not has_stock_fields(gguf_architecture(model)):
        plain = Cell(Verdict.NO, "runs the base model without scaling: its loader has no factors")
        return dict.fromkeys(FIELDS, plain)
    border = stock_switch_length(config)
    return {
        "first_tier": Cell(Verdict.PARTLY, f"only while the allocated context is <= {border}"),
        "last_tier": Cell(Verdict.PARTLY, f"for every length once the context is > {border}")
        if len(config.tiers) > 1
        else YES,
        "middle_tiers": Cell(Verdict.NO, "not expressible: left out"),
        "switch": Cell(Verdict.NO, "chosen once, by the allocated context (-c)"),
        "attention_factor": _one_attention_factor(config, "the last tier's, at every length"),
        "num_start_tokens": Cell(Verdict.NO, "every position is rescaled"),
        "logit_scaling": Cell(Verdict.NO, "logits are not scaled"),
        "layers": Cell(Verdict.NO, "every layer is rescaled"),
    }


def _transformers(config: LongRopeConfig, model: Model) -> dict[str, Cell]:
    phi = model.family.name.startswith("phi")
    stale = "" if phi else ", and generate() keeps stale keys when a sequence crosses it"
    return {
        "first_tier": YES,
        "last_tier": YES,
        "middle_tiers": Cell(Verdict.NO, "short and long only"),
        "switch": Cell(
            Verdict.PARTLY if config.switch is SwitchPolicy.SEQUENCE else Verdict.NO,
            f"by the longest sequence of the batch{stale}",
        ),
        "attention_factor": _one_attention_factor(config, "one value for every length"),
        "num_start_tokens": Cell(Verdict.NO, "every position is rescaled"),
        "logit_scaling": Cell(Verdict.NO, "logits are not scaled"),
        "layers": YES if model.family.global_layers_only else Cell(Verdict.NO, "every layer"),
    }


def _vllm(config: LongRopeConfig, model: Model) -> dict[str, Cell]:
    once = "one set per process, by --max-model-len"
    return {
        **_transformers(config, model),
        "first_tier": Cell(Verdict.PARTLY, once),
        "last_tier": Cell(Verdict.PARTLY, once) if len(config.tiers) > 1 else YES,
        "switch": Cell(Verdict.NO, once),
    }


def _sglang(config: LongRopeConfig, model: Model) -> dict[str, Cell]:
    batch = "by the longest sequence of the running batch, and cached keys stay as they are"
    return {
        **_transformers(config, model),
        "first_tier": Cell(Verdict.PARTLY, "while no request of the batch is longer"),
        "switch": Cell(Verdict.NO, batch),
    }


def _mlx_lm(config: LongRopeConfig, model: Model) -> dict[str, Cell]:
    formula = "recomputed from max / original length, whatever the file says"
    return {
        **_transformers(config, model),
        "first_tier": Cell(Verdict.NO, "the long factors serve every length"),
        "switch": Cell(Verdict.NO, "never switches"),
        "attention_factor": YES
        if has_formula_attention_factor(config)
        else Cell(Verdict.PARTLY, formula),
    }


def _one_attention_factor(config: LongRopeConfig, instead: str) -> Cell:
    if len({tier.attention_factor for tier in config.tiers}) == 1:
        return YES
    return Cell(Verdict.PARTLY, instead)


RUNTIMES: dict[str, Callable[[LongRopeConfig, Model], dict[str, Cell]]] = {
    "llama.cpp": _llama_cpp,
    "transformers": _transformers,
    "vLLM": _vllm,
    "SGLang": _sglang,
    "mlx-lm": _mlx_lm,
}
