"""What the stages of a plan cost: tokens, arithmetic, memory; from options and defaults alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from longrope_export.errors import LongRopeError
from longrope_export.finetune.estimate import (
    Geometry,
    Memory,
    adapter_parameters,
    cache_memory,
    forward_flops,
    forward_memory,
    training_flops,
    training_memory,
)
from longrope_export.finetune.recipes import Recipe, load_recipe
from longrope_export.finetune.stages import Step
from longrope_export.ladder import parse_ladder
from longrope_export.search.algorithms import FINALISTS
from longrope_export.search.evolution import EvolutionSettings
from longrope_export.search.ladder_search import NEAR_ATTENTION, NEAR_LENGTHS, LadderSettings
from longrope_export.search.options import CLOSED_FORMS, LADDER_DOCUMENTS
from longrope_export.search.practical import GRADIENT_BATCH, PracticalSettings
from longrope_export.search.run import SHOWN_SEEDS, STRENGTHS
from longrope_export.search.scorer import GRADIENT_COST
from longrope_export.search.space import START_TOKENS

# fields of a recipe that matter here: the option of `finetune`, and its type
_RECIPE_OPTIONS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "window": ("window", int),
    "tokens": ("tokens", int),
    "steps": ("steps", int),
    "epochs": ("epochs", float),
    "batch_size": ("batch-size", int),
    "layout": ("layout", str),
    "lora_rank": ("lora", int),
    "gradient_checkpointing": ("gradient-checkpointing", bool),
}


@dataclass(frozen=True)
class Cost:
    """Of one stage.

    Attributes:
        forward_tokens: computed without a backward pass.
        training_tokens: with one.
        flops: of all of them.
        memory: None where nothing is computed by torch.
    """

    forward_tokens: int
    training_tokens: int
    flops: float
    memory: Memory | None


NOTHING = Cost(0, 0, 0.0, None)


def cost_of(step: Step, geometry: Geometry, window: int) -> Cost | None:
    """Of one stage; None where it cannot be told (steps or texts that only the command knows).

    Exports, certificates and reports count as nothing.

    Args:
        window: of the source model, tokens.
    """
    try:
        if step.stage.kind in ("search", "recover"):
            return _search(step, geometry, window)
        if step.stage.kind == "finetune":
            return _finetune(step, geometry)
        if step.stage.kind == "evaluate":
            return _evaluate(step, geometry)
    except (ValueError, TypeError, LongRopeError):  # an option that the command itself will refuse
        return None
    return NOTHING


def _numbers(text: Any) -> list[int]:
    return [int(part) for part in str(text).split(",")]


# -- search


def search_tokens(values: Mapping[str, Any], length: int, window: int) -> int:
    """Forward tokens of a search as its budget counts them, choosing and reporting included.

    Individuals (LongRoPE: 64 + 40 * 32 up to 256k tokens) times documents times tokens; a practical
    search by its stages' settings; see docs/extend.md for what that is worth.

    Args:
        values: options of `search`, defaults included.
        length: target, tokens.
        window: of the model, tokens.
    """
    search, validation, test = _numbers(values.get("documents") or "0,3,3")
    sizes = EvolutionSettings.for_length(length)
    algorithm, budget = values.get("algorithm") or "longrope", values.get("budget-tokens")
    configs = FINALISTS + len(CLOSED_FORMS)
    judged = (configs * validation + (configs - FINALISTS + SHOWN_SEEDS + 1) * test) * length
    if not values.get("switch"):
        # both rules, on documents and on needles, and the choice once more under the other rule
        judged += (2 * 2 + configs) * validation * length
    if values.get("ladder"):
        found = _ladder_tokens(values, length, window, search or LADDER_DOCUMENTS)
    elif algorithm == "practical":
        found = _practical_passes(values, search or sizes.documents) * length
    else:
        given = {n: int(values[n]) for n in ("population", "iterations") if values.get(n)}
        individuals = replace(sizes, **given).individuals
        documents = search or (10 if algorithm == "longrope2" else sizes.documents)
        found = individuals * documents * length
    return (found if budget is None else min(found, int(float(budget)))) + judged


def _practical_passes(values: Mapping[str, Any], documents: int) -> int:
    """Whole windows until it has converged: seeds, family, gradient, and races.

    A race computes about two documents for each challenger, for the worse half leaves after each.
    """
    settings = PracticalSettings()
    family = int(values.get("family-evaluations") or 0)
    steps = int(values.get("gradient-steps") or 0)
    challengers = settings.challengers(len(START_TOKENS))
    seeds = len(CLOSED_FORMS) + len(STRENGTHS)
    return (seeds + family) * documents + steps * GRADIENT_BATCH * GRADIENT_COST + 2 * challengers


def _ladder_tokens(values: Mapping[str, Any], length: int, window: int, documents: int) -> int:
    """Blocks of the family behind prefixes, then every tier with its neighbours."""
    lengths = parse_ladder(str(values["ladder"]), window, length)
    settings = LadderSettings(tuple(lengths[1:]))
    family = int(values.get("family-evaluations") or settings.family_evaluations)
    tokens = family * settings.num_blocks * settings.block_tokens + length
    if not values.get("no-refine"):
        candidates = 1 + len(NEAR_LENGTHS) + len(NEAR_ATTENTION)
        most = int(values.get("tier-tokens") or length)
        for begin, end in itertools.pairwise(lengths):
            tokens += begin + candidates * min(end - begin, most)
    return tokens * documents


def _search(step: Step, geometry: Geometry, window: int) -> Cost:
    values, dtype = step.values, str(step.values.get("dtype") or "float32")
    lengths = [int(values["target-length"])]
    if step.stage.kind == "recover":
        lengths = _numbers(values["recover"])
        values = {**values, "family-evaluations": 0}  # a recovery has no smooth family
    tokens = [search_tokens(values, length, window) for length in lengths]
    flops = sum(
        count * forward_flops(geometry, n) for count, n in zip(tokens, lengths, strict=True)
    )
    memory = forward_memory(geometry, max(lengths), dtype)
    if values.get("algorithm") == "practical" and values.get("gradient-steps"):
        kept = training_memory(geometry, max(lengths), dtype=dtype, trained=0)
        memory = Memory(memory.weights, 0, 0, kept.activations, kept.logits)
    return Cost(sum(tokens), 0, flops, memory)


# -- fine-tune


def recipe_of(step: Step) -> Recipe | None:
    """What a fine-tune is told: its recipe, under the options that are given; None where finetune
    itself will say what is wrong with it."""
    given = {
        field: kind(step.values[option])
        for field, (option, kind) in _RECIPE_OPTIONS.items()
        if step.values.get(option) is not None
    }
    try:
        return load_recipe(str(step.values.get("recipe"))).with_values(given)
    except LongRopeError:
        return None


def recipe_memory(
    recipe: Recipe, geometry: Geometry, target: int, rows: float, dtype: str
) -> Memory:
    """Of a training, over all devices.

    Args:
        target: of the factors, tokens.
        rows: that all devices together compute at once.
        dtype: of the activations.
    """
    rank = recipe.lora_rank
    return training_memory(
        geometry,
        int(rows * recipe.row_tokens(target)),
        dtype=dtype,
        checkpointing=recipe.gradient_checkpointing,
        trained=adapter_parameters(geometry, rank) if rank else None,
    )


def finetune_memory(step: Step, geometry: Geometry) -> Memory | None:
    """Of a stage that fine-tunes; None where its recipe or the reach of its factors is not known."""
    recipe, values = recipe_of(step), step.values
    target = step.reach if recipe is None else recipe.window or step.reach
    if recipe is None or target is None:
        return None
    ranks = int(values.get("sequence-parallel") or 1)
    rows = int(values.get("rows-per-pass") or 1) * step.processes / ranks
    return recipe_memory(recipe, geometry, target, rows, str(values.get("dtype") or "float32"))


def _finetune(step: Step, geometry: Geometry) -> Cost | None:
    recipe, memory = recipe_of(step), finetune_memory(step, geometry)
    if recipe is None or memory is None or recipe.steps is None:
        return None
    row = recipe.row_tokens(recipe.window or step.reach or 0)
    tokens = recipe.steps * recipe.batch_size * row
    per_token = training_flops(
        geometry,
        row,
        checkpointing=recipe.gradient_checkpointing,
        adapters=bool(recipe.lora_rank),
    )
    return Cost(0, tokens, tokens * per_token, memory)


# -- evaluate


def _evaluate(step: Step, geometry: Geometry) -> Cost:
    """Windows side by side over each text, and one prompt for every passkey and needle."""
    values = step.values
    texts = values.get("text") or []
    num_texts = 1 if isinstance(texts, str) else len(texts)
    factors = values.get("factors") or []
    models = step.num_models + (1 if isinstance(factors, str) else len(factors))
    lengths = _numbers(values.get("lengths") or 4096)
    tokens, flops = 0, 0.0
    for length in lengths:
        count = 0
        if values.get("perplexity") is not False:
            stride = int(values.get("stride") or length)
            read = int(values.get("tokens") or max(lengths))
            windows = 1 + max(0, read - length) // stride
            count += num_texts * windows * length
        trials = int(values.get("trials") or 1)
        if values.get("passkey"):
            depths = str(values.get("depths") or "0,0.25,0.5,0.75,1").split(",")
            count += trials * len(depths) * length
        if values.get("needle"):
            count += trials * length * sum(values.get(key) != 0 for key in ("keys", "values"))
        tokens += models * count
        flops += models * count * forward_flops(geometry, length)
    dtype = str(values.get("dtype") or "float32")
    return Cost(tokens, 0, flops, cache_memory(geometry, max(lengths), dtype))
