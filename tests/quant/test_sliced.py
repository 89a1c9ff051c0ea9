"""Products in slices of eight bits: exact sums, rows that do not see each other, honest NaNs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_stack.errors import UserError
from tpu_stack.quant import explain, matmul, quantize
from tpu_stack.quant.qtensor import QTensor
from tpu_stack.quant.select import MAX_SLICED_M
from tpu_stack.quant.sliced import BASE, MAX_K, MOST_DIGITS, slice_rows
from tpu_stack.sharding.constrain import sharding_scope
from tpu_stack.sharding.mesh import make_mesh
from tpu_stack.sharding.profiles import get_profile


def weight(k: int = 256, n: int = 192) -> QTensor:
    return quantize(jax.random.normal(jax.random.key(0), (k, n)), "int8")


def sliced(x, q: QTensor):
    return matmul(x, q, implementation="xla_sliced", out_dtype=jnp.float32)


@pytest.mark.parametrize("outlier", [1.0, 1000.0])
def test_digits_hold_what_float32_does_of_the_largest(outlier):
    x = jax.random.normal(jax.random.key(1), (5, 300)).at[:, 7].mul(outlier)
    digits, scale = slice_rows(x)
    assert digits.dtype == jnp.int8
    parts = np.asarray(digits, np.float64).reshape(MOST_DIGITS, *x.shape)
    back = sum(part / BASE**i for i, part in enumerate(parts)) * np.asarray(scale, np.float64)
    largest = np.abs(np.asarray(x, np.float64)).max(1, keepdims=True)
    assert (np.abs(back - np.asarray(x, np.float64)) <= 2.0**-22 * largest).all()


def test_the_error_is_that_of_float32_also_beside_an_outlier():
    q = weight()
    x = jax.random.normal(jax.random.key(1), (16, 256)).at[:, 3].mul(300.0)
    want = np.asarray(x, np.float64) @ np.asarray(q.dequantize(), np.float64)
    plain = np.asarray(jnp.dot(x, q.dequantize(), precision="highest"))
    ours, theirs = (np.linalg.norm(y - want) for y in (np.asarray(sliced(x, q)), plain))
    assert ours < 2 * theirs


@pytest.mark.parametrize("outlier", [1.0, 300.0])
def test_two_digits_of_bfloat16_are_finer_than_its_result(outlier):
    """Of the norm, an eighth of a rounding to bfloat16, also beside an outlier."""
    q = weight()
    x = jax.random.normal(jax.random.key(1), (16, 256), jnp.bfloat16).at[:, 3].mul(outlier)
    want = np.asarray(x, np.float64) @ np.asarray(q.dequantize(), np.float64)
    error = np.linalg.norm(np.asarray(sliced(x, q), np.float64) - want)
    assert error < 2.0**-12 * np.linalg.norm(want)
    assert error > 2.0**-23 * np.linalg.norm(want)  # two digits, not three


def test_a_row_is_the_same_whatever_comes_with_it():
    q = weight()
    x = jax.random.normal(jax.random.key(1), (70, 256))
    all_rows = np.asarray(jax.jit(sliced)(x, q))
    for rows in (1, 2, 3, 8, 33):
        np.testing.assert_array_equal(np.asarray(jax.jit(sliced)(x[:rows], q)), all_rows[:rows])


def test_zeros_and_rows_that_are_not_finite():
    q = weight()
    x = jnp.zeros((4, 256)).at[1, 5].set(jnp.nan).at[2, 6].set(jnp.inf).at[3, 0].set(1e-38)
    y = np.asarray(sliced(x, q))
    assert not y[0].any()
    assert np.isnan(y[1]).all()
    assert not np.isfinite(y[2]).any()
    assert np.abs(y[3]).max() < 1e-35


def test_sums_stay_in_their_32_bits():
    """Every term at its largest, at the largest K that is taken; one more is refused."""
    q = quantize(jnp.ones((MAX_K, 1)), "int8")
    y = sliced(jnp.ones((1, MAX_K)), q)
    np.testing.assert_allclose(y, [[MAX_K]], rtol=1e-6)
    more = quantize(jnp.ones((MAX_K + 1, 1)), "int8")
    with pytest.raises(UserError, match="xla_sliced needs"):
        sliced(jnp.ones((1, MAX_K + 1)), more)


@pytest.mark.parametrize(
    ("format", "rows", "chosen"),
    [
        ("int8", 1, "xla_sliced"),
        ("int8", MAX_SLICED_M, "xla_sliced"),
        ("int8", MAX_SLICED_M + 1, "xla"),
        ("int4_g64", 8, "xla_blocked"),
        ("fp8_e4m3", 8, "xla_blocked"),
    ],
)
def test_the_default_of_one_device_among_eight(format, rows, chosen):
    """A program for one device of several is known by its scope."""
    q = quantize(jax.random.normal(jax.random.key(0), (256, 128)), format).widen()
    x = jax.ShapeDtypeStruct((rows, 256), jnp.bfloat16)
    profile = get_profile("8i").with_mesh("tensor=1")
    with sharding_scope(make_mesh(profile.mesh, jax.devices()[:1]), profile.rules):
        assert explain(x, q).implementation == chosen
    two = get_profile("8i").with_mesh("tensor=2")
    with sharding_scope(make_mesh(two.mesh), two.rules):
        assert explain(x, q).implementation == "xla"
