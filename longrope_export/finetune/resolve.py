"""From a plan to commands: each stage with what the plan leaves open filled in.

Problems are collected, so that all of them are told at once, before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from longrope_export.errors import ConfigError
from longrope_export.finetune.plan import (
    FILLED,
    KINDS,
    Commands,
    Option,
    Plan,
    Stage,
    listed,
)
from longrope_export.finetune.recipes import load_recipe
from longrope_export.finetune.stage_keys import SOURCE, Draft, StageReader
from longrope_export.finetune.stages import Made, Step, missing_extras
from longrope_export.finetune.toml_files import did_you_mean
from longrope_export.models.model import Model

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


class _Resolver(StageReader):
    """Knows what each stage leaves to those behind it."""

    def __init__(self, plan: Plan, model: Model, run: Path, commands: Commands) -> None:
        super().__init__(plan, model, commands)
        self.run = run
        carries = SOURCE if model.is_extended else ""
        source = Made(model.path, "", model.window, carries)
        self.models, self.latest = {SOURCE: source}, source
        self.latest_factors: Made | None = None
        self.exports: dict[str, Made] = {}
        self.results: dict[str, Made] = {}

    def step(self, stage: Stage) -> Step | None:
        """The stage as a command; None where there is none for it."""
        self.stage = stage
        if not self.check_stage():
            return None
        command = KINDS[stage.kind]
        options = self.commands[command]
        draft = Draft({name: option.default for name, option in options.items()}, set(stage.keys))
        model = self._model()
        self.take_keys(options, draft)
        self._fill_factors(options, draft, model)
        if stage.kind == "recover":
            self._fill_recovery(draft, model)
        if stage.kind == "evaluate" and not draft.given & {"text", "tasks"}:
            self.problem("needs text, or tasks")
        for name, option in options.items():
            if option.required and name not in draft.given | FILLED:
                self.problem(f"needs {name}")
        subjects = self._subjects(draft, model)
        missing = missing_extras(stage.kind, subjects)
        if missing:
            self.lack(missing)
        processes = self._processes(draft)
        reach = self._reach(draft, model)
        if stage.kind == "finetune":
            self._check_recipe(draft, reach)
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

    # -- what is filled in

    def _model(self) -> Made:
        """MODEL of the stage; a problem, and the latest, where the plan names none that is there."""
        name = self.stage.keys.get("model")
        model = self.latest if name is None else self.models.get(str(name))
        if model is None:
            self.problem(
                f"model: {name!r} is no stage before that makes a model"
                f"{did_you_mean(str(name), self.models)}; there are {', '.join(self.models)}"
            )
            model = self.latest
        return model

    def _processes(self, draft: Draft) -> int:
        count = self.stage.keys.get("processes", 1)
        if self.stage.kind != "finetune":
            return 1
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            self.problem(f"processes: expected a whole number from 1 on, got {count!r}")
            return 1
        return count

    def _check_recipe(self, draft: Draft, reach: int | None) -> None:
        window = draft.values.get("window")
        try:
            recipe = load_recipe(str(draft.values["recipe"]))
            if isinstance(window, int):
                recipe = recipe.with_values({"window": window})
            if reach is not None:
                recipe.check_reach(reach)
        except ConfigError as error:
            self.problem(str(error))

    def _fill_factors(self, options: Mapping[str, Option], draft: Draft, model: Made) -> None:
        current, kind = self.latest_factors, self.stage.kind
        if "factors" not in options or kind == "factors" or draft.given & {"factors", "tier"}:
            return
        if kind == "evaluate":
            if "models" in draft.given or current is None or model.carries == current.stage:
                return
            if model.carries:
                self.problem(
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
            self.problem("factors: no stage before makes any, and none are given")
            draft.given.add("factors")

    def _fill_recovery(self, draft: Draft, model: Made) -> None:
        current = self.latest_factors
        if "recover" not in draft.given:
            self.problem("needs recover, the short lengths, as 4096,8192")
        if not model.carries:
            self.problem(f"recovers short lengths of an extended model, and {model.path} is plain")
        elif "model" not in draft.given and current and current.stage != model.carries:
            self.problem(
                f"recovers what {model.path} carries, the factors of {model.carries}, not those of "
                f'{current.stage}: bake them in by a stage run = "safetensors" and name it as model'
            )
        if "target-length" in draft.given:
            return
        if model.reach is None:
            self.problem("needs target-length: the window of the model is not known yet")
            draft.given.add("target-length")
        else:
            draft.fill("target-length", model.reach)

    def _subjects(self, draft: Draft, model: Made) -> list[str]:
        """The arguments of the command that are no options."""
        kind = self.stage.kind
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
        self, key: str, known: Mapping[str, Made], default: list[str], draft: Draft
    ) -> list[str]:
        """What a list of stages, RUNTIME=STAGE, paths and addresses names."""
        names = self.stage.keys.get(key, default)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            self.problem(f"{key}: expected a list of names, got {names!r}")
            return []
        if not names:
            self.problem(f"{key}: none are given, and no stage before makes what fits")
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
                self.problem(
                    f"{key}: {name!r} is neither a stage before that fits nor a path{hint}"
                )
        return found

    def _depend(self, key: str, made: Made, draft: Draft) -> None:
        if made.stage:
            draft.after.append(made.stage)
        else:
            draft.settings[key] = self.model.fingerprint

    # -- what the stage leaves to those behind it

    def _reach(self, draft: Draft, model: Made) -> int | None:
        target = draft.values.get("target-length")
        if self.stage.kind in _MAKE_FACTORS and isinstance(target, int):
            return target
        return draft.factors.reach if draft.factors else model.reach

    def _publish(
        self, folder: Path, draft: Draft, model: Made, reach: int | None
    ) -> tuple[Path, tuple[Path, ...]]:
        """Output, named after the stage as tables show it, and the paths that exist afterwards."""
        name, kind = self.stage.name, self.stage.kind
        place = folder / name
        if kind in ("search", "recover", "finetune"):
            factors = place / "factors.json"
            self.results[name] = Made(place, name)
            outputs = [factors, place / "result.json"]
            if kind == "finetune":
                outputs.append(place / "model" / "config.json")
                self.latest = self.models[name] = Made(place / "model", name, reach, name)
            self.factors[name] = self.latest_factors = Made(factors, name, reach, name)
            return place, tuple(outputs)
        if kind in ("safetensors", "gguf", "onnx"):
            carries = draft.factors.carries if draft.factors else model.carries
            place = folder / f"{name}.gguf" if kind == "gguf" else place
            self.exports[name] = Made(place, name, reach, carries)
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
