"""generate() under the live runtime: batches, static caches, beams, assistants, cut caches."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from hf_reference import FAMILIES, VOCAB, reference_logits, tier_index, toy_config, toy_model
from torch import Tensor
from transformers import DynamicCache, StaticCache

from longrope_export.config import FactorTier, LongRopeConfig
from longrope_export.hf_runtime import apply_longrope

PROMPTS = (3, 8)  # tokens; the tiers end at 6, 13 and 24
NEW = 16


def prompts() -> tuple[Tensor, Tensor]:
    """Left-padded ids and mask."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, VOCAB, (2, max(PROMPTS)), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, : max(PROMPTS) - PROMPTS[0]] = 0
    return ids * mask, mask


def expected_logits(model: Any, config: LongRopeConfig, ids: Tensor, first: int) -> Tensor:
    """(len(ids) - first, vocab): what generate must have seen before each token from `first` on."""
    if config.switch == "causal":
        return reference_logits(model, config, ids, None)[first - 1 : -1]
    by_tier = [reference_logits(model, config, ids, tier) for tier in range(len(config.tiers))]
    rows = [by_tier[tier_index(config, p + 1)][p] for p in range(first - 1, len(ids) - 1)]
    return torch.stack(rows)


@pytest.mark.parametrize("switch", ["causal", "sequence"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_generate_over_two_borders(family: str, switch: str) -> None:
    model = toy_model(family)
    config = toy_config(model, switch)
    fresh = copy.deepcopy(model)
    runtime = apply_longrope(model, config)
    ids, mask = prompts()
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    details = {"return_dict_in_generate": True, "output_logits": True}

    result = model.generate(ids, **settings, **details)
    logits = torch.stack(result.logits, dim=1)
    for row, length in enumerate(PROMPTS):
        sequence = result.sequences[row, max(PROMPTS) - length :]
        expected = expected_logits(fresh, config, sequence, length)
        torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=0)
    tiers = runtime.tiers(result.past_key_values)
    assert tiers is not None
    assert tiers.tolist() == [2, 2]

    static = model.generate(ids, **settings, **details, cache_implementation="static")
    torch.testing.assert_close(torch.stack(static.logits, dim=1), logits, atol=1e-4, rtol=0)

    settings["num_beams"] = 3
    beams = model.generate(ids, **settings)
    assert torch.equal(beams, model.generate(ids, **settings, use_cache=False))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_assisted_decoding_crosses_borders_back_and_forth(family: str) -> None:
    model = toy_model(family)
    assistant = toy_model("Llama", num_hidden_layers=1)
    apply_longrope(model, toy_config(model))
    ids = prompts()[0][1:]
    greedy = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(model.generate(ids, **settings, assistant_model=assistant), greedy)
    apply_longrope(assistant, toy_config(assistant))
    assert torch.equal(model.generate(ids, **settings, assistant_model=assistant), greedy)


@pytest.mark.parametrize("keep_keys", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
@torch.no_grad()
def test_cache_operations_carry_the_rows_along(family: str, keep_keys: bool) -> None:
    model = toy_model(family)
    config = toy_config(model)
    fresh = copy.deepcopy(model)
    runtime = apply_longrope(model, config, keep_keys=keep_keys)
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(2, VOCAB, (2, 20), generator=generator)
    whole = torch.stack([reference_logits(fresh, config, row, None) for row in ids])

    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    for start, stop in ((0, 4), (4, 10), (10, 15)):
        model(ids[:, start:stop], past_key_values=cache)
    kept = copy.deepcopy(cache)
    cache.crop(-10)  # back over both borders
    logits = model(ids[:, 5:9], past_key_values=cache).logits
    torch.testing.assert_close(logits, whole[:, 5:9], atol=1e-4, rtol=0)
    tiers = runtime.tiers(cache)
    assert tiers is not None
    assert tiers.tolist() == [1, 1]

    kept.batch_repeat_interleave(2)  # rows 0 0 1 1
    kept.reorder_cache(torch.tensor([3, 0, 0, 2]))
    kept.batch_select_indices(torch.tensor([0, 1]))  # rows 1 0
    logits = model(ids.flip(0)[:, 15:], past_key_values=kept).logits
    torch.testing.assert_close(logits, whole.flip(0)[:, 15:], atol=1e-4, rtol=0)

    kept.reset()
    logits = model(ids[:, :9], past_key_values=kept).logits
    torch.testing.assert_close(logits, whole[:, :9], atol=1e-4, rtol=0)


@torch.no_grad()
def test_rounding_does_not_add_up_on_a_long_ladder() -> None:
    model = toy_model(num_hidden_layers=1).to(torch.bfloat16)
    width = 8
    tiers = tuple(
        FactorTier(length, tuple(1 + 0.1 * length * pair for pair in range(width // 2)))
        for length in range(2, 41)
    )
    config = LongRopeConfig(10000.0, width, 2, 40, tiers)
    ids = torch.randint(2, VOCAB, (4, 40), generator=torch.Generator().manual_seed(4))
    errors = {}
    for keep_keys in (None, False):
        fresh = copy.deepcopy(model)
        apply_longrope(fresh, config, keep_keys=keep_keys)
        cache = DynamicCache(config=model.config)
        for column in range(40):
            fresh(ids[:, column : column + 1], past_key_values=cache)
        exact = copy.deepcopy(model).float()
        apply_longrope(exact, config)
        keys = exact(ids, use_cache=True).past_key_values.layers[0].keys
        difference = cache.layers[0].keys.float() - keys
        errors[keep_keys] = (difference.norm() / keys.norm()).item()
    assert errors[None] < 0.006  # a few roundings of 0.0017 each
    assert errors[False] > 2 * errors[None]


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2", "Gemma3"])
@pytest.mark.parametrize("switch", ["causal", "sequence"])
@torch.no_grad()
def test_static_cache_in_chunks(family: str, switch: str) -> None:
    model = toy_model(family)
    config = toy_config(model, switch)
    ids = torch.randint(2, VOCAB, (1, 20), generator=torch.Generator().manual_seed(2))
    cuts = [0, 3, 8, 9, 15, 20]
    if switch == "causal":
        expected = reference_logits(model, config, ids[0], None)
    else:
        by_tier = [reference_logits(model, config, ids[0], tier) for tier in range(3)]
        parts = [by_tier[tier_index(config, b)][a:b] for a, b in pairwise(cuts)]
        expected = torch.cat(parts)
    apply_longrope(model, config, keep_keys=True)
    cache = StaticCache(config=model.config, max_cache_len=24)
    for start, stop in pairwise(cuts):
        logits = model(ids[:, start:stop], past_key_values=cache).logits[0]
        torch.testing.assert_close(logits, expected[start:stop], atol=1e-4, rtol=0)
