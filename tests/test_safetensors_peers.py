"""Exported folders under transformers 4 and mlx-lm, each in an environment of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peers
import pytest
from longrope_rotary import reference_logits
from test_safetensors import BORDER, SETTINGS, TARGET, TESTS, export, two_tiers
from tiny_models import make_model

from longrope_export.models.model import load_model

LENGTHS = (BORDER, BORDER + 1, 50)
# sqrt(1 + ln(64 / 24) / ln 24): what engines take that do not read an attention factor
FORMULA = 1.143951813632545
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "gemma", "gemma2", "gemma3", "mixtral",
)  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """family -> (source, exported folder)."""
    root = tmp_path_factory.mktemp("peers")
    found = {}
    for family in FAMILIES:
        settings = {"initializer_range": 0.08, **SETTINGS.get(family, {})}
        source = make_model(root / f"{family}-source", family, dtype="float32", **settings)
        export(source, two_tiers(source, scale=FORMULA), root / family)
        found[family] = source, root / family
    return found


def check(found: dict[str, Any], source: Path, folder: Path, *, never_short: bool = False) -> None:
    config = two_tiers(source)
    short, long = (tier.rescale_factors for tier in config.tiers)
    expected = reference_logits(
        source,
        config.rope_theta,
        config.rotary_dim,
        lambda length: long if never_short or length > BORDER else short,
        FORMULA,
        LENGTHS,
    )
    for length, logits in zip(LENGTHS, expected, strict=True):
        difference = float(np.abs(logits - found[f"{folder} {length}"]).max())
        assert difference <= 1e-4, f"{folder.name}, {length} tokens: {difference}"


def test_transformers_4_computes_the_same(
    exported: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    folders = [folder for _, folder in exported.values()]
    lengths, output = ",".join(map(str, LENGTHS)), tmp_path / "logits.npz"
    script = TESTS / "load_plainly.py"
    peers.run_with(peers.TRANSFORMERS_4, script, output, "plain", lengths, *folders)
    found = dict(np.load(output))
    assert str(found["transformers"]) == "4.57.6"
    for source, folder in exported.values():
        check(found, source, folder)


def test_mlx_lm_computes_the_long_factors_at_every_length(
    exported: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    # gemma3 needs six layers there, and its own pattern of them
    chosen = {name: exported[name] for name in ("llama", "qwen2", "qwen3", "phi3", "granite")}
    folders = [folder for _, folder in chosen.values()]
    lengths, output = ",".join(map(str, LENGTHS)), tmp_path / "logits.npz"
    try:
        peers.install(peers.MLX)
    except peers.NotInstallableError as error:
        pytest.skip(f"no mlx for this machine: {error}")
    peers.run_with(peers.MLX, TESTS / "load_with_mlx.py", output, lengths, *folders)
    found = dict(np.load(output))
    for source, folder in chosen.values():
        check(found, source, folder, never_short=True)


def test_the_attention_factor_of_the_formula_is_the_one_used_here(
    exported: dict[str, tuple[Path, Path]],
) -> None:
    assert pytest.approx((1 + np.log(TARGET / BORDER) / np.log(BORDER)) ** 0.5) == FORMULA
    _, folder = exported["phi3"]
    assert load_model(folder).native.tiers[0].attention_factor == FORMULA
