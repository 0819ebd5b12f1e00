"""Split GGUF models: PREFIX-00001-of-00003.gguf and so on, as llama.cpp names them.

New keys and tensors go to the first shard, which also holds the total number of tensors; the
other shards stay as they are.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from longrope_converters.to_gguf.bake import HeaderEdit, bake_gguf, split_position
from longrope_export.errors import GgufError
from longrope_export.gguf_format import GgufHeader, read_header
from longrope_export.outputs import replace_when_done


def read_shards(header: GgufHeader) -> tuple[GgufHeader, ...]:
    """The headers of all files of a model, the first shard's first; one for a model in one file.

    Args:
        header: of the first shard.

    Raises:
        GgufError: it is a later shard's, its file is not named as llama.cpp expects, or one is
            missing or belongs to another model.
    """
    path = header.path
    number, count = split_position(header)
    if count == 1:
        return (header,)
    suffix = f"-{number + 1:05d}-of-{count:05d}.gguf"
    if not path.name.endswith(suffix):
        raise GgufError(
            f"{path}: is shard {number + 1} of {count}, so its name must end in {suffix}: rename it"
        )
    names = _names(path.name.removesuffix(suffix), path, count)
    if number != 0:
        raise GgufError(f"{path}: is shard {number + 1} of {count}: give the first one, {names[0]}")
    shards = [header]
    for index, shard in enumerate(names[1:], start=1):
        if not shard.is_file():
            raise GgufError(f"{shard}: shard {index + 1} of {count} is missing; fetch it again")
        shards.append(read_header(shard))
        if split_position(shards[-1]) != (index, count):
            raise GgufError(f"{shard}: is not shard {index + 1} of {count}: fetch it again")
    return tuple(shards)


def shard_outputs(output: Path, count: int) -> tuple[Path, ...]:
    """Names of all files that `bake_split` writes for `output`, the first shard first.

    `output` is one file name for the whole (`model.gguf`) or the name of the first shard.
    """
    if count == 1:
        return (output,)
    prefix = output.name.removesuffix(f"-00001-of-{count:05d}.gguf").removesuffix(".gguf")
    return _names(prefix, output, count)


def bake_split(
    shards: Sequence[GgufHeader],
    outputs: Sequence[Path],
    edit: HeaderEdit,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the edited first shard, and hard links to the others (copies where links fail).

    The first shard appears under its name last, so an interrupted run leaves no model that loads.
    Works for a model in one file too.

    Args:
        shards: from `read_shards`.
        outputs: from `shard_outputs`, checked by the caller with `outputs.check_output`.
        edit: the changes.
        progress: called with the number of bytes written since the last call.

    Raises:
        GgufError: the edit does not fit.
        OutputError: an output cannot be written; none of them is left behind half done.
    """
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(replace_when_done(outputs[0]))
        bake_gguf(shards[0], first, edit, progress)
        for shard, output in zip(shards[1:], outputs[1:], strict=True):
            if output.exists() and output.samefile(shard.path):
                continue
            temporary = stack.enter_context(replace_when_done(output))
            try:
                os.link(shard.path.resolve(), temporary)
            except OSError:
                import shutil  # slow to import, hardly ever needed

                shutil.copyfile(shard.path, temporary)


def is_own_link(output: Path, shard: GgufHeader) -> bool:
    """Whether an output is the hard link that an earlier `bake_split` made of this shard."""
    return (
        output.exists() and output.samefile(shard.path) and output.resolve() != shard.path.resolve()
    )


def _names(prefix: str, beside: Path, count: int) -> tuple[Path, ...]:
    return tuple(
        beside.with_name(f"{prefix}-{number:05d}-of-{count:05d}.gguf")
        for number in range(1, count + 1)
    )
