"""Every shape of factors that is known, and every way in which a file can be wrong."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from gguf_files import gguf_keys, write_gguf_file

from longrope_export.config import LogitScaling, LongRopeConfig, SwitchPolicy
from longrope_export.errors import FactorFileError
from longrope_export.factor_files import (
    dump_factors,
    from_json,
    read_csv_ladder,
    read_factors,
    to_json,
    write_factors,
)
from longrope_export.ladder import METHODS, make_config
from longrope_export.models.model import Model, load_model
from longrope_export.schema import factors_schema

WriteConfig = Callable[..., Path]
SCHEMA_FILE = Path(__file__).parent.parent / "docs" / "longrope-factors.schema.json"
# head_dim 16: eight pairs
LONG = [1.0, 1.1, 1.5, 2.0, 4.0, 8.0, 16.0, 20.5]
FILE = {"method": "file"}
SHORT = [1.0, 1.0, 1.0, 1.0, 1.25, 1.5, 1.5, 2.0]


@pytest.fixture
def model(hf_config: WriteConfig) -> Model:
    return load_model(hf_config())


@pytest.mark.parametrize("method", METHODS)
def test_round_trip_keeps_every_digit(method: str, model: Model, tmp_path: Path) -> None:
    config = make_config(model, method, 4096, ladder="x1.25", num_start_tokens=4)
    write_factors(config, tmp_path / "f.json")
    assert read_factors(tmp_path / "f.json", model) == config
    jsonschema.validate(json.loads(dump_factors(config)), factors_schema())


def test_published_schema_is_current() -> None:
    assert json.loads(SCHEMA_FILE.read_text()) == factors_schema()


def test_schema_refuses_what_the_reader_refuses(model: Model) -> None:
    good = to_json(make_config(model, "entropy-abf", 1024))
    jsonschema.validate(good, factors_schema())
    for bad in ({**good, "mscale": 1}, {k: v for k, v in good.items() if k != "tiers"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, factors_schema())
        with pytest.raises(FactorFileError):
            from_json(bad, "f.json")


def longrope_block(**changes: Any) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "original_max_position_embeddings": 256,
        **changes,
    }


def check_two_tiers(config: LongRopeConfig, attention: float) -> None:
    short, long = config.tiers
    assert (short.max_length, long.max_length) == (256, 4096)
    assert (list(short.rescale_factors), list(long.rescale_factors)) == (SHORT, LONG)
    assert short.attention_factor == long.attention_factor == pytest.approx(attention)
    assert config.switch is SwitchPolicy.SEQUENCE


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("spelling", [{"rope_type": "longrope"}, {"type": "su", "rope_type": None}])
def test_hf_config_in_every_spelling(
    key: str, spelling: dict[str, Any], hf_config: WriteConfig, model: Model
) -> None:
    block = {k: v for k, v in longrope_block(**spelling).items() if v is not None}
    folder = hf_config("phi", max_position_embeddings=4096, **{key: block})
    expected = np.sqrt(1 + np.log(16) / np.log(256))
    check_two_tiers(read_factors(folder / "config.json", model), expected)
    check_two_tiers(read_factors(folder, model), expected)


def test_two_original_lengths_are_refused(hf_config: WriteConfig) -> None:
    """transformers takes the one at the top level, vLLM and mlx-lm the one inside."""
    block = longrope_block(original_max_position_embeddings=512)
    folder = hf_config(
        max_position_embeddings=4096, original_max_position_embeddings=256, rope_scaling=block
    )
    with pytest.raises(
        FactorFileError,
        match="original_max_position_embeddings is 256 in the top level and 512 in rope_scaling",
    ):
        read_factors(folder)


def test_explicit_attention_factor_and_mscales(hf_config: WriteConfig) -> None:
    explicit = hf_config(
        "a", max_position_embeddings=4096, rope_scaling=longrope_block(attention_factor=1.2)
    )
    check_two_tiers(read_factors(explicit), 1.2)
    scales = longrope_block(short_mscale=1.1, long_mscale=1.3)
    moe = read_factors(hf_config("b", max_position_embeddings=4096, rope_scaling=scales))
    assert [tier.attention_factor for tier in moe.tiers] == [1.1, 1.3]
    scales["attention_factor"] = 1.2
    with pytest.raises(FactorFileError, match=r"attention_factor 1\.2 contradicts"):
        read_factors(hf_config("c", max_position_embeddings=4096, rope_scaling=scales))


def test_nested_per_layer_type(hf_config: WriteConfig) -> None:
    nested = {
        "full_attention": longrope_block(rope_theta=10000.0),
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    }
    folder = hf_config(
        architectures=["Gemma3ForCausalLM"],
        model_type="gemma3_text",
        max_position_embeddings=4096,
        head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters=nested,
    )
    config = read_factors(folder)
    assert config.rope_theta == 10000.0
    assert config.layers == (1,)


def test_bare_block_takes_the_rest_from_the_model(tmp_path: Path, model: Model) -> None:
    path = tmp_path / "block.json"
    path.write_text(json.dumps(longrope_block(factor=16.0, attention_factor=1.5)))
    check_two_tiers(read_factors(path, model), 1.5)
    with pytest.raises(FactorFileError, match="name the model too"):
        read_factors(path)
    path.write_text(json.dumps(longrope_block()))
    with pytest.raises(FactorFileError, match="does not say the target length"):
        read_factors(path, model)


GEMMA3 = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": 16}
NESTED = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}


@pytest.mark.parametrize(
    ("block", "same"),
    [
        ({"type": "dynamic", "factor": 4.0}, {"max_position_embeddings": 256}),
        ({"type": "yarn", "factor": 4.0}, {"original_max_position_embeddings": 256}),
        ({"type": "linear", "factor": 4.0}, {}),
        ({"rope_parameters": {"type": "linear", "factor": 4.0}}, {}),
        (NESTED, {}),
        ({"rope_parameters": NESTED}, {}),
    ],
)
@pytest.mark.parametrize("changes", [{}, {**GEMMA3, "num_hidden_layers": 12}])
def test_bare_block_means_the_same_as_within_config_json(
    block: dict[str, Any], same: dict[str, Any], changes: dict[str, Any], hf_config: WriteConfig
) -> None:
    plain = load_model(hf_config("plain", **changes))
    inner = block.get("rope_parameters", block)
    same = {"max_position_embeddings": 1024, **same}
    within = read_factors(hf_config("within", **changes, **same, rope_scaling=inner), plain)
    path = plain.path / "block.json"
    path.write_text(json.dumps(block))
    assert read_factors(path, plain) == replace(within, provenance={**FILE, "file": "block.json"})
    assert within.layers == ((5, 11) if changes else None)
    assert within.tiers[-1].max_length == 1024


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"type": "yarn", "factor": float("nan")}, "finite number above 1.*got nan"),
        ({"type": "linear", "factor": float("inf")}, "finite number above 1.*got inf"),
        ({"type": "linear", "factor": "4"}, "finite number above 1.*got '4'"),
        ({"type": "yarn", "factor": 2.0, "beta_fast": "x"}, "beta_fast must be a number"),
        (
            {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": "x"},
            "original_max_position_embeddings must be an integer",
        ),
    ],
)
def test_bad_bare_block_names_its_file(
    block: dict[str, Any], message: str, tmp_path: Path, model: Model
) -> None:
    path = tmp_path / "block.json"
    path.write_text(json.dumps(block))
    with pytest.raises(FactorFileError, match=message) as error:
        read_factors(path, model)
    assert "block.json" in str(error.value)


def with_own_factors(model: Model) -> Model:
    """As entropy-abf leaves it: log scaling, and 1024 tokens by its own factors."""
    return replace(model, native=make_config(model, "entropy-abf", 1024, ladder="256,1024"))


def test_log_scaling_of_the_model_stays(tmp_path: Path, model: Model) -> None:
    model = with_own_factors(model)
    (tmp_path / "block.json").write_text(json.dumps({"type": "linear", "factor": 4.0}))
    table = write_csv(tmp_path / "f.csv", [LONG])
    for config in (
        read_csv_ladder({4096: table}, model),
        read_factors(tmp_path / "block.json", model),
    ):
        assert config.logit_scaling == LogitScaling(256, (0, 1))


def test_csv_attention_factor_is_that_of_the_closed_forms(
    tmp_path: Path, hf_config: WriteConfig
) -> None:
    """A GGUF of a Llama 3.1 knows its window only, a folder also what came before."""
    block = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}
    folder = load_model(hf_config(rope_scaling=block))
    values = {"rope_freqs.weight": np.float32(folder.native.tiers[0].rescale_factors)}
    gguf = load_model(write_gguf_file(tmp_path / "m.gguf", gguf_keys(), values))
    table = write_csv(tmp_path / "f.csv", [LONG])
    closed = make_config(folder, "longrope2", 1024)
    for model in (folder, gguf):
        config = read_csv_ladder({1024: table}, model)
        assert config.tiers[0].attention_factor == closed.tiers[0].attention_factor
        assert config.original_max_position_embeddings == 256


def test_csv_of_an_extended_model_counts_from_its_trained_window(
    tmp_path: Path, hf_config: WriteConfig
) -> None:
    lists = {"short_factor": [1.0] * 8, "long_factor": LONG}
    block = {"rope_type": "longrope", "original_max_position_embeddings": 64, **lists}
    model = load_model(hf_config(rope_scaling=block))
    table = write_csv(tmp_path / "f.csv", [LONG])
    config = read_csv_ladder({256: table}, model)
    assert config.original_max_position_embeddings == 64
    assert config.tiers[0].attention_factor == pytest.approx(
        math.sqrt(1 + math.log(4) / math.log(64))
    )


@pytest.mark.parametrize(
    ("block", "target", "last"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 256, 4.0),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024, 4.0),
        ({"rope_type": "dynamic", "factor": 4.0}, 1024, 13.0),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}, 256, 8.0),
    ],
)
def test_other_rope_types(
    block: dict[str, Any], target: int, last: float, hf_config: WriteConfig
) -> None:
    config = read_factors(hf_config(rope_parameters={"rope_theta": 10000.0, **block}))
    assert config.max_position_embeddings == target
    assert config.tiers[-1].rescale_factors[-1] == pytest.approx(last)


def write_csv(path: Path, rows: list[list[float]]) -> Path:
    path.write_text("\n".join(",".join(f"{value:g}" for value in row) for row in rows) + "\n")
    return path


def test_csv_ladder_of_the_published_shape(tmp_path: Path, model: Model) -> None:
    """Several files, each 32 equal rows of comma-separated values, as the authors released them."""
    files = {
        length: write_csv(tmp_path / f"{length}.csv", [[f * length / 4096 + 1 for f in LONG]] * 32)
        for length in (4096, 256, 1024)
    }
    config = read_csv_ladder(files, model)
    assert [tier.max_length for tier in config.tiers] == [256, 1024, 4096]
    assert config.tiers[1].rescale_factors[0] == 1.25
    assert config.tiers[0].attention_factor == 1.0
    assert config.tiers[2].attention_factor == pytest.approx(np.sqrt(1 + np.log(16) / np.log(256)))


def test_csv_with_a_start_token_count(tmp_path: Path, model: Model) -> None:
    path = write_csv(tmp_path / "n.csv", [[value] for value in [16, *LONG]])
    tier = read_csv_ladder({1024: path}, model).tiers[0]
    assert tier.num_start_tokens == 16
    assert list(tier.rescale_factors) == LONG


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([LONG, [*LONG[:-1], 21.0]], "row 2 differs from row 1"),
        ([[v] for v in LONG[:-1]], "7 factors, expected rotary_dim / 2 = 8"),
        ([[v] for v in [1.5, *LONG]], "first is a start-token count, but it is 1.5"),
        ([[*LONG[:-1], float("nan")]], "row 1, column 8 is nan, expected a number"),
        ([[*LONG[:-1], -1.0]], "must be a finite number above 0"),
        ([[1.0, 2.0], [1.0]], "rows of equal length"),
        ([], "at least one"),
    ],
)
def test_bad_csv(rows: list[list[float]], message: str, tmp_path: Path, model: Model) -> None:
    path = write_csv(tmp_path / "bad.csv", rows)
    with pytest.raises(FactorFileError, match=message) as error:
        read_csv_ladder({1024: path}, model)
    assert "bad.csv" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version is 2, this tool reads 1"),
        ({"rope_theta": 5e5}, "rope_theta is 500000, the model has 10000"),
        ({"rotary_dim": 14}, r"8 values, expected rotary_dim / 2 = 7"),
        ({"max_position_embeddings": 999}, "expected the last tier's max_length, 1024"),
        ({"switch": "often"}, "'often' is not a valid SwitchPolicy"),
        ({"layers": [7]}, "names layer 7, the model has 2"),
        ({"tiers": {}}, "tiers must be a list"),
        ({"tiers": [{"max_length": 8}]}, r"tiers\[0\]: rescale_factors must be a list"),
        ({"tiers": [{"rescale_factors": LONG}]}, r"tiers\[0\]: max_length is missing"),
        ({"extra": 1}, "unknown field extra"),
        ({"logit_scaling": {"type": "linear"}}, "logit_scaling must be null or"),
        ({"rotary_dim": None}, "rotary_dim must be an integer"),
    ],
)
def test_bad_json_names_file_and_field(
    change: dict[str, Any], message: str, tmp_path: Path, model: Model
) -> None:
    values = {**to_json(make_config(model, "yarn", 1024)), **change}
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(values))
    with pytest.raises(FactorFileError, match=message) as error:
        read_factors(path, model)
    assert "bad.json" in str(error.value)


def test_unordered_tiers_and_nan(tmp_path: Path, model: Model) -> None:
    values = to_json(make_config(model, "yarn", 1024, ladder="256,512,1024"))
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**values, "tiers": values["tiers"][::-1]}))
    with pytest.raises(FactorFileError, match="not in order: max_length 512 follows 1024"):
        read_factors(path, model)
    values["tiers"][1]["rescale_factors"][3] = float("nan")
    path.write_text(json.dumps(values))
    with pytest.raises(FactorFileError, match=r"rescale_factors\[3\] must be a finite number"):
        read_factors(path, model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, got a list"),
        ("{}", "no factors in it"),
        ("[" * 100_000, "not valid JSON"),
        ('{"x": ' + "1" * 5000 + "}", "not valid JSON: .*4300 digits"),
    ],
)
def test_not_a_factors_file(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(FactorFileError, match=message):
        read_factors(path)


def test_missing_file_and_csv_without_length(tmp_path: Path) -> None:
    with pytest.raises(FactorFileError, match="no such factors file"):
        read_factors(tmp_path / "none.json")
    write_csv(tmp_path / "a.csv", [LONG])
    with pytest.raises(FactorFileError, match=r"use --tier LENGTH=a\.csv"):
        read_factors(tmp_path / "a.csv")


def test_logit_scaling_survives(model: Model, tmp_path: Path) -> None:
    config = make_config(model, "entropy-abf", 1024)
    assert config.logit_scaling == LogitScaling(256, (0, 1))
    write_factors(config, tmp_path / "f.json")
    assert read_factors(tmp_path / "f.json").logit_scaling == config.logit_scaling


def test_hundreds_of_tiers(model: Model, tmp_path: Path) -> None:
    config = make_config(model, "yarn", 256 * 600, ladder="every:256")
    assert len(config.tiers) == 600
    write_factors(config, tmp_path / "f.json")
    assert read_factors(tmp_path / "f.json", model) == config
