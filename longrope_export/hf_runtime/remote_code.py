"""The modelling file of an exported folder: the runtime's own text and one small class.

The folder's config.json names the class in auto_map (for AutoModelForCausalLM only) and holds the
definition under the key `longrope`; the file needs torch and transformers, not this package.
"""

from __future__ import annotations

import ast
from pathlib import Path

from longrope_export import __version__
from longrope_export.errors import UnsupportedError

FILE_NAME = "modeling_longrope.py"
CONFIG_KEY = "longrope"
PARTS = ("rotation", "cached_rows", "planning", "attention", "runtime")
ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Phi3ForCausalLM",
    "PhimoeForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GraniteForCausalLM",
    "GraniteMoeForCausalLM",
)

_HEADER = '''"""{architecture} with the LongRoPE definition of config.json (key "{key}") at work.

Written by longrope-export {version}; MIT licence. Needs torch and transformers 5. Load it with
AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True); without trust_remote_code the
folder loads as a stock {architecture}, which knows two factor lists at most.
model.longrope.freeze(tier_index) fixes one tier, as for training.
"""
'''

_CLASS = '''

class LongRope{architecture}({architecture}):
    """The stock model, with its definition put on when it is made."""

    def __init__(self, config):
        super().__init__(config)
        definition = getattr(config, "{key}", None)
        if not isinstance(definition, dict):
            raise ValueError('config.json has no "{key}" object: the definition is missing')
        self.longrope = install(self, definition)
'''


def modeling_source(architecture: str) -> tuple[str, str, str]:
    """One self-contained Python file for a folder whose config.json names this architecture.

    Args:
        architecture: first entry of `architectures`, for example "LlamaForCausalLM".

    Returns:
        File name, class name in it (for auto_map: "modeling_longrope.CLASS"), and the text.

    Raises:
        UnsupportedError: the runtime does not know the architecture.
    """
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"remote code for {architecture!r}: not a known architecture; known are "
            f"{', '.join(ARCHITECTURES)}"
        )
    names: dict[str, set[str]] = {"transformers": {architecture}}
    bodies = []
    for part in PARTS:
        source = (Path(__file__).parent / "core" / f"{part}.py").read_text(encoding="utf-8")
        bodies.append(f"# {part.replace('_', ' ')}\n\n\n{_split(source, names).strip()}\n")
    head = _HEADER.format(architecture=architecture, key=CONFIG_KEY, version=__version__)
    text = "\n\n".join([f"{head}\n{_import_block(names)[:-1]}", *bodies])
    text += _CLASS.format(architecture=architecture, key=CONFIG_KEY)
    return FILE_NAME, f"LongRope{architecture}", text


def _split(source: str, names: dict[str, set[str]]) -> str:
    """What follows the imports of a module; the imports are added to names, but for siblings.

    Args:
        names: module -> names imported from it; the module itself under an empty name.
    """
    imports = [
        node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    for node in imports:
        if isinstance(node, ast.Import):
            for alias in node.names:
                names.setdefault(alias.name, set()).add("")
        elif node.module and not node.module.startswith("longrope_export"):
            names.setdefault(node.module, set()).update(alias.name for alias in node.names)
    return "".join(source.splitlines(keepends=True)[imports[-1].end_lineno :])


def _import_block(names: dict[str, set[str]]) -> str:
    """Import lines, sorted as ruff does it: __future__, the standard library, the others."""
    groups: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for module in sorted(names, key=lambda name: ("" not in names[name], name)):
        group = 0 if module == "__future__" else 2 if module.startswith(("torch", "tran")) else 1
        found = sorted(names[module] - {""}, key=lambda name: (not name.isupper(), name))
        line = f"from {module} import {', '.join(found)}"
        if "" in names[module]:
            groups[group].append(f"import {module}")
        if len(line) > 100:
            line = f"from {module} import (\n" + "".join(f"    {name},\n" for name in found) + ")"
        if found:
            groups[group].append(line)
    return "\n\n".join("\n".join(lines) for lines in groups.values()) + "\n"
