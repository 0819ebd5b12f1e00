"""The choice of the route, and what a report tells about stock llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import gguf_keys, write_gguf_file

from longrope_converters.to_gguf.convert import GgufConverter, GgufOptions
from longrope_export.cli.gguf import _default_output
from longrope_export.errors import UnsupportedError
from longrope_export.ladder import make_config
from longrope_export.models.model import load_model


@pytest.mark.parametrize(
    ("options", "flag"),
    [({"pre": "gpt-2"}, "--pre"), ({"threads": 2}, "--threads")],
)
def test_what_llama_cpps_converter_has_no_use_for_is_refused(
    options: dict[str, Any], flag: str, hf_config: Callable[..., Path]
) -> None:
    folder = hf_config(architectures=["Gemma2ForCausalLM"], model_type="gemma2", head_dim=16)
    with pytest.raises(UnsupportedError, match=f"{flag} is ignored .*llama.cpp's own converter"):
        GgufConverter(GgufOptions(**options)).check(load_model(folder), None)
    GgufConverter(GgufOptions(trust_remote_code=True, name="x")).check(load_model(folder), None)


@pytest.mark.parametrize("has_freqs", [True, False])
def test_the_note_knows_of_factors_that_stay_in_the_file(has_freqs: bool, tmp_path: Path) -> None:
    """exaone files carry rope_freqs.weight, which stock llama.cpp goes on using."""
    tensors = {"token_embd.weight": np.zeros((5, 64), np.float32)}
    if has_freqs:
        tensors["rope_freqs.weight"] = np.full(8, 2, np.float32)
    model = load_model(write_gguf_file(tmp_path / "m.gguf", gguf_keys("exaone"), tensors))
    config = make_config(model, "pi", 1024)
    report = GgufConverter().convert(model, config, tmp_path / "out.gguf", lambda _: None)
    assert len(report.notes) == 1
    assert ("scaled by its own rope_freqs.weight alone" in report.notes[0]) == has_freqs
    assert ("unscaled" in report.notes[0]) != has_freqs


def test_the_report_says_that_llama_cpp_has_another_phimoe(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": np.zeros((5, 64), np.float32)}
    model = load_model(write_gguf_file(tmp_path / "m.gguf", gguf_keys("phimoe"), tensors))
    config = make_config(model, "pi", 1024)
    report = GgufConverter().convert(model, config, tmp_path / "out.gguf", lambda _: None)
    assert "its logits are not the model's" in report.notes[0]


def test_llama_quantize_is_asked_for_its_types_once(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script in its place notes how it is called."""
    program, calls = tmp_path / "llama-quantize", tmp_path / "calls"
    program.write_text(
        f"#!/bin/sh\necho $1 >> {calls}\n"
        'if [ "$1" = --help ]; then echo "  2  or  Q4_0  :  4.34G"; else cp "$1" "$2"; fi\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("LONGROPE_EXPORT_LLAMA_CPP", str(tmp_path))
    options = GgufOptions(outtype="q4_0", threads=1)
    model = load_model(tiny_gguf)
    GgufConverter(options).convert(model, None, tmp_path / "out.gguf", lambda _: None)
    assert calls.read_text().split() == ["--help", str(tiny_gguf)]


def test_default_outputs(tmp_path: Path) -> None:
    """Beside a local source; in the current folder for a hub id, whose files lie in a cache."""
    (tmp_path / "folder").mkdir()
    beside = _default_output(str(tmp_path / "folder"), "bf16", is_file=False)
    assert beside == tmp_path / "folder-bf16.gguf"
    file = _default_output(str(tmp_path / "m.gguf"), None, is_file=True)
    assert file == tmp_path / "m-longrope.gguf"
    assert _default_output("owner/name", None, is_file=False) == Path("name-auto.gguf")
