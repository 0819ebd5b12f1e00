"""The real model as a folder, made from its GGUF."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from longrope_export.demo.material import fetch_smollm2

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'converters'}"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The folder in float32, and the peak memory of the command in KiB."""
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    command = [sys.executable, "-m", "longrope_export", "safetensors", str(fetch_smollm2())]
    command += ["--dtype", "f32", "--max-shard-size", "200MB", "-o", str(folder)]
    # by way of a small process: a child starts with the peak of the one that made it
    launcher = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    result = subprocess.run(
        [sys.executable, "-c", launcher, *command],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    return folder, int(result.stdout)


def test_every_weight_equals_transformers_own_reading_of_the_gguf(
    exported: tuple[Path, int],
) -> None:
    folder, peak_kib = exported
    gguf = fetch_smollm2()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    ).state_dict()
    seen = 0
    for shard in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            assert torch.equal(tensor, theirs[name]), name
            seen += tensor.nbytes
    assert seen > 500e6
    assert peak_kib < 150 << 10  # measured: 84 MiB, for 538 MB of weights


def test_it_generates_english(exported: tuple[Path, int]) -> None:
    folder, _ = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0])
    assert "Paris" in text
