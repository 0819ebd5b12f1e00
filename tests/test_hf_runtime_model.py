"""The live runtime in training, other precisions and threads; what it refuses; taking it off."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hf_reference import THETA, reference_logits, some_ids, toy_config, toy_model
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from longrope_export.config import FactorTier, LogitScaling, LongRopeConfig
from longrope_export.errors import LongRopeError
from longrope_export.hf_runtime import apply_longrope, remove_longrope


@pytest.mark.parametrize(
    "family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma", "Gemma2"]
)
@torch.no_grad()
def test_two_tiers_without_cache_equal_transformers_own_longrope(family: str) -> None:
    # little noise: float32 angles differ from float64 ones by 1e-6 already
    model = toy_model(family, noise=0.03)
    config = toy_config(model, "sequence", plain_logits=True)
    short, long = config.tiers[0], config.tiers[2]
    tiers = (
        FactorTier(8, short.rescale_factors, 0, 1.25),
        FactorTier(24, long.rescale_factors, 0, 1.25),
    )
    block = {
        "rope_type": "longrope",
        "rope_theta": THETA,
        "short_factor": list(short.rescale_factors),
        "long_factor": list(long.rescale_factors),
        "original_max_position_embeddings": 8,
        "factor": 3.0,
        "attention_factor": 1.25,
    }
    stock_settings: dict[str, Any] = {
        "rope_parameters": block,
        "max_position_embeddings": 24,
        "original_max_position_embeddings": 8,
    }
    if family == "Phi3":
        block["partial_rotary_factor"] = 0.75
    stock = toy_model(family, **stock_settings)
    stock.load_state_dict(model.state_dict())
    ours = toy_config(model, "sequence", plain_logits=True, lengths=(2, 8, 24), tiers=tiers)
    ids = some_ids(1, 20)
    assert (model(ids).logits - stock(ids).logits).abs().max() > 1e-4
    apply_longrope(model, ours)
    for length in (5, 8, 9, 20):
        ids = some_ids(1, length)
        torch.testing.assert_close(model(ids).logits, stock(ids).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "not"])
def test_gradients_across_borders(checkpointing: bool | None) -> None:
    reference = toy_model("Qwen3")
    config = toy_config(reference)
    model = copy.deepcopy(reference)
    apply_longrope(model, config)
    ids = some_ids(1, 20)
    labels = ids[0, 1:]
    reference_loss = torch.nn.functional.cross_entropy(
        reference_logits(reference, config, ids[0], None)[:-1], labels
    )
    reference_loss.backward()
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    loss = model(ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, reference_loss, atol=1e-5, rtol=0)
    for expected, got in zip(reference.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_compiled_forward_gives_the_same_numbers() -> None:
    model = toy_model(num_hidden_layers=1)
    config = toy_config(model)
    ids = some_ids(1, 20)
    expected = reference_logits(model, config, ids[0], None)
    apply_longrope(model, config)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", dynamic=True)
    cache = DynamicCache(config=model.config)
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 20)):
        logits = compiled(ids[:, start:stop], past_key_values=cache).logits[0]
        torch.testing.assert_close(logits, expected[start:stop], atol=1e-4, rtol=0)


@torch.no_grad()
def test_freeze_serves_one_tier_and_comes_back() -> None:
    model = toy_model()
    config = toy_config(model)
    ids = some_ids(1, 20)
    frozen = reference_logits(model, config, ids[0], 1)
    causal = reference_logits(model, config, ids[0], None)
    runtime = apply_longrope(model, config)
    runtime.freeze(1)
    half = model(ids[:, :18], use_cache=True)
    torch.testing.assert_close(half.logits[0], frozen[:18], atol=1e-4, rtol=0)
    runtime.freeze(None)
    torch.testing.assert_close(model(ids).logits[0], causal, atol=1e-4, rtol=0)
    # the keys of a cache follow
    cache = half.past_key_values
    model(ids[:, 18:], past_key_values=cache)
    tiers = runtime.tiers(cache)
    assert tiers is not None
    assert tiers.tolist() == [2]
    with pytest.raises(LongRopeError, match=r"no tier 3; use 0\.\.2"):
        runtime.freeze(3)


@torch.no_grad()
def test_pin_declares_the_length() -> None:
    model = toy_model()
    config = toy_config(model, "sequence")
    ids = some_ids(1, 14)
    pinned = reference_logits(model, config, ids[0], 1)
    apply_longrope(model, config, pin_length=10)
    half = model(ids[:, :4], use_cache=True)
    torch.testing.assert_close(half.logits[0], pinned[:4], atol=1e-4, rtol=0)
    with pytest.raises(LongRopeError, match="14 tokens, pin_length chose the tier that ends at 13"):
        model(ids[:, 4:], past_key_values=half.past_key_values)


@torch.no_grad()
def test_angles_stay_exact_in_half_precision_models_far_out() -> None:
    """bf16 positions or frequencies would be off by many turns here; float32 ones by 0.1 rad."""
    model = toy_model()
    config = toy_config(model, lengths=(6, 13, 4_000_000))
    apply_longrope(model, config)
    model.to(torch.bfloat16).to(torch.float32)  # a buffer would not survive this
    seen = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    position = 3_999_999
    model(some_ids(1, 1), position_ids=torch.tensor([[position]]), use_cache=False)
    tier = config.tiers[2]
    pairs = np.arange(config.num_pairs)
    angles = position * THETA ** (-2 * pairs / config.rotary_dim) / tier.rescale_factors
    for got, function in zip(seen[0], (np.cos, np.sin), strict=True):
        expected = np.tile(function(angles) * tier.attention_factor, 2)
        np.testing.assert_allclose(got[0, 0].numpy(), expected, atol=1e-6)
    assert model.to(torch.bfloat16)(some_ids(2, 20)).logits.isfinite().all()


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Gemma3"])
@torch.no_grad()
def test_only_named_layers_are_rescaled(family: str) -> None:
    layers = {"layer_types": ["full_attention", "full_attention"]} if family == "Gemma3" else {}
    model = toy_model(family, **layers)
    config = toy_config(model, layers=(1,))
    ids = some_ids(1, 20)
    expected = reference_logits(model, config, ids[0], None)
    everywhere = reference_logits(model, toy_config(model, layers=(0, 1)), ids[0], None)
    assert (expected - everywhere).abs().max() > 0.01
    apply_longrope(model, config)
    torch.testing.assert_close(model(ids).logits[0], expected, atol=1e-4, rtol=0)
    half = model(ids[:, :8], use_cache=True)
    rest = model(ids[:, 8:], past_key_values=half.past_key_values).logits[0]
    torch.testing.assert_close(rest, expected[8:], atol=1e-4, rtol=0)


@torch.no_grad()
def test_other_layers_are_plain_though_the_model_has_a_scaling_of_its_own() -> None:
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": THETA}
    model, ids = toy_model(rope_parameters=linear), some_ids(1, 20)
    config = toy_config(model, layers=(1,))
    expected = reference_logits(model, config, ids[0], None)
    apply_longrope(model, config)
    torch.testing.assert_close(model(ids).logits[0], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_removing_gives_the_model_back() -> None:
    model = toy_model("Gemma3")
    ids = some_ids(1, 20)
    before, modules = model(ids).logits, [name for name, _ in model.named_modules()]
    names = set(model.state_dict())
    apply_longrope(model, toy_config(model))
    assert set(model.state_dict()) == names
    with pytest.raises(LongRopeError, match="remove_longrope first"):
        apply_longrope(model, toy_config(model))
    remove_longrope(model)
    assert torch.equal(model(ids).logits, before)
    assert [name for name, _ in model.named_modules()] == modules
    assert not model.model._forward_pre_hooks
    assert not model.model._forward_hooks
    with pytest.raises(LongRopeError, match="no LongRoPE config"):
        remove_longrope(model)


@torch.no_grad()
def test_a_copy_of_the_model_is_its_own() -> None:
    model = toy_model()
    apply_longrope(model, toy_config(model))
    ids = some_ids(1, 20)
    with_tiers = model(ids).logits
    other = copy.deepcopy(model)
    remove_longrope(model)
    assert torch.equal(other(ids).logits, with_tiers)
    remove_longrope(other)
    assert torch.equal(other(ids).logits, model(ids).logits)


@pytest.mark.parametrize("switch", ["causal", "sequence"])
@torch.no_grad()
def test_threads_run_one_model_side_by_side(switch: str) -> None:
    model = toy_model()
    apply_longrope(model, toy_config(model, switch))
    ids = some_ids(1, 20)
    lengths = (5, 20)
    expected = [model(ids[:, :n]).logits for n in lengths]
    meet = threading.Barrier(2, timeout=60)

    def wait(*_: Any) -> None:
        """Both forwards have made their plans before either asks for angles."""
        meet.wait()

    model.model.rotary_emb.register_forward_pre_hook(wait)

    def run(length: int) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(ids[:, :length]).logits
        return logits

    with ThreadPoolExecutor(2) as pool:
        for got, whole in zip(pool.map(run, lengths), expected, strict=True):
            torch.testing.assert_close(got, whole)


@torch.no_grad()
def test_a_pickled_model_keeps_its_definition() -> None:
    model = toy_model()
    apply_longrope(model, toy_config(model))
    ids = some_ids(1, 20)
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, model(ids).logits)


def test_models_and_configs_that_do_not_fit_are_refused() -> None:
    model = toy_model()
    fits = toy_config(model)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"rope_theta": 5e5}, "rope_theta is 500000, the model .LlamaModel. has 10000"),
        ({"layers": (5,)}, "layers names layer 5, the model .LlamaModel. has 2"),
        ({"logit_scaling": LogitScaling(5, (2,))}, "exempt_layers names layer 2"),
    ]
    for changes, message in bad:
        with pytest.raises(LongRopeError, match=message):
            apply_longrope(model, toy_config(model, **changes))
    narrow = LongRopeConfig(THETA, 4, 6, 24, (FactorTier(24, (1.0, 2.0)),))
    with pytest.raises(LongRopeError, match=r"rotary_dim is 4, the model .LlamaModel. has 8"):
        apply_longrope(model, narrow)
    with pytest.raises(LongRopeError, match="pin_length is for switch = sequence"):
        apply_longrope(model, fits, pin_length=10)
    with pytest.raises(LongRopeError, match=r"pin_length must be 1\.\.24"):
        apply_longrope(model, toy_config(model, "sequence"), pin_length=25)
    gemma = toy_model("Gemma3")
    with pytest.raises(LongRopeError, match=r"full attention, \[1\].*all layers"):
        apply_longrope(gemma, toy_config(gemma, layers=None))
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8))
    with pytest.raises(LongRopeError, match="GPT2LMHeadModel: 0 text models of a known kind"):
        apply_longrope(gpt2, fits)


@torch.no_grad()
def test_forwards_that_cannot_be_right_are_refused() -> None:
    model = toy_model()
    fresh = copy.deepcopy(model)
    runtime = apply_longrope(model, toy_config(model))
    ids = some_ids(1, 25)
    with pytest.raises(LongRopeError, match=r"25 tokens, the last tier ends .* = 24: make factors"):
        model(ids)
    foreign = fresh(ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(LongRopeError, match="holds 4 tokens of which the runtime has seen 0"):
        model(ids[:, 4:5], past_key_values=foreign)
    with pytest.raises(LongRopeError, match="continuous batching"):
        model(ids[:, :4], cache=object())
    AttentionInterface.register("somebody_elses", sdpa_attention_forward)
    model.set_attn_implementation("somebody_elses")
    model(ids[:, :6])
    with pytest.raises(LongRopeError, match="'somebody_elses' cannot be cut at a tier border"):
        model(ids[:, :8])

    class SomebodyElsesLayer(DynamicLayer):  # type: ignore[misc]
        """Might hold its keys in any form."""

    model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=model.config)
    cache.layers[1] = SomebodyElsesLayer()
    held = model(ids[:, :4], past_key_values=cache).past_key_values
    with pytest.raises(LongRopeError, match="layer 1 of the cache is a SomebodyElsesLayer"):
        model(ids[:, 4:7], past_key_values=held)
    assert not (runtime.tiers(held) != 0).any(), "nothing was turned"


@torch.no_grad()
def test_a_cache_belongs_to_the_definition_that_filled_it() -> None:
    model = toy_model()
    config = toy_config(model)
    ids = some_ids(1, 20)
    expected = reference_logits(model, config, ids[0], None)
    apply_longrope(model, config)
    cache = model(ids[:, :10], use_cache=True).past_key_values
    remove_longrope(model)
    apply_longrope(model, toy_config(model, lengths=(6, 9, 24)))
    with pytest.raises(LongRopeError, match="filled under another LongRoPE definition"):
        model(ids[:, 10:], past_key_values=cache)
    remove_longrope(model)
    apply_longrope(model, toy_config(model))
    rest = model(ids[:, 10:], past_key_values=cache).logits[0]
    torch.testing.assert_close(rest, expected[10:], atol=1e-4, rtol=0)
    remove_longrope(model)
    apply_longrope(model, toy_config(model, lengths=(6, 9, 24)))
    cache.reset()
    model(ids, past_key_values=cache)


@pytest.mark.parametrize("switch", ["causal", "sequence"])
@torch.no_grad()
def test_a_cache_is_refused_after_a_change_of_tier_that_failed(switch: str) -> None:
    model = toy_model()
    ids = some_ids(1, 20)
    apply_longrope(model, toy_config(model, switch))
    cache = DynamicCache(config=model.config)
    model(ids[:, :5], past_key_values=cache)

    def fail(*_: Any) -> None:
        raise MemoryError

    if switch == "causal":  # the first layer is turned, the second has no keys to turn
        keys, cache.layers[1].keys = cache.layers[1].keys, None
        with pytest.raises(AttributeError):
            model(ids[:, 5:8], past_key_values=cache)
        cache.layers[1].keys = keys
    else:
        hook = model.model.layers[0].register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            model(ids[:, 5:8], past_key_values=cache)
        hook.remove()
    with pytest.raises(LongRopeError, match="start with an empty cache"):
        model(ids[:, 5:8], past_key_values=cache)
    cache.reset()
    whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, whole)


@torch.no_grad()
def test_embeddings_can_be_given_until_a_recompute_would_need_ids() -> None:
    model = toy_model()
    config = toy_config(model, "sequence")
    ids = some_ids(1, 8)
    expected = reference_logits(model, config, ids[0], 0)
    apply_longrope(model, config)
    embedded = model.get_input_embeddings()(ids)
    result = model(inputs_embeds=embedded[:, :5], use_cache=True)
    torch.testing.assert_close(result.logits[0], expected[:5], atol=1e-4, rtol=0)
    with pytest.raises(LongRopeError, match="came as inputs_embeds: pass pin_length"):
        model(inputs_embeds=embedded[:, 5:], past_key_values=result.past_key_values)
