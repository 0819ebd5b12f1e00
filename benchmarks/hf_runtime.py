"""Cost of the live transformers runtime on SmolLM2-135M, against the unmodified model.

The two models share their weights and take turns, forward by forward and token by token, the first
of each pair changing; the median difference of the pairs is printed as a ratio, in wall time and in
CPU time of the process.

    python benchmarks/hf_runtime.py                       # fetches SmolLM2 (93 MB) once
    python benchmarks/hf_runtime.py --smollm2 SmolLM2-135M-Instruct.Q4_1.gguf --threads 1
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM

from longrope_export.config import LogitScaling, LongRopeConfig
from longrope_export.demo.material import fetch_smollm2
from longrope_export.hf_runtime import apply_longrope
from longrope_export.ladder import make_config
from longrope_export.models.model import load_model

STDERR = Console(stderr=True)
Seconds = tuple[float, float]  # wall, CPU


def load(gguf: Path, dtype: torch.dtype) -> Any:
    """SmolLM2 with its weights unpacked."""
    return AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=dtype
    ).eval()


def twin(model: Any, config: LongRopeConfig) -> Any:
    """The same weights in memory, with the config on."""
    other = copy.deepcopy(model)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        ours.data = theirs.data
    apply_longrope(other, config)
    return other


def timed(work: Callable[[], object]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(name: str, works: list[Callable[[], object]], repeat: int) -> list[list[Seconds]]:
    """Seconds of each work, taken in turns; one round before the clock starts to count."""
    seconds: list[list[Seconds]] = [[] for _ in works]
    for turn in track(range(repeat + 1), description=name, console=STDERR):
        order = range(len(works)) if turn % 2 else reversed(range(len(works)))
        for index in order:
            measured = timed(works[index])
            if turn:
                seconds[index].append(measured)
    return seconds


def decoding(model: Any, prompt: torch.Tensor) -> Callable[[], object]:
    """One more token at every call, after a prompt."""
    state = model(prompt, use_cache=True)

    def step() -> None:
        nonlocal state
        token = state.logits[:, -1:].argmax(-1)
        state = model(token, past_key_values=state.past_key_values, use_cache=True)

    return step


def ratios(seconds: list[list[Seconds]]) -> list[str]:
    """1 + median of the paired differences over the median of stock, in wall and in CPU time."""
    cells = []
    for kind in (0, 1):
        stock = statistics.median(pair[kind] for pair in seconds[0])
        pairs = zip(seconds[0], seconds[1], strict=True)
        extra = statistics.median(ours[kind] - theirs[kind] for theirs, ours in pairs)
        cells += [f"{1 + extra / stock:.3f}", f"{1e3 * stock:.1f}"]
    return cells


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smollm2", type=Path, help="the GGUF, if it is on the disk already")
    parser.add_argument("--repeat", type=int, default=20, help="forwards of each kind")
    parser.add_argument("--steps", type=int, default=200, help="decoded tokens")
    parser.add_argument("--tokens", type=int, default=512, help="length of forward and prompt")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    gguf = options.smollm2 or fetch_smollm2(STDERR.print)
    stock = load(gguf, getattr(torch, options.dtype))
    n = options.tokens
    prompt = torch.randint(100, 40000, (1, n), generator=torch.Generator().manual_seed(1))
    inside = make_config(
        load_model(gguf), "yarn", 32768, ladder="8192,16384,32768", num_start_tokens=16
    )
    log = replace(inside, logit_scaling=LogitScaling(16))
    table = Table("SmolLM2-135M", "wall", "stock ms", "CPU", "stock ms")
    works: list[Callable[[], object]]
    for name, config in (("", inside), (", log scaling", log)):
        tiered = twin(stock, config)
        works = [partial(model, prompt, use_cache=False) for model in (stock, tiered)]
        table.add_row(f"forward{name}", *ratios(compare("forward" + name, works, options.repeat)))
        works = [decoding(stock, prompt), decoding(tiered, prompt)]
        table.add_row(f"decode{name}", *ratios(compare("decode" + name, works, options.steps)))
    crossing = twin(stock, inside)
    positions = torch.arange(8192 - n // 2, 8192 + n // 2)[None]
    works = [
        partial(model, prompt, position_ids=positions, use_cache=False)
        for model in (stock, crossing)
    ]
    seconds = compare("forward over a border", works, options.repeat)
    table.add_row("forward over a border", *ratios(seconds))
    Console().print(table)
    load_average = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"{options.dtype}, {n} tokens, {options.threads} threads, load at the end {load_average}")


if __name__ == "__main__":
    main()
