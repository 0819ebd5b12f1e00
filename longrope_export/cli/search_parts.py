"""What `search` is made of on the command line: checks, options, texts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrope_export.cli.common import refuse_unused, was_given

if TYPE_CHECKING:
    from longrope_export.models.model import Model
    from longrope_export.models.offload import Offload
    from longrope_export.search.options import SearchOptions
    from longrope_export.search.run_base import Texts

# what each kind of search, and some options, would ignore, by parameter name
_IGNORED = {
    "--ladder": (
        "algorithm", "attention", "no_start_tokens", "population", "iterations", "gradient_steps",
        "warm_start",
    ),
    "--recover": (
        "against", "attention", "no_start_tokens", "needle_keys", "family_evaluations", "warm_start",
    ),
    "--algorithm longrope": ("family_evaluations", "gradient_steps"),
    "--algorithm longrope2": (
        "no_start_tokens", "family_evaluations", "gradient_steps", "warm_start",
    ),
    "--algorithm practical": ("population", "iterations"),
    "--no-refine": ("tier_tokens",),
    "--switch": ("needle_keys",),
}  # fmt: skip
_NEED = ((("no_refine", "tier_tokens"), "ladder"), (("recover_cap",), "recover"))


def refuse_ignored(given: dict[str, Any]) -> None:
    """Refuse options that the kind of search that was asked for would not look at.

    Raises:
        ConfigError: naming both.
    """
    from longrope_export.errors import ConfigError

    kinds = [f"--{name}" for name in ("ladder", "recover") if given[name]]
    if len(kinds) == 2:
        raise ConfigError("--ladder and --recover are two searches: give one")
    kind = kinds[0] if kinds else f"--algorithm {given['algorithm']}"
    used = [kind]
    if given["recover"]:
        used.append(f"--algorithm {given['algorithm']}")
    if given["no_refine"]:
        used.append("--no-refine")
    if given["switch"]:
        used.append("--switch")
    for what in used:
        for name in _IGNORED[what]:
            if was_given(name):
                option = {"attention": "attention-factor"}.get(name, name.replace("_", "-"))
                raise ConfigError(f"{what} does not use --{option}: it would be ignored")
    refuse_unused((names, f"--{needed}", bool(given[needed])) for names, needed in _NEED)


def refuse_unshared(
    given: dict[str, Any],
    ranks: int,
    devices: Sequence[str],
    ray_address: str | None,
    offload: str | None,
) -> None:
    """Refuse devices that cannot share passes, and searches whose passes cannot be shared.

    Raises:
        LongRopeError: saying what is expected, or what the search would need.
    """
    from longrope_export.errors import ConfigError
    from longrope_export.search.workers import check_sharing

    check_sharing(ranks, devices, ray_address)
    if ranks == 1:
        return
    if offload is not None:
        raise ConfigError(
            f"--sequence-parallel {ranks} and --offload were never run together: give one of them"
        )
    if given["ladder"]:
        raise ConfigError(
            f"--sequence-parallel {ranks} shares whole passes, and --ladder computes blocks behind "
            f"cached prefixes: leave one of them out"
        )
    if given["switch"] != "sequence" and not given["recover"]:
        raise ConfigError(
            f"--sequence-parallel {ranks} computes a pass under one tier; under the rule causal, "
            f"which would be measured, it has several: give --switch sequence"
        )


def make_options(given: dict[str, Any], warm: Any) -> SearchOptions:
    """The options of the command as a SearchOptions.

    Raises:
        ConfigError: options that contradict each other.
    """
    from dataclasses import replace

    from longrope_export.config import SwitchPolicy
    from longrope_export.errors import ConfigError
    from longrope_export.search.algorithms import Algorithm
    from longrope_export.search.evaluator import Budget
    from longrope_export.search.evolution import EvolutionSettings
    from longrope_export.search.options import SearchOptions
    from longrope_export.search.practical import PracticalSettings

    algorithm, target = Algorithm(given["algorithm"]), given["target_length"]
    attention = given["attention"]
    if attention is None:
        attention = "search" if algorithm is Algorithm.PRACTICAL else "longrope"
    sizes = {name: given[name] for name in ("population", "iterations") if given[name] is not None}
    tokens, minutes = given["budget_tokens"], given["budget_minutes"]
    if tokens is not None and not isfinite(tokens):
        raise ConfigError(f"--budget-tokens must be above 0 and finite, got {tokens}")
    return SearchOptions(
        target_length=target,
        algorithm=algorithm,
        ladder=given["ladder"],
        closed_forms=tuple(given["against"].split(",")) if given["against"] else (),
        warm_start=warm,
        recover=given["recover"] or (),
        recover_cap=given["recover_cap"],
        switch=None if given["switch"] is None else SwitchPolicy(given["switch"]),
        documents=given["documents"],
        attention=attention,
        start_tokens=not given["no_start_tokens"],
        tier_tokens=given["tier_tokens"],
        refine=not given["no_refine"],
        needle_keys=given["needle_keys"],
        seed=given["seed"],
        dtype=given["dtype"],
        budget=Budget(
            None if tokens is None else int(tokens), None if minutes is None else 60 * minutes
        ),
        evolution=replace(EvolutionSettings.for_length(target), **sizes) if sizes else None,
        practical=PracticalSettings(given["family_evaluations"], given["gradient_steps"]),
    )


def make_offload(
    place: str | None, source: Model, devices: Sequence[str], output: Path, *, is_ray: bool
) -> Offload | None:
    """Where the layers' weights are.

    Args:
        output: the RUN folder, in which weights are that have to be rewritten.
        is_ray: the devices are known to the workers only, which look themselves.

    Raises:
        LongRopeError: it does not fit the model or the devices.
    """
    if place is None:
        return None
    from longrope_export.models.offload import Offload
    from longrope_export.models.torch_model import default_device

    offload = Offload(place, output / "offload")
    for device in [] if is_ray else devices or [default_device()]:
        offload.check(source.path, device)
    return offload


def encode_texts(source: Model, works: Sequence[tuple[str, str]]) -> Texts:
    """Tokenize works once, by the model's own tokenizer."""
    from longrope_export.models.torch_model import encode_plainly, load_torch_tokenizer
    from longrope_export.search.documents import tokenize
    from longrope_export.search.run_base import Texts

    tokenizer = load_torch_tokenizer(source.path)
    encode = partial(encode_plainly, tokenizer)
    # what the tokenizer puts in front of a text, and not what it puts behind it
    plain, whole = encode("a"), tokenizer("a").input_ids
    start = tuple(whole[: whole.index(plain[0])]) if plain and plain[0] in whole else ()
    return Texts(tokenize(works, encode), encode, start)
