"""The demo: which contexts it measures in the time there is, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from longrope_export.cli import main
from longrope_export.cli.demo import _what_is_missing
from longrope_export.demo.budget import affordable_contexts, estimate_seconds
from longrope_export.demo.measured import measure_once

# seconds of whole runs on two idle cores, context -> measured
MEASURED = {2048: 11.5, 4096: 33.5, 8192: 97.2, 12288: 195.7, 16384: 326.4}


def test_the_estimate_is_near_what_was_measured() -> None:
    for context, seconds in MEASURED.items():
        assert estimate_seconds(context, MEASURED[2048]) == pytest.approx(seconds, rel=0.1)


@pytest.mark.parametrize("seconds", [0, 40, 100, 250, 350, 500, 700, 1000])
def test_what_is_chosen_fits_and_is_the_best_that_does(seconds: float) -> None:
    contexts = affordable_contexts(seconds, MEASURED[2048])
    needed = sum(2 * estimate_seconds(context, MEASURED[2048]) for context in contexts)
    assert needed <= seconds or contexts == [12288]
    assert max(contexts) > 8192  # what the factors do shows beyond the window alone
    longer = affordable_contexts(1.5 * seconds + 30, MEASURED[2048])
    assert max(longer) >= max(contexts)


def test_choices() -> None:
    chosen = {s: affordable_contexts(s, MEASURED[2048]) for s in (10, 500, 600, 700, 900)}
    assert chosen == {
        10: [12288],
        500: [12288],
        600: [8192, 12288],
        700: [16384],
        900: [8192, 16384],
    }


def test_a_short_table_says_so() -> None:
    assert _what_is_missing([8192, 16384], 6, 900) == ""
    hint = _what_is_missing([12288], 6, 900)
    assert "15 minutes more: longrope-export demo --lengths 8192,16384" in hint


def test_wrong_use(tmp_path: Path) -> None:
    for arguments in (
        ("--lengths", "8k"),
        ("--lengths", "0"),
        ("--lengths", "8192", "--budget", "3"),
    ):
        result = CliRunner().invoke(main, ["demo", "-o", str(tmp_path), *arguments])
        assert result.exit_code == 2
        assert "--lengths" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_measurement_is_kept_until_one_of_its_inputs_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script in place of llama-perplexity counts how often it runs."""
    monkeypatch.setenv("LONGROPE_EXPORT_CACHE", str(tmp_path / "cache"))
    program, runs = tmp_path / "bin" / "llama-perplexity", tmp_path / "runs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho x >> {runs}\necho Final estimate: PPL = 9.5 +/- 0.2\n")
    program.chmod(0o755)
    model, text = tmp_path / "m.gguf", tmp_path / "t.txt"
    model.write_text("model")
    text.write_text("text")

    def runs_after(context: int) -> int:
        measured = measure_once(program, model, text, context=context)
        assert (measured.perplexity.value, measured.perplexity.context) == (9.5, context)
        return len(runs.read_text().split())

    assert [runs_after(256), runs_after(256), runs_after(512)] == [1, 1, 2]
    model.write_text("Model")
    assert [runs_after(256), runs_after(256)] == [3, 3]
    (program.parent / "libllama.so").touch()
    assert runs_after(256) == 4
    for record in (tmp_path / "cache" / "perplexity").iterdir():
        record.write_text("{")
    assert runs_after(256) == 5
