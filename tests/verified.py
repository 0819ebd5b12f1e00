"""A model, its export, and what `verify` has written about both."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner, Result
from test_onnx import export, make_source, three_tiers
from tiny_models import add_bpe_tokenizer

from longrope_export.cli import main
from longrope_export.factor_files import to_json


def make_verified(root: Path) -> Path:
    """m: a model; f.json; onnx: its export; certificate.json, .md and .png of a run."""
    source = make_source(root / "m")
    add_bpe_tokenizer(source)
    config = three_tiers(source)
    (root / "f.json").write_text(json.dumps(to_json(config)))
    export(source, config, root / "onnx")
    written = [("-o", "certificate.json"), ("--markdown", "card.md"), ("--plot", "plot.png")]
    options = [word for flag, name in written for word in (flag, str(root / name))]
    result = run(root, "m", "onnx", "--factors", root / "f.json", *options)
    assert result.exit_code == 0, result.output
    return root


def run(root: Path, *arguments: object) -> Result:
    """`verify` with paths below root."""
    words = [str(root / a) if a in ("m", "onnx", "other") else str(a) for a in arguments]
    return CliRunner().invoke(main, ["verify", *words, "--threads", "1"])
