"""Every format with every activation, interpreted, against float64 of the operands as stored."""

from contextlib import nullcontext
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

from tpu_stack.kernels.quantized_matmul import (
    make_plan,
    quantized_matmul,
    reference_quantized_matmul,
)
from tpu_stack.kernels.quantized_matmul import plan as planning
from tpu_stack.kernels.quantized_matmul.cases import (
    ACTIVATIONS,
    FORMATS,
    abstract_operands,
    random_operands,
)
from tpu_stack.kernels.quantized_matmul.reference import dequantize

LIMIT = 3e-3
"""Relative Frobenius error: bfloat16 keeps 8 bits, so a rounding errs by 1.6e-3 rms; here x or the
weight is rounded once and the result once. float32 activations round nothing before the sum."""
KINDS = ("TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x", "TPU8t", "TPU8i")


WORST = 2.0**-8 + 2.0**-16
"""Error of one element at most, of its terms' magnitudes: x and the weight each rounded once to
bfloat16 (2**-9), and a float32 sum of a few hundred terms."""
ENOUGH = 256
"""Elements from which on the rms bound holds: of fewer, all may be rounded badly, or cancel."""


def sum_of_magnitudes(x, values, scales, x_scales=None, **keywords) -> np.ndarray:
    """|x| @ |W|, what an element's rounding errors add up from; x_scales are positive."""
    rows = x.shape[1] if np.asarray(values).dtype == np.int32 else None
    weight = np.abs(dequantize(values, scales, rows=rows, **keywords))
    terms = np.abs(np.asarray(x.astype(jnp.float32), np.float64)) @ weight
    return terms if x_scales is None else terms * np.asarray(x_scales, np.float64)


def on(kind: str):
    """Plans and traces as for this device kind."""
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def relative_error(got, want) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


def ragged(name: str) -> tuple[int, int, int]:
    """M, K, N that no block divides."""
    return 5, 3 * max(FORMATS[name].group, 32) + (0 if FORMATS[name].group else 7), 130


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_and_activation(name, activation):
    x, values, scales, keywords = random_operands(FORMATS[name], activation, *ragged(name))
    y = quantized_matmul(x, values, scales, **keywords, interpret=True)
    want = reference_quantized_matmul(x, values, scales, **keywords)
    assert y.shape == want.shape
    assert relative_error(y, want) <= (1e-6 if activation == "float32" else LIMIT)


@pytest.mark.parametrize("name", ["int8", "int4_channel"])
def test_integer_products_are_exact(name):
    x, values, scales, keywords = random_operands(FORMATS[name], "int8", 9, 700, 40)
    scales, keywords["x_scales"] = jnp.ones_like(scales), jnp.ones((9, 1), jnp.float32)
    y = quantized_matmul(x, values, scales, **keywords, out_dtype=jnp.float32, interpret=True)
    np.testing.assert_array_equal(y, reference_quantized_matmul(x, values, scales, **keywords))


@pytest.mark.parametrize("name", ["fp8_e4m3", "int4", "mxfp4", "nvfp4", "int2", "int1"])
@pytest.mark.parametrize("kind", ["TPU v6 lite", "TPU7x", "TPU8i"])
def test_what_runs_on_another_chip_is_right(name, kind, monkeypatch):
    # Its types of operands and its tiles, interpreted here.
    monkeypatch.setattr(planning, "device_kind", lambda: kind)
    for activation in ("bfloat16", "float8_e4m3fn", "int8"):
        x, values, scales, keywords = random_operands(FORMATS[name], activation, 17, 256, 72)
        y = quantized_matmul(x, values, scales, **keywords, interpret=True)
        assert relative_error(y, reference_quantized_matmul(x, values, scales, **keywords)) <= LIMIT


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("fp8_e4m3", "after"),
        ("mxfp4", "before"),
        ("nvfp4", "after_group"),
        ("int2", "before"),
        ("ternary", "after_group"),
        ("int1", "before"),
        ("int1_g64", "after_group"),
    ],
)
def test_race_free_over_many_blocks(name, mode):
    # Every axis has several blocks and a ragged edge. Memory starts as NaN, races raise.
    case = FORMATS[name]
    step = max(256, 8 * case.group)
    k = step + 2 * max(case.group, 32)
    x, values, scales, keywords = random_operands(case, "bfloat16", 20, k, 160)
    pltpu.reset_tpu_interpret_mode_state()
    y = quantized_matmul(
        *(x, values, scales),
        **keywords,
        scale_mode=mode,
        tiles=(16, step, 128),
        interpret=pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan"),
    )
    assert relative_error(y, reference_quantized_matmul(x, values, scales, **keywords)) <= LIMIT


@pytest.mark.parametrize("name", FORMATS)
def test_transposed(name):
    # K is the output here. A 1-bit weight's K is not in its array, and is told.
    _, k, n = ragged(name)
    case = FORMATS[name]
    _, values, scales, keywords = random_operands(case, "bfloat16", 1, k, n)
    g = jnp.asarray(np.random.default_rng(1).normal(size=(6, n)), jnp.bfloat16)
    rows = k if case.values == "int32" else None
    y = quantized_matmul(g, values, scales, **keywords, transpose=True, rows=rows, interpret=True)
    want = reference_quantized_matmul(g, values, scales, **keywords, transpose=True, rows=rows)
    assert y.shape == (6, k)
    assert relative_error(y, want) <= LIMIT


def _modes(name: str) -> list[str | None]:
    return [None, "before", "after_group"] if FORMATS[name].group else [None]


def fuzz(examples: int, kinds: tuple[str | None, ...] = (None,), lanes: int = 1):
    """`check_random_case` over so many random shapes, formats, activations and modes.

    kinds: device kinds to plan for; None is the host. lanes: what N is a multiple of.
    """

    @settings(deadline=None, max_examples=examples, derandomize=True, database=None)
    @given(
        st.sampled_from([(name, mode) for name in FORMATS for mode in _modes(name)]),
        st.sampled_from(ACTIVATIONS),
        st.integers(1, 40),
        st.integers(1, 300),
        st.integers(1, 260),
        st.booleans(),
        st.integers(0, 9),
        st.sampled_from(kinds),
    )
    def check_random_case(which, activation, m, k, n, small_tiles, seed, kind):
        name, mode = which
        n = -(-n // lanes) * lanes
        case = FORMATS[name]
        if case.group:
            k = case.group * (2 + k // case.group)  # two groups: one would be per column
        x, values, scales, keywords = random_operands(case, activation, m, k, n, seed)
        step = max(256, 8 * case.group)
        as_kind = partial(mock.patch.object, planning, "device_kind")
        with nullcontext() if kind is None else as_kind(lambda: kind):
            y = quantized_matmul(
                *(x, values, scales),
                **keywords,
                scale_mode=mode,
                out_dtype=jnp.float32,
                tiles=(16, step, 128) if small_tiles else None,
                interpret=True,
            )
        want = reference_quantized_matmul(x, values, scales, **keywords)
        error = np.abs(np.asarray(y, np.float64) - want)
        assert np.all(error <= WORST * sum_of_magnitudes(x, values, scales, **keywords))
        if want.size >= ENOUGH:
            assert relative_error(y, want) <= LIMIT

    return check_random_case


def test_any_shape_format_and_mode():
    fuzz(12)()


@pytest.mark.slow
def test_two_thousand_shapes_formats_and_modes():
    fuzz(2000)()


@pytest.mark.slow
def test_a_thousand_as_the_chips_have_them():
    fuzz(1000, KINDS, lanes=128)()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", FORMATS)
def test_lowers_for_tpu_8(name, activation):
    case = FORMATS[name]

    def call(x, values, scales, keywords):
        return quantized_matmul(x, values, scales, offset=case.offset, **keywords)

    for kind, shape in (("TPU8t", (16, 1024, 256)), ("TPU8i", ragged(name))):
        x, values, scales, keywords = abstract_operands(case, activation, *shape)
        with on(kind):
            traced = jax.jit(call).trace(x, values, scales, keywords)
            text = traced.lower(lowering_platforms=("tpu",)).as_text()
            plan = make_plan(x, values, scales, offset=case.offset, **keywords)
        # A small kernel more puts x's columns in the order of the weight's rows.
        assert text.count("tpu_custom_call") == 1 + (plan.uses_planes or plan.interleaves_halves)


def plan_on(kind: str, name: str, activation: str = "bfloat16", mode: str | None = None):
    case = FORMATS[name]
    x, values, scales, keywords = abstract_operands(case, activation, 16, 2048, 512)
    return make_plan(
        *(x, values, scales), scale_mode=mode, offset=case.offset, kind=kind, **keywords
    )


def test_the_plan_says_what_is_native():
    assert plan_on("TPU v6 lite", "int8", "int8").support.startswith("native: TPU v6 lite")
    assert plan_on("TPU7x", "fp8_e4m3", "float8_e4m3fn").support.startswith("native: TPU7x")
    assert plan_on("TPU8i", "int4_channel", "float8_e4m3fn").operands == ("float8_e4m3fn", "int4")
    assert plan_on("TPU7x", "int8", "int8").support == "emulated: TPU7x has no int8 x int8 unit"
    assert "has no bfloat16 x float8_e4m3fn" in plan_on("TPU v6 lite", "fp8_e4m3").support
    assert "activations are widened" in plan_on("TPU v6 lite", "int4", "float8_e4m3fn").support
    assert "no matmul facts for 'cpu'" in plan_on("cpu", "int4").support


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_has_exact_operands_on_every_chip(kind):
    for name in FORMATS:
        for activation in ACTIVATIONS:
            plan = plan_on(kind, name, activation)
            assert plan.storage.exact_in(plan.operands[1])
