"""The patched llama.cpp computes the definition: logits against a reference written for tests.

Random models of two layers whose attention matters, three tiers with borders at 64 and 128 tokens,
start tokens, an attention factor per tier and a log scale; float32 weights and cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from longrope_driver import Driver, add
from tiny_models import (
    add_bpe_tokenizer,
    add_sentencepiece,
    as_granite,
    edit_json,
    make_model,
)

from longrope_converters.to_gguf.convert import GgufConverter, GgufOptions
from longrope_export.config import FactorTier, LogitScaling, LongRopeConfig, SwitchPolicy
from longrope_export.llama_cpp.source import fetch_source
from longrope_export.models.model import load_model
from longrope_export.verify.reference import reference_logits

pytestmark = pytest.mark.integration

LENGTH = 200
BORDERS = (64, 128, 256)
LIMIT, KL_LIMIT = 2e-4, 1e-9  # measured: 4e-5 and 1e-10
SEED = np.random.default_rng(7)
TOKENS = SEED.integers(3, 300, LENGTH).tolist()
OTHER = SEED.integers(3, 300, 40).tolist()
CONTEXT = "ctx n_ctx=512 n_batch=512 n_ubatch={} {}"
Logits = npt.NDArray[np.float32]

# what llama.cpp takes for granted and the defaults of transformers do not say
GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 48,
    "initializer_range": 0.09,
}
MOE = {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "phi3": {},
    "granite": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {"head_dim": 16, "initializer_range": 0.09},
    "gemma2": GEMMA,
    "gemma3": {**GEMMA, "num_hidden_layers": 6, "layer_types": None},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 48},
    "qwen3_moe": {**MOE, "head_dim": 16, "norm_topk_prob": True},
    "granitemoe": {"num_local_experts": 4},
}
# transformers has no class for the first, and llama.cpp computes the second as another model
LLAMA_CPP_FAMILIES = {
    **FAMILIES,
    "minicpm": {},
    "phimoe": {"num_local_experts": 4, "attention_bias": True, "lm_head_bias": True},
}
STOCK_CONVERTED = (
    "gemma",
    "gemma2",
    "gemma3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "granitemoe",
    "phimoe",
)


class Toy:
    """One random model: its folder, its GGUF without factors, its logits by transformers."""

    def __init__(self, root: Path, family: str) -> None:
        self.folder, self.plain = root / family, root / f"{family}.gguf"
        settings = {"initializer_range": 0.15, **LLAMA_CPP_FAMILIES[family]}
        make_model(self.folder, family, dtype="float32", **settings)
        if family.startswith("gemma"):
            quieten_mlp(self.folder)
        if family == "phimoe":  # what checkpoints say, which llama.cpp's converter goes by
            edit_json(
                self.folder / "config.json",
                architectures=["PhiMoEForCausalLM"],
                original_max_position_embeddings=256,
            )
        if family in ("phi3", "phimoe", "minicpm"):
            add_phi3_tokenizer(self.folder)
        elif family.startswith("gemma"):
            add_sentencepiece(self.folder)
        else:
            add_bpe_tokenizer(self.folder)
        if family not in STOCK_CONVERTED:
            convert(self.folder, None, self.plain)
        self.family = family
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            as_granite(self.folder) if family == "minicpm" else self.folder, dtype=torch.float32
        ).eval()
        if family == "phimoe":
            phimoe_as_in_llama_cpp(self.model)

    def config(self, rule: str, **changes: Any) -> LongRopeConfig:
        native = load_model(self.folder).native
        pairs = native.num_pairs
        ramp = np.linspace(0, 1, pairs)
        tiers = (
            FactorTier(BORDERS[0], (1.0,) * pairs),
            FactorTier(BORDERS[1], tuple((2.0**ramp).tolist()), 5, 1.05),
            FactorTier(BORDERS[2], tuple((4.0**ramp).tolist()), 9, 1.1),
        )
        config = LongRopeConfig(
            rope_theta=native.rope_theta,
            rotary_dim=native.rotary_dim,
            original_max_position_embeddings=BORDERS[0],
            max_position_embeddings=BORDERS[2],
            tiers=tiers,
            switch=SwitchPolicy(rule),
            logit_scaling=LogitScaling(32, (1,)),
            layers=native.layers,
        )
        return replace(config, **changes)

    def gguf(self, config: LongRopeConfig, name: str) -> Path:
        path = self.plain.with_name(f"{self.family}-{name}.gguf")
        if not path.exists():
            convert(self.plain, config, path)
        return path

    def reference(self, config: LongRopeConfig, tokens: list[int], **how: Any) -> Logits:
        return reference_logits(self.model, config, tokens, **how).numpy()


def add_phi3_tokenizer(folder: Path) -> None:
    add_sentencepiece(folder)
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values["added_tokens_decoder"]["302"] = {"content": "<|endoftext|>", "special": True}
    path.write_text(json.dumps(values))


def quieten_mlp(folder: Path) -> None:
    """ggml's GELU is a table of float16: its steps of 5e-4 would hide what is measured here."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer in model.model.layers:
        if hasattr(layer, "post_feedforward_layernorm"):
            torch.nn.init.constant_(layer.post_feedforward_layernorm.weight, -0.98)  # times 0.02
        else:
            layer.mlp.down_proj.weight.data *= 0.02
    model.save_pretrained(folder)


def phimoe_as_in_llama_cpp(model: Any) -> None:
    """Its experts are weighted by a plain softmax there, and its LayerNorms are RMS norms."""

    def route(router: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = torch.nn.functional.linear(hidden, router.weight)
        weights, experts = logits.softmax(-1).topk(router.top_k)
        return logits, weights / weights.sum(-1, keepdim=True), experts

    def norm(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], layer.weight, layer.eps) + layer.bias  # fmt: skip

    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.forward = partial(norm, module)
    for layer in model.model.layers:
        layer.mlp.router.forward = partial(route, layer.mlp.router)


def convert(source: Path, config: LongRopeConfig | None, output: Path) -> None:
    model = load_model(source)
    options = GgufOptions(
        outtype="f32" if source.is_dir() else None, pre="gpt-2" if source.is_dir() else None
    )
    converter = GgufConverter(options)
    converter.check(model, config)
    converter.convert(model, config, output, lambda count: None)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_toys(tmp_path_factory.mktemp("toys"), LLAMA_CPP_FAMILIES)


def make_toys(root: Path, families: Iterable[str]) -> dict[str, Toy]:
    """One of every family; what our own converter does not write is written by llama.cpp's."""
    made = {family: Toy(root, family) for family in families}
    jobs = [
        {
            "folder": str(made[family].folder),
            "outtype": "f32",
            "output": str(made[family].plain),
            "pre": "gpt-2",
            "name": None,
        }
        for family in made
        if family in STOCK_CONVERTED
    ]
    source = fetch_source()
    result = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "stock_converter.py")],
        input=json.dumps(jobs),
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(source), str(source / "gguf-py")])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return made


def assert_close(got: Logits, wanted: Logits) -> None:
    difference = np.abs(got - wanted).max()
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (wanted, got))
    divergence = float((p.exp() * (p - q)).sum(-1).max())
    assert difference <= LIMIT and divergence <= KL_LIMIT, (difference, divergence)


def in_chunks(size: int, tokens: list[int] = TOKENS) -> list[str]:
    """One decode per chunk, under the rule `sequence` of a declared length."""
    lines = []
    for first in range(0, len(tokens), size):
        lines += [add(0, first, tokens[first : first + size]), "decode"]
    return lines


WAYS = {
    "at once": (512, LENGTH),
    "ubatches that a border and the start window fall into": (50, LENGTH),
    "tiny ubatches": (7, LENGTH),
    "chunks": (512, 30),
    "token by token": (512, 1),
}


@pytest.mark.parametrize("family", LLAMA_CPP_FAMILIES)
@pytest.mark.parametrize("rule", ["causal", "sequence"])
def test_logits_equal_the_reference(
    driver: Driver, toys: dict[str, Toy], family: str, rule: str
) -> None:
    toy = toys[family]
    config = toy.config(rule)
    wanted = toy.reference(config, TOKENS)
    # the reference can tell: one tier alone, no start tokens and no log scale each give other logits
    others = (
        toy.reference(config, TOKENS, tier_at=lambda position: 1),
        toy.reference(
            replace(config, tiers=tuple(replace(t, num_start_tokens=0) for t in config.tiers)),
            TOKENS,
        ),
        toy.reference(replace(config, logit_scaling=None), TOKENS),
    )
    assert min(np.abs(other - wanted).max() for other in others) > 25 * LIMIT
    path = toy.gguf(config, rule)
    for ubatch, chunk in WAYS.values():
        declare = [f"length 0 {LENGTH}"] if rule == "sequence" else []
        script = [CONTEXT.format(ubatch, ""), *declare, *in_chunks(chunk)]
        got, _ = driver.run(path, script)
        assert_close(got.reshape(LENGTH, -1), wanted)


def test_layers_that_are_not_rescaled_take_no_stock_factors(
    driver: Driver, toys: dict[str, Toy]
) -> None:
    """The file holds factors and an attention factor for a stock llama.cpp, which has one set for all."""
    toy = toys["llama"]
    config = toy.config("causal", layers=(1,))
    wanted = toy.reference(config, TOKENS)
    got, _ = driver.run(toy.gguf(config, "one-layer"), [CONTEXT.format(50, ""), *in_chunks(LENGTH)])
    assert_close(got.reshape(LENGTH, -1), wanted)


@pytest.mark.parametrize("family", LLAMA_CPP_FAMILIES)
def test_without_our_keys_nothing_changes(
    driver: Driver, toys: dict[str, Toy], family: str
) -> None:
    for options in ("", "fa=1 type_k=f16 type_v=f16"):
        script = [
            CONTEXT.format(64, options),
            *in_chunks(LENGTH),
            "rm 0 20 40",
            "shift 0 40 -1 -20",
        ]
        script += [add(0, LENGTH - 20, OTHER), "decode"]
        patched, _ = driver.run(toys[family].plain, script)
        stock, _ = driver.run(toys[family].plain, script, patched=False)
        assert patched.size and patched.tobytes() == stock.tobytes()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_short_prompt_is_the_original_model_whatever_is_allocated(
    driver: Driver, toys: dict[str, Toy], family: str
) -> None:
    toy = toys[family]
    config = toy.config("causal", logit_scaling=None)
    path = toy.gguf(config, "causal-no-log")
    short = [add(0, 0, TOKENS[: BORDERS[0]]), "decode"]
    original, _ = driver.run(toy.plain, [CONTEXT.format(512, ""), *short], patched=False)
    for size in (256, 4096):
        got, _ = driver.run(path, [f"ctx n_ctx={size} n_batch=512 n_ubatch=512", *short])
        assert got.tobytes() == original.tobytes()


@pytest.mark.parametrize("unified", [0, 1])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_sequences_of_one_batch_stand_on_their_own_tiers(
    driver: Driver, toys: dict[str, Toy], family: str, unified: int
) -> None:
    toy = toys[family]
    config = toy.config("causal")
    options = f"n_seq_max=3 unified={unified}"
    # sequence 0 crosses both borders while 1 and 2 are short, then 1 starts to cross the first
    script = [f"ctx n_ctx=1024 n_batch=512 n_ubatch=64 {options}"]
    script += [add(0, 0, TOKENS[:60]), add(1, 0, OTHER), "decode"]
    script += [add(0, 60, TOKENS[60:150]), add(2, 0, OTHER[:10]), "decode"]
    script += [add(0, 150, TOKENS[150:]), add(1, len(OTHER), TOKENS[:50]), "decode"]
    got, _ = driver.run(toy.gguf(config, "causal"), script)
    rows = iter(got.reshape(-1, toy.model.config.vocab_size))
    parts: dict[int, list[Logits]] = {0: [], 1: [], 2: []}
    for sequence, count in ((0, 60), (1, 40), (0, 90), (2, 10), (0, 50), (1, 50)):
        parts[sequence] += [next(rows) for _ in range(count)]
    for sequence, tokens in ((0, TOKENS), (1, OTHER + TOKENS[:50]), (2, OTHER[:10])):
        assert_close(np.stack(parts[sequence]), toy.reference(config, tokens))


@cache
def ladder(pairs: int, theta: float) -> LongRopeConfig:
    """200 tiers, one token each, from 32 tokens on."""
    ramp = np.linspace(0, 1, pairs)
    tiers = tuple(
        FactorTier(
            length, tuple(((length / 32) ** ramp).tolist()), 4, 1 + 0.1 * np.log(length / 32)
        )
        for length in range(32, 232)
    )
    return LongRopeConfig(theta, 2 * pairs, 32, 231, tiers)


def test_two_hundred_tiers(driver: Driver, toys: dict[str, Toy]) -> None:
    toy = toys["llama"]
    native = load_model(toy.folder).native
    config = ladder(native.num_pairs, native.rope_theta)
    path = toy.gguf(config, "ladder")
    wanted = toy.reference(config, TOKENS)
    for chunk in (LENGTH, 1):
        got, _ = driver.run(path, [CONTEXT.format(512, ""), *in_chunks(chunk)])
        assert_close(got.reshape(LENGTH, -1), wanted)


def test_a_deep_graph_has_room_for_all_tiers(driver: Driver, tmp_path: Path) -> None:
    """phi3 has the fewest tensors a layer, which upstream's limit of nodes comes from."""
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 24}
    make_model(tmp_path / "m", "phi3", dtype="float32", **sizes)
    add_phi3_tokenizer(tmp_path / "m")
    native = load_model(tmp_path / "m").native
    tiers = tuple(
        FactorTier(
            16 * n, tuple(np.linspace(1.0, 1.0 + n, native.num_pairs).tolist()), 4, 1 + n / 50
        )
        for n in range(1, 5)
    )
    config = LongRopeConfig(
        native.rope_theta, native.rotary_dim, 16, 64, tiers, logit_scaling=LogitScaling(2, (1,))
    )
    convert(tmp_path / "m", config, tmp_path / "m.gguf")
    context = "ctx n_ctx=1280 n_batch=512 n_ubatch=512 n_seq_max=5 type_k=q8_0"
    lengths = (2, 10, 26, 42, 58)  # start tokens only, then one for each tier
    prompts = [add(s, 0, TOKENS[:n]) + "\ndecode" for s, n in enumerate(lengths)]
    last = [add(s, n, TOKENS[n : n + 1]) for s, n in enumerate(lengths)]
    together, _ = driver.run(tmp_path / "m.gguf", [context, *prompts, *last, "decode"])
    one_by_one = [line + "\ndecode" for line in last]
    apart, _ = driver.run(tmp_path / "m.gguf", [context, *prompts, *one_by_one])
    assert together.size and np.abs(together - apart).max() < LIMIT


def test_sequence_rule_rotates_or_computes_again(driver: Driver, toys: dict[str, Toy]) -> None:
    toy = toys["llama"]
    config = toy.config("sequence")
    path = toy.gguf(config, "sequence")
    first = BORDERS[0]
    script = [CONTEXT.format(512, ""), add(0, 0, TOKENS[:first]), "decode"]
    script += [f"must 0 {first}", f"must 0 {first + 1}"]
    again = ["rm 0 -1 -1", f"length 0 {first + 1}", add(0, 0, TOKENS[: first + 1]), "decode"]
    got, said = driver.run(path, script + again)
    assert [line for line in said.splitlines() if line.startswith("must")] == ["must 0", "must 1"]
    logits = got.reshape(-1, toy.model.config.vocab_size)
    assert_close(logits[:first], toy.reference(config, TOKENS[:first]))
    assert_close(logits[first:], toy.reference(config, TOKENS[: first + 1]))


def test_the_rule_of_the_file_can_be_overridden(driver: Driver, toys: dict[str, Toy]) -> None:
    toy = toys["llama"]
    path = toy.gguf(toy.config("causal"), "causal")
    script = [CONTEXT.format(512, ""), "switch sequence", *in_chunks(LENGTH)]
    got, _ = driver.run(path, script)
    assert_close(got.reshape(LENGTH, -1), toy.reference(toy.config("sequence"), TOKENS))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_saved_states_keep_their_tier(
    driver: Driver, toys: dict[str, Toy], family: str, tmp_path: Path
) -> None:
    toy = toys[family]
    config = toy.config("causal")
    state = tmp_path / "state"
    for save, load in (("save {}", "load {}"), ("save_seq {} 0", "load_seq {} 0")):
        script = [CONTEXT.format(512, ""), add(0, 0, TOKENS[:150]), "decode", save.format(state)]
        # into a context whose own sequence stood on another tier
        script += [CONTEXT.format(512, ""), add(0, 0, OTHER[:5]), "decode", load.format(state)]
        script += [add(0, 150, TOKENS[150:]), "decode"]
        got, _ = driver.run(toy.gguf(config, "causal"), script)
        logits = got.reshape(-1, toy.model.config.vocab_size)
        assert_close(logits[155:], toy.reference(config, TOKENS)[150:])
