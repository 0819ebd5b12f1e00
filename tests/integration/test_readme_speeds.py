"""The speeds of README.md, from a small run of their benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.update_readme import speed_table

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark empties Linux' page cache")
def test_speeds_of_a_small_run(tmp_path: Path) -> None:
    output = tmp_path / "speed.json"
    benchmark = ROOT / "benchmarks" / "gguf_export.py"
    command = [sys.executable, benchmark, "--workdir", tmp_path / "work", "--size", "0.01"]
    command += ["--repeat", "1", "--without-stock", "--json", output]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, timeout=600)
    found = json.loads(output.read_text(encoding="utf-8"))
    lines = speed_table(found).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| folder to bf16 GGUF",
        "| folder to f16",
        "| folder to q8_0",
        "| factors into a GGUF",
        "| factors in place",
        "| factors into a GGUF, not cached",
        "| factors in place, not cached",
    ]
    seconds = {m["name"]: m["seconds"][0] for m in found["factors into a GGUF"]}
    assert f"| {seconds['in place'] / seconds['cp']:.2g} |" in lines[6]
