"""Whole plans on the small trained model (window 256, base 10000), to 32 times its window.

    python benchmarks/small_plan.py plans [--workdir DIR] [--only 'whole;yarn']
    python benchmarks/small_plan.py caps [--workdir DIR]
    python benchmarks/small_plan.py entropy-abf [--workdir DIR] [--seeds 3]

`plans` runs LongRoPE's procedure, search, fine-tune at 1024, search, fine-tune at 2048, search at 8192
without more training, recover 256 and 512, and the same with closed forms in place of the searches, or
with a part left out: the paper's tables 9, 10 and 12 in small. Each is a plan of `longrope-export
extend`, and goes on where it was stopped. `caps` recovers the short windows of its whole plan anew,
with other limits to their factors (`search --recover-cap`). `entropy-abf` tunes with a few samples under Entropy-ABF, ABF,
PI and others. What is printed was measured on a novel that took no part.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.small_model import TEST_TEXT, TRAIN_TEXTS, WINDOW, trained_model
from longrope_export.config import LongRopeConfig, SwitchPolicy
from longrope_export.demo.texts import fetch_texts
from longrope_export.factor_files import read_factors, write_factors
from longrope_export.ladder import make_config
from longrope_export.models.model import load_model
from longrope_export.outputs import write_text
from longrope_export.search.evaluator import Difference, single_tier
from longrope_export.search.jobs import Document, Job
from longrope_export.search.scorer import Scorer

SEARCH_TEXTS = ("voyage-out", "dubliners")
TARGET = 32 * WINDOW
TEST_WINDOWS = {256: 48, 512: 24, 1024: 12, 2048: 6, TARGET: 6}  # windows of each length


@dataclass(frozen=True)
class Sizes:
    """How much of everything a plan does.

    Attributes:
        steps: of each fine-tune, rows of 1024 tokens in fours, of 2048 in twos.
        evaluations: members of the smooth family that a search tries; half as many at 8192.
        gradient_steps: behind them; none at 8192.
        documents, far_documents, short_documents: of each search for search, validation and test;
            at 8192; at 256 and 512.
        far_passes: whole windows of 8192 that the search may compute before it chooses.
        against: closed forms that each search compares with.
    """

    steps: int = 60
    evaluations: int = 24
    gradient_steps: int = 8
    documents: str = "4,3,2"
    far_documents: str = "2,2,1"
    short_documents: str = "12,12,4"
    far_passes: int = 30
    against: str = "pi,ntk,dynamic-ntk,yarn"


def toml(values: dict[str, Any]) -> str:
    """A [[stage]] of a plan."""
    lines = [f"{key} = {str(v).lower() if isinstance(v, bool) else repr(v)}" for key, v in values.items()]  # fmt: skip
    return "\n".join(["[[stage]]", *lines, ""]).replace("'", '"')


def search(length: int, sizes: Sizes, **more: Any) -> dict[str, Any]:
    """A stage that searches."""
    is_last = length == TARGET
    return {
        "name": f"search-{length}",
        "run": "search",
        "text": "search",
        "target-length": length,
        "algorithm": "practical",
        "documents": sizes.far_documents if is_last else sizes.documents,
        "against": sizes.against,
        "family-evaluations": sizes.evaluations // (2 if is_last else 1),
        "gradient-steps": 0 if is_last else sizes.gradient_steps,
        "budget-tokens": (sizes.far_passes if is_last else 6 * sizes.evaluations) * length,
        "needle-keys": 0,
        **more,
    }


def closed(method: str, length: int, model: str = "source") -> dict[str, Any]:
    """A stage in its place: factors for the model as it was trained at first, or for another."""
    return {"name": f"{method}-{length}", "run": "factors", "method": method, "target-length": length, "model": model}  # fmt: skip


def finetune(length: int, steps: int, **more: Any) -> dict[str, Any]:
    """A stage that trains on 4096 tokens a step."""
    rows = max(1, 4096 // length)
    return {
        "name": f"finetune-{length}",
        "run": "finetune",
        "recipe": "small",
        "text": "train",
        "steps": steps,
        "batch-size": rows,
        "rows-per-pass": rows,
        "validation-text": "search",
        "needle-keys": 0,
        **more,
    }


def recovery(sizes: Sizes) -> list[dict[str, Any]]:
    """Bakes the long factors in and searches short ones."""
    return [
        {"name": "long", "run": "safetensors", "remote-code": True, "link": True},
        {
            "name": "recover",
            "run": "recover",
            "model": "long",
            "text": "search",
            "recover": "256,512",
            "algorithm": "practical",
            "documents": sizes.short_documents,
            "budget-tokens": 48 * sizes.evaluations * 512,
            "gradient-steps": sizes.gradient_steps,
        },
    ]


def exports() -> list[dict[str, Any]]:
    """All three formats, compared, and a page about it."""
    return [
        {"name": "extended", "run": "safetensors", "remote-code": True, "link": True},
        {"name": "extended-gguf", "run": "gguf", "outtype": "f32", "pre": "gpt-2"},
        {"name": "extended-onnx", "run": "onnx"},
        {"name": "verify", "run": "verify", "length": 600, "build": True},
        {"name": "report", "run": "report"},
    ]


def whole(sizes: Sizes) -> list[dict[str, Any]]:
    """LongRoPE's procedure."""
    return [
        search(1024, sizes),
        finetune(1024, sizes.steps),
        search(2048, sizes),
        finetune(2048, sizes.steps),
        search(TARGET, sizes),
        *recovery(sizes),
        *exports(),
    ]


def variants(sizes: Sizes) -> dict[str, list[dict[str, Any]]]:
    """Stages of every plan, by its name."""
    found = {"whole": whole(sizes)}
    for method in ("yarn", "ntk", "pi"):
        found[method] = [
            closed(method, 1024),
            finetune(1024, sizes.steps),
            closed(method, 2048),
            finetune(2048, sizes.steps),
            closed(method, TARGET),
        ]
    found["no training"] = [search(TARGET, sizes)]
    found["one fine-tune, at 2048"] = [
        search(2048, sizes),
        finetune(2048, 2 * sizes.steps),
        search(TARGET, sizes),
    ]
    found["one fine-tune, at 1024"] = [
        search(1024, sizes),
        finetune(1024, 2 * sizes.steps),
        search(TARGET, sizes),
    ]
    for rule in ("causal", "sequence"):
        found[f"trained under {rule}"] = [
            search(1024, sizes),
            finetune(1024, sizes.steps, rule=rule),
            search(2048, sizes),
            finetune(2048, sizes.steps, rule=rule),
            search(TARGET, sizes),
        ]
    return found


def write_plan(stages: Sequence[dict[str, Any]], path: Path) -> Path:
    """A plan's file, with the paths of the texts."""
    files = fetch_texts(print)
    lists = {"search": SEARCH_TEXTS, "train": TRAIN_TEXTS}
    texts = [f"{name} = {[str(files[work]) for work in works]}" for name, works in lists.items()]
    text = "\n".join(["[texts]", *texts, "", *map(toml, stages)]).replace("'", '"')
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def run_plan(stages: Sequence[dict[str, Any]], folder: Path) -> None:
    """Through the command line, in the folder beside its plan; goes on where it was stopped."""
    plan = write_plan(stages, folder.with_suffix(".toml"))
    arguments = ["extend", str(trained_model(print)), str(plan), "-o", str(folder)]
    command = [sys.executable, "-m", "longrope_export", *arguments]
    subprocess.run(command, check=True)


def test_documents(length: int) -> list[Document]:
    """Windows spread over the novel that takes part in nothing."""
    data, count = fetch_texts()[TEST_TEXT].read_bytes(), TEST_WINDOWS[length]
    step = (len(data) - length) // count
    return [Document(tuple(data[k * step : k * step + length])) for k in range(count)]


def losses(model: Path, config: LongRopeConfig, length: int) -> np.ndarray:
    """(windows,) mean loss in nats per token, each window as a text of its own under the config."""
    documents = test_documents(length)
    scorer = Scorer(model, documents, WINDOW)
    return np.array([scorer.score(Job(config, k)).mean for k in range(len(documents))])


def tuned_model(folder: Path) -> Path:
    """The last fine-tuned model of a run, else the one that it began with."""
    found = sorted(folder.glob("*/finetune-*/model"))
    return found[-1] if found else trained_model()


def last_factors(folder: Path) -> LongRopeConfig:
    """What a run would export: the factors of its last stage that made some."""
    found = sorted([*folder.glob("*/*/factors.json"), *folder.glob("*-[a-z]*-*/*.json")])
    return read_factors([path for path in found if path.name not in ("result.json", "settings.json")][-1])  # fmt: skip


def at(config: LongRopeConfig, length: int) -> LongRopeConfig:
    """The one tier that serves a text of a length under the rule `sequence`."""
    tier = config.select_tier(min(length, config.max_position_embeddings))
    return single_tier(config)(replace(tier, max_length=max(tier.max_length, length)))


def plans(workdir: Path, only: Sequence[str]) -> None:
    """Run, and print perplexities on the test novel."""
    sizes, source = Sizes(), trained_model(print)
    native = load_model(source).native
    own = losses(source, at(native, WINDOW), WINDOW)
    table = Table("plan", "256", "512", "2048", "8192", "8192 against whole, nats", title=TEST_TEXT)
    table.add_row("the model as it was", f"{math.exp(own.mean()):.3f}", "", "", "", "")
    whole_losses: np.ndarray | None = None
    for name, stages in variants(sizes).items():
        folder = workdir / name.replace(" ", "-").replace(",", "")
        if only and name not in only:
            continue
        run_plan(stages, folder)
        config, model = last_factors(folder), tuned_model(folder)
        by_length = {n: losses(model, at(config, n), n) for n in (256, 512, 2048, TARGET)}
        if name == "whole":
            whole_losses = by_length[TARGET]
            rows = table_9(folder, model)
        against = ""
        if whole_losses is not None and name != "whole":
            difference = Difference.of(by_length[TARGET], whole_losses)
            against = f"{difference.mean:+.4f} ({difference.error:.4f})"
        table.add_row(name, *(f"{math.exp(v.mean()):.3f}" for v in by_length.values()), against)
        if name == "whole":
            for label, found in rows.items():
                difference = Difference.of(found[TARGET], by_length[TARGET])
                cells = (
                    f"{math.exp(found[n].mean()):.3f}" if n in found else "" for n in by_length
                )
                table.add_row(label, *cells, f"{difference.mean:+.4f} ({difference.error:.4f})")
    Console(width=120).print(table)


def table_9(folder: Path, model: Path) -> dict[str, dict[int, np.ndarray]]:
    """The second interpolation by closed forms, and the short window without its recovery."""
    rows = {}
    tuned = load_model(model)
    for method in ("pi", "ntk", "yarn"):
        config = make_config(tuned, method, TARGET)
        only = single_tier(config)(config.tiers[-1])
        rows[f"whole, but {method} from 2048 to 8192"] = {TARGET: losses(model, only, TARGET)}
    long = read_factors(next(folder.glob(f"*-search-{TARGET}/*/factors.json"))).tiers[-1]
    only = single_tier(tuned.native)(long)
    lengths = (256, 512, TARGET)
    rows["whole, without recovery"] = {n: losses(model, only, n) for n in lengths}
    plain = single_tier(tuned.native)(load_model(trained_model()).native.tiers[0])
    rows["whole, plain RoPE for short texts"] = {
        256: losses(model, plain, 256), TARGET: rows["whole, without recovery"][TARGET]
    }  # fmt: skip
    return rows


def caps(workdir: Path, values: Sequence[float]) -> None:
    """Recover the short windows of the whole plan under each limit of their factors; the first is compared with."""
    sizes, whole_run = Sizes(), workdir / "whole"
    run_plan(whole(sizes), whole_run)
    (long,) = whole_run.glob("*-long/long")
    tuned, files = load_model(long), fetch_texts()
    stage = recovery(sizes)[-1]
    options = [f"--{name}" for name in ("algorithm", "documents", "budget-tokens", "gradient-steps", "recover")]  # fmt: skip
    against = f"against {values[0]:g}, nats"
    table = Table("--recover-cap", "256", against, "512", against, title=TEST_TEXT)
    base: dict[int, np.ndarray] = {}
    for cap in values:
        folder = workdir / f"cap-{cap:g}"
        if not (folder / "result.json").is_file():
            arguments = ["search", str(long), "--target-length", str(tuned.window)]
            arguments += [part for name in options for part in (name, str(stage[name[2:]]))]
            arguments += [part for work in SEARCH_TEXTS for part in ("--text", str(files[work]))]
            arguments += ["--recover-cap", str(cap), "-o", str(folder)]
            more = ["--resume"] if folder.exists() else []
            subprocess.run([sys.executable, "-m", "longrope_export", *arguments, *more], check=True)  # fmt: skip
        config = read_factors(folder / "factors.json", tuned)
        cells = [f"{cap:g}"]
        for length in (256, 512):
            found = losses(long, at(config, length), length)
            difference = Difference.of(found, base.setdefault(length, found))
            cells += [f"{math.exp(found.mean()):.3f}", f"{difference.mean:+.4f} ({difference.error:.4f})"]  # fmt: skip
        table.add_row(*cells)
    Console(width=120).print(table)


def entropy_abf(workdir: Path, seeds: int) -> None:
    """Few samples, the same ones and the same steps for every method."""
    source = load_model(trained_model(print))
    files = fetch_texts()
    train = [argument for name in TRAIN_TEXTS for argument in ("--text", str(files[name]))]
    table = Table("tuned on 48 samples of 1024", "1024 before", "1024", "2048", "1024 against entropy-abf, nats")  # fmt: skip
    base: np.ndarray | None = None
    for method in ("entropy-abf", "abf", "pi", "ntk", "yarn"):
        config = make_config(source, method, 4 * WINDOW)
        if method == "abf":  # with the same new base
            entropy = make_config(source, "entropy-abf", 4 * WINDOW)
            config = replace(entropy, logit_scaling=None)
        config = replace(config, switch=SwitchPolicy.SEQUENCE)
        short, far = [], []
        factors = workdir / f"{method}.json"
        workdir.mkdir(parents=True, exist_ok=True)
        write_factors(config, factors)
        for seed in range(seeds):
            folder = workdir / f"{method}-{seed}"
            if not (folder / "result.json").is_file():
                arguments = [
                    "finetune", str(source.path), "--factors", str(factors), "--recipe", "small",
                    "--layout", "long", "--steps", "6", "--batch-size", "8", "--rows-per-pass", "4",
                    "--warmup-steps", "0", "--learning-rate", "5e-4", "--weight-decay", "0.1",
                    "--seed", str(seed), *train, "-o", str(folder),
                ]  # fmt: skip
                more = ["--resume"] if folder.exists() else []
                subprocess.run([sys.executable, "-m", "longrope_export", *arguments, *more], check=True)  # fmt: skip
            short.append(losses(folder / "model", at(config, 1024), 1024))
            far.append(losses(folder / "model", at(config, 2048), 2048))
        mean, beyond = np.mean(short, axis=0), np.mean(far, axis=0)
        base = mean if base is None else base
        difference = Difference.of(mean, base)
        before = losses(source.path, at(config, 1024), 1024)
        against = (
            "" if method == "entropy-abf" else f"{difference.mean:+.4f} ({difference.error:.4f})"
        )
        table.add_row(
            method, *(f"{math.exp(v.mean()):.3f}" for v in (before, mean, beyond)), against
        )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["plans", "caps", "entropy-abf"])
    parser.add_argument("--workdir", type=Path, default=Path("bench") / "small-plan")
    parser.add_argument("--only", default="", help="names of plans, with ; between them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--caps", default="1,0.25,0.5,2")
    arguments = parser.parse_args()
    if arguments.what == "plans":
        plans(arguments.workdir / "plans", [n for n in arguments.only.split(";") if n])
    elif arguments.what == "caps":
        caps(arguments.workdir / "plans", [float(cap) for cap in arguments.caps.split(",")])
    else:
        entropy_abf(arguments.workdir / "entropy-abf", arguments.seeds)


if __name__ == "__main__":
    main()
