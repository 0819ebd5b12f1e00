"""What the header of a safetensors file says of its tensors."""

from __future__ import annotations

from pathlib import Path

from longrope_export.errors import ModelError


def read_tensor_types(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """name -> (type as safetensors spells it, F32 or BF16; shape) of every tensor; no weight is read.

    Raises:
        ModelError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    found = {}
    try:
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                tensor = file.get_slice(name)
                found[name] = (tensor.get_dtype(), tuple(tensor.get_shape()))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: damaged safetensors header: {error}") from error
    return found
