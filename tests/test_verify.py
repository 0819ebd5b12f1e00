"""The plan, the comparison, the certificate and the command of `verify`; numbers: integration/."""

from __future__ import annotations

import ast
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from test_onnx import export, make_source, three_tiers
from test_onnx_precision import emulated_reference
from tiny_models import add_bpe_tokenizer, add_sentencepiece, make_model

import longrope_export
from longrope_converters.certificate import embed_certificate
from longrope_converters.to_gguf.convert import GgufConverter, GgufOptions
from longrope_converters.to_safetensors.convert import SafetensorsConverter, SafetensorsOptions
from longrope_export.cli import main
from longrope_export.config import FactorTier, LongRopeConfig, SwitchPolicy
from longrope_export.errors import ConfigError, ModelError, ToolError, UnsupportedError
from longrope_export.factor_files import to_json
from longrope_export.gguf_format import read_header
from longrope_export.models.model import load_model
from longrope_export.runtimes.base import RuntimeInfo
from longrope_export.runtimes.genai import GenaiModel
from longrope_export.runtimes.hf import Flavour, HfModel
from longrope_export.runtimes.llama_cpp import weight_precision
from longrope_export.runtimes.onnx import OnnxModel
from longrope_export.runtimes.onnx_layers import with_layer_outputs
from longrope_export.runtimes.onnx_sequence import OnnxSequence
from longrope_export.runtimes.open import Export, parse_export
from longrope_export.verify.certificate import content_hash, read_certificate
from longrope_export.verify.compare import (
    Limit,
    compare,
    float32_angle_error,
    is_precision,
    is_quantized,
    limit_for,
)
from longrope_export.verify.exports import check_length
from longrope_export.verify.layers import first_departure
from longrope_export.verify.memory import available_bytes, longest_length
from longrope_export.verify.own_weights import use_weights_of
from longrope_export.verify.plan import Append, cases_for, checked_borders, make_cases, rows_of
from longrope_export.verify.reference import Reference
from longrope_export.verify.report import rich_tables, table_rows
from longrope_export.verify.rows import ReferenceRows
from longrope_export.verify.run import verify_export

Folder = Path


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


def test_the_reference_shares_no_formula() -> None:
    """An exporter that used the reference's own tables, or the reverse, would prove nothing."""
    package = Path(longrope_export.__file__).parent
    reference = package / "verify" / "reference.py"
    assert imports(reference) == {
        "longrope_export.config",
        "longrope_export.models.torch_model",
    }
    assert imports(package / "models" / "torch_model.py") == {"longrope_export.errors"}
    others = [*package.rglob("*.py"), *(package.parent / "converters").rglob("*.py")]
    named = (p for p in others if "reference" in p.read_text())
    found = (p for p in named if "longrope_export.verify.reference" in imports(p))
    users = {p.relative_to(package.parent) for p in found}
    assert users == {
        Path(
            "longrope_export/verify/plan.py"
        ),  # which tier: the reference's choice, not the config's
        Path("longrope_export/verify/rows.py"),
    }


def imports(path: Path) -> set[str]:
    """Our modules that a file imports, in whatever form."""
    root = Path(longrope_export.__file__).parent.parent
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(root).parts[: -node.level] if node.level else ()
            module = ".".join((*package, *filter(None, [node.module])))
            names = [f"{module}.{alias.name}" for alias in node.names]
            found |= {name if is_module(root, name) else module for name in names}
    return {name for name in found if name.startswith("longrope")}


def is_module(root: Path, name: str) -> bool:
    path = root.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


@pytest.mark.parametrize(
    "line",
    [
        "import longrope_export.verify.reference",
        "import longrope_export.verify.reference as r",
        "from longrope_export.verify import plan, reference",
        "from longrope_export.verify.reference import cos_sin",
        "from .reference import cos_sin",
        "from . import reference",
        "from ..verify import reference as r",
        "def f():\n    from longrope_export.verify import reference",
    ],
)
def test_no_form_of_an_import_is_overlooked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    package = tmp_path / "longrope_export" / "verify"
    package.mkdir(parents=True)
    for name in ("reference", "plan"):
        (package / f"{name}.py").touch()
    monkeypatch.setattr(longrope_export, "__file__", str(package.parent / "__init__.py"))
    (package / "user.py").write_text(line)
    assert "longrope_export.verify.reference" in imports(package / "user.py")


@pytest.mark.parametrize("switch", list(SwitchPolicy))
def test_a_border_off_by_one_in_what_runtimes_and_config_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switch: SwitchPolicy
) -> None:
    """Verify chooses the tier by itself, under both rules."""
    source = make_source(tmp_path / "m")
    config = three_tiers(source, switch=switch)
    exported = Export("onnxruntime", export(source, config, tmp_path / "onnx"))
    ids = list(range(3, 203))

    def early(self: LongRopeConfig, length: int) -> int:
        found = (index for index, tier in enumerate(self.tiers) if length < tier.max_length)
        return next(found, len(self.tiers) - 1)

    monkeypatch.setattr(LongRopeConfig, "tier_index", early)
    cases = make_cases(config, 200)
    reference = ReferenceRows(source, config, ids, cases)
    result = verify_export(exported, config, ids, cases, reference, threads=1)
    missed = {case.first_miss for case in result.cases if case.first_miss is not None}
    assert result.cases and not result.problems and 63 in missed


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


def test_which_runtime_runs_what(tmp_path: Path) -> None:
    source = make_source(tmp_path / "m")
    assert parse_export(str(source)).runtime == "transformers"
    assert parse_export(f"transformers-stock={source}").runtime == "transformers-stock"
    onnx = export(source, None, tmp_path / "onnx")
    assert parse_export(str(onnx)).runtime == "onnxruntime"
    for wrong in ("nothing", f"vllm={source}", f"genai={tmp_path / 'no'}", str(tmp_path)):
        with pytest.raises(ModelError):
            parse_export(wrong)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """m: a model; f.json; onnx: its export; certificate.json, .md and .png of a run."""
    root = tmp_path_factory.mktemp("command")
    source = make_source(root / "m")
    add_bpe_tokenizer(source)
    config = three_tiers(source)
    (root / "f.json").write_text(json.dumps(to_json(config)))
    export(source, config, root / "onnx")
    written = [("-o", "certificate.json"), ("--markdown", "card.md"), ("--plot", "plot.png")]
    options = [word for flag, name in written for word in (flag, str(root / name))]
    result = run(root, "m", "onnx", "--factors", root / "f.json", *options)
    assert result.exit_code == 0, result.output
    return root


def run(root: Folder, *arguments: object):  # type: ignore[no-untyped-def]
    """`verify` with paths below root."""
    words = [str(root / a) if a in ("m", "onnx", "other") else str(a) for a in arguments]
    return CliRunner().invoke(main, ["verify", *words, "--threads", "1"])


def test_what_the_command_writes(made: Folder) -> None:
    certificate = json.loads((made / "certificate.json").read_text())
    assert certificate["passed"] and certificate["config"]["switch"] == "causal"
    (found,) = certificate["exports"]
    assert found["precision"] == "fp32" and found["problems"] == []
    names = [case["name"] for case in found["cases"]]
    assert names[:4] == [
        "one prefill",
        "chunks of 84",
        "one by one over borders",
        "two lengths, one after the other",
    ]
    assert sum(name.startswith("from position") for name in names) == 5
    assert all(case["mean_difference"] < case["max_difference"] < 2e-4 for case in found["cases"])
    assert certificate["tokens"]["seed"] == 0
    card = (made / "card.md").read_text()
    assert card.startswith("## Numerical parity") and "| one prefill | 256 |" in card
    assert (made / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_miss_is_exit_code_1_and_named(made: Folder) -> None:
    config = json.loads((made / "f.json").read_text())
    config["tiers"][1]["attention_factor"] *= 1.01
    (made / "wrong.json").write_text(json.dumps(config))
    result = run(made, "m", "onnx", "--factors", made / "wrong.json", "--json", "--length", 100)
    assert result.exit_code == 1
    certificate = json.loads(result.stdout)
    (found,) = certificate["exports"]
    assert "tiers[1].attention_factor is 1.2, expected 1.212" in found["problems"][0]
    assert found["cases"][0]["first_miss"] == 64
    assert found["cases"][0]["first_layer"] == 0
    assert table_rows(found)[0][-1] == "misses from position 64, layer 0"


def test_the_first_layer_beyond_the_limit_at_any_token() -> None:
    expected = np.ones((3, 2, 4), np.float32)
    outputs = expected.copy()
    assert first_departure(outputs, expected, 1e-6) is None
    outputs[1:, 0] += 1e-3
    assert first_departure(outputs, expected, 1e-4) == 1
    assert first_departure(outputs, expected, 1e-2) is None
    outputs[0, 1, 0] = np.nan
    assert first_departure(outputs, expected, 1e-2) == 0


@pytest.mark.parametrize("ops", ["genai", "standard"])
def test_layers_in_chunks_and_of_some_tokens(made: Folder, tmp_path: Path, ops: str) -> None:
    config = three_tiers(made / "m", switch=SwitchPolicy.SEQUENCE)
    ids = list(range(3, 103))
    calls, wanted = [ids[:40], ids[40:]], range(10, 100)
    expected = Reference(made / "m", config).layer_outputs(ids, 90)
    assert expected.shape == (2, 90, 64)
    onnx_model = OnnxModel(export(made / "m", config, tmp_path / "onnx", ops=ops), threads=1)
    got = onnx_model.layer_outputs(calls, wanted, chunk_size=30)  # the first call runs twice
    np.testing.assert_allclose(got, expected, atol=2e-5)
    live = HfModel(made / "m", config=config)
    got = live.layer_outputs(calls, wanted, declared_length=100, chunk_size=30)
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3", "gemma3"])
@pytest.mark.parametrize("bits", [4, 8])
def test_onnx_weights_are_unpacked_as_they_are_defined(
    tmp_path: Path, family: str, bits: int
) -> None:
    """Stacked, fused and tied matrices; the definition is written out in test_onnx_precision."""
    source = make_source(tmp_path / "m", family)
    folder = export(source, None, tmp_path / "onnx", precision=f"int{bits}")
    model = Reference(source, three_tiers(source)).model
    assert use_weights_of(model, folder) == []
    expected = emulated_reference(source, bits).model.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("family", ["llama", "qwen3", "granite", "phi3"])
def test_gguf_weights_are_unpacked_in_their_places(tmp_path: Path, family: str) -> None:
    source = make_source(tmp_path / "m", family)
    add_bpe_tokenizer(source)
    if family == "phi3":
        add_sentencepiece(source)
    before = Reference(source, three_tiers(source)).model.state_dict()
    for outtype, far in (("q8_0", 0.008), ("q4_0", 0.1)):
        path = tmp_path / f"{outtype}.gguf"
        converter = GgufConverter(GgufOptions(outtype=outtype, pre="gpt-2"))
        converter.convert(load_model(source), None, path, lambda _: None)
        model = Reference(source, three_tiers(source)).model
        assert use_weights_of(model, path) == []
        for name, weight in model.state_dict().items():
            distance = float((weight - before[name]).norm() / before[name].norm())
            assert (distance == 0) == name.endswith("norm.weight"), name
            assert distance < far, name


@pytest.mark.parametrize("outtype", ["q2_k", "q3_k_m", "iq3_s"])
def test_rows_of_two_and_three_bits_are_known_for_what_they_are(
    tmp_path: Path, outtype: str
) -> None:
    settings = {"eos_token_id": 1, "hidden_size": 256, "intermediate_size": 256}
    source = make_model(tmp_path / "m", "llama", dtype="float32", **settings)
    add_bpe_tokenizer(source)
    path = tmp_path / "m.gguf"
    converter = GgufConverter(GgufOptions(outtype=outtype, pre="gpt-2"))
    converter.convert(load_model(source), None, path, lambda _: None)
    assert is_quantized(weight_precision(path))
    model = Reference(source, three_tiers(source)).model
    assert use_weights_of(model, path) == []
    norm = model.model.layers[1].mlp.down_proj.weight.norm()
    with torch.no_grad():  # another source: its rows are not rounded, they are others
        source_model = Reference(source, three_tiers(source)).model
        source_model.model.layers[1].mlp.down_proj.weight[5] = float(norm)
    (problem,) = use_weights_of(source_model, path)
    assert problem.startswith("blk.1.ffn_down.weight: 1 of 256 rows")


def test_weights_that_have_no_place_are_refused(tmp_path: Path) -> None:
    source, other = make_source(tmp_path / "m"), make_source(tmp_path / "other", "phi3")
    folder = export(source, None, tmp_path / "onnx", precision="int8")
    model = Reference(other, three_tiers(other)).model
    with pytest.raises(UnsupportedError, match="place"):
        use_weights_of(model, folder)


def test_the_table_of_a_quantized_export(made: Folder, tmp_path: Path) -> None:
    config = three_tiers(made / "m")
    export(made / "m", config, tmp_path / "int4", precision="int4")
    card = tmp_path / "card.md"
    options = ("--factors", made / "f.json", "--length", 100, "--json", "--markdown", card)
    result = run(made, "m", tmp_path / "int4", *options)
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["exports"]
    assert found["reference_weights"] == "the export's own, unpacked"
    for case in found["cases"]:
        assert case["max_kl"] < case["from_source"]["max_kl"] / 2
    assert "| all, from the source's weights |" in card.read_text()
    assert "reference ran on weights: the export's own, unpacked." in card.read_text()
    console = Console(width=200, record=True)
    console.print(*rich_tables(json.loads(result.stdout)))
    assert "The reference ran on weights: the export's own, unpacked." in console.export_text()
    assert "was not used" not in result.output
    result = run(made, "m", tmp_path / "int4", *options, "--limit", "unpacked=1e-9:1e-9")
    assert result.exit_code == 1 and "was not used" not in result.output
    words = ("--limit", "q4_k=1e-9:1e-9", "--limit", "4-bit=9:9")
    result = run(made, "m", tmp_path / "int4", *options, *words)
    assert result.exit_code == 0
    assert "--limit q4_k was not used: the exports reported int4" in result.output
    assert "--limit 4-bit" not in result.output


def test_a_graph_of_others_tells_no_layers(made: Folder, tmp_path: Path) -> None:
    model = onnx.load(made / "onnx" / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = name.replace("model.norm.weight", "weight")
    onnx.save(model, tmp_path / "model.onnx")
    assert with_layer_outputs(tmp_path / "model.onnx", 2) == (b"", [])
    assert len(with_layer_outputs(made / "onnx" / "model.onnx", 2)[1]) == 2


def test_brackets_in_names_are_shown(made: Folder) -> None:
    certificate = json.loads((made / "certificate.json").read_text())
    (found,) = certificate["exports"]
    found["path"], found["problems"] = "onnx[v2]", ["layers[a] differ"]
    found["cases"][0]["name"] = "case[b]"
    console = Console(width=200, record=True)
    console.print(*rich_tables(certificate))
    text = console.export_text()
    assert all(part in text for part in ("onnx[v2]", "layers[a] differ", "case[b]"))


def test_wrong_use(made: Folder) -> None:
    assert "at least one EXPORT" in run(made, "m").output
    assert "target" in run(made, "m", "onnx", "--length", 10**6).output
    assert "KL:MEAN_KL" in run(made, "m", "onnx", "--limit", "fp32=x").output
    (made / "short.txt").write_text("Numbers: 0 1 2 3")
    result = run(made, "m", "onnx", "--text", made / "short.txt")
    assert result.exit_code == 2 and "expected at least 256" in result.output
    text = made / "long.txt"
    text.write_text("Every file that comes out of a converter must hold the same numbers. " * 20)
    result = run(made, "m", "onnx", "--factors", made / "f.json", "--text", text, "--length", 80)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--text", "latin.txt"), "cannot be read as UTF-8"),
        (("--plot", "plot.xyz"), "expected .png, .svg"),
        (("--seed", -1), "-1 is not in the range"),
        (("--limit", "fp32=1"), "expected PRECISION=KL"),
        (("--limit", "fp32=1:1:1:1"), "expected PRECISION=KL"),
        (("--limit", "fp32=inf:1"), "expected PRECISION=KL"),
        (("--limit", "fp23=1:1"), "no runtime reports the precision fp23"),
    ],
)
def test_bad_values_are_exit_code_2(made: Folder, options: tuple[object, ...], said: str) -> None:
    (made / "latin.txt").write_bytes(b"caf\xe9")
    words = [made / str(w) if str(w).startswith(("latin", "plot")) else w for w in options]
    result = run(made, "m", "onnx", "--length", 80, *words)
    assert result.exit_code == 2 and said in result.output, result.output
    assert not (made / "plot.xyz").exists()


def test_check_finds_the_export_again_and_nothing_else(made: Folder, tmp_path: Path) -> None:
    copy = tmp_path / "other"
    shutil.copytree(made / "onnx", copy)
    embed_certificate(copy, json.loads((made / "certificate.json").read_text()))
    for certificate in (made / "certificate.json", copy):
        result = run(tmp_path, "--check", certificate, "other")
        assert result.exit_code == 0, result.output
    with (copy / "model.onnx.data").open("r+b") as file:
        file.write(b"\0\1")
    result = run(tmp_path, "--check", made / "certificate.json", "other")
    assert result.exit_code == 1 and "none of the certified exports" in result.output
    (tmp_path / "x.json").write_text("{}")
    assert run(tmp_path, "--check", tmp_path / "x.json", "other").exit_code == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nonexist",), "nonexist: no such file or folder"),
        (("http://127.0.0.1:1",), "no such file or folder"),
        (("onnx", "--embed"), "--embed is not for --check"),
        (("onnx", "-o", "x.json"), "--output is not for --check"),
        (("onnx", "--length", 5), "--length is not for --check"),
        (("onnx", "--factors", "no.json"), "--factors is not for --check"),
        (("onnx", "--json"), "--json is not for --check"),
    ],
)
def test_check_ignores_nothing(made: Folder, words: tuple[object, ...], said: str) -> None:
    result = run(made, "--check", made / "certificate.json", *words)
    assert result.exit_code == 2 and said in result.output, result.output


def test_check_runs_the_export(made: Folder) -> None:
    certificate = json.loads((made / "certificate.json").read_text())
    certificate["exports"][0]["probe_log_probabilities"][-1][-1][0] -= 0.1
    (made / "moved.json").write_text(json.dumps(certificate))
    result = run(made, "--check", made / "moved.json", "onnx")
    assert result.exit_code == 1 and "here differs from what" in result.output
    del certificate["probes"]
    (made / "moved.json").write_text(json.dumps(certificate))
    assert "cannot be checked" in run(made, "--check", made / "moved.json", "onnx").output


def test_check_holds_a_quantized_export_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to the source, from which 4 bits are far away."""
    settings = {"eos_token_id": 1, "initializer_range": 0.15}  # attention that matters
    source = make_model(tmp_path / "m", "llama", dtype="float32", **settings)
    config = three_tiers(source)
    (tmp_path / "f.json").write_text(json.dumps(to_json(config)))
    exported = export(source, config, tmp_path / "onnx", precision="int4")
    certificate = tmp_path / "c.json"
    options = ("--factors", tmp_path / "f.json", "--length", 100, "-o", certificate)
    assert run(tmp_path, "m", "onnx", *options).exit_code == 0
    assert run(tmp_path, "--check", certificate, exported).exit_code == 0
    outputs = OnnxSequence._outputs

    def wrong_tier(self: OnnxSequence, *rest: Any) -> list[Any]:
        first, *_, last = self.model.config.tiers
        tier, self.tier = self.tier, first if self.tier is last else last
        try:
            return outputs(self, *rest)
        finally:
            self.tier = tier

    def wrong_token(self: OnnxSequence, session: Any, tokens: list[int], *rest: Any) -> list[Any]:
        return outputs(self, session, [*tokens[:-20], 7, *tokens[-19:]], *rest)

    for wrong in (wrong_tier, wrong_token):
        monkeypatch.setattr(OnnxSequence, "_outputs", wrong)
        result = run(tmp_path, "--check", certificate, exported)
        assert result.exit_code == 1 and "expected at most 0.01" in result.output, result.output


def test_a_certificate_in_a_gguf_changes_neither_hash_nor_tensors(
    made: Folder, tmp_path: Path
) -> None:
    source, path = load_model(made / "m"), tmp_path / "m.gguf"
    converter = GgufConverter(GgufOptions(outtype="f32", pre="gpt-2"))
    converter.convert(source, three_tiers(made / "m"), path, lambda _: None)
    before, data = content_hash(path), path.read_bytes()[read_header(path).data_start_bytes :]
    certificate = json.loads((made / "certificate.json").read_text())
    for _ in range(2):
        embed_certificate(path, certificate)
        assert content_hash(path) == before
    assert path.read_bytes()[read_header(path).data_start_bytes :].startswith(data)
    assert read_certificate(path)["created"] == certificate["created"]
    with path.open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"changed")
    assert content_hash(path) != before


def test_export_commands_verify_at_once(made: Folder, tmp_path: Path) -> None:
    words = ["onnx", str(made / "m"), "--factors", str(made / "f.json"), "--verify"]
    result = CliRunner().invoke(main, [*words, "-o", str(tmp_path / "out")])
    assert result.exit_code == 0 and "passed" in result.output, result.output


def test_check_runs_no_code_from_a_folder(made: Folder) -> None:
    certificate = json.loads((made / "certificate.json").read_text())
    for name, said in (("transformers-remote", "runs code"), ("anything", "no runtime")):
        certificate["exports"][0]["runtime_name"] = name
        (made / "hostile.json").write_text(json.dumps(certificate))
        result = run(made, "--check", made / "hostile.json", "onnx")
        assert result.exit_code == 2 and said in result.output


def test_check_leaves_out_what_would_run_code(made: Folder, tmp_path: Path) -> None:
    folder, certificate = tmp_path / "hf", tmp_path / "c.json"
    converter = SafetensorsConverter(SafetensorsOptions(remote_code=True))
    converter.convert(load_model(made / "m"), three_tiers(made / "m"), folder, lambda _: None)
    options = ("--factors", made / "f.json", "--length", 80, "-o", certificate)
    result = run(made, "m", folder, f"transformers-remote={folder}", *options)
    assert result.exit_code == 0, result.output
    result = run(made, "--check", certificate, folder)
    assert result.exit_code == 0, result.output
    assert "transformers-remote is left out" in " ".join(result.output.split())


def test_logits_that_are_no_numbers(
    made: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A valid certificate, tables and a plot of what is left."""
    outputs = OnnxSequence._outputs

    def broken(self: OnnxSequence, session: Any, tokens: list[int], *rest: Any) -> list[Any]:
        found = outputs(self, session, tokens, *rest)
        if self.length >= 64:
            found[0].numpy()[:] = np.nan  # a view
        return found

    monkeypatch.setattr(OnnxSequence, "_outputs", broken)
    certificate, card, plot = (tmp_path / name for name in ("c.json", "card.md", "plot.png"))
    words = ("--factors", made / "f.json", "--length", 80)
    written = ("-o", certificate, "--markdown", card, "--plot", plot)
    result = run(made, "m", "onnx", *words, *written)
    assert result.exit_code == 1 and "nan" in result.output, result.output

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    (found,) = json.loads(certificate.read_text(), parse_constant=refuse)["exports"]
    first = found["cases"][0]
    assert first["first_miss"] == 64 and first["max_kl"] is first["mean_difference"] is None
    assert [row[3] for row in first["rows"][64:]] == [None] * 16
    assert all(row[3] is not None for row in first["rows"][:64])
    assert "| one prefill | 80 | nan | nan | nan |" in card.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")
    result = CliRunner().invoke(main, ["report", str(certificate), "-o", str(tmp_path / "r.html")])
    assert result.exit_code == 0, result.output


def test_tables_come_before_a_plot_that_cannot_be_drawn(
    made: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ToolError("no plot")

    monkeypatch.setattr("longrope_export.verify.report.save_plot", fails)
    result = run(made, "m", "onnx", "--length", 80, "--plot", tmp_path / "p.png")
    assert result.exit_code == 2 and "no plot" in result.output and "one prefill" in result.output


def test_a_folder_without_a_definition_does_not_pass(made: Folder) -> None:
    result = run(made, "m", "m", "--factors", made / "f.json", "--length", 100, "--json")
    assert result.exit_code == 1
    (found,) = json.loads(result.stdout)["exports"]
    assert "carries no definition" in found["problems"][0]


def test_one_damaged_export_does_not_hide_the_others(made: Folder, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\3\0\0\0")
    options = ("--factors", made / "f.json", "--length", 80, "--json")
    result = run(made, "m", tmp_path / "bad.gguf", "onnx", *options)
    assert result.exit_code == 1
    bad, good = json.loads(result.stdout)["exports"]
    assert not bad["passed"] and bad["sha256"] is None and good["passed"]


def test_no_output_takes_the_place_of_an_input(made: Folder) -> None:
    before = (made / "f.json").read_bytes()
    options = ("--factors", made / "f.json", "--length", 80)
    assert run(made, "m", "onnx", *options, "-o", made / "f.json").exit_code == 2
    assert (made / "f.json").read_bytes() == before
    missing = run(made, "m", "onnx", *options, "--markdown", made / "no" / "card.md")
    assert missing.exit_code == 2
    for option in ("-o", "--markdown", "--plot"):
        for file in (made / "m" / "config.json", made / "onnx" / "model.onnx"):
            before = file.read_bytes()
            assert run(made, "m", "onnx", *options, option, file).exit_code == 2
            assert file.read_bytes() == before


def test_what_is_written_changes_no_export(made: Folder, tmp_path: Path) -> None:
    for option in ("-o", "--markdown", "--plot"):
        file = made / "onnx" / "new"
        result = run(made, "m", "onnx", "--length", 80, option, file)
        assert result.exit_code == 2 and "--embed" in result.output and not file.exists()
    shutil.copytree(made / "onnx", tmp_path / "x")
    before = content_hash(tmp_path / "x")
    (tmp_path / "x" / "README.md").write_text("a card")
    assert content_hash(tmp_path / "x") == before
    (tmp_path / "x" / "notes.md").write_text("anything else")
    assert content_hash(tmp_path / "x") != before


def test_two_outputs_are_two_files(made: Folder, tmp_path: Path) -> None:
    one, other = tmp_path / "x", tmp_path / ".." / tmp_path.name / "x"
    result = run(made, "m", "onnx", "--length", 80, "-o", one, "--markdown", other)
    assert result.exit_code == 2 and "-o and --markdown both name" in result.output
    assert not one.exists()


def test_many_rows_are_compared_as_few_are() -> None:
    rng = np.random.default_rng(0)
    expected = rng.normal(size=(150, 20)).astype(np.float32)
    got = expected + rng.normal(size=expected.shape).astype(np.float32) * 0.1
    whole = compare(got, expected, list(range(20)) * 7 + [None] * 10)
    alone = compare(got[149:], expected[149:], [None])
    assert len(whole.kl) == len(whole.loss) == 150 and whole.kl[149] == alone.kl[0]
    assert np.isnan(whole.loss[140:]).all() and np.isfinite(whole.loss[:140]).all()
