"""Devices with their peak rates and memory, as their makers state them, and what this machine has."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from longrope_export.errors import ConfigError
from longrope_export.verify.memory import available_bytes

GPU_UTILIZATION = 0.4
CPU_UTILIZATION = 0.5
_GB = 10**9


@dataclass(frozen=True)
class Hardware:
    """Devices of one kind.

    Attributes:
        name: as --hardware gives it.
        peak_flops: of one device, dense bfloat16 (a CPU core: float32), per second.
        memory_bytes: of one device; of a CPU core 0, for what the machine has belongs to all.
        count: devices.
        utilization: share of the peak that a model reaches, unless somebody knows better.
    """

    name: str
    peak_flops: float
    memory_bytes: int
    count: int = 1
    utilization: float = GPU_UTILIZATION

    @property
    def one_bytes(self) -> int:
        """Memory that one pass can use: of a device; of CPU cores what this machine has free."""
        return self.memory_bytes or available_bytes()

    @property
    def total_bytes(self) -> int:
        """Memory of all devices; of CPU cores what this machine has free."""
        return self.count * self.memory_bytes or available_bytes()


# data sheets of NVIDIA, without sparsity
DEVICES = {
    device.name: device
    for device in (
        Hardware("a100-40gb", 312e12, 40 * _GB),
        Hardware("a100-80gb", 312e12, 80 * _GB),
        Hardware("h100", 989e12, 80 * _GB),
        Hardware("h200", 989e12, 141 * _GB),
        Hardware("l40s", 362e12, 48 * _GB),
        Hardware("rtx-3090", 71e12, 24 * _GB),
        Hardware("rtx-4090", 165e12, 24 * _GB),
        # two units of eight float32 multiply-adds at 2.5 GHz, of which torch reaches about half
        Hardware("cpu-core", 8e10, 0, utilization=CPU_UTILIZATION),
    )
}


def parse_hardware(text: str) -> Hardware:
    """A name of DEVICES, or NxNAME, as 8xa100-80gb.

    Raises:
        ConfigError: neither.
    """
    match = re.fullmatch(r"(?:(\d+)x)?(.+)", text.lower())
    count, name = (match[1] or "1", match[2]) if match else ("1", text)
    if name not in DEVICES or int(count) < 1:
        raise ConfigError(
            f"--hardware {text}: expected NAME or NxNAME, as 8xa100-80gb, with a name of "
            f"{', '.join(DEVICES)}"
        )
    return replace(DEVICES[name], name=text.lower(), count=int(count))


def this_machine() -> Hardware:
    """The cores of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return parse_hardware(f"{cores or 1}xcpu-core")


def free_bytes(device: str | None = None, count: int | None = None) -> int:
    """Memory that may be used now: of GPUs for cuda, else of the machine.

    Args:
        count: of GPUs that are used; None for all.
        device: as torch names it; None takes the GPUs where there are some.
    """
    if device is None or device.startswith("cuda"):
        try:
            import torch
        except ImportError:
            return available_bytes()
        if torch.cuda.is_available():
            free = (
                torch.cuda.mem_get_info(index)[0]
                for index in range(torch.cuda.device_count())[:count]
            )
            return int(sum(free))
    return available_bytes()
