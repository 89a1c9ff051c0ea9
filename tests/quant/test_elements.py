"""Grid values: rounding, packed bits, and the widening to bytes."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tpu_stack.quant import FORMATS, get_format
from tpu_stack.quant.elements import (
    decode,
    encode,
    nearest,
    pack_words,
    unpack_words,
    widen,
    widened_dtype,
    widened_unit,
)

QUANTIZED = [name for name, fmt in FORMATS.items() if fmt.quantized]
GRIDS = {
    "int8": np.arange(-127.0, 128),
    "int4": np.arange(-8.0, 8),
    "mxfp4": np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]),
    "int2": np.array([-1.5, -0.5, 0.5, 1.5]),
    "ternary": np.array([-1.0, 0, 1]),
    "int1": np.array([-1.0, 1]),
}


def grid(name: str) -> np.ndarray:
    if name.startswith("fp8"):
        bytes_ = np.arange(256, dtype=np.uint8).view(get_format(name).dtype)
        every = bytes_.astype(np.float32)
        return np.unique(every[np.isfinite(every)])
    return GRIDS["mxfp4" if name == "nvfp4" else name.split("_")[0]]


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_grid_value_survives(name):
    fmt, values = get_format(name), grid(name).astype(np.float32)
    column = jnp.asarray(values)[:, None]
    np.testing.assert_array_equal(nearest(column, fmt), column)
    stored = encode(column, fmt)
    assert stored.dtype == fmt.dtype
    np.testing.assert_array_equal(decode(stored, fmt, len(values)), column)
    for kind in (stored, np.asarray(stored)):
        wide = widen(kind, fmt, len(values))
        assert wide.dtype == widened_dtype(fmt)
        assert isinstance(wide, np.ndarray) == isinstance(kind, np.ndarray)
        np.testing.assert_array_equal(np.asarray(wide) * widened_unit(fmt), column)


@pytest.mark.parametrize("name", QUANTIZED)
def test_nearest_is_nearest_and_saturates(name):
    fmt, values = get_format(name), grid(name)
    u = np.linspace(2 * fmt.low, 2 * fmt.high, 1001).astype(np.float32)
    got = np.asarray(nearest(jnp.asarray(u), fmt), np.float64)
    best = np.abs(u[:, None] - values).min(1)
    np.testing.assert_allclose(np.abs(u - got), best, rtol=1e-6, atol=1e-6)
    assert set(got) <= set(values)


@pytest.mark.parametrize(
    ("name", "ties", "rounded"),
    [
        ("int8", [0.5, 1.5, -0.5, -2.5], [0, 2, 0, -2]),
        ("int4", [0.5, 1.5, -7.5, 7.5], [0, 2, -8, 7]),
        ("ternary", [0.5, -0.5], [0, 0]),
        ("int2", [-1.0, 0.0, 1.0], [-1.5, 0.5, 0.5]),  # the even code: -2, 0, 0
        ("mxfp4", [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], [0, 1, 1, 2, 2, 4, 4]),
        ("fp8_e4m3", [17.0, 19.0, 2**-10], [16, 20, 0]),
        ("fp8_e5m2", [9.0, 11.0], [8, 12]),
        ("int1", [0.0, -0.0], [1, 1]),
    ],
)
def test_ties(name, ties, rounded):
    np.testing.assert_array_equal(nearest(jnp.array(ties), get_format(name)), rounded)


@settings(deadline=None, max_examples=60)
@given(
    hnp.array_shapes(min_dims=0, max_dims=2, max_side=3),
    st.integers(1, 600),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
)
def test_words_hold_each_bit_where_the_contract_says(lead, rows, columns, seed):
    bits = np.random.default_rng(seed).integers(0, 2, (*lead, rows, columns)).astype(bool)
    words = pack_words(bits)
    assert words.dtype == np.int32
    assert words.shape == (*lead, 8 * -(-rows // 256), columns)
    np.testing.assert_array_equal(unpack_words(words, rows), bits)
    k = np.arange(rows)
    picked = words[..., 8 * (k // 256) + k % 8, :] >> (k % 256 // 8)[:, None] & 1
    np.testing.assert_array_equal(picked, bits)
    assert not unpack_words(words, words.shape[-2] * 32)[..., rows:, :].any()


def test_words_on_a_device_are_those_on_the_host():
    bits = np.random.default_rng(0).integers(0, 2, (2, 300, 3)).astype(bool)
    words = pack_words(bits)
    np.testing.assert_array_equal(pack_words(jnp.asarray(bits)), words)
    np.testing.assert_array_equal(unpack_words(jnp.asarray(words), 300), bits)
