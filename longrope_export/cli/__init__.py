"""The command line: one module per command, loaded when the command is used."""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any

import click

from longrope_export import __version__
from longrope_export.errors import LongRopeError

# name -> (module, help line): the help line stands here so that --help imports no command
COMMANDS: dict[str, tuple[str, str]] = {
    "inspect": ("inspect", "Show a model's RoPE, its tiers, and what each runtime honours."),
    "factors": ("factors", "Make factors by a closed form, or read them from another file."),
    "search": ("search", "Find the factors that suit a model and its texts."),
    "finetune": ("finetune", "Train a model under its new factors."),
    "extend": ("extend", "Run a whole plan: search, fine-tune, recover, export, verify, measure."),
    "gguf": ("gguf", "Write a GGUF with the factors baked in."),
    "safetensors": ("safetensors", "Write a Hugging Face folder that every engine loads."),
    "onnx": ("onnx", "Write an ONNX folder with the factors in the graph."),
    "verify": ("verify", "Prove that exports compute what the definition says."),
    "evaluate": ("evaluate", "Measure perplexity, passkeys, needles and tasks, side by side."),
    "report": ("report", "Make an HTML page, plots or a model card of what was measured."),
    "llama-cpp": ("llama_cpp", "Build and run the pinned llama.cpp."),
    "demo": ("demo", "Take a real 8k model to 32k in llama.cpp, from nothing."),
}


class LazyGroup(click.Group):
    """Imports a command's module when it is called, so that --help stays under half a second."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"longrope_export.cli.{COMMANDS[name][0]}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            sys.stderr.close()  # the reader of our output has left: nothing more to say
            ctx.exit(0)
        except (LongRopeError, OSError) as error:
            if ctx.params.get("verbose"):
                logging.getLogger("longrope_export").exception("where it went wrong:")
            words = str(error)
            if isinstance(error, OSError):  # a file not ours to read, a program that does not start
                where = f"{error.filename}: " if error.filename else ""
                words = f"{where}{error.strerror or error}"
            click.echo(f"Error: {words}", err=True)
            ctx.exit(2)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version")
@click.option("-v", "--verbose", is_flag=True, help="Say more; show a traceback on errors.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no summary, only errors.")
@click.pass_context
def main(ctx: click.Context, verbose: bool, quiet: bool) -> None:
    """Longer context for RoPE language models, baked into the files you run.

    \b
    longrope-export factors yarn model/ --target-length 32768 -o f.json
    longrope-export gguf model/ --factors f.json -o model.gguf
    longrope-export llama-cpp run llama-completion -m model.gguf -c 32768 -p "Once"
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    level = logging.DEBUG if verbose else logging.ERROR if quiet else logging.INFO
    for name in ("longrope_export", "longrope_converters"):
        logging.getLogger(name).setLevel(level)
