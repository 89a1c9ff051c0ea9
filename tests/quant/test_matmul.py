"""The one matmul: every implementation, orientation and format against float64."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from tpu_stack.errors import UserError
from tpu_stack.quant import FORMATS as EVERY_FORMAT
from tpu_stack.quant import (
    QTensor,
    chosen_implementation,
    explain,
    get_format,
    matmul,
    quantize,
    take,
    use_implementation,
)
from tpu_stack.quant.select import IMPLEMENTATIONS, scale_mode

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


def sliceable(q: QTensor, transpose: bool) -> bool:
    """Whether scales multiply the output, and values are bytes."""
    return scale_mode(q, transpose) == "after" and q.values.dtype == jnp.int8


FORMATS = [name for name, fmt in EVERY_FORMAT.items() if fmt.quantized and "_g" not in name]
"""Every format, in its smallest group."""
WEIGHTS = [*((format, -2) for format in FORMATS), ("int8", -1), ("fp8_e4m3", -1)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("format", "axis"), WEIGHTS)
def test_against_float64(format, axis, transpose, implementation):
    x, q = case(format, axis, transpose)
    if implementation == "xla_sliced":
        q = q.widen()
        if not sliceable(q, transpose):
            with pytest.raises(UserError, match="xla_sliced needs"):
                matmul(x, q, transpose=transpose, implementation=implementation)
            return
    if implementation == "xla_blocked" and (transpose != (axis == -1) or q.packed_bits):
        with pytest.raises(UserError, match="xla_blocked needs"):
            matmul(x, q, transpose=transpose, implementation=implementation)
        return
    y = matmul(x, q, transpose=transpose, implementation=implementation)
    assert y.dtype == x.dtype
    assert error(y, oracle(x, q, transpose)) < TOLERANCE


@pytest.mark.parametrize(  # 4 and 6 rows: either side of FUSED_M, where the CPU's way changes
    ("implementation", "rows"),
    [("xla", 2), ("xla_blocked", 4), ("xla_blocked", 6), ("xla_sliced", 6)],
)
@pytest.mark.parametrize("format", [*FORMATS, "int2_g128", "int4_g64"])
def test_float32_activations_reach_float32(format, implementation, rows):
    x, q = case(format, -2, False, jnp.float32, rows)
    if implementation == "xla_sliced" and not sliceable(q.widen(), False):
        return
    y = matmul(x, q.widen(), implementation=implementation)
    assert error(y, oracle(x, q, False)) < 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("format", "axis", "transpose"),
    [*((format, -2, False) for format in FORMATS), ("int4", -2, True), ("int8", -1, True)],
)
def test_gradient_reaches_x(format, axis, transpose, implementation):
    x, q = case(format, axis, transpose)
    if implementation == "xla_blocked":
        if transpose != (axis == -1):
            return
        q = q.widen()
    if implementation == "xla_sliced":
        q = q.widen()
        if not sliceable(q, transpose):
            return
    if implementation == "pallas" and format not in ("int8", "mxfp4", "int1"):
        return  # interpreted slowly; its transposed products are tested with the kernel
    out, back = jax.vjp(
        lambda x: matmul(x, q, transpose=transpose, implementation=implementation), x
    )
    g = jax.random.normal(jax.random.key(2), out.shape).astype(out.dtype)
    (dx,) = back(g)
    assert dx.dtype == x.dtype
    assert error(dx, oracle(g, q, not transpose)) < TOLERANCE


@pytest.mark.parametrize("format", ["int8", "nvfp4", "int1"])
def test_the_weight_is_frozen(format):
    x, q = case(format, -2, False)
    dq = jax.grad(lambda q: matmul(x, q).astype(jnp.float32).sum(), allow_int=True)(q)
    assert not np.asarray(dq.scales).astype(np.float32).any()
    if q.spec.kind == "float":
        assert not dq.tensor_scale.any()
    else:
        assert dq.values.dtype == jax.dtypes.float0


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


@pytest.mark.parametrize("format", FORMATS)
def test_widened_values_give_the_same(format):
    x, q = case(format, -2, False)
    for implementation in ("xla", "xla_blocked")[: 1 if q.packed_bits else 2]:
        np.testing.assert_array_equal(
            matmul(x, q, implementation=implementation),
            matmul(x, q.widen(), implementation=implementation),
        )


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("format", ["int4", "mxfp4"])
def test_a_rotated_weight(format, implementation, transpose):
    x, _ = case(format, -2, transpose, jnp.float32)
    q = quantize(jax.random.normal(jax.random.key(0), (128, 192)), format, rotation=64)
    if implementation == "xla_blocked" and transpose:
        return
    if implementation == "xla_sliced":
        q = q.widen()
        if not sliceable(q, transpose):
            return

    def product(x):
        return matmul(x, q, transpose=transpose, implementation=implementation)

    # The kernel widens to bfloat16.
    y, back = jax.vjp(product, x)
    assert error(y, oracle(x, q, transpose)) < (TOLERANCE if implementation == "pallas" else 1e-6)
    g = jax.random.normal(jax.random.key(2), y.shape)
    assert error(back(g)[0], oracle(g, q, not transpose)) < TOLERANCE
    # bfloat16 activations are rounded once more, after their rotation: three roundings of 1.6e-3,
    # 2.8e-3 in all.
    x = x.astype(jnp.bfloat16)
    assert error(product(x), oracle(x, q, transpose)) < TOLERANCE


@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from([name for name, fmt in EVERY_FORMAT.items() if fmt.quantized]),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(1, 40),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_any_shape_and_format(format, m, groups, n, transpose, seed):
    rng = np.random.default_rng(seed)
    k = groups * (get_format(format).group or 24)
    q = quantize(rng.standard_normal((k, n)).astype(np.float32), format).check()
    x = jnp.asarray(rng.standard_normal((m, n if transpose else k)), jnp.bfloat16)
    for weight in (q, q.widen().check()):
        y = matmul(x, weight, transpose=transpose, implementation="xla", out_dtype=jnp.float32)
        want = oracle(x, q, transpose)
        # A sum of few terms may cancel: the error is against the norms of what was multiplied.
        # Where the sum is one term, its one rounding to bfloat16 is all of it: 2**-8 at the worst.
        scale = np.linalg.norm(np.asarray(x, np.float64)) * np.linalg.norm(q.dequantize())
        assert np.linalg.norm(np.asarray(y) - want) <= 2**-8 * scale + 1e-30


def test_the_context_selects_and_retraces():
    x, q = case("int4", -2, False)
    f = jax.jit(lambda x, q: matmul(x, q))
    assert "pallas" not in f.lower(x, q).as_text(debug_info=True)
    f(x, q)
    with use_implementation("pallas"):
        assert chosen_implementation(x, q) == "pallas"
        assert "requested by use_implementation" in explain(x, q).reason
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
        inspect.unwrap(matmul)(jnp.ones((2, 128), jnp.int32), q)  # below the annotations' checks
    with pytest.raises(UserError, match="did you mean 'pallas'"):
        matmul(x, q, implementation="palas")
    with pytest.raises(UserError, match="unknown matmul"), use_implementation("cuda"):
        pass
    with pytest.raises(UserError, match="x is float16; supported: bfloat16, float32"):
        matmul(x.astype(jnp.float16), q, implementation="pallas")


@pytest.mark.parametrize(("format", "axis"), WEIGHTS)
def test_take_rows(format, axis):
    _, q = case(format, axis, False)
    np.testing.assert_array_equal(
        take(q.widen(), jnp.arange(128), jnp.float32), take(q, jnp.arange(128), jnp.float32)
    )
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
    rotated = quantize(jnp.ones((32, 2)), "int4", rotation=32)
    with pytest.raises(UserError, match="rows of a rotated weight are mixed"):
        take(rotated, jnp.array([1]))


def test_take_beyond_packed_bits():
    q = quantize(jax.random.normal(jax.random.key(0), (288, 3)), "int1")
    ids = jnp.array([0, 7, 8, 255, 256, 287, -1])
    np.testing.assert_array_equal(take(q, ids, jnp.float32), q.dequantize()[ids])
    assert bool(jnp.isnan(take(q, jnp.array([288, -289]))).all())
