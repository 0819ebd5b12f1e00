"""Run by tests in a process of its own: what plain transformers computes for exported folders.

    python load_plainly.py OUTPUT.npz TRUST LENGTHS FOLDER ...

longrope_export cannot be imported here, whatever the environment holds.
"""

import os
import sys

for _name in ("longrope_export", "longrope_converters"):
    sys.modules[_name] = None  # type: ignore[assignment]
os.environ["HF_HUB_OFFLINE"] = "1"


def main(output: str, trust: str, lengths: str, *folders: str) -> None:
    import numpy as np
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    found = {"transformers": np.array(transformers.__version__)}
    for folder in folders:
        options = {"trust_remote_code": True} if trust == "trust" else {}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
        for length in map(int, lengths.split(",")):
            tokens = (torch.arange(length) * 7919 % 311 + 3)[None]
            with torch.no_grad():
                found[f"{folder} {length}"] = model(tokens).logits[0].numpy()
        found[f"{folder} class"] = np.array(f"{type(model).__module__}.{type(model).__name__}")
    np.savez(output, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
