"""A plan as it is written: PLAN.toml, its named texts and its stages; and the options of a stage.

What a command takes is not known here: it is handed in as Commands, so that a plan is checked by
the very types that the command line uses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from longrope_export.errors import ConfigError
from longrope_export.finetune.toml_files import did_you_mean, parse_toml, read_toml_file

# what `run` may say -> the command that does it
KINDS = {
    "search": "search",
    "recover": "search",
    "factors": "factors",
    "finetune": "finetune",
    "gguf": "gguf",
    "onnx": "onnx",
    "safetensors": "safetensors",
    "verify": "verify",
    "evaluate": "evaluate",
    "report": "report",
}
# given by the runner, or not fit for a stage
FILLED = frozenset({
    "output", "resume", "force", "json", "dry-run", "in-place", "check", "revision",
    "local-files-only", "help",
})  # fmt: skip


@dataclass(frozen=True)
class Option:
    """One option of a command, as a plan may give it.

    Attributes:
        name: without dashes.
        check: converts a value as the command line does; ValueError says in words what is wrong.
        default: of the command, for estimates; None without.
        is_flag: takes true or false.
        off: option, with dashes, that says false to a flag; None where leaving it out does.
        multiple: may be a list.
        required: has to be there.
        is_path: names a file or a folder.
        positional: stands without its name, before MODEL.
    """

    name: str
    check: Callable[[str], object]
    default: Any = None
    is_flag: bool = False
    off: str | None = None
    multiple: bool = False
    required: bool = False
    is_path: bool = False
    positional: bool = False


Commands = Mapping[str, Mapping[str, Option]]  # command -> name -> option


@dataclass(frozen=True)
class Stage:
    """One [[stage]], as written.

    Attributes:
        number: from 1.
        name: given, or what `run` says, with the number where several stages would be called that.
        kind: a key of KINDS, or whatever stands there.
        keys: all others.
    """

    number: int
    name: str
    kind: str
    keys: Mapping[str, Any]

    @property
    def title(self) -> str:
        """For messages."""
        return f"stage {self.number}, {self.name}"


@dataclass(frozen=True)
class Plan:
    """A plan as written.

    Attributes:
        text: the whole file.
        texts: named lists of what --text takes.
        stages: in order; at least one.
    """

    text: str
    texts: Mapping[str, tuple[str, ...]]
    stages: tuple[Stage, ...]


def load_plan(name: str) -> Plan:
    """A shipped plan by its name, or one's own by the path of its TOML file.

    Raises:
        ConfigError: there is none, it cannot be read, or see parse_plan.
    """
    return parse_plan(read_toml_file("plans", name, "PLAN"), name)


def parse_plan(text: str, source: str) -> Plan:
    """The shape of a plan; what its stages say is looked at by stages.resolve.

    Args:
        text: TOML.
        source: for messages.

    Raises:
        ConfigError: not TOML, or not [texts] and [[stage]].
    """
    values = parse_toml(text, f"PLAN {source}")
    problems = [
        f"unknown key {key}{did_you_mean(key, ('texts', 'stage'))}; a plan has [texts] and [[stage]]"
        for key in values.keys() - {"texts", "stage"}
    ]
    texts: dict[str, tuple[str, ...]] = {}
    named = values.get("texts", {})
    if not isinstance(named, dict):
        problems.append("texts is no table: write [texts]")
        named = {}
    for name, paths in named.items():
        if isinstance(paths, list) and paths and all(isinstance(path, str) for path in paths):
            texts[name] = tuple(paths)
        else:
            problems.append(f'texts.{name}: expected a list of paths, as ["books/"], got {paths!r}')
    entries = values.get("stage", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        problems.append("stage is no list of tables: write [[stage]]")
        entries = [{}]
    elif not entries:
        problems.append("no stage: write at least one [[stage]]")
    taken = Counter(str(entry.get("name", entry.get("run", ""))) for entry in entries)
    stages = tuple(_stage(number, entry, taken) for number, entry in enumerate(entries, start=1))
    if problems:
        raise listed(f"PLAN {source}", problems)
    return Plan(text, texts, stages)


def _stage(number: int, entry: Mapping[str, Any], taken: Counter[str]) -> Stage:
    kind = str(entry.get("run", ""))
    keys = {key: value for key, value in entry.items() if key not in ("name", "run")}
    usual = kind if taken[kind] == 1 else f"{kind}-{number}"
    return Stage(number, str(entry.get("name", usual)), kind, keys)


def option_arguments(option: Option, value: Any) -> list[str]:
    """The words of the command line that say an option's value.

    Args:
        value: as TOML has it.

    Raises:
        ValueError: in words, a value that the option does not take.
    """
    if option.is_flag:
        if not isinstance(value, bool):
            raise ValueError(f"is a flag: expected true or false, got {value!r}")
        on = [f"--{option.name}"]
        return on if value else [option.off] if option.off else []
    if isinstance(value, list) and not option.multiple:
        raise ValueError(f"takes one value, got the list {value!r}")
    words: list[str] = []
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, bool) or not isinstance(part, str | int | float):
            raise ValueError(f"expected text or a number, got {part!r}")
        option.check(str(part))
        words += [str(part)] if option.positional else [f"--{option.name}", str(part)]
    return words


def listed(where: str, problems: list[str]) -> ConfigError:
    """All problems as one error."""
    if len(problems) == 1:
        return ConfigError(f"{where}: {problems[0]}")
    lines = "".join(f"\n  - {problem}" for problem in problems)
    return ConfigError(f"{where}: {len(problems)} problems:{lines}")
