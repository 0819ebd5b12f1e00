"""How long a text this machine can verify."""

from __future__ import annotations

import os
from pathlib import Path

from longrope_export.models.model import Model

_SHARE = 0.7  # of the memory that is free now
_ACTIVATIONS = 24  # float32 values per token and channel that a pass without a cache holds at once


def available_bytes() -> int:
    """Memory that a new process may use without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def longest_length(model: Model, num_parameters: int, memory_bytes: int) -> int:
    """Tokens for which the weights in float32, twice, and all that grows with the text fit.

    Args:
        model: the source.
        num_parameters: of its weights.
        memory_bytes: that may be used.
    """
    cache = 2 * model.num_layers * model.num_key_value_heads * model.head_dim
    activations = _ACTIVATIONS * model.num_heads * model.head_dim
    per_token = 4 * (cache + activations)
    free = memory_bytes * _SHARE - 2 * 4 * num_parameters
    return max(0, int(free / per_token))


def count_parameters(path: Path) -> int:
    """An upper bound from the sizes of the files: two bytes, or less, for each weight.

    A GGUF of 4 bits has two weights in each byte, hence the factor.
    """
    if path.is_file():
        return 2 * path.stat().st_size
    return sum(f.stat().st_size for f in path.glob("*.safetensors")) // 2
