"""Counted FLOPs against transformer formulas, and against XLA's own count."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tpu_stack.planner.flops import count_flops, count_jaxpr

f32, bf16 = jnp.float32, jnp.bfloat16


def _array(*shape: int, dtype=f32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


L, B, T, D, N, K, H, F, V = 3, 2, 16, 32, 4, 2, 8, 48, 64
WEIGHTS = {
    "q": _array(L, D, N, H),
    "k": _array(L, D, K, H),
    "v": _array(L, D, K, H),
    "o": _array(L, N, H, D),
    "up": _array(L, D, F),
    "gate": _array(L, D, F),
    "down": _array(L, F, D),
}


def _layer(x, w):
    q = jnp.einsum("BTD,DNH->BTNH", x, w["q"]).reshape(B, T, K, N // K, H)
    k = jnp.einsum("BTD,DKH->BTKH", x, w["k"])
    v = jnp.einsum("BTD,DKH->BTKH", x, w["v"])
    p = jax.nn.softmax(jnp.einsum("BTKGH,BSKH->BKGTS", q, k))
    o = jnp.einsum("BKGTS,BSKH->BTKGH", p, v).reshape(B, T, N, H)
    x = x + jnp.einsum("BTNH,NHD->BTD", o, w["o"])
    return x + (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"], None


def _loss(weights, embedding, tokens, remat: bool):
    layer = jax.checkpoint(_layer) if remat else _layer
    x, _ = jax.lax.scan(layer, embedding[tokens], weights)
    logits = jnp.einsum("BTD,VD->BTV", x, embedding)
    return jnp.mean(jax.nn.logsumexp(logits, -1))


def _forward_formula() -> tuple[int, int]:
    """(layers, head): 2 per weight and token, and 4 B T^2 N H for the two attention products."""
    weights = sum(math.prod(w.shape) for w in WEIGHTS.values())
    return 2 * B * T * weights + L * 4 * B * T * T * N * H, 2 * B * T * D * V


def test_decoder_forward_is_two_per_weight_and_token():
    count = count_flops(lambda w, e, t: _loss(w, e, t, False), WEIGHTS, _array(V, D), _tokens())
    assert count.matmul_flops == sum(_forward_formula())
    assert count.by_operand_dtypes == {("float32", "float32"): count.matmul_flops}
    assert (count.opaque, count.unknown_loops) == ((), ())


@pytest.mark.parametrize(("remat", "layer_factor"), [(False, 3), (True, 4)])
def test_training_costs_three_forwards_and_remat_a_fourth(remat, layer_factor):
    """The head is outside the checkpoint, and nothing needs the last product's output again."""
    gradient = jax.grad(lambda w, e, t: _loss(w, e, t, remat), argnums=(0, 1))
    count = count_flops(jax.jit(gradient), WEIGHTS, _array(V, D), _tokens())
    layers, head = _forward_formula()
    skipped = 2 * B * T * F * D * L if remat else 0
    assert count.matmul_flops == layer_factor * layers + 3 * head - skipped


def _tokens() -> jax.ShapeDtypeStruct:
    return _array(B, T, dtype=jnp.int32)


def test_agrees_with_xla_on_a_loop_free_function():
    """Only products, so XLA's count has no elementwise work in it."""

    def function(a, b, c):
        return jnp.einsum("gmk,gkn->gmn", a, b) @ c

    args = (_array(4, 64, 128), _array(4, 128, 256), _array(256, 32))
    analysis = jax.jit(function).lower(*args).compile().cost_analysis()
    assert analysis is not None
    assert count_flops(function, *args).matmul_flops == analysis["flops"]


def test_dtypes_and_operand_bytes():
    def function(x, w, q):
        y = jax.lax.dot(x, w, preferred_element_type=f32)
        return jax.lax.scan(lambda c, _: (c @ q, None), y, None, length=5)[0]

    count = count_flops(
        function, _array(8, 16, dtype=bf16), _array(16, 4, dtype=bf16), _array(4, 4)
    )
    assert count.by_operand_dtypes == {
        ("bfloat16", "bfloat16"): 2 * 8 * 16 * 4,
        ("float32", "float32"): 5 * 2 * 8 * 4 * 4,
    }
    first = (8 * 16 + 16 * 4) * 2 + 8 * 4 * 4
    assert count.dot_operand_bytes == first + 5 * (8 * 4 + 4 * 4 + 8 * 4) * 4


def test_four_bit_operands_count_half_a_byte():
    count = count_flops(
        lambda a, b: jax.lax.dot(a, b, preferred_element_type=jnp.int32),
        _array(8, 16, dtype=jnp.int4),
        _array(16, 32, dtype=jnp.int4),
    )
    assert count.dot_operand_bytes == (8 * 16 + 16 * 32) // 2 + 8 * 32 * 4


def test_convolution():
    def function(image, kernel):
        return jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", feature_group_count=2)

    count = count_flops(function, _array(2, 8, 10, 10), _array(6, 4, 3, 3))
    assert count.matmul_flops == 2 * (2 * 6 * 10 * 10) * (4 * 3 * 3)


def test_ragged_dot_and_its_gradient():
    """Each of M rows meets one expert; both gradients cost the same again."""
    args = (_array(8, 16), _array(4, 16, 32), _array(4, dtype=jnp.int32))
    forward = 2 * 8 * 16 * 32
    assert count_flops(jax.lax.ragged_dot, *args).matmul_flops == forward

    def loss(x, w, sizes):
        return jnp.sum(jax.lax.ragged_dot(x, w, sizes) ** 2)

    assert count_flops(jax.grad(loss, argnums=(0, 1)), *args).matmul_flops == 3 * forward


def test_cond_counts_its_largest_branch_and_while_is_reported():
    def branch(x, n):
        return jax.lax.cond(n > 0, lambda v: v @ v @ v, lambda v: v @ v, x)

    square, n = _array(8, 8), _array(dtype=jnp.int32)
    assert count_flops(branch, square, n).matmul_flops == 2 * 2 * 8**3

    def loop(x, n):
        return jax.lax.fori_loop(0, n, lambda _, v: v @ v, x)

    count = count_flops(loop, square, n)
    assert count.matmul_flops == 2 * 8**3
    assert len(count.unknown_loops) == 1
    known = count_jaxpr(jax.jit(loop).trace(square, n).jaxpr, turns=Fraction(5, 2))
    assert (known.matmul_flops, known.unknown_loops) == (5 * 8**3, ())
    static = count_flops(lambda x: jax.lax.fori_loop(0, 6, lambda _, v: v @ v, x), square)
    assert (static.matmul_flops, static.unknown_loops) == (6 * 2 * 8**3, ())


def test_custom_derivatives_count_what_runs():
    @jax.custom_vjp
    def function(x):
        return x @ x

    function.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x + x @ g,))
    one = 2 * 8**3
    assert count_flops(function, _array(8, 8)).matmul_flops == one
    value_and_grad = jax.value_and_grad(lambda x: jnp.sum(function(x)))
    assert count_flops(value_and_grad, _array(8, 8)).matmul_flops == 3 * one

    jvp = jax.custom_jvp(lambda x: x @ x)
    jvp.defjvp(lambda x, t: (x[0] @ x[0], t[0] @ x[0] + x[0] @ t[0]))
    assert count_flops(jvp, _array(8, 8)).matmul_flops == one


def test_shard_map_counts_every_device():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"))
    mapped = jax.shard_map(
        lambda x, w: jax.lax.psum(x @ w, "tensor"),
        mesh=mesh,
        in_specs=(P("data", "tensor"), P("tensor", None)),
        out_specs=P("data", None),
    )
    assert count_flops(mapped, _array(8, 16), _array(16, 32)).matmul_flops == 2 * 8 * 16 * 32


def test_of_branches_one_without_a_kernel_counts():
    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...]

    estimate = pl.CostEstimate(flops=10**9, transcendentals=0, bytes_accessed=7)
    call = pl.pallas_call(kernel, out_shape=_array(8, 8), cost_estimate=estimate, interpret=True)
    count = count_flops(
        lambda x, n: jax.lax.cond(n > 0, call, lambda v: v @ v, x),
        _array(8, 8), _array(dtype=jnp.int32),
    )  # fmt: skip
    assert (count.matmul_flops, count.opaque) == (2 * 8**3, ())


@pytest.mark.parametrize(
    "estimate", [None, pl.CostEstimate(flops=100, transcendentals=0, bytes_accessed=7)]
)
def test_kernels_are_opaque_with_their_estimate(estimate):
    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...]

    call = pl.pallas_call(
        kernel, out_shape=_array(8, 128), cost_estimate=estimate, interpret=True, name="copy_it"
    )
    count = count_flops(
        lambda x: jax.lax.scan(lambda c, _: (call(c), None), x, None, length=3)[0], _array(8, 128)
    )
    assert count.matmul_flops == 0
    assert count.opaque_flops == (0 if estimate is None else 300)
    assert "copy_it" in count.opaque[0]
    assert ("no cost_estimate" if estimate is None else "100 flops") in count.opaque[0]


def test_decompositions_are_opaque_and_unused_results_are_dropped():
    assert "lu" in count_flops(jnp.linalg.inv, _array(8, 8)).opaque

    def unused(x):
        _ = x @ x
        return x

    assert count_jaxpr(jax.make_jaxpr(unused)(_array(8, 8))).matmul_flops == 0
