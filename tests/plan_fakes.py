"""A stand-in for longrope-export that writes what stages write."""

from __future__ import annotations

import sys
from pathlib import Path

# run in the folder of a test: `hang` and `fail` name output folders or files in which it stops
PROGRAM = """
import os, sys, time
from pathlib import Path
arguments = sys.argv[1:]
with open("calls.log", "a") as log:
    log.write(" ".join(arguments) + "\\n")
output = Path(arguments[arguments.index("-o") + 1])
command, name = arguments[0], output.stem
def lists(file):
    return name in Path(file).read_text().split() if Path(file).exists() else False
print("working on", name, flush=True)
if command in ("search", "finetune"):
    output.mkdir(exist_ok=True)
    if (output / "settings.json").exists() and "--resume" not in arguments:
        sys.exit("Error: begun before")
    (output / "settings.json").write_text("{}")
while lists("hang"):
    time.sleep(0.05)
if lists("fail"):
    sys.exit("Error: it does not work")
if command == "search":
    (output / "factors.json").write_text("{}")
    (output / "result.json").write_text("{}")
elif command == "finetune":
    (output / "model").mkdir(exist_ok=True)
    (output / "model" / "config.json").write_text("{}")
    (output / "factors.json").write_text("{}")
    (output / "result.json").write_text("{}")
elif not lists("write-nothing"):
    output.write_text("{}")
"""


def write_program(folder: Path) -> tuple[str, str]:
    """The stand-in, as `program` of run_plan."""
    path = folder / "fake_longrope_export.py"
    path.write_text(PROGRAM)
    return sys.executable, str(path)
