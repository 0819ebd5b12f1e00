"""A small trained model in the regime of the LongRoPE paper: base 10000, a short window.

Bytes are its tokens, 256 of them its window, and it learned from whole works of fiction; beyond
the window PI and NTK break it and YaRN hurts it, so that a search for factors has something to
gain. It is trained on the CPU at the first call, minutes, and kept in the user's cache.

    python benchmarks/small_model.py          # trains or finds it, and prints perplexities
    python benchmarks/small_model.py --long   # the same model after six times the training
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from longrope_export.demo.texts import SOURCES, fetch_texts
from longrope_export.hf_runtime import apply_longrope, remove_longrope
from longrope_export.ladder import make_config
from longrope_export.llama_cpp.cache import Say, cache_folder, locked, say_nothing
from longrope_export.models.model import load_model
from longrope_export.outputs import replace_folder_when_done

TRAIN_TEXTS = ("andersen-tales", "swanns-way", "doctor-moreau", "heart-of-darkness")
# whole works that the model has never seen: search on one, choose by another, report a third
HELD_OUT_TEXTS = ("voyage-out", "dubliners", "pride-and-prejudice")
TEST_TEXT = HELD_OUT_TEXTS[-1]

WINDOW = 256
RECIPE: dict[str, Any] = {
    "model": {
        "vocab_size": 259,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 257,
    },
    "texts": TRAIN_TEXTS,
    "archives": [source.sha256 for source in SOURCES if {*source.texts} & {*TRAIN_TEXTS}],
    "seed": 0,
    "steps": 400,
    "windows_per_step": 8,
    "warmup_steps": 10,
    "matrix_rate": 0.02,
    "other_rate": 3e-3,
    "weight_decay": 0.1,
    "optimizer": "AdamW; for the matrices of the layers momentum 0.95, orthogonalized",
}
# three quarters of an hour on one thread; the tests do without it
LONG_RECIPE = RECIPE | {"steps": 1200, "windows_per_step": 16}
METHODS = (None, "pi", "ntk", "yarn")
TEST_WINDOWS = 8


def trained_model(say: Say = say_nothing, recipe: dict[str, Any] = RECIPE) -> Path:
    """The Hugging Face folder of the model, trained at the first call and kept in the cache.

    Its name holds a hash of the recipe, RECIPE or LONG_RECIPE. Training that is killed leaves nothing under that name. A
    token is a byte, 0 to 255; <bos> and <eos> are there for tools that want them and were never
    trained. llama.cpp has no name for the tokenizer, and any of its splitting rules will do:
    `longrope-export gguf --pre gpt-2`.

    Raises:
        ToolError: the texts cannot be fetched (see fetch_texts).
    """
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_folder() / "models" / f"small-{digest}"
    with locked(folder, say):
        if not folder.is_dir():
            texts = fetch_texts(say)
            data = b"\n".join(texts[name].read_bytes() for name in TRAIN_TEXTS)
            with torch.random.fork_rng(devices=[]), _threads_that_are_free():
                torch.manual_seed(recipe["seed"])
                model = _train(torch.frombuffer(bytearray(data), dtype=torch.uint8), recipe, say)
            with replace_folder_when_done(folder) as temporary:
                model.save_pretrained(temporary)
                _write_tokenizer(temporary)
    return folder


@contextlib.contextmanager
def _threads_that_are_free() -> Iterator[None]:
    """On a busy machine threads wait for each other: two took seven times as long as one."""
    before = torch.get_num_threads()
    free = round((os.cpu_count() or 1) - os.getloadavg()[0])
    torch.set_num_threads(max(1, min(before, free)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(data: Tensor, recipe: dict[str, Any], say: Say) -> Any:
    """A new model; `data` is all text, (bytes,) uint8."""
    model = LlamaForCausalLM(LlamaConfig(**recipe["model"])).train()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    decay, steps = recipe["weight_decay"], recipe["steps"]
    adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
    step_matrices = _orthogonalized_momentum(matrices, decay)
    say(
        f"training {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {steps} steps"
    )
    losses, start = [], time.monotonic()
    for step in range(1, steps + 1):
        rate = min(1.0, step / recipe["warmup_steps"]) * (
            0.51 + 0.49 * math.cos(math.pi * step / steps)
        )
        offsets = torch.randint(len(data) - WINDOW, (recipe["windows_per_step"], 1))
        tokens = data[offsets + torch.arange(WINDOW + 1)].long()  # (windows, WINDOW + 1)
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        step_matrices(rate * recipe["matrix_rate"])
        adam.param_groups[0]["lr"] = rate * recipe["other_rate"]
        adam.step()
        model.zero_grad()
        losses.append(loss.item())
        if step % 25 == 0:
            mean = sum(losses[-25:]) / 25
            say(f"step {step}, loss {mean:.3f} nats/byte, {time.monotonic() - start:.0f} s")
    return model.eval()


def _orthogonalized_momentum(
    matrices: list[Tensor], weight_decay: float
) -> Callable[[float], None]:
    """A step of Muon for a learning rate: it needs half the tokens that AdamW does here.

    Matrices of one shape are orthogonalized together, in float32: torch.optim.Muon does it one by
    one in bfloat16, which CPUs without instructions for it are slow at.
    """
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for matrix in matrices:
        by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(matrix)
    groups = [(torch.zeros(len(same), *shape), same) for shape, same in by_shape.items()]

    @torch.no_grad()
    def step(rate: float) -> None:
        for momentum, same in groups:
            gradient = torch.stack([_wide(p.grad) for p in same if p.grad is not None])
            momentum.lerp_(gradient, 0.05)
            updates = _orthogonalize(gradient.lerp(momentum, 0.95))
            for matrix, update in zip(same, updates, strict=True):
                rows, columns = matrix.shape
                matrix.mul_(1 - rate * weight_decay)
                matrix.add_(
                    update.T if rows > columns else update,
                    alpha=-rate * math.sqrt(max(1, rows / columns)),
                )

    return step


def _wide(matrix: Tensor) -> Tensor:
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def _orthogonalize(matrices: Tensor) -> Tensor:
    """(n, rows, columns >= rows) -> the same with singular values near 1, by Newton-Schulz."""
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x


def _write_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json: the id of a byte is its value.

    llama.cpp wants merges: there is one, of two bytes that are never in UTF-8.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's letters for bytes
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    unused = (letters[0xFE], letters[0xFF])
    vocabulary = {letters[byte]: byte for byte in range(256)}
    vocabulary |= {"<bos>": 256, "<eos>": 257, "".join(unused): 258}
    tokenizer = Tokenizer(models.BPE(vocabulary, [unused]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<bos>", "<eos>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<eos>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": WINDOW,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


@torch.no_grad()
def perplexity(model: Any, data: bytes, length: int, windows: int) -> float:
    """Per byte, over `windows` parts of 8 * WINDOW bytes spread over a text.

    Args:
        length: tokens that the model sees at once, a divisor of 8 * WINDOW: each part is cut into
            pieces of that length, so that every length is measured on the same bytes.
    """
    part, total, count = 8 * WINDOW, 0.0, 0
    for index in range(windows):
        start = (len(data) - part) * index // max(1, windows - 1)
        tokens = torch.tensor(list(data[start : start + part])).view(-1, length)
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        total += cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
        ).item()
        count += tokens[:, 1:].numel()
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--long", action="store_true", help="after LONG_RECIPE")
    recipe = LONG_RECIPE if parser.parse_args().long else RECIPE
    console = Console(stderr=True)
    folder = trained_model(console.print, recipe)
    console.print(f"the model is in {folder}")
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    source, data = load_model(folder), fetch_texts()[TEST_TEXT].read_bytes()
    table = Table("perplexity at", *(method or "none" for method in METHODS), title=TEST_TEXT)
    for ratio in (1, 2, 4, 8):
        cells = []
        for method in METHODS if ratio > 1 else (None,):
            if method is not None:
                apply_longrope(model, make_config(source, method, ratio * WINDOW))
            cells.append(f"{perplexity(model, data, ratio * WINDOW, TEST_WINDOWS):.3f}")
            if method is not None:
                remove_longrope(model)
        table.add_row(f"{ratio}x", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
