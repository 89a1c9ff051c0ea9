"""The block-Hadamard rotation: its own inverse, and worth having where weights have outliers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_stack.errors import UserError
from tpu_stack.quant import abstract_qtensor, quantize
from tpu_stack.quant.rotation import hadamard, rotate


def snr_db(w, kept) -> float:
    w, kept = np.asarray(w, np.float64), np.asarray(kept, np.float64)
    return 10 * np.log10((w**2).sum() / ((w - kept) ** 2).sum())


@pytest.mark.parametrize("size", [2, 8, 128])
def test_the_matrix_is_symmetric_and_its_own_inverse(size):
    matrix = hadamard(size).astype(np.float64)
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_allclose(matrix @ matrix, np.eye(size), atol=1e-6)


def test_rotating_both_sides_keeps_the_product():
    x = jax.random.normal(jax.random.key(0), (3, 128))
    w = jax.random.normal(jax.random.key(1), (2, 128, 5))
    rotated = rotate(x, 32, -1) @ rotate(w, 32, -2)
    np.testing.assert_allclose(rotated, x @ w, atol=1e-4)
    np.testing.assert_allclose(rotate(rotate(w, 32, -2), 32, -2), w, atol=1e-5)
    np.testing.assert_array_equal(rotate(w, 0, -2), w)
    # Blocks do not mix.
    np.testing.assert_allclose(rotate(w, 32, -2)[:, 32:64], rotate(w[:, 32:64], 32, -2), atol=1e-6)


@pytest.mark.parametrize(
    ("format", "gain"), [("int4", 4), ("int4_channel", 8), ("mxfp4", 2), ("nvfp4", 0.3)]
)
def test_it_gains_on_outliers_and_loses_nothing_without(format, gain):
    """The wider the group, the more weights an outlier spoils: NVFP4's 16 have least to gain."""
    w = jax.random.normal(jax.random.key(0), (512, 128))
    plain = snr_db(w, quantize(w, format).dequantize())
    rotated = quantize(w, format, rotation=128).check()
    assert rotated.rotation == 128
    assert abs(snr_db(w, rotated.dequantize()) - plain) < 0.3  # a rotated Gaussian is Gaussian
    outlier = jax.random.bernoulli(jax.random.key(1), 0.01, w.shape)
    heavy = jnp.where(outlier, 10 * w, w)
    kept = snr_db(heavy, quantize(heavy, format).dequantize())
    assert snr_db(heavy, quantize(heavy, format, rotation=128).dequantize()) > kept + gain


def test_static_and_abstract():
    w = jnp.ones((64, 8))
    q = quantize(w, "int4", rotation=64)
    assert abstract_qtensor((64, 8), "int4", rotation=64) == jax.eval_shape(lambda: q)
    np.testing.assert_array_equal(q.widen().dequantize(), q.dequantize())
    layers = quantize(jnp.ones((3, 64, 8)), "int4", rotation=64)
    one = jax.tree.map(lambda leaf: leaf[0], layers)
    np.testing.assert_allclose(one.dequantize(), q.dequantize())


def test_refusals():
    with pytest.raises(UserError, match="up: a rotation's block is a power of two, not 48"):
        quantize(jnp.ones((96, 4)), "int4", rotation=48, name="up")
    with pytest.raises(UserError, match="up: K=96 is not a multiple of the rotation's 64"):
        quantize(jnp.ones((96, 4)), "int4", rotation=64, name="up")
    with pytest.raises(UserError, match="up: rotation is for the 4-bit formats, this one has 8"):
        quantize(jnp.ones((64, 4)), "int8", rotation=64, name="up")
    with pytest.raises(UserError, match=r"a table of rows .* cannot be rotated"):
        quantize(jnp.ones((64, 64)), "int4_channel", -1, rotation=64)
