"""`search` as a command: what it writes and prints, killing and resuming, refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from processes import end, start_until
from tiny_models import SENTENCES, add_bpe_tokenizer, edit_json, make_model

from longrope_export.cli import main
from longrope_export.errors import ConfigError
from longrope_export.factor_files import read_factors
from longrope_export.search.practical import PracticalSettings

WINDOW = 64


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "model"
    make_model(path, dtype="float32", max_position_embeddings=WINDOW)
    add_bpe_tokenizer(path)
    books = path.parent / "books"
    books.mkdir()
    for number in range(4):
        (books / f"{number}.txt").write_text(" ".join(SENTENCES[number:] * 30))
    return path


def arguments(model: Path, run: Path, *more: str) -> list[str]:
    given = ["search", str(model), "--target-length", "128", "--text", str(model.parent / "books")]
    given += ["-o", str(run), "--documents", "2,1,1"]
    if "--ladder" not in more:
        given += ["--population", "4", "--iterations", "2"]
    others = {"--recover", "--needle-keys", "--switch"}  # ignore them, or are them
    needles = [] if others & {*more} else ["--needle-keys", "0"]
    return [*given, *needles, *more]


def test_the_command_searches_plots_and_prints_json(
    with_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longrope_export.cli.search.SECONDS_BETWEEN_LINES", 0)
    result = CliRunner().invoke(main, arguments(with_tokenizer, tmp_path / "run", "--json"))
    assert result.exit_code == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["test"][-1]["name"] == "result"
    for name in ("factors.json", "result.json", "convergence.png", "factors.png"):
        assert (tmp_path / "run" / name).stat().st_size > 100
    assert "nats against" in result.stderr
    assert "longrope-export gguf" in result.stderr
    # what was done, line by line where there is no terminal
    for said in ("searching", "choosing on validation documents", "passes", "tokens, 100%"):
        assert said in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("searching: ")]
    assert any(all(f", {form} " in line for form in ("pi", "ntk", "yarn")) for line in lines)


def test_the_command_killed_at_any_moment_resumes_to_the_same_result(
    with_tokenizer: Path, tmp_path: Path
) -> None:
    whole = CliRunner().invoke(main, arguments(with_tokenizer, tmp_path / "whole"))
    assert whole.exit_code == 0, whole.stderr
    command = [
        sys.executable,
        "-m",
        "longrope_export",
        *arguments(with_tokenizer, tmp_path / "cut"),
    ]
    log = tmp_path / "cut" / "log.jsonl"
    end(start_until(command, lambda: log.is_file() and log.read_bytes().count(b"\n") >= 3))
    assert not (tmp_path / "cut" / "factors.json").exists()
    resumed = CliRunner().invoke(main, arguments(with_tokenizer, tmp_path / "cut", "--resume"))
    assert resumed.exit_code == 0, resumed.stderr
    first, second = (read_factors(tmp_path / n / "factors.json", None) for n in ("whole", "cut"))
    assert first.tiers == second.tiers
    assert first.switch == second.switch


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--target-length", "64"], "own window is 64 already"),
        (["--target-length", "1000000"], "a window needs"),
        (["--documents", "2"], "expected 3 numbers"),
        (["--documents", "a,b,c"], "expected whole numbers"),
        (["--recover", "32"], "expected --target-length 64"),
        (["--resume"], "no run to resume"),
        (["--against", "yarn,none"], "method 'none' is not known"),
        (["--dtype", "float16", "--text", "none.txt"], "no such file"),
        (["--ladder", "64,96"], "expected the target 128"),
        (["--against", "yarn-ladder:x", "--ladder", "64,128"], "METHOD-ladder:NUMBER"),
        (["--against", "yarn-ladder"], "ladders belong to --ladder"),
        (["--budget-tokens", "0"], "--budget-tokens must be above 0"),
        (["--budget-minutes", "-1"], "--budget-minutes must be above 0"),
        (["--budget-tokens", "nan"], "--budget-tokens must be above 0 and finite, got nan"),
        (["--budget-tokens", "inf"], "--budget-tokens must be above 0 and finite, got inf"),
        (["--seed", "-1"], "-1 is not in the range 0<=x<=4294967295"),
        (["--recover", "32", "--recover-cap", "inf"], "--recover-cap must be above 0 and finite"),
        (["--recover", "32", "--recover-cap", "nan"], "--recover-cap must be above 0 and finite"),
        (["--population", "0"], "--population and --documents must be 1 or more"),
        (["--needle-keys", "100"], "--needle-keys must be 0..64"),
        (["--tier-tokens", "5"], "--tier-tokens belongs to --ladder"),
        (["--gradient-steps", "5"], "--algorithm longrope does not use --gradient-steps"),
        (["--ladder", "64,128", "--attention-factor", "none"], "does not use --attention-factor"),
        (["--ladder", "64,128", "--recover", "32"], "two searches"),
        (["--algorithm", "practical"], "does not use --population"),
        (["--recover", "32", "--algorithm", "practical"], "practical does not use --population"),
        (["--recover", "32", "--gradient-steps", "3"], "longrope does not use --gradient-steps"),
        (
            ["--ladder", "64,128", "--no-refine", "--tier-tokens", "8"],
            "--no-refine does not use --tier-tokens",
        ),
        (["--switch", "causal", "--needle-keys", "7"], "--switch does not use --needle-keys"),
    ],
)
def test_bad_input_is_one_clear_error(
    with_tokenizer: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    result = CliRunner().invoke(main, arguments(with_tokenizer, tmp_path / "run", *more))
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "run" / "factors.json").exists()


@pytest.mark.parametrize("name", ["family_evaluations", "gradient_steps"])
def test_stages_of_the_practical_search_are_no_negative_numbers(name: str) -> None:
    option = name.replace("_", "-")
    with pytest.raises(ConfigError, match=f"--{option} must be 0 or more, got -1"):
        PracticalSettings(**{name: -1})


@pytest.mark.parametrize("damage", ["{", "[]", '{"options": 1}', "\xff"])
def test_damaged_settings_are_one_clear_error(
    with_tokenizer: Path, tmp_path: Path, damage: str
) -> None:
    (tmp_path / "settings.json").write_text(damage, encoding="latin-1")
    result = CliRunner().invoke(main, arguments(with_tokenizer, tmp_path, "--resume"))
    assert result.exit_code == 2
    assert "settings.json: damaged: " in result.stderr


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bloom"])
def test_a_model_without_rope_is_refused(tmp_path: Path, with_tokenizer: Path, kind: str) -> None:
    folder = tmp_path / kind
    folder.mkdir()
    edit_json(folder / "config.json", model_type=kind, hidden_size=8, num_hidden_layers=2)
    books = str(with_tokenizer.parent / "books")
    words = ["search", str(folder), "--target-length", "128", "--text", books]
    result = CliRunner().invoke(main, [*words, "-o", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert f"a {kind} has no rotary position embedding" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_searched_ladder_is_taken_by_every_exporter(with_tokenizer: Path, tmp_path: Path) -> None:
    run = arguments(with_tokenizer, tmp_path / "run", "--ladder", "64,96,128", "--switch", "causal")
    more = ["--family-evaluations", "6", "--against", "yarn-ladder"]
    result = CliRunner().invoke(main, [*run, *more])
    assert result.exit_code == 0, result.stderr
    factors = str(tmp_path / "run" / "factors.json")
    searched = read_factors(Path(factors), None)
    assert [tier.max_length for tier in searched.tiers] == [64, 96, 128]
    exports = {
        "gguf": ["-o", str(tmp_path / "model.gguf"), "--pre", "gpt-2"],
        "safetensors": ["-o", str(tmp_path / "folder"), "--remote-code"],
        "onnx": ["-o", str(tmp_path / "onnx")],
    }
    for command, more in exports.items():
        given = [command, str(with_tokenizer), "--factors", factors, *more]
        result = CliRunner().invoke(main, given)
        assert result.exit_code == 0, result.stderr
        written = read_factors(
            Path(more[1]) / "longrope.json" if command == "safetensors" else Path(more[1]), None
        )
        assert [t.max_length for t in written.tiers] == [64, 96, 128]
        for one, other in zip(written.tiers, searched.tiers, strict=True):
            assert one.rescale_factors == pytest.approx(other.rescale_factors, rel=1e-6)
            assert one.attention_factor == pytest.approx(other.attention_factor, rel=1e-6)
