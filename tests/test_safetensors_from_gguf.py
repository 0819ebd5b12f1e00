"""Folders made from GGUF files: against the models the files came from, and transformers' reader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf_files import gguf_keys, write_gguf_file
from longrope_rotary import tokens
from safetensors import safe_open
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from test_safetensors import TESTS, export, shards
from tiny_models import SENTENCES, add_bpe_tokenizer, add_sentencepiece, make_model
from tokenizers import Tokenizer

from longrope_converters import gguf_tokenizer
from longrope_converters.to_gguf.convert import GgufConverter, GgufOptions
from longrope_converters.to_gguf.pre_tokenizers import pre_tokenizer_name
from longrope_export.config import LongRopeConfig
from longrope_export.demo.material import fetch_smollm2
from longrope_export.errors import GgufError, UnsupportedError
from longrope_export.gguf_format import read_header
from longrope_export.gguf_values import ValueType, make_array, make_key_value
from longrope_export.ladder import make_config
from longrope_export.llama_cpp.source import fetch_source
from longrope_export.models.model import load_model

TEXTS = [
    *SENTENCES,
    "",
    " two  spaces",
    "tabs\tand\n\nlines 1234",
    "caf\u00e9 \u4f60\u597d \U0001f680",
]
GRANITE = {"embedding_multiplier": 12.0, "attention_multiplier": 0.1, "logits_scaling": 8.0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"tie_word_embeddings": True, "head_dim": 32},
    "qwen2": {},
    "qwen3": {"rms_norm_eps": 1e-5},
    "phi3": {"partial_rotary_factor": 0.5, "sliding_window": 128},
    "granite": GRANITE,
}
GEMMAS: dict[str, dict[str, Any]] = {
    # a GGUF does not say by what queries are scaled: by head_dim, but for the 27B models
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16, "num_hidden_layers": 6, "layer_types": None},
}


def source_model(folder: Path, family: str, **settings: Any) -> Path:
    settings = {"initializer_range": 0.08, "dtype": "float32", **settings}
    make_model(folder, family, **settings)
    add_sentencepiece(folder)
    SentencePieceTrainer.train(  # as Llama's: spaces count, nothing is normalized
        sentence_iterator=iter(SENTENCES * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder


def to_gguf(
    folder: Path, output: Path, config: LongRopeConfig | None = None, **options: Any
) -> Path:
    options = {"outtype": "f32", **options}
    GgufConverter(GgufOptions(**options)).convert(
        load_model(folder), config, output, lambda _: None
    )
    return output


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, Path]]:
    """family -> (source folder, GGUF in f32, folder made from it)."""
    root = tmp_path_factory.mktemp("from-gguf")
    jobs = []
    found = {}
    for family, settings in {**MODELS, **GEMMAS}.items():
        source = source_model(root / f"{family}-source", family, **settings)
        gguf = root / f"{family}.gguf"
        found[family] = source, gguf, root / family
        if family in MODELS:
            to_gguf(source, gguf)
        else:
            names = {"folder": str(source), "output": str(gguf)}
            jobs.append({**names, "outtype": "f32", "pre": None, "name": None})
    _run_stock_converter(jobs)
    for _, gguf, folder in found.values():
        export(gguf, None, folder)
    return found


def _run_stock_converter(jobs: list[dict[str, Any]]) -> None:
    """llama.cpp's own: ours hands gemma to it as well."""
    llama_cpp = fetch_source()
    path = os.pathsep.join([str(llama_cpp), str(llama_cpp / "gguf-py")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(TESTS / "stock_converter.py")]
    result = subprocess.run(
        command,
        input=json.dumps(jobs),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("family", [*MODELS, *GEMMAS])
def test_weights_come_back(family: str, models: dict[str, tuple[Path, Path, Path]]) -> None:
    source, _, folder = models[family]
    expected, got = (load_file(path / "model.safetensors") for path in (source, folder))
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        if family in GEMMAS and name.endswith("norm.weight"):
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-6)  # w + 1 - 1
        else:
            assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("family", [*MODELS, *GEMMAS])
def test_the_models_compute_the_same(
    family: str, models: dict[str, tuple[Path, Path, Path]]
) -> None:
    """Settings too: the class gets from a new config.json what it got from the old one."""
    source, _, folder = models[family]
    expected, got = logits_of(source), logits_of(folder)
    assert np.abs(expected - got).max() <= 1e-5


@torch.no_grad()
def logits_of(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()(tokens(40)).logits.numpy()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
def test_quantized_weights_equal_transformers_own_reading(
    family: str, models: dict[str, tuple[Path, Path, Path]], tmp_path: Path
) -> None:
    source, _, _ = models[family]
    if family != "qwen2":
        # its reader loses the biases of a llama, the head_dim of a qwen3, the rotary_dim of a phi3
        settings = {"head_dim": 128} if family == "qwen3" else {}
        source = source_model(tmp_path / "source", family, **settings)
    gguf = to_gguf(source, tmp_path / "q8.gguf", outtype="q8_0")
    export(gguf, None, tmp_path / "out", dtype="f32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=gguf.name, dtype=torch.float32
    ).state_dict()
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert {name for name in theirs if name != "lm_head.weight"} <= set(ours)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_rounding_to_16_bits(
    dtype: str, kind: torch.dtype, models: dict[str, tuple[Path, Path, Path]], tmp_path: Path
) -> None:
    source, gguf, _ = models["llama"]
    export(gguf, None, tmp_path / "out", dtype=dtype)
    expected = load_file(source / "model.safetensors")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(got[name], tensor.to(kind)) for name, tensor in expected.items())
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["torch_dtype"] == str(kind).removeprefix("torch.")


def test_dtype_left_out(models: dict[str, tuple[Path, Path, Path]], tmp_path: Path) -> None:
    source, _, folder = models["llama"]
    assert next(iter(load_file(folder / "model.safetensors").values())).dtype == torch.float32
    export(to_gguf(source, tmp_path / "q8.gguf", outtype="q8_0"), None, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_shards_and_their_index(models: dict[str, tuple[Path, Path, Path]], tmp_path: Path) -> None:
    source, gguf, folder = models["qwen2"]
    config = make_config(load_model(source), "yarn", 1024)
    export(gguf, config, tmp_path / "out", max_shard_bytes=60_000)
    names = [path.name for path in shards(tmp_path / "out")]
    assert len(names) > 3
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    whole = load_file(folder / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    for name, tensor in whole.items():
        assert torch.equal(load_file(tmp_path / "out" / index["weight_map"][name])[name], tensor)
    with safe_open(shards(tmp_path / "out")[0], framework="np") as file:
        assert json.loads(file.metadata()["longrope"])["max_position_embeddings"] == 1024
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.state_dict()["model.norm.weight"], whole["model.norm.weight"])


def test_a_ladder_inside_a_gguf_is_carried_over(
    models: dict[str, tuple[Path, Path, Path]], tmp_path: Path
) -> None:
    source, _, _ = models["llama"]
    config = make_config(load_model(source), "yarn", 1024, ladder="256,512,1024")
    gguf = to_gguf(source, tmp_path / "ladder.gguf", config)
    with pytest.raises(UnsupportedError, match="middle_tiers"):
        export(gguf, None, tmp_path / "out")
    export(gguf, None, tmp_path / "out", approximate=True)
    back, first = load_model(tmp_path / "out").native, load_model(gguf).native
    assert back == first
    assert [tier.max_length for tier in back.tiers] == [256, 512, 1024]
    plain = load_model(models["llama"][2]).native
    assert plain.tiers[0].is_plain
    assert plain.max_position_embeddings == 256


def encode_all(tokenizer: Any) -> list[list[int]]:
    return [list(tokenizer.encode(text, add_special_tokens=False).ids) for text in TEXTS]


def test_sentencepiece_vocabulary(models: dict[str, tuple[Path, Path, Path]]) -> None:
    source, _, folder = models["mistral"]
    processor = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text, ids in zip(TEXTS, encode_all(tokenizer), strict=True):
        assert ids == processor.encode(text), text
        assert tokenizer.decode(ids) == processor.decode(ids)
    assert tokenizer.encode("a<|user|>b").ids[0] == processor.bos_id()
    assert 300 in tokenizer.encode("a<|user|>b").ids
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert loaded.encode(SENTENCES[0]) == [processor.bos_id(), *processor.encode(SENTENCES[0])]
    assert (loaded.bos_token, loaded.eos_token) == ("<s>", "</s>")


def test_byte_level_vocabulary(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    add_bpe_tokenizer(source)
    gguf = to_gguf(source, tmp_path / "m.gguf", pre="gpt-2")
    export(gguf, None, tmp_path / "out")
    expected = Tokenizer.from_file(str(source / "tokenizer.json"))
    got = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert encode_all(got) == encode_all(expected)
    assert got.encode("a<|end|>").ids == expected.encode("a<|end|>").ids
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "hello"}]
    assert loaded.apply_chat_template(messages, tokenize=False) == "<|user|>hello"


def test_a_real_vocabulary_is_known_to_llama_cpp_again() -> None:
    """The hash of SmolLM2's tokenizer, as llama.cpp lists it."""
    tokenizer = gguf_tokenizer.build_tokenizer(read_header(fetch_smollm2()))
    assert tokenizer is not None
    assert pre_tokenizer_name(tokenizer, Path("tokenizer.json")) == "smollm"


def test_splitting_rules_are_those_of_transformers() -> None:
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert gguf_tokenizer._SPLITS["qwen2"] == (PRETOKENIZE_REGEX,)
    assert gguf_tokenizer._SPLITS["llama-bpe"] == (TikTokenConverter().pattern,)


def test_an_unknown_splitting_rule_gives_no_tokenizer_and_says_so(
    models: dict[str, tuple[Path, Path, Path]], tmp_path: Path
) -> None:
    source = make_model(tmp_path / "source")
    add_bpe_tokenizer(source)
    gguf = to_gguf(source, tmp_path / "m.gguf", pre="viking")
    report = export(gguf, None, tmp_path / "out")
    assert any("splitting rule 'viking' is not known here" in note for note in report["notes"])
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def small_gguf(path: Path, *extra: Any, **tensors: Any) -> Path:
    """A llama of one layer, made by hand."""
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (5, 64),
        "output_norm": (64,),
        "blk.0.attn_norm": (64,),
        "blk.0.ffn_norm": (64,),
        "blk.0.attn_q": (64, 64),
        "blk.0.attn_k": (32, 64),
        "blk.0.attn_v": (32, 64),
        "blk.0.attn_output": (64, 64),
        "blk.0.ffn_gate": (96, 64),
        "blk.0.ffn_up": (96, 64),
        "blk.0.ffn_down": (64, 96),
    }
    weights = {f"{n}.weight": random.standard_normal(s) for n, s in shapes.items()}
    weights.update(tensors)
    present = {name: values for name, values in weights.items() if values is not None}
    norm = make_key_value("llama.attention.layer_norm_rms_epsilon", ValueType.FLOAT32, 1e-5)
    keys = [*gguf_keys(block_count=1, feed_forward_length=96), norm, *extra]
    return write_gguf_file(path, keys, present)


def test_a_file_made_by_hand(tmp_path: Path) -> None:
    export(small_gguf(tmp_path / "m.gguf"), None, tmp_path / "out")
    assert len(load_file(tmp_path / "out" / "model.safetensors")) == 11


def number(name: str, value: int) -> Any:
    return make_key_value(f"llama.{name}", ValueType.UINT32, value)


ODD = {
    "mixture of experts": ((number("expert_count", 4),), {}),
    "has no such tensors: blk.0.extra.weight": ((), {"blk.0.extra.weight": np.ones(3)}),
    "differs by layer": (
        (make_array("llama.attention.head_count_kv", ValueType.UINT32, [2, 4]),),
        {},
    ),
    "heads of different sizes": ((number("attention.value_length", 8),), {}),
}


@pytest.mark.parametrize("message", ODD)
def test_models_that_no_class_of_transformers_holds(message: str, tmp_path: Path) -> None:
    keys, tensors = ODD[message]
    names = {key.key for key in keys}
    path = small_gguf(tmp_path / "m.gguf", **tensors)
    if keys:
        kept = [key for key in read_header(path).key_values.values() if key.key not in names]
        path = write_gguf_file(path, [*kept, *keys], {"token_embd.weight": np.ones((5, 64))})
    with pytest.raises(UnsupportedError, match=message):
        export(path, None, tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.gguf"]


def test_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match=r"tensors are missing: blk\.0\.attn_q\.weight"):
        export(
            small_gguf(tmp_path / "a.gguf", **{"blk.0.attn_q.weight": None}), None, tmp_path / "o"
        )
    wrong = {"blk.0.attn_q.weight": np.ones((64, 32))}
    with pytest.raises(
        GgufError, match=r"attn_q\.weight has shape \[64, 32\], expected \[64, 64\]"
    ):
        export(small_gguf(tmp_path / "b.gguf", **wrong), None, tmp_path / "o")
    cut = small_gguf(tmp_path / "c.gguf")
    cut.write_bytes(cut.read_bytes()[:-300])
    with pytest.raises(GgufError, match="truncated"):
        load_model(cut)
    assert not (tmp_path / "o").exists()


def test_a_weight_beyond_float16(tmp_path: Path) -> None:
    large = {"output_norm.weight": np.full(64, 1e5)}
    path = small_gguf(tmp_path / "m.gguf", **large)
    with pytest.raises(UnsupportedError, match=r"model\.norm\.weight holds values beyond float16"):
        export(path, None, tmp_path / "out", dtype="f16")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.gguf"]
    with pytest.raises(UnsupportedError, match="--link is for folders"):
        export(path, None, tmp_path / "out", link=True)
    with pytest.raises(UnsupportedError, match="--remote-code has nothing to compute"):
        export(path, None, tmp_path / "out", remote_code=True)


def test_a_type_that_cannot_be_dequantized(tmp_path: Path) -> None:
    path = small_gguf(tmp_path / "m.gguf")
    raw = bytearray(path.read_bytes())
    at = raw.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
    assert raw[at : at + 4] == bytes(4)  # F32
    raw[at : at + 4] = (200).to_bytes(4, "little")
    path.write_bytes(raw)
    with pytest.raises(UnsupportedError, match=r"output_norm\.weight is of type 200"):
        export(path, None, tmp_path / "out")
