"""The small trained model: its name, its tokenizer, and that half a training leaves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from benchmarks import small_model
from benchmarks.small_model import HELD_OUT_TEXTS, TRAIN_TEXTS, trained_model
from longrope_export.demo.texts import SOURCES
from longrope_export.llama_cpp.cache import CACHE_VARIABLE
from longrope_export.models.model import load_model

TEXT = "Na\u00efve \u2014 don't,\n\n  \u4e2d\u6587 1234!\t"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, one text of nonsense, and a recipe of one step."""
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(32, 127)) * 20)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(small_model, "fetch_texts", lambda say: dict.fromkeys(TRAIN_TEXTS, text))
    monkeypatch.setitem(small_model.RECIPE, "steps", 1)
    return tmp_path / "cache" / "models"


def test_it_is_trained_once_and_a_change_of_the_recipe_gives_another(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    first = trained_model(said.append)
    assert any("training" in line for line in said)
    weights = (first / "model.safetensors").read_bytes()
    said.clear()
    assert trained_model(said.append) == first and not said
    monkeypatch.setitem(small_model.RECIPE, "matrix_rate", 0.01)
    other = trained_model()
    assert other != first and (other / "model.safetensors").read_bytes() != weights
    assert sorted(path.name for path in cache.iterdir() if path.is_dir()) == sorted(
        [first.name, other.name]
    )


def test_half_a_training_leaves_nothing_under_the_final_name(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            small_model, "_write_tokenizer", interrupted
        )  # the weights are written by then
        with pytest.raises(KeyboardInterrupt):
            trained_model()
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    assert (trained_model() / "tokenizer.json").is_file()


def test_a_token_is_a_byte_and_the_tool_knows_the_model(cache: Path) -> None:
    folder = trained_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT)["input_ids"]
    assert ids == list(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer("<bos>a<eos>")["input_ids"] == [256, 97, 257]
    model = load_model(folder)
    assert (model.window, model.head_dim, model.native.rope_theta) == (256, 64, 10000.0)


def test_held_out_works_exist_and_are_held_out() -> None:
    assert len(set(HELD_OUT_TEXTS)) >= 3 and not set(HELD_OUT_TEXTS) & set(TRAIN_TEXTS)
    names = {name for source in SOURCES for name in source.texts}
    assert {*HELD_OUT_TEXTS, *TRAIN_TEXTS} <= names
