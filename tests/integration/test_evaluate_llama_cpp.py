"""evaluate on the patched llama.cpp: the same perplexity and answers as transformers and ONNX."""

from __future__ import annotations

import math
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_longrope_tools import Server
from test_onnx import export
from test_patched_llama_cpp import BORDERS, Toy, convert
from tiny_models import add_sentencepiece, make_model

from longrope_export.cli import main
from longrope_export.errors import ToolError
from longrope_export.evaluate.needle import beginning
from longrope_export.evaluate.perplexity import score_text
from longrope_export.evaluate.results import cells_of, read_results
from longrope_export.evaluate.scoring import window_losses
from longrope_export.factor_files import dump_factors
from longrope_export.llama_cpp.binaries import require_binaries
from longrope_export.llama_cpp.perplexity import run_perplexity
from longrope_export.runtimes.llama_cpp import LlamaCppModel

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("patched")]

HELP = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))[:30_000]
TARGET = BORDERS[-1]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("evaluate"), "llama")


@pytest.mark.parametrize("rule", ["causal", "sequence"])
def test_one_model_in_three_formats(toy: Toy, rule: str, tmp_path: Path) -> None:
    config = toy.config(rule)
    (tmp_path / "f.json").write_text(dump_factors(config))
    (tmp_path / "help.txt").write_text(HELP)
    onnx = export(toy.folder, config, tmp_path / "onnx")
    gguf = toy.gguf(config, f"evaluate-{rule}")
    words = [toy.folder, onnx, gguf, "--factors", tmp_path / "f.json"]
    words += ["--text", tmp_path / "help.txt", "--lengths", f"230,{TARGET}", "--tokens", 1000]
    words += ["--passkey", "--depths", "0.5", "--threads", 1, "-o", tmp_path / "r.json"]
    result = CliRunner().invoke(main, ["evaluate", *map(str, words)])
    assert result.exit_code == 0, result.output
    results = read_results(tmp_path / "r.json")
    plain, ours, *others = [model["label"] for model in results["models"]]
    assert len(others) == 2
    for length in (230, TARGET):
        (expected,) = cells_of(results, "perplexity", ours, length)
        for label in others:
            (found,) = cells_of(results, "perplexity", label, length)
            assert found["tokens_sha256"] == expected["tokens_sha256"]
            assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-3)
            for one, other in zip(found["stretches"], expected["stretches"], strict=True):
                assert one[2] == pytest.approx(other[2], rel=1e-3)
    (without,) = cells_of(results, "perplexity", plain, TARGET)
    assert abs(without["loss"] / expected["loss"] - 1) > 2e-3
    answers = [cells_of(results, "passkey", m, TARGET)[0]["answers"] for m in (ours, *others)]
    assert answers[0] == answers[1] == answers[2]


@pytest.fixture
def subject(toy: Toy, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """The toy without factors, for a runtime."""
    if request.param == "server":
        program = require_binaries(("llama-server",), build=True) / "llama-server"
        server = Server(program, toy.plain, tmp_path, [])
        try:
            server.wait()
            yield server.url
        finally:
            server.process.terminate()
            server.process.wait(10)
        return
    path = toy.plain if request.param == "llama.cpp-stock" else toy.folder
    if request.param == "genai":
        path = export(toy.folder, None, tmp_path / "onnx")
    yield f"{request.param}={path}"


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(
    "subject", ["llama.cpp-stock", "transformers-stock", "genai", "server"], indirect=True
)
def test_other_runtimes_say_the_same(toy: Toy, subject: str, tmp_path: Path) -> None:
    (tmp_path / "help.txt").write_text(HELP)
    words = [subject, toy.folder, "--text", tmp_path / "help.txt", "--lengths", 200]
    result = CliRunner().invoke(
        main, ["evaluate", *map(str, words), "--threads", "1", "-o", str(tmp_path / "r.json")]
    )
    assert result.exit_code == 0, result.output
    one, other = cells_of(read_results(tmp_path / "r.json"), "perplexity")
    assert one["tokens_sha256"] == other["tokens_sha256"]
    assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-3)


def test_length_of_one_window_is_not_written_to_the_disk(toy: Toy) -> None:
    """Rows go through a file, which stays empty."""
    model = LlamaCppModel(toy.plain, context=512)
    tokens = model.tokenize(HELP)[:500]
    found = window_losses(model, tokens, 499)
    assert model._output.stat().st_blocks * 512 < 4 * model.vocabulary * 300
    with torch.no_grad():
        logits = toy.model(torch.tensor([tokens])).logits[0, :-1]
    targets = torch.tensor(tokens[1:])
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    np.testing.assert_allclose(found.values, expected.numpy(), atol=2e-4)
    assert model.detokenize(tokens) == toy_text(toy, tokens)
    model.close()


def toy_text(toy: Toy, tokens: list[int]) -> str:
    import transformers

    return str(transformers.AutoTokenizer.from_pretrained(toy.folder).decode(tokens))


@pytest.mark.parametrize("begins", [False, True], ids=["plain", "begin-of-text"])
def test_llama_perplexity_says_the_same(toy: Toy, begins: bool, tmp_path: Path) -> None:
    """Its windows: side by side, the second half scored, a begin-of-text token in the first place."""
    # the patched program: the stock one loses what it prints where a run takes milliseconds
    program = require_binaries(("llama-perplexity",), build=True) / "llama-perplexity"
    context, chunks = 256, 6
    path, text = toy.plain, tmp_path / "help.txt"
    if begins:
        settings = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15}
        folder = make_model(tmp_path / "m", dtype="float32", **settings)
        add_sentencepiece(folder)
        path = tmp_path / "m.gguf"
        convert(folder, None, path)
    text.write_text(HELP)
    options = ("-fa", "off", "-ctk", "f32", "-ctv", "f32", "-b", "256", "--no-warmup")
    theirs = run_perplexity(program, path, text, context=context, chunks=chunks, options=options)
    model = LlamaCppModel(path, context=context)
    tokens = model.tokenize(HELP)
    first = beginning(model.tokenize)
    assert first == ([1] if begins else [])
    score = score_text(
        model, tokens[: chunks * context], context, beginning=first, num_stretches=context
    )
    second_half = [s.loss for s in score.stretches if s.begin > context // 2]
    assert math.exp(np.mean(second_half)) == pytest.approx(theirs.value, rel=1e-3)
    model.close()


def test_a_file_that_llama_cpp_refuses(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\3\0\0\0")
    (tmp_path / "help.txt").write_text(HELP)
    words = [tmp_path / "bad.gguf", "--text", tmp_path / "help.txt", "-o", tmp_path / "r.json"]
    result = CliRunner().invoke(main, ["evaluate", *map(str, words)])
    assert result.exit_code == 2 and "bad.gguf" in result.output
    assert not isinstance(result.exception, ToolError)
