"""The one matmul: every implementation, orientation and format against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tpu_stack.errors import UserError
from tpu_stack.quant import (
    QTensor,
    chosen_implementation,
    explain,
    matmul,
    quantize,
    take,
    use_implementation,
)
from tpu_stack.quant.select import IMPLEMENTATIONS

# bfloat16 keeps 8 bits: one rounding errs by at most 2**-8, 1.6e-3 root mean square. The weight (or
# x) and the result are each rounded once, 2.3e-3 in all; the design allows 3e-3.
TOLERANCE = 3e-3


def case(format: str, axis: int, transpose: bool, dtype=jnp.bfloat16, rows: int = 6):
    w = jax.random.normal(jax.random.key(0), (128, 192))
    q = quantize(w, format, axis)
    width = 192 if transpose else 128
    return jax.random.normal(jax.random.key(1), (2, rows // 2, width)).astype(dtype), q


def oracle(x, q: QTensor, transpose: bool) -> np.ndarray:
    w = np.asarray(q.dequantize(), np.float64)
    return np.asarray(x, np.float64) @ (w.T if transpose else w)


def error(got, want) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


WEIGHTS = [("int8", -2), ("int4", -2), ("int8", -1)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("format", "axis"), WEIGHTS)
def test_against_float64(format, axis, transpose, implementation):
    x, q = case(format, axis, transpose)
    if implementation == "xla_blocked" and transpose != (axis == -1):
        with pytest.raises(UserError, match="xla_blocked needs"):
            matmul(x, q, transpose=transpose, implementation=implementation)
        return
    y = matmul(x, q, transpose=transpose, implementation=implementation)
    assert y.dtype == x.dtype
    assert error(y, oracle(x, q, transpose)) < TOLERANCE


@pytest.mark.parametrize("implementation", ["xla", "xla_blocked"])
def test_float32_activations_reach_float32(implementation):
    x, q = case("int4", -2, False, jnp.float32)
    y = matmul(x, q, implementation=implementation)
    assert error(y, oracle(x, q, False)) < 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("format", "axis", "transpose"), [("int4", -2, False), ("int8", -1, True)])
def test_gradient_reaches_x(format, axis, transpose, implementation):
    x, q = case(format, axis, transpose)
    out, back = jax.vjp(
        lambda x: matmul(x, q, transpose=transpose, implementation=implementation), x
    )
    g = jax.random.normal(jax.random.key(2), out.shape).astype(out.dtype)
    (dx,) = back(g)
    assert dx.dtype == x.dtype
    assert error(dx, oracle(g, q, not transpose)) < TOLERANCE


def test_the_weight_is_frozen():
    x, q = case("int8", -2, False)
    dq = jax.grad(lambda q: matmul(x, q).astype(jnp.float32).sum(), allow_int=True)(q)
    assert dq.values.dtype == jax.dtypes.float0
    assert not dq.scales.any()


def test_plain_arrays_accumulate_in_float32():
    x = jnp.ones((1, 4096), jnp.bfloat16)
    w = jnp.full((4096, 2), 1 + 2**-7, jnp.float32)
    y = matmul(x, w, out_dtype=jnp.float32)
    np.testing.assert_array_equal(y, np.full((1, 2), 4096 * (1 + 2**-7)))
    np.testing.assert_array_equal(matmul(x, w.T, transpose=True, out_dtype=jnp.float32), y)
    assert chosen_implementation(x, w) == "dot"


def test_out_dtype_is_rounded_once_from_float32():
    x, q = case("int8", -2, False)
    wide = matmul(x, q, out_dtype=jnp.float32)
    assert wide.dtype == jnp.float32
    np.testing.assert_array_equal(matmul(x, q), wide.astype(jnp.bfloat16))


def test_widened_int4_gives_the_same():
    x, q = case("int4", -2, False)
    for implementation in IMPLEMENTATIONS:
        np.testing.assert_array_equal(
            matmul(x, q, implementation=implementation),
            matmul(x, q.widen(), implementation=implementation),
        )


def test_the_context_selects_and_retraces():
    x, q = case("int4", -2, False)
    f = jax.jit(lambda x, q: matmul(x, q))
    assert "pallas" not in f.lower(x, q).as_text(debug_info=True)
    f(x, q)
    with use_implementation("pallas"):
        assert chosen_implementation(x, q) == "pallas"
        assert "asked for by use_implementation" in explain(x, q).reason
        assert "quantized_matmul" in f.lower(x, q).as_text(debug_info=True)
        assert error(f(x, q), oracle(x, q, False)) < TOLERANCE
        assert chosen_implementation(x, q, implementation="xla") == "xla"
    assert chosen_implementation(x, q) == "xla"


def test_the_default_on_a_partitioned_program_is_xla():
    x, q = case("int4", -2, False)
    assert explain(x, q).implementation == "xla"  # the tests run on eight devices


def test_the_default_inside_shard_map_is_blocked():
    x, q = case("int4", -2, False)
    mesh = jax.make_mesh((8,), ("data",))
    seen = []

    def body(x, q):
        seen.append(chosen_implementation(x, q))
        return matmul(x, q)

    f = jax.shard_map(body, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False)
    assert error(f(x, q), oracle(x, q, False)) < TOLERANCE
    assert set(seen) == {"xla_blocked"}


def test_pallas_refuses_a_mesh_the_compiler_partitions():
    x, q = case("int4", -2, False)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh), pytest.raises(UserError, match="call sharded_matmul"):
        matmul(x, q, implementation="pallas")


def test_bad_input_is_one_clear_line():
    x, q = case("int4", -2, False)
    with pytest.raises(
        UserError, match=r"x \[2, 3, 128\] does not fit weight \[128, 192\] with tr"
    ):
        matmul(x, q, transpose=True)
    with pytest.raises(UserError, match="two axes"):
        matmul(x, jnp.ones((2, 128, 3)))
    with pytest.raises(UserError, match="x must be floating, got int32"):
        matmul(jnp.ones((2, 128), jnp.int32), q)
    with pytest.raises(UserError, match="did you mean 'pallas'"):
        matmul(x, q, implementation="palas")
    with pytest.raises(UserError, match="unknown matmul"), use_implementation("cuda"):
        pass
    with pytest.raises(UserError, match="x is float16; supported: bfloat16, float32"):
        matmul(x.astype(jnp.float16), q, implementation="pallas")


@pytest.mark.parametrize(("format", "axis"), WEIGHTS)
def test_take_rows(format, axis):
    _, q = case(format, axis, False)
    ids = jnp.array([[0, 127], [64, 3]])
    np.testing.assert_array_equal(take(q, ids, jnp.float32), q.dequantize()[ids])
    assert take(q, ids).dtype == jnp.bfloat16
    np.testing.assert_array_equal(take(q, jnp.array([-1]), jnp.float32), q.dequantize()[-1:])


def test_take_from_an_array_and_beyond_it():
    w = jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(take(w, jnp.array([2, 0])), [[4, 5], [0, 1]])
    assert bool(jnp.isnan(take(w, jnp.array([3]))).all())
    q = quantize(w, "int8", contract_axis=-1)
    assert bool(jnp.isnan(take(q, jnp.array([3]))).all())
