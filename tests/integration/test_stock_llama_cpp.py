"""Stock llama.cpp computes with the factors we write what transformers computes with them.

Random models of two layers; the perplexity that llama-perplexity prints against one computed here
from transformers' own classes, on the same tokens, on both sides of the switch length.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    SENTENCES,
    add_bpe_tokenizer,
    add_sentencepiece,
    as_granite,
    edit_json,
    make_model,
)
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from longrope_converters.to_gguf.convert import GgufConverter, GgufOptions
from longrope_export.config import FactorTier, LongRopeConfig, SwitchPolicy
from longrope_export.llama_cpp.perplexity import run_perplexity
from longrope_export.models.model import load_model

pytestmark = pytest.mark.integration

WINDOW, TARGET = 256, 512  # llama.cpp rounds a context up to a multiple of 256
TEXT = " ".join(SENTENCES * 40)
STOCK_FAMILIES = ("llama", "mistral", "phi3", "granite", "minicpm")


def longrope_block(pairs: int) -> dict[str, Any]:
    ramp = np.linspace(0, 1, pairs)
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": (1 + 0.5 * ramp).tolist(),
        "long_factor": (4.0**ramp * 1.1).tolist(),
        "original_max_position_embeddings": WINDOW,
        "attention_factor": 1.3,
    }


def make_folder(folder: Path, family: str, **settings: Any) -> Path:
    """A model whose attention matters: weights larger than transformers' initial ones."""
    settings = {"max_position_embeddings": TARGET, "initializer_range": 0.2, **settings}
    make_model(folder, family, dtype="float32", **settings)
    if family in ("phi3", "minicpm"):
        add_sentencepiece(folder)  # their converters know no other
        path = folder / "tokenizer_config.json"
        declared = json.loads(path.read_text())["added_tokens_decoder"]
        declared["302"] = {"content": "<|endoftext|>", "special": True}  # phi3's loader needs it
        edit_json(path, added_tokens_decoder=declared)
    else:
        add_bpe_tokenizer(folder)
    return folder


def llama_cpp_perplexity(programs: Path, model: Path, text: Path, context: int) -> float:
    """The first chunk in exact arithmetic: float32 cache, no flash attention, one sequence."""
    exact = ("-b", str(context), "-fa", "off", "-ctk", "f32", "-ctv", "f32")
    program = programs / "llama-perplexity"
    return run_perplexity(program, model, text, context=context, threads=1, options=exact).value


def token_ids(folder: Path, text: str) -> tuple[list[int], int | None]:
    """Tokens without specials, and the BOS that llama.cpp puts in front of each chunk."""
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids, None
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return processor.encode(text), processor.bos_id()


@torch.no_grad()
def reference_perplexity(folder: Path, text: str, context: int) -> float:
    """As llama-perplexity defines it: exp of the mean loss of positions context / 2 on."""
    ids, bos = token_ids(folder, text)
    chunk = ids[:context] if bos is None else [bos, *ids][:context]
    loaded = folder
    if json.loads((folder / "config.json").read_text())["model_type"] == "minicpm":
        loaded = as_granite(folder)
    model = AutoModelForCausalLM.from_pretrained(loaded, dtype=torch.float32).eval()
    logits = model(torch.tensor([chunk])).logits[0].double()
    losses = torch.nn.functional.cross_entropy(
        logits[:-1], torch.tensor(chunk[1:]), reduction="none"
    )
    first = context // 2
    return math.exp(losses[first:].mean().item())


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def convert(folder: Path, output: Path, config: LongRopeConfig | None = None) -> Path:
    model = load_model(folder)
    pre = "gpt-2" if (folder / "tokenizer.json").is_file() else None
    GgufConverter(GgufOptions(outtype="f32", pre=pre)).convert(
        model, config, output, lambda _: None
    )
    return output


@pytest.mark.parametrize("family", STOCK_FAMILIES)
def test_stock_llama_cpp_equals_transformers_on_both_sides_of_the_switch(
    family: str, programs: Path, text: Path, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / family, family, rope_parameters=longrope_block(8))
    output = convert(folder, tmp_path / "out.gguf")
    for context in (WINDOW, TARGET):
        expected = reference_perplexity(folder, TEXT, context)
        got = llama_cpp_perplexity(programs, output, text, context)
        assert got == pytest.approx(expected, rel=2e-4), f"context {context}"


def test_the_check_above_sees_wrong_factors(programs: Path, text: Path, tmp_path: Path) -> None:
    """The same with factors off by 5 %, an attention factor of 1, or no scaling: it must differ."""
    folder = make_folder(tmp_path / "m", "llama", rope_parameters=longrope_block(8))
    expected = reference_perplexity(folder, TEXT, TARGET)
    native = load_model(folder).native
    last = native.tiers[-1]
    wrong = {
        "factors": FactorTier(TARGET, tuple(f * 1.05 for f in last.rescale_factors), 0, 1.3),
        "attention": FactorTier(TARGET, last.rescale_factors, 0, 1.0),
    }
    for name, tier in wrong.items():
        config = LongRopeConfig(10000.0, 16, WINDOW, TARGET, (tier,), SwitchPolicy.SEQUENCE)
        output = convert(folder, tmp_path / f"{name}.gguf", config)
        got = llama_cpp_perplexity(programs, output, text, TARGET)
        assert abs(got / expected - 1) > 1e-3, name


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_other_architectures_load_and_run_as_the_base_model(
    family: str, programs: Path, text: Path, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / family, family)
    expected = reference_perplexity(folder, TEXT, WINDOW)
    native = load_model(folder).native
    tier = FactorTier(1024, (2.0,) * native.num_pairs, 4, 1.3)
    config = LongRopeConfig(native.rope_theta, native.rotary_dim, TARGET, 1024, (tier,))
    output = convert(folder, tmp_path / "out.gguf", config)
    assert llama_cpp_perplexity(programs, output, text, WINDOW) == pytest.approx(expected, rel=2e-4)
    assert load_model(output).native.tiers[0].num_start_tokens == 4


def test_baking_llama3_factors_over(programs: Path, text: Path, tmp_path: Path) -> None:
    """A Llama 3.1 GGUF has rope_freqs.weight; stock refuses it beside longrope's tensors."""
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    folder = make_folder(tmp_path / "m", "llama", rope_parameters=llama3)
    plain = convert(folder, tmp_path / "plain.gguf")
    expected = reference_perplexity(folder, TEXT, TARGET)
    assert llama_cpp_perplexity(programs, plain, text, TARGET) == pytest.approx(expected, rel=2e-4)
    model = load_model(plain)
    assert model.native.tiers[0].rescale_factors[-1] == pytest.approx(8.0)
    same = LongRopeConfig(10000.0, 16, TARGET, TARGET, model.native.tiers)
    output = tmp_path / "baked.gguf"
    GgufConverter().convert(model, same, output, lambda _: None)
    assert llama_cpp_perplexity(programs, output, text, TARGET) == pytest.approx(expected, rel=2e-4)
    again = tmp_path / "again.gguf"
    GgufConverter().convert(load_model(output), same, again, lambda _: None)
    assert again.read_bytes() == output.read_bytes()


def test_hundreds_of_tiers_load_in_stock_llama_cpp(
    programs: Path, text: Path, tmp_path: Path
) -> None:
    from longrope_export.ladder import make_config

    folder = make_folder(tmp_path / "m", "llama")
    config = make_config(load_model(folder), "yarn", TARGET * 500, ladder=f"every:{TARGET}")
    output = convert(folder, tmp_path / "out.gguf", config)
    assert len(load_model(output).native.tiers) == 500
    assert math.isfinite(llama_cpp_perplexity(programs, output, text, WINDOW))


@pytest.mark.usefixtures("patched")  # converting runs our own llama-quantize
@pytest.mark.parametrize("outtype", ["q4_k_m", "q4_0", "q6_k"])
def test_types_of_llama_quantize(outtype: str, programs: Path, text: Path, tmp_path: Path) -> None:
    settings = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.05}
    block = longrope_block(32)
    folder = make_folder(tmp_path / "m", "llama", rope_parameters=block, **settings)
    model = load_model(folder)
    output = tmp_path / "out.gguf"
    options = GgufOptions(outtype=outtype, pre="gpt-2")
    report = GgufConverter(options).convert(model, None, output, lambda _: None)
    assert report.route == f"native, llama-quantize {outtype}"
    back = load_model(output).native
    np.testing.assert_array_equal(
        np.float32(back.tiers[-1].rescale_factors), np.float32(block["long_factor"])
    )
    expected = reference_perplexity(folder, TEXT, TARGET)
    got = llama_cpp_perplexity(programs, output, text, TARGET)
    assert got == pytest.approx(expected, rel=0.2)
    assert list(tmp_path.glob(".longrope-*")) == []
