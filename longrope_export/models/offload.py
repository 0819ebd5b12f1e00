"""Models larger than their device: a decoder layer's weights come when it runs and go afterwards.

accelerate's hooks do the work, on whole layers, so that what is computed in pieces inside of a
layer reads its weights once. Embeddings, the last norm and the output head stay on the device.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from longrope_export.errors import ConfigError, ModelError, UnsupportedError
from longrope_export.evaluate.memory_use import give_back_large_blocks
from longrope_export.models.torch_model import load_torch_model

PLACES = ("cpu", "disk")
NOT_MOVED = "past_key_values"  # of a layer's arguments; a cache moves by itself


@dataclass(frozen=True)
class Offload:
    """Where the weights of the layers are while they are not used.

    Attributes:
        place: "cpu": in CPU memory, for a GPU. "disk": in the checkpoint's own safetensors.
        folder: made if needed; there transformers writes, once for each loaded model, weights that
            it keeps in another shape than the checkpoint (the experts of a mixture), in the dtype
            that is computed in. None: a temporary folder.

    Raises:
        ConfigError: an unknown place.
    """

    place: str
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.place not in PLACES:
            raise ConfigError(f"offload must be one of {', '.join(PLACES)}, got {self.place!r}")

    def check(self, path: Path, device: str) -> None:
        """Refuse what would save nothing, before anything is loaded.

        Raises:
            ConfigError: "cpu" for a model that runs on the CPU.
            UnsupportedError: "disk" for a model that is not in safetensors.
        """
        if self.place == "cpu" and device.partition(":")[0] == "cpu":
            raise ConfigError(
                "offload cpu keeps weights in CPU memory while a GPU computes, got device "
                f"{device}: it would save nothing; use offload disk"
            )
        if self.place == "disk" and not (path.is_dir() and any(path.glob("*.safetensors"))):
            raise UnsupportedError(
                f"{path}: offload disk reads a folder's *.safetensors layer by layer, and there "
                "are none; transformers would unpack a GGUF as a whole in memory: write a folder "
                "first with `longrope-export safetensors MODEL -o FOLDER`"
            )


def load_offloaded_model(path: Path, dtype: str, device: str, offload: Offload) -> Any:
    """transformers' model of a folder or a GGUF, in eval mode, layers offloaded.

    Args:
        dtype: float32, float16, bfloat16; a checkpoint in another is converted at every use.
        device: as torch names it; everything is computed there.

    Raises:
        ConfigError, UnsupportedError: see Offload.check.
        UnsupportedError: torch, transformers or accelerate is not installed.
        ModelError: transformers cannot load it.
    """
    offload.check(path, device)
    give_back_large_blocks()  # else the heap keeps holes of the layers' sizes
    if offload.place == "cpu":
        model, _ = load_torch_model(path, dtype)
        offload_to_cpu(model, device)
        return model
    return _on_disk(path, dtype, device, offload.folder)


def offload_to_cpu(model: Any, device: str) -> None:
    """Leave the weights of the layers of a model in CPU memory, and bring all else to a device.

    Raises:
        UnsupportedError: accelerate is not installed.
    """
    hooks = _accelerate_hooks()
    for name, part in _parts(model).items():
        if not _is_layers(name):
            part.to(device)
    for layer in model.get_decoder().layers:
        _hook(hooks, layer, device, None)


class LayerWeights(Mapping[str, Any]):
    """Tensors of one layer by their names in it, read when they are asked for.

    On the CPU an unchanged tensor is a view of the mapped checkpoint, as in a resident model. A
    rewritten one is copied, because the resident model's lies in memory of its own, and a matrix
    product may round otherwise at another alignment.

    Args:
        stored: accelerate's OffloadedWeightsLoader of the whole model.
        prefix: of the layer's names in it.
        rewritten: the folder of the weights that transformers wrote.
    """

    def __init__(self, stored: Any, prefix: str, rewritten: str) -> None:
        self._stored, self._prefix, self._rewritten = stored, prefix, rewritten

    def __getitem__(self, name: str) -> Any:
        key = self._prefix + name
        tensor = self._stored[key]
        file = Path(self._stored.index[key]["safetensors_file"])
        return tensor.clone() if file.is_relative_to(self._rewritten) else tensor

    def __iter__(self) -> Iterator[str]:
        keys = (key for key in self._stored if key.startswith(self._prefix))
        return (key.removeprefix(self._prefix) for key in keys)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _on_disk(path: Path, dtype: str, device: str, folder: Path | None) -> Any:
    hooks = _accelerate_hooks()
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # it warns of the weights that are not in memory, which is what was asked for
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    rewritten = tempfile.mkdtemp(prefix="longrope-offload-", dir=folder)
    remove = partial(shutil.rmtree, rewritten, ignore_errors=True)
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            skeleton = transformers.AutoModelForCausalLM.from_config(config)
        parts = _parts(skeleton)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            device_map={name: "disk" if _is_layers(name) else device for name in parts},
            offload_folder=rewritten,
        )
    except Exception as error:  # many kinds, from many libraries
        remove()
        raise ModelError(f"{path}: transformers cannot load it: {error}") from error
    weakref.finalize(model, remove)
    prefix = next(filter(_is_layers, parts))
    for index, layer in enumerate(model.get_decoder().layers):
        # transformers has put a hook on each part of a layer: one for the whole takes their place
        found = [getattr(part, "_hf_hook", None) for part in layer.modules()]
        stored = next(hook.weights_map.dataset for hook in found if hook and hook.offload)
        hooks.remove_hook_from_module(layer, recurse=True)
        _hook(hooks, layer, device, LayerWeights(stored, f"{prefix}.{index}.", rewritten))
    return model.eval()


def _hook(hooks: Any, layer: Any, device: str, weights: Any) -> None:
    """Args: weights: name of a parameter in the layer -> tensor; None: what the layer has."""
    hook = hooks.AlignDevicesHook(
        execution_device=device,
        offload=True,
        weights_map=weights,
        place_submodules=True,
        skip_keys=NOT_MOVED,
    )
    hooks.add_hook_to_module(layer, hook)


def _parts(model: Any) -> dict[str, Any]:
    """The modules of a causal language model by name, the decoder taken apart into its own."""
    decoder = model.get_decoder()
    parts: dict[str, Any] = {}
    for name, part in model.named_children():
        if part is decoder:
            parts |= {f"{name}.{key}": child for key, child in part.named_children()}
        else:
            parts[name] = part
    return parts


def _is_layers(name: str) -> bool:
    return name.rpartition(".")[2] == "layers"


def _accelerate_hooks() -> Any:
    try:
        import accelerate.hooks
    except ImportError as error:
        raise UnsupportedError(
            f"offloading needs accelerate: {error}; pip install 'longrope-export[offload]'"
        ) from error
    return accelerate.hooks
