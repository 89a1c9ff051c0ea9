"""The quantizer: quality on Gaussian weights, and the cases a formula forgets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_stack.errors import UserError
from tpu_stack.quant import QTensor, quantize


def gaussian(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape)


def snr_db(w, q: QTensor) -> float:
    w = np.asarray(w, np.float64)
    error = w - np.asarray(q.dequantize(), np.float64)
    return 10 * np.log10((w**2).sum() / (error**2).sum())


# Floors from the design; a quantizer more than 0.3 dB under one is wrong. int8's is for rows of
# 1024: the full scale of a row grows with its length.
@pytest.mark.parametrize(
    ("format", "axis", "floor"), [("int4", -2, 21.3), ("int8", -2, 42.1), ("int8", -1, 42.1)]
)
def test_snr_reaches_the_floor(format, axis, floor):
    w = gaussian(1024, 1024)
    assert snr_db(w, quantize(w, format, axis)) > floor - 0.3


def test_signed_int4_scales_beat_the_floor_of_positive_ones():
    w = gaussian(1024, 512)
    q = quantize(w, "int4")
    assert snr_db(w, q) > 21.7
    assert q.bits_per_weight == 4.5
    assert bool((q.scales < 0).any())


def test_shapes_dtypes_and_range():
    q = quantize(gaussian(3, 64, 5), "int4")
    assert (q.values.shape, q.values.dtype) == ((3, 64, 5), jnp.int4)
    assert (q.scales.shape, q.scales.dtype) == ((3, 2, 1, 5), jnp.bfloat16)
    q = quantize(gaussian(3, 64, 5), "int8")
    assert (q.values.dtype, q.scales.shape, q.scales.dtype) == (jnp.int8, (3, 1, 1, 5), jnp.float32)
    assert int(q.values.astype(jnp.int32).min()) >= -127
    q = quantize(gaussian(10, 6), "int8", contract_axis=-1)
    assert (q.scales.shape, q.contract_axis) == ((10, 1), -1)


def test_stacked_layers_quantize_as_each_alone():
    w = gaussian(2, 64, 8)
    both, second = quantize(w, "int4"), quantize(w[1], "int4")
    np.testing.assert_array_equal(both.values[1].astype(jnp.int8), second.values.astype(jnp.int8))
    np.testing.assert_array_equal(both.scales[1], second.scales)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_zeros_are_exact_with_scale_one(format):
    q = quantize(jnp.zeros((64, 3)), format)
    assert not q.dequantize().any()
    assert bool((q.scales == 1).all())


@pytest.mark.parametrize("value", [1.0, 0.3, -0.7, 1e-30, -3e38])
@pytest.mark.parametrize(("format", "unit"), [("int8", 2**-23), ("int4", 2**-7)])
def test_equal_groups_are_kept_to_half_a_unit_of_the_scale(format, unit, value):
    q = quantize(jnp.full((64, 2), value), format)
    kept = np.asarray(q.dequantize(), np.float64)
    # The scale is rounded to half a unit in its last place, then once more in the product.
    np.testing.assert_allclose(kept, np.float32(value), rtol=0.5 * unit + 2**-23)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_groups_below_the_scale_dtype_become_zeros(format):
    q = quantize(jnp.full((32, 1), 1e-38), format)
    assert not q.dequantize().any()


def test_ties_round_to_even():
    # Full scale is 127, the factor 1 is tried first and exact except for the ties.
    column = jnp.zeros((32, 1)).at[:4, 0].set(jnp.array([127.0, 0.5, 1.5, 2.5]))
    column = column.at[4:, 0].set(jnp.arange(28.0))
    q = quantize(column, "int8")
    np.testing.assert_array_equal(q.values[:4, 0], [127, 0, 2, 2])


def test_integers_with_a_power_of_two_scale_are_exact():
    rng = np.random.default_rng(0)
    integers = rng.integers(-8, 8, (64, 16))
    integers[::32] = -8  # every group reaches full scale
    w = jnp.asarray(integers * 0.25, jnp.float32)
    np.testing.assert_array_equal(quantize(w, "int4").dequantize(), w)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_nan_and_infinity_name_the_tensor_and_the_place(format, bad):
    w = np.zeros((32, 4), np.float32)
    w[3, 2] = bad
    with pytest.raises(UserError, match=r"layers\.up: 1 of 128 weights .* first at \[3, 2\]"):
        quantize(w, format, name="layers.up")


def test_refusals_name_the_tensor_and_the_sizes():
    with pytest.raises(UserError, match=r"up: shape \[33, 4\]: K=33 is not a multiple of int4's"):
        quantize(jnp.ones((33, 4)), "int4", name="up")
    with pytest.raises(UserError, match=r"embed: int4 has groups of 32 .*use int8"):
        quantize(jnp.ones((64, 32)), "int4", contract_axis=-1, name="embed")
    with pytest.raises(UserError, match="up: bf16 is not a quantized format"):
        quantize(jnp.ones((32, 4)), "bf16", name="up")
    with pytest.raises(UserError, match=r"up: needs a float matrix, got int32 \[32, 4\]"):
        quantize(jnp.ones((32, 4), jnp.int32), "int4", name="up")
    with pytest.raises(UserError, match="contract_axis must be -2 or -1, not 0"):
        quantize(jnp.ones((32, 4)), "int8", contract_axis=0)


def test_bfloat16_and_numpy_weights():
    w = np.asarray(gaussian(64, 4))
    a, b = quantize(w, "int4"), quantize(jnp.asarray(w), "int4")
    np.testing.assert_array_equal(a.values.astype(jnp.int8), b.values.astype(jnp.int8))
    assert snr_db(w, quantize(jnp.asarray(w, jnp.bfloat16), "int8")) > 35
