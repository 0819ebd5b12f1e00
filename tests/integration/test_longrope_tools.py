"""The programs of the patched llama.cpp under the rule `sequence`: the length picks one tier for all tokens.

A random model with borders at 64, 128 and 256 tokens. What the programs generate is compared with a
torch model that computes every length from scratch under its own tier (longrope_reference.py).
"""

from __future__ import annotations

import json
import math
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import SENTENCES, add_bpe_tokenizer, make_model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from longrope_converters.to_gguf.convert import GgufConverter, GgufOptions
from longrope_export.config import FactorTier, LongRopeConfig, SwitchPolicy
from longrope_export.llama_cpp.binaries import require_binaries
from longrope_export.llama_cpp.perplexity import run_perplexity
from longrope_export.models.model import load_model
from longrope_export.verify.reference import reference_logits

pytestmark = pytest.mark.integration

BORDERS = (64, 128, 256)
BEGIN, END = 0, 1  # special tokens, which are never generated here
# a batch smaller than a tier, float32 cache, exact attention
EXACT = ("-b", "32", "-ub", "32", "-t", "1", "-fa", "off", "-ctk", "f32", "-ctv", "f32")


class Reference:
    """The model in torch, and what it says about a sequence whose tier changes as it grows."""

    def __init__(self, folder: Path, config: LongRopeConfig) -> None:
        self.config = config
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def log_probs(self, tokens: list[int], first: int) -> np.ndarray:
        """(len(tokens) - first, vocab): of token i, given tokens[:i] under the tier of i tokens."""
        rows = np.zeros((len(tokens) - first, self.model.config.vocab_size))
        low = 0
        for index, border in enumerate(BORDERS):
            lengths = [n for n in range(first, len(tokens)) if low < n <= border]
            low = border
            if lengths:
                part = tokens[: lengths[-1]]
                logits = reference_logits(
                    self.model, self.config, part, tier_at=lambda _, index=index: index
                )
                log_probs = torch.log_softmax(logits.double(), -1).numpy()
                for n in lengths:
                    rows[n - first] = log_probs[n - 1]
        return rows


@pytest.fixture(scope="module")
def programs() -> Path:
    names = ("llama-completion", "llama-server", "llama-perplexity")
    return require_binaries(names, build=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    """The GGUF under `sequence`, and the same model in torch."""
    folder = tmp_path_factory.mktemp("tools")
    make_model(folder / "m", "llama", dtype="float32", initializer_range=0.2)
    add_bpe_tokenizer(folder / "m")
    model = load_model(folder / "m")
    pairs, theta = model.native.num_pairs, model.native.rope_theta
    tiers = tuple(
        FactorTier(border, tuple(np.linspace(1, last, pairs).tolist()), start, attention)
        for border, last, start, attention in zip(
            BORDERS, (1.0, 2.0, 4.0), (0, 5, 9), (1.0, 1.05, 1.1), strict=True
        )
    )
    config = LongRopeConfig(
        theta, model.native.rotary_dim, BORDERS[0], BORDERS[-1], tiers, SwitchPolicy.SEQUENCE
    )
    output = folder / "model.gguf"
    GgufConverter(GgufOptions(outtype="f32", pre="gpt-2")).convert(
        model, config, output, lambda _: None
    )
    return output, Reference(folder / "m", config)


@pytest.fixture(scope="module")
def gguf(made: tuple[Path, Reference]) -> Path:
    return made[0]


@pytest.fixture(scope="module")
def reference(made: tuple[Path, Reference]) -> Reference:
    return made[1]


def random_tokens(n: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(2, 300, n).tolist()  # type: ignore[no-any-return]


#
# llama-completion
#


def complete(
    programs: Path, gguf: Path, session: Path, prompt: str, n_predict: int, *options: str
) -> list[int]:
    """Prompt and greedy continuation, from the session file that the program leaves."""
    command = [str(programs / "llama-completion"), "-m", str(gguf), "-c", "256", "-no-cnv"]
    command += ["-p", prompt, "-n", str(n_predict), "--temp", "0", "--ignore-eos", *EXACT]
    command += ["--prompt-cache", str(session), *options]
    subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    data = session.read_bytes()
    count = struct.unpack_from("<3I", data)[2]
    return list(struct.unpack_from(f"<{count}i", data, 12))


def misses(reference: Reference, tokens: list[int], first: int) -> int:
    """How many of tokens[first:] are not the reference's best choice."""
    log_probs = reference.log_probs(tokens, first)
    log_probs[:, END] = -np.inf
    chosen = log_probs[np.arange(len(log_probs)), tokens[first:]]
    return int((chosen < log_probs.max(1) - 1e-3).sum())


def test_greedy_completion_across_two_borders(
    programs: Path, gguf: Path, reference: Reference, tmp_path: Path
) -> None:
    prompt = SENTENCES[0]
    tokens = complete(programs, gguf, tmp_path / "a", prompt, 150, "--prompt-cache-all")
    first = len(tokens) - 150
    assert 0 < first < BORDERS[0]
    assert misses(reference, tokens, first) == 0
    causal = ("--prompt-cache-all", "--longrope-switch", "causal")
    other = complete(programs, gguf, tmp_path / "b", prompt, 150, *causal)
    assert misses(reference, other, first) > 10  # the check sees the difference


def test_a_prompt_of_several_batches_and_its_session(
    programs: Path, gguf: Path, reference: Reference, tmp_path: Path
) -> None:
    """The session is used again within a tier, and dropped when the longer prompt needs another."""
    session = tmp_path / "session"
    text = " ".join(SENTENCES[:3])
    prompt = complete(programs, gguf, session, text[:90], 1)
    for part in (text[:110], text):
        before = len(prompt)
        complete(programs, gguf, session, part, 1)
        copy = tmp_path / "copy"
        copy.write_bytes(session.read_bytes())
        tokens = complete(programs, gguf, copy, part, 30, "--prompt-cache-all")
        prompt = tokens[: len(tokens) - 30]
        assert len(prompt) > before
        assert misses(reference, tokens, len(prompt)) == 0
    assert len(prompt) > BORDERS[0]


def test_options_that_do_nothing_are_named(
    programs: Path, gguf: Path, reference: Reference, tmp_path: Path
) -> None:
    plain = tmp_path / "plain.gguf"
    folder = load_model(gguf.parent / "m")
    GgufConverter(GgufOptions(outtype="f32", pre="gpt-2")).convert(
        folder, None, plain, lambda _: None
    )
    length, causal = ("--longrope-length", "100"), ("--longrope-switch", "causal")
    for model, options, expected in (
        (plain, length, ["--longrope-length is ignored"]),
        (plain, causal, ["--longrope-switch is ignored"]),
        (gguf, (*causal, *length), ["--longrope-length is ignored"]),
        (gguf, length, []),
        (gguf, causal, []),
    ):
        command = [str(programs / "llama-completion"), "-m", str(model), "-c", "256", "-no-cnv"]
        command += ["-p", "x", "-n", "1", *EXACT, *options]
        run = subprocess.run(  # a random model writes any bytes
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=True,
        )
        said = [line for line in run.stderr.splitlines() if "is ignored" in line]
        assert len(said) == len(expected), run.stderr
        assert all(words in line for words, line in zip(expected, said, strict=True))
    negative = [str(programs / "llama-completion"), "-m", str(gguf), "--longrope-length", "-1"]
    run = subprocess.run(
        negative, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    assert run.returncode != 0 and "must not be negative" in run.stderr


#
# llama-server
#


class Server:
    """A running llama-server with two slots of 256 tokens."""

    def __init__(self, program: Path, gguf: Path, folder: Path, never: list[int]) -> None:
        self.never = never
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        command = [str(program), "-m", str(gguf), "--port", self.url.rsplit(":", 1)[1], *EXACT]
        command += ["-c", "512", "-np", "2", "--no-kv-unified", "--no-warmup"]
        command += ["--slot-save-path", str(folder), "--context-shift"]
        self.log = folder / "server.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def wait(self) -> None:
        for _ in range(300):
            if self.process.poll() is not None:
                break
            try:
                urllib.request.urlopen(self.url + "/health", timeout=5).close()
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        raise AssertionError("llama-server did not start:\n" + self.log.read_text()[-2000:])

    def post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)

    def generate(self, prompt: list[int], n_predict: int, slot: int, **body: Any) -> Any:
        """Sampled at temperature 1, so that the text does not fall into a loop."""
        settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 7}
        settings |= {"n_probs": 1, "return_tokens": True, "id_slot": slot}
        settings |= {"logit_bias": [[token, False] for token in self.never]}
        return self.post("/completion", prompt=prompt, n_predict=n_predict, **(settings | body))


@pytest.fixture
def server(programs: Path, gguf: Path, reference: Reference, tmp_path: Path) -> Iterator[Server]:
    # the server reports no probabilities of tokens that are half a character
    texts = [reference.tokenizer.decode([i]) for i in range(reference.model.config.vocab_size)]
    never = [i for i, text in enumerate(texts) if not text or not text.isascii()]
    running = Server(programs / "llama-server", gguf, tmp_path, never)
    try:
        running.wait()
        yield running
    finally:
        running.process.terminate()
        running.process.wait(10)


def largest_difference(reference: Reference, prompt: list[int], answer: Any) -> float:
    """Between the log probabilities of the generated tokens in the answer and in the reference."""
    tokens = prompt + answer["tokens"]
    log_probs = reference.log_probs(tokens, len(prompt))
    expected = log_probs[np.arange(len(log_probs)), answer["tokens"]]
    got = [entry["logprob"] for entry in answer["completion_probabilities"]]
    return float(np.abs(expected - got).max())


def test_server_with_a_long_and_a_short_slot_at_once(server: Server, reference: Reference) -> None:
    long, short = random_tokens(100, 1), random_tokens(20, 2)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(server.generate, long, 80, 0)
        two = pool.submit(server.generate, short, 120, 1)
        for prompt, answer in ((long, one.result()), (short, two.result())):
            assert len(answer["tokens"]) == answer["timings"]["predicted_n"] in (80, 120)
            assert answer["timings"]["prompt_n"] == len(prompt)
            assert largest_difference(reference, prompt, answer) < 1e-3


def test_server_reuses_a_prefix_of_the_same_tier_only(server: Server, reference: Reference) -> None:
    prompt, cached = random_tokens(40, 3), 0
    for more, reused in ((5, True), (30, False), (10, True), (70, False)):
        answer = server.generate(prompt, 8, 0)
        assert answer["timings"]["cache_n"] == cached
        assert largest_difference(reference, prompt, answer) < 1e-3
        prompt = prompt + answer["tokens"]
        cached = len(prompt) - 1 if reused else 0
        prompt = prompt + random_tokens(more, more)
    answer = server.generate(prompt, 8, 0)
    assert answer["timings"]["cache_n"] == 0
    assert largest_difference(reference, prompt, answer) < 1e-3
    short = server.generate(prompt[:50], 8, 0)  # back to the first tier
    assert short["timings"]["cache_n"] == 0
    assert largest_difference(reference, prompt[:50], short) < 1e-3


def test_server_restores_a_slot_of_the_same_tier_only(server: Server, reference: Reference) -> None:
    prompt = random_tokens(60, 4)
    server.generate(prompt, 1, 0)
    server.post("/slots/0?action=save", filename="slot.bin")
    for longer, cached in (([*prompt, 9, 8], 60), (prompt + random_tokens(20, 5), 0)):
        server.post("/slots/1?action=restore", filename="slot.bin")
        answer = server.generate(longer, 8, 1)
        assert answer["timings"]["cache_n"] == cached
        assert largest_difference(reference, longer, answer) < 1e-3


def test_server_computes_the_rest_again_when_a_context_shift_changes_the_tier(
    server: Server, reference: Reference
) -> None:
    prompt = random_tokens(240, 6)
    answer = server.generate(prompt, 40, 0, n_discard=200)
    assert answer["truncated"]
    # 255 tokens are cached when the 256th, already sampled, asks for the shift
    before = 256 - len(prompt)
    tokens = prompt + answer["tokens"]
    kept = tokens[200:256]
    after = {
        "tokens": answer["tokens"][before:],
        "completion_probabilities": answer["completion_probabilities"][before:],
    }
    assert len(after["tokens"]) > 10
    assert largest_difference(reference, kept, after) < 1e-3


#
# llama-perplexity
#


def test_perplexity_declares_the_length_of_its_chunks(
    programs: Path, gguf: Path, reference: Reference, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(SENTENCES * 20))
    program = programs / "llama-perplexity"
    got = run_perplexity(program, gguf, text, context=256, options=EXACT).value
    tokens = reference.tokenizer.encode(text.read_text()).ids[:256]
    for length, agrees in ((256, True), (128, False)):
        logits = reference_logits(reference.model, reference.config, tokens, length=length)
        losses = torch.nn.functional.cross_entropy(
            logits[:-1].double(), torch.tensor(tokens[1:]), reduction="none"
        )
        expected = math.exp(losses[128:].mean().item())
        assert (abs(got / expected - 1) < 2e-4) == agrees
