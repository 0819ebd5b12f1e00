"""Show a build on stderr: a bar on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from longrope_export.llama_cpp.build import Report


@contextlib.contextmanager
def build_progress(*, quiet: bool = False, verbose: bool = False) -> Iterator[Report]:
    """Yield the `report` argument of `ensure_built`.

    Args:
        quiet: show nothing.
        verbose: show every line of CMake and the compiler instead of a bar.
    """
    console = Console(stderr=True, highlight=False)
    if quiet:
        yield lambda line, done, total: None
    elif verbose or not console.is_terminal:
        shown = 0

        def print_line(line: str, done: int, total: int) -> None:
            nonlocal shown
            ours = line.startswith(("fetching ", "configuring ", "compiling ", "another process "))
            quarter = 4 * done // total if total else 0
            if verbose or ours or quarter > shown:
                console.print(escape(line), soft_wrap=True)
            shown = max(shown, quarter)

        yield print_line
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("llama.cpp", total=None)

            def show(line: str, done: int, total: int) -> None:
                if total:
                    progress.update(task, description="compiling", completed=done, total=total)
                elif line.startswith(("fetching ", "configuring ", "another process ")):
                    progress.update(task, description=escape(line.partition(",")[0]))

            yield show
