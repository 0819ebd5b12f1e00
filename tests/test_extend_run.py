"""Running a plan: what is done, what is done again, and what a kill leaves behind."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from plan_fakes import write_program
from processes import end, start_until

from longrope_export.cli import main
from longrope_export.cli.extend import read_commands
from longrope_export.errors import ConfigError, LongRopeError, OutputError, ToolError
from longrope_export.finetune.plan import parse_plan
from longrope_export.finetune.resolve import resolve
from longrope_export.finetune.runner import run_plan
from longrope_export.models.model import load_model

PLAN = """
[texts]
books = ["books"]

[[stage]]
name = "search"
run = "search"
text = "books"
target-length = 512
[[stage]]
name = "tune"
run = "finetune"
text = ["train.txt"]
steps = 5
[[stage]]
name = "out"
run = "gguf"
"""
FOLDERS = ("01-search", "02-tune", "03-out")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hf_config: Callable[..., Path]) -> Path:
    """The current folder: model/, books/, train.txt; a stand-in for the program."""
    hf_config("model")
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("a book")
    (tmp_path / "train.txt").write_text("to train on")
    write_program(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    return tmp_path


def run(plan: str = PLAN, **given: Any) -> None:
    model = load_model(Path("model"))
    steps = resolve(parse_plan(plan, "plan.toml"), model, Path("run"), read_commands())
    run_plan(steps, Path("run"), plan, model.fingerprint, program=write_program(Path()), **given)


def calls() -> list[str]:
    """Outputs of the stages that ran since the last time, and whether they were to go on."""
    log = Path("calls.log")
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return [
        Path(line.split(" -o ")[1].split()[0]).stem
        + "".join(f" {word}" for word in ("--resume", "--force") if word in line.split())
        for line in lines
    ]


def state() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("run/state.json").read_text())
    return found["stages"]


def test_a_run_keeps_what_it_did_and_does_it_once(place: Path) -> None:
    told: list[str] = []
    shown: list[bytes] = []
    run(say=told.append, echo=shown.append)
    assert calls() == ["search", "tune", "out"]
    assert list(state()) == list(FOLDERS)
    for name, entry in state().items():
        assert (entry["status"], entry["exit_code"]) == ("done", 0)
        assert len(entry["hash"]) == 64
        command = Path("run", name, "command.txt").read_text()
        assert command.split()[1:] == entry["argv"][2:]
        assert command.startswith("longrope-export ")
    assert Path("run/plan.toml").read_text() == PLAN
    assert Path("run/02-tune/log.txt").read_text() == "working on tune\n"
    assert b"".join(shown) == b"working on search\nworking on tune\nworking on out\n"
    assert "stage 2, tune: longrope-export finetune model --text train.txt" in "\n".join(told)
    told.clear()
    run(say=told.append)
    assert calls() == []
    assert told == ["run: all 3 stages are done"]


def test_a_failed_stage_ends_the_run_and_is_gone_on_with(place: Path) -> None:
    Path("fail").write_text("tune")
    with pytest.raises(ToolError) as caught:
        run()
    message = str(caught.value)
    assert "stage 2, tune, failed with exit code 1" in message
    assert "Error: it does not work" in message
    assert "--from tune" in message
    assert [entry["status"] for entry in state().values()] == ["done", "failed"]
    Path("fail").unlink()
    assert calls() == ["search", "tune"]
    run()
    assert calls() == ["tune --resume", "out"]
    assert Path("run/02-tune/log.txt").read_text().count("working on tune") == 2


def test_a_stage_without_its_outputs_is_not_done(place: Path) -> None:
    Path("write-nothing").write_text("out")
    with pytest.raises(ToolError, match=r"ended without writing run/03-out/out\.gguf"):
        run()
    Path("write-nothing").unlink()
    Path("run/03-out/out.gguf").write_text("half of an export")
    calls()
    run()
    assert calls() == ["out --force"]


def start() -> subprocess.Popen[bytes]:
    """The same run in a process of its own, whose stage `tune` never ends."""
    Path("hang").write_text("tune")
    code = """
    import importlib.util
    importlib.util.find_spec = lambda name: True
    import test_extend_run
    test_extend_run.run()
    """
    paths = [str(Path(__file__).parent), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return start_until(
        [sys.executable, "-c", textwrap.dedent(code)],
        Path("run/02-tune/tune/settings.json").exists,
        environment,
    )


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_killed_goes_on_with_the_stage_it_was_in(
    place: Path, sent: signal.Signals
) -> None:
    process = start()
    end(process, sent)
    assert [entry["status"] for entry in state().values()] == ["done", "begun"]
    Path("hang").unlink()
    assert calls() == ["search", "tune"]
    run()
    assert calls() == ["tune --resume", "out"]
    assert [entry["status"] for entry in state().values()] == ["done"] * 3


def test_a_second_run_at_the_same_time_is_refused(place: Path) -> None:
    process = start()
    try:
        with pytest.raises(OutputError, match="another extend"):
            run()
    finally:
        end(process)
    # a stage that was left behind holds the lock too, until it ends
    with Path("run/lock").open("r+") as lock:
        deadline = time.monotonic() + 60
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline
                time.sleep(0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: PLAN.replace("512", "1024"), "stage 1, search, is done already, and target-length"),
        (lambda: PLAN.replace("= 5\n", "= 6\n"), "stage 2, tune, is done already, and steps has"),
        (lambda: PLAN.replace("= 5\n", "= 5\nlora = 8\n"), "lora has changed: it was not there, now it is 8"),
        (lambda: (Path("train.txt").write_text("else"), PLAN)[1], "stage 2, tune, is done already, and text train.txt"),
        (lambda: (Path("books/b.txt").write_text("b"), PLAN)[1], "stage 1, search, is done already, and text books"),
        (lambda: PLAN.replace('"tune"', '"tuned"'), "stage 2 was tune, which the plan does not"),
        (lambda: PLAN.partition("[[stage]]\nname = \"out\"")[0], "stage 3 was out, which the plan does not"),
        (lambda: PLAN.replace('run = "gguf"', 'run = "gguf"\nmodel = "source"'), "stage 3, out, is done already, and model"),
    ],
)  # fmt: skip
def test_what_has_changed_since_is_named(
    place: Path, change: Callable[[], str], message: str
) -> None:
    run()
    calls()
    with pytest.raises(ConfigError) as caught:
        run(change())
    assert message in str(caught.value)
    assert "choose another folder with -o" in str(caught.value)
    assert "--from " in str(caught.value)
    assert calls() == []
    assert Path("run/plan.toml").read_text() == PLAN


@pytest.mark.parametrize("key", ['device = ["cuda:0", "cuda:1"]', 'offload = "disk"'])
def test_a_run_may_go_on_with_other_devices(place: Path, key: str) -> None:
    run()
    calls()
    machine = PLAN.replace("= 512\n", f"= 512\n{key}\n")
    run(machine.replace("= 5\n", "= 5\nprocesses = 2\n"))
    assert calls() == []


def test_a_changed_model_is_refused(place: Path, hf_config: Callable[..., Path]) -> None:
    run()
    hf_config("model", rope_theta=20000.0)
    with pytest.raises(
        ConfigError, match="stage 1, search, is done already, and model has changed"
    ):
        run()


def test_from_does_a_stage_and_all_behind_it_again_and_keeps_the_old(place: Path) -> None:
    run()
    calls()
    changed = PLAN.replace("= 5\n", "= 6\n")
    run(changed, again_from="tune")
    assert calls() == ["tune", "out"]
    run(changed, again_from="out")
    assert calls() == ["out"]
    names = sorted(path.name for path in Path("run").iterdir() if path.is_dir())
    assert names == [
        "01-search", "02-tune", "02-tune.old-1", "03-out", "03-out.old-1", "03-out.old-2",
    ]  # fmt: skip
    assert Path("run/plan.toml").read_text() == changed
    with pytest.raises(ConfigError, match="--from x: no such stage; there are search, tune, out"):
        run(changed, again_from="x")


def test_outputs_that_later_stages_need_are_missed(place: Path) -> None:
    run()
    more = PLAN + '[[stage]]\nname = "more"\nrun = "gguf"\n'
    Path("run/02-tune/tune/factors.json").unlink()
    with pytest.raises(OutputError, match=r"tune/factors.json is gone"):
        run(more)
    run()  # nothing is left to do, and nothing is missed


def test_nothing_runs_where_a_check_fails(place: Path) -> None:
    def check(step: Any) -> None:
        if step.stage.name == "tune":
            raise ConfigError("too large")

    with pytest.raises(ConfigError, match="too large"):
        run(check=check)
    assert calls() == []
    run()


def test_folders_that_are_no_run_are_refused(place: Path) -> None:
    Path("run").mkdir()
    Path("run/mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds other things \(mine.txt\)"):
        run()
    Path("run/state.json").write_text('{"format": "other", "stages": {}}')
    with pytest.raises(ConfigError, match="not the state of a run"):
        run()


def test_a_program_that_is_not_there_is_one_clear_error(place: Path) -> None:
    model = load_model(Path("model"))
    steps = resolve(parse_plan(PLAN, "plan.toml"), model, Path("run"), read_commands())
    with pytest.raises(LongRopeError, match="cannot run no-such-program"):
        run_plan(steps, Path("run"), PLAN, model.fingerprint, program=["no-such-program"])
    run()


def test_too_little_memory_is_told_before_anything_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longrope_export.finetune.hardware.free_bytes", lambda device: 1 << 20)
    Path("plan.toml").write_text(PLAN)
    arguments = ["extend", "model", "plan.toml", "-o", "run"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "stage 2, tune needs about 0." in result.output
    assert "--no-memory-check" in result.output
    assert calls() == []


def test_real_commands_run_one_after_the_other(place: Path) -> None:
    """Those that need no weights: a closed form, and the same from a file."""
    Path("plan.toml").write_text(
        '[[stage]]\nname = "yarn"\nrun = "factors"\nmethod = "yarn"\ntarget-length = 512\n'
        '[[stage]]\nname = "same"\nrun = "factors"\nmethod = "file"\nfactors = "yarn"\n'
    )
    arguments = ["extend", "model", "plan.toml", "-o", "run", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "yarn": ["run/01-yarn/yarn.json"],
        "same": ["run/02-same/same.json"],
    }
    one, other = (
        json.loads(Path(f"run/0{n}.json").read_text()) for n in ("1-yarn/yarn", "2-same/same")
    )
    assert one["tiers"] == other["tiers"]
