"""Write a random-weight bf16 Llama with a real tokenizer, as a Hugging Face folder.

    python benchmarks/synthetic_llama.py FOLDER SmolLM2-135M-Instruct.Q4_1.gguf --size 1.0

Size 1 is 3.08 GB in four shards, with 201 tensors.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Model:
    """Sizes of the checkpoint; heads of 64, grouped by four."""

    layers: int = 22
    hidden: int = 2048
    vocab: int = 49152  # SmolLM2's
    shards: int = 4

    @classmethod
    def of_size(cls, size: float) -> Model:
        """About `size` times the full 3.08 GB; width and depth shrink alike."""
        root = math.sqrt(size)
        return cls(max(1, round(22 * root)), max(256, 256 * round(8 * root)))

    @property
    def intermediate(self) -> int:
        return 4 * self.hidden

    @property
    def heads(self) -> int:
        return self.hidden // 64

    @property
    def kv_heads(self) -> int:
        return self.heads // 4

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape (rows first) of every tensor."""
        head_dim = self.hidden // self.heads
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            yield f"{prefix}.mlp.down_proj.weight", (self.hidden, self.intermediate)
            yield f"{prefix}.mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}.mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
            yield f"{prefix}.self_attn.k_proj.weight", (self.kv_heads * head_dim, self.hidden)
            yield f"{prefix}.self_attn.o_proj.weight", (self.hidden, self.heads * head_dim)
            yield f"{prefix}.self_attn.q_proj.weight", (self.heads * head_dim, self.hidden)
            yield f"{prefix}.self_attn.v_proj.weight", (self.kv_heads * head_dim, self.hidden)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 8192,
            "rope_theta": 100000.0,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


def make_checkpoint(folder: Path, model: Model, tokenizer_gguf: Path) -> None:
    """Write config.json, safetensors shards with an index, and the tokenizer of a GGUF."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoTokenizer

    write_folder(folder, model)
    tokenizer = AutoTokenizer.from_pretrained(
        str(tokenizer_gguf.parent.resolve()), gguf_file=tokenizer_gguf.name
    )
    tokenizer.save_pretrained(folder)


def write_folder(folder: Path, model: Model) -> None:
    """Write config.json and safetensors shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config(), indent=2))
    _write_weights(folder, model)


def _write_weights(folder: Path, model: Model) -> None:
    tensors = list(model.tensors())
    # Gaussian weights out of one pool: drawing 1.5 billion anew would take longer than the benchmark
    gaussian = np.random.default_rng(0).standard_normal(1 << 24, dtype=np.float32) * 0.02
    pool = (gaussian.view(np.uint32) >> 16).astype("<u2")
    weight_map = {}
    total_bytes = sum(2 * int(np.prod(shape)) for _, shape in tensors)
    groups = _split_evenly(tensors, model.shards)
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        header, offset = {}, 0
        for tensor, shape in group:
            end = offset + 2 * int(np.prod(shape))
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
            weight_map[tensor], offset = name, end
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with (folder / name).open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            for index, (_, shape) in enumerate(group):
                left = int(np.prod(shape))
                start = index * 4099 % pool.size
                while left:
                    part = pool[start : start + left]
                    file.write(part.tobytes())
                    left, start = left - part.size, 0
    index_json = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json))


def _split_evenly(
    tensors: list[tuple[str, tuple[int, ...]]], parts: int
) -> list[list[tuple[str, tuple[int, ...]]]]:
    total = sum(int(np.prod(shape)) for _, shape in tensors)
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(parts)]
    seen = 0
    for tensor in tensors:
        groups[min(parts - 1, seen * parts // total)].append(tensor)
        seen += int(np.prod(tensor[1]))
    return [group for group in groups if group]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokenizer_gguf", type=Path)
    parser.add_argument("--size", type=float, default=1.0)
    options = parser.parse_args()
    make_checkpoint(options.folder, Model.of_size(options.size), options.tokenizer_gguf)
