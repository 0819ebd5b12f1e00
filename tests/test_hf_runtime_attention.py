"""The live runtime behind masks, packed rows and the attention kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_reference import reference_logits, some_ids, tier_index, toy_config, toy_model
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from longrope_export.errors import LongRopeError
from longrope_export.hf_runtime import apply_longrope
from longrope_export.hf_runtime.core import attention
from longrope_export.hf_runtime.core import runtime as runtime_module


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("switch", ["causal", "sequence"])
@torch.no_grad()
def test_packed_documents_are_computed_like_single_ones(switch: str, kernel: str) -> None:
    model = toy_model()
    model.set_attn_implementation(kernel)
    apply_longrope(model, toy_config(model, switch))
    documents = [some_ids(1, n) for n in (5, 20, 9)]
    packed = torch.cat(documents, dim=1)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    together = model(packed, position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(document).logits for document in documents], dim=1)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def flash_contract(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What a flash kernel computes: causal from the last query and key on; a 2D mask of padding."""
    assert module.config._attn_implementation == "flash_stand_in"
    assert mask is None or mask.shape == (len(key), key.shape[2])
    n, width = query.shape[2], key.shape[2]
    query_at, key_at = torch.arange(width - n, width)[:, None], torch.arange(width)[None]
    visible = query_at >= key_at
    if kwargs.get("sliding_window"):
        visible &= query_at - key_at < kwargs["sliding_window"]
    everywhere = visible[None, None].expand(len(key), 1, -1, -1)
    if mask is not None:
        everywhere = everywhere & mask[:, None, None].bool()
    key, value = (part.repeat_interleave(2, dim=1) for part in (key, value))
    logits = (query @ key.mT * kwargs["scaling"]).masked_fill(~everywhere, -1e9)
    return (logits.softmax(-1) @ value).transpose(1, 2), None


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
@torch.no_grad()
def test_flash_attention_is_cut_by_its_own_rules(family: str) -> None:
    """The kernels need a GPU; their contract does not."""
    model = toy_model(family)
    apply_longrope(model, toy_config(model))
    ids, mask = some_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    expected = [model(ids, attention_mask=mask).logits, model(ids).logits]
    AttentionInterface.register("flash_stand_in", flash_contract)
    AttentionMaskInterface.register("flash_stand_in", flash_attention_mask)
    model.config._attn_implementation = "flash_stand_in"  # the setter would look for a kernel
    half = model(ids[:, :9], attention_mask=mask[:, :9], use_cache=True)
    rest = model(ids[:, 9:], attention_mask=mask, past_key_values=half.past_key_values).logits
    for got in (model(ids, attention_mask=mask).logits, torch.cat([half.logits, rest], dim=1)):
        real = mask == 1
        torch.testing.assert_close(got[real], expected[0][real], atol=1e-4, rtol=0)
    torch.testing.assert_close(model(ids).logits, expected[1], atol=1e-4, rtol=0)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    with pytest.raises(LongRopeError, match=r"packed documents .* flash attention; use .*sdpa"):
        model(ids[:1], position_ids=positions, use_cache=False)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("additive", [False, True])
@torch.no_grad()
def test_masks_that_show_later_keys_are_not_cut(kernel: str, additive: bool) -> None:
    """In one layer a token depends on its own tier only, so frozen passes, never cut, tell it."""
    model = toy_model(num_hidden_layers=1)
    model.set_attn_implementation(kernel)
    config = toy_config(model)
    ids = some_ids(1, 20)
    visible = torch.ones(20, 20).tril().bool()
    visible[:16, :16] = True  # a prefix over both borders
    mask: Tensor = visible[None, None]
    if additive:
        mask = torch.zeros(1, 1, 20, 20).masked_fill(~mask, torch.finfo(torch.float32).min)
    runtime = apply_longrope(model, config)
    causal = model(ids).logits[0]
    frozen = []
    for tier in range(3):
        runtime.freeze(tier)
        frozen.append(model(ids, attention_mask=mask).logits[0])
    runtime.freeze(None)
    expected = torch.stack([frozen[tier_index(config, p + 1)][p] for p in range(20)])
    assert (expected - causal)[:6].abs().max() > 0.05
    got = model(ids, attention_mask=mask).logits[0]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    cache = DynamicCache(config=model.config)
    model(ids[:, :3], attention_mask=mask[:, :, :3, :3], past_key_values=cache)
    later = model(ids[:, 3:], attention_mask=mask[:, :, 3:], past_key_values=cache).logits[0]
    torch.testing.assert_close(later, expected[3:], atol=1e-4, rtol=0)


@torch.no_grad()
def test_bidirectional_attention_across_borders() -> None:
    model = toy_model(
        "Gemma3",
        num_hidden_layers=1,
        layer_types=["full_attention"],
        use_bidirectional_attention=True,
    )
    config = toy_config(model, layers=None)
    ids = some_ids(1, 20)
    runtime = apply_longrope(model, config)
    got = model(ids, use_cache=False).logits[0]
    for tier, start, stop in ((0, 0, 6), (1, 6, 13), (2, 13, 20)):
        runtime.freeze(tier)
        frozen = model(ids, use_cache=False).logits[0]
        torch.testing.assert_close(got[start:stop], frozen[start:stop], atol=1e-4, rtol=0)
    runtime.freeze(None)
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "attention_mask": None}), with_kwargs=True
    )
    with pytest.raises(LongRopeError, match=r"bidirectional attention .* only with a 4D mask"):
        model(ids, use_cache=False)


@torch.no_grad()
def test_long_forwards_work_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy_model()
    config = toy_config(model)
    ids = some_ids(1, 20)
    expected = reference_logits(model, config, ids[0], None)
    apply_longrope(model, config)
    monkeypatch.setattr(attention, "MASK_ROWS", 3)
    monkeypatch.setattr(runtime_module, "KEPT_TURNS", 0)
    torch.testing.assert_close(model(ids).logits[0], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_attention_weights_and_hidden_states_are_whole() -> None:
    model = toy_model()
    model.set_attn_implementation("eager")
    apply_longrope(model, toy_config(model))
    ids = some_ids(2, 20)
    full = model(ids, output_attentions=True, output_hidden_states=True)
    assert full.hidden_states[-1].shape == (2, 20, 32)
    step = model(ids[:, :19], use_cache=True)
    last = model(ids[:, 19:], past_key_values=step.past_key_values, output_attentions=True)
    for whole, row in zip(full.attentions, last.attentions, strict=True):
        assert whole.shape == (2, 4, 20, 20)
        torch.testing.assert_close(whole.sum(-1), torch.ones(2, 4, 20))
        torch.testing.assert_close(whole[:, :, 19:], row, atol=1e-5, rtol=0)
