"""`longrope-export finetune`: train a model under its new factors."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import click

from longrope_export.cli.common import (
    CONTEXT_SETTINGS,
    SEED,
    factor_options,
    given_factors,
    is_quiet,
    json_option,
    model_options,
    print_json,
    say,
)
from longrope_export.cli.finetune_parts import (
    Folders,
    check_memory_for,
    check_vocabulary,
    make_rows,
    noted,
    read_validation,
    refuse_ignored,
)
from longrope_export.cli.finetune_progress import say_result, show_progress, silence, write_plot
from longrope_export.finetune.recipes import Layout, Rule, Schedule, load_recipe

MAX_KEYS = 64  # of search.needles, which imports numpy


@click.command(context_settings=CONTEXT_SETTINGS)
@model_options
@factor_options
@click.option("--recipe", default="pose-lora", show_default=True, metavar="NAME|FILE.toml",
              help="How it is trained; docs/finetune.md lists the shipped ones.")  # fmt: skip
@click.option("--text", "texts", multiple=True, required=True, metavar="FILE|DIR|dataset:NAME",
              help="What is learned: .txt, .jsonl, .parquet, texts or chats; repeat it.")  # fmt: skip
@click.option("--validation-text", "validation_texts", multiple=True,
              metavar="FILE|DIR|dataset:NAME", help="What is only measured, before and after.")  # fmt: skip
@click.option("--validation-documents", type=click.IntRange(min=0), default=2, show_default=True,
              help="Windows of it, each passed four times.")  # fmt: skip
@click.option(
    "--validation-length", type=click.IntRange(min=2), help="Tokens of such a window [the target]."
)
@click.option("--needle-keys", type=click.IntRange(0, MAX_KEYS), default=5, show_default=True,
              help="Keys hidden in as many documents more; 0: none.")  # fmt: skip
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the run."
)
@click.option("--resume", is_flag=True, help="Go on with the run in that folder.")
@click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps [the recipe's].")
@click.option("--epochs", type=float, help="Or passes over the text.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Rows of one step.")
@click.option("--learning-rate", type=float, help="Its peak.")
@click.option("--warmup-steps", type=int, help="Steps in which it rises.")
@click.option("--schedule", type=click.Choice([*map(str, Schedule)]),
              help="How it falls.")  # fmt: skip
@click.option("--weight-decay", type=float, help="Of AdamW.")
@click.option("--window", type=int, help="Positions that a row spans, in tokens [the target].")
@click.option("--tokens", type=int, help="Of a row, for the layout pose.")
@click.option("--chunks", type=int, help="Pieces of such a row.")
@click.option("--true-places/--any-places", default=None,
              help="Whether the pieces are taken from where they stand in works of a window.")  # fmt: skip
@click.option("--layout", type=click.Choice([*map(str, Layout)]), help="Of the rows.")
@click.option("--short-share", type=float, help="Rows of short documents, for the layout mixed.")
@click.option("--retrieval-share", type=float,
              help="Rows that hide numbers and ask for them, for the layouts pose and long.")  # fmt: skip
@click.option("--retrieval-keys", type=int, help="Numbers of such a row.")
@click.option("--rule", type=click.Choice([*map(str, Rule)]),
              help="Whose factors a token is trained under.")  # fmt: skip
@click.option("--lora", "lora_rank", type=int, metavar="RANK", help="Adapters; 0: all weights.")
@click.option("--gradient-checkpointing/--no-gradient-checkpointing", default=None,
              help="Less memory for a third more work.")  # fmt: skip
@click.option("--switch", type=click.Choice(["causal", "sequence"]),
              help="Rule that is written [the better one, measured].")  # fmt: skip
@click.option("--rows-per-pass", type=click.IntRange(min=1), default=1, show_default=True,
              help="Rows that a device computes at once.")  # fmt: skip
@click.option("--sequence-parallel", type=click.IntRange(min=1), default=1, show_default=True, metavar="RANKS",
              help="Processes of torchrun that share each row.")  # fmt: skip
@click.option("--backend", type=click.Choice(["gather", "context"]), default="gather",
              show_default=True, help="Of their attention: ours, or torch's ring (CUDA).")  # fmt: skip
@click.option(
    "--save-steps",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Between checkpoints.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of everything random.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32",
              show_default=True, help="Of the products of matrices.")  # fmt: skip
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[the GPU if there is one].")
@click.option("--no-memory-check", is_flag=True, help="Train though the memory seems too small.")
@json_option
def command(
    model: str, revision: str | None, local_files_only: bool, factors: Path | None,
    tiers: tuple[str, ...], recipe: str, texts: tuple[str, ...],
    validation_texts: tuple[str, ...], validation_documents: int, validation_length: int | None,
    needle_keys: int, output: Path, resume: bool, switch: str | None, rows_per_pass: int,
    sequence_parallel: int, backend: str, save_steps: int, seed: int, dtype: str, device: str | None, no_memory_check: bool, as_json: bool, **changed: Any,
) -> None:  # fmt: skip
    """Train a model under its new factors.

    The folder gets model/, a Hugging Face folder that holds the tuned weights and the factors,
    factors.json, result.json, metrics.jsonl and loss.png. With --validation-text both rules at a
    tier border are measured before and after on text that is not trained on, and the better rule
    is written. A run that was killed goes on with --resume to the same losses.

    \b
    longrope-export finetune model/ --factors f.json --text books/ -o tuned/
    longrope-export finetune model/ --factors f.json --recipe longrope-llama2-128k \\
        --text books/ --validation-text held-out/ -o tuned/
    torchrun --nproc-per-node 8 -m longrope_export finetune model/ --factors f.json \\
        --recipe longrope-llama2-128k --text books/ -o tuned/ --dtype bfloat16
    longrope-export gguf tuned/model --factors tuned/factors.json -o model.gguf
    """
    from longrope_export.config import SwitchPolicy
    from longrope_export.errors import ConfigError
    from longrope_export.finetune.distributed import (
        ALONE,
        is_launched,
        process_group,
    )
    from longrope_export.finetune.estimate import geometry_of
    from longrope_export.finetune.metrics import read_metrics
    from longrope_export.finetune.run import FinetuneOptions, check_recipe, finetune
    from longrope_export.finetune.samples import hash_of, make_samples
    from longrope_export.finetune.training import Machine, passes_per_step
    from longrope_export.models.hf_config import refuse_quantized
    from longrope_export.models.model import find_model, load_model
    from longrope_export.models.torch_model import default_device, load_torch_tokenizer
    from longrope_export.texts import read_works

    source = load_model(find_model(model, revision=revision, local_files_only=local_files_only))
    refuse_quantized(source.path)
    config = given_factors(factors, tiers, source)
    if config is None:
        raise ConfigError("finetune needs --factors or --tier: factors to train under")
    chosen = load_recipe(recipe).with_values(changed)
    refuse_ignored(chosen, sequence_parallel, validation_texts, validation_documents)
    check_recipe(chosen, config)
    if sequence_parallel > 1 and chosen.rule is not Rule.FROZEN:
        raise ConfigError(
            f"--sequence-parallel: a process sees only a part of the positions, so rule "
            f"{chosen.rule} cannot be followed: use --rule frozen"
        )
    given = [*texts, *validation_texts]
    works, geometry = read_works(texts), geometry_of(source)
    machine = Machine(
        device or default_device(), dtype, rows_per_pass, save_steps, sequence_parallel, backend
    )
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(process_group(device)) if is_launched() else ALONE
        passes_per_step(chosen.batch_size, rows_per_pass, place.world, sequence_parallel)
        if not no_memory_check:
            at_once = rows_per_pass * place.world / sequence_parallel
            target = config.max_position_embeddings
            check_memory_for(chosen, geometry, target, at_once, dtype, device)
        tell = say if place.is_first else silence
        tell(f"reading {', '.join(given)}")
        tokenizer = load_torch_tokenizer(source.path)
        learned: set[str] = set()  # texts by their hash: works come one at a time, and may be many
        samples = make_samples(noted(works, learned), tokenizer)
        check_vocabulary(source, geometry, samples)
        rows = make_rows(samples, tokenizer, chosen, config, seed)
        rule = None if switch is None else SwitchPolicy(switch)
        options = FinetuneOptions(chosen, rule, seed, hash_of(samples))
        validation = None
        if validation_texts and validation_documents:
            length = validation_length or config.max_position_embeddings
            validation = read_validation(
                source, validation_texts, learned, length, validation_documents, needle_keys, seed, tell
            )  # fmt: skip
        observe = stack.enter_context(show_progress()) if place.is_first else silence
        result = finetune(
            source.path, config, rows, options, output, machine, Folders(source),
            validation=validation, resume=resume, observe=observe,
        )  # fmt: skip
    if not place.is_first:
        return
    write_plot(read_metrics(output), output)
    if as_json:
        print_json(result)
    if not is_quiet():
        say_result(result, output)
