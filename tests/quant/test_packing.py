"""Nibbles on disk: round trips and byte order."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tpu_stack.errors import UserError
from tpu_stack.quant import get_format
from tpu_stack.quant.packing import pack_int4, pack_values, unpack_int4, unpack_values

shapes = hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=9)


@settings(deadline=None, max_examples=200)
@given(hnp.arrays(np.int8, shapes, elements=st.integers(-8, 7)))
def test_round_trip(values):
    packed = pack_int4(values)
    assert packed.dtype == np.uint8
    assert packed.shape == (*values.shape[:-2], (values.shape[-2] + 1) // 2, values.shape[-1])
    back = unpack_int4(packed, values.shape[-2])
    assert back.dtype == ml_dtypes.int4
    np.testing.assert_array_equal(back.astype(np.int8), values)
    np.testing.assert_array_equal(pack_int4(back), packed)


@settings(deadline=None, max_examples=100)
@given(hnp.arrays(np.uint8, shapes))
def test_every_byte_is_some_pair(packed):
    np.testing.assert_array_equal(pack_int4(unpack_int4(packed, 2 * packed.shape[-2])), packed)


def test_byte_order_is_little_endian_along_k():
    packed = pack_int4(np.array([[1], [-1], [-8]], np.int8))
    np.testing.assert_array_equal(packed, [[0xF1], [0x08]])


@pytest.mark.parametrize("bad", [-9, 8, 100])
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(UserError, match=r"not -8\.\.7"):
        pack_int4(np.array([[0], [bad]], np.int32))


def test_wrong_sizes_are_refused():
    with pytest.raises(UserError, match="does not hold 5 int4 rows"):
        unpack_int4(np.zeros((2, 3), np.uint8), 5)
    with pytest.raises(UserError, match=r"needs \[\.\.\., K, N\]"):
        pack_int4(np.zeros(3, np.int8))


def test_by_format():
    values = np.arange(-4, 4, dtype=np.int8).reshape(4, 2)
    for name in ("int8", "int4"):
        fmt = get_format(name)
        back = unpack_values(pack_values(values.astype(fmt.dtype), fmt), fmt, 4)
        np.testing.assert_array_equal(back.astype(np.int8), values)
    with pytest.raises(UserError, match="bf16 has no packed layout in version 1"):
        pack_values(values, get_format("bf16"))
    with pytest.raises(UserError, match=r"int8: int8 .* does not hold 5 rows"):
        unpack_values(values, get_format("int8"), 5)
