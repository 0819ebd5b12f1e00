"""Files made from Hugging Face folders equal those of llama.cpp's own converter, byte for byte.

The oracle runs once for all folders, in a process of its own (stock_converter.py).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import (
    CHAT_TEMPLATE,
    add_bpe_tokenizer,
    add_llama_hf_tokenizer,
    add_sentencepiece,
    edit_json,
    make_model,
)

from longrope_converters.to_gguf.hf_plan import is_native, plan_hf_folder
from longrope_converters.to_gguf.stream import write_gguf
from longrope_export.demo.material import fetch_smollm2
from longrope_export.gguf_format import GgufHeader, read_header
from longrope_export.llama_cpp.source import fetch_source
from longrope_export.models.hf_config import read_hf_config

Builder = Callable[[Path, "Smollm2"], object]
OUTTYPES = ("f32", "f16", "bf16", "q8_0")
SMOLLM2_VOCAB = 49152
# the class that transformers 5 takes for qwen2 ignores tokenizer.json's splitting rule, so that
# the stock converter does not know the hash of a tokenizer that is not Qwen's own
FORCED_PRE = {"qwen2": "smollm"}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "attention_factor": 1.1,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
GRANITE = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}


class Smollm2:
    """The tokenizer of SmolLM2: a real one, whose hash llama.cpp knows."""

    def __init__(self, gguf: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)

    def add_to(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


def with_smollm2(family: str = "llama", **settings: Any) -> Builder:
    def build(folder: Path, smollm2: Smollm2) -> None:
        make_model(folder, family, **{"vocab_size": SMOLLM2_VOCAB, **settings})
        smollm2.add_to(folder)

    return build


def with_sentencepiece(family: str = "llama", **settings: Any) -> Builder:
    def build(folder: Path, _: Smollm2) -> None:
        make_model(folder, family, **settings)
        add_sentencepiece(folder)

    return build


def llama_hf(folder: Path, _: Smollm2) -> None:
    make_model(folder, attention_bias=True, mlp_bias=True, rope_parameters=YARN)
    add_llama_hf_tokenizer(folder)


def old_style_yarn(folder: Path, smollm2: Smollm2) -> None:
    """The spelling of transformers 4, with what it leaves to its defaults."""
    with_smollm2("qwen3", tie_word_embeddings=True, head_dim=128)(folder, smollm2)
    edit_json(
        folder / "config.json",
        rope_parameters=None,
        head_dim=None,
        rope_theta=1000000,
        rope_scaling={"type": "yarn", "factor": 4.0},
    )


def with_model_card(folder: Path, _: Smollm2) -> None:
    make_model(folder, num_key_value_heads=4)
    add_sentencepiece(folder)
    card = ["---", "license: mit", "language:", "- en", "base_model: someone/Base-1B-v2.0", "---"]
    (folder / "README.md").write_text("\n".join([*card, "# A model"]))
    edit_json(folder / "generation_config.json", temperature=0.7, top_k=20, repetition_penalty=1.1)


MODELS: dict[str, Builder] = {
    "llama-gqa": with_smollm2(),
    "llama-tied": with_smollm2(dtype="float32", tie_word_embeddings=True),
    "llama3-rope": with_sentencepiece(dtype="float16", head_dim=32, rope_parameters=LLAMA3),
    "yarn-llama-hf": llama_hf,
    "linear-odd-rows": with_sentencepiece(
        hidden_size=48, intermediate_size=80, rope_parameters=LINEAR
    ),
    "model-card": with_model_card,
    "mistral-sharded": with_sentencepiece("mistral", max_shard_size="40KB"),
    "phi3": with_sentencepiece("phi3", sliding_window=128),
    "granite": with_smollm2("granite", **GRANITE),
    "minicpm": with_sentencepiece("minicpm"),
    "qwen2": with_smollm2("qwen2", vocab_size=SMOLLM2_VOCAB + 64),
    "qwen3": with_smollm2("qwen3"),
    "qwen3-old-yarn": old_style_yarn,
}


def template(*single: str, pair: tuple[str, ...] = ()) -> dict[str, Any]:
    """A TemplateProcessing post-processor; "A" and "B" are the texts."""
    names = {*single, *pair} - {"A", "B"}

    def parts(items: tuple[str, ...]) -> list[dict[str, Any]]:
        return [
            {"Sequence" if item in "AB" else "SpecialToken": {"id": item, "type_id": 0}}
            for item in items
        ]

    special = {name: {"id": name, "ids": [0], "tokens": [name]} for name in names}
    return {
        "type": "TemplateProcessing",
        "single": parts(single),
        "pair": parts(pair or (*single, "B")),
        "special_tokens": special,
    }


BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": True,
    "trim_offsets": False,
    "use_regex": True,
}
ADDED = {"single_word": False, "lstrip": False, "rstrip": False}

# changes to tokenizer.json and tokenizer_config.json of the toy BPE tokenizer
TOKENIZERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "byte-level": ({"post_processor": BYTE_LEVEL}, {"add_bos_token": True}),
    "bos": ({"post_processor": template("<|begin|>", "A")}, {}),
    "bos-overrides-config": (
        {"post_processor": {"type": "Sequence", "processors": [BYTE_LEVEL, template("<|begin|>", "A")]}},
        {"add_bos_token": False, "add_eos_token": True},
    ),
    "unnamed-bos": ({"post_processor": template("<|begin|>", "A")}, {"bos_token": None}),
    "other-eos": ({"post_processor": template("A", "<|begin|>")}, {}),
    "no-settings": ({"post_processor": template("<|begin|>", "A", "<|end|>")}, {"": None}),
    "separator": (
        {"post_processor": template("<|begin|>", "A", pair=("<|begin|>", "A", "<|end|>", "B"))},
        {},
    ),
    "cls-and-sep": ({}, {"bos_token": None, "eos_token": None, "cls_token": "<|begin|>", "sep_token": "<|end|>"}),
    "lowercase": ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, {"type": "NFC"}]}}, {}),
    "token-objects": ({}, {"bos_token": {"__type": "AddedToken", "content": "<|begin|>", "normalized": False, **ADDED}}),
    "token-not-in-json": ({}, {"pad_token": "<pad>", "extra_special_tokens": ["<|tool|>"]}),
    "ordinary-eos": ({}, {"eos_token": "the"}),
    "several-templates": (
        {},
        {"chat_template": [{"name": n, "template": CHAT_TEMPLATE + n} for n in ("default", "tool-use")]},
    ),
}  # fmt: skip


def tokenizer_folder(folder: Path, model: Path, name: str) -> None:
    shutil.copytree(model, folder)
    add_bpe_tokenizer(folder)
    tokenizer_changes, settings = TOKENIZERS[name]
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values.update(tokenizer_changes)
    added = {"id": len(values["model"]["vocab"]), **ADDED}
    values["added_tokens"] += [
        {**added, "content": "<|odd|>", "special": False, "normalized": False},
        {
            **added,
            "id": added["id"] + 1,
            "content": "\u2581b",
            "special": False,
            "normalized": True,
        },
        {
            **added,
            "id": added["id"] + 2,
            "content": "\u0120c",
            "special": False,
            "normalized": False,
        },
    ]
    path.write_text(json.dumps(values))
    if settings == {"": None}:
        (folder / "tokenizer_config.json").unlink()
    else:
        edit_json(folder / "tokenizer_config.json", **settings)


class Parity:
    """Folders and what the stock converter made of them."""

    def __init__(self, root: Path) -> None:
        self.root, self.jobs = root, list[dict[str, Any]]()

    def folder(self, name: str) -> Path:
        return self.root / "models" / name

    def stock(self, name: str, outtype: str) -> Path:
        return self.root / f"{name}-{outtype}.gguf"

    def add_job(self, name: str, outtype: str, pre: str | None = None) -> None:
        folder, output = str(self.folder(name)), str(self.stock(name, outtype))
        self.jobs.append(
            {"folder": folder, "outtype": outtype, "output": output, "pre": pre, "name": None}
        )

    def run(self, source: Path) -> None:
        driver = Path(__file__).with_name("stock_converter.py")
        path = os.pathsep.join([str(source), str(source / "gguf-py")])
        result = subprocess.run(
            [sys.executable, str(driver)],
            input=json.dumps(self.jobs),
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def parity(tmp_path_factory: pytest.TempPathFactory) -> Parity:
    parity, smollm2 = Parity(tmp_path_factory.mktemp("parity")), Smollm2(fetch_smollm2())
    for name, build in MODELS.items():
        build(parity.folder(name), smollm2)
        for outtype in OUTTYPES:
            parity.add_job(name, outtype, FORCED_PRE.get(name))
    parity.add_job("llama3-rope", "auto")
    model = make_model(parity.root / "toy")
    for name in TOKENIZERS:
        tokenizer_folder(parity.folder(name), model, name)
        parity.add_job(name, "f32", "gpt-2")
    parity.run(fetch_source())
    return parity


def assert_equal(ours: Path, stock: Path) -> None:
    """Every byte; where they differ, first what differs in words."""
    if ours.read_bytes() == stock.read_bytes():
        return
    a, b = read_header(ours), read_header(stock)
    assert readable_keys(a) == readable_keys(b)
    assert a.tensors == b.tensors
    assert list(a.key_values) == list(b.key_values)
    pytest.fail("the tensor data differ")


def readable_keys(header: GgufHeader) -> dict[str, tuple[str, str]]:
    return {
        key: (entry.value_type.name, str(entry.value)) for key, entry in header.key_values.items()
    }


def convert(folder: Path, outtype: str, output: Path, pre: str | None = None) -> Path:
    config = read_hf_config(folder)
    assert is_native(config)
    write_gguf(plan_hf_folder(config, outtype, pre=pre), output)
    return output


@pytest.mark.parametrize("outtype", OUTTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_file_equals_that_of_the_stock_converter(
    parity: Parity, name: str, outtype: str, tmp_path: Path
) -> None:
    ours = convert(parity.folder(name), outtype, tmp_path / "out.gguf", FORCED_PRE.get(name))
    assert_equal(ours, parity.stock(name, outtype))


def test_auto_takes_the_type_of_the_checkpoint(parity: Parity, tmp_path: Path) -> None:
    ours = convert(parity.folder("llama3-rope"), "auto", tmp_path / "out.gguf")
    assert_equal(ours, parity.stock("llama3-rope", "auto"))
    assert ours.read_bytes() == parity.stock("llama3-rope", "f16").read_bytes()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_keys_equal_those_of_the_stock_converter(
    parity: Parity, name: str, tmp_path: Path
) -> None:
    ours = convert(parity.folder(name), "f32", tmp_path / "out.gguf", "gpt-2")
    assert_equal(ours, parity.stock(name, "f32"))


def test_known_tokenizer_needs_no_name(parity: Parity) -> None:
    for name in ("llama-gqa", "granite", "qwen2", "qwen3"):
        plan = plan_hf_folder(read_hf_config(parity.folder(name)), "bf16")
        keys = {entry.key: entry.value for entry in plan.key_values}
        assert keys["tokenizer.ggml.pre"] == "smollm"


def test_planning_imports_neither_torch_nor_transformers(parity: Parity) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from longrope_converters.to_gguf.hf_plan import plan_hf_folder\n"
        "from longrope_export.models.hf_config import read_hf_config\n"
        "plan_hf_folder(read_hf_config(Path(sys.argv[1])), 'q8_0')\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(parity.folder("llama-gqa"))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"
