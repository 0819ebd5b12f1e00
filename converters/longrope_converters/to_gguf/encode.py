"""Turn BF16, F16 or F32 weights into F32, F16, BF16 or Q8_0, bit for bit as llama.cpp's converter.

The reference is `gguf.quants.quantize` applied to the weights widened to float32. The kernels here
give the same bytes with whole-array integer and float32 operations on pieces that stay in the
cache; numpy releases the interpreter lock in all of them, so threads add up. Values that make the
reference leave the ordinary path (NaN, infinity, blocks too small for a normal scale) are handed
to it, or looked up in a table made by it.

A type that needs no conversion is returned as it is. That is also where the one deliberate
difference lies: the stock converter sets the quiet bit of signalling NaNs on BF16 to BF16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize

Bytes = npt.NDArray[np.uint8]
_Unsigned = TypeVar("_Unsigned", np.uint16, np.uint32)

#: bytes per element of the source dtypes (safetensors names)
ITEM_BYTES: Mapping[str, int] = {"BF16": 2, "F16": 2, "F32": 4}

#: the ggml type that has the same bytes as a source dtype
SAME_TYPE: Mapping[str, GGMLQuantizationType] = {
    "BF16": GGMLQuantizationType.BF16,
    "F16": GGMLQuantizationType.F16,
    "F32": GGMLQuantizationType.F32,
}

TARGET_TYPES = frozenset((*SAME_TYPE.values(), GGMLQuantizationType.Q8_0))

_Q8_0_BLOCK = 32
_Q8_0_DTYPE = np.dtype([("scale", "<f2"), ("values", "V32")])

# Elements handled at once: the few temporaries of this size stay in the caches, and each step is
# long enough that the interpreter lock between numpy calls does not keep threads apart.
_STEP = 1 << 17

# Block maxima below this make 1 / (maximum / 127) overflow, or lose bits of the scale.
_F32_SMALL = np.float32(2.0**-100)
# Sign bit apart, the bits of nextafter(0.5, 0): adding it and truncating rounds halves away from 0
_BELOW_HALF = np.uint32(0x3EFF_FFFF)

# BF16 magnitudes whose value is a normal float16: exponents -14 to 15
_BF16_F16_LOW, _BF16_F16_COUNT = np.uint16(0x3880), np.uint16(0x4780 - 0x3880)


def encoded_bytes(num_elements: int, target: GGMLQuantizationType) -> int:
    """Size in bytes of `num_elements` (a multiple of 32 for Q8_0) encoded as `target`."""
    block_size, type_size = GGML_QUANT_SIZES[target]
    return num_elements // block_size * type_size


class Encoder:
    """Encodes runs of up to `max_elements` weights. It owns its buffers: use one per thread."""

    def __init__(self, max_elements: int) -> None:
        self._out = np.empty(max_elements * 4, np.uint8)
        self._bits16 = np.empty((2, _STEP), np.uint16)
        self._bits32 = np.empty((2, _STEP), np.uint32)
        self._widened = np.empty(_STEP, np.float32)
        self._int8 = np.empty(_STEP, np.int8)
        self._mask = np.empty(_STEP, np.bool_)

    def encode(self, source: Bytes, dtype: str, target: GGMLQuantizationType) -> Bytes:
        """Encode a run of elements.

        Args:
            source: the raw little-endian bytes of the elements, contiguous.
            dtype: "BF16", "F16" or "F32".
            target: F32, F16, BF16 or Q8_0; for Q8_0 a multiple of 32 elements that starts at a
                multiple of 32 in its row.

        Returns:
            The encoded bytes: `source` itself where nothing changes, else a view of a buffer that
            the next call overwrites.
        """
        if SAME_TYPE[dtype] == target:
            return source
        num_elements = source.size // ITEM_BYTES[dtype]
        out = self._out[: encoded_bytes(num_elements, target)]
        # Rounding to float16 overflows to infinity by design, and the reference divides by zero.
        with np.errstate(all="ignore"):
            for start in range(0, num_elements, _STEP):
                stop = min(start + _STEP, num_elements)
                self._encode_step(
                    source[start * ITEM_BYTES[dtype] : stop * ITEM_BYTES[dtype]],
                    dtype,
                    out[encoded_bytes(start, target) : encoded_bytes(stop, target)],
                    target,
                )
        return out

    def _encode_step(
        self, source: Bytes, dtype: str, out: Bytes, target: GGMLQuantizationType
    ) -> None:
        if dtype == "BF16" and target == GGMLQuantizationType.F16:
            self._bf16_to_f16(source.view(np.uint16), out.view(np.uint16))
            return
        if target == GGMLQuantizationType.F32:
            self._widen(source, dtype, out.view(np.float32))
            return
        if dtype == "F32":
            values = source.view(np.float32)
        else:
            values = self._widened[: source.size // ITEM_BYTES[dtype]]
            self._widen(source, dtype, values)
        if target == GGMLQuantizationType.F16:
            np.copyto(out.view(np.float16), values, casting="unsafe")
        elif target == GGMLQuantizationType.BF16:
            self._f32_to_bf16(values, out.view(np.uint16))
        elif dtype == "BF16":
            self._f32_to_q8_0(values, self._bf16_block_maxima(source.view(np.uint16)), out)
        else:
            self._f32_to_q8_0(values, self._f32_block_maxima(values), out)

    def _widen(self, source: Bytes, dtype: str, out: npt.NDArray[np.float32]) -> None:
        if dtype == "BF16":
            bits = out.view(np.uint32)
            np.copyto(bits, source.view(np.uint16))
            np.left_shift(bits, 16, out=bits)
        else:
            np.copyto(out, source.view(np.float16))

    def _bf16_to_f16(self, bits: npt.NDArray[np.uint16], out: npt.NDArray[np.uint16]) -> None:
        """Move the exponent where the float16 is normal (exact); look the rest up in a table."""
        magnitude, other, mask = (
            self._bits16[0, : bits.size],
            self._bits16[1, : bits.size],
            self._mask,
        )
        mask = mask[: bits.size]
        np.bitwise_and(bits, np.uint16(0x7FFF), out=magnitude)
        np.subtract(magnitude, _BF16_F16_LOW, out=other)  # wraps below the range
        np.greater_equal(other, _BF16_F16_COUNT, out=mask)
        np.subtract(magnitude, np.uint16((127 - 15) << 7), out=magnitude)
        np.left_shift(magnitude, 3, out=magnitude)
        np.bitwise_and(bits, np.uint16(0x8000), out=other)
        np.bitwise_or(magnitude, other, out=out)
        unusual = np.flatnonzero(mask)
        if unusual.size:
            out[unusual] = _BF16_TO_F16[bits[unusual]]

    def _f32_to_bf16(self, values: npt.NDArray[np.float32], out: npt.NDArray[np.uint16]) -> None:
        """Round to nearest, ties to even; a NaN keeps its upper bits and becomes quiet."""
        bits, rounded = values.view(np.uint32), self._bits32[0, : values.size]
        np.right_shift(bits, 16, out=rounded)
        np.bitwise_and(rounded, 1, out=rounded)
        np.add(rounded, np.uint32(0x7FFF), out=rounded)
        np.add(rounded, bits, out=rounded)
        np.right_shift(rounded, 16, out=rounded)
        np.copyto(out, rounded, casting="unsafe")
        mask = self._mask[: values.size]
        np.isnan(values, out=mask)
        nans = np.flatnonzero(mask)
        if nans.size:
            out[nans] = (bits[nans] >> 16) | 0x40

    def _bf16_block_maxima(self, bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
        maxima = _block_maxima(bits, np.uint16(0x7FFF), self._bits16)
        return (maxima.astype(np.uint32) << 16).view(np.float32)

    def _f32_block_maxima(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        bits = values.view(np.uint32)
        return _block_maxima(bits, np.uint32(0x7FFF_FFFF), self._bits32).view(np.float32)

    def _f32_to_q8_0(
        self, values: npt.NDArray[np.float32], maxima: npt.NDArray[np.float32], out: Bytes
    ) -> None:
        """Scale = maximum / 127 as float16, then 32 signed bytes, halves rounded away from zero."""
        ordinary = (maxima == 0) | ((maxima >= _F32_SMALL) & (maxima < np.inf))
        if not ordinary.all():
            out[:] = quantize(values.reshape(1, -1), GGMLQuantizationType.Q8_0).reshape(-1)
            return
        scale = maxima / np.float32(127)
        inverse = np.reciprocal(scale)
        inverse[scale == 0] = 0
        half = self._bits32[0, : values.size]
        scaled = self._bits32[1, : values.size].view(np.float32)
        np.bitwise_and(values.view(np.uint32), np.uint32(0x8000_0000), out=half)
        np.bitwise_or(half, _BELOW_HALF, out=half)
        np.multiply(
            values.reshape(-1, _Q8_0_BLOCK), inverse[:, None], out=scaled.reshape(-1, _Q8_0_BLOCK)
        )
        np.add(scaled, half.view(np.float32), out=scaled)
        integers = self._int8[: values.size]
        np.copyto(integers, scaled, casting="unsafe")
        blocks = out.view(_Q8_0_DTYPE)
        blocks["scale"] = scale
        blocks["values"] = integers.view("V32")


def _block_maxima(
    bits: npt.NDArray[_Unsigned], magnitude_mask: _Unsigned, scratch: npt.NDArray[_Unsigned]
) -> npt.NDArray[_Unsigned]:
    """Largest magnitude of each 32 floats, as bits: without the sign they order like integers.

    Maxima over windows of 2, 4, 8 and 16 at every position are contiguous passes, which is
    several times faster than reducing rows of 32.
    """
    size = bits.size
    current, following = scratch[0, :size], scratch[1, :size]
    np.bitwise_and(bits, magnitude_mask, out=current)
    for width in (1, 2, 4, 8):
        size -= width
        np.maximum(current[:size], current[width : width + size], out=following[:size])
        current, following = following, current
    return np.maximum(current[::_Q8_0_BLOCK], current[16::_Q8_0_BLOCK])


def _bf16_to_f16_table() -> npt.NDArray[np.uint16]:
    """float16 bits of every BF16, rounded by numpy as the stock converter does. 128 KiB."""
    with np.errstate(all="ignore"):
        widened = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
        return widened.astype(np.float16).view(np.uint16)


_BF16_TO_F16 = _bf16_to_f16_table()
