"""Which files a split GGUF model consists of."""

from __future__ import annotations

from pathlib import Path

from longrope_export.gguf_format import read_header

_MOST_SHARDS = 65535  # as llama.cpp counts them, in 16 bits


def shard_paths(path: Path) -> list[Path]:
    """All files of a split model, whose names end in -00001-of-00003.gguf, or the one file.

    Args:
        path: of the first one. The others need not exist.

    Raises:
        GgufError: it cannot be read.
    """
    count = read_header(path).get("split.count", 1)
    stem, separator, _ = path.name.rpartition("-00001-of-")
    if not separator or not isinstance(count, int) or not 2 <= count <= _MOST_SHARDS:
        return [path]
    return [path.with_name(f"{stem}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]
