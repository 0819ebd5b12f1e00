"""What somebody who runs the file has to know: where a llama.cpp computes something else."""

from __future__ import annotations

import math

from longrope_export.config import LongRopeConfig
from longrope_export.errors import LongRopeError
from longrope_export.gguf_format import GgufHeader
from longrope_export.gguf_keys import LLAMA3_TENSOR, has_stock_fields
from longrope_export.honours import Verdict, honours
from longrope_export.models.model import Model, ModelKind
from longrope_export.models.native_gguf import native_of_gguf


def make_notes(model: Model, config: LongRopeConfig | None, header: GgufHeader) -> tuple[str, ...]:
    """For the report of an export.

    Args:
        config: what was written; None where the source's own scaling was carried over.
        header: of a GGUF source, else of the file that was written.
    """
    return (*_other_models(header), *_of_scaling(model, config, header))


def _other_models(header: GgufHeader) -> tuple[str, ...]:
    if header.architecture != "phimoe":
        return ()
    return (
        "llama.cpp, stock and patched, computes phimoe with RMS norms for its LayerNorms and a plain "
        "softmax for its sparse mixer: its logits are not the model's, with or without factors",
    )


def _of_scaling(model: Model, config: LongRopeConfig | None, header: GgufHeader) -> tuple[str, ...]:
    if config is None:
        return _carried_notes(model, header)
    if not has_stock_fields(header.architecture):
        own = any(info.name == LLAMA3_TENSOR for info in header.tensors)
        scaling = f"scaled by its own {LLAMA3_TENSOR} alone" if own else "unscaled"
        if not own and any(factor != 1 for factor in model.native.tiers[-1].rescale_factors):
            scaling += ", without the scaling that it had"
        return (
            f"stock llama.cpp has no factors for architecture {header.architecture!r}: it runs "
            f"this file as the base model, {scaling}; the keys are for the build of "
            f"`longrope-export llama-cpp`" + _refused_by_patched(config, model),
        )
    cells = honours(config, model)["llama.cpp"]
    lost = [
        f"{name}: {cell.note}" for name, cell in cells.items() if cell.verdict is not Verdict.YES
    ]
    return tuple(f"stock llama.cpp, {line}" for line in lost)


def _carried_notes(model: Model, header: GgufHeader) -> tuple[str, ...]:
    """Where llama.cpp reads what the source's config says otherwise than the model was made for."""
    if model.kind is ModelKind.GGUF:
        return ()
    if model.native.provenance.get("method") == "model (dynamic)":
        return (
            "the source's dynamic NTK scaling has no place in a GGUF: the file is unscaled; "
            "make factors with `longrope-export factors dynamic-ntk` and pass --factors",
        )
    try:
        got, want = native_of_gguf(header).tiers[-1], model.native.tiers[-1]
    except LongRopeError:  # of an architecture that is not read here
        return ()
    pairs = list(zip(got.rescale_factors, want.rescale_factors, strict=False))
    others = sum(not math.isclose(a, b, rel_tol=1e-4) for a, b in pairs)
    if not others and math.isclose(got.attention_factor, want.attention_factor, rel_tol=1e-4):
        return ()
    return (
        f"llama.cpp reads this scaling otherwise: attention factor {got.attention_factor:.6g}, the "
        f"source's is {want.attention_factor:.6g}; {others} of {len(pairs)} factors differ. For the "
        f"source's own: longrope-export factors file {model.path} --factors "
        f"{model.path / 'config.json'} -o f.json, then pass --factors f.json",
    )


def _refused_by_patched(config: LongRopeConfig, model: Model) -> str:
    cell = honours(config, model)["llama.cpp, patched"]["last_tier"]
    return "" if cell.verdict is Verdict.YES else f", which so far {cell.note}"
