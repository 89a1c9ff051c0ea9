"""Bytes on disk: round trips, byte order and refusals, for every format."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tpu_stack.errors import UserError
from tpu_stack.quant import FORMATS, get_format
from tpu_stack.quant.packing import pack_rows, pack_values, unpack_rows, unpack_values

QUANTIZED = [name for name, fmt in FORMATS.items() if fmt.quantized]
shapes = hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=9)


def stored(fmt, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Random values of the format, every bit pattern that it has (fp8's NaN included)."""
    rng = np.random.default_rng(seed)
    if fmt.kind == "bits":
        words = (*shape[:-2], fmt.rows_stored(shape[-2]), shape[-1])
        return rng.integers(-(2**31), 2**31, words, dtype=np.int32)
    codes = rng.integers(0, 2**fmt.bits, shape, dtype=np.uint8)
    if fmt.kind == "float":
        return codes.view(fmt.dtype)
    low = 2 ** (fmt.bits - 1)
    return (codes.astype(np.int16) - low).astype(np.int8).astype(fmt.dtype)


@pytest.mark.parametrize("name", QUANTIZED)
@settings(deadline=None, max_examples=40)
@given(shape=shapes, seed=st.integers(0, 2**32 - 1))
def test_round_trip(name, shape, seed):
    fmt = get_format(name)
    values = stored(fmt, shape, seed)
    packed = pack_values(values, fmt)
    assert packed.nbytes == values.size // values.shape[-2] * fmt.column_bytes(shape[-2])
    back = unpack_values(packed, fmt, shape[-2])
    assert back.dtype == fmt.dtype
    assert back.tobytes() == np.ascontiguousarray(values).tobytes()
    assert pack_values(back, fmt).tobytes() == packed.tobytes()


@pytest.mark.parametrize("bits", [2, 4])
@settings(deadline=None, max_examples=60)
@given(hnp.arrays(np.uint8, shapes))
def test_every_byte_is_some_codes(bits, packed):
    codes = unpack_rows(packed, bits, 8 // bits * packed.shape[-2])
    assert codes.max() < 2**bits
    np.testing.assert_array_equal(pack_rows(codes, bits), packed)


def test_byte_order_is_little_endian_along_k():
    int4, int2, fp4 = get_format("int4"), get_format("int2"), get_format("mxfp4")
    column = np.array([[1], [-1], [-8]], np.int8)
    np.testing.assert_array_equal(pack_values(column.astype(int4.dtype), int4), [[0xF1], [0x08]])
    column = np.array([[1], [-1], [-2], [0], [1]], np.int8)
    np.testing.assert_array_equal(pack_values(column.astype(int2.dtype), int2), [[0x2D], [0x01]])
    column = np.array([[0.5], [-6], [-0.0]], np.float32)
    np.testing.assert_array_equal(pack_values(column.astype(fp4.dtype), fp4), [[0xF1], [0x08]])


def test_refusals():
    int4, int8 = get_format("int4"), get_format("int8")
    with pytest.raises(UserError, match=r"int4 packs int4 .* not int8 \[2, 3\]"):
        pack_values(np.zeros((2, 3), np.int8), int4)
    with pytest.raises(UserError, match=r"int8 packs int8 \[\.\.\., K, N\], not int8 \[3\]"):
        pack_values(np.zeros(3, np.int8), int8)
    with pytest.raises(UserError, match="bf16 has no packed layout in version 2"):
        pack_values(np.zeros((2, 2), np.int8), get_format("bf16"))
    for fmt, packed, rows in [
        (int4, np.zeros((2, 3), np.uint8), 5),
        (int4, np.zeros((3, 3), np.int8), 5),
        (int8, np.zeros((4, 3), np.int8), 5),
        (get_format("int2"), np.zeros((1, 3), np.uint8), 5),
        (get_format("int1"), np.zeros((8, 3), np.int32), 257),
    ]:
        with pytest.raises(UserError, match=rf"{fmt.name}: .* does not hold {rows} rows"):
            unpack_values(packed, fmt, rows)
