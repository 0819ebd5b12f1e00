"""One fine-tune in one folder: measured before, trained, measured after, written with its factors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from longrope_export import __version__
from longrope_export.config import LongRopeConfig, SwitchPolicy
from longrope_export.definition import to_json
from longrope_export.errors import ConfigError
from longrope_export.evaluate.memory_use import PeakMemory
from longrope_export.factor_files import write_factors
from longrope_export.finetune.distributed import rank_and_world, wait_for_all
from longrope_export.finetune.metrics import Step, read_metrics
from longrope_export.finetune.model import TrainingModel
from longrope_export.finetune.recipes import Recipe, Rule
from longrope_export.finetune.tables import FORMAT
from longrope_export.finetune.training import CHECKPOINTS, Machine, train
from longrope_export.finetune.validation import Validation, measure, summarize
from longrope_export.outputs import check_outside, replace_folder_when_done, write_text
from longrope_export.run_settings import SETTINGS, lock_run, open_settings
from longrope_export.search.judge import better_rule
from longrope_export.stamp import stamp
from longrope_export.verify.certificate import content_hash

if TYPE_CHECKING:
    from longrope_export.finetune.rows import TrainingRows

RESULT = "result.json"
FACTORS = "factors.json"
MODEL = "model"
PLAIN = "weights"  # the tuned weights, before the definition is written into their folder
UNPACKED = "source"  # a GGUF as a Hugging Face folder
PAD_ID = 0  # what fills a batch is never looked at


@dataclass(frozen=True)
class Event:
    """What an observer is told.

    Attributes:
        phase: what is being done.
        progress: how far, in words.
        step: of the training, once it has been computed.
    """

    phase: str
    progress: str = ""
    step: Step | None = None


class ModelWriter(Protocol):
    """Whoever reads and writes folders; the converters do."""

    def unpack(self, output: Path) -> None:
        """Write the source, a GGUF, as a Hugging Face folder in float32."""
        ...

    def check(self, base: Path, config: LongRopeConfig) -> None:
        """Refuse, before anything is trained, what `write` could not write."""
        ...

    def write(self, plain: Path, config: LongRopeConfig, output: Path) -> None:
        """Write a folder's weights with the definition."""
        ...


@dataclass(frozen=True)
class FinetuneOptions:
    """What a fine-tune depends on, beside model, factors and texts.

    Attributes:
        recipe: with the values that were changed.
        switch: the rule that is written; None for the better one, measured after training, or the
            factors' own where nothing is measured.
        seed: of the rows and of the adapters' first values.
        texts: a hash of all tokens.
    """

    recipe: Recipe
    switch: SwitchPolicy | None
    seed: int
    texts: str

    def to_json(self) -> dict[str, Any]:
        switch = None if self.switch is None else self.switch.value
        return {
            **self.recipe.to_json(),
            "switch": switch,
            "seed": self.seed,
            "texts_sha256": self.texts,
        }


def finetune(
    source: Path,
    config: LongRopeConfig,
    rows: TrainingRows,
    options: FinetuneOptions,
    folder: Path,
    machine: Machine,
    writer: ModelWriter,
    *,
    validation: Validation | None = None,
    resume: bool = False,
    observe: Callable[[Event], None] = lambda event: None,
) -> dict[str, Any]:
    """Fine-tune a model under one config.

    Args:
        source: a Hugging Face folder, or a GGUF.
        config: the factors; the recipe's rule says which tiers are trained.
        folder: gets model/, factors.json, result.json and metrics.jsonl.
        writer: unpacks a GGUF, and writes the folder that carries the definition.
        validation: documents that are measured before and after; None for none.
        resume: go on with the run that is there; one that is done gives its result again.

    Returns:
        What result.json holds; nothing in any but the first of several processes.

    Raises:
        ConfigError: a run with other settings, a recipe that asks for more than the factors reach.
        OutputError: the folder holds a run already, another process works in it, a full disk.
        ModelError: the loss is not a finite number.
        UnsupportedError: a package is missing.
    """
    recipe = options.recipe
    check_recipe(recipe, config)
    check_outside(folder, source)
    rank, world = rank_and_world()
    if rank == 0:
        settings = {
            "format": FORMAT,
            "tool": f"longrope-export {__version__}",
            "model_sha256": content_hash(source),
            "factors": {**to_json(config), "provenance": None},
            "validation": None if validation is None else validation.to_json(),
            "options": options.to_json() | {"dtype": machine.dtype},
            "several_processes": world > 1,  # their checkpoints are of another kind
        }
        open_settings(folder, settings, resume=resume)
    wait_for_all()
    with (folder / SETTINGS).open() as held:
        if rank == 0:
            lock_run(held, folder)
        if (folder / RESULT).is_file():
            done: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
            _clean(folder)
            return done
        base = source
        if source.is_file():
            base = folder / UNPACKED
            if rank == 0 and not base.is_dir():
                observe(Event("unpacking the model"))
                writer.unpack(base)
            wait_for_all()
        writer.check(base, config)
        work = _Work(base, config, rows, options, folder, machine, validation, observe)
        return work.run(writer)


def check_recipe(recipe: Recipe, config: LongRopeConfig) -> None:
    """Refuse rows that reach beyond the factors, and rules that the tiers or the rows cannot follow.

    Raises:
        ConfigError: naming what does not fit.
    """
    recipe.check_reach(config.max_position_embeddings)
    if recipe.rule is not Rule.FROZEN and len(config.tiers) == 1:
        raise ConfigError(
            f"recipe {recipe.name}: rule {recipe.rule} trains under several tiers, the factors "
            f"have one: give --ladder to `factors`, or --rule frozen"
        )
    if recipe.layout == "pose" and recipe.rule is Rule.SEQUENCE:
        raise ConfigError(
            f"recipe {recipe.name}: the two halves of a row of layout pose stand at the positions of a "
            f"long text, and rule sequence would read them as texts of their own: give --rule causal "
            f"or frozen"
        )
    if recipe.layout == "mixed" and recipe.rule is Rule.SEQUENCE and not config.tiers[0].is_plain:
        raise ConfigError(
            f"recipe {recipe.name}: short documents keep the original RoPE, but the first tier (up to "
            f"{config.tiers[0].max_length}) changes it: make factors whose first tier is plain"
        )


def _clean(folder: Path) -> None:
    """Remove what a run needs only until its model is written."""
    if rank_and_world()[0] == 0:
        for name in (PLAIN, CHECKPOINTS, UNPACKED):
            shutil.rmtree(folder / name, ignore_errors=True)


@dataclass
class _Work:
    base: Path
    config: LongRopeConfig
    rows: TrainingRows
    options: FinetuneOptions
    folder: Path
    machine: Machine
    validation: Validation | None
    observe: Callable[[Event], None]

    def run(self, writer: ModelWriter) -> dict[str, Any]:
        before = self._measure(self.base, "before")
        memory = PeakMemory()
        steps = self._train()
        peak = memory.peak_bytes()
        if rank_and_world()[0] > 0:
            return {}
        after = self._measure(self.folder / PLAIN, "after")
        switch = self.options.switch or self.config.switch
        if self.options.switch is None and after:
            switch = better_rule(after)
        trained = {
            "recipe": self.options.recipe.to_json(),
            "seed": self.options.seed,
            "steps": len(steps),
            "tokens": sum(step.tokens for step in steps),
            "targets": sum(step.targets for step in steps),
            "first_loss": steps[0].loss,
            "last_loss": steps[-1].loss,
            "before": summarize(before),
            "after": summarize(after),
        }
        provenance = {**self.config.provenance, "finetune": trained}
        config = replace(self.config, switch=switch, provenance=provenance)
        self.observe(Event("writing the model"))
        writer.write(self.folder / PLAIN, config, self.folder / MODEL)
        write_factors(config, self.folder / FACTORS)
        result = {
            **stamp(FORMAT, 1),
            **trained,
            "switch": switch.value,
            "training_seconds": sum(step.seconds for step in steps),
            "peak_bytes": peak,  # of this process, since it began
            "validation": [d.name for d in self.validation.documents] if self.validation else [],
            "validation_length": self.validation.length if self.validation else None,
        }
        write_text(self.folder / RESULT, json.dumps(result, indent=2) + "\n")
        _clean(self.folder)
        return result

    def _measure(self, path: Path, name: str) -> list[Any]:
        if self.validation is None or rank_and_world()[0] > 0:
            return []
        words = f"measuring {name} training"
        self.observe(Event(words))
        return measure(
            path,
            self.config,
            self.validation,
            self.folder / name,
            (self.machine.dtype, self.machine.device),
            lambda progress: self.observe(Event(words, progress)),
        )

    def _train(self) -> list[Step]:
        if (self.folder / PLAIN).is_dir():
            return read_metrics(self.folder)
        recipe = self.options.recipe
        steps = recipe.steps or max(
            1, round((recipe.epochs or 1) * len(self.rows) / recipe.batch_size)
        )
        self.observe(Event("training"))
        training = TrainingModel(
            self.base, self.config, recipe, self.options.seed, self.machine.device
        )
        trained = train(
            training.model,
            self.rows,
            recipe,
            self.folder,
            self.machine,
            steps=steps,
            seed=self.options.seed,
            pad_id=PAD_ID,
            on_step=lambda step: self.observe(Event("training", step=step)),
        )
        if rank_and_world()[0] > 0:
            return trained.steps
        if trained.state is not None:  # this model holds a part of the weights
            training = TrainingModel(self.base, self.config, recipe, self.options.seed)
            training.load(trained.state)
        with replace_folder_when_done(self.folder / PLAIN) as temporary:
            training.save(self.base, temporary)
        return trained.steps
