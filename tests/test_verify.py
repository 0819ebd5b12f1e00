"""The command `verify`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console
from test_onnx import export, make_source
from verified import make_verified, run

from longrope_export.cli import main
from longrope_export.errors import ModelError, ToolError
from longrope_export.runtimes.onnx_sequence import OnnxSequence
from longrope_export.runtimes.open import parse_export
from longrope_export.verify.certificate import content_hash
from longrope_export.verify.report import rich_tables, table_rows


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See make_verified."""
    return make_verified(tmp_path_factory.mktemp("command"))


def test_which_runtime_runs_what(tmp_path: Path) -> None:
    source = make_source(tmp_path / "m")
    assert parse_export(str(source)).runtime == "transformers"
    assert parse_export(f"transformers-stock={source}").runtime == "transformers-stock"
    onnx = export(source, None, tmp_path / "onnx")
    assert parse_export(str(onnx)).runtime == "onnxruntime"
    for wrong in ("nothing", f"vllm={source}", f"genai={tmp_path / 'no'}", str(tmp_path)):
        with pytest.raises(ModelError):
            parse_export(wrong)


def test_what_the_command_writes(made: Path) -> None:
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


def test_a_miss_is_exit_code_1_and_named(made: Path) -> None:
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


def test_brackets_in_names_are_shown(made: Path) -> None:
    certificate = json.loads((made / "certificate.json").read_text())
    (found,) = certificate["exports"]
    found["path"], found["problems"] = "onnx[v2]", ["layers[a] differ"]
    found["cases"][0]["name"] = "case[b]"
    console = Console(width=200, record=True)
    console.print(*rich_tables(certificate))
    text = console.export_text()
    assert all(part in text for part in ("onnx[v2]", "layers[a] differ", "case[b]"))


def test_wrong_use(made: Path) -> None:
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
def test_bad_values_are_exit_code_2(made: Path, options: tuple[object, ...], said: str) -> None:
    (made / "latin.txt").write_bytes(b"caf\xe9")
    words = [made / str(w) if str(w).startswith(("latin", "plot")) else w for w in options]
    result = run(made, "m", "onnx", "--length", 80, *words)
    assert result.exit_code == 2 and said in result.output, result.output
    assert not (made / "plot.xyz").exists()


def test_export_commands_verify_at_once(made: Path, tmp_path: Path) -> None:
    words = ["onnx", str(made / "m"), "--factors", str(made / "f.json"), "--verify"]
    result = CliRunner().invoke(main, [*words, "-o", str(tmp_path / "out")])
    assert result.exit_code == 0 and "passed" in result.output, result.output


def test_logits_that_are_no_numbers(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ToolError("no plot")

    monkeypatch.setattr("longrope_export.verify.report.save_plot", fails)
    result = run(made, "m", "onnx", "--length", 80, "--plot", tmp_path / "p.png")
    assert result.exit_code == 2 and "no plot" in result.output and "one prefill" in result.output


def test_a_folder_without_a_definition_does_not_pass(made: Path) -> None:
    result = run(made, "m", "m", "--factors", made / "f.json", "--length", 100, "--json")
    assert result.exit_code == 1
    (found,) = json.loads(result.stdout)["exports"]
    assert "carries no definition" in found["problems"][0]


def test_one_damaged_export_does_not_hide_the_others(made: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\3\0\0\0")
    options = ("--factors", made / "f.json", "--length", 80, "--json")
    result = run(made, "m", tmp_path / "bad.gguf", "onnx", *options)
    assert result.exit_code == 1
    bad, good = json.loads(result.stdout)["exports"]
    assert not bad["passed"] and bad["sha256"] is None and good["passed"]


def test_no_output_takes_the_place_of_an_input(made: Path) -> None:
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


def test_what_is_written_changes_no_export(made: Path, tmp_path: Path) -> None:
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


def test_two_outputs_are_two_files(made: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "x", tmp_path / ".." / tmp_path.name / "x"
    result = run(made, "m", "onnx", "--length", 80, "-o", one, "--markdown", other)
    assert result.exit_code == 2 and "-o and --markdown both name" in result.output
    assert not one.exists()
