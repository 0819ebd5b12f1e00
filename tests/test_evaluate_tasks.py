"""evaluate: lm-eval's tasks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from evaluated import HELP, Scripted, make_root, run_evaluate

from longrope_export.evaluate.journal import journal_path
from longrope_export.evaluate.perplexity import score_text
from longrope_export.evaluate.results import cells_of, read_results
from longrope_export.runtimes.hf import HfModel


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("tasks"))


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
    result = run_evaluate(root, *words, "--lengths", 256, "-o", out)
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
    assert run_evaluate(root, *words, "--limit", 5).exit_code == 0
    result = run_evaluate(root, *words, "--limit", 6, "-f")
    assert result.exit_code == 0, result.output
    assert run_evaluate(root, *words, "--limit", 6).exit_code == 0
    result = run_evaluate(root, *words)
    assert result.exit_code == 2 and "--limit" in result.output
    assert run_evaluate(root, *words, "--limit", 6, "--lengths", "128,512").exit_code == 0
    lines = journal_path(tmp_path / "r.json").read_text().splitlines()[1:]
    kept = [json.loads(line)["cell"] for line in lines]
    assert [cell["length"] for cell in kept] == [256, 512]  # what is kept of a request is another
    task = task_folder / "choice.yaml"
    task.write_text(task.read_text() + "# another\n")
    result = run_evaluate(root, *words, "--limit", 6)
    assert result.exit_code == 2 and "--include-path" in result.output


def test_unknown_tasks(root: Path, task_folder: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "x.json")
    result = run_evaluate(root, "m", "--tasks", "hellaswag", "--include-path", task_folder, *out)
    assert result.exit_code == 2 and "which has toy_choice, toy_rolling" in result.output
    result = run_evaluate(root, "m", "--tasks", "hellaswag", *out)
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
        result = run_evaluate(root, *words, "-o", tmp_path / "x.json")
        assert result.exit_code == 2, result.output
        assert f"--tasks {name}: " in result.output and f"give {inside}\n" in result.output
    assert not (tmp_path / "x.json").exists()


def test_an_end_token_ends_a_generated_answer(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from longrope_export.evaluate.lm_eval_model import RuntimeLM

    request = SimpleNamespace(args=("q", {"until": ["\n"], "max_gen_toks": 6}))
    assert RuntimeLM(Scripted(tmp_path), 512).generate_until([request]) == ["42"]


def test_nothing_ends_a_request(tmp_path: Path) -> None:
    """Some tokenizers put an end token behind every text."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from longrope_export.evaluate.lm_eval_model import RuntimeLM

    runtime = Scripted(tmp_path)
    runtime.tokenize = lambda text: [7, *map(ord, text), 0]
    model = RuntimeLM(runtime, 512)
    assert model.tok_encode("ab") == [7, 97, 98]
    assert model.tok_encode("ab", add_special_tokens=False) == [97, 98]
