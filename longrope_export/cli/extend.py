"""`longrope-export extend`: a whole plan, stage by stage."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longrope_export.cli import COMMANDS
from longrope_export.cli.common import (
    CONTEXT_SETTINGS,
    is_quiet,
    json_option,
    model_options,
    print_json,
    say,
)

if TYPE_CHECKING:
    from longrope_export.finetune.costs import Cost
    from longrope_export.finetune.estimate import Geometry
    from longrope_export.finetune.hardware import Hardware
    from longrope_export.finetune.plan import Commands, Option
    from longrope_export.finetune.stages import Step

HEADER = ("", "stage", "forward, M tokens", "training, M tokens", "GB", "device-hours")


@click.command(context_settings=CONTEXT_SETTINGS)
@model_options
@click.argument("plan", metavar="PLAN")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="RUN folder.")
@click.option("--from", "again_from", metavar="STAGE",
              help="Do this stage and all behind it again; what is there is kept.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Show commands and what they cost; write nothing.")
@click.option("--hardware", metavar="NAME|NxNAME",
              help="For the estimates: a100-80gb, 8xh100, cpu-core ... [this machine's cores].")  # fmt: skip
@click.option("--utilization", type=float, help="Share of the peak that is reached [GPUs: 0.4].")
@json_option
def command(
    model: str,
    revision: str | None,
    local_files_only: bool,
    plan: str,
    output: Path | None,
    again_from: str | None,
    dry_run: bool,
    hardware: str | None,
    utilization: float | None,
    as_json: bool,
) -> None:
    """Run a whole plan: search, fine-tune, recover, export, verify, measure.

    PLAN is a TOML file or the name of a shipped one: small, longrope-llama2, longrope-mistral. Each
    stage is one command of this program, in a process of its own; --dry-run shows them. The same
    command again goes on behind the last stage that is done.

    \b
    longrope-export extend model/ plan.toml -o run/
    longrope-export extend model/ plan.toml -o run/ --from finetune-128k
    longrope-export extend model/ longrope-llama2 --dry-run --hardware 8xa100-80gb
    """
    from longrope_export.errors import ConfigError
    from longrope_export.finetune.estimate import check_memory, geometry_of
    from longrope_export.finetune.hardware import free_bytes, parse_hardware, this_machine
    from longrope_export.finetune.plan import load_plan
    from longrope_export.finetune.resolve import resolve
    from longrope_export.finetune.runner import run_plan
    from longrope_export.models.hf_config import refuse_quantized
    from longrope_export.models.model import find_model, load_model
    from longrope_export.outputs import check_outside

    if not dry_run and output is None:
        raise click.UsageError("give -o, the folder of the run, or --dry-run")
    for option, given in (("--hardware", hardware), ("--utilization", utilization)):
        if given is not None and not dry_run:
            raise ConfigError(f"{option} belongs to --dry-run: it would be ignored")
    folder = output or Path("run")
    found = find_model(
        model, revision=revision, local_files_only=local_files_only, weights=not dry_run
    )
    source = load_model(found)
    refuse_quantized(source.path)
    check_outside(folder, source.path)
    written = load_plan(plan)
    steps = resolve(written, source, folder, read_commands(), dry=dry_run)
    if dry_run:
        geometry = geometry_of(source)
        devices = parse_hardware(hardware) if hardware else this_machine()
        show_costs(steps, geometry, source.window, devices, utilization, as_json=as_json)
        return

    def check(step: Step) -> None:
        from longrope_export.finetune.costs import finetune_memory

        if step.stage.kind != "finetune" or step.values.get("no-memory-check"):
            return
        memory = finetune_memory(step, geometry_of(source))
        if memory is not None:
            device = step.values.get("device")
            check_memory(memory.total, free_bytes(device), step.stage.title)

    run_plan(
        steps,
        folder,
        written.text,
        source.fingerprint,
        again_from=again_from,
        check=check,
        say=say,
        echo=_echo(),
    )
    if as_json:
        print_json({step.stage.name: [str(path) for path in step.outputs] for step in steps})


def read_commands() -> Commands:
    """What the commands of a plan take, from the command line's own definitions."""
    from longrope_export.finetune.plan import KINDS

    found = {}
    for name in dict.fromkeys(KINDS.values()):
        if name in COMMANDS:
            module = importlib.import_module(f"longrope_export.cli.{COMMANDS[name][0]}")
            found[name] = {option.name: option for option in _options(module.command.params)}
    return found


def _options(params: Iterable[click.Parameter]) -> Iterable[Option]:
    from longrope_export.finetune.plan import Option

    for param in params:
        if isinstance(param, click.Option):
            name = next(word for word in param.opts if word.startswith("--"))
            off = param.secondary_opts[0] if param.secondary_opts else None
            is_flag = param.is_flag
        elif isinstance(param.type, click.Choice):  # METHOD; other arguments are filled in
            name, off, is_flag = str(param.name), None, False
        else:
            continue
        default = param.default
        yield Option(
            name.removeprefix("--"),
            _checker(param),
            default=default if isinstance(default, str | int | float) else None,
            is_flag=is_flag,
            off=off,
            multiple=param.multiple,
            required=param.required,
            is_path=isinstance(param.type, click.Path),
            positional=isinstance(param, click.Argument),
        )


def _checker(param: click.Parameter) -> Callable[[str], object]:
    def check(text: str) -> object:
        try:
            return param.type.convert(text, param, None)
        except click.UsageError as error:
            raise ValueError(error.message) from error

    return check


def _echo() -> Callable[[bytes], None]:
    if is_quiet():
        return lambda output: None
    return lambda output: click.echo(output, err=True, nl=False)


def show_costs(
    steps: list[Step],
    geometry: Geometry,
    window: int,
    devices: Hardware,
    utilization: float | None,
    *,
    as_json: bool,
) -> None:
    """The commands and their estimates, as a table or as JSON."""
    from longrope_export.finetune.costs import cost_of
    from longrope_export.finetune.estimate import device_hours

    costs = [cost_of(step, geometry, window) for step in steps]
    hours = [None if c is None else device_hours(c.flops, devices, utilization) for c in costs]
    total = sum(filter(None, hours))
    if as_json:
        stages = [
            _cost_json(*row) | {"fits": _fits(row[0], row[1], devices)}
            for row in zip(steps, costs, hours, strict=True)
        ]
        print_json(
            {
                "hardware": devices.name,
                "devices": devices.count,
                "utilization": utilization or devices.utilization,
                "parameters": geometry.num_parameters,
                "device_hours": total,
                "hours": total / devices.count,
                "stages": stages,
            }
        )
        return
    from rich.console import Console
    from rich.table import Table

    share = utilization or devices.utilization
    table = Table(*HEADER, title=f"{devices.name} at {share:g} of its peak, an estimate")
    for step, cost, spent in zip(steps, costs, hours, strict=True):
        memory = cost.memory if cost else None
        table.add_row(
            str(step.stage.number),
            step.stage.name,
            *("?" if cost is None else f"{n / 1e6:,.1f}" if n else "" for n in _tokens(cost)),
            f"{memory.total / 1e9:,.1f}" if memory else "",
            "?" if spent is None else f"{spent:,.2f}" if spent else "",
        )
    unknown = " and what is not known (?)" if None in hours else ""
    Console().print(table)
    click.echo(f"{total:,.2f} device-hours, {total / devices.count:,.2f} hours{unknown}")
    for step, cost in zip(steps, costs, strict=True):
        if not _fits(step, cost, devices):
            click.echo(
                f"{step.stage.title}, does not fit into {_room(step, devices) / 1e9:,.1f} GB"
            )
    click.echo()
    for step in steps:
        click.echo(shlex.join(step.words))


def _tokens(cost: Cost | None) -> tuple[int, int]:
    return (0, 0) if cost is None else (cost.forward_tokens, cost.training_tokens)


def _room(step: Step, devices: Hardware) -> int:
    """Bytes: a training is spread over all devices, a pass of anything else is one device's."""
    return devices.total_bytes if step.stage.kind == "finetune" else devices.one_bytes


def _fits(step: Step, cost: Cost | None, devices: Hardware) -> bool:
    return cost is None or cost.memory is None or cost.memory.total <= _room(step, devices)


def _cost_json(step: Step, cost: Cost | None, hours: float | None) -> dict[str, Any]:
    memory = cost.memory if cost else None
    return {
        "number": step.stage.number,
        "name": step.stage.name,
        "run": step.stage.kind,
        "command": step.words,
        "folder": str(step.folder),
        "forward_tokens": cost.forward_tokens if cost else None,
        "training_tokens": cost.training_tokens if cost else None,
        "flops": cost.flops if cost else None,
        "memory_bytes": memory.total if memory else None,
        "device_hours": hours,
    }
