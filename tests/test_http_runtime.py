"""verify over HTTP: a small server that answers as vLLM does, with what a torch model computes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from tiny_models import add_bpe_tokenizer, make_model

from longrope_export.cli import main
from longrope_export.config import FactorTier, LongRopeConfig, SwitchPolicy
from longrope_export.errors import ConfigError, ModelError
from longrope_export.evaluate.results import read_results
from longrope_export.evaluate.scoring import Generation, window_losses
from longrope_export.factor_files import to_json
from longrope_export.hf_runtime import apply_longrope
from longrope_export.models.model import load_model
from longrope_export.runtimes.hf import HfModel
from longrope_export.runtimes.http import HttpModel
from longrope_export.runtimes.open import Export, parse_export
from longrope_export.verify.certificate import content_hash
from longrope_export.verify.compare import Limit, compare, compare_log_probabilities
from longrope_export.verify.plan import make_cases, of_prefixes, rows_of
from longrope_export.verify.rows import ReferenceRows
from longrope_export.verify.run import ExportResult, verify_export

LENGTH, TARGET, VOCABULARY = 40, 64, 320
TOKENS = np.random.default_rng(5).integers(3, 300, LENGTH).tolist()
LIMITS = {"unknown": Limit(1e-3, 1e-6, 1e-7)}
TEXT = "A model trained on short text reads long text. " * 4


class Vllm:
    """/v1/models, /v1/completions, /tokenize and /version over a transformers model.

    Attributes:
        max_logprobs: more are refused, as vLLM does.
        as_ids: False names tokens by their texts, whatever is asked.
        answers: path -> (status, body) that are sent instead.
    """

    def __init__(self, folder: Path, config: LongRopeConfig) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        apply_longrope(self.model, config)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.max_logprobs, self.as_ids, self.max_model_len = VOCABULARY, True, TARGET
        self.answers: dict[str, tuple[int, str]] = {}
        self.requests: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer({})

            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def answer(self, body: dict[str, Any]) -> None:
                status, text = server.answers.get(self.path) or server.answer(self.path, body)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        if path == "/v1/models":
            model = {"id": "tiny", "max_model_len": self.max_model_len}
            return 200, json.dumps({"data": [model]})
        if path == "/version":
            return 200, json.dumps({"version": "0.0.test"})
        if path == "/detokenize":
            return 200, json.dumps({"prompt": self.tokenizer.decode(body["tokens"])})
        if path == "/tokenize":
            return 200, json.dumps({"tokens": self.tokenizer(body["prompt"]).input_ids})
        if path != "/v1/completions":
            return 404, json.dumps({"detail": "Not Found"})
        if body["logprobs"] > self.max_logprobs:
            message = f"Requested sample logprobs of {body['logprobs']}, which is too many"
            return 400, json.dumps({"error": {"message": message, "code": 400}})
        with self._lock, torch.no_grad():
            self.requests.append(body)
            logits = self.model(torch.tensor([body["prompt"]]), logits_to_keep=1).logits[0, -1]
        values, ids = torch.log_softmax(logits, -1).topk(body["logprobs"])
        named = self.as_ids and body["return_tokens_as_token_ids"]
        names = [f"token_id:{i}" if named else self.tokenizer.decode([i]) for i in ids.tolist()]
        top = dict(zip(names, values.tolist(), strict=True))
        choice = {"text": "", "logprobs": {"top_logprobs": [top]}}
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 1}
        return 200, json.dumps({"model": "tiny", "choices": [choice], "usage": usage})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("http") / "m", dtype="float32")
    add_bpe_tokenizer(folder)
    return folder


def two_tiers(
    folder: Path, switch: str = "causal", attention_factor: float = 1.2
) -> LongRopeConfig:
    native = load_model(folder).native
    pairs = native.num_pairs
    tiers = (
        FactorTier(32, (1.0,) * pairs),
        FactorTier(TARGET, tuple(np.linspace(1, 4, pairs).tolist()), 5, attention_factor),
    )
    return LongRopeConfig(
        native.rope_theta, native.rotary_dim, 32, TARGET, tiers, SwitchPolicy(switch)
    )


@pytest.fixture
def serve(folder: Path) -> Iterator[Callable[[LongRopeConfig], Vllm]]:
    running: list[Vllm] = []

    def start(config: LongRopeConfig) -> Vllm:
        running.append(Vllm(folder, config))
        return running[-1]

    yield start
    for server in running:
        server.http.shutdown()
        server.http.server_close()


@pytest.fixture
def server(folder: Path, serve: Callable[[LongRopeConfig], Vllm]) -> Vllm:
    return serve(two_tiers(folder))


def verify(
    server: Vllm,
    folder: Path,
    config: LongRopeConfig,
    length: int = LENGTH,
    text: str | None = None,
) -> ExportResult:
    tokens = TOKENS
    if text is not None:
        tokens = (server.tokenizer(text).input_ids * LENGTH)[:length]
    cases = make_cases(config, length)
    reference = ReferenceRows(folder, config, tokens, cases)
    export = parse_export(server.url)
    return verify_export(export, config, tokens, cases, reference, limits=LIMITS, text=text)


@pytest.mark.parametrize("switch", ["causal", "sequence"])
@pytest.mark.parametrize("named", [VOCABULARY, 20])
def test_a_server_that_computes_the_definition_passes(
    folder: Path, serve: Callable[[LongRopeConfig], Vllm], switch: str, named: int
) -> None:
    config = two_tiers(folder, switch)
    server = serve(config)
    server.max_logprobs = named
    result = verify(server, folder, config)
    assert result.passed, (result.problems, [case.first_miss for case in result.cases])
    assert result.info is not None and result.info.log_probabilities == named
    assert result.info.version == "0.0.test"
    compared = {row.position for case in result.cases for row in case.rows}
    assert compared == set(range(LENGTH))
    assert max(case.difference.difference.max() for case in result.cases) < 1e-4


def test_fewer_tokens_may_be_asked_for(server: Vllm) -> None:
    model = HttpModel(server.url, vocabulary=VOCABULARY, named=50)
    row = model.start().append(TOKENS[:5], keep=1)
    assert model.info.log_probabilities == np.isfinite(row).sum() == 50
    server.max_logprobs = 3
    with pytest.raises(ModelError, match=r"400 .*logprobs of 5, which is too many"):
        HttpModel(server.url, vocabulary=VOCABULARY)


@pytest.mark.parametrize("named", [VOCABULARY, 20])
def test_another_attention_factor_is_caught_at_the_border(
    folder: Path, serve: Callable[[LongRopeConfig], Vllm], named: int
) -> None:
    server = serve(two_tiers(folder, attention_factor=1.25))
    server.max_logprobs = named
    result = verify(server, folder, two_tiers(folder))
    assert not result.problems and not result.passed
    assert [case.first_miss for case in result.cases[:1]] == [32]


def test_the_tokenizer_of_the_server_is_compared(server: Vllm, folder: Path) -> None:
    config = two_tiers(folder)
    assert verify(server, folder, config, text=TEXT).passed
    server.answers["/tokenize"] = (200, json.dumps({"tokens": [7, 8, 9]}))
    result = verify(server, folder, config, text=TEXT)
    assert [problem[:10] for problem in result.problems] == ["tokenizer:"]
    server.answers["/tokenize"] = (404, "")
    assert HttpModel(server.url, vocabulary=VOCABULARY).tokenize(TEXT) is None


def test_rows_and_requests(server: Vllm) -> None:
    model = HttpModel(server.url + "/v1/", vocabulary=VOCABULARY)
    sequence = model.start()
    server.requests.clear()
    rows = sequence.append(TOKENS[:6], keep=2)
    assert rows.shape == (2, VOCABULARY) and rows.dtype == np.float32
    assert np.allclose(np.exp(rows).sum(1), 1, atol=1e-5)
    assert [request["prompt"] for request in server.requests] == [TOKENS[:5], TOKENS[:6]]
    assert sequence.append(TOKENS[6:7]).shape == (1, VOCABULARY) and sequence.length == 7
    assert sequence.append(TOKENS[7:9], keep=0).shape == (0, VOCABULARY)
    assert np.array_equal(model.start().append(TOKENS[:6], keep=1), rows[1:])
    together = model.batch([TOKENS[:3], TOKENS[:6]], 2)
    assert np.array_equal(together[1], rows)
    with pytest.raises(ModelError, match="from 0"):
        model.start(first_position=8)


def test_texts_for_tokens_are_refused(server: Vllm) -> None:
    server.as_ids = False
    with pytest.raises(ModelError, match="names tokens by their texts"):
        HttpModel(server.url, vocabulary=VOCABULARY)


def test_another_vocabulary_is_refused(server: Vllm) -> None:
    server.max_logprobs = 200
    with pytest.raises(ModelError, match=r"names token \d+, the vocabulary has 100"):
        HttpModel(server.url, vocabulary=100)
    with pytest.raises(ModelError, match="how many tokens"):
        HttpModel(server.url)


def test_a_server_without_room_is_told_before_anything_runs(server: Vllm, folder: Path) -> None:
    server.max_model_len = LENGTH
    result = verify(server, folder, two_tiers(folder))
    assert not result.cases and f"give --length {LENGTH - 1}" in result.problems[0]
    assert verify(server, folder, two_tiers(folder), LENGTH - 1).passed


@pytest.mark.parametrize(
    ("path", "answer", "said"),
    [
        ("/v1/models", (503, '{"error": {"message": "Loading model"}}'), "503 .*: Loading model"),
        ("/v1/models", (200, "<html>hello</html>"), "not answer in JSON, but b'<html>"),
        ("/v1/models", (200, '{"models": []}'), "not answer as llama-server or vLLM"),
        ("/v1/completions", (500, "out of\nmemory"), "500 .*: out of memory"),
        ("/v1/completions", (200, '{"usage": {"prompt_tokens": 9}}'), "read 9 tokens"),
        ("/v1/completions", (200, '{"usage": {"prompt_tokens": 1}}'), "KeyError"),
        ("/v1/completions", (200, "[]"), "not answer as llama-server or vLLM"),
        ("/props", (401, '{"message": "no key"}'), "401 .*: no key"),
    ],
)
def test_wrong_answers(server: Vllm, path: str, answer: tuple[int, str], said: str) -> None:
    server.answers[path] = answer
    with pytest.raises(ModelError, match=said):
        HttpModel(server.url, vocabulary=VOCABULARY)


def test_nobody_there_and_a_server_that_is_silent(server: Vllm) -> None:
    server.http.handle_error = lambda *_: None  # type: ignore[method-assign]  # we hang up
    model = HttpModel(server.url, vocabulary=VOCABULARY, timeout=2)
    with server._lock, pytest.raises(ModelError, match=r"silent for 2 seconds"):
        model.start().append(TOKENS[:3], keep=1)
    server.http.shutdown()
    server.http.server_close()
    for url in (server.url, "http://", "http://no such host"):
        with pytest.raises(ModelError, match="cannot be reached"):
            HttpModel(url, vocabulary=VOCABULARY)


def test_addresses(folder: Path) -> None:
    address = "http://127.0.0.1:8080/v1"
    for text in (address, f"server={address}"):
        assert parse_export(text) == Export("server", address)
    with pytest.raises(ModelError):
        parse_export(f"server={folder}")
    assert content_hash(address) is None


def test_the_command_and_what_it_writes(server: Vllm, folder: Path, tmp_path: Path) -> None:
    factors, certificate, card = (tmp_path / name for name in ("f.json", "c.json", "card.md"))
    factors.write_text(json.dumps(to_json(two_tiers(folder))))
    words = ["verify", folder, server.url, "--factors", factors, "--length", LENGTH]
    words += ["--limit", "unknown=1e-6:1e-7:1e-3", "-o", certificate, "--markdown", card]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    (found,) = json.loads(certificate.read_text())["exports"]
    assert found["path"] == server.url and found["sha256"] is None and found["passed"]
    assert f"log probabilities, of {VOCABULARY} tokens" in card.read_text()


def test_rows_of_log_probabilities_are_compared_as_logits_are() -> None:
    generator = np.random.default_rng(1)
    right = generator.normal(size=(4, 50)).astype(np.float32) * 3
    wrong = right + generator.normal(size=right.shape).astype(np.float32) * 0.5
    given = np.log(softmax(wrong)).astype(np.float32)
    following = [3, None, 7, 9]
    full = compare(wrong, right, following)
    found = compare_log_probabilities(given, right, following)
    assert np.allclose(found.kl, full.kl, atol=1e-7)
    assert np.allclose(found.loss, full.loss, atol=1e-6, equal_nan=True)
    assert found.same_top.tolist() == full.same_top.tolist()
    expected = np.abs(given - np.log(softmax(right)))
    assert np.allclose(found.difference, expected.max(1), atol=1e-5)
    # ten tokens named: the others are one outcome
    top = np.argsort(-given, axis=1)[:, :10]
    some = np.full_like(given, np.nan)
    np.put_along_axis(some, top, np.take_along_axis(given, top, 1), 1)
    p, q = (np.take_along_axis(softmax(x), top, 1) for x in (right, wrong))
    p, q = (np.concatenate([x, 1 - x.sum(1, keepdims=True)], 1) for x in (p, q))
    found = compare_log_probabilities(some, right, following)
    assert np.allclose(found.kl, (p * np.log(p / q)).sum(1), rtol=2e-2, atol=1e-3)
    assert np.allclose(found.difference, np.take_along_axis(expected, top, 1).max(1), atol=1e-5)
    assert (found.kl <= full.kl + 1e-9).all()
    named = [token in top[row] for row, token in enumerate(following)]
    assert np.isfinite(found.loss).tolist() == named


def softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


def test_what_a_server_leaves_out_is_not_forgiven() -> None:
    right = np.log(np.asarray([[0.5, 0.3, 0.1, 0.1]], np.float32))
    nothing = np.full_like(right, np.nan)
    missing = right.copy()
    missing[0, 0] = np.nan  # half of the mass, which the answer gives to nobody
    assert compare_log_probabilities(missing, right, [None]).kl[0] < 1e-9
    named_too_little = missing + np.float32(np.log(1.9))  # 0.95 of it where 0.5 is right
    assert compare_log_probabilities(named_too_little, right, [None]).kl[0] > 0.5
    all_of_it = missing + np.float32(np.log(2.1))  # more than 1: nothing is left for the rest
    assert compare_log_probabilities(all_of_it, right, [None]).kl[0] > 4
    underflow = np.asarray([[0, -3.4e38, -3.4e38, -3.4e38]], np.float32)
    sure = np.asarray([[200, 0, -5, 9]], np.float32)
    assert compare_log_probabilities(underflow, sure, [None]).difference[0] < 1e-9
    assert compare_log_probabilities(underflow, right, [None]).difference[0] > 70
    with pytest.raises(ConfigError, match="1 rows are empty"):
        compare_log_probabilities(nothing, right, [None])


def test_the_rows_that_a_server_can_answer(folder: Path) -> None:
    """Under `sequence` only those whose tier is that of a text that ends there."""
    config = two_tiers(folder, "sequence")
    for case in make_cases(config, LENGTH):
        if case.origin:
            continue
        rows = rows_of(of_prefixes(case, config), config)
        assert all(row.tier == (row.position >= 32) for row in rows)
        own = {row for row in rows_of(case, config) if row.tier == (row.position >= 32)}
        assert set(rows) == own or (case.batch and rows and set(rows) < own)
    causal = replace(config, switch=SwitchPolicy.CAUSAL)
    assert all(of_prefixes(case, causal) == case for case in make_cases(causal, LENGTH))


def test_evaluate_on_a_server(server: Vllm, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(json.dumps(to_json(two_tiers(folder))))
    (tmp_path / "text.txt").write_text(TEXT * 3)
    options = ["--factors", tmp_path / "f.json", "--text", tmp_path / "text.txt"]
    options += ["--lengths", 40, "--tokens", 80, "-o", tmp_path / "r.json"]
    words = [str(word) for word in ("evaluate", server.url, folder, *options)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    cells = {cell["model"]: cell for cell in read_results(tmp_path / "r.json")["cells"]}
    there, plain, here = (cells[name] for name in (server.url, "m", "m + f"))
    assert there["loss"] == pytest.approx(here["loss"], rel=1e-5)
    assert there["peak_memory_bytes"] is None and plain["loss"] != here["loss"]
    again = CliRunner().invoke(main, words)
    assert again.exit_code == 0, again.output
    before = len(server.requests)
    served = {"id": "tiny", "root": "another", "max_model_len": TARGET}
    server.answers["/v1/models"] = (200, json.dumps({"data": [served]}))
    changed = CliRunner().invoke(main, words)
    assert changed.exit_code == 2 and "is not what was measured there" in changed.output
    assert len(server.requests) == before
    words = ["evaluate", server.url, *words[5:-1], str(tmp_path / "alone.json")]
    alone = CliRunner().invoke(main, words)
    assert alone.exit_code == 2 and "does not say how many tokens" in alone.output


def test_a_server_continues_as_the_model_does(server: Vllm, folder: Path) -> None:
    local = HfModel(folder, config=two_tiers(folder))
    remote = HttpModel(server.url, vocabulary=VOCABULARY)
    prompt = local.tokenize(TEXT)[:30]
    made = [Generation(m, m.start()).answer(prompt, 6, lambda _: False) for m in (local, remote)]
    assert made[0] == made[1] and made[0][1]


def test_a_token_that_a_server_does_not_name_has_no_loss(server: Vllm) -> None:
    server.max_logprobs = 5
    with pytest.raises(ModelError, match="names 5 tokens in each row"):
        window_losses(HttpModel(server.url, vocabulary=VOCABULARY), TOKENS[:20], 19)
