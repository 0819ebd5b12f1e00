"""Runs the stages of a plan one after the other, each in a process of its own, and remembers them.

RUN/ holds plan.toml, state.json and for each stage <NN>-<name>/ with command.txt, log.txt and what its
command wrote. A stage counts as done only when its process has ended with 0, its outputs are there and
state.json says so; whatever is killed before is run again, by --resume where its command has that.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from longrope_export.errors import ConfigError, OutputError, ToolError
from longrope_export.finetune.run_state import DONE, RunState, inputs_of
from longrope_export.finetune.stages import AGAIN, Step

PROGRAM = (sys.executable, "-m", "longrope_export")
_SHOWN_LINES = 15
_PR_SET_PDEATHSIG = 1  # prctl of Linux


def run_plan(
    steps: Sequence[Step],
    folder: Path,
    plan_text: str,
    model: str,
    *,
    again_from: str | None = None,
    program: Sequence[str] = PROGRAM,
    check: Callable[[Step], None] = lambda step: None,
    say: Callable[[str], None] = lambda line: None,
    echo: Callable[[bytes], None] = lambda output: None,
) -> None:
    """Run what is not done yet.

    Args:
        steps: of stages.resolve.
        folder: RUN/; made if needed.
        plan_text: copied there.
        model: fingerprint of the source model.
        again_from: name of a stage; it and all behind it are done again, their old folders kept as
            <NN>-<name>.old-<k>.
        program: words before a command of ours.
        check: asked about every stage that is still to run, before any of them does.
        say: told what happens.
        echo: given the output of the stages, as it comes.

    Raises:
        OutputError: the folder is another's, or another run is at work in it; the disk is full.
        ConfigError: what was run before is not what the plan says now; what `check` raises.
        ToolError: a stage has failed.
    """
    with RunState.open(folder) as state:
        inputs, first = inputs_of(steps, model), None
        if again_from is not None:
            _check_name(steps, again_from)
            first = [step.stage.name for step in steps].index(again_from)
        state.check(steps, inputs, first)
        if first is not None:
            for step in steps[first:]:
                check(step)
            state.set_aside(first)
        todo = [step for step in steps if state.status(step) != DONE]
        if not todo:
            say(f"{folder}: all {len(steps)} stages are done")
            return
        for step in steps[: steps.index(todo[0])]:
            _check_outputs(step)
            say(f"{step.stage.title}: done before")
        for step in todo:
            check(step)
        state.keep_plan(plan_text)
        for step in todo:
            _run_step(step, inputs[step.stage.name], state, program, say, echo)


def _check_name(steps: Sequence[Step], name: str) -> None:
    names = [step.stage.name for step in steps]
    if name not in names:
        raise ConfigError(f"--from {name}: no such stage; there are {', '.join(names)}")


def _check_outputs(step: Step) -> None:
    for path in step.outputs:
        if not path.exists():
            raise OutputError(
                f"{step.stage.title}, is done, but {path} is gone, which later stages may need: put it "
                f"back, or do the stage and all behind it again with --from {step.stage.name}"
            )


def _run_step(
    step: Step,
    inputs: Mapping[str, str],
    state: RunState,
    program: Sequence[str],
    say: Callable[[str], None],
    echo: Callable[[bytes], None],
) -> None:
    words = list(step.arguments)
    if _was_begun(step) and step.stage.kind in AGAIN:
        words.append(AGAIN[step.stage.kind])
    argv = [*_launcher(program, step.processes), step.command, *words]
    shown = shlex.join([*step.words, *words[len(step.arguments) :]])
    state.begin(step, inputs, argv, shown)
    say(f"{step.stage.title}: {shown}")
    begin = time.monotonic()
    log = step.folder / "log.txt"
    try:
        code = _run_child(argv, log, state.lock, echo)
    except BaseException:  # Ctrl-C among them
        state.end(step, None, time.monotonic() - begin)
        raise
    seconds = time.monotonic() - begin
    missing = [path for path in step.outputs if not path.exists()]
    is_done = code == 0 and not missing
    state.end(step, code, seconds, done=is_done)
    if is_done:
        say(f"{step.stage.title}: done in {seconds:.0f} s")
        return
    how = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
    if code == 0:
        how = f"ended without writing {missing[0]}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LINES:]
    tail = "".join(f"\n  {line}" for line in lines)
    raise ToolError(
        f"{step.stage.title}, {how} after {seconds:.0f} s. The end of {log}:{tail}\n"
        f"The same command again goes on with this stage; after a change of the plan give "
        f"--from {step.stage.name} as well"
    )


def _was_begun(step: Step) -> bool:
    """Whether there is something to resume or to replace; torn temporary files are removed."""
    if not step.output.is_dir():
        return step.output.exists()
    if any(not path.name.endswith(".partial") for path in step.output.iterdir()):
        return True
    shutil.rmtree(step.output)
    return False


def _launcher(program: Sequence[str], processes: int) -> list[str]:
    if processes == 1:
        return list(program)
    torchrun = [program[0], "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc-per-node={processes}", *program[1:]]


def _run_child(argv: Sequence[str], log: Path, lock: int, echo: Callable[[bytes], None]) -> int:
    """Run a stage to its end; its output goes to the log and to `echo`. The child shares the lock."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    try:
        with (
            log.open("ab", buffering=0) as file,
            subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(lock,),
                preexec_fn=_end_with(os.getpid()),
            ) as child,
        ):
            assert child.stdout is not None
            try:
                while output := os.read(child.stdout.fileno(), 1 << 16):
                    file.write(output)
                    echo(output)
                return child.wait()
            except BaseException:
                child.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(10)
                child.kill()
                raise
    except OSError as error:
        raise OutputError(f"cannot run {argv[0]}, or write {log}: {error}") from error


def _end_with(parent: int) -> Callable[[], None] | None:
    """Run in the child: on Linux it gets SIGTERM when its parent is killed, so that none stays behind."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return ask
