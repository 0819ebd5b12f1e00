"""Geometry and native RoPE, from folders and from GGUF files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from gguf.constants import GGUFValueType
from gguf_files import gguf_keys, write_gguf_file

from longrope_export import gguf_keys as keys_module
from longrope_export.errors import GgufError, ModelError, UnsupportedError
from longrope_export.gguf_format import read_header
from longrope_export.gguf_values import make_array, make_key_value
from longrope_export.ladder import make_config
from longrope_export.models.model import find_model, load_model
from longrope_export.models.native_gguf import native_of_gguf
from longrope_export.rope import compute_inv_freq

WriteConfig = Callable[..., Path]
LONG = [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"head_dim": 16, "num_key_value_heads": 2}),
        ({"num_key_value_heads": None}, {"num_key_value_heads": 4}),
        ({"head_dim": 32}, {"head_dim": 32}),
        ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, {"head_dim": 128}),
    ],
)
def test_geometry_of_a_folder(
    changes: dict[str, Any], expected: dict[str, int], hf_config: WriteConfig
) -> None:
    model = load_model(hf_config(**changes))
    assert {name: getattr(model, name) for name in expected} == expected
    assert model.native.tiers[0].is_plain
    assert model.window == 256


def test_partial_rotary_and_defaults(hf_config: WriteConfig) -> None:
    folder = hf_config(
        architectures=["Phi3ForCausalLM"],
        model_type="phi3",
        partial_rotary_factor=0.75,
        rope_theta=None,
        max_position_embeddings=None,
    )
    model = load_model(folder)
    assert (model.native.rotary_dim, model.native.rope_theta, model.window) == (12, 10000.0, 4096)


LATENT = {"qk_nope_head_dim": 64, "qk_rope_head_dim": 32}
MINICPM3 = {"architectures": ["MiniCPM3ForCausalLM"], "model_type": "minicpm3"}


def of_sixteen(kind: str) -> dict[str, Any]:
    return {"type": kind, "long_factor": [2.0] * 16, "short_factor": [1.0] * 16}


@pytest.mark.parametrize(
    ("changes", "head_dim", "rotary_dim", "theta"),
    [
        # head_dim as transformers' classes have it
        ({**MINICPM3, **LATENT, "rope_scaling": of_sixteen("longrope")}, 32, 32, 1e4),
        ({**MINICPM3, "rope_scaling": of_sixteen("su")}, 32, 32, 1e4),
        ({**LATENT, "head_dim": 32}, 32, 32, 1e4),
        ({**LATENT, "head_dim": 96, "partial_rotary_factor": 1 / 3}, 96, 32, 1e4),
        ({"head_dim": 512, "qk_rope_head_dim": 64}, 512, 64, 1e4),
        ({"rope_theta": None, "rotary_pct": 0.25, "rotary_emb_base": 25000}, 16, 4, 25000.0),
        ({"head_dim": 128, "rotary_dim": 64}, 128, 64, 1e4),
        ({"head_dim": 128, "rotary_dim": 64, "partial_rotary_factor": 0.5}, 128, 64, 1e4),
    ],
)
def test_rotated_width_and_base_in_every_spelling(
    changes: dict[str, Any], head_dim: int, rotary_dim: int, theta: float, hf_config: WriteConfig
) -> None:
    model = load_model(hf_config(**changes))
    native = model.native
    assert (model.head_dim, native.rotary_dim, native.rope_theta) == (head_dim, rotary_dim, theta)


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("minicpm3", {}),
        ("minicpm3", {"head_dim": 64}),
        ("deepseek_v2", {}),
        ("deepseek_v3", {"qk_rope_head_dim": 16}),
        ("mistral4", {"head_dim": 96}),
        ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 25000}),
        ("minimax_m2", {"head_dim": 64, "rotary_dim": 32, "rope_theta": 5e6}),
    ],
)
def test_rotated_width_is_that_of_transformers(
    model_type: str, sizes: dict[str, Any], hf_config: WriteConfig
) -> None:
    transformers = pytest.importorskip("transformers")
    functions = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    sizes = {**LATENT, **sizes} if "rotary" not in str(sizes) else sizes
    settings = {"num_attention_heads": 4, "hidden_size": 256, "num_hidden_layers": 2, **sizes}
    if model_type == "mistral4":
        rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1 / 3}
        settings["rope_parameters"] = rope
    folder = hf_config(architectures=[], model_type=model_type, **{"rope_theta": None, **settings})
    theirs = transformers.AutoConfig.for_model(model_type, **settings)
    theirs.rope_parameters = {**theirs.rope_parameters, "rope_type": "linear", "factor": 1.0}
    expected, _ = functions["linear"](theirs, "cpu")
    native = load_model(folder).native
    ours = compute_inv_freq(native.rope_theta, native.rotary_dim)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"rotary_dim": 8, "partial_rotary_factor": 1.0}, "16 of 16 .*, and 8 by rotary_dim"),
        ({"rotary_dim": 0}, "rotary_dim must be a positive integer, got 0"),
        ({"rotary_emb_base": 25000}, "rope_theta is 10000.0 in the top level and 25000 in rotary_"),
        (
            {"rope_scaling": {"type": "yarn", "factor": float("nan")}},
            "is nan in rope_scaling, expected a finite",
        ),
        (
            {
                "rope_theta": None,
                "rope_scaling": {"rope_theta": 1},
                "rope_parameters": {"rope_theta": 2},
            },
            "rope_theta is 1 in rope_scaling and 2 in rope_parameters",
        ),
    ],
)
def test_conflicting_rope_settings(
    block: dict[str, Any], message: str, hf_config: WriteConfig
) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(hf_config(**block))


def test_fixed_alpha_of_hunyuan_is_refused(hf_config: WriteConfig) -> None:
    block = {"type": "dynamic", "factor": 1.0, "alpha": 1000.0}
    with pytest.raises(UnsupportedError, match=r"alpha 1000\.0"):
        load_model(hf_config(rope_scaling=block))
    assert load_model(hf_config(rope_scaling={**block, "alpha": None})).window == 256


@pytest.mark.parametrize(
    "block",
    [
        {"rope_type": "yarn", "beta_fast": None, "beta_slow": None, "factor": 4.0},
        {"rope_type": "yarn", "factor": None},
        {"rope_type": "default", "rope_theta": None, "factor": None},
        {"rope_type": "default", "partial_rotary_factor": None},
        {"rope_type": "longrope", "factor": None, "long_factor": LONG, "short_factor": LONG},
    ],
)
def test_null_means_missing(block: dict[str, Any], hf_config: WriteConfig) -> None:
    changes = {"partial_rotary_factor": 0.5, "max_position_embeddings": 1024}
    if block["rope_type"] != "default":
        block = {**block, "original_max_position_embeddings": 256}
    said = {key: value for key, value in block.items() if value is not None}
    if block["rope_type"] == "yarn":
        said["factor"] = 4.0
    natives = [load_model(hf_config(**changes, rope_scaling=b)).native for b in (block, said)]
    assert natives[0] == natives[1]
    assert natives[0].rotary_dim == 8


GEMMA3_WRAPPER = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
GEMMA3_TEXT = {
    "model_type": "gemma3_text",
    "hidden_size": 2560,
    "num_hidden_layers": 34,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}


@pytest.mark.parametrize(
    "values",
    [
        {**GEMMA3_WRAPPER, "text_config": GEMMA3_TEXT},  # as published
        {**GEMMA3_WRAPPER, "text_config": {**GEMMA3_TEXT, "architectures": None}},
        {**GEMMA3_WRAPPER, "text_config": {**GEMMA3_TEXT, **dict.fromkeys(GEMMA3_WRAPPER)}},
        GEMMA3_TEXT,
        {"text_config": GEMMA3_TEXT},
    ],
)
def test_gemma3_as_a_wrapper_and_as_text(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    model = load_model(tmp_path)
    assert model.family.name == "gemma3"
    assert model.native.layers == (5, 11, 17, 23, 29)
    assert (model.num_heads, model.num_key_value_heads, model.head_dim) == (8, 4, 256)
    assert model.window == 131072


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, got 0"),
        ({"num_attention_heads": 5}, "hidden_size 64 is not a multiple"),
        ({"rope_theta": "big"}, "rope_theta must be a positive number"),
        ({"rope_scaling": {"type": "magic"}}, "rope type 'magic' is not known"),
        ({"rope_scaling": {"type": "yarn"}}, "rope factor must be a number above 0, got None"),
        (
            {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}},
            "long_factor must list rotary_dim / 2 = 8 numbers, got 1 values",
        ),
        (
            {
                "rope_scaling": {
                    "type": "longrope",
                    "long_factor": [0.0] * 8,
                    "short_factor": [1] * 8,
                },
                "original_max_position_embeddings": 64,
            },
            r"rescale_factors\[0\] must be a finite number above 0",
        ),
    ],
)
def test_bad_config_json(changes: dict[str, Any], message: str, hf_config: WriteConfig) -> None:
    with pytest.raises(ModelError, match=message) as error:
        load_model(hf_config(**changes))
    assert "config.json" in str(error.value)


def test_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json in this folder"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match="no such file or folder"):
        find_model("nothing-here.gguf")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        load_model(tmp_path)


def test_geometry_of_a_gguf(tiny_gguf: Path) -> None:
    model = load_model(tiny_gguf)
    assert (model.num_heads, model.num_key_value_heads, model.head_dim) == (4, 2, 16)
    assert model.native.tiers[0].is_plain


def add(tmp_path: Path, keys: list[Any], tensors: dict[str, np.ndarray[Any, Any]]) -> Path:
    base = {"token_embd.weight": np.zeros((5, 64), dtype=np.float32)}
    return write_gguf_file(tmp_path / "m.gguf", [*gguf_keys(), *keys], {**base, **tensors})


def number(name: str, value: float) -> Any:
    kind = GGUFValueType.UINT32 if isinstance(value, int) else GGUFValueType.FLOAT32
    return make_key_value(f"llama.rope.scaling.{name}", kind, value)


def kind(name: str) -> Any:
    return make_key_value("llama.rope.scaling.type", GGUFValueType.STRING, name)


def test_native_rope_of_a_gguf(tmp_path: Path) -> None:
    ramp = np.linspace(1, 8, 8, dtype=np.float32)
    longrope = [kind("longrope"), number("original_context_length", 64), number("attn_factor", 1.5)]
    tensors = {"rope_factors_long.weight": ramp, "rope_factors_short.weight": ramp / 8 + 1}
    config = native_of_gguf(read_header(add(tmp_path, longrope, tensors)))
    assert [tier.max_length for tier in config.tiers] == [64, 256]
    assert list(config.tiers[1].rescale_factors) == ramp.tolist()
    assert {tier.attention_factor for tier in config.tiers} == {1.5}

    config = native_of_gguf(read_header(add(tmp_path, [], {"rope_freqs.weight": ramp})))
    assert list(config.tiers[0].rescale_factors) == ramp.tolist()

    yarn = [kind("yarn"), number("factor", 4.0), number("original_context_length", 256)]
    config = native_of_gguf(read_header(add(tmp_path, yarn, {})))
    assert config.max_position_embeddings == 1024
    assert config.tiers[0].attention_factor == pytest.approx(1 + 0.1 * np.log(4))

    config = native_of_gguf(read_header(add(tmp_path, [kind("linear"), number("factor", 2.0)], {})))
    assert set(config.tiers[0].rescale_factors) == {2.0}


def test_factor_tensor_of_the_wrong_shape(tmp_path: Path) -> None:
    path = add(tmp_path, [], {"rope_freqs.weight": np.ones(7, dtype=np.float32)})
    with pytest.raises(
        GgufError, match=r"rope_freqs\.weight has shape \(7,\).*expected \(8,\) F32"
    ):
        load_model(path)


def test_our_keys_come_back(tmp_path: Path, hf_config: WriteConfig) -> None:
    model = load_model(hf_config())
    config = make_config(model, "entropy-abf", 2048, ladder="every:256", num_start_tokens=7)
    encoded = keys_module.encode_config(config, "llama")
    kept = [entry for entry in gguf_keys() if entry.key not in {k.key for k in encoded.set_keys}]
    path = tmp_path / "ours.gguf"
    write_gguf_file(path, [*kept, *encoded.set_keys], dict(encoded.tensors))
    back = load_model(path).native
    assert back.switch == config.switch
    assert back.logit_scaling == config.logit_scaling
    assert back.provenance == config.provenance
    for ours, theirs in zip(config.tiers, back.tiers, strict=True):
        assert ours.max_length == theirs.max_length
        assert ours.num_start_tokens == theirs.num_start_tokens
        np.testing.assert_array_equal(
            np.float32(ours.rescale_factors), np.float32(theirs.rescale_factors)
        )


@pytest.mark.parametrize(
    ("name", "replacement", "message"),
    [
        ("version", 2, "version is 2, this tool reads 1"),
        ("tier_factors", [1.0] * 7, "tier_factors has 7 values, expected 8"),
        ("tier_attn_factor", [], "tier_attn_factor has 0 values, expected 1"),
        ("tier_factors", [float("nan")] * 8, "must be a finite number above 0"),
        ("tier_length", None, "tier_length is missing"),
    ],
)
def test_malformed_keys_are_refused(
    name: str, replacement: Any, message: str, tmp_path: Path, hf_config: WriteConfig
) -> None:
    config = make_config(load_model(hf_config()), "yarn", 1024)
    prefix = "llama.rope.scaling.longrope."
    entries = {entry.key: entry for entry in keys_module.encode_config(config, "llama").set_keys}
    if replacement is None:
        del entries[prefix + name]
    elif isinstance(replacement, list):
        entries[prefix + name] = make_array(prefix + name, GGUFValueType.FLOAT32, replacement)
    else:
        entries[prefix + name] = make_key_value(prefix + name, GGUFValueType.UINT32, replacement)
    kept = [entry for entry in gguf_keys() if entry.key not in entries]
    path = write_gguf_file(tmp_path / "bad.gguf", [*kept, *entries.values()], {})
    with pytest.raises(GgufError, match=message):
        load_model(path)


def test_fingerprint_follows_the_settings(hf_config: WriteConfig) -> None:
    first, second = hf_config("a"), hf_config("b", rope_theta=5e5)
    assert load_model(first).fingerprint != load_model(second).fingerprint
    (second / "config.json").write_text((first / "config.json").read_text())
    assert load_model(first).fingerprint == load_model(second).fingerprint
    assert json.loads((first / "config.json").read_text())


def test_linear_scaling_under_every_name_llama_cpp_reads(tmp_path: Path) -> None:
    """A missing type means linear there, and the old key counts too."""
    old = make_key_value("llama.rope.scale_linear", GGUFValueType.FLOAT32, 4.0)
    for keys in ([old], [number("factor", 4.0)], [kind("linear"), number("factor", 4.0)]):
        config = native_of_gguf(read_header(add(tmp_path, keys, {})))
        assert set(config.tiers[0].rescale_factors) == {4.0}
    config = native_of_gguf(read_header(add(tmp_path, [kind("none"), number("factor", 4.0)], {})))
    assert config.tiers[0].is_plain
    ramp = np.linspace(1, 8, 8, dtype=np.float32)
    config = native_of_gguf(read_header(add(tmp_path, [old], {"rope_freqs.weight": ramp})))
    assert list(config.tiers[0].rescale_factors) == (4 * ramp).tolist()


def test_yarn_attention_factor_as_llama_cpp_computes_it(tmp_path: Path) -> None:
    yarn = [kind("yarn"), number("factor", 16.0), number("original_context_length", 256)]
    ignored = native_of_gguf(
        read_header(add(tmp_path, [*yarn, number("yarn_attn_factor", 1.5)], {}))
    )
    assert ignored.tiers[0].attention_factor == pytest.approx(1 + 0.1 * np.log(16))
    log = native_of_gguf(
        read_header(add(tmp_path, [*yarn, number("yarn_log_multiplier", 1.0)], {}))
    )
    assert log.tiers[0].attention_factor == pytest.approx(1.0)


@pytest.mark.parametrize(
    "model_type",
    ["gpt_neox", "stablelm", "qwen3_next", "bamba", "glm", "glm4", "nemotron", "persimmon", "phi"],
)
def test_a_part_of_the_head_that_the_file_does_not_name_is_transformers_default(
    hf_config: WriteConfig, model_type: str
) -> None:
    theirs = transformers.AutoConfig.for_model(model_type).rope_parameters["partial_rotary_factor"]
    folder = hf_config(architectures=["SomeForCausalLM"], model_type=model_type)
    model = load_model(folder)
    assert model.native.rotary_dim == theirs * model.head_dim < model.head_dim


def test_phi3_without_an_original_length_has_transformers_default(hf_config: WriteConfig) -> None:
    block = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    folder = hf_config(
        architectures=["Phi3ForCausalLM"],
        model_type="phi3",
        max_position_embeddings=131072,
        rope_scaling=block,
    )
    assert [tier.max_length for tier in load_model(folder).native.tiers] == [4096, 131072]


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": [1]},
        {"rope_scaling": "yarn"},
        {"rope_scaling": {"factor": 4.0}},
        {"rope_scaling": {"type": "yarn", "factor": float("inf")}},
        {"rope_scaling": {"type": "yarn", "factor": 10**400}},
        {"rope_scaling": {"type": "dynamic", "factor": 1e7}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 1.0},
        {"architectures": 5},
        {"rope_theta": 10**400},
        {"partial_rotary_factor": float("inf")},
        {"partial_rotary_factor": 2},
    ],
)
def test_absurd_settings_are_one_error(changes: dict[str, Any], hf_config: WriteConfig) -> None:
    with pytest.raises(ModelError):
        load_model(hf_config(**changes))


@pytest.mark.parametrize("name", ["rope.freq_base", "rope.scaling.factor"])
def test_gguf_keys_of_the_wrong_type(name: str, tmp_path: Path) -> None:
    wrong = make_key_value(f"llama.{name}", GGUFValueType.STRING, "many")
    keys = [entry for entry in gguf_keys() if entry.key != wrong.key]
    with pytest.raises(GgufError, match=r"not a number: 'many'"):
        load_model(write_gguf_file(tmp_path / "m.gguf", [*keys, wrong], {}))
