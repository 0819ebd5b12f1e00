"""evaluate: windows, losses, hidden numbers, resuming, the command; llama.cpp: integration/."""

from __future__ import annotations

import json
import math
import pydoc_data.topics
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from test_onnx import export
from tiny_models import add_bpe_tokenizer, edit_json, make_model

from longrope_export.cli import main
from longrope_export.config import FactorTier, LongRopeConfig
from longrope_export.errors import ConfigError, OutputError
from longrope_export.evaluate.journal import Journal, journal_path
from longrope_export.evaluate.needle import Question, continuation, fit_prompt, make_puzzle
from longrope_export.evaluate.perplexity import make_windows, score_text
from longrope_export.evaluate.results import cells_of, read_results
from longrope_export.evaluate.run import evaluate, open_journal
from longrope_export.evaluate.scoring import READ_CHUNK, Generation
from longrope_export.evaluate.settings import Settings, Text
from longrope_export.evaluate.subjects import make_subjects
from longrope_export.factor_files import to_json
from longrope_export.models.model import load_model
from longrope_export.runtimes.hf import HfModel
from longrope_export.runtimes.onnx import OnnxModel
from longrope_export.runtimes.open import parse_export

HELP = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))[:60_000]
MEASURED = ("seconds", "tokens_per_second", "generated_per_second", "peak_memory_bytes")


def ladder(folder: Path) -> LongRopeConfig:
    """Borders at 300, 600 and 2000 tokens; factors and attention factors that matter."""
    native = load_model(folder).native
    ramp = np.linspace(0, 1, native.num_pairs)

    def tier(length: int, ratio: float, attention: float) -> FactorTier:
        return FactorTier(length, tuple((ratio**ramp).tolist()), 3, attention)

    return LongRopeConfig(
        rope_theta=native.rope_theta,
        rotary_dim=native.rotary_dim,
        original_max_position_embeddings=256,
        max_position_embeddings=2000,
        tiers=(tier(300, 1, 1.0), tier(600, 3, 1.1), tier(2000, 8, 1.2)),
        provenance={"method": "by hand"},
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """m: a source model whose attention matters; f.json: factors; m-onnx: both; help.txt."""
    folder = tmp_path_factory.mktemp("evaluate")
    settings = {"initializer_range": 0.15, "eos_token_id": 1}
    source = make_model(folder / "m", dtype="float32", **settings)
    add_bpe_tokenizer(source)
    config = ladder(source)
    (folder / "f.json").write_text(json.dumps(to_json(config)))
    export(source, config, folder / "m-onnx")
    (folder / "help.txt").write_text(HELP)
    return folder


def run(root: Path, *words: object):  # type: ignore[no-untyped-def]
    """`evaluate` with paths below root."""
    known = {path.name for path in root.iterdir()}
    inside = [str(root / str(w)) if str(w) in known else str(w) for w in words]
    return CliRunner().invoke(main, ["evaluate", *inside])


# windows and losses


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


@pytest.mark.parametrize(("tokens", "length", "stride"), [(100, 20, 20), (103, 20, 7), (20, 20, 1)])
def test_every_token_is_scored_once_with_what_the_window_allows(
    tokens: int, length: int, stride: int
) -> None:
    seen = []
    for window in make_windows(tokens, length, stride):
        assert window.end - window.begin == length and window.end <= tokens
        seen += range(window.end - window.scored, window.end)
    assert len(seen) == len(set(seen))
    missing = set(range(tokens)) - set(seen)
    assert missing == set(range(0, tokens - tokens % length, length) if stride == length else [0])


def test_windows_out_of_range() -> None:
    for arguments in ((10, 11, 1), (10, 1, 1), (10, 5, 6), (10, 5, 0)):
        with pytest.raises(ConfigError):
            make_windows(*arguments)


def plain_losses(model: Any, tokens: list[int]) -> torch.Tensor:
    """-ln p of tokens[1:], in one forward of transformers' own model."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")


@pytest.mark.parametrize("stride", [None, 100])
def test_perplexity_is_that_of_plain_torch(root: Path, stride: int | None) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "m", dtype=torch.float32)
    tokens = transformers.AutoTokenizer.from_pretrained(root / "m")(HELP).input_ids[:1400]
    length, step = 256, stride or 256
    losses, before = [], 0
    for end in [*range(length, 1400, step), 1400]:
        window = plain_losses(model, tokens[end - length : end])
        losses.append(window[-min(end - before, length - 1) :])
        before = end
    expected = torch.cat(losses).double().mean().item()
    runtime = HfModel(root / "m")
    assert runtime.tokenize(HELP)[:1400] == tokens
    found = score_text(runtime, tokens, length, stride=stride)
    assert found.loss == pytest.approx(expected, rel=1e-6)
    assert found.scored_tokens == sum(map(len, losses))
    sums = sum(s.loss * s.tokens for s in found.stretches)
    assert sums / found.scored_tokens == pytest.approx(found.loss)
    if stride is None:  # the last window overlaps: its beginning is not scored again
        begin = torch.cat([window[:15] for window in losses[:-1]])
        assert found.stretches[0].loss == pytest.approx(begin.mean().item(), rel=1e-5)


def test_runtimes_agree_and_hold_few_rows(root: Path) -> None:
    config = ladder(root / "m")
    runtimes = [HfModel(root / "m", config=config), OnnxModel(root / "m-onnx", threads=1)]
    most = []

    def watched(runtime: Any) -> Any:
        start = runtime.start

        def started(**options: Any) -> Any:
            sequence = start(**options)
            append = sequence.append

            def appended(*tokens: Any, **how: Any) -> Any:
                rows = append(*tokens, **how)
                most.append(len(rows))
                return rows

            sequence.append = appended
            return sequence

        runtime.start = started
        return runtime

    tokens = runtimes[0].tokenize(HELP)[:1000]
    hf, onnx = (score_text(watched(runtime), tokens, 1000) for runtime in runtimes)
    assert onnx.perplexity == pytest.approx(hf.perplexity, rel=1e-4)
    for one, other in zip(hf.stretches, onnx.stretches, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
    plain = score_text(HfModel(root / "m"), tokens[:256], 256)
    assert abs(plain.loss / score_text(runtimes[0], tokens[:256], 256).loss - 1) < 1e-6
    assert max(most) <= READ_CHUNK < 999


def test_factors_change_what_lies_behind_the_first_border(root: Path) -> None:
    tokens = HfModel(root / "m").tokenize(HELP)[:600]
    with_factors = score_text(HfModel(root / "m", config=ladder(root / "m")), tokens, 600)
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "m", dtype=torch.float32)
    without = plain_losses(model, tokens)
    assert with_factors.stretches[2].loss == pytest.approx(without[74:112].mean().item(), rel=1e-2)
    assert abs(with_factors.stretches[-1].loss / without[562:].mean().item() - 1) > 1e-2


def test_factors_are_put_on_a_folder_that_we_wrote(root: Path, tmp_path: Path) -> None:
    """From a GGUF, `safetensors` writes plain RoPE as a definition: no reason to ignore factors."""
    copy = tmp_path / "copy"
    shutil.copytree(root / "m", copy)
    (copy / "longrope.json").write_text(json.dumps(to_json(load_model(root / "m").native)))
    assert load_model(copy).has_definition and not load_model(copy).is_extended
    subjects = make_subjects([parse_export(str(copy))], [root / "f.json"])
    tokens = HfModel(root / "m").tokenize(HELP)[:600]
    expected = [HfModel(root / "m", config=ladder(root / "m"))]
    found = [subject.open(600, threads=1, build=False) for subject in subjects]
    losses = [score_text(runtime, tokens, 600).loss for runtime in (*found, *expected)]
    assert losses[1] == pytest.approx(losses[2]) and abs(losses[0] - losses[1]) > 1e-3


# hidden numbers


@pytest.mark.parametrize("kind", ["passkey", "multikey", "multivalue"])
def test_prompts_fill_their_length_and_hold_what_is_asked(root: Path, kind: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "m")
    count = 1 if kind == "passkey" else 3
    puzzle = make_puzzle(kind, 6000, 0, 7, depth=0.5, count=count)
    assert puzzle == make_puzzle(kind, 6000, 0, 7, depth=0.5, count=count)
    assert puzzle != make_puzzle(kind, 6000, 1, 7, depth=0.5, count=count)
    tokens, room = fit_prompt(puzzle, HELP, 6000, lambda text: tokenizer(text).input_ids)
    later = sum(len(tokenizer(q.text).input_ids) for q in puzzle.questions[1:])
    needed = later + sum(q.most_tokens for q in puzzle.questions)
    assert needed <= room <= needed + 8 and len(tokens) + room == 6000
    text = tokenizer.decode(tokens)
    values = [value for question in puzzle.questions for value in question.values]
    assert len(set(values)) == count and all(len(value) == 6 for value in values)
    for (depth, sentence), value in zip(puzzle.facts, sorted(values, key=text.index), strict=True):
        assert sentence in text and value in sentence
        assert abs(text.index(sentence) / len(text) - depth) < 0.1
    assert text.endswith(puzzle.questions[0].text)


def test_prompts_that_do_not_fit(root: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "m")
    puzzle = make_puzzle("multikey", 100, 0, 0, count=5)
    with pytest.raises(ConfigError, match="too short for 5 hidden"):
        fit_prompt(puzzle, HELP, 100, lambda text: tokenizer(text).input_ids)
    with pytest.raises(ConfigError, match="text is too short"):
        fit_prompt(puzzle, HELP[:300], 2000, lambda text: tokenizer(text).input_ids)
    with pytest.raises(ConfigError, match="task riddle is not known"):
        make_puzzle("riddle", 100, 0, 0)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (" 123456. Remember", (6, 1)),
        (" 123499", (4, 0)),
        (" 1234567", (6, 0)),
        (" none", (0, 0)),
        (" is 923456 or 123456", (5, 0)),
    ],
)
def test_digits_are_compared_place_by_place(answer: str, score: tuple[int, int]) -> None:
    assert Question("?", ("123456",)).score(answer) == score


def test_several_values_count_in_any_order() -> None:
    question = Question("?", ("111111", "222222", "333333"))
    assert question.score(" 333333, 111111 and 444444.") == (12, 2)
    assert question.is_answered(" 111111\nAnd") and not question.is_answered("\n 111111, 2")
    assert Question("?", ("111111",)).is_answered(" 111111.")


def test_a_later_question_has_no_beginning_of_text() -> None:
    assert continuation("cd", lambda text: [1, *map(ord, text)]) == [99, 100]
    assert continuation("cd", lambda text: list(map(ord, text))) == [99, 100]


@pytest.mark.parametrize("name", ["m", "m-onnx"])
def test_answers_are_what_transformers_generates(root: Path, name: str) -> None:
    """Two questions in one sequence, against generate() on the whole text each time."""
    runtime = HfModel(root / "m") if name == "m" else OnnxModel(root / "m-onnx", threads=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "m", dtype=torch.float32)
    prompt, more = runtime.tokenize(HELP)[:100], runtime.tokenize(" And then?")
    generation = Generation(runtime, runtime.start())
    text: list[int] = []
    for given in (prompt, more):
        made, said = generation.answer(given, 8, lambda _: False)
        text += given
        ids = torch.tensor([text])
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        # min_new_tokens forbids the end token: ours would go on behind it
        assert made == expected[0, len(text) :].tolist()
        assert said == runtime.detokenize(made)
        text += made
    assert generation.sequence.length == len(text) - 1
    assert generation.read[0] + generation.made[0] == len(text) - 1


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
    before = path.read_bytes()
    for content in ("hello\n", "{}\n", "[1]\n", '{"format": 1}\n'):
        path.write_text(content)
        with pytest.raises(OutputError, match="not the journal"):
            Journal(path, settings, {})
        assert path.read_text() == content
    path.write_bytes(before)
    Journal(path, {**settings, "seed": 1}, {"a": "9"}, fresh=True).close()
    assert json.loads(path.read_text())["settings"]["seed"] == 1


# the command


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
        (("m-onnx", *text, "--factors", "f.json"), "--factors are put on models"),
        (("m", *text, "--lengths", "8,x"), "expected whole numbers with commas"),
        (("m", *text, "--lengths", "64", "--stride", 65), "--stride must be 1 to 64"),
        (("m", *text, "--lengths", "64", "--tokens", 63), "--tokens must be at least"),
        (("m", *text, "--depths", "2"), "--depths must be from 0 to 1"),
        (("nothing", *text), "expected a GGUF"),
    ):
        result = run(root, *words, *out)
        assert result.exit_code == 2 and said in result.output, (words, result.output)
    assert not (tmp_path / "x.json").exists()
    result = run(root, "m", *text, "--lengths", 64, "-o", root / "help.txt")
    assert result.exit_code == 2 and (root / "help.txt").read_text() == HELP


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
    assert ours.loss == pytest.approx(bits * math.log(2) / len(tokens), rel=1e-2)


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
