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
_UNKNOWN = Cell(
    Verdict.PARTLY, "depends on the architecture that llama.cpp's converter makes of it"
)

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
    if not gguf_architecture(model):
        return dict.fromkeys(FIELDS, _UNKNOWN)
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


def _patched_llama_cpp(config: LongRopeConfig, model: Model) -> dict[str, Cell]:
    architecture = gguf_architecture(model)
    if not architecture:
        return dict.fromkeys(FIELDS, _UNKNOWN)
    if architecture in PATCHED_ARCHITECTURES:
        return dict.fromkeys(FIELDS, YES)
    return dict.fromkeys(FIELDS, Cell(Verdict.NO, f"refuses a {architecture} file"))


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


def _onnx_runtime(config: LongRopeConfig, model: Model) -> dict[str, Cell]:
    """Our export in longrope_export.runtimes.onnx."""
    if model.family.name in ONNX_FAMILIES:
        return dict.fromkeys(FIELDS, YES)
    return dict.fromkeys(FIELDS, Cell(Verdict.NO, "`longrope-export onnx` refuses the family"))


def _onnxruntime_genai(config: LongRopeConfig, model: Model) -> dict[str, Cell]:
    """Our export: the tier is a row offset that its one max_length picks."""
    cells = _onnx_runtime(config, model)
    if model.family.name not in ONNX_FAMILIES or len(config.tiers) == 1:
        return cells
    one = Cell(Verdict.PARTLY, "one tier for the whole sequence, the one of max_length")
    switch = Cell(Verdict.NO, "one tier for every position, the one of max_length")
    if config.switch is SwitchPolicy.SEQUENCE:
        switch = Cell(Verdict.YES, "pinned: max_length is the declared length")
    tiers = dict.fromkeys(("first_tier", "middle_tiers", "last_tier"), one)
    return {**cells, **tiers, "switch": switch}


def _genai_builder(config: LongRopeConfig, model: Model) -> dict[str, Cell]:
    """onnxruntime_genai.models.builder 0.18 on the folder that `longrope-export safetensors` writes."""
    if model.family.name == "llama":
        plain = Cell(Verdict.NO, "exports plain RoPE without a word: runs the base model")
        return dict.fromkeys(FIELDS, plain)
    if model.family.name != "phi3":
        return dict.fromkeys(FIELDS, Cell(Verdict.NO, "refuses the family with factors"))
    # the runtime recomputes at 4097 tokens, for phi3 alone and whatever the model says
    recomputed = config.tiers[0].max_length == 4096
    keys = "keys are recomputed" if recomputed else "cached keys stay as they are"
    cells = _transformers(config, model)
    return {
        **cells,
        "switch": Cell(
            cells["switch"].verdict,
            f"by the longest sequence of the batch; when one crosses, {keys}",
        ),
        "attention_factor": _one_attention_factor(config, "the last tier's, at every length"),
    }


def _one_attention_factor(config: LongRopeConfig, instead: str) -> Cell:
    if len({tier.attention_factor for tier in config.tiers}) == 1:
        return YES
    return Cell(Verdict.PARTLY, instead)


# those that is_supported() in cpp_patch/src/llama-longrope.cpp lets pass
PATCHED_ARCHITECTURES = frozenset(
    {"llama", "minicpm", "granite", "granitemoe", "qwen2", "qwen2moe", "qwen3", "qwen3moe"}
    | {"phi3", "phimoe", "gemma", "gemma2", "gemma3"}
)

# those that longrope_converters.to_onnx.families describes
ONNX_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3", "granite"})

RUNTIMES: dict[str, Callable[[LongRopeConfig, Model], dict[str, Cell]]] = {
    "llama.cpp": _llama_cpp,
    "llama.cpp, patched": _patched_llama_cpp,
    "transformers": _transformers,
    "vLLM": _vllm,
    "SGLang": _sglang,
    "mlx-lm": _mlx_lm,
    "ONNX Runtime, our runner": _onnx_runtime,
    "onnxruntime-genai": _onnxruntime_genai,
    "onnxruntime-genai's builder": _genai_builder,
}
