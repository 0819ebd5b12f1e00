"""Offloaded layers: the numbers of the resident model, bit for bit, and nothing kept."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from tiny_models import SENTENCES, add_bpe_tokenizer, make_model

from longrope_export.cli import main
from longrope_export.config import SwitchPolicy
from longrope_export.errors import ConfigError, UnsupportedError
from longrope_export.hf_runtime import apply_longrope
from longrope_export.ladder import make_config
from longrope_export.models.model import load_model
from longrope_export.models.offload import Offload, load_offloaded_model, offload_to_cpu
from longrope_export.models.torch_model import load_torch_model
from longrope_export.search import scorer as scorer_module
from longrope_export.search.jobs import Document, Job
from longrope_export.search.scorer import Scorer

WINDOW, LENGTH = 64, 192
IDS = tuple(torch.randint(3, 300, (LENGTH,), generator=torch.Generator().manual_seed(2)).tolist())
FAMILIES = ["llama", "gemma3", "qwen3_moe", "mixtral"]


# large enough for a BLAS that looks at the alignment of weights
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 768}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """With two, gradients of a mixture differ from run to run, resident or not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_toy(folder: Path, family: str) -> Path:
    experts = EXPERTS if family == "qwen3_moe" else {}
    return make_model(folder, family, dtype="bfloat16", max_position_embeddings=WINDOW, **experts)


def jobs_of(folder: Path, family: str) -> list[Job]:
    """A job of each kind that the family allows."""
    model = load_model(folder)
    one = make_config(model, "yarn", LENGTH, switch=SwitchPolicy.SEQUENCE)
    ladder = make_config(model, "yarn", LENGTH, ladder="64,128,192")
    jobs = [
        Job(one, 0),
        Job(ladder, 0),
        Job(one, 0, ((0, 32), (100, 132))),
        Job(ladder, 0, ((100, 160), (170, 192)), ladder),
    ]
    if family != "gemma3":  # its sliding layers are not rescaled: gradients are refused
        jobs += [Job(one, 0, gradient=True), Job(one, 0)]
    return jobs


def scorers(folder: Path, place: str, dtype: str) -> tuple[Scorer, Scorer]:
    """Resident and offloaded, both on the CPU."""
    documents = [Document(IDS)]
    resident = Scorer(folder, documents, WINDOW, dtype)
    if place == "disk":
        return resident, Scorer(folder, documents, WINDOW, dtype, offload=Offload("disk"))
    model, _ = load_torch_model(folder, dtype)
    offload_to_cpu(model, "cpu")  # the hooks are those of a GPU, which is not there
    return resident, Scorer.of_model(model, documents, WINDOW)


def devices(scorer: Scorer) -> set[str]:
    """Of the weights of all layers."""
    layers = scorer.model.get_decoder().layers
    return {parameter.device.type for parameter in layers.parameters()}


def losses_in(log: str) -> list[object]:
    """Of a search log, line by line."""
    return [json.loads(line)["losses"] for line in log.splitlines()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("place", ["disk", "cpu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_pass_gives_the_resident_losses(
    family: str, place: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer_module, "MLP_TOKENS", 50)  # pieces
    folder = make_toy(tmp_path / "m", family)
    resident, offloaded = scorers(folder, place, dtype)
    assert devices(offloaded) == {"meta"}
    for job in jobs_of(folder, family):
        expected, found = resident.score(job), offloaded.score(job)
        assert found.losses == expected.losses
        assert found.gradient == expected.gradient
        assert devices(offloaded) == {"meta"}  # also behind a gradient's second forward


def test_layers_apart_keep_their_own_embeddings(tmp_path: Path) -> None:
    """accelerate rebuilds what a layer is given; some layers are rescaled here, others not."""
    folder = make_model(tmp_path / "m", dtype="float32", max_position_embeddings=WINDOW)
    whole = make_config(load_model(folder), "yarn", LENGTH, switch=SwitchPolicy.SEQUENCE)
    resident, offloaded = scorers(folder, "disk", "float32")
    losses = set()
    for layers in (None, (0,), (1,)):
        job = Job(replace(whole, layers=layers), 0)
        expected = resident.score(job)
        assert offloaded.score(job).losses == expected.losses
        losses.add(expected.losses)
    assert len(losses) == 3


def test_a_model_that_a_user_loads_with_a_device_map_takes_a_definition(tmp_path: Path) -> None:
    """transformers' own hooks stand in front of each attention too."""
    folder = make_toy(tmp_path / "m", "llama")
    config = make_config(load_model(folder), "yarn", LENGTH, switch=SwitchPolicy.SEQUENCE)
    config = replace(config, layers=(1,))
    device_map = {
        "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
        "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
    }  # fmt: skip
    logits = []
    for extra in ({}, {"device_map": device_map, "offload_folder": tmp_path / "away"}):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **extra).eval()
        apply_longrope(model, config)
        with torch.no_grad():
            logits.append(model(torch.tensor([IDS])).logits)
    assert torch.equal(*logits)


def test_all_of_a_layer_is_read_once_for_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer_module, "MLP_TOKENS", 16)
    folder = make_model(tmp_path / "m", max_position_embeddings=WINDOW)
    _, offloaded = scorers(folder, "disk", "float32")
    read: list[str] = []
    weights = offloaded.model.get_decoder().layers[0]._hf_hook.weights_map._stored
    get = type(weights).__getitem__

    def counting(self: object, key: str) -> object:
        read.append(key)
        return get(self, key)

    monkeypatch.setattr(type(weights), "__getitem__", counting)
    offloaded.score(jobs_of(folder, "llama")[0])
    assert len(read) == len(set(read)) == 18
    assert all(name.startswith("model.layers.") for name in read)


def test_rewritten_experts_go_with_their_model(tmp_path: Path) -> None:
    folder = make_toy(tmp_path / "m", "qwen3_moe")
    model = load_offloaded_model(folder, "float32", "cpu", Offload("disk", tmp_path / "away"))
    assert any(tmp_path.glob("away/*/*experts*"))
    del model
    gc.collect()
    assert not any(tmp_path.glob("away/*"))


def test_what_would_save_nothing_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", max_position_embeddings=WINDOW)
    with pytest.raises(
        ConfigError, match="got device cpu: it would save nothing; use offload disk"
    ):
        Scorer(folder, [], WINDOW, offload=Offload("cpu"))
    with pytest.raises(ConfigError, match="one of cpu, disk, got 'tape'"):
        Offload("tape")
    file = tmp_path / "m.gguf"
    file.write_bytes(b"")
    with pytest.raises(UnsupportedError, match="longrope-export safetensors MODEL -o FOLDER"):
        Scorer(file, [], WINDOW, offload=Offload("disk"))


def test_without_accelerate_the_pip_line_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(tmp_path / "m", max_position_embeddings=WINDOW)
    monkeypatch.setitem(sys.modules, "accelerate.hooks", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'longrope-export\[offload\]'"):
        load_offloaded_model(folder, "float32", "cpu", Offload("disk"))


def test_the_command_finds_the_same_factors_and_leaves_no_weights(tmp_path: Path) -> None:
    folder = make_toy(tmp_path / "m", "qwen3_moe")
    add_bpe_tokenizer(folder)
    (tmp_path / "books").mkdir()
    for number in range(4):
        text = " ".join(SENTENCES[number:] * 30)
        (tmp_path / "books" / f"{number}.txt").write_text(text)
    given = ["search", str(folder), "--target-length", "128", "--text", str(tmp_path / "books")]
    given += ["--documents", "2,1,1", "--population", "4", "--iterations", "1"]
    given += ["--needle-keys", "0", "--device", "cpu"]
    for name, more in (("whole", []), ("away", ["--offload", "disk"])):
        result = CliRunner().invoke(main, [*given, "-o", str(tmp_path / name), *more])
        assert result.exit_code == 0, result.stderr
    whole, away = ((tmp_path / name / "log.jsonl").read_text() for name in ("whole", "away"))
    assert losses_in(away) == losses_in(whole)
    assert not (tmp_path / "away" / "offload").exists()
    result = CliRunner().invoke(main, [*given, "-o", str(tmp_path / "no"), "--offload", "cpu"])
    assert result.exit_code == 2
    assert "it would save nothing" in result.stderr
    assert not (tmp_path / "no").exists()
