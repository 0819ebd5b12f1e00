"""LongRoPE's whole procedure in small, by one plan: 256 tokens to 8192, exported, verified, reported."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.small_model import WINDOW, trained_model
from benchmarks.small_plan import (
    TARGET,
    Sizes,
    at,
    last_factors,
    losses,
    tuned_model,
    whole,
    write_plan,
)
from longrope_export.cli import main
from longrope_export.models.model import load_model

pytestmark = pytest.mark.integration
# the benchmark does more
SMALL = Sizes(5, 6, 0, "2,2,1", "1,1,1", short_documents="6,6,2", far_passes=12, against="yarn")


def test_a_whole_plan_extends_32_times_and_gives_the_short_window_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the other core runs other tests
    plan, folder = write_plan(whole(SMALL), tmp_path / "plan.toml"), tmp_path / "run"
    result = CliRunner().invoke(
        main, ["extend", str(trained_model()), str(plan), "-o", str(folder)]
    )
    assert result.exit_code == 0, result.output[-4000:]

    own = losses(trained_model(), at(load_model(trained_model()).native, WINDOW), WINDOW).mean()
    config, model = last_factors(folder), tuned_model(folder)
    assert [tier.max_length for tier in config.tiers][:2] == [256, 512]
    assert config.max_position_embeddings == TARGET
    far = losses(model, at(config, TARGET), TARGET).mean()
    short = losses(model, at(config, WINDOW), WINDOW).mean()
    assert math.exp(far - own) < 1.25, (own, far)
    assert math.exp(short - own) < 1.05, (own, short)

    certificate = json.loads((folder / "11-verify" / "verify.json").read_text())
    assert certificate["passed"]
    names = {export["runtime_name"] for export in certificate["exports"]}
    assert names == {"transformers", "onnxruntime", "llama.cpp"}
    page = (folder / "12-report" / "report.html").read_text()
    for heading in ("Search", "Fine-tuning", "Parity certificate"):
        assert heading in page
