"""Measure cells: open each subject once, run what is missing, write down what is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longrope_export.errors import ConfigError
from longrope_export.evaluate.journal import Journal
from longrope_export.evaluate.memory_use import give_back_large_blocks
from longrope_export.evaluate.perplexity import make_windows
from longrope_export.evaluate.session import Options, Session
from longrope_export.evaluate.settings import (
    LM_EVAL,
    PERPLEXITY,
    Cell,
    Settings,
    Text,
    make_cells,
)
from longrope_export.evaluate.subjects import Subject, check_lengths

Say = Callable[[str, float], None]  # (what is being done, share that is done, 0 to 1)


def evaluate(
    subjects: Sequence[Subject],
    texts: Sequence[Text],
    settings: Settings,
    journal: Journal,
    *,
    options: Options | None = None,
    say: Say = lambda what, share: None,
) -> list[tuple[Cell, dict[str, Any]]]:
    """Run every cell of the plan that the journal does not hold yet.

    Returns:
        All cells in the order of the plan, with their results.

    Raises:
        ConfigError: a text is too short, a length is beyond a definition, an unknown task.
        LongRopeError: a runtime is missing, or fails. What was measured is in the journal.
    """
    if not texts and (settings.perplexity or settings.passkey or settings.needle):
        raise ConfigError("perplexity, passkey and needle tasks need a --text")
    check_lengths(subjects, settings.lengths[-1])
    session = Session(texts, settings, options or Options())
    if settings.tasks:
        from longrope_export.evaluate.tasks import check_tasks

        check_tasks(settings.tasks, session.options.include_path)
    give_back_large_blocks()
    measured, checked = [], set[str]()
    cells = make_cells(settings, [subject.label for subject in subjects], texts)
    by_label = {subject.label: subject for subject in subjects}
    identities = _identities(by_label, cells, session.options)
    for cell, identity in zip(cells, identities, strict=True):
        journal.find(cell, identity)  # say what has changed before hours are spent on the rest
    try:
        for number, (cell, identity) in enumerate(zip(cells, identities, strict=True)):
            subject = by_label[cell.model]
            result = journal.find(cell, identity)
            if result is None:
                share = number / len(cells)
                say(str(cell), share)
                runtime = session.open(subject, cell.length)
                if cell.model not in checked:
                    session.check(runtime, [other for other in cells if other.model == cell.model])
                    checked.add(cell.model)
                step = _steps(cell, settings, share, len(cells), say)
                result = session.measure(runtime, cell, step)
                journal.add(cell, identity, result)
            measured.append((cell, result))
        say("done", 1.0)
    finally:
        session.close()
    return measured


def _identities(
    subjects: Mapping[str, Subject], cells: Sequence[Cell], options: Options
) -> list[str]:
    """Of what each cell is measured on: the model, and for lm-eval the samples too."""
    samples = ""
    if options.include_path is not None and any(cell.task == LM_EVAL for cell in cells):
        from longrope_export.evaluate.tasks import files_hash

        samples = f", {files_hash(options.include_path)}, {options.limit}"
    return [
        subjects[cell.model].identity + (samples if cell.task == LM_EVAL else "") for cell in cells
    ]


def _steps(
    cell: Cell, settings: Settings, share: float, cells: int, say: Say
) -> Callable[[int], None]:
    """Progress inside a perplexity, in tokens."""
    if cell.task != PERPLEXITY:
        return lambda tokens: None
    stride = settings.stride or cell.length
    total = len(make_windows(settings.num_tokens, cell.length, stride)) * cell.length
    done = 0

    def step(tokens: int) -> None:
        nonlocal done
        done += tokens
        say(str(cell), share + done / total / cells)

    return step


@contextmanager
def open_journal(
    path: Path, settings: Settings, texts: Sequence[Text], *, fresh: bool = False
) -> Iterator[Journal]:
    """The journal of an output, closed afterwards; see Journal."""
    hashes = {text.name: text.sha256 for text in texts}
    journal = Journal(path, settings.fixed(), hashes, fresh=fresh)
    try:
        yield journal
    finally:
        journal.close()
