"""Two comparisons on SmolLM2 that need long texts, and so some CPU time.

    python scripts/compare_long.py greedy   # 64 tokens behind 9,000, onnxruntime-genai and transformers; minutes
    python scripts/compare_long.py folder   # perplexity of an exported folder and of the live runtime; most of an hour

`greedy` exports two and three tiers (16 start tokens) under `sequence` to ONNX and lets both runtimes
continue the same prompt. `folder` writes two tiers in the stock format and loads them in a process that
knows nothing of this package; the live runtime computes the same factors on the source's weights.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from longrope_converters.to_onnx.convert import OnnxConverter, OnnxOptions
from longrope_converters.to_safetensors.convert import SafetensorsConverter, SafetensorsOptions
from longrope_export.config import LongRopeConfig, SwitchPolicy
from longrope_export.demo.material import fetch_smollm2, write_help_text
from longrope_export.demo.texts import fetch_texts
from longrope_export.hf_runtime import apply_longrope
from longrope_export.ladder import MethodOptions, make_config
from longrope_export.models.model import Model, load_model
from longrope_export.models.token_losses import token_losses
from longrope_export.models.torch_model import load_torch_model, load_torch_tokenizer
from longrope_export.runtimes.base import Runtime
from longrope_export.runtimes.open import Export, open_runtime

TARGET = 32768
PROMPT, CONTINUATION = 9000, 64
NOVEL = "pride-and-prejudice"
LENGTHS = (16384, 32768)
Losses = npt.NDArray[np.float64]

ALONE = """
import sys
import numpy as np, torch, transformers
folder, ids, output = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
text = torch.tensor(np.load(ids))[None]
with torch.inference_mode():
    hidden = model.model(text, use_cache=False).last_hidden_state[0]
    losses = [
        torch.nn.functional.cross_entropy(model.lm_head(part), following, reduction="none")
        for part, following in zip(hidden[:-1].split(1024), text[0, 1:].split(1024))
    ]
np.save(output, torch.cat(losses).double().numpy())
assert not [name for name in sys.modules if name.startswith("longrope")]
"""


def continue_greedily(runtime: Runtime, prompt: Sequence[int]) -> tuple[list[int], float]:
    """CONTINUATION tokens, and the least distance between the two largest logits on the way."""
    sequence = runtime.start(declared_length=len(prompt) + CONTINUATION)
    row = sequence.append(prompt, keep=1)[-1]
    tokens, margin = [], np.inf
    while True:
        second, first = np.sort(row)[-2:]
        tokens, margin = [*tokens, int(row.argmax())], min(margin, float(first - second))
        if len(tokens) == CONTINUATION:
            return tokens, margin
        row = sequence.append(tokens[-1:], keep=1)[-1]


def compare_greedy(source: Model, work: Path) -> None:
    write_help_text(work / "text.txt")
    text = (work / "text.txt").read_text(encoding="utf-8")
    ids = load_torch_tokenizer(source.path)(text[20_000:], verbose=False).input_ids[:PROMPT]
    for ladder, num_start_tokens in (("8192,32768", 0), ("8192,16384,32768", 16)):
        config = make_config(
            source, "yarn", TARGET, ladder=ladder, switch=SwitchPolicy.SEQUENCE,
            num_start_tokens=num_start_tokens,
        )  # fmt: skip
        folder = work / f"onnx-{len(config.tiers)}"
        OnnxConverter(OnnxOptions()).convert(source, config, folder, lambda _: None)
        answers = []
        for export in (Export("genai", folder), Export("transformers", source.path)):
            runtime = open_runtime(export, context=PROMPT + CONTINUATION, config=config)
            answers.append(continue_greedily(runtime, ids))
            runtime.close()
        (theirs, margin), (ours, _) = answers
        same = sum(a == b for a, b in zip(theirs, ours, strict=True))
        print(
            f"tiers {ladder}, {num_start_tokens} start tokens: {same} of {CONTINUATION} greedy tokens "
            f"alike behind {PROMPT:,}; least margin {margin:.4f}",
            flush=True,
        )


def live_losses(path: Path, config: LongRopeConfig, ids: npt.NDArray[np.int64]) -> Losses:
    import torch

    model, _ = load_torch_model(path)
    apply_longrope(model, config)
    text = torch.from_numpy(ids)
    with torch.inference_mode():
        hidden = model.get_decoder()(text[None], use_cache=False).last_hidden_state[0]
        losses: Losses = token_losses(model, hidden[:-1], text[1:])[0].double().numpy()
    return losses


def compare_folder(source: Model, work: Path) -> None:
    # stock transformers has one attention factor for all lengths: strength 0 makes both 1
    config = make_config(
        source, "yarn", TARGET, ladder=f"8192,{TARGET}", switch=SwitchPolicy.SEQUENCE,
        options=MethodOptions(attention_strength=0.0),
    )  # fmt: skip
    folder = work / "folder"
    SafetensorsConverter(SafetensorsOptions()).convert(source, config, folder, lambda _: None)
    text = fetch_texts(print)[NOVEL].read_text(encoding="utf-8")
    tokenizer = load_torch_tokenizer(source.path)
    ids = np.array(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    for length in LENGTHS:
        np.save(work / "ids.npy", ids[:length])
        command = [sys.executable, "-c", ALONE, folder, work / "ids.npy", work / "losses.npy"]
        subprocess.run(command, check=True)
        alone: Losses = np.load(work / "losses.npy")
        live = live_losses(source.path, config, ids[:length])
        print(
            f"{length:,} tokens: perplexity {np.exp(alone.mean()):.6f} by transformers alone, "
            f"{np.exp(live.mean()):.6f} live; a token's loss differs by at most "
            f"{np.abs(alone - live).max():.1e}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["greedy", "folder"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        options = SafetensorsOptions(dtype="f32")
        SafetensorsConverter(options).convert(
            load_model(fetch_smollm2(print)), None, work / "smollm2", lambda _: None
        )
        source = load_model(work / "smollm2")
        compare = compare_greedy if arguments.what == "greedy" else compare_folder
        compare(source, work)


if __name__ == "__main__":
    main()
