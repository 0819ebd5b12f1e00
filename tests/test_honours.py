"""The table of what runtimes honour, against the sources that decide."""

import re
from pathlib import Path

from longrope_export.honours import PATCHED_ARCHITECTURES

ROOT = Path(__file__).parent.parent


def test_patched_architectures_are_those_of_the_patch() -> None:
    code = (ROOT / "cpp_patch" / "src" / "llama-longrope.cpp").read_text()
    switch = code[code.index("bool is_supported(") :]
    names = re.findall(r"case LLM_ARCH_(\w+):", switch[: switch.index("default:")])
    assert {name.lower().replace("granite_moe", "granitemoe") for name in names} == (
        PATCHED_ARCHITECTURES
    )
