"""The commands as a user runs them, above all when something is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGUFValueType
from gguf_files import gguf_keys, write_gguf_file
from tiny_models import add_bpe_tokenizer, make_model

from longrope_export.factor_files import to_json
from longrope_export.gguf_format import TensorInfo, build_header, read_header
from longrope_export.gguf_values import make_key_value
from longrope_export.ladder import make_config
from longrope_export.models.model import load_model

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'converters'}"}


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "longrope_export", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, check=False, **options
    )


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """One message, exit 2, no traceback, nothing on stdout."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.count("Error: ") == 1
    for word in words:
        assert word in result.stderr


@pytest.fixture
def factors(tiny_gguf: Path, tmp_path: Path) -> Path:
    path = tmp_path / "f.json"
    result = run("factors", "yarn", tiny_gguf, "--target-length", 1024, "-o", path)
    assert result.returncode == 0, result.stderr
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = make_model(tmp_path / "hf")
    add_bpe_tokenizer(folder)
    return folder


def test_factors_gguf_inspect(tiny_gguf: Path, factors: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    result = run("gguf", tiny_gguf, "--factors", factors, "-o", output, "--json")
    report = json.loads(result.stdout)
    assert report["output"] == str(output)
    assert report["tiers"] == [1024]
    assert report["route"] == "bake"
    shown = json.loads(run("inspect", output, "--json").stdout)
    assert shown["config"]["max_position_embeddings"] == 1024
    assert shown["model"]["window"] == 1024
    assert shown["honours"]["llama.cpp"]["last_tier"]["verdict"] == "yes"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.json", "out.gguf", "tiny.gguf"]


def test_inspect_shows_tables_and_a_picture(tiny_gguf: Path, factors: Path, tmp_path: Path) -> None:
    picture = tmp_path / "w.png"
    result = run("inspect", tiny_gguf, "--factors", factors, "--plot", picture)
    assert result.returncode == 0, result.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    runtimes = ("llama.cpp", "vLLM", "onnxruntime-genai")
    for words in ("rope theta", "up to tokens", "tokens per turn", *runtimes):
        assert words in result.stdout
    assert "up to tokens" in run("inspect", factors).stdout


def test_factors_go_to_stdout_and_can_be_piped(tiny_gguf: Path) -> None:
    result = run("factors", "ntk", tiny_gguf, "--target-length", 512)
    assert json.loads(result.stdout)["tiers"][0]["max_length"] == 512
    assert result.stderr == ""


def test_factors_from_a_file_and_from_csv(tiny_gguf: Path, factors: Path, tmp_path: Path) -> None:
    baked = tmp_path / "baked.gguf"
    run("gguf", tiny_gguf, "--factors", factors, "-o", baked)
    result = run("factors", "file", tiny_gguf, "--factors", baked, "--switch", "sequence")
    assert json.loads(result.stdout)["switch"] == "sequence"
    csv = tmp_path / "a.csv"
    csv.write_text("16\n" + "\n".join(str(1 + i / 2) for i in range(8)))
    output = tmp_path / "csv.gguf"
    assert run("gguf", tiny_gguf, "--tier", f"512={csv}", "-o", output).returncode == 0
    tier = load_model(output).native.tiers[0]
    assert (tier.num_start_tokens, tier.rescale_factors[2]) == (16, 2.0)
    check_refused(
        run("factors", "file", tiny_gguf, "--factors", baked, "--beta-fast", 3), "--beta-fast"
    )
    check_refused(run("gguf", tiny_gguf, "--tier", "x.csv"), "expected LENGTH=FILE.csv")


@pytest.mark.parametrize("outtype", ["f32", "bf16", "q8_0"])
def test_folder_to_gguf(outtype: str, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    result = run("gguf", folder, "--outtype", outtype, "--pre", "gpt-2", "-o", output)
    assert result.returncode == 0, result.stderr
    assert read_header(output).architecture == "llama"


def test_default_names_do_not_touch_the_source(
    folder: Path, tiny_gguf: Path, factors: Path
) -> None:
    run("gguf", tiny_gguf, "--factors", factors)
    assert tiny_gguf.with_name("tiny-longrope.gguf").is_file()
    run("gguf", folder, "--pre", "gpt-2")
    assert (folder.parent / "hf-auto.gguf").is_file()


def test_unknown_pre_tokenizer_says_its_hash(folder: Path, tmp_path: Path) -> None:
    result = run("gguf", folder, "-o", tmp_path / "out.gguf")
    check_refused(result, "--pre")
    assert any(len(word.strip(".,:;")) == 64 for word in result.stderr.split())
    assert not list(tmp_path.glob("*.gguf"))


BAD_FACTORS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "rope_theta is 500000, the model has 10000": lambda v: {**v, "rope_theta": 500000.0},
    "expected rotary_dim / 2 = 8": lambda v: {
        **v,
        "tiers": [{**v["tiers"][0], "rescale_factors": [1.0] * 7}],
    },
    "must be a finite number above 0 (1e-06 to 1e+09), got nan": lambda v: {
        **v,
        "tiers": [{**v["tiers"][0], "rescale_factors": [1.0] * 7 + [float("nan")]}],
    },
    "not in order": lambda v: {**v, "tiers": [*v["tiers"], {**v["tiers"][0], "max_length": 8}]},
}


@pytest.mark.parametrize("message", BAD_FACTORS)
def test_bad_factors_leave_everything_as_it_was(
    message: str, tiny_gguf: Path, tmp_path: Path
) -> None:
    good = to_json(make_config(load_model(tiny_gguf), "yarn", 1024))
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(BAD_FACTORS[message](good)))
    before = sha256(tiny_gguf)
    for arguments in (("-o", tmp_path / "out.gguf"), ("--in-place",)):
        check_refused(run("gguf", tiny_gguf, "--factors", bad, *arguments), message, "bad.json")
    assert sha256(tiny_gguf) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json", "tiny.gguf"]


def test_truncated_and_hostile_gguf(tiny_gguf: Path, factors: Path, tmp_path: Path) -> None:
    whole = tiny_gguf.read_bytes()
    hostile = {
        "cut-data": whole[:-100],
        "cut-header": whole[:200],
        "counts": whole[:8] + struct.pack("<QQ", 1 << 61, 1 << 61) + whole[24:],
        "not-gguf": b"PK\x03\x04" + whole[4:],
    }
    for name, data in hostile.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(data)
        result = run("gguf", path, "--factors", factors, "-o", tmp_path / "out.gguf")
        check_refused(result, f"{name}.gguf")
        assert path.read_bytes() == data
    assert not (tmp_path / "out.gguf").exists()
    assert not list(tmp_path.glob(".*"))


def test_output_equal_to_input(
    tiny_gguf: Path, folder: Path, factors: Path, tmp_path: Path
) -> None:
    before = sha256(tiny_gguf)
    link = tmp_path / "link.gguf"
    link.symlink_to(tiny_gguf)
    for output in (tiny_gguf, link):
        result = run("gguf", tiny_gguf, "--factors", factors, "-o", output, "--force")
        check_refused(result, "is the same file as the input")
    weights = folder / "model.safetensors"
    result = run("gguf", folder, "--pre", "gpt-2", "-o", weights, "--force")
    check_refused(result, "is the same file as the input")
    result = run("factors", "file", tiny_gguf, "--factors", factors, "-o", factors, "--force")
    check_refused(result, "is the same file as the input")
    assert sha256(tiny_gguf) == before


def test_an_existing_output_needs_force(tiny_gguf: Path, factors: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    output.write_bytes(b"precious")
    check_refused(run("gguf", tiny_gguf, "--factors", factors, "-o", output), "use --force")
    assert output.read_bytes() == b"precious"
    assert run("gguf", tiny_gguf, "--factors", factors, "-o", output, "-f").returncode == 0


def test_wrong_use(tiny_gguf: Path, folder: Path, factors: Path, tmp_path: Path) -> None:
    check_refused(run("gguf", tiny_gguf), "nothing to do")
    check_refused(run("gguf", tmp_path / "none.gguf"), "no such file")
    check_refused(
        run("gguf", tiny_gguf, "--factors", factors, "--in-place", "-o", "x"), "leave out"
    )
    check_refused(
        run("gguf", folder, "--factors", factors, "--in-place"), "--in-place edits a GGUF"
    )
    check_refused(
        run("gguf", tiny_gguf, "--factors", factors, "-o", tmp_path / "no" / "x"), "does not exist"
    )
    check_refused(run("factors", "yarn", tiny_gguf), "needs --target-length")


def test_dry_run_writes_nothing(tiny_gguf: Path, factors: Path, tmp_path: Path) -> None:
    result = run("gguf", tiny_gguf, "--factors", factors, "-o", tmp_path / "x.gguf", "--dry-run")
    assert result.returncode == 0
    assert not (tmp_path / "x.gguf").exists()
    for flag in ("--verify", "--json"):
        check_refused(run("gguf", tiny_gguf, "--factors", factors, "--dry-run", flag), flag)


def test_verbose_shows_where_it_went_wrong(tmp_path: Path) -> None:
    result = run("-v", "gguf", tmp_path / "none.gguf")
    assert result.returncode == 2
    assert "Traceback" in result.stderr


def hear_interrupts() -> None:
    """A test run in the background of a shell ignores SIGINT, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_and_signal(arguments: list[object], folder: Path, number: signal.Signals) -> int:
    """Send a signal as soon as the temporary file shows up; returns the exit code."""
    command = [sys.executable, "-m", "longrope_export", *map(str, arguments)]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stderr=subprocess.PIPE, preexec_fn=hear_interrupts
    )
    deadline = time.monotonic() + 60
    while not list(folder.glob(".*.partial")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)
    process.send_signal(number)
    process.communicate(timeout=60)
    return process.returncode


@pytest.fixture
def big_gguf(tmp_path: Path) -> Path:
    """A file of 1 GB, most of it a hole."""
    elements = 1 << 28
    path = write_gguf_file(
        tmp_path / "big.gguf", gguf_keys(), {"output_norm.weight": np.ones(64, np.float32)}
    )
    header = read_header(path)
    infos = [*header.tensors, TensorInfo("token_embd.weight", (64, elements // 64), 0, 256)]
    packed = build_header(header.key_values.values(), infos)
    with path.open("wb") as file:
        file.write(packed)
        file.truncate(len(packed) + 256 + 4 * elements)
    return path


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_of_a_write(
    number: signal.Signals, factors: Path, big_gguf: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    arguments: list[object] = ["gguf", big_gguf, "--factors", factors, "-o", target / "x.gguf"]
    assert start_and_signal(arguments, target, number) != 0
    assert not (target / "x.gguf").exists()
    if number == signal.SIGINT:
        assert list(target.iterdir()) == []


def limit_file_size() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


def test_file_size_limit(big_gguf: Path, factors: Path, tmp_path: Path) -> None:
    result = run(
        *("gguf", big_gguf, "--factors", factors, "-o", tmp_path / "x.gguf"),
        preexec_fn=limit_file_size,
    )
    check_refused(result, "cannot write", "x.gguf")
    assert not list(tmp_path.glob("*x.gguf*"))


def test_full_disk(big_gguf: Path, factors: Path, small_disk: Path) -> None:
    result = run("gguf", big_gguf, "--factors", factors, "-o", small_disk / "x.gguf")
    check_refused(result, "No space left on device", "free some space")
    assert list(small_disk.iterdir()) == []


def test_two_writers_at_once(tiny_gguf: Path, factors: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    command = [sys.executable, "-m", "longrope_export", "gguf", str(tiny_gguf)]
    command += ["--factors", str(factors), "-o", str(output), "--force"]
    writers = [subprocess.Popen(command, env=ENVIRONMENT) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert load_model(output).window == 1024
    assert not list(tmp_path.glob(".*"))


def test_no_command_overwrites_what_it_reads(
    tiny_gguf: Path, folder: Path, factors: Path, tmp_path: Path
) -> None:
    before = sha256(tiny_gguf), sha256(folder / "config.json")
    check_refused(run("inspect", tiny_gguf, "--plot", tiny_gguf, "-f"), "same file")
    output = folder / "config.json"
    check_refused(run("factors", "pi", folder, "--target-length", 512, "-o", output, "-f"), "same")
    csv = tmp_path / "a.csv"
    csv.write_text("\n".join(["1.5"] * 8))
    tier = f"512={csv}"
    check_refused(run("factors", "file", tiny_gguf, "--tier", tier, "-o", csv, "-f"), "same file")
    check_refused(run("gguf", tiny_gguf, "--tier", tier, "-o", csv, "-f"), "same file")
    assert before == (sha256(tiny_gguf), sha256(folder / "config.json"))


def test_nothing_given_is_ignored(tiny_gguf: Path, folder: Path, factors: Path) -> None:
    check_refused(run("gguf", folder, "--pre", "gpt-2", "--switch", "causal"), "--switch")
    check_refused(run("inspect", factors, "--factors", factors), "leave out --factors")
    bake = ("gguf", tiny_gguf, "--factors", factors)
    for option in ("--threads=2", "--trust-remote-code", "--pre=gpt-2", "--model-name=x"):
        check_refused(run(*bake, option), f"{option.partition('=')[0]} is ignored for", "header")
    check_refused(run(*bake, "--in-place", "--force"), "--force is ignored for")
    own = ("gguf", folder, "--pre", "gpt-2", "--trust-remote-code")
    check_refused(run(*own), "--trust-remote-code is ignored", "converted here")


def test_dry_run_finds_what_the_real_run_would(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    output = tmp_path / "x.gguf"
    check_refused(run("gguf", folder, "--pre", "gpt-2", "-o", output, "--dry-run"), "safetensors")


@pytest.mark.parametrize("factor", [1e39, 1e-50, 10**400])
def test_factors_that_float32_cannot_hold(factor: float, tiny_gguf: Path, tmp_path: Path) -> None:
    values = to_json(make_config(load_model(tiny_gguf), "yarn", 1024))
    values["tiers"][0]["rescale_factors"][0] = factor
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(values))
    check_refused(run("gguf", tiny_gguf, "--factors", bad), "finite number above 0")


def test_split_model_with_factors_in_a_later_shard(tmp_path: Path, factors: Path) -> None:
    u16 = GGUFValueType.UINT16
    for number in range(2):
        split = [
            make_key_value("split.no", u16, number),
            make_key_value("split.count", u16, 2),
            make_key_value("split.tensors.count", GGUFValueType.INT32, 2),
        ]
        keys = [*(gguf_keys() if number == 0 else []), *split]
        tensors = (
            {"token_embd.weight": np.zeros((5, 64), np.float32)}
            if number == 0
            else {"rope_freqs.weight": np.full(8, 8, np.float32)}
        )
        write_gguf_file(tmp_path / f"m-0000{number + 1}-of-00002.gguf", keys, tensors)
    result = run("gguf", tmp_path / "m-00001-of-00002.gguf", "--factors", factors)
    check_refused(result, "m-00002-of-00002.gguf", "llama-gguf-split --merge")
    first = tmp_path / "m-00001-of-00002.gguf"
    before = sha256(first)
    result = run("gguf", first, "--factors", factors, "--in-place")
    check_refused(result, "m-00002-of-00002.gguf", "llama-gguf-split --merge")
    assert sha256(first) == before
