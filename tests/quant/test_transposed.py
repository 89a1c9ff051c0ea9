"""Weights kept [N, K] for a CPU: the same numbers, few rows as sums, rows blind to each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_stack.quant import explain, matmul, quantize
from tpu_stack.quant.transposed import MULTIPLY_REDUCE_ROWS, Transposed, transpose_weight
from tpu_stack.sharding.constrain import sharding_scope
from tpu_stack.sharding.mesh import make_mesh
from tpu_stack.sharding.profiles import get_profile

K, N = 200, 72
W = jax.random.normal(jax.random.key(0), (K, N))


def one_device():
    profile = get_profile("8i").with_mesh("tensor=1")
    return sharding_scope(make_mesh(profile.mesh, jax.devices()[:1]), profile.rules)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 48, 49, 64, 130])
def test_float32_against_float64(rows):
    x = jax.random.normal(jax.random.key(1), (rows, K))
    with one_device():
        y = np.asarray(matmul(x, transpose_weight(W)))
        few = explain(x, W.T, transpose=True).implementation == "multiply_reduce"
    want = np.asarray(x, np.float64) @ np.asarray(W, np.float64)
    assert np.linalg.norm(y - want) < 1e-6 * np.linalg.norm(want)
    assert few == (rows in MULTIPLY_REDUCE_ROWS)


def test_a_sum_is_never_made_of_a_copy_of_x():
    """Two products of one x: XLA would share its broadcast to [M, N, K], and write it out."""
    x, other = jax.random.normal(jax.random.key(1), (8, K)), W + 1
    with one_device():
        step = jax.jit(lambda x, *w: [matmul(x, each) for each in w])
        text = step.lower(x, transpose_weight(W), transpose_weight(other)).compile().as_text()
    assert text is not None
    assert f"f32[8,{N},{K}]" not in text.split("ENTRY")[1]


@pytest.mark.parametrize("format", ["int8", "int4_channel"])
def test_quantized_is_the_same_bit_for_bit(format):
    q = quantize(W, format).widen()
    x = jax.random.normal(jax.random.key(1), (5, K))
    transposed = transpose_weight(q)
    assert isinstance(transposed, Transposed)
    assert transposed.shape == q.shape == (K, N)
    y, same = (matmul(x, w, implementation="xla_sliced") for w in (transposed, q))
    np.testing.assert_array_equal(np.asarray(y), np.asarray(same))


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_8_bit_floats_against_float64(rows):
    """Rows of 192 are walked in blocks, for few rows of x."""
    q = quantize(jax.random.normal(jax.random.key(0), (K, 192)), "fp8_e4m3").widen()
    x = jax.random.normal(jax.random.key(1), (rows, K))
    with one_device():
        y = np.asarray(matmul(x, transpose_weight(q)))
    want = np.asarray(x, np.float64) @ np.asarray(q.dequantize(), np.float64)
    assert np.linalg.norm(y - want) < 1e-6 * np.linalg.norm(want)


@pytest.mark.parametrize("format", ["int4_g64", "mxfp4", "int1"])
def test_what_has_groups_stays(format):
    q = quantize(jnp.ones((256, 64)), format)
    assert transpose_weight(q) is q


def test_transposing_twice_changes_nothing():
    assert transpose_weight(w := transpose_weight(W)) is w


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_row_is_the_same_whatever_the_batch_has_besides(dtype):
    """Prefill's programs have from 64 rows to 1024."""
    x = jax.random.normal(jax.random.key(1), (256, K), dtype)
    w = transpose_weight(W.astype(dtype))
    with one_device():
        product = jax.jit(matmul)
        whole = np.asarray(product(x, w), np.float32)
        for rows in (64, 128):
            np.testing.assert_array_equal(
                np.asarray(product(x[7 : 7 + rows], w), np.float32), whole[7 : 7 + rows]
            )


def test_gradients_reach_x_and_an_array():
    x = jax.random.normal(jax.random.key(1), (8, K))

    def loss(x, w):
        return jnp.sum(jnp.square(matmul(x, w)))

    with one_device():
        got = jax.grad(loss, (0, 1))(x, transpose_weight(W))
    want = jax.grad(lambda x, w: jnp.sum(jnp.square(x @ w)), (0, 1))(x, W)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(got[1].stored.T, want[1], rtol=1e-4, atol=1e-3)


def test_lowered_for_tpu_it_is_a_dot():
    x = jax.ShapeDtypeStruct((8, K), jnp.float32)
    with one_device():
        traced = jax.jit(lambda x, w: matmul(x, w, transpose=True)).trace(x, W.T)
    assert "dot_general" in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "dot_general" not in traced.lower(lowering_platforms=("cpu",)).as_text()
