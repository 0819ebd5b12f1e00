"""Sequence parallelism and FSDP2 by two gloo processes against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_reference import toy_config, toy_model
from parallel_ranks import CASES, LENGTH, STEPS, Case, make, rows
from safetensors.torch import load_file
from torch import Tensor

from longrope_export.errors import LongRopeError, UnsupportedError
from longrope_export.finetune.distributed import (
    enable_fsdp_on_cpu,
    fsdp_arguments,
    process_group,
    sequence_group,
)
from longrope_export.finetune.gathered_attention import chunk_starts
from longrope_export.finetune.sequence_parallel import (
    count_targets,
    sequence_parallel,
    shard_loss,
    shard_row,
)
from longrope_export.hf_runtime import apply_longrope

RANKS = Path(__file__).with_name("parallel_ranks.py")


def run_ranks(what: str, folder: Path, processes: int = 2) -> None:
    """parallel_ranks.py under torchrun, which finds a free port by itself."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    paths = [str(RANKS.parent.parent), str(RANKS.parent.parent / "converters")]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, *launcher, str(RANKS), what, str(folder)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-6000:]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Case -> what two ranks computed."""
    folder = tmp_path_factory.mktemp("sequence")
    run_ranks("sequence", folder)
    results: dict[str, Any] = torch.load(folder / "results.pt")
    return results


def whole(case: Case) -> dict[str, Any]:
    """Logits, loss and gradients of a case by this process and transformers' own attention."""
    model, batch = make(case), rows(case)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    if (positions := batch.get("position_ids")) is not None:
        inputs["position_ids"] = positions
    if case.rows == "jumping":  # one text, whatever the positions; packed rows are found by them
        inputs["attention_mask"] = torch.ones_like(batch["input_ids"])
    logits = model(**inputs, use_cache=False).logits
    following = batch["labels"][:, 1:].clone()
    if (documents := batch.get("document_ids")) is not None:
        following[documents[:, 1:] != documents[:, :-1]] = -100
    if (mask := batch.get("attention_mask")) is not None:
        following[mask[:, :-1] == 0] = -100
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), following.flatten())
    loss.backward()
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {"logits": logits.detach(), "loss": loss.detach(), "gradients": gradients}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.fault])
def test_two_ranks_compute_what_one_does(name: str, sharded: dict[str, Any]) -> None:
    case, found = CASES[name], sharded[name]
    expected = whole(case)
    real = rows(case).get("attention_mask", torch.ones(2, LENGTH)) != 0
    torch.testing.assert_close(
        found["logits"][real], expected["logits"][real], atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(found["loss"], expected["loss"], atol=1e-5, rtol=0)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for parameter, gradient in expected["gradients"].items():
        torch.testing.assert_close(
            found["gradients"][parameter], gradient, atol=1e-5, rtol=1e-5, msg=parameter
        )


def test_local_positions_would_be_noticed(sharded: dict[str, Any]) -> None:
    expected, found = whole(CASES["local positions"]), sharded["local positions"]
    assert (found["logits"] - expected["logits"]).abs().max() > 1e-2
    assert (found["loss"] - expected["loss"]).abs() > 1e-4


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Number of processes -> folder of what Trainer did."""
    folders = {}
    for processes in (1, 2):
        folders[processes] = tmp_path_factory.mktemp(f"train{processes}")
        run_ranks("train", folders[processes], processes)
    return folders


@pytest.mark.parametrize("name", ["whole", "resumed"])
def test_fsdp_trains_as_one_process_does(name: str, trained: dict[int, Path]) -> None:
    one, two = (json.loads((trained[n] / "histories.json").read_text()) for n in (1, 2))
    assert {"FSDPLlamaForCausalLM", "FSDPLlamaDecoderLayer"} <= set(two[f"{name} parts"])
    assert len(two[name]) == STEPS
    torch.testing.assert_close(
        torch.tensor(two[name]), torch.tensor(one["whole"]), atol=1e-4, rtol=0
    )
    weights, expected = (load_file(trained[n] / f / "model.safetensors") for n, f in ((2, name), (1, "whole")))  # fmt: skip
    begin = make(Case()).state_dict()
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, atol=1e-4, rtol=0, msg=key)
    assert max((begin[key] - value).abs().max() for key, value in expected.items()) > 5e-3


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_shards_make_up_the_row(world: int) -> None:
    batch = rows(CASES["packed documents"])
    parts = [shard_row(batch, rank, world) for rank in range(world)]
    chunk = parts[0]["input_ids"].shape[1] // 2
    padded = torch.full((2, 2 * world * chunk), -7)
    for name in ("input_ids", "position_ids", "document_ids", "targets"):
        row = padded.clone()
        for rank, part in enumerate(parts):
            for start, half in zip(
                chunk_starts(rank, world, chunk), part[name].chunk(2, 1), strict=True
            ):
                row[:, start : start + chunk] = half
        assert not (row == -7).any()
        if name == "targets":  # none is lost at an edge, and none crosses documents
            inside = batch["document_ids"][:, 1:] == batch["document_ids"][:, :-1]
            expected = batch["labels"][:, 1:].masked_fill(~inside, -100)
            torch.testing.assert_close(row[:, : LENGTH - 1], expected)
            assert (row[:, LENGTH - 1 :] == -100).all()
        else:
            torch.testing.assert_close(row[:, :LENGTH], batch[name])


def test_shards_are_dealt_as_torch_deals_them() -> None:
    from torch.distributed.tensor.experimental._context_parallel._load_balancer import (
        _HeadTailLoadBalancer,
    )

    dealt = _HeadTailLoadBalancer(24, 3, "cpu")._generate_indices()
    ids = torch.arange(24)[None]
    ours = [shard_row({"input_ids": ids}, rank, 3)["input_ids"] for rank in range(3)]
    torch.testing.assert_close(torch.cat(ours, dim=1), dealt.view(1, -1).to(ids))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"pixels": torch.ones(2, LENGTH)}, "unknown keys ['pixels']"),
        ({"position_ids": torch.arange(LENGTH)}, "position_ids has shape (21,)"),
        ({"targets": torch.ones(2, LENGTH)}, "labels and targets"),
    ],
)
def test_odd_batches_are_refused(change: dict[str, Tensor], told: str) -> None:
    with pytest.raises(LongRopeError) as caught:
        shard_row({**rows(Case()), **change}, 0, 2)
    assert told in str(caught.value)
    with pytest.raises(LongRopeError, match=r"expected 0\.\.1"):
        shard_row(rows(Case()), 2, 2)


def test_what_a_shard_would_compute_wrongly_is_refused() -> None:
    model = toy_model()
    original = model.config._attn_implementation
    with pytest.raises(LongRopeError, match="process_group"), sequence_parallel(model):
        pass
    with process_group("cpu") as place:
        assert (place.rank, place.world, str(place.device)) == (0, 1, "cpu")
        runtime = apply_longrope(model, toy_config(model))
        with sequence_parallel(model) as parallel:
            shard = parallel.shard({"input_ids": rows(Case())["input_ids"]})
            with pytest.raises(UnsupportedError, match="3 tiers and none is frozen"):
                model(**shard)
            runtime.freeze(-1)
            for change, told in (
                ({"position_ids": None}, "got none"),
                ({"attention_mask": torch.ones(2, 22)}, "give it to shard"),
            ):
                with pytest.raises(UnsupportedError, match=told):
                    model(**{**shard, **change})
            with pytest.raises(UnsupportedError, match="got 3 of them"):
                model(shard["input_ids"][:, :3], position_ids=shard["position_ids"][:, :3])
            output = model(**shard)
            assert output.past_key_values is None
        assert model.config._attn_implementation == original
        expected = model(rows(Case())["input_ids"]).logits
        torch.testing.assert_close(output.logits[:, :LENGTH], expected, atol=1e-5, rtol=1e-5)
        with pytest.raises(UnsupportedError, match="needs CUDA"), sequence_parallel(model, backend="context"):  # fmt: skip
            pass
        with pytest.raises(LongRopeError, match="gather, context"), sequence_parallel(model, backend="ring"):  # fmt: skip
            pass
        with pytest.raises(LongRopeError, match="only once"), process_group("cpu"):
            pass
        with pytest.raises(LongRopeError, match="divisor of 1"):
            sequence_group(2)


def test_a_shard_without_targets_has_no_loss_and_no_gradient() -> None:
    logits = torch.randn(1, 4, 9, requires_grad=True)
    targets = torch.full((1, 4), -100)
    with process_group("cpu"):
        assert count_targets(targets) == 0
    loss = shard_loss(logits, targets, 0, 2)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None and not logits.grad.any()


def test_fsdp_is_not_put_on_a_trainer_without_it() -> None:
    state = SimpleNamespace(device=torch.device("cpu"))
    trainer = SimpleNamespace(
        args=SimpleNamespace(fsdp_plugin_args=None, fsdp=None),
        accelerator=SimpleNamespace(state=state),
    )
    assert fsdp_arguments()["fsdp_config"]["version"] == 2
    with pytest.raises(LongRopeError, match="fsdp_arguments"):
        enable_fsdp_on_cpu(trainer)
