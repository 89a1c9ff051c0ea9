"""The quantized matmul kernel, interpreted, against float64 of the operands as stored."""

import inspect

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from tpu_stack.kernels.quantized_matmul import plan as planning
from tpu_stack.kernels.quantized_matmul import quantized_matmul, reference_quantized_matmul
from tpu_stack.kernels.quantized_matmul.columns import (
    cast_to_bfloat16,
    interleave_halves,
    permute_to_planes,
    plane_row,
)
from tpu_stack.kernels.quantized_matmul.plan import make_plan
from tpu_stack.kernels.quantized_matmul.reference import dequantize

U = 2.0**-8
"""bfloat16 keeps 8 bits, so one rounding errs by at most this fraction (1.6e-3 rms)."""

LAYOUTS = [  # weight dtype, transpose, scales, scale mode
    ("int8", False, "column", "after"),
    ("int8", True, "column", "input"),
    ("int8", False, "row", "input"),
    ("int8", True, "row", "after"),
    ("int4", False, "group", "before"),
    ("int4", False, "group", "after_group"),
    ("int4", True, "group", "before"),
    ("int4", False, "column", "after"),
    ("int8", False, "group", "before"),
]


def operands(weight, transpose, scales, m, k, n, group=32, seed=0, dtype=jnp.bfloat16):
    rng = np.random.default_rng(seed)
    rows, columns = (n, k) if transpose else (k, n)
    top = 8 if weight == "int4" else 127
    values = rng.integers(-top, top, (rows, columns)).astype(np.int8)
    shape = {
        "column": (1, 1, columns),
        "row": (rows, 1),
        "group": (max(rows // group, 1), 1, columns),
    }[scales]
    factor = rng.normal(0, 0.1, shape).astype(ml_dtypes.bfloat16 if scales == "group" else "f4")
    x = jnp.asarray(rng.normal(size=(m, k)), dtype)
    return x, jnp.asarray(values).astype(weight), jnp.asarray(factor)


def relative_error(got, want) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


@pytest.mark.parametrize(("weight", "transpose", "scales", "mode"), LAYOUTS)
def test_race_free_and_right_over_many_blocks(weight, transpose, scales, mode):
    # Every axis has several blocks and a ragged edge. Memory starts as NaN, races raise.
    n, k = (544, 160) if transpose else (160, 544)
    x, values, factor = operands(weight, transpose, scales, 20, k, n)
    pltpu.reset_tpu_interpret_mode_state()
    step = 256 if scales == "group" else 128
    tiles = (16, 128, step) if transpose else (16, step, 128)
    y = quantized_matmul(
        x,
        values,
        factor,
        transpose=transpose,
        scale_mode=mode,
        tiles=tiles,
        interpret=pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan"),
    )
    want = reference_quantized_matmul(x, values, factor, transpose=transpose)
    assert relative_error(y, want) < 3e-3


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    st.sampled_from(LAYOUTS),
    st.integers(1, 40),
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from([None, (16, 256, 256)]),
    st.sampled_from([jnp.bfloat16, jnp.float32]),
    st.integers(0, 9),
)
def test_any_shape_is_within_the_rounding_bound(layout, m, k, n, tiles, dtype, seed):
    weight, transpose, scales, mode = layout
    if scales == "group":
        k, n = (k, 32 * (1 + n // 32)) if transpose else (32 * (1 + k // 32), n)
        if 32 in (n if transpose else k,):  # one group is per column: other modes apply
            mode = None
    x, values, factor = operands(weight, transpose, scales, m, k, n, seed=seed, dtype=dtype)
    y = quantized_matmul(
        x, values, factor, transpose=transpose, scale_mode=mode, tiles=tiles, interpret=True
    )
    want = reference_quantized_matmul(x, values, factor, transpose=transpose)
    w = dequantize(values, factor)
    terms = np.abs(np.asarray(x, np.float64)) @ np.abs(w.T if transpose else w)
    # One rounding of each term (of x or of w), one of the sum; float32 sums of k terms beside it.
    unit = U if dtype == jnp.bfloat16 else 2.0**-24
    bound = unit * (terms + np.abs(want) * 1.01) + 2.0**-24 * (k + 4) * terms + 1e-30
    assert y.dtype == dtype
    assert np.all(np.abs(np.asarray(y, np.float64) - want) <= bound)


def test_float32_oracle_agrees_with_float64():
    x, values, factor = operands("int4", False, "group", 4, 64, 8)
    low = reference_quantized_matmul(x, values, factor, dtype=np.float32)
    high = reference_quantized_matmul(x, values, factor)
    assert (low.dtype, high.dtype) == (np.float32, np.float64)
    assert relative_error(low, high) < 1e-6


def test_out_dtype_and_jit_and_vmap():
    x, values, factor = operands("int8", False, "column", 4, 64, 8)
    f = jax.jit(lambda x: quantized_matmul(x, values, factor, out_dtype=jnp.float32))
    want = reference_quantized_matmul(x, values, factor)
    assert f(x).dtype == jnp.float32
    assert relative_error(f(x), want) < 1e-6
    assert relative_error(jax.vmap(f)(x[None]), want[None]) < 1e-6


def test_the_plan_says_what_runs():
    x, values, factor = operands("int4", False, "group", 16, 2048, 1024)
    plan = make_plan(x, values, factor)
    assert plan.scale_mode == "before"
    assert (plan.bm, plan.bk, plan.bn, plan.grid) == (16, 2048, 1024, (1, 1, 1))
    wide = make_plan(*operands("int4", False, "group", 16, 2048, 1024, group=128))
    assert wide.scale_mode == "after_group"
    shape = ("int4", False, "group", 512, 8192, 1024)
    bf16, f32 = (operands(*shape, group=128, dtype=d) for d in (jnp.bfloat16, jnp.float32))
    assert make_plan(*f32).bk == make_plan(*bf16).bk // 2  # the same VMEM


@pytest.mark.parametrize(
    ("m", "bm", "blocks"),
    [(16, 16, 1), (65, 80, 1), (1000, 1008, 1), (1024, 1024, 1), (1025, 576, 2), (3000, 1024, 3)],
)
def test_rows_are_cut_into_equal_blocks(m, bm, blocks):
    """A last block that is nearly empty takes as long as the others."""
    x, values, factor = operands("int8", False, "column", m, 128, 128)
    plan = make_plan(x, values, factor)
    assert (plan.bm, plan.grid[0]) == (bm, blocks)
    assert make_plan(x, values, factor, tiles=(64, 128, 128)).bm == min(64, bm)  # as asked


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "bfloat16"])
@pytest.mark.parametrize(("m", "k"), [(3, 256), (40, 2304), (600, 4096)])
def test_columns_are_interleaved_exactly(dtype, m, k):
    x = jnp.asarray(np.random.default_rng(m).integers(-100, 100, (m, k))).astype(dtype)
    want = np.asarray(x.astype(jnp.float32)).reshape(m, -1, 2, 128).swapaxes(2, 3).reshape(m, k)
    got = interleave_halves(x, interpret=True)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got.astype(jnp.float32)), want)


@pytest.mark.parametrize(("m", "k"), [(96, 256), (80, 2304), (600, 4096)])
def test_rows_are_widened_exactly(m, k):
    x = jnp.asarray(np.random.default_rng(m).normal(size=(m, k))).astype("float8_e4m3fn")
    got = cast_to_bfloat16(x, interpret=True)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got), np.asarray(x.astype(jnp.bfloat16)))


def test_float8_rows_of_many_blocks_are_widened_once(monkeypatch):
    monkeypatch.setattr(planning, "device_kind", lambda: "TPU v6 lite")
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(80, 256))).astype("float8_e4m3fn")
    values = jnp.asarray(rng.integers(-9, 9, (256, 768)), jnp.int8)
    scales = jnp.asarray(rng.random((1, 1, 768)), jnp.float32)
    x_scales = jnp.asarray(rng.random((80, 1)), jnp.float32)

    def call(x, interpret=True):
        return quantized_matmul(
            x, values, scales, x_scales=x_scales, tiles=(64, 256, 128), out_dtype=jnp.float32,
            interpret=interpret,
        )  # fmt: skip

    assert "cast_to_bfloat16" in str(jax.make_jaxpr(call)(x))
    assert "cast_to_bfloat16" not in str(jax.make_jaxpr(call)(x.astype(jnp.bfloat16)))
    want = reference_quantized_matmul(x, values, scales, x_scales=x_scales)
    np.testing.assert_allclose(np.asarray(call(x)), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("codes", [2, 4, 8])
@pytest.mark.parametrize("m", [5, 128, 160])
def test_columns_are_ordered_and_summed_exactly(codes, m):
    x = np.random.default_rng(m).integers(-100, 100, (m, 1024))
    for dtype in ("int8", "bfloat16"):
        rows = jnp.asarray(x).astype(dtype)
        got, sums = permute_to_planes(rows, codes, 64, 512, codes < 8, interpret=True)
        want = x[:, plane_row(np.arange(1024), codes)]
        np.testing.assert_array_equal(np.asarray(got, np.int32), want)
        if sums is not None:
            want = x.reshape(m, 2, 8, 64).sum(-1).swapaxes(0, 1)
            np.testing.assert_array_equal(np.asarray(sums), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (4, 63)}, r"x \(4, 63\) does not fit values \(64, 8\)"),
        ({"x": (0, 64)}, "does not fit"),
        ({"scales": (3, 1, 8)}, r"scales \(3, 1, 8\) fit values \(64, 8\) neither as"),
        ({"scales": (2, 8)}, "neither as"),
        ({"mode": "after"}, "scale_mode 'after' is not possible here .*before, after_group"),
        ({"tiles": (16, 128, 128)}, r"not multiples of \(16, 256, 128\)"),
        ({"dtype": jnp.float16}, "x is float16; supported: bfloat16, float32, float8"),
        ({"out": jnp.int8}, "out_dtype is int8; supported"),
        ({"values": jnp.int16}, "values is int16; supported: int8, int4, int2, float8_e4m3fn"),
    ],
)
def test_refusals_give_the_reason(change, message):
    x = jnp.ones(change.get("x", (4, 64)), change.get("dtype", jnp.bfloat16))
    values = jnp.ones((64, 8), change.get("values", jnp.int4))
    scales = jnp.ones(change.get("scales", (2, 1, 8)), jnp.bfloat16)
    # Unwrapped: the tests' checks of annotations would refuse some of these first.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(quantized_matmul)(
            x,
            values,
            scales,
            scale_mode=change.get("mode"),
            out_dtype=change.get("out"),
            tiles=change.get("tiles"),
        )
