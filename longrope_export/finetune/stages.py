"""What a stage is once it is ready to run: one of our own commands, and what its result depends on."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope_export.finetune.plan import Stage

PROGRAM = "longrope-export"
# what a stage that was begun before gets, so that it goes on or replaces what lies there; evaluate
# goes on by itself, verify and report replace anyway
AGAIN = {
    "search": "--resume",
    "recover": "--resume",
    "finetune": "--resume",
    "factors": "--force",
    "gguf": "--force",
    "onnx": "--force",
    "safetensors": "--force",
}
# keys of a stage that are no options of its command
OWN_KEYS = {
    "finetune": ("model", "processes"),
    "verify": ("model", "exports"),
    "evaluate": ("model", "models"),
    "report": ("inputs",),
}
# options on which a result does not depend but by rounding: they may change from try to try
MACHINE = frozenset({
    "build", "device", "no-memory-check", "offload", "ray", "ray-workers", "rows-per-pass", "save-steps", "threads",
})  # fmt: skip
_TORCH = ("torch", "transformers")
_EXTRAS = {  # kind -> (extra of pip, modules)
    "search": ("search", (*_TORCH, "scipy")),
    "recover": ("search", (*_TORCH, "scipy")),
    "finetune": ("finetune", (*_TORCH, "accelerate", "peft")),
    "onnx": ("onnx", ("onnx", "onnx_ir", "onnxruntime")),
    "verify": ("transformers", _TORCH),
    "report": ("plots", ("matplotlib",)),
}


@dataclass(frozen=True)
class Made:
    """A model, an export or factors that a stage may build upon.

    Attributes:
        path: of a folder or a file; it may not be there yet.
        stage: that makes it; "" for the source model, or a file of the user's.
        reach: tokens of its longest tier; None where that is not known before it is made.
        carries: of a model: what makes the factors in it, a stage or a file; "" for a plain one.
    """

    path: Path
    stage: str
    reach: int | None = None
    carries: str = ""


@dataclass(frozen=True)
class Step:
    """One stage, ready to run.

    Attributes:
        stage: as written.
        command: of ours.
        arguments: behind the command, but for what AGAIN adds.
        processes: that torchrun starts; 1 for a plain run.
        folder: RUN/<NN>-<name>, for command.txt, log.txt and the outputs.
        output: what -o names.
        outputs: paths that exist when it is done.
        settings: what the result depends on, by the keys of the plan; JSON texts.
        files: paths whose content it depends on, by names for messages.
        after: stages whose results it depends on.
        values: of all options of the command, its defaults included; for estimates.
        reach: tokens of the factors that it makes or uses; None if not known.
        num_models: that it runs.
    """

    stage: Stage
    command: str
    arguments: tuple[str, ...]
    processes: int
    folder: Path
    output: Path
    outputs: tuple[Path, ...]
    settings: Mapping[str, str]
    files: Mapping[str, Path]
    after: tuple[str, ...]
    values: Mapping[str, Any]
    reach: int | None
    num_models: int = 1

    @property
    def words(self) -> list[str]:
        """The command line as a user types it."""
        if self.processes == 1:
            return [PROGRAM, self.command, *self.arguments]
        launcher = ["torchrun", "--standalone", f"--nproc-per-node={self.processes}", "-m"]
        return [*launcher, PROGRAM.replace("-", "_"), self.command, *self.arguments]


def missing_extras(kind: str, subjects: Sequence[str]) -> str | None:
    """What a stage needs that is not installed, with the line for pip; None if nothing.

    Args:
        kind: of the stage.
        subjects: models and exports that it runs.
    """
    extra, modules = _EXTRAS.get(kind, ("", ()))
    if kind == "evaluate" and not all(word.endswith(".gguf") for word in subjects):
        extra, modules = "transformers", _TORCH
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"needs {', '.join(missing)}: pip install 'longrope-export[{extra}]'"
