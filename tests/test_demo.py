"""The demo: which contexts it measures in the time there is, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from longrope_export.cli import main
from longrope_export.cli.demo import _what_is_missing
from longrope_export.demo.budget import affordable_contexts, estimate_seconds

# seconds of whole runs on two idle cores, context -> measured
MEASURED = {2048: 11.5, 4096: 33.5, 8192: 97.2, 12288: 195.7, 16384: 326.4}


def test_the_estimate_is_near_what_was_measured() -> None:
    for context, seconds in MEASURED.items():
        assert estimate_seconds(context, MEASURED[2048]) == pytest.approx(seconds, rel=0.1)


@pytest.mark.parametrize("seconds", [0, 40, 100, 250, 350, 500, 700, 1000])
def test_what_is_chosen_fits_and_is_the_best_that_does(seconds: float) -> None:
    contexts = affordable_contexts(seconds, MEASURED[2048])
    needed = sum(2 * estimate_seconds(context, MEASURED[2048]) for context in contexts)
    assert needed <= seconds or contexts == [2048]
    longer = affordable_contexts(1.5 * seconds + 30, MEASURED[2048])
    assert max(longer) >= max(contexts)


def test_choices() -> None:
    chosen = {s: affordable_contexts(s, MEASURED[2048]) for s in (10, 100, 200, 300, 500, 900)}
    assert chosen == {
        10: [2048],
        100: [4096],
        200: [8192],
        300: [10240],
        500: [12288],
        900: [8192, 16384],
    }


def test_a_short_table_says_so() -> None:
    assert _what_is_missing([8192, 16384], 8192, 6, 900) == ""
    assert "nothing beyond the trained 8192" in _what_is_missing([4096], 8192, 6, 900)
    hint = _what_is_missing([10240], 8192, 6, 900)
    assert "nothing beyond" not in hint
    assert "15 minutes more: longrope-export demo --lengths 8192,16384" in hint


def test_wrong_use(tmp_path: Path) -> None:
    for arguments in (("--lengths", "8k"), ("--lengths", "8192", "--budget", "3")):
        result = CliRunner().invoke(main, ["demo", "-o", str(tmp_path), *arguments])
        assert result.exit_code == 2
        assert "--lengths" in result.output
    assert list(tmp_path.iterdir()) == []
