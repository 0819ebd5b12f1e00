"""Exported folders: what plain transformers computes from them, and what they hold."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from longrope_rotary import reference_logits
from safetensors import safe_open
from tiny_models import add_bpe_tokenizer, edit_json, make_model

from longrope_converters.to_safetensors.convert import SafetensorsConverter, SafetensorsOptions
from longrope_export.config import FactorTier, LogitScaling, LongRopeConfig, SwitchPolicy
from longrope_export.definition import to_json
from longrope_export.errors import LongRopeError, ModelError, OutputError, UnsupportedError
from longrope_export.factor_files import read_factors
from longrope_export.models.model import load_model

TESTS = Path(__file__).parent
BORDER, TARGET = 24, 64
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "gemma", "gemma2", "gemma3", "mixtral",
)  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "phi3": {"partial_rotary_factor": 0.5},
    "gemma3": {"rope_parameters": None},
}


def two_tiers(
    folder: Path, *, switch: str = "sequence", scale: float = 1.25, **changes: Any
) -> LongRopeConfig:
    native = load_model(folder).native
    pairs = native.num_pairs
    short = tuple(1 + 0.3 * i / pairs for i in range(pairs))
    long = tuple(1.1 * 3.0 ** (i / pairs) for i in range(pairs))
    values: dict[str, Any] = {
        "rope_theta": native.rope_theta,
        "rotary_dim": native.rotary_dim,
        "original_max_position_embeddings": BORDER,
        "max_position_embeddings": TARGET,
        "tiers": (FactorTier(BORDER, short, 0, scale), FactorTier(TARGET, long, 0, scale)),
        "switch": SwitchPolicy(switch),
        "layers": native.layers,
    }
    return LongRopeConfig(**{**values, **changes})


def export(
    folder: Path, config: LongRopeConfig | None, output: Path, **options: Any
) -> dict[str, Any]:
    converter = SafetensorsConverter(SafetensorsOptions(**options))
    report = converter.convert(load_model(folder), config, output, lambda _: None)
    return report.to_json()


def load_plainly(
    output: Path, lengths: Sequence[int], folders: Sequence[Path], *, trust: bool = False
) -> dict[str, Any]:
    """Logits from a fresh process in which longrope_export cannot be imported."""
    words = [str(output), "trust" if trust else "plain", ",".join(map(str, lengths))]
    command = [sys.executable, str(TESTS / "load_plainly.py"), *words, *map(str, folders)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=output.parent, check=False)
    assert result.returncode == 0, result.stderr
    return dict(np.load(output))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model per family whose attention matters."""
    root = tmp_path_factory.mktemp("sources")
    return {
        family: make_model(
            root / family,
            family,
            dtype="float32",
            initializer_range=0.08,
            **SETTINGS.get(family, {}),
        )
        for family in FAMILIES
    }


LENGTHS = (BORDER - 1, BORDER, BORDER + 1, 50)


@pytest.fixture(scope="module")
def plain_logits(
    sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("exported")
    for family, folder in sources.items():
        export(folder, two_tiers(folder), root / family)
    return load_plainly(root / "logits.npz", LENGTHS, [root / family for family in sources])


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_computes_the_factors_on_both_sides_of_the_border(
    family: str, sources: dict[str, Path], plain_logits: dict[str, Any]
) -> None:
    found = {key.split("/")[-1]: value for key, value in plain_logits.items()}
    assert str(found[f"{family} class"]).startswith("transformers.models.")
    config = two_tiers(sources[family])
    short, long = (tier.rescale_factors for tier in config.tiers)

    def check(scale: float) -> float:
        expected = reference_logits(
            sources[family],
            config.rope_theta,
            config.rotary_dim,
            lambda length: short if length <= BORDER else long,
            scale,
            LENGTHS,
        )
        return max(
            float(np.abs(logits - found[f"{family} {length}"]).max())
            for logits, length in zip(expected, LENGTHS, strict=True)
        )

    assert check(scale=1.25) <= 1e-4
    assert check(scale=1.0) > 1e-3, "the check above would not see a lost attention factor"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sharded model with all the small files that people have."""
    folder = make_model(tmp_path / "model", max_shard_size="40KB")
    add_bpe_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "README.md").write_text("# A model")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / ".cache").mkdir()
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def tensors_of(folder: Path) -> dict[str, bytes]:
    found = {}
    for shard in shards(folder):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                found[name] = (
                    tensor.reshape(-1).view(dtype=__import__("torch").uint8).numpy().tobytes()
                )
    return found


def test_what_a_copied_folder_holds(folder: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    config, output = two_tiers(folder), tmp_path / "out"
    report = export(folder, config, output)
    assert len(shards(folder)) > 2
    assert tensors_of(output) == tensors_of(folder)
    for index, shard in enumerate(shards(folder)):
        copied = output / shard.name
        with safe_open(copied, framework="np") as file:
            metadata = file.metadata()
        assert metadata["format"] == "pt"
        if index == 0:
            assert json.loads(metadata["longrope"]) == to_json(config)
        else:
            assert copied.read_bytes() == shard.read_bytes()
    names = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    expected = set(before) - {"pytorch_model.bin"}
    assert names == expected | {"longrope.json", "additional_chat_templates/tools.jinja"}
    for name in expected - {"config.json", shards(folder)[0].name}:
        assert (output / name).read_bytes() == before[name]
    assert any("left behind: pytorch_model.bin" in note for note in report["notes"])
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


def test_linked_weights_are_the_same_files(folder: Path, tmp_path: Path) -> None:
    real = tmp_path / "blobs"
    real.mkdir()
    for shard in shards(folder):  # as the hub's cache keeps them
        shard.rename(real / shard.name)
        shard.symlink_to(real / shard.name)
    report = export(folder, two_tiers(folder), tmp_path / "out", link=True)
    assert report["route"] == "linked"
    for shard in shards(tmp_path / "out"):
        assert not shard.is_symlink()
        assert shard.samefile(real / shard.name)
    assert load_model(tmp_path / "out").native == two_tiers(folder)


def test_a_shard_with_other_factors_is_not_linked(folder: Path, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    export(folder, two_tiers(folder), old)
    same = export(old, None, tmp_path / "same", link=True)
    assert shards(tmp_path / "same")[0].samefile(shards(old)[0])
    config = two_tiers(folder, scale=1.1)
    report = export(old, config, new, link=True)
    with safe_open(shards(new)[0], framework="np") as file:
        assert json.loads(file.metadata()["longrope"]) == to_json(config)
    assert all(a.samefile(b) for a, b in zip(shards(new)[1:], shards(old)[1:], strict=True))
    assert tensors_of(new) == tensors_of(folder)
    note = f"{shards(old)[0].name} is copied, not linked: its metadata held other factors"
    assert note in report["notes"] and note not in same["notes"]


def test_config_json_has_every_spelling(folder: Path, tmp_path: Path) -> None:
    """One shape for transformers 4 and 5, vLLM, SGLang, TGI, mlx-lm and ExLlama."""
    config, output = two_tiers(folder), tmp_path / "out"
    export(folder, config, output)
    values = json.loads((output / "config.json").read_text())
    scaling, parameters = values["rope_scaling"], values["rope_parameters"]
    assert values["max_position_embeddings"] == TARGET
    assert values["original_max_position_embeddings"] == BORDER
    assert values["rope_theta"] == parameters["rope_theta"] == 10000.0
    assert scaling["rope_type"] == "longrope"
    del parameters["rope_theta"]
    assert scaling == parameters
    assert scaling["factor"] == pytest.approx(TARGET / BORDER)
    assert {scaling[f"{word}_mscale"] for word in ("short", "long")} == {1.25}
    assert scaling["attention_factor"] == 1.25
    assert scaling["long_factor"] == list(config.tiers[1].rescale_factors)
    assert "auto_map" not in values


def test_every_stated_length_is_the_target(folder: Path, tmp_path: Path) -> None:
    """vLLM refuses a --max-model-len above the tokenizer's, ExLlamaV2 takes the first it finds."""
    edit_json(folder / "tokenizer_config.json", model_max_length=40)
    edit_json(folder / "config.json", model_max_length=40, max_seq_len=4096)
    report = export(folder, two_tiers(folder), tmp_path / "out")
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer == {
        **json.loads((folder / "tokenizer_config.json").read_text()),
        "model_max_length": TARGET,
    }
    assert any("model_max_length is 64 now, and was 40" in note for note in report["notes"])
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (values["model_max_length"], values["max_seq_len"]) == (TARGET, 4096)


def test_saving_with_transformers_keeps_the_definition(folder: Path, tmp_path: Path) -> None:
    """After fine-tuning, say: save_pretrained writes rope_parameters alone, and the key."""
    ladder = beyond_stock(folder)["middle_tiers"]
    export(folder, ladder, tmp_path / "out", approximate=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    loaded.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "longrope.json").exists()
    assert load_model(tmp_path / "saved").native == ladder


def test_gemma3_inside_a_multimodal_config(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "gemma3", dtype="float32")
    path = folder / "config.json"
    text = json.loads(path.read_text())
    wrapper = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
    path.write_text(json.dumps({**wrapper, "text_config": text}))
    config = two_tiers(folder)
    assert config.layers == (1,)
    export(folder, config, tmp_path / "out")
    inside = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert inside["rope_parameters"]["sliding_attention"]["rope_type"] == "default"
    assert inside["rope_parameters"]["full_attention"]["rope_type"] == "longrope"
    assert inside["rope_scaling"]["rope_type"] == "longrope"
    assert (inside["rope_theta"], inside["rope_local_base_freq"]) == (1e6, 1e4)
    assert load_model(tmp_path / "out").native == config


def tiers_of(config: LongRopeConfig, **changes: Any) -> tuple[FactorTier, ...]:
    one, two = config.tiers
    values = {"num_start_tokens": 0, "attention_factor": 1.25, **changes}
    return one, FactorTier(TARGET, two.rescale_factors, **values)


def beyond_stock(folder: Path) -> dict[str, LongRopeConfig]:
    """Configs that stock code cannot compute, by the field that it lacks."""
    config = two_tiers(folder)
    middle = FactorTier(40, config.tiers[1].rescale_factors, 0, 1.25)
    return {
        "switch": two_tiers(folder, switch="causal"),
        "middle_tiers": two_tiers(folder, tiers=(config.tiers[0], middle, config.tiers[1])),
        "num_start_tokens": two_tiers(folder, tiers=tiers_of(config, num_start_tokens=4)),
        "attention_factor": two_tiers(folder, tiers=tiers_of(config, attention_factor=1.5)),
        "logit_scaling": two_tiers(folder, logit_scaling=LogitScaling(24, (0,))),
        "layers": two_tiers(folder, layers=(0,)),
    }


def test_what_stock_cannot_compute_is_refused_or_reported(folder: Path, tmp_path: Path) -> None:
    for field, config in beyond_stock(folder).items():
        output = tmp_path / field
        with pytest.raises(UnsupportedError, match=rf"\n  {field}: .*\nChoose --remote-code"):
            export(folder, config, output)
        assert not output.exists()
        report = export(folder, config, output, approximate=True)
        dropped = [note for note in report["notes"] if note.startswith("dropped: ")]
        assert any(note.startswith(f"dropped: {field}: ") for note in dropped), dropped
        assert load_model(output).native == config, "the whole config is read back"
    one = two_tiers(folder, switch="causal", tiers=two_tiers(folder).tiers[1:])
    assert not [n for n in export(folder, one, tmp_path / "one")["notes"] if "dropped" in n]


def test_gemma3_rescales_its_global_layers_only(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "gemma3")
    with pytest.raises(UnsupportedError, match="layers: the layers with full attention"):
        export(folder, two_tiers(folder, layers=None), tmp_path / "out")


def test_exporting_an_export(folder: Path, tmp_path: Path) -> None:
    """Other factors replace the old ones everywhere, and the definition survives round trips."""
    ladder = beyond_stock(folder)["middle_tiers"]
    first, second, third = (tmp_path / name for name in "123")
    export(folder, ladder, first, approximate=True)
    export(first, None, second, approximate=True)
    assert load_model(second).native == ladder
    assert read_factors(second / "longrope.json", load_model(folder)) == ladder
    export(second, two_tiers(folder, scale=1.1), third)
    assert load_model(third).native == two_tiers(folder, scale=1.1)
    assert "1.25" not in (third / "config.json").read_text()
    with safe_open(shards(third)[0], framework="np") as file:
        assert json.loads(file.metadata()["longrope"]) == to_json(two_tiers(folder, scale=1.1))
    assert tensors_of(third) == tensors_of(folder)


def test_the_certificate_of_an_export_is_not_one_of_the_next(folder: Path, tmp_path: Path) -> None:
    export(folder, two_tiers(folder), tmp_path / "1")
    (tmp_path / "1" / "longrope-certificate.json").write_text("{}")
    report = export(tmp_path / "1", two_tiers(folder, scale=1.1), tmp_path / "2")
    assert not (tmp_path / "2" / "longrope-certificate.json").exists()
    assert "left behind: longrope-certificate.json" in report["notes"]


def test_a_definition_that_contradicts_config_json_is_refused(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    export(folder, two_tiers(folder), output)
    path = output / "config.json"
    values = json.loads(path.read_text())
    for block in ("rope_scaling", "rope_parameters"):
        values[block]["long_factor"][3] *= 1.01
    path.write_text(json.dumps(values))
    with pytest.raises(
        ModelError, match=r"contradicts longrope\.json .* factors for lengths up to 64"
    ):
        load_model(output)
    (output / "longrope.json").unlink()
    with pytest.raises(ModelError, match=r"contradicts longrope\.json"):
        load_model(output)
    edit_json(path, longrope=None)
    assert (
        load_model(output).native.tiers[1].rescale_factors[3]
        == values["rope_scaling"]["long_factor"][3]
    )


def test_conflicting_rope_blocks(folder: Path, tmp_path: Path) -> None:
    edit_json(folder / "config.json", rope_scaling={"type": "linear", "factor": 2.0})
    with pytest.raises(
        ModelError, match="rope_type is 'linear' in rope_scaling and 'default' in rope_parameters"
    ):
        load_model(folder)
    edit_json(folder / "config.json", rope_scaling=None, rope_theta=500000.0)
    with pytest.raises(
        ModelError, match=r"rope_theta is 500000\.0 in the top level and 10000\.0 in"
    ):
        load_model(folder)


def only_pickles(folder: Path) -> None:
    for shard in shards(folder):
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()


def cut_header(folder: Path) -> None:
    shards(folder)[1].write_bytes(shards(folder)[1].read_bytes()[:60])


BAD_FOLDERS = {
    "only pickled weights": only_pickles,
    "but it is missing": lambda folder: shards(folder)[-1].unlink(),
    "damaged or truncated safetensors file": cut_header,
}


@pytest.mark.parametrize("message", BAD_FOLDERS)
def test_bad_weights(message: str, folder: Path, tmp_path: Path) -> None:
    config = two_tiers(folder)
    BAD_FOLDERS[message](folder)
    with pytest.raises(ModelError, match=message):
        export(folder, config, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_outputs_that_are_refused(folder: Path, tmp_path: Path) -> None:
    config = two_tiers(folder)
    with pytest.raises(OutputError, match="is or holds the input"):
        export(folder, config, folder, force=True)
    with pytest.raises(OutputError, match="is or holds the input"):
        export(folder, config, tmp_path, force=True)
    mine = tmp_path / "mine"
    mine.mkdir()
    export(folder, config, mine)  # an empty folder is no loss
    with pytest.raises(OutputError, match="exists: use --force"):
        export(folder, config, mine)
    shutil.rmtree(mine)
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="is a folder with other files"):
        export(folder, config, mine, force=True)
    assert (mine / "thesis.txt").read_text() == "years of work"
    with pytest.raises(OutputError, match="does not exist"):
        export(folder, config, tmp_path / "a" / "b")


def test_force_replaces_an_earlier_export_and_only_when_done(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    export(folder, two_tiers(folder), output)
    before = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    with monkeypatch.context() as patch:
        from longrope_converters.to_safetensors import hf_folder

        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(hf_folder, "copy_file", fail)
        with pytest.raises(OutputError, match=r"No space left on device.*free some space"):
            export(folder, two_tiers(folder, scale=1.1), output, force=True)
    assert {p.name: p.read_bytes() for p in output.iterdir() if p.is_file()} == before
    export(folder, two_tiers(folder, scale=1.1), output, force=True)
    assert load_model(output).native.tiers[0].attention_factor == 1.1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_a_full_disk(folder: Path, small_disk: Path) -> None:
    (folder / "large.txt").write_bytes(bytes(2 << 20))
    with pytest.raises(OutputError, match="No space left on device"):
        export(folder, two_tiers(folder), small_disk / "out")
    assert list(small_disk.iterdir()) == []


def test_links_do_not_cross_file_systems(folder: Path, small_disk: Path) -> None:
    with pytest.raises(OutputError, match="leave out --link"):
        export(folder, two_tiers(folder), small_disk / "out", link=True)
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "f16"}, "--dtype is for a GGUF source"),
        ({"threads": 2}, "--threads and --max-shard-size are for a GGUF source"),
        ({"remote_code": True, "approximate": True}, "give one"),
    ],
)
def test_options_that_would_be_ignored(
    options: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        export(folder, two_tiers(folder), tmp_path / "out", **options)


def test_nothing_to_do_and_unknown_families(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="nothing to do"):
        export(folder, None, tmp_path / "out")
    config = two_tiers(folder)
    edit_json(folder / "config.json", architectures=["MagicForCausalLM"], model_type="magic")
    with pytest.raises(UnsupportedError, match="'MagicForCausalLM' in transformers applies"):
        export(folder, config, tmp_path / "out")
    assert issubclass(UnsupportedError, LongRopeError)
