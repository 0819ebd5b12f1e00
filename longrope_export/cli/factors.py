"""`longrope-export factors`: closed forms and conversions into the one JSON shape."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longrope_export.cli.common import (
    CONTEXT_SETTINGS,
    OUTPUT_PATH,
    factor_options,
    force_option,
    given_factors,
    input_files,
    model_options,
    say,
)

if TYPE_CHECKING:
    from longrope_export.config import LongRopeConfig
    from longrope_export.models.model import Model

METHOD_NAMES = ("pi", "ntk", "dynamic-ntk", "yarn", "llama3", "abf", "entropy-abf", "longrope2")


@click.command(context_settings=CONTEXT_SETTINGS)
@click.argument("method", metavar="METHOD", type=click.Choice([*METHOD_NAMES, "file"]))
@model_options
@click.option("--target-length", type=int, help="New maximum length in tokens.")
@click.option("--ladder", help="Tier lengths: 8192,16384,32768, or every:2048, or x1.25.")
@click.option(
    "--switch", type=click.Choice(["causal", "sequence"]), help="Rule at a tier border [causal]."
)
@click.option("--num-start-tokens", type=int, help="Leading positions left unscaled [0].")
@click.option("--attention-factor", "attention", help="none, yarn, longrope or a number.")
@click.option("--attention-strength", type=float, help="Scales its logarithm [1].")
@click.option("--ramp", type=click.Choice(["code", "code-exact", "paper"]), help="yarn [code].")
@click.option("--beta-fast", type=float, help="yarn: turns above which a pair is kept [32].")
@click.option("--beta-slow", type=float, help="yarn: turns below which it is divided [1].")
@click.option("--low-freq-factor", type=float, help="llama3 [1].")
@click.option("--high-freq-factor", type=float, help="llama3 [4].")
@click.option("--base", type=float, help="abf, entropy-abf: the new rope base.")
@click.option("--dynamic-factor", type=float, help="dynamic-ntk: the config's factor.")
@click.option("--critical", type=int, help="longrope2: index of the critical pair.")
@click.option("--scale", type=float, help="longrope2: 1 to 2, times the ratio.")
@factor_options
@click.option("-o", "--output", type=OUTPUT_PATH, help="JSON file; stdout without it.")
@force_option
def command(
    method: str,
    model: str,
    revision: str | None,
    local_files_only: bool,
    target_length: int | None,
    ladder: str | None,
    switch: str | None,
    factors: Path | None,
    tiers: tuple[str, ...],
    output: Path | None,
    force: bool,
    **options: Any,
) -> None:
    """Make factors by a closed form, or read them from another file.

    METHOD is pi, ntk, dynamic-ntk, yarn, llama3, abf, entropy-abf, longrope2, or `file` to read
    factors from another shape (a config.json, a GGUF, CSV files of microsoft/LongRoPE).

    \b
    longrope-export factors yarn model/ --target-length 32768 -o f.json
    longrope-export factors yarn model/ --target-length 32768 --ladder every:2048 \\
        --attention-strength 0.6 -o f.json
    longrope-export factors file model/ --factors phi3/config.json -o f.json
    longrope-export factors file model/ --tier 4096=4k.csv --tier 131072=128k.csv -o f.json
    """
    from longrope_export.config import SwitchPolicy
    from longrope_export.errors import ConfigError
    from longrope_export.factor_files import dump_factors, write_factors
    from longrope_export.ladder import MethodOptions, make_config
    from longrope_export.models.model import find_model, load_model
    from longrope_export.outputs import check_output

    path = find_model(model, revision=revision, local_files_only=local_files_only, weights=False)
    source = load_model(path)
    if output is not None:
        check_output(output, input_files(source.path, factors, tiers), force=force)
    given = {name: value for name, value in options.items() if value is not None}
    if method == "file":
        config = _from_file(source, factors, tiers, switch, target_length, ladder, given)
    else:
        if factors or tiers:
            raise ConfigError(f"--factors and --tier belong to method `file`, not to {method}")
        if target_length is None:
            raise ConfigError(f"method {method} needs --target-length, in tokens")
        config = make_config(
            source,
            method,
            target_length,
            ladder=ladder,
            switch=SwitchPolicy(switch or "causal"),
            num_start_tokens=given.pop("num_start_tokens", None),
            options=MethodOptions(**given),
        )
    if output is None:
        click.echo(dump_factors(config), nl=False)
        return
    write_factors(config, output)
    say(
        f"{output}: {method}, {len(config.tiers)} tier{'s' if len(config.tiers) > 1 else ''} "
        f"up to {config.max_position_embeddings} tokens "
        f"({config.extension_ratio:g} times the window), switch {config.switch}"
    )


def _from_file(
    model: Model,
    factors: Path | None,
    tiers: tuple[str, ...],
    switch: str | None,
    target_length: int | None,
    ladder: str | None,
    given: dict[str, Any],
) -> LongRopeConfig:
    """Method `file`: what the file says stands, so an option that would change it is refused."""
    from longrope_export.errors import ConfigError

    attention = given.pop("attention", None)
    unused = [f"--{name.replace('_', '-')}" for name in given]
    unused += ["--target-length"] * (target_length is not None) + ["--ladder"] * (
        ladder is not None
    )
    if attention is not None and not tiers:
        unused.append("--attention-factor")
    if unused:
        raise ConfigError(f"{', '.join(unused)}: ignored by method `file`; leave it out")
    config = given_factors(factors, tiers, model, switch, attention or "longrope")
    if config is None:
        raise ConfigError("method `file` needs --factors FILE, or --tier LENGTH=FILE.csv")
    return config
