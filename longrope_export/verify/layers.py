"""The layer at which a runtime leaves the reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from longrope_export.runtimes.base import Runtime, TellsLayers
from longrope_export.verify.plan import Case, Row

Hidden = npt.NDArray[np.float32]

#: tokens up to a miss at which layers are compared: their outputs are smaller than the weights
MOST_TOKENS = 2048
# of |output - reference| / |reference|, both over the channels of each token
LAYER_LIMITS: dict[str, float] = {"fp32": 2e-5, "fp16": 2e-2, "bf16": 5e-2, "unpacked": 0.12}
_COARSE = 0.3  # quantized weights against the source's


def layer_outputs_of(
    runtime: Runtime, case: Case, rows: Sequence[Row], row: Row, tokens: Sequence[int]
) -> Hidden | None:
    """Run a case again up to a row.

    Args:
        rows: of the case, see rows_of.
        row: one of them. A sequence of a batch is run alone.

    Returns:
        (layers, n, width) what each layer hands to the next one, at the row's token and those in
        front of it, at most MOST_TOKENS; None if the runtime does not tell.
    """
    if not isinstance(runtime, TellsLayers):
        return None
    index = row.position - case.origin
    wanted = range(max(0, index + 1 - MOST_TOKENS), index + 1)
    if case.batch:
        length = case.batch[rows.index(row) // case.batch_keep]
        return runtime.layer_outputs([tokens[:length]], wanted, declared_length=length)
    calls, end = [], 0
    for append in case.appends:
        calls.append(tokens[end : end + append.count])
        end += append.count
        if index < end:
            break
    return runtime.layer_outputs(
        calls,
        wanted,
        declared_length=case.declared_length,
        chunk_size=case.chunk_size,
        first_position=case.origin,
    )


def first_departure(outputs: Hidden, expected: Hidden, limit: float) -> int | None:
    """Index of the first layer whose output is off by more than `limit` at a token; None if none is.

    Args:
        outputs, expected: (layers, n, width).
        limit: of |output - expected| / |expected|; NaN is beyond it.
    """
    for layer, (got, right) in enumerate(zip(outputs, expected, strict=True)):
        error = np.linalg.norm(got - right, axis=1) / np.linalg.norm(right, axis=1)
        if not error.max() <= limit:
            return layer
    return None


def layer_limit(precision: str) -> float:
    """See LAYER_LIMITS."""
    return LAYER_LIMITS.get(precision, _COARSE)
