"""What `finetune` is made of on the command line: checks, rows, and the folders that it reads and writes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Set
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrope_export.cli.common import refuse_unused

if TYPE_CHECKING:
    from longrope_export.config import LongRopeConfig
    from longrope_export.finetune.estimate import Geometry
    from longrope_export.finetune.recipes import Recipe
    from longrope_export.models.model import Model
    from longrope_export.texts import Work


def refuse_ignored(
    recipe: Recipe, ranks: int, validation_texts: tuple[str, ...], validation_documents: int
) -> None:
    """Refuse options that nothing would look at.

    Raises:
        ConfigError: naming the option and what it belongs to.
    """
    needs = (
        (("tokens", "chunks", "true_places"), "--layout pose", recipe.layout == "pose"),
        (("short_share",), "--layout mixed", recipe.layout == "mixed"),
        (("retrieval_share",), "--layout pose or long", recipe.layout in ("pose", "long")),
        (("retrieval_keys",), "--retrieval-share", recipe.retrieval_share > 0),
        (("backend",), "--sequence-parallel", ranks > 1),
        (
            ("validation_documents", "validation_length", "needle_keys"),
            "--validation-text",
            bool(validation_texts),
        ),
        (
            ("validation_length", "needle_keys"),
            "--validation-documents above 0",
            validation_documents > 0,
        ),
    )
    refuse_unused(needs)


class Folders:
    """Reads and writes the folders of a run, by the safetensors exporter."""

    def __init__(self, source: Model) -> None:
        self.source = source

    def unpack(self, output: Path) -> None:
        """The source, a GGUF, as a Hugging Face folder in float32."""
        from longrope_converters.to_safetensors.convert import (
            SafetensorsConverter,
            SafetensorsOptions,
        )

        converter = SafetensorsConverter(SafetensorsOptions(dtype="f32"))
        converter.convert(self.source, None, output, lambda count: None)

    def check(self, base: Path, config: LongRopeConfig) -> None:
        """Refuse what `write` could not write."""
        from longrope_export.models.model import load_model

        model = load_model(base)
        self._converter(model, config).check(model, config)

    def write(self, plain: Path, config: LongRopeConfig, output: Path) -> None:
        """A folder with the definition; our modelling file too where stock code falls short."""
        from longrope_export.models.model import load_model

        model = load_model(plain)
        self._converter(model, config).convert(model, config, output, lambda count: None)

    @staticmethod
    def _converter(model: Model, config: LongRopeConfig) -> Any:
        from longrope_converters.to_safetensors.convert import (
            SafetensorsConverter,
            SafetensorsOptions,
        )
        from longrope_converters.to_safetensors.notes import stock_losses

        lost = bool(stock_losses(config, model))
        return SafetensorsConverter(SafetensorsOptions(remote_code=lost, link=True, force=True))


def check_vocabulary(source: Model, geometry: Geometry, samples: list[Any]) -> None:
    """Refuse a tokenizer whose ids the model has no rows for.

    Raises:
        ModelError: with both numbers.
    """
    from longrope_export.errors import ModelError

    largest = max((int(sample.ids.max()) for sample in samples), default=0)
    rows = geometry.vocabulary_size
    if largest >= rows:
        raise ModelError(
            f"{source.path}: the tokenizer gives id {largest}, the embedding has {rows} rows: the "
            f"tokenizer is another model's"
        )


def check_memory_for(
    recipe: Recipe, geometry: Geometry, target: int, rows: float, dtype: str, device: str | None
) -> None:
    """Refuse a training that the memory here is too small for, by docs/extend.md's estimate.

    Raises:
        ConfigError: with both numbers.
    """
    from longrope_export.finetune import hardware
    from longrope_export.finetune.costs import recipe_memory
    from longrope_export.finetune.estimate import check_memory

    memory = recipe_memory(recipe, geometry, target, rows, dtype)
    here = processes_here()  # of all processes' memory, the share of this machine
    needed = memory.total * here // max(here, int(os.environ.get("WORLD_SIZE", "1")))
    check_memory(needed, hardware.free_bytes(device, here), f"recipe {recipe.name}")


def processes_here() -> int:
    """How many processes torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def make_rows(
    samples: list[Any], tokenizer: Any, recipe: Recipe, config: LongRopeConfig, seed: int
) -> Any:
    """The rows of a recipe; the tokenizer is transformers'.

    Raises:
        ConfigError: texts that are too short for it.
    """
    from longrope_export.finetune.retrieval import Retrieval
    from longrope_export.finetune.rows import RowSettings, TrainingRows
    from longrope_export.models.torch_model import encode_plainly

    window = recipe.window or config.max_position_embeddings
    settings = RowSettings(
        window,
        recipe.layout,
        short_length=config.original_max_position_embeddings,
        short_share=recipe.short_share,
        tokens=min(recipe.tokens or window, window),
        chunks=recipe.chunks,
        true_places=recipe.true_places,
    )
    retrieval = None
    if recipe.retrieval_share:
        encode = partial(encode_plainly, tokenizer)
        retrieval = Retrieval(recipe.retrieval_share, recipe.retrieval_keys, encode)
    return TrainingRows(samples, settings, seed, retrieval)


def noted(works: Iterable[Work], learned: set[str]) -> Iterator[Work]:
    """The works, whose texts' hashes go into `learned` as they pass."""
    for work in works:
        learned.add(_hash(work.text))
        yield work


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_validation(
    source: Model,
    texts: tuple[str, ...],
    learned: Set[str],
    length: int,
    count: int,
    keys: int,
    seed: int,
    tell: Callable[[str], None],
) -> Any:
    """Documents that are measured before and after; says which of them are learned too.

    Args:
        learned: what `noted` has gathered.
    """
    from longrope_export.cli.search_parts import encode_texts
    from longrope_export.finetune.validation import make_validation
    from longrope_export.texts import read_texts

    works = read_texts(texts)
    if both := [name for name, text in works if _hash(text) in learned]:
        tell(f"warning: not held out, since --text has them too: {', '.join(both)}")
    return make_validation(encode_texts(source, works), length, count, keys, seed)
