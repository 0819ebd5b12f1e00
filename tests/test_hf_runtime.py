"""The live runtime against the definition computed by itself, at toy size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_reference import (
    FAMILIES,
    VOCAB,
    reference_logits,
    tier_index,
    toy_config,
    toy_model,
)
from torch import Tensor

from longrope_export.hf_runtime import apply_longrope

LENGTHS = (4, 11, 20)  # real tokens per row; the tiers end at 6, 13 and 24


def rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, VOCAB, (n,), generator=generator) for n in LENGTHS]


def padded(sequences: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, (batch, longest)."""
    width = max(len(row) for row in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(sequences):
        part = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, part], mask[index, part] = row, 1
    return ids, mask


def cached_logits(model: Any, ids: Tensor, mask: Tensor, cuts: list[int]) -> Tensor:
    cache, outputs = None, []
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        result = model(
            ids[:, start:stop],
            attention_mask=mask[:, :stop],
            past_key_values=cache,
            use_cache=True,
        )
        cache = result.past_key_values
        outputs.append(result.logits)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("switch", ["causal", "sequence"])
@torch.no_grad()
def test_padding_in_the_middle_does_not_end_a_document(switch: str) -> None:
    model, row = toy_model(), rows()[2]
    apply_longrope(model, toy_config(model, switch))
    gap = torch.zeros(3, dtype=torch.long)
    ids = torch.cat((gap, row[:5], gap, row[5:], gap))[None]
    mask = (ids != 0).long()
    logits = model(ids, attention_mask=mask).logits[mask == 1]
    torch.testing.assert_close(logits, model(row[None]).logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("switch", ["causal", "sequence"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_computes_the_definition(family: str, switch: str) -> None:
    model = toy_model(family)
    config = toy_config(model, switch)
    sequences = rows()
    if switch == "causal":
        whole = [reference_logits(model, config, row, None) for row in sequences]
    else:
        by_tier = [
            [reference_logits(model, config, row, tier) for tier in range(3)] for row in sequences
        ]
        whole = [by_tier[i][tier_index(config, len(row))] for i, row in enumerate(sequences)]
    plain = model(sequences[2][None]).logits[0]
    assert (plain - whole[2]).abs().max() > 0.05, "the factors must matter here"

    apply_longrope(model, config)

    for side in ("left", "right"):
        ids, mask = padded(sequences, side)
        logits = model(ids, attention_mask=mask).logits
        for index in range(3):
            torch.testing.assert_close(
                logits[index][mask[index] == 1], whole[index], atol=1e-4, rtol=0
            )

    ids, mask = padded(sequences, "left")
    for cuts in ([9, 12, 15], list(range(1, ids.shape[1]))):
        logits = cached_logits(model, ids, mask, cuts)
        for index, row in enumerate(sequences):
            expected = whole[index]
            if switch == "sequence":  # every chunk stands under the tier of its last token
                pad = ids.shape[1] - len(row)
                ends = [next(c for c in [*cuts, 20] if c > pad + p) - pad for p in range(len(row))]
                tiers = [tier_index(config, end) for end in ends]
                expected = torch.stack([by_tier[index][t][p] for p, t in enumerate(tiers)])
            torch.testing.assert_close(logits[index][mask[index] == 1], expected, atol=1e-4, rtol=0)
