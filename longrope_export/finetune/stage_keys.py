"""Reads the keys of a stage: options, texts and factors by name, each against what its command takes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from longrope_export.errors import LongRopeError
from longrope_export.factor_files import read_factors
from longrope_export.finetune.plan import (
    FILLED,
    KINDS,
    Commands,
    Option,
    Plan,
    Stage,
    option_arguments,
)
from longrope_export.finetune.stages import MACHINE, OWN_KEYS, Made
from longrope_export.finetune.toml_files import did_you_mean
from longrope_export.models.model import Model
from longrope_export.texts import DATASET, TEXT_SUFFIXES

SOURCE = "source"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_TEXT_KEYS = ("text", "validation-text")
_FACTOR_KEYS = ("factors", "warm-start")


@dataclass
class Draft:
    """What is known of a step while its keys are looked at; names as in Step."""

    values: dict[str, Any]
    given: set[str]
    options: list[str] = field(default_factory=list)
    positional: list[str] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    after: list[str] = field(default_factory=list)
    factors: Made | None = None

    def fill(self, name: str, value: str | int) -> None:
        """An option that the plan leaves open."""
        self.options += [f"--{name}", str(value)]
        self.values[name] = value
        self.given.add(name)


class StageReader:
    """Reads one stage after the other.

    Args:
        plan: whose stages they are.
        model: the source.
        commands: what the commands take.

    Attributes:
        problems: of the plan, as they are found.
        lacks: texts and packages that are not there.
        factors: that stages so far make, by the stage's name.
        seen: names of the stages so far.
        stage: that is being read.
    """

    def __init__(self, plan: Plan, model: Model, commands: Commands) -> None:
        self.plan, self.model, self.commands = plan, model, commands
        self.problems: list[str] = []
        self.lacks: list[str] = []
        self.factors: dict[str, Made] = {}
        self.seen: set[str] = set()
        self.stage: Stage = plan.stages[0]

    def problem(self, text: str) -> None:
        """Note what is wrong with the stage."""
        self.problems.append(f"{self.stage.title}: {text}")

    def lack(self, text: str) -> None:
        """Note what is missing on this machine."""
        self.lacks.append(f"{self.stage.title}: {text}")

    def check_stage(self) -> bool:
        """Whether there is a command for the stage; its name is looked at too."""
        name, kind = self.stage.name, self.stage.kind
        if not _NAME.fullmatch(name) or name == SOURCE:
            self.problem(f"name {name!r}: expected letters, digits, . - _, and not {SOURCE}")
        if name in self.seen:
            self.problem(f"another stage before is called {name} too")
        if kind not in KINDS:
            self.problem(
                f"run = {kind!r} is no kind of stage{did_you_mean(kind, KINDS)}; "
                f"known are {', '.join(KINDS)}"
            )
        elif KINDS[kind] not in self.commands:
            self.problem(f"this longrope-export has no command {KINDS[kind]}")
        else:
            return True
        return False

    # -- keys of the stage

    def take_keys(self, options: Mapping[str, Option], draft: Draft) -> None:
        """All options that the stage gives, as words of the command line and as what it depends on."""
        own = OWN_KEYS.get(self.stage.kind, ("model",))
        known = [*own, *(name for name in options if name not in FILLED)]
        for key, value in self.stage.keys.items():
            if key in own:
                continue
            if key not in known:
                told = "is filled in by the runner" if key in FILLED else "is no key of it"
                self.problem(
                    f"{key} {told}{did_you_mean(key, known)}; known are {', '.join(known)}"
                )
                continue
            option = options[key]
            if key in _TEXT_KEYS:
                value = self._texts(option, value, draft)
                option = replace(option, check=str)  # it has been looked at
            elif key in _FACTOR_KEYS:
                value = self._named_factors(key, value, draft)
                option = replace(option, check=str)  # of a stage before, it is not there yet
            elif (
                (option.is_path or key == "recipe")
                and isinstance(value, str)
                and Path(value).exists()
            ):
                draft.files[f"{key} {value}"] = Path(value)
            elif key == "tier":
                tiers = value if isinstance(value, list) else [value]
                files = {f"tier {v}": Path(str(v).partition("=")[2]) for v in tiers}
                draft.files |= files
                for path in files.values():
                    if not path.is_file():
                        self.problem(f"tier: expected LENGTH=FILE.csv, got no file {path}")
            elif key not in MACHINE:
                draft.settings[key] = json.dumps(value, default=str)
            if value is None:
                continue
            draft.values[key] = value
            try:
                words = option_arguments(option, value)
            except ValueError as error:
                self.problem(f"{key}: {error}")
                continue
            (draft.positional if option.positional else draft.options).extend(words)

    def _texts(self, option: Option, value: Any, draft: Draft) -> Any:
        """Paths; the files of a folder where the command takes files alone."""
        if isinstance(value, str):
            if value not in self.plan.texts:
                hint = did_you_mean(value, self.plan.texts)
                self.problem(
                    f"{option.name}: no list {value!r} in [texts]{hint}; a path stands in brackets"
                )
                return None
            value = list(self.plan.texts[value])
        paths: list[str] = []
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, str) and path.startswith(DATASET):
                draft.settings[f"{option.name} {path}"] = ""
            elif not isinstance(path, str):
                self.problem(f"{option.name}: expected paths, got {path!r}")
                continue
            elif not Path(path).exists():
                self.lack(f"{option.name}: no such file or folder: {path}")
            else:
                draft.files[f"{option.name} {path}"] = Path(path)
            if option.is_path and Path(path).is_dir():
                inside = sorted(Path(path).rglob("*"))
                paths += [str(file) for file in inside if file.suffix in TEXT_SUFFIXES]
            else:
                paths.append(path)
        if not option.multiple and len(paths) == 1:
            return paths[0]
        return paths or None

    def _named_factors(self, key: str, value: Any, draft: Draft) -> Any:
        """Paths of factors that are named by a stage, or by a path."""
        names = value if isinstance(value, list) else [value]
        found = [self.factors.get(name) if isinstance(name, str) else None for name in names]
        found = [
            self._factor_file(key, name) if made is None else made
            for name, made in zip(names, found, strict=True)
        ]
        paths = []
        for name, made in zip(names, found, strict=True):
            if made is None:
                return None
            if key == "factors":
                draft.factors = made
            if made.stage:
                draft.after.append(made.stage)
            else:
                draft.files[f"{key} {name}"] = made.path
            paths.append(str(made.path))
        stems = [Path(path).stem for path in paths]
        if len(set(stems)) < len(stems):
            self.problem(
                f"{key}: two files are called {stems[0]}, and tables name them by that: give one of "
                f'them another name by a stage run = "factors", method = "file"'
            )
        return paths if isinstance(value, list) else paths[0]

    def _factor_file(self, key: str, name: Any) -> Made | None:
        names = [stage.name for stage in self.plan.stages]
        if name in names:
            when = "makes no factors" if name in self.seen else "does not come before"
            self.problem(f"{key}: stage {name} {when}")
            return None
        path = Path(str(name))
        if not path.exists():
            hint = did_you_mean(str(name), names)
            self.problem(f"{key}: {name!r} is neither a stage before nor a file{hint}")
            return None
        try:
            reach = read_factors(path, self.model).max_position_embeddings
        except LongRopeError as error:
            self.problem(f"{key}: {error}")
            return None
        return Made(path, "", reach, str(path))
