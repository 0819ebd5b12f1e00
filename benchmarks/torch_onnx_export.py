"""A model through torch.onnx.export (dynamo): the third way to ONNX that onnx_export.py measures.

    pip install onnxscript
    python benchmarks/torch_onnx_export.py model-folder/ output-folder/

The transformers model as it is, in float32, with a cache that goes in and comes out, every length
dynamic.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel


class WithCache(torch.nn.Module):
    """(batch, n) ids and the cache as a flat list of tensors, keys and values in turn."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
        )
        return out.logits, [part for layer in cache.layers for part in (layer.keys, layer.values)]


def export(folder: Path, output: Path) -> None:
    """Write output/model.onnx and its data."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rows, length, cached = 2, 3, 5
    shape = (rows, config.num_key_value_heads, cached, head_dim)
    past = [torch.zeros(shape) for _ in range(2 * config.num_hidden_layers)]
    inputs = {
        "input_ids": torch.ones(rows, length, dtype=torch.int64),
        "attention_mask": torch.ones(rows, cached + length, dtype=torch.int64),
        "position_ids": torch.arange(cached, cached + length).repeat(rows, 1),
        "past": past,
    }
    free = torch.export.Dim.DYNAMIC
    lengths = {0: free, 1: free}
    output.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        program = torch.onnx.export(
            WithCache(model).eval(),
            kwargs=inputs,
            dynamic_shapes={
                "input_ids": lengths,
                "attention_mask": lengths,
                "position_ids": lengths,
                "past": [{0: free, 2: free} for _ in past],
            },
            opset_version=23,
            dynamo=True,
        )
    assert program is not None
    program.save(output / "model.onnx", external_data=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    export(options.model, options.output)
