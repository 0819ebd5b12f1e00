"""What is evaluated: exports, and source models under factors that they do not carry."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from longrope_export.config import LongRopeConfig
from longrope_export.definition import to_json
from longrope_export.errors import ConfigError, ModelError
from longrope_export.factor_files import read_factors
from longrope_export.models.model import load_model
from longrope_export.runtimes.base import Runtime
from longrope_export.runtimes.http_servers import served_model
from longrope_export.runtimes.open import Export, open_runtime
from longrope_export.verify.certificate import content_hash
from longrope_export.verify.tokens import vocabulary_size

_ALLOCATES = ("llama.cpp", "llama.cpp-stock")  # for one length; the stock one chooses factors by it


@dataclass(frozen=True)
class Subject:
    """One column of the comparison.

    Attributes:
        label: for tables; no two are alike.
        definition: what the runtime is held to: the config that the export carries, or the factors
            that are put on; None where nothing is known of it (a server, a foreign file).
        bounded: the definition is one for longer text, and ends at its target; a model as it was
            trained is run at any length.
        sha256: of the export, see content_hash; None for a server.
        dtype, device: of transformers' runtimes.
        note: what a reader should know.
        vocabulary: tokens that a server has to know, where a local model says it.
        factors: the file that is put on a model which carries none.
        served: what a server says of its model, see served_model; None for everything else.
    """

    label: str
    export: Export
    definition: LongRopeConfig | None
    bounded: bool
    sha256: str | None
    dtype: str = "float32"
    device: str = "cpu"
    note: str | None = None
    vocabulary: int | None = None
    factors: Path | None = None
    served: str | None = None

    @property
    def identity(self) -> str:
        """Hex; another for other files, another definition, runtime, dtype, or model of a server."""
        config = None if self.definition is None else to_json(self.definition)
        parts = [self.export.runtime, str(self.sha256 or self.export.path), config, self.dtype]
        parts += [] if self.served is None else [self.served]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def allocates(self) -> bool:
        """It has to be opened anew for another length."""
        return self.export.runtime in _ALLOCATES

    def open(self, context: int, *, threads: int | None, build: bool) -> Runtime:
        """Load it.

        Args:
            context: tokens that have to fit.
            threads: of the runtime; None for its default.
            build: compile llama.cpp where it is missing.

        Raises:
            LongRopeError: the runtime is not installed, or refuses the export.
        """
        config = self.definition
        if config is not None and not self.bounded:
            config = _reaching(config, context)
        return open_runtime(
            self.export,
            context=context,
            config=config,
            vocabulary=self.vocabulary,
            threads=threads,
            build=build,
            dtype=self.dtype,
            device=self.device,
        )


def make_subjects(
    exports: Sequence[Export],
    factors: Sequence[Path] = (),
    *,
    dtype: str = "float32",
    device: str = "cpu",
) -> list[Subject]:
    """One for each export, and one more for each factors file on a model that carries none.

    Raises:
        ConfigError: no model could take the factors.
        LongRopeError: an export or a factors file cannot be read, or they do not fit.
    """
    names = Counter(_short_name(export) for export in exports)
    subjects = []
    taken = False
    for export in dict.fromkeys(exports):
        label = _short_name(export)
        label = label if names[label] == 1 else str(export)
        subject = _subject(export, label)
        if not subject.export.runtime.startswith("transformers"):
            subjects.append(subject)
            continue
        subject = replace(subject, dtype=dtype, device=device)
        subjects.append(subject)
        if export.runtime == "transformers" and not subject.bounded:
            taken = True
            model = load_model(Path(export.path))
            subjects += [
                replace(
                    subject,
                    label=f"{label} + {path.stem}",
                    definition=read_factors(path, model),
                    bounded=True,
                    note=None,
                    factors=path,
                )
                for path in factors
            ]
    if factors and not taken:
        raise ConfigError(
            "--factors are put on models that transformers runs and that carry none, and there is "
            "none among these: bake them in (longrope-export gguf, onnx, safetensors), or give the "
            "source model, a GGUF as transformers=model.gguf"
        )
    _check_labels(subjects)
    vocabulary = next(filter(None, map(_vocabulary, exports)), None)
    return [
        replace(subject, vocabulary=vocabulary) if subject.export.runtime == "server" else subject
        for subject in subjects
    ]


def check_lengths(subjects: Sequence[Subject], longest: int) -> None:
    """Refuse lengths beyond what a definition is made for.

    Raises:
        ConfigError: naming the subject.
    """
    for subject in subjects:
        config = subject.definition
        if config and subject.bounded and longest > config.max_position_embeddings:
            raise ConfigError(
                f"{subject.label} is made for {config.max_position_embeddings} tokens, --lengths "
                f"has {longest}: give shorter ones, or make factors for a longer target"
            )


def _subject(export: Export, label: str) -> Subject:
    sha256 = content_hash(export.path)
    if isinstance(export.path, str):
        return Subject(label, export, None, False, None, served=served_model(export.path))
    if export.runtime == "onnxruntime":
        from longrope_export.onnx_metadata import read_config

        return Subject(label, export, read_config(export.path), True, sha256)
    if export.runtime == "genai":
        config = _config_if_ours(export.path)
        return Subject(label, export, config, config is not None, sha256)
    model = load_model(export.path)
    bounded = model.is_extended
    note = None
    if not bounded:
        note = f"carries no definition: it is run as it is, trained for {model.window} tokens"
    return Subject(label, export, model.native, bounded, sha256, note=note)


def _config_if_ours(folder: Path) -> LongRopeConfig | None:
    """What an ONNX folder was exported with; None for one that somebody else made."""
    from longrope_export.onnx_metadata import read_config

    try:
        return read_config(folder)
    except ModelError:
        return None


def _vocabulary(export: Export) -> int | None:
    if isinstance(export.path, str) or export.runtime in ("onnxruntime", "genai"):
        return None
    return vocabulary_size(load_model(export.path))


def _reaching(config: LongRopeConfig, length: int) -> LongRopeConfig:
    """A plain model's own config at any length: its last tier goes on."""
    if length <= config.max_position_embeddings:
        return config
    tiers = (*config.tiers[:-1], replace(config.tiers[-1], max_length=length))
    return replace(config, tiers=tiers, max_position_embeddings=length)


def _short_name(export: Export) -> str:
    return export.path if isinstance(export.path, str) else export.path.resolve().name


def _check_labels(subjects: Sequence[Subject]) -> None:
    counts = Counter(subject.label for subject in subjects)
    twice = [label for label, count in counts.items() if count > 1]
    if twice:
        raise ConfigError(f"two of the models would be called {twice[0]}: rename one of the files")
