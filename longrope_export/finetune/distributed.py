"""Several processes for one training: the process group, and FSDP2 by transformers' Trainer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from longrope_export.errors import LongRopeError, ToolError
from longrope_export.models.torch_model import default_device

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


PATIENCE = timedelta(days=2)  # the others wait while the first process measures


@dataclass(frozen=True)
class Place:
    """Where this process stands.

    Attributes:
        rank: 0 <= rank < world.
        world: number of processes.
        device: its own.
    """

    rank: int
    world: int
    device: torch.device | None

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0


ALONE = Place(0, 1, None)


@contextmanager
def process_group(device: str | None = None) -> Iterator[Place]:
    """Join the processes that torchrun started; without torchrun, be the only one.

    Args:
        device: "cpu" (gloo) or "cuda" (nccl, one GPU for each process); None: CUDA if it is there.

    Raises:
        LongRopeError: another device, a process group that is there already, or more processes on
            this machine than GPUs.
        ToolError: the processes do not find each other.
    """
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    if dist.is_initialized():
        raise LongRopeError("this process is in a process group already: join one only once")
    kind = device or default_device()
    if kind not in ("cpu", "cuda"):
        raise LongRopeError(f"device {kind!r}: expected cpu or cuda")
    own = torch.device(kind)
    if kind == "cuda":
        index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if index >= count:
            raise LongRopeError(
                f"local rank {index}, but this machine has {count} GPUs; start torchrun with "
                f"--nproc-per-node {count} or use device cpu"
            )
        own = torch.device("cuda", index)
        torch.cuda.set_device(own)
    backend = "nccl" if kind == "cuda" else "gloo"
    try:
        if is_launched():
            dist.init_process_group(backend, timeout=PATIENCE)
        else:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    except (RuntimeError, ValueError) as error:
        raise ToolError(
            f"the process group ({backend}) cannot be made: {error}; check that torchrun reaches "
            f"all machines"
        ) from error
    try:
        yield Place(dist.get_rank(), dist.get_world_size(), own)
    finally:
        dist.destroy_process_group()


def is_launched() -> bool:
    """Whether torchrun started this process."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_torchelastic_launched()


def rank_and_world() -> tuple[int, int]:
    """Of the process group that this process is in; (0, 1) without one."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def wait_for_all() -> None:
    """Until every process has come here; nothing without a process group."""
    import torch.distributed as dist

    if rank_and_world()[1] > 1:
        dist.barrier()


def sequence_group(ranks: int) -> ProcessGroup:
    """The group of neighbouring ranks that share rows with this one; every process must call it.

    Args:
        ranks: in each group; the ranks of different groups are data-parallel replicas.

    Raises:
        LongRopeError: the processes cannot be divided so.
    """
    import torch.distributed as dist

    world = dist.get_world_size()
    if ranks < 1 or world % ranks:
        raise LongRopeError(
            f"groups of {ranks} ranks out of {world} processes: expected a divisor of {world}"
        )
    groups = [dist.new_group(list(range(first, first + ranks))) for first in range(0, world, ranks)]
    own: ProcessGroup = groups[dist.get_rank() // ranks]
    return own


def fsdp_arguments(*, activation_checkpointing: bool = False) -> dict[str, Any]:
    """TrainingArguments(**fsdp_arguments(), ...) for FSDP2: weights, gradients and optimizer state
    in slices, one on each process.

    Tried with transformers 5.23 and accelerate 1.15, two gloo processes on the CPU, and our
    runtime on the model before Trainer gets it: Trainer wraps the layers that the model names in
    `_no_split_modules`; trainer.save_model(), called on every process, writes one whole
    model.safetensors; train(resume_from_checkpoint=...) goes on as an unbroken run.

    `use_cpu=True` needs `enable_fsdp_on_cpu` besides. `gradient_checkpointing=True` does the same as
    activation_checkpointing, with one gathering of weights more in each backward pass.

    Args:
        activation_checkpointing: compute activations again in the backward pass.
    """
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "reshard_after_forward": True,
            "state_dict_type": "FULL_STATE_DICT",
            "cpu_ram_efficient_loading": False,
            "activation_checkpointing": activation_checkpointing,
        },
    }


def enable_fsdp_on_cpu(trainer: Any) -> None:
    """Make a Trainer with fsdp_arguments and use_cpu=True shard; call it before train().

    accelerate knows FSDP for accelerators only and trains with DDP on the CPU without a word
    (AcceleratorState, 1.15); this sets what it sets elsewhere. For rehearsals and tests.

    Raises:
        LongRopeError: the trainer was not made with fsdp_arguments, or is not on the CPU.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    arguments, state = trainer.args, trainer.accelerator.state
    if arguments.fsdp_plugin_args is None or state.device.type != "cpu":
        raise LongRopeError(
            f"enable_fsdp_on_cpu: fsdp = {arguments.fsdp}, device {state.device}; expected a Trainer "
            f"with TrainingArguments(use_cpu=True, **fsdp_arguments())"
        )
    plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    # each new AcceleratorState takes its kind from PartialState
    PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = plugin
    trainer.is_fsdp_enabled = True
