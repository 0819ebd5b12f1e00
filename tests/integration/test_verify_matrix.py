"""`verify` on every family, format and rule, and on exports with one planted fault each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_patched_llama_cpp import FAMILIES, Toy, make_toys
from tiny_models import add_bpe_tokenizer, edit_json

from longrope_converters.to_gguf.convert import GgufConverter, GgufOptions
from longrope_converters.to_onnx.convert import OnnxConverter, OnnxOptions
from longrope_converters.to_safetensors.convert import SafetensorsConverter, SafetensorsOptions
from longrope_export.config import LongRopeConfig, SwitchPolicy
from longrope_export.errors import UnsupportedError
from longrope_export.gguf_format import read_header
from longrope_export.models import families
from longrope_export.models.model import load_model
from longrope_export.runtimes.onnx import OnnxModel
from longrope_export.runtimes.open import Export
from longrope_export.verify.compare import LIMITS
from longrope_export.verify.plan import make_cases
from longrope_export.verify.rows import ReferenceRows
from longrope_export.verify.run import ExportResult, verify_export

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("patched", "programs")]

LENGTH = 200
TOKENS = np.random.default_rng(3).integers(3, 300, LENGTH).tolist()
FORMATS = (
    "llama.cpp",
    "onnxruntime",
    "onnxruntime-standard",
    "transformers",
    "transformers-remote",
)
# why cells of the matrix are empty; the exporter says so itself
NO_GRAPH = (
    "gemma",
    "gemma2",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "granitemoe",
)  # of the families that ONNX is written for
# families of ours that have no row in it
NOT_HERE = {
    "phimoe": "llama.cpp computes another model",
    "minicpm": "transformers has no class",
    "minicpm3": "transformers has no class",
}
SAME = 2e-4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verify")


@pytest.fixture(scope="module")
def toys(root: Path) -> dict[str, Toy]:
    made = make_toys(root, FAMILIES)
    for model in made.values():
        edit_json(model.folder / "config.json", eos_token_id=1)
    return made


@pytest.fixture(scope="module")
def llama(toys: dict[str, Toy]) -> Toy:
    return toys["llama"]


@pytest.fixture(scope="module")
def truth(llama: Toy) -> Callable[[str], ReferenceRows]:
    found: dict[str, ReferenceRows] = {}

    def of(rule: str) -> ReferenceRows:
        if rule not in found:
            config = llama.config(rule)
            cases = make_cases(config, LENGTH)
            found[rule] = ReferenceRows(llama.folder, config, TOKENS, cases)
        return found[rule]

    return of


def export(model: Toy, config: LongRopeConfig, runtime: str, output: Path) -> Export:
    """What our converters make of it."""
    source = load_model(model.folder)
    if runtime == "llama.cpp":
        return Export(runtime, model.gguf(config, output.name))
    if runtime.startswith("onnxruntime"):
        ops = "standard" if runtime.endswith("standard") else "genai"
        OnnxConverter(OnnxOptions(ops=ops)).convert(source, config, output, lambda _: None)
        return Export("onnxruntime", output)
    options = SafetensorsOptions(remote_code=True)
    SafetensorsConverter(options).convert(source, config, output, lambda _: None)
    return Export(runtime, output)


def verify(
    exported: Export, config: LongRopeConfig, reference: ReferenceRows, **options: Any
) -> ExportResult:
    cases = make_cases(config, LENGTH)
    return verify_export(exported, config, TOKENS, cases, reference, threads=1, **options)


def test_every_family_is_in_the_matrix_or_it_is_said_why_not() -> None:
    assert {family.name for family in families.FAMILIES} == {*FAMILIES, *NOT_HERE}
    assert not NOT_HERE.keys() & FAMILIES.keys() and set(NO_GRAPH) < set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_format_computes_the_definition_under_both_rules(
    root: Path, toys: dict[str, Toy], family: str
) -> None:
    model = toys[family]
    for rule in SwitchPolicy:
        config = model.config(rule)
        reference = ReferenceRows(model.folder, config, TOKENS, make_cases(config, LENGTH))
        for runtime in FORMATS:
            output = root / f"{family}-{rule}-{runtime}"
            if family in NO_GRAPH and runtime.startswith("onnxruntime"):
                with pytest.raises(UnsupportedError, match=family.split("_")[0]):
                    export(model, config, runtime, output)
                continue
            result = verify(export(model, config, runtime, output), config, reference)
            assert result.passed, (rule, runtime, result.problems, first_misses(result))
            assert max(case.difference.difference.max() for case in result.cases) < SAME


def first_layers(result: ExportResult) -> set[int | None]:
    """Of the cases that miss."""
    return {case.first_layer for case in result.cases if case.first_miss is not None}


def first_misses(result: ExportResult) -> dict[str, int | None]:
    return {case.case.name: case.first_miss for case in result.cases}


def with_tiers(config: LongRopeConfig, change: Callable[[Any], Any]) -> LongRopeConfig:
    """The tiers behind the first, which is plain, changed."""
    first, *others = config.tiers
    return replace(config, tiers=(first, *map(change, others)))


def off_by_one_pair(config: LongRopeConfig) -> LongRopeConfig:
    def roll(tier: Any) -> Any:
        factors = tier.rescale_factors
        return replace(tier, rescale_factors=(factors[0], *factors[:-1]))

    return with_tiers(config, roll)


def no_attention_factor(config: LongRopeConfig) -> LongRopeConfig:
    return with_tiers(config, lambda tier: replace(tier, attention_factor=1.0))


def squared_attention_factor(config: LongRopeConfig) -> LongRopeConfig:
    return with_tiers(config, lambda tier: replace(tier, attention_factor=tier.attention_factor**2))


def late_border(config: LongRopeConfig) -> LongRopeConfig:
    first, second, last = config.tiers
    return replace(config, tiers=(replace(first, max_length=65), second, last))


def short_start_window(config: LongRopeConfig) -> LongRopeConfig:
    return with_tiers(
        config, lambda tier: replace(tier, num_start_tokens=tier.num_start_tokens - 1)
    )


def long_factors_for_short_text(config: LongRopeConfig) -> LongRopeConfig:
    return replace(config, tiers=config.tiers[-1:])


def log_scale_on_the_wrong_layer(config: LongRopeConfig) -> LongRopeConfig:
    assert config.logit_scaling is not None
    return replace(config, logit_scaling=replace(config.logit_scaling, exempt_layers=(0,)))


def log_scale_on_one_layer_too_many(config: LongRopeConfig) -> LongRopeConfig:
    assert config.logit_scaling is not None and config.logit_scaling.exempt_layers == (1,)
    return replace(config, logit_scaling=replace(config.logit_scaling, exempt_layers=()))


@pytest.mark.parametrize("runtime", FORMATS)
@pytest.mark.parametrize(
    ("fault", "first", "layer"),  # the position where it has to show at the latest
    [
        (off_by_one_pair, 64, 0),
        (no_attention_factor, 64, 0),
        (squared_attention_factor, 64, 0),
        (late_border, 64, 0),
        (short_start_window, 64, 0),
        (long_factors_for_short_text, 1, 0),
        (log_scale_on_the_wrong_layer, 32, 0),
        (log_scale_on_one_layer_too_many, 32, 1),
    ],
)
def test_a_wrong_definition_in_the_export(
    root: Path,
    llama: Toy,
    truth: Callable[[str], ReferenceRows],
    runtime: str,
    fault: Callable[[LongRopeConfig], LongRopeConfig],
    first: int,
    layer: int,
) -> None:
    right = llama.config("causal")
    wrong = export(llama, fault(right), runtime, root / f"{fault.__name__}-{runtime}")
    result = verify(wrong, right, truth("causal"))
    assert result.problems  # what the file says of itself
    assert first_misses(result)["one prefill"] == first  # and what it computes
    assert not result.passed
    assert first_layers(result) == {layer}


def test_the_two_layouts_of_a_head_swapped(
    root: Path, llama: Toy, truth: Callable[[str], ReferenceRows]
) -> None:
    """Rows of q and k interleaved as ggml's llama wants them, in a folder that wants halves."""
    model = transformers.AutoModelForCausalLM.from_pretrained(llama.folder)
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            weight = projection.weight.data
            pairs = weight.view(-1, 2, llama.model.config.head_dim // 2, weight.shape[1])
            projection.weight.data = pairs.transpose(1, 2).reshape(weight.shape).contiguous()
    model.save_pretrained(root / "swapped")
    config = llama.config("causal")
    result = verify(Export("transformers", root / "swapped"), config, truth("causal"))
    assert first_misses(result)["one prefill"] == 1
    again = OnnxConverter(OnnxOptions())
    again.convert(load_model(root / "swapped"), config, root / "swapped-onnx", lambda _: None)
    result = verify(Export("onnxruntime", root / "swapped-onnx"), config, truth("causal"))
    assert first_misses(result)["one prefill"] == 1 and not result.problems
    assert first_layers(result) == {0}


@pytest.fixture(scope="module")
def quantized(root: Path, llama: Toy) -> Callable[[str, LongRopeConfig, str], Export]:
    def make(kind: str, config: LongRopeConfig, name: str) -> Export:
        source, output = load_model(llama.folder), root / f"{name}-{kind}.gguf"
        if kind.startswith("int"):
            OnnxConverter(OnnxOptions(precision=kind)).convert(
                source, config, output, lambda _: None
            )
            return Export("onnxruntime", output)
        options = GgufOptions(outtype=kind, pre="gpt-2")
        GgufConverter(options).convert(source, config, output, lambda _: None)
        return Export("llama.cpp", output)

    return make


@pytest.mark.parametrize("kind", ["q4_0", "q4_k_m", "int4", "q8_0", "int8", "f16", "bf16"])
def test_a_wrong_definition_in_a_quantized_export(
    llama: Toy,
    truth: Callable[[str], ReferenceRows],
    quantized: Callable[[str, LongRopeConfig, str], Export],
    kind: str,
) -> None:
    right = llama.config("causal")
    sound = verify(quantized(kind, right, "sound"), right, truth("causal"))
    assert sound.passed, (sound.problems, first_misses(sound))
    if kind in ("f16", "bf16"):
        assert sound.own_limit is None
    else:
        assert sound.weights == "the export's own, unpacked"
        assert sound.own_limit == LIMITS["unpacked"]
    for fault, latest in (  # where it has grown beyond what 8 bits of the activations cost
        (off_by_one_pair, 70),
        (no_attention_factor, LENGTH),
        (late_border, 64),
        (long_factors_for_short_text, 30),
        (log_scale_on_the_wrong_layer, LENGTH),
    ):
        result = verify(quantized(kind, fault(right), fault.__name__), right, truth("causal"))
        missed = first_misses(result)["one prefill"]
        assert missed is not None and missed <= latest, fault.__name__
        assert 0 in first_layers(result), fault.__name__
        assert result.problems, fault.__name__  # the definition in the file says so as well


def test_weights_of_a_quantized_export_that_are_not_the_sources(
    llama: Toy,
    truth: Callable[[str], ReferenceRows],
    quantized: Callable[[str, LongRopeConfig, str], Export],
) -> None:
    config = llama.config("causal")
    exported = quantized("q4_0", config, "lost-weights")
    header = read_header(exported.path)
    tensor = next(t for t in header.tensors if t.name == "blk.1.ffn_down.weight")
    assert tensor.num_bytes is not None
    with exported.path.open("r+b") as file:
        file.seek(header.data_start_bytes + tensor.offset_bytes + tensor.num_bytes // 2)
        file.write(bytes(tensor.num_bytes // 2))
    result = verify(exported, config, truth("causal"))
    assert [p.partition(":")[0] for p in result.problems] == ["blk.1.ffn_down.weight"]
    assert "32 of 64 rows are no rounding of the source's, the first is 32" in result.problems[0]
    assert not result.passed


def test_stale_keys_after_a_crossing(
    root: Path,
    llama: Toy,
    truth: Callable[[str], ReferenceRows],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = llama.config("causal")
    exported = export(llama, config, "onnxruntime", root / "stale")
    assert verify(exported, config, truth("causal")).passed
    monkeypatch.setattr(OnnxModel, "rerotate", lambda *_: None)
    result = verify(exported, config, truth("causal"))
    assert first_misses(result)["one by one over borders"] == 64
    assert not result.problems and not result.passed
    assert first_layers(result) == {0}


def test_a_part_of_a_tensor_lost(
    root: Path, llama: Toy, truth: Callable[[str], ReferenceRows]
) -> None:
    config = llama.config("causal")
    exported = export(llama, config, "llama.cpp", root / "lost")
    header = read_header(exported.path)
    tensor = next(t for t in header.tensors if t.name == "blk.1.ffn_down.weight")
    assert tensor.num_bytes is not None
    with exported.path.open("r+b") as file:
        file.seek(header.data_start_bytes + tensor.offset_bytes + tensor.num_bytes // 2)
        file.write(bytes(tensor.num_bytes // 2))
    result = verify(exported, config, truth("causal"))
    assert result.cases and first_misses(result)["one prefill"] == 0
    assert first_layers(result) == {1}
    exported.path.write_bytes(exported.path.read_bytes()[:-4096])
    result = verify(exported, config, truth("causal"))
    assert not result.cases and "truncated" in result.problems[0]


def test_another_tokenizer(root: Path, llama: Toy, truth: Callable[[str], ReferenceRows]) -> None:
    config = llama.config("causal")
    text = "A model trained on short text reads long text, 0 1 2 3."
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama.folder)
    text *= 20
    tokens = tokenizer(text).input_ids[:LENGTH]
    cases = make_cases(config, LENGTH)
    reference = ReferenceRows(llama.folder, config, tokens, cases)

    def run(exported: Export) -> ExportResult:
        return verify_export(exported, config, tokens, cases, reference, text=text, threads=1)

    folder = export(llama, config, "onnxruntime", root / "tokenizer").path
    assert run(Export("onnxruntime", folder)).passed
    gguf = export(llama, config, "llama.cpp", root / "tokenizer-gguf")
    assert run(gguf).passed
    add_bpe_tokenizer(folder, vocab_size=270)
    result = run(Export("onnxruntime", folder))
    assert [problem[:10] for problem in result.problems] == ["tokenizer:"]
    assert not result.passed and first_misses(result)["one prefill"] is None


def test_stock_runtimes_depart_where_they_are_said_to(
    root: Path, llama: Toy, truth: Callable[[str], ReferenceRows]
) -> None:
    config = llama.config("causal")
    gguf = export(llama, config, "llama.cpp", root / "stock").path
    onnx = export(llama, config, "onnxruntime", root / "stock-onnx").path
    for name in (f"llama.cpp-stock={gguf}", f"genai={onnx}", f"transformers-stock={llama.folder}"):
        runtime, _, path = name.partition("=")
        result = verify(Export(runtime, Path(path)), config, truth("causal"))
        assert result.cases and not result.passed, name
        assert first_layers(result) == ({None} if runtime == "genai" else {0}), name
    pinned = replace(llama.config("sequence"), tiers=config.tiers[-1:])
    folder = export(llama, pinned, "onnxruntime", root / "pinned-onnx").path
    reference = ReferenceRows(llama.folder, pinned, TOKENS, make_cases(pinned, LENGTH))
    assert verify(Export("genai", folder), pinned, reference).passed


def test_metadata_says_which_rule(root: Path, llama: Toy) -> None:
    folder = export(llama, llama.config("sequence"), "transformers", root / "rule").path
    stored = json.loads((folder / "longrope.json").read_text())
    assert stored["switch"] == "sequence"
    reference = ReferenceRows(
        llama.folder, llama.config("causal"), TOKENS, make_cases(llama.config("causal"), LENGTH)
    )
    result = verify(Export("transformers-remote", folder), llama.config("causal"), reference)
    assert any("switch is sequence" in problem for problem in result.problems)
    assert torch.is_grad_enabled()
