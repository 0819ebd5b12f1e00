"""evaluate: resuming, and the command; lm-eval's tasks: test_evaluate_tasks."""

from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from evaluated import HELP, make_root, run_evaluate
from rich.console import Console
from tiny_models import edit_json

from longrope_export.errors import OutputError
from longrope_export.evaluate.journal import FORMAT, VERSION, Journal, journal_path
from longrope_export.evaluate.results import cells_of, read_results, rich_tables, tables
from longrope_export.evaluate.run import evaluate, open_journal
from longrope_export.evaluate.settings import Cell, Settings, Text
from longrope_export.evaluate.subjects import make_subjects
from longrope_export.runtimes.open import parse_export

MEASURED = ("seconds", "tokens_per_second", "generated_per_second", "peak_memory_bytes")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("evaluate"))


# resuming


def without_times(cells: list[tuple[Any, dict[str, Any]]]) -> list[Any]:
    return [
        (cell, {k: v for k, v in result.items() if k not in MEASURED}) for cell, result in cells
    ]


def test_an_interrupted_run_goes_on_to_the_same_table(root: Path, tmp_path: Path) -> None:
    settings = Settings((300, 500), passkey=True, depths=(0.0, 1.0), num_stretches=4)
    subjects = make_subjects([parse_export(str(root / "m"))], [root / "f.json"])
    texts = [Text("help", HELP)]

    def go(name: str, stop: int) -> tuple[list[Any], list[str]]:
        begun: list[str] = []

        def say(what: str, share: float) -> None:
            if what not in (*begun, "done"):
                if len(begun) == stop:
                    raise KeyboardInterrupt
                begun.append(what)

        with open_journal(tmp_path / name, settings, texts) as journal:
            cells = evaluate(subjects, texts, settings, journal, say=say)
        return without_times(cells), begun

    whole, all_cells = go("whole", 99)
    assert len(whole) == 12
    with pytest.raises(KeyboardInterrupt):
        go("parts", 5)
    with (tmp_path / "parts").open("a") as file:
        file.write('{"cell": {"task": "perpl')  # kill -9 in the middle of a line
    resumed, rest = go("parts", 99)
    assert resumed == whole
    assert len(rest) == len(all_cells) - 5
    again, nothing = go("parts", 0)
    assert again == whole and nothing == []


def test_what_a_journal_refuses(root: Path, tmp_path: Path) -> None:
    path, settings = tmp_path / "j", {"seed": 0, "stride": None}
    Journal(path, settings, {"a": "1"}).close()
    Journal(path, settings, {"b": "2"}).close()
    with pytest.raises(OutputError, match="begun with seed = 0, now it is 1"):
        Journal(path, {**settings, "seed": 1}, {"a": "1"})
    for name in ("a", "b"):
        with pytest.raises(OutputError, match=f"text {name} is not what it was"):
            Journal(path, settings, {name: "3"})
    holder = Journal(path, settings, {"a": "1"})
    with pytest.raises(OutputError, match="another evaluation"):
        Journal(path, settings, {"a": "1"})
    holder.close()
    for content in ("hello\n", "{}\n", "[1]\n", '{"format": 1}\n'):
        path.write_text(content)
        with pytest.raises(OutputError, match="not the journal"):
            Journal(path, settings, {})
        assert path.read_text() == content
    older = f'{{"format": "{FORMAT}", "version": {VERSION - 1}, "settings": {{}}}}\n'
    path.write_text(older)
    with pytest.raises(OutputError, match=f"version is {VERSION - 1}, .*: give another -o, or"):
        Journal(path, settings, {})
    assert path.read_text() == older


def test_begun_anew_only_when_there_is_something_new(tmp_path: Path) -> None:
    path, cells = tmp_path / "j", [Cell("perplexity", "m", n, "a") for n in (2, 4)]
    with closing(Journal(path, {"seed": 0}, {"a": "1"})) as journal:
        journal.add(cells[0], "id", {"loss": 1})
    before = path.read_bytes()
    Journal(path, {"seed": 1}, {"a": "9"}, fresh=True).close()
    assert path.read_bytes() == before
    with closing(Journal(path, {"seed": 1}, {"a": "9"}, fresh=True)) as journal:
        for cell in cells:
            journal.add(cell, "id", {"loss": 2})
    with closing(Journal(path, {"seed": 1}, {"a": "9"})) as journal:
        assert [journal.find(cell, "id") for cell in cells] == [{"loss": 2}] * 2


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from longrope_export.errors import OutputError
from longrope_export.evaluate.run import open_journal
from longrope_export.evaluate.settings import Cell, Settings, Text
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
most = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
try:
    with open_journal(Path(sys.argv[1]), Settings((2,)), [Text("a", "b")]) as journal:
        journal.add(Cell("perplexity", "m", 2, "a"), "id", {"x": "y" * 800})
except OutputError as error:
    print(error)
"""


@pytest.mark.parametrize("most", [10, 600])  # bytes that a file may have: in its head, in a cell
def test_a_full_disk_is_said(tmp_path: Path, most: int) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "j"), str(most)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0 and "cannot write" in said.stdout, said.stderr


# the command


def test_logits_that_are_not_numbers_are_refused(root: Path, tmp_path: Path) -> None:
    """Weights that float16 cannot hold."""
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "m", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e8)
    shutil.copytree(root / "m", tmp_path / "m")
    model.save_pretrained(tmp_path / "m")
    words = [tmp_path / "m", "--text", "help.txt", "--lengths", 600, "-o", tmp_path / "r.json"]
    words += ["--keys", 1, "--values", 0]
    assert run_evaluate(root, *words).exit_code == 0
    for task in ("--perplexity", "--needle"):
        result = run_evaluate(root, *words, "--dtype", "float16", "--no-perplexity", task, "-f")
        assert result.exit_code == 2, result.output
        assert "(fp16) gave logits that are not numbers for position" in result.output


def test_side_by_side(root: Path, tmp_path: Path) -> None:
    words = ["m", "m-onnx", "--factors", "f.json", "--text", "help.txt", "--lengths", "400,128"]
    words += ["--passkey", "--needle", "--depths", "0.5", "--keys", "2", "--values", "2"]
    words += ["--threads", "1", "-o", str(tmp_path / "r.json")]
    result = run_evaluate(root, *words[:-2], "--no-perplexity", "--lengths", "900", *words[-2:])
    assert result.exit_code == 0, result.output
    assert "carries no definition: it is run as it is" in result.stderr
    assert "multikey" in result.stdout and "m + f" in result.stdout
    result = run_evaluate(root, *words, "--lengths", "900")
    assert result.exit_code == 0, result.output
    results = read_results(tmp_path / "r.json")
    assert [model["label"] for model in results["models"]] == ["m", "m + f", "m-onnx"]
    scores = {cell["model"]: cell for cell in cells_of(results, "perplexity", length=900)}
    assert scores["m-onnx"]["perplexity"] == pytest.approx(scores["m + f"]["perplexity"], rel=1e-3)
    assert abs(scores["m"]["loss"] - scores["m + f"]["loss"]) > 1e-3
    assert len({cell["tokens_sha256"] for cell in scores.values()}) == 1
    for kind, asked in (("passkey", 1), ("multikey", 2), ("multivalue", 2)):
        cells = {cell["model"]: cell for cell in cells_of(results, kind, length=900)}
        assert all(cell["numbers"] == asked for cell in cells.values())
        assert cells["m + f"]["answers"] == cells["m-onnx"]["answers"]
        assert cells["m"]["answers"] != cells["m + f"]["answers"]
    assert all(cell["peak_memory_bytes"] > 1 << 24 for cell in results["cells"])
    assert journal_path(tmp_path / "r.json").is_file()
    assert run_evaluate(root, *words, "--lengths", "900", "--json").stdout.startswith("{")


def test_wrong_use(root: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "x.json")
    text = ("--text", "help.txt")
    (root / "short.txt").write_text("Too short.")
    (root / "latin.txt").write_bytes(b"caf\xe9")
    for words, said in (
        (("m", "--text", "short.txt"), "expected at least 4096: give a longer --text"),
        (("m", "--text", "latin.txt"), "cannot be read as UTF-8"),
        (("m",), "need a --text"),
        (("m-onnx", *text, "--lengths", 4096), "made for 2000 tokens, --lengths has 4096"),
        ((f"genai={root / 'm-onnx'}", *text), "made for 2000 tokens, --lengths has 4096"),
        (("m-onnx", *text, "--factors", "f.json"), "--factors are put on models"),
        (("m", *text, "--lengths", "8,x"), "expected whole numbers with commas"),
        (("m", *text, "--lengths", "64", "--stride", 65), "--stride must be 1 to 64"),
        (("m", *text, "--lengths", "64", "--tokens", 63), "--tokens must be at least"),
        (("m", *text, "--passkey", "--depths", "2"), "--depths must be from 0 to 1"),
        (("nothing", *text), "expected a GGUF"),
        (
            ("m", *text, "--no-perplexity", "--needle", "--keys", 0, "--values", 0),
            "nothing to measure",
        ),
        (("m", *text, "--limit", 3), "--limit belongs to --tasks: here it would be ignored"),
        (("m", *text, "--include-path", root), "--include-path belongs to --tasks"),
        (("m", *text, "--needle", "--depths", "0.3"), "--depths belongs to --passkey"),
        (("m", *text, "--trials", 4), "--trials belongs to --passkey or --needle"),
        (("m", *text, "--lengths", "64", "--device", "bogus"), "--device bogus: "),
        (("m", *text, "--lengths", "64", "--device", "cuda:99"), "cannot be put there"),
    ):
        result = run_evaluate(root, *words, *out)
        assert result.exit_code == 2 and said in result.output, (words, result.output)
    assert not (tmp_path / "x.json").exists()
    result = run_evaluate(root, "m", *text, "--lengths", 64, "-o", root / "help.txt")
    assert result.exit_code == 2 and (root / "help.txt").read_text() == HELP


def test_no_output_takes_the_place_of_what_is_not_ours(root: Path, tmp_path: Path) -> None:
    words = ("m", "m-onnx", "--text", "help.txt", "--lengths", 64)
    for file in (root / "m" / "config.json", root / "m-onnx" / "model.onnx"):
        before = file.read_bytes()
        for options in ((), ("--force",)):
            result = run_evaluate(root, *words, *options, "-o", file)
            assert result.exit_code == 2 and file.read_bytes() == before, result.output
    for folder in (root / "m", root / "m-onnx"):
        result = run_evaluate(root, *words, "-o", folder / "results.json")
        assert result.exit_code == 2 and "choose another folder" in result.output
        assert not [*folder.glob("results*")]
    for content in ("[1]", '{"format": "notes"}', "caf\xe9"):
        notes = tmp_path / "notes.json"
        notes.write_text(content, encoding="latin-1")
        result = run_evaluate(root, *words, "-o", notes)
        assert result.exit_code == 2 and "use --force" in result.output
        assert notes.read_text(encoding="latin-1") == content
    assert run_evaluate(root, "m", *words[2:], "--force", "-o", notes).exit_code == 0
    assert run_evaluate(root, "m", *words[2:], "-o", notes).exit_code == 0


def test_how_hidden_numbers_are_shown() -> None:
    def cell(task: str, right: int, loss: float | None, trial: int = 0) -> dict[str, Any]:
        found = {"numbers_right": right, "numbers": 5, "digits_right": 6 * right, "digits": 30}
        return {"task": task, "model": "m", "length": 64, "trial": trial, "loss": loss, **found}

    for cells, shown in (
        ([cell("multikey", 1, 2.0), cell("multikey", 3, 1.0, 1)], "4/10 (40%; 1.5)"),
        ([cell("multikey", 1, 2.0), cell("multikey", 3, None, 1)], "4/10 (40%; -)"),
        ([cell("multivalue", 5, None)], "5/5 (100%)"),
    ):
        (table,) = tables({"models": [{"label": "m"}], "cells": cells})
        assert table.rows == (("m", shown),)
        assert ("-ln p" in table.title) == (";" in shown)


def test_brackets_in_names_are_shown() -> None:
    cell = {
        "task": "lm-eval",
        "model": "m[v2]",
        "length": 64,
        "text": "t[x]",
        "metrics": {"acc": 1.0},
    }
    results = {"models": [{"label": "m[v2]"}], "cells": [cell]}
    console = Console(width=200, record=True)
    console.print(*rich_tables(results))
    text = console.export_text()
    assert "m[v2]" in text and "t[x] acc" in text


def test_an_export_without_its_config(root: Path, tmp_path: Path) -> None:
    import onnx

    folder = tmp_path / "foreign"
    shutil.copytree(root / "m-onnx", folder)
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    del model.metadata_props[:]
    onnx.save(model, str(folder / "model.onnx"))
    result = run_evaluate(root, folder, "--text", "help.txt", "-o", tmp_path / "x.json")
    assert result.exit_code == 2 and "no metadata longrope.config" in result.output
    (root / "m-onnx" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    try:
        words = ("m-onnx", "--text", "help.txt", "--lengths", 64)
        result = run_evaluate(root, *words, "-o", tmp_path / "x.json")
        assert result.exit_code == 2 and "carries no tokenizer" in result.output
    finally:
        (tmp_path / "tokenizer.json").rename(root / "m-onnx" / "tokenizer.json")


def test_another_model_of_the_same_name_is_noticed(root: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "m", tmp_path / "r.json"
    shutil.copytree(root / "m", folder)
    words = (folder, "--text", "help.txt", "--lengths", 64, "--tokens", 200, "-o", out)
    assert run_evaluate(root, *words).exit_code == 0
    edit_json(folder / "config.json", rms_norm_eps=0.1)
    result = run_evaluate(root, *words)
    assert result.exit_code == 2 and "not what was measured there" in result.output
    before = read_results(out)["cells"][0]["loss"]
    assert run_evaluate(root, *words, "--force").exit_code == 0
    assert read_results(out)["cells"][0]["loss"] != before


def test_a_text_too_short_for_the_longest_prompt_is_found_first(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    (root / "medium.txt").write_text(HELP[:2000])
    words = ("m", "--no-perplexity", "--passkey", "--depths", "0.5", "-o", out, "--force")
    assert run_evaluate(root, *words, "--text", "help.txt", "--lengths", "600").exit_code == 0
    before = out.read_bytes(), journal_path(out).read_bytes()
    result = run_evaluate(root, *words, "--text", "medium.txt", "--lengths", "600,4000")
    assert result.exit_code == 2 and "too short to hide numbers in 4000" in result.output
    assert (out.read_bytes(), journal_path(out).read_bytes()) == before
