"""Rules about the project itself: layers, documentation of commands, light start."""

import ast
import subprocess
import sys
from pathlib import Path

import click
import pytest

from longrope_export.cli import COMMANDS
from scripts.update_reference import REFERENCE, reference_text, walk_commands

ROOT = Path(__file__).parent.parent
CORE = ROOT / "longrope_export"
# the text of the modelling file that exported folders carry: it subclasses torch and transformers
# classes, and only functions of hf_runtime import it
TORCH_CORE = CORE / "hf_runtime" / "core"
# these subclass classes of torch and transformers, and only functions import them
SUBCLASSING = (CORE / "finetune" / "row_trainer.py",)
HEAVY = ("torch", "transformers", "matplotlib", "onnx", "onnxruntime", "ray")


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def top_level_imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {
        name
        for node in tree.body
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [getattr(node, "module", None) or ""]
        )
    }


def modules(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


@pytest.mark.parametrize("path", modules(CORE), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_in_the_core_imports_a_converter_or_the_command_line(path: Path) -> None:
    if path.is_relative_to(CORE / "cli") or path.name == "__main__.py":
        return
    forbidden = ("longrope_converters", "longrope_export.cli")
    assert not [name for name in imports_of(path) if name.startswith(forbidden)]


@pytest.mark.parametrize(
    "path",
    modules(CORE, ROOT / "converters"),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_heavy_packages_are_imported_where_they_are_used(path: Path) -> None:
    if path.is_relative_to(TORCH_CORE) or path in SUBCLASSING:
        return
    assert not {name.split(".")[0] for name in top_level_imports_of(path)} & set(HEAVY)


@pytest.mark.parametrize(
    "path", modules(CORE, ROOT / "converters"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_the_torch_core_is_imported_where_it_is_used(path: Path) -> None:
    if path.is_relative_to(TORCH_CORE):
        own = [name for name in imports_of(path) if name.startswith("longrope_export")]
        assert all(name.startswith("longrope_export.hf_runtime.core") for name in own)
    else:
        heavy = ["longrope_export.hf_runtime.core"]
        heavy += [str(p.relative_to(ROOT).with_suffix("")).replace("/", ".") for p in SUBCLASSING]
        assert not [n for n in top_level_imports_of(path) if n.startswith(tuple(heavy))]


@pytest.mark.parametrize("path", modules(ROOT / "converters"), ids=lambda path: path.name)
def test_converters_do_not_import_the_command_line(path: Path) -> None:
    assert not [name for name in imports_of(path) if name.startswith("longrope_export.cli")]


ALL_COMMANDS = list(walk_commands())


@pytest.mark.parametrize(("name", "command"), ALL_COMMANDS, ids=[name for name, _ in ALL_COMMANDS])
def test_every_command_has_help_an_example_and_a_place_in_the_docs(
    name: str, command: click.Command
) -> None:
    assert command.help
    assert f"longrope-export {name.split()[0]}" in command.help, "no example in the help text"
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, f"--{option.name} has no help"
    documents = {ROOT / "README.md", *(ROOT / "docs").glob("*.md")} - {REFERENCE}
    text = "\n".join(document.read_text() for document in documents)
    assert f"longrope-export {name}" in text, "not mentioned in README.md or docs/"


def test_the_reference_of_commands_is_current() -> None:
    assert REFERENCE.read_text(encoding="utf-8") == reference_text(), "run `make reference`"


def test_help_lines_agree_with_the_commands() -> None:
    for name, command in ALL_COMMANDS:
        if name in COMMANDS:
            assert command.help is not None
            assert command.help.strip().splitlines()[0] == COMMANDS[name][1]


def test_help_of_every_command_imports_nothing_heavy() -> None:
    code = (
        "import sys; from click.testing import CliRunner; "
        "from longrope_export.cli import COMMANDS, main; "
        "[CliRunner().invoke(main, [*name, '--help']) for name in [[], *zip(COMMANDS)]]; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & "
        "{'torch', 'transformers', 'numpy', 'gguf', 'rich', 'tokenizers'}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
