"""Run by a test under mlx-lm: what it computes for exported folders, on the CPU.

python load_with_mlx.py OUTPUT.npz LENGTHS FOLDER ...
"""

import sys
from pathlib import Path


def main(output: str, lengths: str, *folders: str) -> None:
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    found = {}
    for folder in folders:
        model, _ = load_model(Path(folder))
        for length in map(int, lengths.split(",")):
            tokens = mx.array((np.arange(length) * 7919 % 311 + 3)[None])
            found[f"{folder} {length}"] = np.array(model(tokens).astype(mx.float32))[0]
    np.savez(output, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
