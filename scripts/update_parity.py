"""Write docs/parity.md and docs/parity.png: SmolLM2 in every format against the definition.

    python scripts/update_parity.py [--length 600] [--work FOLDER]

Fetches SmolLM2 and builds both llama.cpp where they are missing. Three tiers with borders at 8192 and
16384 tokens, up to 32768; every border is looked at whatever the length is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from longrope_converters.to_gguf.convert import GgufConverter, GgufOptions
from longrope_converters.to_onnx.convert import OnnxConverter, OnnxOptions
from longrope_converters.to_safetensors.convert import SafetensorsConverter, SafetensorsOptions
from longrope_export.config import LongRopeConfig, SwitchPolicy
from longrope_export.demo.material import fetch_smollm2, write_help_text
from longrope_export.ladder import make_config
from longrope_export.llama_cpp.binaries import require_binary
from longrope_export.models.model import load_model
from longrope_export.runtimes.open import Export
from longrope_export.verify.compare import LIMITS
from longrope_export.verify.exports import verify_exports
from longrope_export.verify.report import markdown, save_plot

DOCS = Path(__file__).parent.parent / "docs"
CONSOLE = Console(stderr=True)
LADDER = "8192,16384,32768"
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_k_m")
ONNX_KINDS = (
    ("fp32", "genai"),
    ("fp32", "standard"),
    ("fp16", "genai"),
    ("int8", "genai"),
    ("int4", "genai"),
)
PLOTTED = ("fp32",)

HEAD = """# Measured parity

SmolLM2-135M-Instruct (window 8192) with YaRN factors for three tiers, up to 8192, 16384 and 32768
tokens, each tier with its own attention factor and 16 start tokens, rule `causal`; Python's help
topics as the text. The source is the model's Q4_1 GGUF, unpacked to float32 once; every export is made from that folder and compared with
it by `longrope-export verify`. Written by `scripts/update_parity.py`.

![differences over position](parity.png)

llama.cpp multiplies positions and frequencies in float32, stock or patched: at position p the angle of
the fastest pair is off by up to p / 2^24, and its differences grow in that measure. The definition
allows float32 angles, and so do the limits for it.

The stock runtimes at the end run the same files: where they depart from the definition is the
problem that this project is about.

"""


STOCK_HEAD = """## One tier, in the stock format

The last tier alone, for texts of any length and without start tokens: the stock config.json says all of
it, and transformers alone computes it. onnxruntime-genai's own builder writes plain RoPE for a llama whose
config.json names longrope, and says nothing.
"""


def tables_of(certificate: dict[str, Any]) -> str:
    """markdown(certificate) without its head."""
    return "\n###" + markdown(certificate).partition("\n###")[2]


def build_with_genai(folder: Path, output: Path) -> Path:
    """What onnxruntime-genai's own builder makes of a Hugging Face folder, in float32.

    Raises:
        SystemExit: the builder failed; holds what it said.
    """
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu"]
    command += ["-i", str(folder), "-o", str(output), "-c", str(output.with_suffix(".cache"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return output


def exports(folder: Path, config: LongRopeConfig) -> Iterator[Export]:
    """Each is written when it is asked for."""
    source = load_model(folder)
    root = folder.parent
    remote = root / "smollm2-remote"
    options_ = SafetensorsOptions(remote_code=True, link=True)
    SafetensorsConverter(options_).convert(source, config, remote, lambda _: None)
    yield Export("transformers", remote)
    yield Export("transformers-remote", remote)
    for kind in GGUF_TYPES:
        path = root / f"smollm2-{kind}.gguf"
        converter = GgufConverter(GgufOptions(outtype=kind))
        converter.convert(source, config, path, lambda _: None)
        yield Export("llama.cpp", path)
    for precision, ops in ONNX_KINDS:
        path = root / f"smollm2-{precision}-{ops}"
        options = OnnxOptions(precision=precision, ops=ops)
        OnnxConverter(options).convert(source, config, path, lambda _: None)
        yield Export("onnxruntime", path)
    yield Export("llama.cpp-stock", root / "smollm2-f32.gguf")
    yield Export("genai", root / "smollm2-fp32-genai")
    yield Export("transformers-stock", remote)


def stock_config(config: LongRopeConfig) -> LongRopeConfig:
    """The last tier alone, for any length, without start tokens: all of it has a place in config.json."""
    last = replace(config.tiers[-1], num_start_tokens=0)
    return replace(config, tiers=(last,), switch=SwitchPolicy.SEQUENCE)


def stock_exports(folder: Path, config: LongRopeConfig) -> Iterator[Export]:
    """One folder in the stock format, and what onnxruntime-genai's own builder makes of it."""
    stock = folder.parent / "smollm2-stock"
    converter = SafetensorsConverter(SafetensorsOptions(link=True))
    converter.convert(load_model(folder), config, stock, lambda _: None)
    yield Export("transformers-stock", stock)
    yield Export("genai", build_with_genai(stock, folder.parent / "smollm2-builder-fp32"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=600, help="of the sequences from the start")
    parser.add_argument("--json", type=Path, help="the whole certificate")
    parser.add_argument("--work", type=Path, help="keep the exports here")
    arguments = parser.parse_args()
    gguf = load_model(fetch_smollm2(CONSOLE.print))
    require_binary("llama-quantize", build=True)
    config = make_config(gguf, "yarn", 32768, ladder=LADDER, num_start_tokens=16)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.work or Path(temporary)) / "smollm2"
        folder.parent.mkdir(exist_ok=True)
        if not folder.exists():
            SafetensorsConverter(SafetensorsOptions(dtype="f32")).convert(
                gguf, None, folder, lambda _: None
            )

        def say(what: str, share: float) -> None:
            CONSOLE.print(f"{what}: {share:.0%}", highlight=False)

        text = folder.with_name("text.txt")
        write_help_text(text)
        certificate, _ = verify_exports(
            load_model(folder),
            config,
            list(exports(folder, config)),
            arguments.length,
            text=text.read_text(encoding="utf-8"),
            build=True,
            say=say,
        )
        one_tier, _ = verify_exports(
            load_model(folder),
            stock_config(config),
            list(stock_exports(folder, stock_config(config))),
            arguments.length,
            text=text.read_text(encoding="utf-8"),
            limits={"unknown": LIMITS["fp32"]},  # the builder's folder does not say what it holds
            say=say,
        )
    tables = f"{markdown(certificate)}\n{STOCK_HEAD}{tables_of(one_tier)}"
    (DOCS / "parity.md").write_text(HEAD + tables, encoding="utf-8")
    shown = [e for e in certificate["exports"] if e["precision"] in PLOTTED]
    save_plot({**certificate, "exports": shown}, DOCS / "parity.png")
    if arguments.json:
        arguments.json.write_text(json.dumps(certificate), encoding="utf-8")


if __name__ == "__main__":
    main()
