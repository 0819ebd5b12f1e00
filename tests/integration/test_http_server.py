"""`verify` on a running llama-server of the patched build: a toy of three tiers over HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import transformers
from click.testing import CliRunner
from test_longrope_tools import Server
from test_patched_llama_cpp import BORDERS, Toy

from longrope_export.cli import main
from longrope_export.config import LongRopeConfig
from longrope_export.errors import ModelError
from longrope_export.factor_files import to_json
from longrope_export.llama_cpp.binaries import require_binaries
from longrope_export.runtimes.http import HttpModel
from longrope_export.runtimes.http_servers import served_model
from longrope_export.runtimes.open import parse_export
from longrope_export.verify.plan import make_cases
from longrope_export.verify.rows import ReferenceRows
from longrope_export.verify.run import ExportResult, verify_export

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("programs")]

LENGTH, ROOM = 140, 255  # the slots of Server hold 256 tokens
TOKENS = np.random.default_rng(11).integers(3, 300, LENGTH).tolist()
SAME = 2e-4


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("server"), "llama")


@pytest.fixture(scope="module")
def address(
    toy: Toy, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[LongRopeConfig], str]]:
    """Starts a llama-server, once for each rule."""
    program = require_binaries(("llama-server",), build=True) / "llama-server"
    running: dict[str, Server] = {}

    def start(config: LongRopeConfig) -> str:
        if config.switch not in running:
            gguf = toy.gguf(config, config.switch)
            running[config.switch] = Server(program, gguf, tmp_path_factory.mktemp("run"), [])
            running[config.switch].wait()
        return running[config.switch].url

    yield start
    for server in running.values():
        server.process.terminate()
        server.process.wait(10)


def verify(
    toy: Toy, url: str, config: LongRopeConfig, tokens: list[int], text: str | None = None
) -> ExportResult:
    cases = make_cases(config, len(tokens))
    reference = ReferenceRows(toy.folder, config, tokens, cases)
    return verify_export(parse_export(url), config, tokens, cases, reference, text=text)


@pytest.mark.parametrize("rule", ["causal", "sequence"])
def test_the_patched_server_computes_the_definition(
    toy: Toy, address: Callable[[LongRopeConfig], str], rule: str
) -> None:
    config = toy.config(rule)
    result = verify(toy, address(config), config, TOKENS)
    assert result.passed, (result.problems, first_misses(result))
    assert result.info is not None
    assert (result.info.name, result.info.precision) == ("llama-server", "fp32")
    assert max(case.difference.difference.max() for case in result.cases) < SAME
    steps = next(case for case in result.cases if case.case.name == "one by one over borders")
    near = {border + step for border in BORDERS[:2] for step in (-2, -1, 0, 1, 2)}
    assert near <= {row.position for row in steps.rows}
    assert {row.tier for row in steps.rows} == {0, 1, 2}


def test_another_model_at_the_same_address_is_told(
    toy: Toy, address: Callable[[LongRopeConfig], str]
) -> None:
    one, other = (served_model(address(toy.config(rule))) for rule in ("causal", "sequence"))
    assert one == served_model(address(toy.config("causal")))
    assert "causal.gguf" in one and one != other


def first_misses(result: ExportResult) -> dict[str, int | None]:
    return {case.case.name: case.first_miss for case in result.cases}


@pytest.mark.parametrize("fault", ["attention_factor", "rescale_factors", "num_start_tokens"])
def test_a_wrong_factors_file_is_caught_at_the_border(
    toy: Toy, address: Callable[[LongRopeConfig], str], fault: str
) -> None:
    right = toy.config("causal")
    first, second, last = right.tiers
    factors = second.rescale_factors
    changes = {
        "attention_factor": second.attention_factor**2,
        "rescale_factors": (factors[0], *factors[:-1]),
        "num_start_tokens": second.num_start_tokens - 1,
    }
    wrong = replace(right, tiers=(first, replace(second, **{fault: changes[fault]}), last))
    result = verify(toy, address(right), wrong, TOKENS[:70])
    assert not result.problems and not result.passed
    found = first_misses(result)
    assert found["one prefill"] == found["one by one over borders"] == BORDERS[0]


def test_tokens_vocabulary_and_room(toy: Toy, address: Callable[[LongRopeConfig], str]) -> None:
    config = toy.config("causal")
    url = address(config)
    text = "A model trained on short text reads long text, 0 1 2 3. \u00e9\u4e2d"
    tokens = transformers.AutoTokenizer.from_pretrained(toy.folder)(text).input_ids
    assert HttpModel(url).tokenize(text) == tokens
    assert verify(toy, url, config, (tokens * 9)[:40], text).passed
    with pytest.raises(ModelError, match="with 320 tokens in its vocabulary, expected 32000"):
        HttpModel(url, vocabulary=32000)
    with pytest.raises(ModelError, match="exceeds the available context size"):
        HttpModel(url).start().append([5] * (ROOM + 1), keep=1)
    result = verify(toy, url, config, [5] * (ROOM + 1))
    assert not result.cases and f"--length {ROOM}" in result.problems[0]


def test_the_command(toy: Toy, address: Callable[[LongRopeConfig], str], tmp_path: Path) -> None:
    config = toy.config("causal")
    factors, certificate = tmp_path / "f.json", tmp_path / "certificate.json"
    factors.write_text(json.dumps(to_json(config)))
    words = ["verify", toy.folder, address(config), "--factors", factors, "--length", 72]
    words += ["-o", certificate]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    (found,) = json.loads(certificate.read_text())["exports"]
    assert found["passed"] and found["sha256"] is None and found["log_probabilities"] == 320
