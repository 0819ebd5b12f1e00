"""`search --offload disk` beside the resident model: memory against depth, time against length.

    python benchmarks/offload.py [--layers 6,12] [--lengths 2048,8192] [--hidden 1024] [--dtype float32]

One pass of the scorer over random tokens, on a synthetic bf16 Llama whose layers are large against
its embeddings, each in a process of its own, one thread, resident and offloaded in turn. The first
length is run at every depth, the others at the first depth. Memory is what loading and, apart from
it, the pass have more than a process that has imported all: the peak of private pages (RssAnon),
that of file pages (RssFile), which the kernel can take back, and of their sum; read from /proc
every 5 ms. `hooks` is the CPU time that bringing the weights and dropping them takes in the pass.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from synthetic_llama import Model, write_folder

VOCABULARY = 1024
KINDS = ("RssAnon", "RssFile")


class Peak:
    """Peaks of resident pages in MiB, by kind and of both, sampled by a thread."""

    def __init__(self) -> None:
        self.start = self._read()
        self.values = [0.0, 0.0, 0.0]
        threading.Thread(target=self._watch, daemon=True).start()

    def _read(self) -> list[float]:
        lines = Path("/proc/self/status").read_text().splitlines()
        found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(KINDS)}
        kinds = [int(found[kind]) / 1024 for kind in KINDS]
        return [*kinds, sum(kinds)]

    def take(self) -> list[float]:
        """The peaks since the last call."""
        values, self.values = self.values, [0.0, 0.0, 0.0]
        return values

    def _watch(self) -> None:
        while True:
            now = zip(self.values, self._read(), self.start, strict=True)
            self.values = [max(peak, value - start) for peak, value, start in now]
            time.sleep(0.005)


def time_hooks(scorer: Any) -> list[float]:
    """CPU seconds of the hooks, added up from now on in the only entry."""
    spent = [0.0]

    def timed(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[0] += time.thread_time() - begin

        return call

    for layer in scorer.model.get_decoder().layers:
        hook = getattr(layer, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward = timed(hook.pre_forward)
            hook.post_forward = timed(hook.post_forward)
    return spent


def measure(folder: Path, length: int, dtype: str, place: str | None) -> dict[str, Any]:
    """One pass, in this process."""
    import accelerate.hooks  # noqa: F401  imported before the first look at memory
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401

    from longrope_export.config import SwitchPolicy
    from longrope_export.ladder import make_config
    from longrope_export.models.model import load_model
    from longrope_export.models.offload import Offload
    from longrope_export.search.jobs import Document, Job
    from longrope_export.search.scorer import Scorer

    torch.set_num_threads(1)
    source = load_model(folder)
    target = 2 * source.window
    config = make_config(source, "yarn", target, switch=SwitchPolicy.SEQUENCE)
    ids = np.random.default_rng(0).integers(3, VOCABULARY, length).tolist()
    peak, begin = Peak(), time.process_time()
    offload = None if place is None else Offload(place)
    scorer = Scorer(folder, [Document(tuple(ids))], source.window, dtype, offload=offload)
    at_load = peak.take()
    hooks, loaded = time_hooks(scorer), time.process_time()
    score = scorer.score(Job(config, 0))
    return {
        "load": loaded - begin,
        "pass": time.process_time() - loaded,
        "hooks": hooks[0],
        "peaks": [at_load, peak.take()],
        "losses": score.losses,
    }


def in_a_process(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", default="6,12")
    parser.add_argument("--lengths", default="2048,8192")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--workdir", type=Path, help="for the checkpoints [a temporary folder]")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        folder, length, dtype, place = arguments.measure
        print(json.dumps(measure(Path(folder), int(length), dtype, place or None)))
        return
    depths = [int(part) for part in arguments.layers.split(",")]
    lengths = [int(part) for part in arguments.lengths.split(",")]
    table = Table(
        "layers", "tokens", "", "load, CPU s", "pass, CPU s", "hooks, CPU s",
        "MiB private, file, both: load", "pass", title=f"{arguments.dtype}, hidden {arguments.hidden}",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=arguments.workdir) as workdir:
        for depth in depths:
            folder = Path(workdir) / str(depth)
            write_folder(folder, Model(depth, arguments.hidden, VOCABULARY, shards=2))
            for length in lengths if depth == depths[0] else lengths[:1]:
                given = (str(folder), str(length), arguments.dtype)
                resident, disk = (in_a_process(*given, place) for place in ("", "disk"))
                print(depth, length, resident, disk, file=sys.stderr, flush=True)
                for name, got in (("resident", resident), ("disk", disk)):
                    memory = [", ".join(f"{part:,.0f}" for part in row) for row in got["peaks"]]
                    table.add_row(
                        str(depth), f"{length:,}", name,
                        f"{got['load']:.2f}", f"{got['pass']:.2f}", f"{got['hooks']:.2f}",
                        *memory,
                    )  # fmt: skip
                equal = "equal" if resident["losses"] == disk["losses"] else "NOT EQUAL"
                at_load, in_pass = (
                    f"{ours[2] / whole[2]:.3f}"
                    for ours, whole in zip(disk["peaks"], resident["peaks"], strict=True)
                )
                table.add_row(
                    "", "", f"ratio, losses {equal}", "",
                    f"{disk['pass'] / resident['pass']:.3f}", "", at_load, in_pass, end_section=True,
                )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
