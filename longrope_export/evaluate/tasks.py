"""Short tasks through lm-eval (EleutherAI), on any runtime, from task files that the user gives."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longrope_export.errors import ConfigError, ModelError, UnsupportedError
from longrope_export.runtimes.base import Runtime


def check_tasks(tasks: Sequence[str], include_path: Path | None) -> None:
    """Refuse what cannot be run, before anything is.

    Raises:
        UnsupportedError: lm-eval is not installed.
        ConfigError: no folder of task files, or no such task in it; a tag or a group of tasks.
    """
    manager = _task_manager(include_path)
    single = sorted(manager.all_subtasks)
    for task in tasks:
        if task in single:
            continue
        if task in manager.all_tasks:
            members = ",".join(_members(manager.task_index[task])) or "each of them"
            raise ConfigError(
                f"--tasks {task}: a tag or a group of tasks, expected single tasks: give {members}"
            )
        raise ConfigError(
            f"--tasks {task}: no such task in {include_path}, which has {', '.join(single) or 'none'}"
        )


def _members(entry: Any) -> list[str]:
    """Names of what lm-eval's index holds of a group (in its YAML) or a tag."""
    config = getattr(entry, "cfg", None)
    listed = config.get("task", ()) if config else getattr(entry, "tags", ())
    return sorted(str(each["task"] if isinstance(each, dict) else each) for each in listed)


def files_hash(include_path: Path) -> str:
    """SHA-256 of the names and contents of a folder's files, hex; what Python compiles left out.

    Raises:
        ConfigError: a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for path in sorted(include_path.rglob("*")):
            if path.is_file() and path.parent.name != "__pycache__":
                with path.open("rb") as file:
                    inner = hashlib.file_digest(file, "sha256").hexdigest()
                digest.update(f"{path.relative_to(include_path)}\n{inner}\n".encode())
    except OSError as error:
        raise ConfigError(f"--include-path {include_path}: cannot be read: {error}") from error
    return digest.hexdigest()


def run_task(
    runtime: Runtime,
    task: str,
    *,
    longest: int,
    include_path: Path | None,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Run one task.

    Args:
        longest: tokens of context that are kept, the last ones.
        include_path: folder with the task's YAML.
        limit: samples; None for all.
        seed: of everything that lm-eval draws.

    Returns:
        {"metrics": name -> number, as lm-eval names them, "samples": how many}.

    Raises:
        UnsupportedError, ConfigError: as check_tasks.
        ModelError: lm-eval fails, as where a data set is not on this machine.
    """
    manager = _task_manager(include_path)
    from lm_eval import simple_evaluate

    from longrope_export.evaluate.lm_eval_model import RuntimeLM

    try:
        found = simple_evaluate(
            model=RuntimeLM(runtime, longest),
            tasks=[task],
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (OSError, ValueError, KeyError) as error:  # datasets' own errors are among these
        raise ModelError(f"lm-eval task {task} failed: {type(error).__name__}: {error}") from error
    values = found["results"][task]
    metrics = {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and "stderr" not in name and "," in name
    }
    samples = found.get("n-samples", {}).get(task, {}).get("effective")
    return {"metrics": metrics, "samples": samples}


def _task_manager(include_path: Path | None) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UnsupportedError(
            f"--tasks needs lm-eval: {error}; pip install 'longrope-export[tasks]'"
        ) from error
    if include_path is None:
        raise ConfigError(
            "--tasks needs --include-path FOLDER with the YAML files of the tasks; for those that come "
            "with lm-eval name its own folder, as .../site-packages/lm_eval/tasks/arc"
        )
    return TaskManager(include_path=str(include_path), include_defaults=False)
