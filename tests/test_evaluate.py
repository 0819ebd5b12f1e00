"""evaluate: windows and losses; hidden numbers: test_evaluate_needles; llama.cpp: integration/."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from evaluated import HELP, ladder, make_root

from longrope_export.errors import ConfigError
from longrope_export.evaluate.perplexity import make_windows, score_text
from longrope_export.evaluate.scoring import READ_CHUNK
from longrope_export.evaluate.settings import Cell, Settings, make_cells
from longrope_export.evaluate.subjects import make_subjects
from longrope_export.factor_files import to_json
from longrope_export.models.model import load_model
from longrope_export.runtimes.hf import HfModel
from longrope_export.runtimes.onnx import OnnxModel
from longrope_export.runtimes.open import parse_export


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("evaluate"))


def test_a_longer_length_is_another_cell_of_lm_eval() -> None:
    """It decides how much of a request is kept."""
    for lengths in ((16, 32), (16, 32, 64)):
        cells = make_cells(Settings(lengths, perplexity=False, tasks=("t",)), ["m"], [])
        assert cells == [Cell("lm-eval", "m", lengths[-1], "t")]


# windows and losses


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


def test_special_tokens_take_the_first_places_of_a_window(root: Path) -> None:
    """Side by side and sliding, against plain torch; each window has `length` tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "m", dtype=torch.float32)
    runtime, special = HfModel(root / "m"), [7, 9]
    tokens = [*special, *runtime.tokenize(HELP)[:198]]
    for stride in (None, 30):
        found = score_text(runtime, tokens, 50, stride=stride, beginning=special)
        losses, before = [], 0
        for end in range(50, 201, stride or 50):
            window = plain_losses(model, special + tokens[end - 48 : end])
            losses.append(window[-min(end - before, 48) :])
            before = end
        assert found.scored_tokens == sum(map(len, losses))
        assert found.loss == pytest.approx(torch.cat(losses).double().mean().item(), rel=1e-6)
    with pytest.raises(ConfigError, match="no room behind the 2 special tokens"):
        make_windows(10, 2, 1, num_special=2)


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
