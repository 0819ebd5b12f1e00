"""The real model: factors made here, baked here, used by stock llama.cpp."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from longrope_converters.to_gguf.convert import GgufConverter
from longrope_export.cli import main
from longrope_export.demo.material import fetch_smollm2, write_help_text
from longrope_export.demo.measured import measure_once
from longrope_export.ladder import make_config
from longrope_export.llama_cpp.perplexity import run_perplexity
from longrope_export.models.model import Model, load_model

pytestmark = pytest.mark.integration

CONTEXT = 12288  # half of the scored positions lie beyond the trained window of 8192


@pytest.fixture(scope="module")
def smollm2() -> Model:
    return load_model(fetch_smollm2())


@pytest.fixture(scope="module")
def extended(smollm2: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("smollm2") / "32k.gguf"
    config = make_config(smollm2, "yarn", 32768)
    GgufConverter().convert(smollm2, config, output, lambda _: None)
    return output


def test_perplexity_beyond_the_window_is_lower_than_the_unscaled_models(
    smollm2: Model, extended: Path, programs: Path, tmp_path: Path
) -> None:
    """At 12288 tokens, which a slow machine does in minutes; the demo shows 16384."""
    text = tmp_path / "help.txt"
    write_help_text(text)
    program = programs / "llama-perplexity"
    # the unscaled model owes nothing to this project: measured once for each build of llama.cpp
    before = measure_once(program, smollm2.path, text, context=CONTEXT).perplexity
    after = run_perplexity(program, extended, text, context=CONTEXT)
    assert after.value < 10.5  # measured: 10.25, and 11.51 before
    assert before.value > 1.08 * after.value


def test_it_generates_english(extended: Path, programs: Path) -> None:
    command = [str(programs / "llama-completion"), "-m", str(extended), "-c", "32768", "-n", "12"]
    command += ["--temp", "0", "-no-cnv", "-p", "The capital of France is"]
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
    )
    assert "Paris" in result.stdout


def test_the_demo_runs_and_leaves_files_of_the_same_name_alone(
    programs: Path, tmp_path: Path
) -> None:
    precious = [tmp_path / name for name in ("factors.json", "help.txt", "smollm2-32768.gguf")]
    for path in precious:
        path.write_text("precious")
    arguments = ["-q", "demo", "-o", str(tmp_path), "--lengths", "256", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert [row["context"] for row in values["rows"]] == [256]
    assert 1 < values["rows"][0]["after"] < 100
    assert Path(values["model"]) == tmp_path / "longrope-demo" / "smollm2-32768.gguf"
    assert [path.read_text() for path in precious] == ["precious"] * 3
