"""What the stages of a plan cost: tokens, arithmetic, memory; from options and defaults alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
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
from longrope_export.finetune.recipes import load_recipe
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

RACES = 2  # of mutations, times the patience after which a practical search has converged


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
        judged += 2 * 2 * validation * length  # both rules, on documents and on needles
    if values.get("ladder"):
        found = _ladder_tokens(values, length, window, search or LADDER_DOCUMENTS)
    elif algorithm == "practical":
        found = _practical_passes(values, search or sizes.documents) * length
    else:
        population = int(values.get("population") or sizes.population)
        iterations = int(values.get("iterations") or sizes.iterations)
        individuals = population + iterations * (sizes.mutations + sizes.crossovers)
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
    challengers = len(START_TOKENS) - 1 + RACES * settings.patience * settings.litter
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


def training_values(step: Step) -> dict[str, Any]:
    """What a fine-tune is told: its recipe, under the options that are given."""
    values: dict[str, Any] = {}
    with suppress(LongRopeError):  # finetune itself says what is wrong with it
        recipe = load_recipe(str(step.values.get("recipe")))
        values = {key.replace("_", "-"): value for key, value in recipe.to_json().items()}
        values["lora"] = values.pop("lora-rank", 0)
    given = {key: value for key, value in step.values.items() if value is not None}
    if "epochs" in given:
        values.pop("steps", None)
    return values | given


def finetune_memory(step: Step, geometry: Geometry) -> Memory | None:
    """Of a fine-tune with one row on each device; None where its window is not known."""
    values = training_values(step)
    row = _row_tokens(values, step)
    if row is None:
        return None
    rank = int(values.get("lora") or 0)
    return training_memory(
        geometry,
        row
        * int(values.get("rows-per-pass") or 1)
        * step.processes
        // int(values.get("sequence-parallel") or 1),
        dtype=str(values.get("dtype") or "float32"),
        checkpointing=bool(values.get("gradient-checkpointing", True)),
        trained=adapter_parameters(geometry, rank) if rank else None,
    )


def _row_tokens(values: Mapping[str, Any], step: Step) -> int | None:
    window = values.get("window") or step.reach
    if window is None:
        return None
    if values.get("layout") == "pose" and values.get("tokens"):
        return min(int(values["tokens"]), int(window))
    return int(window)


def _finetune(step: Step, geometry: Geometry) -> Cost | None:
    values = training_values(step)
    row, memory = _row_tokens(values, step), finetune_memory(step, geometry)
    if row is None or not values.get("steps") or not values.get("batch-size"):
        return None
    tokens = int(values["steps"]) * int(values["batch-size"]) * row
    per_token = training_flops(
        geometry,
        row,
        checkpointing=bool(values.get("gradient-checkpointing", True)),
        adapters=bool(values.get("lora")),
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
