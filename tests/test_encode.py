"""Encoded weights against gguf.quants.quantize, the kernels of the stock converter, bit for bit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from longrope_converters.to_gguf import encode
from longrope_converters.to_gguf.encode import SAME_TYPE, Encoder, encoded_bytes

F32, F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
BF16, Q8_0 = GGMLQuantizationType.BF16, GGMLQuantizationType.Q8_0

PAIRS = [
    (dtype, target)
    for dtype in ("BF16", "F16", "F32")
    for target in (F32, F16, BF16, Q8_0)
    if SAME_TYPE[dtype] != target
]
_BITS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}


def reference(
    bits: npt.NDArray[np.uint16 | np.uint32], dtype: str, target: GGMLQuantizationType
) -> bytes:
    """What convert_hf_to_gguf.py writes: BF16 is widened exactly, the rest is gguf.quants."""
    if dtype == "BF16":
        values = (bits.astype(np.uint32) << 16).view(np.float32)
    else:
        values = bits.view(np.float16 if dtype == "F16" else np.float32)
    with np.errstate(all="ignore"):
        return quantize(values.reshape(1, -1), target).tobytes()


def check(
    bits: npt.NDArray[np.uint16 | np.uint32], dtype: str, target: GGMLQuantizationType
) -> None:
    encoded = Encoder(bits.size).encode(bits.view(np.uint8), dtype, target)
    expected = np.frombuffer(reference(bits, dtype, target), np.uint8)
    different = np.flatnonzero(encoded != expected)
    assert encoded.size == expected.size == encoded_bytes(bits.size, target)
    assert different.size == 0, f"{different.size} bytes differ, first at {different[:1]}"


@pytest.mark.parametrize(("dtype", "target"), PAIRS)
def test_random_weights_match_the_stock_kernels(dtype: str, target: GGMLQuantizationType) -> None:
    values = np.random.default_rng(1).standard_normal(1 << 16, dtype=np.float32) * 0.02
    check(_narrow(values, dtype), dtype, target)


@pytest.mark.parametrize("target", [F32, F16, Q8_0])
def test_every_bf16_value_matches(target: GGMLQuantizationType) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    check(bits, "BF16", target)
    check(np.flip(bits).copy(), "BF16", target)


@pytest.mark.parametrize("target", [F32, BF16, Q8_0])
def test_every_f16_value_matches(target: GGMLQuantizationType) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    check(bits, "F16", target)


@pytest.mark.parametrize("target", [F16, BF16])
def test_every_upper_half_of_a_float32_matches_at_its_rounding_border(
    target: GGMLQuantizationType,
) -> None:
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    check(np.bitwise_or.outer(upper, lower).reshape(-1), "F32", target)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_q8_0_rounds_halves_away_from_zero(dtype: str) -> None:
    # a block maximum of 127 makes the scale 1, so x.5 stays an exact tie
    ties = np.arange(-126.5, 127, 1, dtype=np.float32)
    values = np.zeros((ties.size, 32), np.float32)
    values[:, 0], values[:, 1], values[:, 2] = 127, ties, -ties
    if dtype == "F32":
        values[:, 3] = np.nextafter(ties, 0)
        values[:, 4] = np.nextafter(ties, np.float32(np.inf))
    check(_narrow(values.reshape(-1), dtype), dtype, Q8_0)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("exponent", range(-149, 128, 3))
def test_q8_0_matches_at_every_magnitude(dtype: str, exponent: int) -> None:
    values = np.random.default_rng(exponent + 149).uniform(-1, 1, 320).astype(np.float32)
    with np.errstate(all="ignore"):
        scaled = np.ldexp(values, exponent)
    scaled[:32] = 0
    check(_narrow(scaled, dtype), dtype, Q8_0)


@pytest.mark.parametrize(("dtype", "target"), PAIRS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_arbitrary_bits_match(
    dtype: str, target: GGMLQuantizationType, data: st.DataObject
) -> None:
    size = 32 * data.draw(st.integers(1, 6))
    check(data.draw(hnp.arrays(_BITS[dtype], size)), dtype, target)


@pytest.mark.parametrize(("dtype", "target"), PAIRS)
def test_steps_join_without_a_seam(
    dtype: str, target: GGMLQuantizationType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_STEP", 64)
    values = np.random.default_rng(3).standard_normal(64 * 5 + 32, dtype=np.float32)
    check(_narrow(values, dtype), dtype, target)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_the_same_type_is_returned_untouched(dtype: str) -> None:
    source = np.arange(64, dtype=np.uint8)
    assert Encoder(32).encode(source, dtype, SAME_TYPE[dtype]) is source


def _narrow(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.uint16 | np.uint32]:
    """Bits of `values` in the source dtype (BF16 by truncation)."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    if dtype == "F16":
        with np.errstate(all="ignore"):
            return values.astype(np.float16).view(np.uint16)
    return values.view(np.uint32)
