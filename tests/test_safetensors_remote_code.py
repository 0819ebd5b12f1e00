"""--remote-code: the whole config with trust_remote_code, the nearest stock one without."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_reference
import numpy as np
import pytest
from longrope_rotary import tokens
from test_safetensors import export, load_plainly, two_tiers
from tiny_models import edit_json

from longrope_export.config import FactorTier, LogitScaling, LongRopeConfig
from longrope_export.definition import to_json
from longrope_export.errors import UnsupportedError
from longrope_export.models.model import load_model

FAMILIES = ("Llama", "Qwen3", "Gemma3")
LENGTHS = (20, 45)


def everything(folder: Path) -> LongRopeConfig:
    """Three tiers by position, start tokens, an attention factor each, log scaling."""
    base = two_tiers(folder, switch="causal")
    short, long = (tier.rescale_factors for tier in base.tiers)
    middle = tuple((a + b) / 2 for a, b in zip(short, long, strict=True))
    tiers = (
        FactorTier(16, short, 2, 1.0),
        FactorTier(32, middle, 3, 1.1),
        FactorTier(64, long, 4, 1.25),
    )
    return two_tiers(
        folder,
        switch="causal",
        tiers=tiers,
        original_max_position_embeddings=16,
        logit_scaling=LogitScaling(16, (0,)),
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    root = tmp_path_factory.mktemp("remote-code")
    found = {}
    for family in FAMILIES:
        source = root / f"{family}-source"
        hf_reference.toy_model(family, vocab_size=320).save_pretrained(source)
        found[family] = source, root / family
        export(source, everything(source), root / family, remote_code=True)
    return found


def test_the_whole_config_is_computed_for_those_who_trust_the_file(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    exported = [folder for _, folder in folders.values()]
    found = load_plainly(tmp_path / "logits.npz", LENGTHS, exported, trust=True)
    for family, (source, folder) in folders.items():
        assert str(found[f"{folder} class"]).startswith("transformers_modules.")
        config, model = everything(source), hf_reference.toy_model(family, vocab_size=320)
        for length in LENGTHS:
            expected = hf_reference.reference_logits(model, config, tokens(length)[0], None)
            difference = np.abs(expected.detach().numpy() - found[f"{folder} {length}"]).max()
            assert difference <= 1e-4, f"{family}, {length} tokens: {difference}"


def test_layers_that_are_not_named_stay_plain(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    source, _ = folders["Llama"]
    config = replace(everything(source), layers=(1,))
    export(source, config, tmp_path / "out", remote_code=True)
    found = load_plainly(tmp_path / "logits.npz", (20,), [tmp_path / "out"], trust=True)
    model = hf_reference.toy_model("Llama", vocab_size=320)
    expected = hf_reference.reference_logits(model, config, tokens(20)[0], None)
    assert np.abs(expected.detach().numpy() - found[f"{tmp_path / 'out'} 20"]).max() <= 1e-4


def test_without_trust_the_folder_is_a_stock_model(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    exported = [folder for _, folder in folders.values()]
    nearest = []
    for family, (source, _) in folders.items():
        nearest.append(tmp_path / family)
        export(source, everything(source), tmp_path / family, approximate=True)
    found: dict[str, Any] = load_plainly(tmp_path / "a.npz", LENGTHS, [*exported, *nearest])
    for folder, stock in zip(exported, nearest, strict=True):
        assert str(found[f"{folder} class"]).startswith("transformers.models.")
        for length in LENGTHS:
            assert np.array_equal(found[f"{folder} {length}"], found[f"{stock} {length}"])


def test_what_stands_in_the_folder(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    source, folder = folders["Llama"]
    values = json.loads((folder / "config.json").read_text())
    assert values["model_type"] == "llama"
    assert list(values["auto_map"]) == ["AutoModelForCausalLM"]
    file = values["auto_map"]["AutoModelForCausalLM"].rpartition(".")[0]
    assert (folder / f"{file}.py").is_file()
    assert values["longrope"] == to_json(everything(source))
    assert load_model(folder).native == everything(source)
    # a stock export of it leaves the file and its entry behind
    export(folder, two_tiers(source), tmp_path / "stock")
    assert "auto_map" not in json.loads((tmp_path / "stock" / "config.json").read_text())
    assert not list((tmp_path / "stock").glob("*.py"))


def test_the_modelling_code_of_the_source_survives_every_export(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    first, second, trusted = (tmp_path / name for name in ("1", "2", "trusted"))
    source = Path(shutil.copytree(folders["Llama"][0], tmp_path / "source"))
    theirs = {"AutoModelForCausalLM": "modeling_theirs.Theirs", "AutoTokenizer": ["a.B", None]}
    edit_json(source / "config.json", auto_map=theirs)
    (source / "modeling_theirs.py").write_text("class Theirs: ...")
    export(source, two_tiers(source), first)
    notes = export(first, two_tiers(source), second)["notes"]
    assert json.loads((second / "config.json").read_text())["auto_map"] == theirs
    assert (second / "modeling_theirs.py").is_file()
    assert any("carried along and used" in note for note in notes)
    notes = export(second, everything(source), trusted, remote_code=True)["notes"]
    assert (trusted / "modeling_theirs.py").is_file()
    assert not any("carried along and used" in note for note in notes)
    assert any("names ours in its place" in note for note in notes)


def test_a_config_without_architectures_gets_the_class_of_its_family(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    for family in ("Llama", "Gemma3"):
        source = Path(shutil.copytree(folders[family][0], tmp_path / f"{family}-source"))
        edit_json(source / "config.json", architectures=None)
        export(source, everything(source), tmp_path / family, remote_code=True)
        auto_map = json.loads((tmp_path / family / "config.json").read_text())["auto_map"]
        expected = f"modeling_longrope.LongRope{family}ForCausalLM"
        assert auto_map == {"AutoModelForCausalLM": expected}


def test_an_architecture_without_a_modelling_file_is_refused_before_writing(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    source, _ = folders["Llama"]
    values = json.loads((source / "config.json").read_text())
    values.update(model_type="minicpm", architectures=["MiniCPMForCausalLM"])
    (source / "config.json").write_text(json.dumps(values))
    with pytest.raises(UnsupportedError, match="MiniCPMForCausalLM"):
        export(source, everything(source), tmp_path / "out", remote_code=True)
    assert not list(tmp_path.iterdir())
