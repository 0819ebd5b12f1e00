"""The plan, the comparison and its limits, and the memory of `verify`; numbers: integration/."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from test_onnx import export, make_source, three_tiers

from longrope_export.config import FactorTier, LongRopeConfig, SwitchPolicy
from longrope_export.errors import ConfigError
from longrope_export.models.model import load_model
from longrope_export.runtimes.base import RuntimeInfo
from longrope_export.runtimes.genai import GenaiModel
from longrope_export.runtimes.hf import Flavour, HfModel
from longrope_export.verify.compare import (
    Limit,
    compare,
    float32_angle_error,
    is_precision,
    is_quantized,
    limit_for,
)
from longrope_export.verify.exports import check_length
from longrope_export.verify.memory import available_bytes, longest_length
from longrope_export.verify.plan import Append, cases_for, checked_borders, make_cases, rows_of


def config_of(*lengths: int, switch: str = "causal") -> LongRopeConfig:
    tiers = tuple(FactorTier(length, (1.0, 2.0)) for length in lengths)
    return LongRopeConfig(10000.0, 4, lengths[0], lengths[-1], tiers, SwitchPolicy(switch))


@pytest.mark.parametrize("switch", ["causal", "sequence"])
def test_the_plan_looks_on_both_sides_of_every_border(switch: str) -> None:
    config = config_of(8192, 16384, 131072, switch=switch)
    rows = {row for case in make_cases(config, 600) for row in rows_of(case, config)}
    for border, tier in ((8192, 0), (16384, 1)):
        below = {row.tier for row in rows if row.position == border - 1}
        above = {row.tier for row in rows if row.position == border}
        assert tier in below and tier + 1 in above
    assert max(row.position for row in rows) == 131071
    assert max(case.num_tokens for case in make_cases(config, 600)) == 600


@pytest.mark.parametrize("switch", ["causal", "sequence"])
def test_rows_stand_on_both_sides_of_inner_borders_and_start_windows(switch: str) -> None:
    """Of a text too long for all of its rows to be compared; such borders count from each call."""
    config = config_of(8192, 16384, 32768, switch=switch)
    windows = (4, 8, 16)
    tiers = zip(config.tiers, windows, strict=True)
    config = replace(
        config, tiers=tuple(replace(tier, num_start_tokens=window) for tier, window in tiers)
    )
    prefill, chunks = (
        next(case for case in make_cases(config, 4096) if case.name.startswith(name))
        for name in ("one prefill", "chunks of")
    )
    for case, inner in ((prefill, 512), (chunks, chunks.chunk_size)):
        compared = {row.position for row in rows_of(case, config)}
        assert len(compared) < 200
        borders, begin = [], 0
        for append in case.appends:
            borders += range(begin + inner, begin + append.count, inner)
            begin += append.count
        found = [b for b in borders if {b - 1, b} <= compared]
        assert found and set(range(found[0] - 4, found[0] + 4)) <= compared
        assert all({window - 1, window} <= compared for window in windows)


def test_cases_are_named_for_what_a_runtime_makes_of_them() -> None:
    info = RuntimeInfo("", "", "", "fp32", "")
    for switch in ("causal", "sequence"):
        config = config_of(64, 128, switch=switch)
        cases = make_cases(config, 100)
        assert cases_for(info, cases, config) == cases
        found = cases_for(replace(info, batches=False), cases, config)
        assert [case for case in found if not case.batch] == [c for c in cases if not c.batch]
        assert [c.name for c in found if c.batch] == ["two lengths, one after the other"]
        limited = replace(info, batches=False, rows_apart=True, any_position=False)
        whole, *found = cases_for(limited, cases, config)
        name = "one prefill" if switch == "causal" else "one prefill of 100"
        assert whole.name == f"{name}, the last row alone" and whole.appends == (Append(100, 1),)
        assert not any(case.origin for case in found)
        assert set(rows_of(whole, config)) <= {r for c in cases for r in rows_of(c, config)}
        names = [case.name for case in found]
        assert names[0].endswith(", rows token by token")
        assert names[-2:] == [
            "one by one over borders",
            "two lengths, one after the other, rows token by token",
        ]


def test_under_sequence_the_final_length_picks_the_tier_of_all_rows() -> None:
    config = config_of(64, 128, switch="sequence")
    case = next(case for case in make_cases(config, 100) if case.declared_length == 65)
    assert {row.tier for row in rows_of(case, config)} == {1}
    causal = replace(config, switch=SwitchPolicy.CAUSAL)
    case = make_cases(causal, 100)[0]
    assert [row.tier for row in rows_of(case, causal)] == [0] * 64 + [1] * 36


def test_a_long_ladder_is_tried_at_some_of_its_borders() -> None:
    config = config_of(*range(100, 20100, 100))
    borders = checked_borders(config, 20000)
    assert len(borders) == 6 and borders[0] == 100 and borders[-1] == 19900
    assert sum(case.num_tokens for case in make_cases(config, 600)) < 6000


def test_differences_of_rows() -> None:
    expected = np.log(np.asarray([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]], np.float32))
    got = np.log(np.asarray([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]], np.float32)) + 3
    found = compare(got - 3, expected, [0, None])
    assert found.difference.tolist() == pytest.approx([np.log(2), 0], abs=1e-6)
    assert found.kl.tolist() == pytest.approx([0.25 * np.log(2), 0], abs=1e-6)
    assert found.same_top.tolist() == [False, True]
    assert found.loss[0] == pytest.approx(np.log(2)) and np.isnan(found.loss[1])
    assert compare(got, expected, [0, None]).kl.tolist() == pytest.approx(
        found.kl.tolist(), abs=1e-6
    )
    padded = np.concatenate([got - 3, np.full((2, 5), 9, np.float32)], axis=1)
    assert compare(padded, expected, [0, None]).kl.tolist() == found.kl.tolist()
    with pytest.raises(ConfigError, match="shape"):
        compare(got[:, :2], expected, [0, None])
    bad = compare(np.full_like(got, np.nan), expected, [0, None])
    assert bad.misses(Limit(None, 1e9, 1e9)).all()


def test_a_mean_beyond_its_limit_names_the_rows_that_make_it() -> None:
    expected = np.zeros((4, 2), np.float32)
    got = expected + np.asarray([[0, 0], [0, 0.3], [0, 0.3], [0, 0]], np.float32)
    found = compare(got, expected, [None] * 4)
    assert found.misses(Limit(None, 1, 1e-3)).tolist() == [False, True, True, False]
    assert not found.misses(Limit(None, 1, 1)).any()


def test_float32_angles_are_off_by_more_far_away() -> None:
    positions = [0, 4096, 1 << 20]
    errors = float32_angle_error(positions)
    for position, error in zip(positions, errors, strict=True):
        assert np.spacing(np.float32(position)) / 4 <= error * 2 or position == 0
        assert error <= np.spacing(np.float32(position))
    expected = np.zeros((3, 2), np.float32)
    found = compare(expected + np.asarray([0, 0.01], np.float32), expected, [None] * 3)
    limit = Limit(1e-3, 1e-6, 1e-7)
    assert found.misses(limit).tolist() == [True, True, True]
    assert found.misses(limit, errors).tolist() == [True, True, False]


def test_who_multiplies_positions_in_float32(tmp_path: Path) -> None:
    source = make_source(tmp_path / "m")
    assert HfModel(source, flavour=Flavour.STOCK).info.float32_angles
    assert not HfModel(source, config=three_tiers(source)).info.float32_angles
    folder = export(source, None, tmp_path / "onnx")
    assert not GenaiModel(folder, threads=1).info.float32_angles
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    del model.metadata_props[:]  # as another builder's
    onnx.save(model, folder / "model.onnx")
    assert GenaiModel(folder, threads=1).info.float32_angles


def test_limits_by_precision() -> None:
    assert limit_for("q4_k") == limit_for("int4") != limit_for("q8_0")
    assert limit_for("q4_k", {"q4_k": Limit(None, 9, 9)}).kl == 9
    assert limit_for("mxfp4") == limit_for("nvfp4") == limit_for("4-bit")
    for name in ("q2_k", "q3_k", "iq1_s", "iq2_xxs", "iq3_s", "tq1_0", "tq2_0", "q1_0"):
        assert limit_for(name) == limit_for("2-bit") != limit_for("4-bit")
    with pytest.raises(ConfigError, match="--limit unknown="):
        limit_for("unknown")


def test_every_precision_of_a_runtime_may_have_a_limit() -> None:
    from gguf import GGMLQuantizationType

    types = {type_.name.lower() for type_ in GGMLQuantizationType if type_.name[0] != "I" or "Q" in type_.name}  # fmt: skip
    types = {{"f32": "fp32", "f16": "fp16"}.get(name, name) for name in types}
    assert all(map(is_precision, {*types, "int8", "int4", "4-bit", "unknown", "unpacked"}))
    assert not any(map(is_precision, ("", "fp23", "q4", "FP32")))
    plain = {"fp32", "fp16", "bf16", "f64"}
    assert {name for name in types if not is_quantized(name)} == plain
    for name in types - plain - {"q8_1", "q8_k"}:  # those two are only for activations
        assert limit_for(name)


def test_memory_decides_how_long(tmp_path: Path) -> None:
    model = load_model(make_source(tmp_path / "m"))
    once, twice = (longest_length(model, 1000, gib << 30) for gib in (1, 2))
    assert 1.9 < twice / once < 2.1
    assert longest_length(model, 1 << 40, 1 << 30) == 0
    assert check_length(model, model.native, None) == model.window
    with pytest.raises(ConfigError, match="2 to 256"):
        check_length(model, model.native, 257)


def test_memory_of_a_container(tmp_path: Path) -> None:
    """Files as Linux writes them; what is absent or without a limit is passed over."""
    meminfo, own, cgroups = tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "cgroups"
    inner = cgroups / "user" / "job"
    inner.mkdir(parents=True)
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert available_bytes(meminfo, own, cgroups) == 8_192_000
    assert available_bytes(tmp_path / "no", own, cgroups) > 1 << 20
    own.write_text("1:memory:/old\n0::/user/job\n")
    assert available_bytes(meminfo, own, cgroups) == 8_192_000
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("500\n")
    assert available_bytes(meminfo, own, cgroups) == 8_192_000
    (inner / "memory.max").write_text("1500\n")
    assert available_bytes(meminfo, own, cgroups) == 1000
    (cgroups / "user" / "memory.max").write_text("900\n")
    (cgroups / "user" / "memory.current").write_text("600\n")
    assert available_bytes(meminfo, own, cgroups) == 300
    (cgroups / "user" / "memory.current").write_text("950\n")
    assert available_bytes(meminfo, own, cgroups) == 0
    own.write_text("1:memory:/old\n")
    assert available_bytes(meminfo, own, cgroups) == 8_192_000


def test_many_rows_are_compared_as_few_are() -> None:
    rng = np.random.default_rng(0)
    expected = rng.normal(size=(150, 20)).astype(np.float32)
    got = expected + rng.normal(size=expected.shape).astype(np.float32) * 0.1
    whole = compare(got, expected, list(range(20)) * 7 + [None] * 10)
    alone = compare(got[149:], expected[149:], [None])
    assert len(whole.kl) == len(whole.loss) == 150 and whole.kl[149] == alone.kl[0]
    assert np.isnan(whole.loss[140:]).all() and np.isfinite(whole.loss[:140]).all()
