"""Row quantization, interpreted, against numpy; and what the rule promises about its error."""

import inspect

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from tpu_stack.kernels.quantize_rows import MAX_K, quantize_rows, reference_quantize_rows

DTYPES = [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8]


def check_equal(got, want):
    """Values and scales are the same numbers, NaN in the same places."""
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).astype("f4"), np.asarray(b).astype("f4"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("native_cast", [True, False])
@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float32])
def test_every_kind_of_row_equals_numpy(dtype, native_cast, x_dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(70, 300)) * np.exp(4 * rng.normal(size=(70, 1)))
    x[0] = 0
    x[1, 5] = np.nan
    x[2, 6] = -np.inf
    x[3] = 1e-39  # subnormal
    x[4] *= 3e-38 / np.abs(x[4]).max()  # the scale is at its floor
    x[5] *= 3e38 / np.abs(x[5]).max()
    x[6] *= np.exp(4 * rng.normal(size=300))  # most values become subnormal fp8 or zero
    x = jnp.asarray(x.astype("f4")).astype(x_dtype)
    values, scales = quantize_rows(x, dtype, native_cast=native_cast)
    check_equal((values, scales), reference_quantize_rows(x, dtype))
    assert float(scales[0, 0]) == 1
    assert np.isnan(np.asarray(scales[1:3])).all()
    assert not np.asarray(values[:4]).astype("f4").any()


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_emulated_rounding_is_the_cast_at_every_boundary(dtype):
    """Every fp8 number, every midpoint of two, and their float32 neighbours: all the ties."""
    top = float(ml_dtypes.finfo(dtype).max)
    every = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    every = np.unique(every[np.isfinite(every)])
    points = np.concatenate([every, (every[1:] + every[:-1]) / 2])
    points = np.concatenate([points, np.nextafter(points, np.inf), np.nextafter(points, -np.inf)])
    points = np.clip(points, -top, top).astype(np.float32)
    points = points[(points == 0) | (np.abs(points) >= 2.0**-126)]
    x = np.append(points, top)[None]  # the largest value makes the scale 1
    values, scales = quantize_rows(jnp.asarray(x), dtype, native_cast=False)
    assert float(scales[0, 0]) == 1
    assert (np.asarray(values).view(np.uint8) == x.astype(dtype).view(np.uint8)).all()


def test_int8_ties_go_to_even():
    x = jnp.asarray([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    values, _ = quantize_rows(x, jnp.int8)
    assert np.asarray(values).tolist() == [[127, 0, 2, 2, 0, -2, -2]]


@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    st.integers(1, 70),
    st.integers(1, 300),
    st.sampled_from(DTYPES),
    st.floats(-60, 60),
    st.integers(0, 9),
)
def test_any_shape_errs_by_half_a_step(m, k, dtype, magnitude, seed):
    x = np.random.default_rng(seed).normal(size=(m, k)) * 2.0**magnitude
    x = x.astype(np.float32)
    values, scales = quantize_rows(jnp.asarray(x), dtype)
    scale = np.asarray(scales).astype(np.float64)
    error = np.abs(np.asarray(values).astype(np.float64) * scale - x)
    # Half a step of the result: a part of its magnitude, or of the smallest step near zero. And
    # three float32 roundings: the scale, its reciprocal, the product.
    if dtype == jnp.int8:
        step = np.full_like(x, 0.5)
    else:
        info = ml_dtypes.finfo(dtype)
        step = np.maximum(np.abs(x / scale) * info.eps, float(info.smallest_subnormal)) / 2
    assert (error <= step * scale + 4 * 2.0**-24 * np.abs(x)).all()


def test_race_free_over_a_ragged_number_of_rows():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 8300)), jnp.float32)
    pltpu.reset_tpu_interpret_mode_state()
    got = quantize_rows(
        x,
        jnp.int8,
        interpret=pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan"),
    )
    check_equal(got, reference_quantize_rows(x, jnp.int8))


def test_jit_and_vmap():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 40)), jnp.bfloat16)
    values, scales = jax.jit(jax.vmap(quantize_rows))(x)
    for i in range(2):
        check_equal((values[i], scales[i]), reference_quantize_rows(x[i], jnp.float8_e4m3fn))


@pytest.mark.parametrize(
    ("shape", "x_dtype", "dtype", "message"),
    [
        ((4, 8), jnp.bfloat16, jnp.int4, "dtype is int4; supported: float8_e4m3fn"),
        ((4, 8), jnp.float16, jnp.int8, "x is float16; supported: bfloat16, float32"),
        ((8,), jnp.bfloat16, jnp.int8, r"x is \(8,\); it needs two axes"),
        ((0, 8), jnp.bfloat16, jnp.int8, "needs two axes"),
        ((1, MAX_K + 1), jnp.bfloat16, jnp.int8, f"1 <= K <= {MAX_K}"),
    ],
)
def test_refusals_give_the_reason(shape, x_dtype, dtype, message):
    # Unwrapped: the tests' checks of annotations would refuse some of these first.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(quantize_rows)(jax.ShapeDtypeStruct(shape, x_dtype), dtype)  # pyright: ignore
