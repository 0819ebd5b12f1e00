"""What a user has to know before serving an exported folder."""

from __future__ import annotations

from longrope_converters.to_safetensors.hf_folder import SourceFolder, foreign_code
from longrope_export.config import LongRopeConfig
from longrope_export.honours import Verdict, honours
from longrope_export.models.model import Model
from longrope_export.stock_rope import has_formula_attention_factor, stock_config


def stock_losses(config: LongRopeConfig, model: Model) -> dict[str, str]:
    """Fields of the config that stock transformers does not compute -> what it does instead.

    A switch by sequence length is computed, though not by generate() with a cache (see honours).
    """
    lost = {
        name: cell.note
        for name, cell in honours(config, model)["transformers"].items()
        if cell.verdict is Verdict.NO or (cell.verdict is Verdict.PARTLY and name != "switch")
    }
    if model.family.global_layers_only and config.layers != model.native.layers:
        lost["layers"] = "the layers with full attention are rescaled, and only those"
    return lost


def rope_notes(config: LongRopeConfig, model: Model, *, remote_code: bool) -> tuple[str, ...]:
    """What a user has to know before serving the folder."""
    what = "without trust_remote_code" if remote_code else "dropped"
    notes = [f"{what}: {name}: {note}" for name, note in stock_losses(config, model).items()]
    stock = stock_config(config)
    border = stock.original_max_position_embeddings
    if len(stock.tiers) > 1:
        notes.append(
            f"transformers takes the long factors for sequences of more than {border} tokens; "
            f"vLLM and mlx-lm take one set per process (docs/safetensors.md)"
        )
    notes.append(
        f"vLLM serves {border} tokens unless started with "
        f"--max-model-len {stock.max_position_embeddings}"
    )
    if not has_formula_attention_factor(config):
        notes.append(
            f"mlx-lm and ExLlama recompute the attention factor and do not use "
            f"{stock.tiers[-1].attention_factor:.5g}"
        )
        if model.family.name == "phi3":
            notes.append("transformers 4 refuses a phi3 config with an attention factor of its own")
    return tuple(notes)


def source_notes(source: SourceFolder, *, remote_code: bool) -> tuple[str, ...]:
    """What became of the source's files."""
    notes = []
    if source.left:
        notes.append(f"left behind: {', '.join(source.left)}")
    if foreign_code(source.values) and remote_code:
        notes.append(
            "the source's own modelling code is carried along, but auto_map in config.json names "
            "ours in its place"
        )
    elif foreign_code(source.values):
        notes.append(
            "the source's own modelling code is carried along and used with trust_remote_code=True "
            "only; whether it reads these factors is up to it"
        )
    return tuple(notes)
