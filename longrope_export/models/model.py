"""A source model: a Hugging Face folder or a GGUF file, seen through what this project needs."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from longrope_export.config import LongRopeConfig
from longrope_export.errors import FactorFileError, ModelError
from longrope_export.gguf_format import GgufHeader, latest, read_header
from longrope_export.gguf_keys import has_our_keys
from longrope_export.models.families import WITHOUT_ROPE, Family, family_of_gguf
from longrope_export.models.hf_config import HfConfig, is_hf_folder, read_hf_config
from longrope_export.models.native import native_of_hf, read_definition
from longrope_export.models.native_gguf import gguf_head_dim, native_of_gguf

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_SETTINGS = ["*.json", "*.model", "*.jinja", "*.txt", "README.md"]
_HUB_WEIGHTS = ["*.safetensors"]


class ModelKind(StrEnum):
    HF = "hf"
    GGUF = "gguf"


@dataclass(frozen=True)
class Model:
    """Geometry of a model and the RoPE it brings along.

    Attributes:
        path: the folder or the file.
        native: the model's own RoPE; its last tier is what extensions build upon.
        fingerprint: hash of the settings and of the sizes of the weight files, hex; the weights
            themselves are not read.
        has_longrope: the settings name LongRoPE factors in stock's spelling, to be carried over.
        has_definition: it holds a whole config of ours, which `native` then is.
        gguf_header: of a GGUF, as it was read; see header_of.
    """

    path: Path
    kind: ModelKind
    family: Family
    architecture: str
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    native: LongRopeConfig
    fingerprint: str
    has_longrope: bool = False
    has_definition: bool = False
    gguf_header: GgufHeader | None = field(default=None, repr=False, compare=False)

    @property
    def is_extended(self) -> bool:
        """It carries factors that change something; a folder that we wrote may hold plain RoPE."""
        native = self.native
        plain = len(native.tiers) == 1 and native.tiers[0].is_plain and not native.logit_scaling
        return (self.has_definition or self.has_longrope) and not plain

    @property
    def window(self) -> int:
        """Longest sequence in tokens that the model handles as it is, its own scaling included."""
        return self.native.max_position_embeddings


def find_model(
    name: str,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    weights: bool = True,
) -> Path:
    """The path of MODEL: an existing path as it is, else a hub id, fetched or from the hub's cache.

    Only JSON, safetensors and tokenizer files are fetched, never pickles or code.

    Args:
        weights: False leaves safetensors where they are, for those who look at settings alone.

    Raises:
        ModelError: neither a path nor a hub id, or the hub refuses.
    """
    path = Path(name)
    if path.exists():
        return path
    if not _HUB_ID.fullmatch(name) or name.endswith(".gguf"):
        raise ModelError(
            f"MODEL {name}: no such file or folder (and not a hub id, which looks like owner/name)"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelError(
            f"MODEL {name} is not a local path; to fetch it from the hub: "
            f"pip install 'longrope-export[hub]'"
        ) from error
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                local_files_only=local_files_only,
                allow_patterns=_HUB_SETTINGS + _HUB_WEIGHTS * weights,
            )
        )
    except Exception as error:  # the hub client raises many kinds; all mean that it is not there
        raise ModelError(f"MODEL {name}: no such path, and the hub answers: {error}") from error


def load_model(path: Path) -> Model:
    """Read the geometry of a model.

    Raises:
        ModelError: the path is neither a folder with a config.json nor a GGUF file, or damaged.
    """
    if is_hf_folder(path):
        return _from_hf(read_hf_config(path))
    if path.is_dir():
        raise ModelError(f"{path}: no config.json in this folder: not a Hugging Face model")
    if not path.is_file():
        raise ModelError(f"{path}: no such file or folder")
    return _from_gguf(read_header(path))


def header_of(model: Model) -> GgufHeader:
    """The header of a GGUF, parsed again only if the file has changed since the model was loaded.

    Raises:
        GgufError: it cannot be read any more.
    """
    assert model.gguf_header is not None, f"{model.path} is no GGUF"
    return latest(model.gguf_header)


def check_fits(config: LongRopeConfig, model: Model, source: str) -> None:
    """Refuse factors that were made for another model.

    Raises:
        FactorFileError: naming file, field, expected, got, and what to do.
    """
    native = model.native
    advice = f"these factors are for another model than {model.path}"
    for name in ("rotary_dim", "rope_theta"):
        expected, got = getattr(native, name), getattr(config, name)
        if abs(got - expected) > 1e-6 * expected:
            raise FactorFileError(
                f"{source}: {name} is {got:g}, the model has {expected:g}: {advice}"
            )
    layer_lists = {"layers": config.layers or ()}
    if config.logit_scaling:
        layer_lists["logit_scaling.exempt_layers"] = config.logit_scaling.exempt_layers
    for name, layers in layer_lists.items():
        if layers and max(layers) >= model.num_layers:
            raise FactorFileError(
                f"{source}: {name} names layer {max(layers)}, the model has {model.num_layers} "
                f"(0..{model.num_layers - 1}): {advice}"
            )


def _refuse_without_rope(path: Path, model_type: str) -> None:
    if model_type in WITHOUT_ROPE:
        raise ModelError(
            f"{path}: a {model_type} has no rotary position embedding (RoPE), expected a model with "
            f"one: there are no factors to give it"
        )


def _from_hf(config: HfConfig) -> Model:
    _refuse_without_rope(config.folder, str(config.get("model_type", "")))
    digest = hashlib.sha256(config.path.read_bytes())
    for shard in sorted(config.folder.glob("*.safetensors")):
        digest.update(f"{shard.name} {shard.stat().st_size}\n".encode())
    return Model(
        path=config.folder,
        kind=ModelKind.HF,
        family=config.family,
        architecture=config.architecture or str(config.get("model_type", "")),
        num_layers=config.require_int("num_hidden_layers"),
        num_heads=config.require_int("num_attention_heads"),
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        native=native_of_hf(config),
        fingerprint=digest.hexdigest(),
        has_longrope=config.rope.rope_type == "longrope",
        has_definition=read_definition(config) is not None,
    )


def _from_gguf(header: GgufHeader) -> Model:
    def count(name: str, default: int | None = None) -> int:
        value = header.arch_get(name, default)
        if hasattr(value, "max") and len(value):  # one value per layer
            value = int(value.max())
        if not isinstance(value, int) or value <= 0:
            raise ModelError(f"{header.path}: key {header.architecture}.{name} is {value!r}")
        return value

    _refuse_without_rope(header.path, header.architecture)
    with header.path.open("rb") as file:
        digest = hashlib.sha256(file.read(header.data_start_bytes))
    digest.update(str(header.file_bytes).encode())
    heads = count("attention.head_count")
    native = native_of_gguf(header)
    return Model(
        path=header.path,
        kind=ModelKind.GGUF,
        family=family_of_gguf(header.architecture),
        architecture=header.architecture,
        num_layers=count("block_count"),
        num_heads=heads,
        num_key_value_heads=count("attention.head_count_kv", heads),
        head_dim=gguf_head_dim(header),
        native=native,
        fingerprint=digest.hexdigest(),
        has_longrope=native.provenance.get("method") == "model (longrope)",
        has_definition=has_our_keys(header),
        gguf_header=header,
    )
