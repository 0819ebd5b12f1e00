"""`longrope-export safetensors` as a user runs it, above all when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_cli import ENVIRONMENT, check_refused, limit_file_size, sha256, start_and_signal
from test_cli import run as run_alone
from tiny_models import add_bpe_tokenizer, make_model

from longrope_export.cli import main
from longrope_export.gguf_format import read_header
from longrope_export.models.model import load_model


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """In this process: a new one takes half a second to start."""
    words = [str(argument) for argument in arguments]
    result = CliRunner().invoke(main, words)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return subprocess.CompletedProcess(words, result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = make_model(tmp_path / "model")
    add_bpe_tokenizer(folder)
    return folder


@pytest.fixture
def factors(folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "f.json"
    result = run("factors", "yarn", folder, "--target-length", 1024, "-o", path)
    assert result.returncode == 0, result.stderr
    return path


@pytest.fixture
def ladder(folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "ladder.json"
    words = ("--target-length", 1024, "--ladder", "256,512,1024", "-o", path)
    assert run("factors", "yarn", folder, *words).returncode == 0
    return path


def test_every_command_reads_the_folder_back(folder: Path, ladder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    check_refused(run("safetensors", folder, "--factors", ladder, "-o", output), "middle_tiers")
    words = ("--factors", ladder, "-o", output, "--approximate", "--json")
    result = run("safetensors", folder, *words)
    report = json.loads(result.stdout)
    assert report["tiers"] == [256, 512, 1024]
    assert "dropped: switch" in result.stderr
    expected = load_model(output).native

    shown = json.loads(run("inspect", output, "--json").stdout)
    assert [tier["max_length"] for tier in shown["config"]["tiers"]] == report["tiers"]
    assert shown["model"]["window"] == 1024
    assert set(shown["honours"]) >= {"transformers", "vLLM", "SGLang", "mlx-lm"}

    printed = run("factors", "file", folder, "--factors", output / "longrope.json")
    assert json.loads(printed.stdout)["tiers"] == shown["config"]["tiers"]
    longer = run("factors", "pi", output, "--target-length", 4096)
    assert json.loads(longer.stdout)["max_position_embeddings"] == 4096

    gguf = tmp_path / "m.gguf"
    result = run("gguf", output, "--pre", "gpt-2", "--outtype", "f32", "-o", gguf)
    assert result.returncode == 0, result.stderr
    back = load_model(gguf).native
    assert [tier.max_length for tier in back.tiers] == [256, 512, 1024]
    assert back.switch == expected.switch

    again = tmp_path / "again"
    words = ("--approximate", "-o", again, "--dtype", "bf16")
    assert run("safetensors", gguf, *words).returncode == 0
    assert load_model(again).native == back
    assert read_header(gguf).get("llama.context_length") == 1024


def test_default_names_and_dry_run(folder: Path, factors: Path) -> None:
    result = run("safetensors", folder, "--factors", factors, "--dry-run")
    assert "would be written" in result.stderr
    assert sorted(path.name for path in folder.parent.iterdir()) == ["f.json", "model"]
    assert run("safetensors", folder, "--factors", factors, "--link").returncode == 0
    written = folder.parent / "model-longrope"
    assert (written / "model.safetensors").samefile(folder / "model.safetensors")


def test_one_message_for_each_mistake(folder: Path, factors: Path, tmp_path: Path) -> None:
    given = ("--factors", factors)
    check_refused(run("safetensors", folder, *given, "-o", folder), "is or holds the input")
    check_refused(run("safetensors", folder, "-o", tmp_path / "out"), "nothing to do")
    check_refused(run("safetensors", folder, *given, "-o", tmp_path / "a" / "b"), "mkdir -p")
    check_refused(run("safetensors", folder, *given, "--dtype", "f16"), "--dtype is for a GGUF")
    check_refused(run("safetensors", folder, *given, "--max-shard-size", "big"), "5GB or 500MB")
    check_refused(run("safetensors", folder, *given, "-o", factors), "holds the input")
    inside = folder.parent / "holds"
    inside.mkdir()
    given = ("--factors", factors.rename(inside / "f.json"))
    check_refused(run("safetensors", folder, *given, "-o", inside, "-f"), "holds the input")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["holds", "model"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_must_not_be_written(folder: Path, factors: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    result = run("safetensors", folder, "--factors", factors, "-o", locked / "out")
    check_refused(result, "is not writable")


def test_a_read_only_file_system(folder: Path, factors: Path) -> None:
    """Where even root cannot write."""
    result = run("safetensors", folder, "--factors", factors, "-o", "/proc/out")
    check_refused(result, "/proc")


@pytest.fixture
def big_folder(folder: Path) -> Path:
    """A checkpoint of 1 GB, most of it a hole."""
    path, size = folder / "model.safetensors", 1 << 30
    entry = {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    header = json.dumps(entry).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    return folder


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_of_a_copy(
    number: signal.Signals, factors: Path, big_folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    before = sha256(big_folder / "config.json")
    arguments: list[object] = ["safetensors", big_folder, "--factors", factors, "-o", target / "x"]
    assert start_and_signal(arguments, target, number) != 0
    assert not (target / "x").exists()
    if number == signal.SIGINT:
        assert list(target.iterdir()) == []
    assert sha256(big_folder / "config.json") == before


def test_file_size_limit(big_folder: Path, factors: Path, tmp_path: Path) -> None:
    result = run_alone(
        *("safetensors", big_folder, "--factors", factors, "-o", tmp_path / "x"),
        preexec_fn=limit_file_size,
    )
    check_refused(result, "cannot write", "free some space")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.json", "model"]


def test_two_writers_at_once(folder: Path, factors: Path, tmp_path: Path) -> None:
    """Each writes a folder of its own; the last rename wins or is refused, and one is whole."""
    output = tmp_path / "out"
    command = [sys.executable, "-m", "longrope_export", "safetensors", str(folder)]
    command += ["--factors", str(factors), "-o", str(output), "--force"]
    writers = [subprocess.Popen(command, env=ENVIRONMENT) for _ in range(2)]
    codes = {writer.wait() for writer in writers}
    assert 0 in codes
    assert codes <= {0, 2}
    assert load_model(output).window == 1024
    assert not list(tmp_path.glob(".*"))
