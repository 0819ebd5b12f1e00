"""Write converters/longrope_converters/to_gguf/pre_tokenizers.json from a llama.cpp source tree.

    python scripts/update_pre_tokenizers.py LLAMA_CPP_SOURCE --version "0.3.36 (commit 0c1e57098b)"

The table (hash of the ids of a fixed text -> name of the pre-tokenizer) and that text are data of
llama.cpp, whose MIT licence is copied into the file. The source is parsed, not run.
"""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path

TARGET = Path(__file__).parents[1] / "converters/longrope_converters/to_gguf/pre_tokenizers.json"
FUNCTION = "get_vocab_base_pre"


def read_table(source: Path) -> tuple[str, dict[str, str]]:
    """The test text and the names by hash, from the function that holds them as `if` statements."""
    tree = ast.parse((source / "conversion" / "base.py").read_text(encoding="utf-8"))
    functions = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == FUNCTION
    ]
    if len(functions) != 1:
        raise SystemExit(f"{source}: expected one function {FUNCTION}, found {len(functions)}")
    text, names = "", {}
    for statement in functions[0].body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="chktxt")], value=ast.Constant(value=str(value))):
                text = value
            case ast.If(
                test=ast.Compare(
                    left=ast.Name(id="chkhsh"), comparators=[ast.Constant(value=str(digest))]
                ),
                body=[ast.Assign(value=ast.Constant(value=str(name)))],
            ):
                names[digest] = name
    if not text or len(names) < 50:
        raise SystemExit(f"{source}: found {len(names)} names; {FUNCTION} has another shape now")
    return text, names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a llama.cpp source tree")
    parser.add_argument("--version", required=True, help="which release the tree is")
    parser.add_argument("--output", type=Path, default=TARGET)
    args = parser.parse_args()
    text, names = read_table(args.source)
    table = {
        "about": "Names of BPE pre-tokenizers by the SHA-256 of str(token ids of `text`). "
        "Made by scripts/update_pre_tokenizers.py; do not edit.",
        "source": "llama.cpp (github: ggml-org/llama.cpp), conversion/base.py",
        "version": args.version,
        "licence": (args.source / "LICENSE").read_text(encoding="utf-8"),
        "text": text,
        "names": dict(sorted(names.items(), key=lambda item: (item[1], item[0]))),
    }
    args.output.write_text(json.dumps(table, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")
    print(f"{args.output}: {len(names)} hashes, {len(set(names.values()))} names")


if __name__ == "__main__":
    main()
