"""From a plan to commands: each stage with what the plan leaves open filled in.

Problems are collected, so that all of them are told at once, before anything runs.
"""

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
    did_you_mean,
    listed,
    option_arguments,
)
from longrope_export.finetune.stages import MACHINE, OWN_KEYS, Made, Step, missing_extras
from longrope_export.models.model import Model, ModelKind
from longrope_export.search.documents import DATASET, TEXT_SUFFIXES

SOURCE = "source"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_TEXT_KEYS = ("text", "validation-text")
_FACTOR_KEYS = ("factors", "warm-start")
_MAKE_FACTORS = ("search", "recover", "factors")


def resolve(
    plan: Plan, model: Model, run: Path, commands: Commands, *, dry: bool = False
) -> list[Step]:
    """Every stage as a command.

    Args:
        model: the source.
        run: RUN/; nothing is written.
        commands: what the commands take.
        dry: nothing is going to run, so texts and packages may be missing.

    Raises:
        ConfigError: naming everything that is wrong with the plan, or missing for it.
    """
    resolver = _Resolver(plan, model, run, commands)
    steps = [step for stage in plan.stages if (step := resolver.step(stage)) is not None]
    problems = resolver.problems + ([] if dry else resolver.lacks)
    if problems:
        raise listed("the plan", problems)
    return steps


@dataclass
class _Draft:
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


class _Resolver:
    def __init__(self, plan: Plan, model: Model, run: Path, commands: Commands) -> None:
        self.plan, self.model, self.run, self.commands = plan, model, run, commands
        self.problems: list[str] = []
        self.lacks: list[str] = []  # of this machine
        carries = SOURCE if model.is_extended else ""
        is_folder = model.kind is ModelKind.HF
        source = Made(model.path, "", model.window, carries, is_folder)
        self.models, self.latest = {SOURCE: source}, source
        self.factors: dict[str, Made] = {}
        self.latest_factors: Made | None = None
        self.exports: dict[str, Made] = {}
        self.results: dict[str, Made] = {}
        self.seen: set[str] = set()

    def step(self, stage: Stage) -> Step | None:
        self._stage = stage
        if not self._check_stage():
            return None
        command = KINDS[stage.kind]
        options = self.commands[command]
        draft = _Draft({name: option.default for name, option in options.items()}, set(stage.keys))
        model = self._model()
        self._take_keys(options, draft)
        self._fill_factors(options, draft, model)
        if stage.kind == "recover":
            self._fill_recovery(draft, model)
        if stage.kind == "evaluate" and not draft.given & {"text", "tasks"}:
            self._problem("needs text, or tasks")
        for name, option in options.items():
            if option.required and name not in draft.given | FILLED:
                self._problem(f"needs {name}")
        subjects = self._subjects(draft, model)
        missing = missing_extras(stage.kind, draft.values, subjects)
        if missing:
            self.lacks.append(f"{stage.title}: {missing}")
        processes = self._processes(draft)
        reach = self._reach(draft, model)
        folder = self.run / f"{stage.number:02d}-{stage.name}"
        output, outputs = self._publish(folder, draft, model, reach)
        words = [*draft.positional, *subjects, *draft.options, "-o", str(output)]
        if stage.kind == "report":
            for name, file in (("model-card", "README.md"), ("plots", "plots")):
                words += [] if name in stage.keys else [f"--{name}", str(folder / file)]
        self.seen.add(stage.name)
        draft.settings["run"] = stage.kind
        return Step(
            stage, command, tuple(words), processes, folder, output, outputs, draft.settings,
            draft.files, tuple(dict.fromkeys(draft.after)), draft.values, reach, len(subjects),
        )  # fmt: skip

    def _problem(self, text: str) -> None:
        self.problems.append(f"{self._stage.title}: {text}")

    def _check_stage(self) -> bool:
        name, kind = self._stage.name, self._stage.kind
        if not _NAME.fullmatch(name) or name == SOURCE:
            self._problem(f"name {name!r}: expected letters, digits, . - _, and not {SOURCE}")
        if name in self.seen:
            self._problem(f"another stage before is called {name} too")
        if kind not in KINDS:
            self._problem(
                f"run = {kind!r} is no kind of stage{did_you_mean(kind, KINDS)}; "
                f"known are {', '.join(KINDS)}"
            )
        elif KINDS[kind] not in self.commands:
            self._problem(f"this longrope-export has no command {KINDS[kind]}")
        else:
            return True
        return False

    # -- keys of the stage

    def _take_keys(self, options: Mapping[str, Option], draft: _Draft) -> None:
        own = OWN_KEYS.get(self._stage.kind, ("model",))
        known = [*own, *(name for name in options if name not in FILLED)]
        for key, value in self._stage.keys.items():
            if key in own:
                continue
            if key not in known:
                told = "is filled in by the runner" if key in FILLED else "is no key of it"
                self._problem(
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
            elif option.is_path and isinstance(value, str) and Path(value).exists():
                draft.files[f"{key} {value}"] = Path(value)
            elif key not in MACHINE:
                draft.settings[key] = json.dumps(value, default=str)
            if value is None:
                continue
            draft.values[key] = value
            try:
                words = option_arguments(option, value)
            except ValueError as error:
                self._problem(f"{key}: {error}")
                continue
            (draft.positional if option.positional else draft.options).extend(words)

    def _texts(self, option: Option, value: Any, draft: _Draft) -> Any:
        """Paths; the files of a folder where the command takes files alone."""
        if isinstance(value, str):
            if value not in self.plan.texts:
                hint = did_you_mean(value, self.plan.texts)
                self._problem(
                    f"{option.name}: no list {value!r} in [texts]{hint}; a path stands in brackets"
                )
                return None
            value = list(self.plan.texts[value])
        paths: list[str] = []
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, str) and path.startswith(DATASET):
                draft.settings[f"{option.name} {path}"] = ""
            elif not isinstance(path, str):
                self._problem(f"{option.name}: expected paths, got {path!r}")
                continue
            elif not Path(path).exists():
                lack = f"{option.name}: no such file or folder: {path}"
                self.lacks.append(f"{self._stage.title}: {lack}")
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

    def _named_factors(self, key: str, value: Any, draft: _Draft) -> Any:
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
            self._problem(
                f"{key}: two files are called {stems[0]}, and tables name them by that: give one of "
                f'them another name by a stage run = "factors", method = "file"'
            )
        return paths if isinstance(value, list) else paths[0]

    def _factor_file(self, key: str, name: Any) -> Made | None:
        names = [stage.name for stage in self.plan.stages]
        if name in names:
            when = "makes no factors" if name in self.seen else "does not come before"
            self._problem(f"{key}: stage {name} {when}")
            return None
        path = Path(str(name))
        if not path.exists():
            hint = did_you_mean(str(name), names)
            self._problem(f"{key}: {name!r} is neither a stage before nor a file{hint}")
            return None
        try:
            reach = read_factors(path, self.model).max_position_embeddings
        except LongRopeError as error:
            self._problem(f"{key}: {error}")
            return None
        return Made(path, "", reach, str(path))

    def _model(self) -> Made:
        """MODEL of the stage; a problem, and the latest, where the plan names none that is there."""
        name = self._stage.keys.get("model")
        model = self.latest if name is None else self.models.get(str(name))
        if model is None:
            self._problem(
                f"model: {name!r} is no stage before that makes a model"
                f"{did_you_mean(str(name), self.models)}; there are {', '.join(self.models)}"
            )
            model = self.latest
        if self._stage.kind == "finetune" and not model.is_folder:
            self._problem(f"model: {model.path} is a GGUF; training takes a Hugging Face folder")
        return model

    def _processes(self, draft: _Draft) -> int:
        count = self._stage.keys.get("processes", 1)
        if self._stage.kind != "finetune":
            return 1
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            self._problem(f"processes: expected a whole number from 1 on, got {count!r}")
            return 1
        return count

    # -- what is filled in

    def _fill_factors(self, options: Mapping[str, Option], draft: _Draft, model: Made) -> None:
        current, kind = self.latest_factors, self._stage.kind
        if "factors" not in options or kind == "factors" or draft.given & {"factors", "tier"}:
            return
        if kind == "evaluate":
            if "models" in draft.given or current is None or model.carries == current.stage:
                return
            if model.carries:
                self._problem(
                    f"runs {model.path} with the factors of {model.carries}, not those of "
                    f"{current.stage}: evaluate puts factors on plain models alone; bake them in by "
                    f'a stage run = "safetensors" and name it: models = ["..."]'
                )
                return
        if current is not None:
            draft.factors = current
            draft.after.append(current.stage)
            draft.fill("factors", str(current.path))
        elif kind == "finetune":
            self._problem("factors: no stage before makes any, and none are given")
            draft.given.add("factors")

    def _fill_recovery(self, draft: _Draft, model: Made) -> None:
        current = self.latest_factors
        if "recover" not in draft.given:
            self._problem("needs recover, the short lengths, as 4096,8192")
        if not model.carries:
            self._problem(f"recovers short lengths of an extended model, and {model.path} is plain")
        elif "model" not in draft.given and current and current.stage != model.carries:
            self._problem(
                f"recovers what {model.path} carries, the factors of {model.carries}, not those of "
                f'{current.stage}: bake them in by a stage run = "safetensors" and name it as model'
            )
        if "target-length" in draft.given:
            return
        if model.reach is None:
            self._problem("needs target-length: the window of the model is not known yet")
            draft.given.add("target-length")
        else:
            draft.fill("target-length", model.reach)

    def _subjects(self, draft: _Draft, model: Made) -> list[str]:
        """The arguments of the command that are no options."""
        kind = self._stage.kind
        if kind == "report":
            return self._named("inputs", self.results, list(self.results), draft)
        if kind == "evaluate" and "models" in draft.given:
            return self._named("models", {**self.models, **self.exports}, [], draft)
        self._depend("model", model, draft)
        if kind != "verify":
            return [str(model.path)]
        carried = draft.factors.stage if draft.factors else model.carries
        fitting = [name for name, export in self.exports.items() if export.carries == carried]
        return [str(model.path), *self._named("exports", self.exports, fitting, draft)]

    def _named(
        self, key: str, known: Mapping[str, Made], default: list[str], draft: _Draft
    ) -> list[str]:
        """What a list of stages, RUNTIME=STAGE, paths and addresses names."""
        names = self._stage.keys.get(key, default)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            self._problem(f"{key}: expected a list of names, got {names!r}")
            return []
        if not names:
            self._problem(f"{key}: none are given, and no stage before makes what fits")
        found = []
        for name in names:
            runtime, equals, rest = name.rpartition("=")
            draft.settings[f"{key} {name}"] = ""
            if rest in known:
                self._depend(f"{key} {name}", known[rest], draft)
                found.append(f"{runtime}{equals}{known[rest].path}")
            elif "://" in name or Path(rest).exists():
                found.append(name)
            else:
                hint = did_you_mean(rest, known)
                self._problem(
                    f"{key}: {name!r} is neither a stage before that fits nor a path{hint}"
                )
        return found

    def _depend(self, key: str, made: Made, draft: _Draft) -> None:
        if made.stage:
            draft.after.append(made.stage)
        else:
            draft.settings[key] = self.model.fingerprint

    # -- what the stage leaves to those behind it

    def _reach(self, draft: _Draft, model: Made) -> int | None:
        target = draft.values.get("target-length")
        if self._stage.kind in _MAKE_FACTORS and isinstance(target, int):
            return target
        return draft.factors.reach if draft.factors else model.reach

    def _publish(
        self, folder: Path, draft: _Draft, model: Made, reach: int | None
    ) -> tuple[Path, tuple[Path, ...]]:
        """Output, named after the stage as tables show it, and the paths that exist afterwards."""
        name, kind = self._stage.name, self._stage.kind
        place = folder / name
        if kind in ("search", "recover", "finetune"):
            factors = place / "factors.json"
            outputs = (factors, place / "result.json")
            if kind == "finetune":
                outputs = (factors, place / "model" / "config.json")
                self.latest = self.models[name] = Made(place / "model", name, reach, name)
            else:
                self.results[name] = Made(place, name)
            self.factors[name] = self.latest_factors = Made(factors, name, reach, name)
            return place, outputs
        if kind in ("safetensors", "gguf", "onnx"):
            carries = draft.factors.carries if draft.factors else model.carries
            place = folder / f"{name}.gguf" if kind == "gguf" else place
            self.exports[name] = Made(place, name, reach, carries, kind == "safetensors")
            if kind != "onnx":
                self.models[name] = self.exports[name]
        elif kind == "report":
            place = folder / "report.html"
        else:
            place = folder / f"{name}.json"
            self.results[name] = Made(place, name)
            if kind == "factors":
                self.factors[name] = self.latest_factors = Made(place, name, reach, name)
        return place, (place,)
