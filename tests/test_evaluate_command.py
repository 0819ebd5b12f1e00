"""evaluate: resuming, the command, lm-eval's tasks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from evaluated import HELP, Scripted, make_root
from rich.console import Console
from tiny_models import edit_json

from longrope_export.cli import main
from longrope_export.errors import OutputError
from longrope_export.evaluate.journal import Journal, journal_path
from longrope_export.evaluate.perplexity import score_text
from longrope_export.evaluate.results import cells_of, read_results, rich_tables
from longrope_export.evaluate.run import evaluate, open_journal
from longrope_export.evaluate.settings import Cell, Settings, Text
from longrope_export.evaluate.subjects import make_subjects
from longrope_export.runtimes.hf import HfModel
from longrope_export.runtimes.open import parse_export

MEASURED = ("seconds", "tokens_per_second", "generated_per_second", "peak_memory_bytes")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("evaluate"))


def run(root: Path, *words: object):  # type: ignore[no-untyped-def]
    """`evaluate` with paths below root."""
    known = {path.name for path in root.iterdir()}
    inside = [str(root / str(w)) if str(w) in known else str(w) for w in words]
    return CliRunner().invoke(main, ["evaluate", *inside])


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
    assert run(root, *words).exit_code == 0
    for task in ("--perplexity", "--needle"):
        result = run(root, *words, "--dtype", "float16", "--no-perplexity", task, "-f")
        assert result.exit_code == 2, result.output
        assert "(fp16) gave logits that are not numbers for position" in result.output


def test_side_by_side(root: Path, tmp_path: Path) -> None:
    words = ["m", "m-onnx", "--factors", "f.json", "--text", "help.txt", "--lengths", "400,128"]
    words += ["--passkey", "--needle", "--depths", "0.5", "--keys", "2", "--values", "2"]
    words += ["--threads", "1", "-o", str(tmp_path / "r.json")]
    result = run(root, *words[:-2], "--no-perplexity", "--lengths", "900", *words[-2:])
    assert result.exit_code == 0, result.output
    assert "carries no definition: it is run as it is" in result.stderr
    assert "multikey" in result.stdout and "m + f" in result.stdout
    result = run(root, *words, "--lengths", "900")
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
        assert cells["m + f"]["answers"] == cells["m-onnx"]["answers"]  # greedy, the same numbers
        assert cells["m"]["answers"] != cells["m + f"]["answers"]
    assert all(cell["peak_memory_bytes"] > 1 << 24 for cell in results["cells"])
    assert journal_path(tmp_path / "r.json").is_file()
    assert run(root, *words, "--lengths", "900", "--json").stdout.startswith("{")


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
        result = run(root, *words, *out)
        assert result.exit_code == 2 and said in result.output, (words, result.output)
    assert not (tmp_path / "x.json").exists()
    result = run(root, "m", *text, "--lengths", 64, "-o", root / "help.txt")
    assert result.exit_code == 2 and (root / "help.txt").read_text() == HELP


def test_no_output_takes_the_place_of_what_is_not_ours(root: Path, tmp_path: Path) -> None:
    words = ("m", "m-onnx", "--text", "help.txt", "--lengths", 64)
    for file in (root / "m" / "config.json", root / "m-onnx" / "model.onnx"):
        before = file.read_bytes()
        for options in ((), ("--force",)):
            result = run(root, *words, *options, "-o", file)
            assert result.exit_code == 2 and file.read_bytes() == before, result.output
    for folder in (root / "m", root / "m-onnx"):
        result = run(root, *words, "-o", folder / "results.json")
        assert result.exit_code == 2 and "choose another folder" in result.output
        assert not [*folder.glob("results*")]
    for content in ("[1]", '{"format": "notes"}', "caf\xe9"):
        notes = tmp_path / "notes.json"
        notes.write_text(content, encoding="latin-1")
        result = run(root, *words, "-o", notes)
        assert result.exit_code == 2 and "use --force" in result.output
        assert notes.read_text(encoding="latin-1") == content
    assert run(root, "m", *words[2:], "--force", "-o", notes).exit_code == 0
    assert run(root, "m", *words[2:], "-o", notes).exit_code == 0


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
    result = run(root, folder, "--text", "help.txt", "-o", tmp_path / "x.json")
    assert result.exit_code == 2 and "no metadata longrope.config" in result.output
    (root / "m-onnx" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    try:
        words = ("m-onnx", "--text", "help.txt", "--lengths", 64)
        result = run(root, *words, "-o", tmp_path / "x.json")
        assert result.exit_code == 2 and "carries no tokenizer" in result.output
    finally:
        (tmp_path / "tokenizer.json").rename(root / "m-onnx" / "tokenizer.json")


def test_another_model_of_the_same_name_is_noticed(root: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "m", tmp_path / "r.json"
    shutil.copytree(root / "m", folder)
    words = (folder, "--text", "help.txt", "--lengths", 64, "--tokens", 200, "-o", out)
    assert run(root, *words).exit_code == 0
    edit_json(folder / "config.json", rms_norm_eps=0.1)
    result = run(root, *words)
    assert result.exit_code == 2 and "not what was measured there" in result.output
    before = read_results(out)["cells"][0]["loss"]
    assert run(root, *words, "--force").exit_code == 0
    assert read_results(out)["cells"][0]["loss"] != before


def test_a_text_too_short_for_the_longest_prompt_is_found_first(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    (root / "medium.txt").write_text(HELP[:2000])
    words = ("m", "--no-perplexity", "--passkey", "--depths", "0.5", "-o", out, "--force")
    assert run(root, *words, "--text", "help.txt", "--lengths", "600").exit_code == 0
    before = out.read_bytes(), journal_path(out).read_bytes()
    result = run(root, *words, "--text", "medium.txt", "--lengths", "600,4000")
    assert result.exit_code == 2 and "too short to hide numbers in 4000" in result.output
    assert (out.read_bytes(), journal_path(out).read_bytes()) == before


# lm-eval


TASK = """task: toy_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
ROLLING = """task: toy_rolling
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""


@pytest.fixture
def task_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    words = HELP.split()
    docs = [
        {
            "question": " ".join(words[i : i + 12]),
            "choices": [" ".join(words[j : j + 3]) for j in (i + 12, i + 40, i + 80)],
            "answer": i // 100 % 3,
        }
        for i in range(0, 2000, 100)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, docs)))
    (folder / "text.jsonl").write_text(json.dumps({"text": HELP[:4000]}))
    (folder / "choice.yaml").write_text(TASK.format(data=folder / "data.jsonl"))
    (folder / "rolling.yaml").write_text(ROLLING.format(data=folder / "text.jsonl"))
    return folder


def test_tasks_score_as_lm_eval_alone(root: Path, task_folder: Path, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    out = tmp_path / "r.json"
    words = ["m", "m-onnx", "--tasks", "toy_choice,toy_rolling", "--include-path", task_folder]
    result = run(root, *words, "--lengths", 256, "-o", out)
    assert result.exit_code == 0, result.output
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "m", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "m")
    theirs = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, max_length=256, batch_size=1),
        tasks=["toy_choice", "toy_rolling"],
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    for cell in cells_of(read_results(out), "lm-eval", "m"):
        expected = theirs[cell["text"]]
        for name, value in cell["metrics"].items():
            assert value == pytest.approx(expected[f"{name},none"], rel=1e-5), (cell, expected)
    # the rolling perplexity of lm-eval against ours, on the same text
    bits = theirs["toy_rolling"]["bits_per_byte,none"] * len(HELP[:4000].encode())
    tokens = tokenizer(HELP[:4000]).input_ids
    ours = score_text(HfModel(root / "m"), tokens, 256)
    assert ours.perplexity == pytest.approx(2 ** (bits / len(tokens)), rel=1e-2)


def test_changed_tasks_are_not_taken_from_the_journal(
    root: Path, task_folder: Path, tmp_path: Path
) -> None:
    words = ["m", "--tasks", "toy_choice", "--include-path", task_folder, "--lengths", 256]
    words += ["-o", tmp_path / "r.json"]
    assert run(root, *words, "--limit", 5).exit_code == 0
    result = run(root, *words, "--limit", 6, "-f")
    assert result.exit_code == 0, result.output
    assert run(root, *words, "--limit", 6).exit_code == 0
    result = run(root, *words)
    assert result.exit_code == 2 and "--limit" in result.output
    assert run(root, *words, "--limit", 6, "--lengths", "128,512").exit_code == 0
    lines = journal_path(tmp_path / "r.json").read_text().splitlines()[1:]
    kept = [json.loads(line)["cell"] for line in lines]
    assert [cell["length"] for cell in kept] == [256, 512]  # what is kept of a request is another
    task = task_folder / "choice.yaml"
    task.write_text(task.read_text() + "# another\n")
    result = run(root, *words, "--limit", 6)
    assert result.exit_code == 2 and "--include-path" in result.output


def test_unknown_tasks(root: Path, task_folder: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "x.json")
    result = run(root, "m", "--tasks", "hellaswag", "--include-path", task_folder, *out)
    assert result.exit_code == 2 and "which has toy_choice, toy_rolling" in result.output
    result = run(root, "m", "--tasks", "hellaswag", *out)
    assert result.exit_code == 2 and "--include-path" in result.output


def test_tags_and_groups_are_refused_with_what_is_in_them(
    root: Path, task_folder: Path, tmp_path: Path
) -> None:
    """Refused before anything is measured: what they report is no number of one task."""
    rolling = task_folder / "rolling.yaml"
    rolling.write_text(rolling.read_text() + "tag: toy_tag\n")
    members = "- toy_rolling\n  - task: toy_choice\n    num_fewshot: 1\n"
    (task_folder / "group.yaml").write_text(f"group: toy_group\ntask:\n  {members}")
    for name, inside in (("toy_tag", "toy_rolling"), ("toy_group", "toy_choice,toy_rolling")):
        words = ("m", "--tasks", f"toy_choice,{name}", "--include-path", task_folder)
        result = run(root, *words, "-o", tmp_path / "x.json")
        assert result.exit_code == 2, result.output
        assert f"--tasks {name}: " in result.output and f"give {inside}\n" in result.output
    assert not (tmp_path / "x.json").exists()


def test_an_end_token_ends_a_generated_answer(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from longrope_export.evaluate.lm_eval_model import RuntimeLM

    request = SimpleNamespace(args=("q", {"until": ["\n"], "max_gen_toks": 6}))
    assert RuntimeLM(Scripted(tmp_path), 512).generate_until([request]) == ["42"]
