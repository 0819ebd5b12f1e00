"""The modelling file of an exported folder, loaded where this package cannot be imported."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_reference import FAMILIES, VOCAB, reference_logits, toy_config, toy_model
from tiny_models import edit_json

from longrope_export.errors import UnsupportedError
from longrope_export.factor_files import to_json
from longrope_export.hf_runtime import apply_longrope, remove_longrope
from longrope_export.hf_runtime.remote_code import ARCHITECTURES, CONFIG_KEY, modeling_source

# without longrope_export; chunks through a cache over both borders, then a frozen tier
PROGRAM = """
import json, sys
sys.modules["longrope_export"] = None  # any import of it raises
import torch
from transformers import AutoModelForCausalLM
results = {}
with torch.no_grad():
    for folder in sys.argv[2:]:
        ids = torch.tensor(json.load(open(f"{folder}/ids.json")))
        stock = AutoModelForCausalLM.from_pretrained(folder)
        trusted = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        cache, parts = None, []
        for start, stop in ((0, 5), (5, 8), (8, 20)):
            out = trusted(ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        tokens = trusted.generate(ids[:, :5], max_new_tokens=10, do_sample=False)
        trusted.longrope.freeze(1)
        results[folder] = {
            "names": [type(stock).__name__, type(trusted).__name__],
            "cached": torch.cat(parts, 1), "frozen": trusted(ids).logits, "tokens": tokens,
        }
torch.save(results, sys.argv[1])
"""


def test_folders_load_in_a_process_without_this_package(tmp_path: Path) -> None:
    ids = torch.randint(2, VOCAB, (1, 20), generator=torch.Generator().manual_seed(1))
    expected = {}
    for family in ("Llama", "Phi3", "Gemma3", "Mixtral"):
        model = toy_model(family)
        config = toy_config(model)
        folder = tmp_path / family
        model.save_pretrained(folder)
        architecture = type(model).__name__
        file_name, class_name, text = modeling_source(architecture)
        (folder / file_name).write_text(text)
        auto_map = {"AutoModelForCausalLM": f"{Path(file_name).stem}.{class_name}"}
        edit_json(folder / "config.json", auto_map=auto_map, **{CONFIG_KEY: to_json(config)})
        (folder / "ids.json").write_text(json.dumps(ids.tolist()))
        with torch.no_grad():
            causal = reference_logits(model, config, ids[0], None)
            frozen = reference_logits(model, config, ids[0], 1)
        expected[str(folder)] = (architecture, class_name, causal, frozen)
    results = tmp_path / "results.pt"
    environment = {**os.environ, "PYTHONPATH": "", "HF_HOME": str(tmp_path / "hf")}
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(results), *expected],
        cwd=tmp_path,
        env={**environment, "HF_HUB_OFFLINE": "1"},
        check=True,
    )
    found = torch.load(results)
    for folder, (architecture, class_name, causal, frozen) in expected.items():
        got = found[folder]
        assert got["names"] == [architecture, class_name]
        torch.testing.assert_close(got["cached"][0], causal, atol=1e-4, rtol=0)
        torch.testing.assert_close(got["frozen"][0], frozen, atol=1e-4, rtol=0)
        assert got["tokens"].shape == (1, 15)


def test_a_model_with_its_own_code_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy_model()
    config = toy_config(model)
    _, class_name, text = modeling_source("LlamaForCausalLM")
    (tmp_path / "own_modeling_code.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    setattr(model.config, CONFIG_KEY, to_json(config))
    trusted = getattr(importlib.import_module("own_modeling_code"), class_name)(model.config)
    message = "definition of its own, in own_modeling_code: load it without trust_remote_code"
    with pytest.raises(UnsupportedError, match=message):
        apply_longrope(trusted, config)
    with pytest.raises(UnsupportedError, match=message):
        remove_longrope(trusted)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_file_needs_only_torch_and_transformers(architecture: str) -> None:
    file_name, class_name, text = modeling_source(architecture)
    tree = ast.parse(text)
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    assert names[-1] == class_name
    assert len(names) == len(set(names))
    imported = {
        (node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[
            0
        ]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    assert imported <= allowed
    assert max(map(len, text.splitlines())) <= 100
    assert file_name == "modeling_longrope.py"
    assert architecture.removesuffix("ForCausalLM") in FAMILIES


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="'GPT2LMHeadModel': not a known architecture"):
        modeling_source("GPT2LMHeadModel")
