"""The exported folder in onnxruntime-genai, which we did not write."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
import pytest
from test_onnx import CLOSE, export, make_source, three_tiers, tokens
from tiny_models import CHAT_TEMPLATE, add_bpe_tokenizer, edit_json

from longrope_converters.to_onnx.convert import OnnxConverter, OnnxOptions
from longrope_export.config import LongRopeConfig, SwitchPolicy
from longrope_export.errors import ModelError
from longrope_export.honours import Verdict
from longrope_export.models.model import load_model
from longrope_export.runtimes.genai import GenaiModel
from longrope_export.verify.reference import Reference

STEPS = 12


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_source(tmp_path_factory.mktemp("genai") / "model")
    add_bpe_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(source, three_tiers(source), tmp_path_factory.mktemp("genai") / "out")


def run(folder: Path, prompt: np.ndarray, max_length: int | None) -> tuple[list[int], np.ndarray]:
    """Greedy tokens and the logits that they were chosen from."""
    model = genai.Model(str(folder))
    settings = genai.GeneratorParams(model)
    if max_length is not None:
        settings.set_search_options(max_length=max_length)
    settings.set_search_options(do_sample=False)
    generator = genai.Generator(model, settings)
    generator.append_tokens(prompt[None].astype(np.int32))
    logits = []
    for _ in range(STEPS):
        logits.append(generator.get_logits()[0, -1].copy())
        generator.generate_next_token()
    return generator.get_sequence(0)[len(prompt) :].tolist(), np.stack(logits)


def one_tier(config: LongRopeConfig, length: int) -> LongRopeConfig:
    """The tier of `length`, for everything: what max_length pins."""
    tier = replace(config.select_tier(length), max_length=config.max_position_embeddings)
    return replace(config, tiers=(tier,), switch=SwitchPolicy.SEQUENCE)


@pytest.mark.parametrize("max_length", [64, 100, 128, None])
def test_max_length_picks_the_tier_of_the_whole_sequence(
    source: Path, exported: Path, max_length: int | None
) -> None:
    config = three_tiers(source)
    prompt = tokens(50)
    generated, logits = run(exported, prompt, max_length)
    reference = Reference(source, one_tier(config, max_length or 256))
    expected = reference.logits([*prompt, *generated])[49 : 49 + STEPS]
    np.testing.assert_allclose(logits, expected, atol=CLOSE)
    assert generated == expected.argmax(1).tolist()


def test_standard_operators_run_the_tier_given_at_export(tmp_path: Path, source: Path) -> None:
    config = three_tiers(source)
    folder = export(source, config, tmp_path / "out", ops="standard", max_length=120)
    prompt = tokens(60)
    generated, logits = run(folder, prompt, None)
    expected = Reference(source, one_tier(config, 120)).logits([*prompt, *generated])
    np.testing.assert_allclose(logits, expected[59 : 59 + STEPS], atol=CLOSE)


def test_a_batch_of_unequal_prompts(exported: Path) -> None:
    model = genai.Model(str(exported))
    tokenizer = genai.Tokenizer(model)
    texts = ["Every file that comes out of a converter", "Numbers"]
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=60, batch_size=2, do_sample=False)
    generator = genai.Generator(model, settings)
    generator.append_tokens(tokenizer.encode_batch(texts))
    for _ in range(STEPS):
        generator.generate_next_token()
    for row, text in enumerate(texts):
        prompt = np.asarray(tokenizer.encode(text))
        alone, _ = run(exported, prompt, 60)
        together = generator.get_sequence(row).tolist()
        assert any(
            together[start : start + STEPS] == alone for start in range(len(together) - STEPS + 1)
        )


def test_null_tokens_in_generation_config_leave_those_of_config(tmp_path: Path) -> None:
    folder = make_source(tmp_path / "model")
    edit_json(folder / "config.json", bos_token_id=3, eos_token_id=[4, 5], pad_token_id=6)
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    (folder / "generation_config.json").write_text(json.dumps(tokens))
    output = export(folder, None, tmp_path / "out")
    model = json.loads((output / "genai_config.json").read_text())["model"]
    assert [model[key] for key in tokens] == [3, [4, 5], 6]


def test_settings_tokenizer_and_report(tmp_path: Path, source: Path) -> None:
    converter = OnnxConverter(OnnxOptions(max_length=200))
    config = three_tiers(source)
    output = tmp_path / "out"
    report = converter.convert(load_model(source), config, output, lambda _: None)
    settings = json.loads((output / "genai_config.json").read_text())
    assert settings["model"]["type"] not in ("phi3", "phimoe", "phi3small")
    assert settings["model"]["context_length"] == 256
    assert settings["search"]["max_length"] == 200
    assert (output / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    tokenizer = genai.Tokenizer(genai.Model(str(output)))
    told = tokenizer.apply_chat_template(json.dumps([{"role": "user", "content": "hi"}]))
    assert told == "<|user|>hi" and "role" in CHAT_TEMPLATE
    cells = report.honours["onnxruntime-genai"]
    assert cells["switch"].verdict is Verdict.NO
    assert cells["num_start_tokens"].verdict is Verdict.YES
    assert any("under the tier up to 256" in note for note in report.notes)
    pinned = converter.convert(
        load_model(source),
        replace(config, switch=SwitchPolicy.SEQUENCE),
        tmp_path / "other",
        lambda _: None,
    )
    assert pinned.honours["onnxruntime-genai"]["switch"].verdict is Verdict.YES


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts the threads of Linux")
def test_threads_are_as_many_as_asked_for(exported: Path) -> None:
    def started(threads: int) -> int:
        gc.collect()  # models of other tests have threads too
        before = len(list(Path("/proc/self/task").iterdir()))
        model = GenaiModel(exported, threads=threads)
        after = len(list(Path("/proc/self/task").iterdir()))
        del model
        return after - before

    started(1)  # the first one starts threads of the library too
    one = started(1)
    assert started(4) == one + 3


def test_more_tokens_than_fit_are_our_error(exported: Path) -> None:
    with pytest.raises(ModelError, match="onnxruntime-genai cannot run a sequence"):
        GenaiModel(exported, max_length=20).start().append(tokens(30))
    with pytest.raises(ModelError, match="onnxruntime-genai cannot run a sequence"):
        GenaiModel(exported).start(declared_length=10**9)
