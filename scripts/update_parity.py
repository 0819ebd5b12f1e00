"""Write docs/parity.md and docs/parity.png: SmolLM2 in every format against the definition.

    python scripts/update_parity.py [--length 600] [--parts transformers,stock] [--work FOLDER]

Fetches SmolLM2 and builds both llama.cpp where they are missing. Three tiers with borders at 8192 and
16384 tokens, up to 32768; every border is looked at whatever the length is. Part after part, in any order and
in as many runs as one likes: --work keeps the certificate of each, and the document holds all of them. At 32768
tokens each of the five float32 parts takes some 20 minutes of one new core, and the reference, once for all parts
of a run, as long.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent))

from longrope_converters.base import Converter
from longrope_converters.to_gguf.convert import GgufConverter, GgufOptions
from longrope_converters.to_onnx.convert import OnnxConverter, OnnxOptions
from longrope_converters.to_safetensors.convert import SafetensorsConverter, SafetensorsOptions
from longrope_export.config import LongRopeConfig, SwitchPolicy
from longrope_export.demo.material import fetch_smollm2, write_help_text
from longrope_export.evaluate.results import Table, markdown_table
from longrope_export.ladder import make_config
from longrope_export.llama_cpp.binaries import require_binary
from longrope_export.llama_cpp.cache import cache_folder
from longrope_export.models.model import load_model
from longrope_export.outputs import write_text
from longrope_export.runtimes.open import Export
from longrope_export.verify.compare import LIMITS
from longrope_export.verify.exports import SHORT_LENGTH, Prepared, prepare, verify_exports
from longrope_export.verify.report import markdown, save_plot
from scripts.readme import write_block

DOCS = Path(__file__).parent.parent / "docs"
CONSOLE = Console(stderr=True)
Exports = Iterator[Export]
LADDER = "8192,16384,32768"
ROUNDED_GGUF = ("f16", "bf16", "q8_0", "q4_k_m")
ROUNDED_ONNX = ("fp16", "int8", "int4")

HEAD = """# Measured parity

SmolLM2-135M-Instruct (window 8192) with YaRN factors for three tiers, up to 8192, 16384 and 32768
tokens, each tier with its own attention factor and 16 start tokens, rule `causal`; Python's help
topics as the text. The source is the model's Q4_1 GGUF, unpacked to float32 once; every export is made from that folder and compared with
it by `longrope-export verify`. Written by `scripts/update_parity.py`.

![differences over position](parity.png)

llama.cpp multiplies positions and frequencies in float32, stock or patched: at position p the angle of
the fastest pair is off by up to p / 2^24, and its differences grow in that measure. The definition
allows float32 angles, and so do the limits for it.

Whole sequences have {length} tokens in float32 and {short} otherwise; every border is looked at besides.
The stock runtimes at the end run the same files: where they depart from the definition is the
problem that this project is about.

"""


OTHERS_HEAD = """
## Other precisions, stock runtimes: {short} tokens
"""

STOCK_HEAD = """
## One tier, in the stock format

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


def write(converter: Converter, folder: Path, config: LongRopeConfig | None, path: Path) -> Path:
    converter.convert(load_model(folder), config, path, lambda _: None)
    return path


def to_folder(folder: Path, config: LongRopeConfig, path: Path, remote_code: bool = True) -> Path:
    options = SafetensorsOptions(remote_code=remote_code, link=True)
    return write(SafetensorsConverter(options), folder, config, path)


def to_gguf(folder: Path, config: LongRopeConfig, root: Path, outtype: str) -> Path:
    converter = GgufConverter(GgufOptions(outtype=outtype))
    return write(converter, folder, config, root / f"smollm2-{outtype}.gguf")


def to_onnx(
    folder: Path, config: LongRopeConfig, root: Path, precision: str, ops: str = "genai"
) -> Path:
    converter = OnnxConverter(OnnxOptions(precision=precision, ops=ops))
    return write(converter, folder, config, root / f"smollm2-{precision}-{ops}")


def transformers(folder: Path, config: LongRopeConfig, root: Path) -> Exports:
    yield Export("transformers", to_folder(folder, config, root / "smollm2-remote"))


def transformers_remote(folder: Path, config: LongRopeConfig, root: Path) -> Exports:
    yield Export("transformers-remote", to_folder(folder, config, root / "smollm2-remote"))


def llama_cpp(folder: Path, config: LongRopeConfig, root: Path) -> Exports:
    yield Export("llama.cpp", to_gguf(folder, config, root, "f32"))


def onnx_genai(folder: Path, config: LongRopeConfig, root: Path) -> Exports:
    yield Export("onnxruntime", to_onnx(folder, config, root, "fp32", "genai"))


def onnx_standard(folder: Path, config: LongRopeConfig, root: Path) -> Exports:
    yield Export("onnxruntime", to_onnx(folder, config, root, "fp32", "standard"))


def rounded(folder: Path, config: LongRopeConfig, root: Path) -> Exports:
    for outtype in ROUNDED_GGUF:
        yield Export("llama.cpp", to_gguf(folder, config, root, outtype))
    for precision in ROUNDED_ONNX:
        yield Export("onnxruntime", to_onnx(folder, config, root, precision))


def stock(folder: Path, config: LongRopeConfig, root: Path) -> Exports:
    yield Export("llama.cpp-stock", to_gguf(folder, config, root, "f32"))
    yield Export("genai", to_onnx(folder, config, root, "fp32"))
    yield Export("transformers-stock", to_folder(folder, config, root / "smollm2-remote"))


def one_tier(folder: Path, config: LongRopeConfig, root: Path) -> Exports:
    """One folder in the stock format, and what onnxruntime-genai's own builder makes of it."""
    path = to_folder(folder, config, root / "smollm2-stock", remote_code=False)
    yield Export("transformers-stock", path)
    yield Export("genai", build_with_genai(path, root / "smollm2-builder-fp32"))


# one export each: a part is kept when it is whole
FLOAT32: dict[str, Callable[[Path, LongRopeConfig, Path], Exports]] = {
    "transformers": transformers,
    "transformers-remote": transformers_remote,
    "llama.cpp": llama_cpp,
    "onnx-genai": onnx_genai,
    "onnx-standard": onnx_standard,
}
PARTS = {**FLOAT32, "rounded": rounded, "stock": stock, "one-tier": one_tier}


def stock_config(config: LongRopeConfig) -> LongRopeConfig:
    """The last tier alone, for any length, without start tokens: all of it has a place in config.json."""
    last = replace(config.tiers[-1], num_start_tokens=0)
    return replace(config, tiers=(last,), switch=SwitchPolicy.SEQUENCE)


def show(what: str, share: float) -> None:
    CONSOLE.print(f"{what}: {share:.0%}", highlight=False)


@functools.cache
def prepared(work: Path, one_tier: bool, length: int) -> Prepared:
    """The reference, once for all parts of one run that share it."""
    folder, text = work / "smollm2", work / "text.txt"
    gguf = load_model(fetch_smollm2(CONSOLE.print))
    if not folder.exists():
        options = SafetensorsOptions(dtype="f32")
        SafetensorsConverter(options).convert(gguf, None, folder, lambda _: None)
    if not text.exists():
        write_help_text(text)
    config = make_config(gguf, "yarn", 32768, ladder=LADDER, num_start_tokens=16)
    if one_tier:
        config = stock_config(config)
    return prepare(
        load_model(folder), config, length, text=text.read_text(encoding="utf-8"), say=show
    )


def certificate_of(part: str, work: Path, length: int, threads: int | None) -> dict[str, Any]:
    """Write the exports of a part and compare them; the certificate of all of them."""
    shared = prepared(work, part == "one-tier", length if part in FLOAT32 else SHORT_LENGTH)
    with tempfile.TemporaryDirectory(dir=work) as root:
        certificate, _ = verify_exports(
            shared,
            list(PARTS[part](shared.model.path, shared.config, Path(root))),
            limits={"unknown": LIMITS["fp32"]},  # the builder's folder does not say what it holds
            threads=threads,
            build=True,
            say=show,
        )
    return certificate


def write_documents(parts: dict[str, dict[str, Any]]) -> None:
    """docs/parity.md and .png, and the README's block, from the certificates of all parts."""
    exact = [export for name in FLOAT32 for export in parts[name]["exports"]]
    others = [export for name in ("rounded", "stock") for export in parts[name]["exports"]]
    first = parts["transformers"]
    counts = " or ".join(sorted({str(parts[name]["tokens"]["count"]) for name in FLOAT32}))
    sections = (
        HEAD.format(length=counts, short=SHORT_LENGTH),
        markdown({**first, "exports": exact, "tokens": {"count": counts}}),
        OTHERS_HEAD.format(short=SHORT_LENGTH),
        tables_of({**parts["stock"], "exports": others}),
        STOCK_HEAD,
        tables_of(parts["one-tier"]),
    )
    block = readme_table(exact)
    write_text(DOCS / "parity.md", "".join(sections))
    drawn = [export for export in [*exact, *others] if export["precision"] == "fp32"]
    save_plot({**first, "exports": drawn}, DOCS / "parity.png")
    write_block("parity", block)


def readme_table(exports: list[dict[str, Any]]) -> str:
    """The worst of each export, Markdown."""
    rows = []
    for export in exports:
        cases = export["cases"]
        name = f"{export['runtime']}, {export['precision']}"
        if cases:
            tokens = max(case["length"] - case["origin"] for case in cases)
            worst = [max(case[key] for case in cases) for key in ("max_difference", "max_kl")]
            rows.append((name, f"{tokens:,}", *(f"{value:.2g}" for value in worst)))
        else:
            rows.append((name, "did not run", "", ""))
    header = ("export", "tokens from the first one on", "largest difference of a logit", "largest KL, nats")  # fmt: skip
    return markdown_table(Table("parity", header, tuple(rows)))


def refuse_mixed(parts: dict[str, dict[str, Any]]) -> None:
    """Certificates of different source models or versions do not belong in one document.

    Raises:
        SystemExit: naming the parts that differ from the first one.
    """

    def key(certificate: dict[str, Any]) -> tuple[Any, Any]:
        return certificate["tool"], certificate["reference"]["sha256"]

    first = next(iter(parts.values()))
    other = [part for part, found in parts.items() if key(found) != key(first)]
    if other:
        raise SystemExit(f"of another version or model than the other parts, run again: {other}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--length", type=int, default=32768, help="of float32 exports' sequences")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"run now: {', '.join(PARTS)}")
    parser.add_argument("--threads", type=int, help="of llama.cpp and ONNX Runtime")
    parser.add_argument("--work", type=Path, default=cache_folder() / "parity")
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in arguments.parts.split(",") if part]
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]}: there are {', '.join(PARTS)}")
    if "rounded" in chosen:
        require_binary("llama-quantize", build=True)
    for part in chosen:
        certificate = certificate_of(part, work, arguments.length, arguments.threads)
        write_text(work / f"{part}.json", json.dumps(certificate))
    found = {part: work / f"{part}.json" for part in PARTS}
    missing = [part for part, path in found.items() if not path.exists()]
    if missing:
        CONSOLE.print(f"docs/ is left as it is: not run yet: {', '.join(missing)}")
        return
    parts = {part: json.loads(path.read_text(encoding="utf-8")) for part, path in found.items()}
    refuse_mixed(parts)
    write_documents(parts)


if __name__ == "__main__":
    main()
