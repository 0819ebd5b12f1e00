"""scripts/measure_smollm2.py, on a toy."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluated import HELP, ladder, make_root

from longrope_export.config import SwitchPolicy
from longrope_export.evaluate.results import make_results
from longrope_export.evaluate.run import open_journal
from longrope_export.evaluate.settings import Cell, Settings, Text
from longrope_export.evaluate.subjects import Subject, make_subjects
from longrope_export.runtimes.open import parse_export
from scripts import measure_smollm2 as script
from scripts.twins import are_twins
from scripts.update_readme import PARTS

TIMES = ("seconds", "tokens_per_second", "generated_per_second", "peak_memory_bytes")
SETTINGS = Settings((299, 500, 1000), needle=True, num_keys=1, num_values=0, tokens=1000)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("measure"))


@pytest.fixture(scope="module")
def subjects(root: Path) -> list[Subject]:
    """The model as it is, one tier for all lengths, and a ladder under both rules."""
    (plain,) = make_subjects([parse_export(str(root / "m"))])
    tiers = ladder(root / "m")
    one = replace(tiers, tiers=tiers.tiers[-1:], switch=SwitchPolicy.SEQUENCE)
    configs = {
        "one": one,
        "causal": replace(tiers, switch=SwitchPolicy.CAUSAL),
        "sequence": replace(tiers, switch=SwitchPolicy.SEQUENCE),
    }
    return [
        replace(plain, label="none"),
        *(replace(plain, label=n, definition=c, bounded=True) for n, c in configs.items()),
    ]


def test_twins_have_the_numbers_that_would_be_measured(
    root: Path, subjects: list[Subject], tmp_path: Path
) -> None:
    texts = [Text("help", HELP)]
    found: list[dict[Cell, Any]] = []
    for twins in (True, False):
        with open_journal(tmp_path / str(twins), SETTINGS, texts) as journal:
            script.measure(subjects, subjects, texts, SETTINGS, journal, twins=twins)
            found.append(dict(script.finished(journal, subjects, texts, 1000)))
    shared, alone = found
    assert shared.keys() == alone.keys() and len(shared) == 4 * 3 * 2
    for cell, result in shared.items():
        other = alone[cell]
        for name in result.keys() - set(TIMES):
            if name in ("loss", "perplexity", "standard_error"):
                assert result[name] == pytest.approx(other[name], rel=1e-6), cell
            elif name not in ("stretches", "window_losses"):
                assert result[name] == other[name], (cell, name)
    same = {
        (one.model, cell.model, cell.length)
        for one, a in shared.items()
        for cell, b in shared.items()
        if a == b and one.model < cell.model and one.task == cell.task == "perplexity"
    }
    below = {("none", "sequence", 299), ("causal", "none", 299), ("causal", "sequence", 299)}
    assert same == below | {("one", "sequence", 1000)}


@pytest.mark.parametrize(
    "change",
    [{"layers": (1,)}, {"rope_theta": 5e5}, {"tiers": 1.3}],
    ids=["layers", "rope_theta", "attention_factor"],
)
def test_no_twins(subjects: list[Subject], change: dict[str, Any]) -> None:
    one = subjects[1]
    assert one.definition is not None
    if "tiers" in change:
        tiers = (replace(one.definition.tiers[0], attention_factor=change["tiers"]),)
        change = {"tiers": tiers}
    other = replace(one, definition=replace(one.definition, **change))
    assert are_twins(one, one, 500) and not are_twins(one, other, 500)
    assert not are_twins(one, replace(one, dtype="bfloat16"), 500)


def run(monkeypatch: pytest.MonkeyPatch, work: Path, *words: object) -> None:
    sizes = ["--lengths", "1000", "--tokens", "1000", "--no-write"]
    sizes += ["--work", work, "--records", work]
    monkeypatch.setattr(sys, "argv", ["measure", *map(str, [*words, *sizes])])
    script.main()


def test_earlier_variants_and_texts(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(root / "m", tmp_path / "smollm2")
    (tmp_path / "other.txt").write_text(HELP[::-1])
    run(monkeypatch, tmp_path, "--variants", f"mine={root / 'f.json'}")
    said = capsys.readouterr()
    assert "| mine |" in said.out and "multikey, mine" in said.err and " minutes" in said.err
    run(monkeypatch, tmp_path, "--variants", "none,mine")
    said = capsys.readouterr()
    assert "| mine |" in said.out and "| as trained |" in said.out
    run(monkeypatch, tmp_path, "--variants", "none", "--text", tmp_path / "other.txt")
    said = capsys.readouterr()
    assert "| mine |" not in said.out and "| as trained |" in said.out
    for name in ("wrong", f"yarn={root / 'f.json'}"):
        with pytest.raises(SystemExit):
            run(monkeypatch, tmp_path, "--variants", name)


def test_an_estimate_goes_by_what_was_measured() -> None:
    cell = Cell("perplexity", "m", 8192, "t", 32768)
    needle = Cell("multikey", "m", 8192, "t", trial=0)
    assert script.estimate(cell, []) == pytest.approx(400)
    assert script.estimate(needle, [(cell, {"seconds": 80.0})]) == pytest.approx(20)


def test_what_is_written(subjects: list[Subject], tmp_path: Path) -> None:
    assert script.BLOCK in PARTS
    (tmp_path / "docs").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text("<!-- evaluation: begin -->\n<!-- evaluation: end -->\n")
    result = {"loss": 1.0, "scored_tokens": 9, "tokens_sha256": "0"}
    result["stretches"] = [[0, 250, 1.0, 249]]
    cells = [(Cell("perplexity", "none", n, "t", 1000), result) for n in (250, 500)]
    results = make_results(subjects[:3], [Text("t", "")], SETTINGS, cells)
    script.write_documents(results, 1000, dtype="bfloat16", root=tmp_path)
    page = (tmp_path / "docs" / "evaluation.md").read_text()
    assert "`causal` ([factors](measured/causal.json)): 3 tiers, rule causal, by by hand." in page
    assert "Computed in bfloat16" in page and "Speed" not in page
    drawn = ("evaluation.md", "evaluation.png", "evaluation-positions.png")
    assert {path.name for path in (tmp_path / "docs").iterdir()} == set(drawn)
    assert "window of 500 tokens](evaluation-positions.png)" in page
    assert "](docs/evaluation.png)" in readme.read_text() and "| none |" in readme.read_text()
    script.write_documents(results, 1000, root=tmp_path)
    assert "Computed in" not in (tmp_path / "docs" / "evaluation.md").read_text()
