"""The search: quality against forward tokens, and what one evaluation costs.

    python benchmarks/search.py quality [--length 1024] [--workdir DIR]
    python benchmarks/search.py tables [--length 2048] [--workdir DIR]
    python benchmarks/search.py evaluation [--lengths 4096,8192,16384,32768] [--repeats 3]

`quality` runs the paper's evolution and, with a fifth and a twentieth of its forward tokens, the practical
search, on the small trained model (window 256), on the same documents, and compares what they found
on test documents. `tables` is LongRoPE's tables 1, 2 and 11 in small: closed forms and practically searched
factors, with every start-token window. With `--long` both take the small model after six times the
training, which loses more beyond its window. Both can be killed and started again. `evaluation` runs one pass of the scorer and one plain
forward of transformers with all its logits, in processes that take turns, on SmolLM2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from small_model import HELD_OUT_TEXTS, LONG_RECIPE, RECIPE, WINDOW, trained_model

from longrope_export.config import SwitchPolicy
from longrope_export.demo.material import fetch_smollm2
from longrope_export.demo.texts import fetch_texts
from longrope_export.factor_files import read_factors
from longrope_export.ladder import make_config
from longrope_export.models.model import load_model
from longrope_export.search.algorithms import Algorithm
from longrope_export.search.evaluator import Budget, Difference, single_tier
from longrope_export.search.jobs import Document, Workers
from longrope_export.search.judge import losses_of
from longrope_export.search.options import SearchOptions
from longrope_export.search.pool import Setup
from longrope_export.search.run import SearchRun
from longrope_export.search.run_base import Texts
from longrope_export.search.space import with_start
from longrope_export.search.workers import LocalWorkers

SHOWN_START_TOKENS = (0, 2, 4, 8, 16, 32, 64, 128, 256)  # LongRoPE, table 2
PAPER = "the paper's evolution"
SHARES = (20, 5)  # the practical search gets one twentieth and one fifth of the paper's tokens


@contextlib.contextmanager
def opened(model: Path, options: SearchOptions, folder: Path) -> Iterator[SearchRun]:
    """A run on the small model, new or gone on with."""
    files = fetch_texts(print)
    texts = Texts(
        [(name, list(files[name].read_bytes())) for name in HELD_OUT_TEXTS],
        lambda text: list(text.encode()),
    )

    def workers(documents: Sequence[Document]) -> Workers:
        setup = Setup(model, tuple(documents), WINDOW)
        return LocalWorkers(partial(setup.load, "cpu"))

    resume = (folder / "settings.json").is_file()
    run = SearchRun(load_model(model), texts, options, folder, workers, resume=resume)
    try:
        yield run
    finally:
        run.close()


def small_run(model: Path, options: SearchOptions, folder: Path) -> dict[str, Any]:
    """One search on the small model; result.json as it is, if it is there already."""
    if (folder / "result.json").is_file():
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return result
    with opened(model, options, folder) as run:
        return run.execute().result


def quality(small: Path, length: int, workdir: Path) -> None:
    paper = SearchOptions(length, documents=(0, 6, 10), needle_keys=0, switch=SwitchPolicy.SEQUENCE)
    folders = {PAPER: workdir / f"paper-{length}"}
    results = {PAPER: small_run(small, paper, folders[PAPER])}
    tokens = results[PAPER]["spent"]["tokens"]
    for share in SHARES:
        options = replace(
            paper,
            algorithm=Algorithm.PRACTICAL,
            attention="search",
            budget=Budget(tokens=tokens // share),
        )
        name = f"practical, 1/{share} of the tokens"
        folders[name] = workdir / f"practical-{length}-{share}"
        results[name] = small_run(small, options, folders[name])
    model = load_model(small)
    template = single_tier(model.native)
    # one tier for the whole text, so that the rule at a border plays no part
    tiers = [read_factors(folder / "factors.json", model).tiers[-1] for folder in folders.values()]
    with opened(small, paper, folders[PAPER]) as run:
        losses = losses_of(run.judging, [template(tier) for tier in tiers], run.indices("test"))
    table = Table("search", "forward tokens", "ratio", "perplexity, test", "nats against the paper")
    for name, row in zip(folders, losses, strict=True):
        spent = results[name]["spent"]["tokens"]
        against = Difference.of(row, losses[0])
        table.add_row(
            name,
            f"{spent:,}",
            f"{spent / tokens:.3f}",
            f"{math.exp(row.mean()):.4f}",
            f"{against.mean:+.4f} ({against.error:.4f})" if name != PAPER else "",
        )
    Console(width=110).print(table)


def tables(small: Path, length: int, workdir: Path) -> None:
    folder = workdir / f"practical-{length}"
    options = SearchOptions(
        length,
        algorithm=Algorithm.PRACTICAL,
        attention="search",
        documents=(6, 6, 10),
        switch=SwitchPolicy.SEQUENCE,
    )
    small_run(small, options, folder)
    model = load_model(small)
    searched = read_factors(folder / "factors.json", model)
    forms = {
        name: make_config(model, name, length) for name in ("pi", "ntk", "dynamic-ntk", "yarn")
    }
    configs = {**forms, "searched": searched}
    with opened(small, options, folder) as run:
        test = run.indices("test")
        table = Table("perplexity, start tokens:", *map(str, SHOWN_START_TOKENS))
        plain = {}
        for name, config in configs.items():
            tiers = [with_start(config.tiers[-1], n) for n in SHOWN_START_TOKENS]
            losses = losses_of(run.judging, [single_tier(config)(t) for t in tiers], test)
            table.add_row(name, *(f"{math.exp(row.mean()):.3f}" for row in losses))
            best = int(losses.mean(axis=1).argmin())
            worth = Difference.of(losses[best], losses[0])
            plain[name] = losses[0]
            print(
                f"{name}: best with {SHOWN_START_TOKENS[best]} start tokens, "
                f"{worth.mean:+.5f} nats against none (standard error {worth.error:.5f})"
            )
        best_form = min(forms, key=lambda name: plain[name].mean())
        gain = Difference.of(plain["searched"], plain[best_form])
        print(
            f"searched against {best_form}, no start tokens: {math.expm1(gain.mean):+.1%} perplexity, "
            f"{gain.mean:+.4f} nats (standard error {gain.error:.4f})"
        )
    Console(width=110).print(table)


ONE_PASS = """
import json, resource, sys, time
import torch
from longrope_export.ladder import make_config
from longrope_export.models.model import load_model
from longrope_export.models.torch_model import load_torch_model
from longrope_export.search.jobs import Document, Job
from longrope_export.search.scorer import Scorer
from longrope_export.hf_runtime import apply_longrope
from pathlib import Path
who, path, length = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
model, _ = load_torch_model(path)
config = make_config(load_model(path), "yarn", max(length, 16384))
ids = torch.randint(3, 40000, (length,), generator=torch.Generator().manual_seed(0))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if who == "ours":
    scorer = Scorer.of_model(model, [Document(tuple(ids.tolist()))], 8192)
    begin = time.process_time()
    loss = scorer.score(Job(config, 0)).mean
else:
    apply_longrope(model, config)
    begin = time.process_time()
    with torch.inference_mode():
        loss = float(model(ids[None], labels=ids[None], use_cache=False).loss)
seconds = time.process_time() - begin
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "loss": loss, "peak": after * 1024, "loaded": before * 1024}))
"""


def evaluation(lengths: Sequence[int], repeats: int) -> None:
    table = Table(
        "tokens", "processor time, ours / plain", "peak memory, ours", "plain", "beside the model"
    )
    model = fetch_smollm2()
    for length in lengths:
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}
        for _ in range(repeats):
            for who in runs:
                command = [sys.executable, "-c", ONE_PASS, who, model, str(length)]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                runs[who].append(json.loads(output.splitlines()[-1]))
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(*runs.values(), strict=True)]
        losses = [run["loss"] for both in runs.values() for run in both]
        assert max(losses) - min(losses) < 1e-4, f"they do not compute the same: {losses}"
        peak = {who: max(run["peak"] for run in both) / 2**20 for who, both in runs.items()}
        loaded = runs["ours"][0]["loaded"] / 2**20
        table.add_row(
            f"{length:,}",
            f"{statistics.median(ratios):.2f}",
            f"{peak['ours']:,.0f} MiB",
            f"{peak['plain']:,.0f} MiB",
            f"{peak['ours'] - loaded:,.0f} / {peak['plain'] - loaded:,.0f} MiB",
        )
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["quality", "tables", "evaluation"])
    parser.add_argument("--length", type=int, help="quality: 1024, tables: 2048")
    parser.add_argument("--long", action="store_true", help="the small model, trained longer")
    parser.add_argument("--workdir", type=Path, default=Path("bench/search"))
    parser.add_argument("--lengths", default="4096,8192,16384,32768")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.what == "evaluation":
        evaluation([int(n) for n in arguments.lengths.split(",")], arguments.repeats)
        return
    small = trained_model(print, LONG_RECIPE if arguments.long else RECIPE)
    workdir: Path = arguments.workdir / small.name
    workdir.mkdir(parents=True, exist_ok=True)
    if arguments.what == "quality":
        quality(small, arguments.length or 1024, workdir)
    else:
        tables(small, arguments.length or 2048, workdir)


if __name__ == "__main__":
    main()
