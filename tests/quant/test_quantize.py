"""The quantizer: quality on Gaussian weights, and the cases a formula forgets."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_stack.errors import UserError
from tpu_stack.quant import FORMATS, QTensor, get_format, quantize

QUANTIZED = [name for name, fmt in FORMATS.items() if fmt.quantized and "_g" not in name]
"""Every format but other groups of the same, to keep the tests quick."""


def gaussian(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape)


def snr_db(w, q: QTensor) -> float:
    w = np.asarray(w, np.float64)
    error = w - np.asarray(q.dequantize(), np.float64)
    return 10 * np.log10((w**2).sum() / (error**2).sum())


# Floors from the design, for groups of 32 and 128 where there are several; a quantizer more than
# 0.3 dB under one is wrong. int8's is for rows of 1024: the full scale of a row grows with its
# length. Groups of 64 lie between their neighbours. fp8_e5m2 has one bit less than e4m3, 6 dB.
FLOORS = {
    "int8": 42.1,
    "fp8_e4m3": 31.6,
    "fp8_e5m2": 25.6,
    "int4": 21.3,
    "int4_g64": 19.9,
    "int4_g128": 19.9,
    "mxfp4": 18.8,
    "nvfp4": 20.4,
    "int2": 9.7,
    "int2_g64": 9.4,
    "int2_g128": 9.4,
    "ternary": 7.5,
    "ternary_g64": 7.3,
    "ternary_g128": 7.3,
    "int1": 4.5,
    "int1_g64": 4.4,
    "int1_g128": 4.4,
}


@pytest.mark.parametrize(
    ("format", "axis", "floor"),
    [*((format, -2, floor) for format, floor in FLOORS.items()), ("int8", -1, 42.1)],
)
def test_snr_reaches_the_floor(format, axis, floor):
    w = gaussian(1024, 256) if axis == -2 else gaussian(256, 1024)
    assert snr_db(w, quantize(w, format, axis)) > floor - 0.3


@pytest.mark.parametrize("format", QUANTIZED)
def test_searched_scales_never_lose_to_full_scale(format):
    w = gaussian(256, 64)
    full, searched = quantize(w, format, method="absmax"), quantize(w, format)
    assert snr_db(w, searched) >= snr_db(w, full)
    if format in ("int2", "ternary", "int1"):  # where the design calls the search mandatory
        assert snr_db(w, searched) > snr_db(w, full) + 2


@pytest.mark.parametrize("format", QUANTIZED)
def test_full_scale_keeps_the_largest_magnitude(format):
    if format == "mxfp4":  # its power of two clips by up to 1 - 6/8
        return
    fmt, w = get_format(format), gaussian(256, 64)
    q = quantize(w, format, method="absmax")
    groups = (-1, fmt.group or 256, 64)
    largest = np.abs(np.asarray(w)).reshape(groups).max(1)
    kept = np.abs(np.asarray(q.dequantize())).reshape(groups).max(1)
    # The scale is rounded to half a unit in its last place: 2**-4 for e4m3 and less for others.
    np.testing.assert_allclose(kept, largest, rtol=2**-4 if fmt.two_level else 2**-8)


def test_signed_int4_scales_beat_the_floor_of_positive_ones():
    w = gaussian(1024, 256)
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


@pytest.mark.parametrize("format", ["int4", "nvfp4", "int1"])
def test_stacked_layers_quantize_as_each_alone(format):
    w = gaussian(2, 64, 8) * jnp.array([1.0, 30.0])[:, None, None]
    both, second = quantize(w, format), quantize(w[1], format)
    for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a[1].astype(jnp.float32), b.astype(jnp.float32))


@pytest.mark.parametrize("method", ["mse", "absmax"])
@pytest.mark.parametrize("format", QUANTIZED)
def test_zeros_are_exact(format, method):
    q = quantize(jnp.zeros((256, 3)), format, method=method)
    assert not q.dequantize().any()
    assert not q.widen().dequantize().any()
    assert bool((q.scales == (1 if q.spec.has_zero else 0)).all())
    # One group of zeros beside others.
    w = gaussian(256, 3).at[:128, 1].set(0)
    kept = quantize(w, format, method=method).dequantize()
    if get_format(format).group:
        assert not kept[:128, 1].any()
    assert bool(jnp.isfinite(kept).all())


# Half a unit in the last place of each scale; every other grid is symmetric or takes signed scales.
UNITS = {name: 2**-23 if fmt.scale_dtype == "float32" else 2**-7 for name, fmt in FORMATS.items()}


@pytest.mark.parametrize("value", [1.0, 0.3, -0.7, 1e-30, -3e38])
@pytest.mark.parametrize("format", [name for name in QUANTIZED if name not in ("mxfp4", "nvfp4")])
def test_equal_groups_are_kept_to_half_a_unit_of_the_scale(format, value):
    q = quantize(jnp.full((128, 2), value), format)
    kept = np.asarray(q.dequantize(), np.float64)
    # The scale is rounded to half a unit in its last place, then once more in the product.
    np.testing.assert_allclose(kept, np.float32(value), rtol=0.5 * UNITS[format] + 2**-22)


@pytest.mark.parametrize("value", [1.0, 0.3, -0.7, 1e-30, -3e38])
def test_equal_groups_under_small_scales(value):
    """NVFP4's two levels meet at the largest group; MXFP4 has grid values but no scale to move."""
    kept = np.asarray(quantize(jnp.full((128, 2), value), "nvfp4").dequantize(), np.float64)
    np.testing.assert_allclose(kept, np.float32(value), rtol=2**-7)
    kept = np.asarray(quantize(jnp.full((128, 2), value), "mxfp4").dequantize(), np.float64)
    # Two grid values over a binade lie at most a factor 1.5 apart: half of the gap is 1/5.
    np.testing.assert_allclose(kept, np.float32(value), rtol=1 / 5)


@pytest.mark.parametrize("format", QUANTIZED)
def test_groups_below_the_scale_dtype_become_zeros(format):
    tiny = 1e-38 if get_format(format).high < 448 else 1e-37
    q = quantize(jnp.full((256, 1), tiny if format != "int1" else 1e-38), format)
    kept = q.dequantize()
    assert not kept.any() or np.allclose(kept, tiny, rtol=0.25)


@pytest.mark.parametrize("format", QUANTIZED)
def test_wild_magnitudes_stay_finite(format):
    """Groups from the least float to the largest: no NaN, no infinity, no wrong sign."""
    exponents = np.linspace(-126, 127, 16 * 256).reshape(256, 16)
    w = np.exp2(exponents).astype(np.float32) * np.where(np.arange(16) % 2, -1, 1).astype("f")
    for method in ("mse", "absmax"):
        kept = np.asarray(quantize(w, format, method=method).dequantize())
        assert np.isfinite(kept).all()
        # int2 subtracts a half from w / scale: what that absorbs counts as zero, which is +1/2.
        absorbed = np.abs(w) <= 2**-24 * np.abs(kept)
        assert ((kept == 0) | (np.sign(kept) == np.sign(w)) | absorbed).all()


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
@pytest.mark.parametrize("format", ["int8", "nvfp4", "int1"])
def test_nan_and_infinity_name_the_tensor_and_the_place(format, bad):
    w = np.zeros((32, 4), np.float32)
    w[3, 2] = bad
    with pytest.raises(UserError, match=r"layers\.up: 1 of 128 weights .* first at \[3, 2\]"):
        quantize(w, format, name="layers.up")


def test_refusals_name_the_tensor_and_the_sizes():
    with pytest.raises(UserError, match=r"up: shape \[33, 4\]: K=33 is not a multiple of int4's"):
        quantize(jnp.ones((33, 4)), "int4", name="up")
    with pytest.raises(UserError, match=r"K=192 is not a multiple .* group 128; int2_g64 fits"):
        quantize(jnp.ones((192, 4)), "int2_g128")
    with pytest.raises(UserError, match=r"embed: int4 has groups of 32 .*use int8"):
        quantize(jnp.ones((64, 32)), "int4", contract_axis=-1, name="embed")
    with pytest.raises(UserError, match="up: bf16 is not a quantized format"):
        quantize(jnp.ones((32, 4)), "bf16", name="up")
    with pytest.raises(UserError, match=r"up: needs a float matrix, got int32 \[32, 4\]"):
        # Unwrapped: the tests' checks of annotations would refuse this first.
        inspect.unwrap(quantize)(jnp.ones((32, 4), jnp.int32), "int4", name="up")
    with pytest.raises(UserError, match="up: unknown method 'max'; known: mse, absmax"):
        quantize(jnp.ones((32, 4)), "int4", method="max", name="up")
    with pytest.raises(UserError, match="contract_axis must be -2 or -1, not 0"):
        quantize(jnp.ones((32, 4)), "int8", contract_axis=0)


def test_bfloat16_and_numpy_weights():
    w = np.asarray(gaussian(64, 4))
    a, b = quantize(w, "int4"), quantize(jnp.asarray(w), "int4")
    np.testing.assert_array_equal(a.values.astype(jnp.int8), b.values.astype(jnp.int8))
    assert snr_db(w, quantize(jnp.asarray(w, jnp.bfloat16), "int8")) > 35


def test_one_bit_is_sign_and_mean_magnitude():
    w = gaussian(128, 4)
    q = quantize(w, "int1")
    np.testing.assert_array_equal(np.sign(q.dequantize()), np.sign(w))
    mean = jnp.abs(w).reshape(4, 32, 4).mean(1)
    np.testing.assert_allclose(q.scales[:, 0].astype(jnp.float32), mean, rtol=2**-8)


def test_microscaling_scales_are_the_standards_powers_of_two():
    w = np.zeros((64, 1), np.float32)
    w[:4, 0] = [5.9, -1, 2, 4]  # largest magnitude in [4, 8): 2**(2 - 2)
    w[32:35, 0] = [-0.26, 0.1, 0]  # in [1/4, 1/2): 2**(-2 - 2)
    q = quantize(w, "mxfp4", method="absmax")
    np.testing.assert_array_equal(q.scales.astype(jnp.float32).reshape(-1), [1, 2**-4])
    np.testing.assert_array_equal(q.dequantize()[:4, 0], [6, -1, 2, 4])


def test_two_level_scales_reach_the_largest_e4m3():
    w = gaussian(256, 64)
    q = quantize(w, "nvfp4", method="absmax")
    assert q.tensor_scale.shape == (1, 1, 1)
    assert float(q.scales.astype(jnp.float32).max()) == 448
    want = float(jnp.abs(w).max()) / (6 * 448)
    np.testing.assert_allclose(float(q.tensor_scale[0, 0, 0]), want, rtol=2**-7)
    # Eight significant bits at most, so that a grid value times both scales is exact in float32.
    np.testing.assert_array_equal(q.tensor_scale, q.tensor_scale.astype(jnp.bfloat16))
