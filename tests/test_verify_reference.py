"""The reference shares nothing with what it judges."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from test_onnx import export, make_source, three_tiers

import longrope_export
from longrope_export.config import LongRopeConfig, SwitchPolicy
from longrope_export.runtimes.open import Export
from longrope_export.verify.plan import make_cases
from longrope_export.verify.rows import ReferenceRows
from longrope_export.verify.run import verify_export


def test_the_reference_shares_no_formula() -> None:
    """An exporter that used the reference's own tables, or the reverse, would prove nothing."""
    package = Path(longrope_export.__file__).parent
    reference = package / "verify" / "reference.py"
    assert imports(reference) == {
        "longrope_export.config",
        "longrope_export.models.torch_model",
    }
    assert imports(package / "models" / "torch_model.py") == {"longrope_export.errors"}
    others = [*package.rglob("*.py"), *(package.parent / "converters").rglob("*.py")]
    named = (p for p in others if "reference" in p.read_text())
    found = (p for p in named if "longrope_export.verify.reference" in imports(p))
    users = {p.relative_to(package.parent) for p in found}
    assert users == {
        Path(
            "longrope_export/verify/plan.py"
        ),  # which tier: the reference's choice, not the config's
        Path("longrope_export/verify/rows.py"),
    }


def imports(path: Path) -> set[str]:
    """Our modules that a file imports, in whatever form."""
    root = Path(longrope_export.__file__).parent.parent
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(root).parts[: -node.level] if node.level else ()
            module = ".".join((*package, *filter(None, [node.module])))
            names = [f"{module}.{alias.name}" for alias in node.names]
            found |= {name if is_module(root, name) else module for name in names}
    return {name for name in found if name.startswith("longrope")}


def is_module(root: Path, name: str) -> bool:
    path = root.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


@pytest.mark.parametrize(
    "line",
    [
        "import longrope_export.verify.reference",
        "import longrope_export.verify.reference as r",
        "from longrope_export.verify import plan, reference",
        "from longrope_export.verify.reference import cos_sin",
        "from .reference import cos_sin",
        "from . import reference",
        "from ..verify import reference as r",
        "def f():\n    from longrope_export.verify import reference",
    ],
)
def test_no_form_of_an_import_is_overlooked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    package = tmp_path / "longrope_export" / "verify"
    package.mkdir(parents=True)
    for name in ("reference", "plan"):
        (package / f"{name}.py").touch()
    monkeypatch.setattr(longrope_export, "__file__", str(package.parent / "__init__.py"))
    (package / "user.py").write_text(line)
    assert "longrope_export.verify.reference" in imports(package / "user.py")


@pytest.mark.parametrize("switch", list(SwitchPolicy))
def test_a_border_off_by_one_in_what_runtimes_and_config_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switch: SwitchPolicy
) -> None:
    """Verify chooses the tier by itself, under both rules."""
    source = make_source(tmp_path / "m")
    config = three_tiers(source, switch=switch)
    exported = Export("onnxruntime", export(source, config, tmp_path / "onnx"))
    ids = list(range(3, 203))

    def early(self: LongRopeConfig, length: int) -> int:
        found = (index for index, tier in enumerate(self.tiers) if length < tier.max_length)
        return next(found, len(self.tiers) - 1)

    monkeypatch.setattr(LongRopeConfig, "tier_index", early)
    cases = make_cases(config, 200)
    reference = ReferenceRows(source, config, ids, cases)
    result = verify_export(exported, config, ids, cases, reference, threads=1)
    missed = {case.first_miss for case in result.cases if case.first_miss is not None}
    assert result.cases and not result.problems and 63 in missed
