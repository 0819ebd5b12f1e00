"""The fallback to llama.cpp's own converter."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tiny_models import add_sentencepiece, edit_json, make_model

from longrope_converters.to_gguf import stock
from longrope_converters.to_gguf.convert import GgufConverter
from longrope_export.errors import ModelError, ToolError
from longrope_export.gguf_format import read_header
from longrope_export.llama_cpp.source import fetch_source
from longrope_export.models.model import load_model


@pytest.fixture
def gemma2(tmp_path: Path) -> Path:
    folder = make_model(tmp_path / "tiny-gemma", "gemma2", head_dim=16)
    add_sentencepiece(folder)
    return folder


def test_other_architecture_is_converted(gemma2: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    stock.convert_with_stock(gemma2, "q8_0", output, name="Named")
    header = read_header(output)
    assert header.architecture == "gemma2"
    assert header.get("general.name") == "Named"


def test_failure_gives_the_command_to_repeat(gemma2: Path, tmp_path: Path) -> None:
    edit_json(gemma2 / "config.json", architectures=["NobodyForCausalLM"])
    with pytest.raises(
        ToolError, match=r"NobodyForCausalLM(?s:.)*by hand:\n  PYTHONPATH="
    ) as caught:
        stock.convert_with_stock(gemma2, "f16", tmp_path / "out.gguf")
    assert str(gemma2) in str(caught.value)


def test_pickles_are_refused(gemma2: Path, tmp_path: Path) -> None:
    (gemma2 / "model.safetensors").rename(gemma2 / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights"):
        stock.convert_with_stock(gemma2, "f16", tmp_path / "out.gguf")
    with pytest.raises(ModelError, match="pickled weights"):
        GgufConverter().dry_run(load_model(gemma2), None, tmp_path / "out.gguf")


def test_script_sees_no_code(gemma2: Path) -> None:
    edit_json(gemma2 / "config.json", auto_map={"AutoConfig": "evil.Config"})
    (gemma2 / "evil.py").write_text("raise SystemExit('executed')")
    (gemma2 / "training_args.bin").write_bytes(b"pickle")
    with stock._without_code(gemma2, keep_code=False) as visible:
        names = {path.name for path in visible.iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.model"} <= names
        assert not names & {"evil.py", "training_args.bin"}
        assert "auto_map" not in (visible / "config.json").read_text()
        assert visible.name == gemma2.name
    assert (gemma2 / "model.safetensors").is_file()


def test_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one, with a package of a few kilobytes instead of torch."""
    monkeypatch.setenv("LONGROPE_EXPORT_CACHE", str(tmp_path))
    python = stock._own_environment(["iniconfig==2.3.0"])
    subprocess.run([str(python), "-c", "import iniconfig"], check=True)
    ready = (python.parent.parent / "ready").stat().st_mtime_ns
    assert stock._own_environment(["iniconfig==2.3.0"]) == python
    assert (python.parent.parent / "ready").stat().st_mtime_ns == ready
    with pytest.raises(ToolError, match="no-such-package-of-ours"):
        stock._own_environment(["no-such-package-of-ours==1.0"])


def test_requirements_are_the_pins_of_the_source() -> None:
    requirements = stock._requirements(fetch_source())
    assert any(line.startswith("torch==") for line in requirements)
    assert not [line for line in requirements if line.startswith(("-", "gguf", "#"))]
