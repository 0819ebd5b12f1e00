"""How long a text this machine can verify."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from longrope_export.models.model import Model

_SHARE = 0.7  # of the memory that is free now
_ACTIVATIONS = 24  # float32 values per token and channel that a pass without a cache holds at once


def available_bytes(
    meminfo: Path = Path("/proc/meminfo"),
    own_cgroup: Path = Path("/proc/self/cgroup"),
    cgroups: Path = Path("/sys/fs/cgroup"),
) -> int:
    """Memory that this process may still use without swapping, a container's limit included.

    Args:
        meminfo: of the machine.
        own_cgroup: names the process's cgroup.
        cgroups: where cgroup v2 is mounted.
    """
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return max(0, min([free, *_left_in_cgroups(own_cgroup, cgroups)]))


def _left_in_cgroups(own_cgroup: Path, cgroups: Path) -> list[int]:
    """Bytes up to the limit of the process's cgroup and of each one around it that has a limit."""
    try:
        lines = own_cgroup.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    name = next((line[3:] for line in lines if line.startswith("0::")), None)  # version 2
    if name is None:
        return []
    left = []
    folder = PurePosixPath(name.strip("/"))
    for part in (folder, *folder.parents):
        try:
            most = (cgroups / part / "memory.max").read_text(encoding="ascii").strip()
            used = (cgroups / part / "memory.current").read_text(encoding="ascii")
            if most != "max":
                left.append(int(most) - int(used))
        except (OSError, ValueError):
            continue  # the outermost one has no such files
    return left


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
