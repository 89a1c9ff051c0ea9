"""2-bit weights as float8_e5m2 bytes made by shifts, interpreted as v6e runs them."""

import jax.numpy as jnp
import numpy as np
import pytest

from tpu_stack.kernels.quantized_matmul import (
    make_plan,
    quantized_matmul,
    reference_quantized_matmul,
)
from tpu_stack.kernels.quantized_matmul import plan as planning
from tpu_stack.kernels.quantized_matmul.cases import FORMATS, abstract_operands, random_operands

KIND = "TPU v6 lite"
EXACT = 1e-5
"""Relative Frobenius error: x, bytes and scales are exact in what is multiplied, so only float32
sums round, of terms up to seven times the result's (a byte is 2 to 3.5, a weight at least 0.5)."""


@pytest.mark.parametrize(
    ("name", "shape", "tiles"),
    [
        ("int2_g64", (1, 512, 256), None),
        ("int2_g128", (3, 640, 128), None),
        ("ternary", (16, 96, 128), None),
        ("ternary_g64", (17, 1152, 384), (16, 1024, 256)),
        ("int2", (20, 544, 384), (16, 256, 256)),
    ],
)
def test_bytes_are_right_at_ragged_shapes(name, shape, tiles, monkeypatch):
    monkeypatch.setattr(planning, "device_kind", lambda: KIND)
    x, values, scales, keywords = random_operands(FORMATS[name], "bfloat16", *shape)
    how = {"scale_mode": "after_group", "tiles": tiles}
    assert make_plan(x, values, scales, **keywords, **how).quarters
    y = quantized_matmul(
        x, values, scales, **keywords, **how, out_dtype=jnp.float32, interpret=True
    )
    want = reference_quantized_matmul(x, values, scales, **keywords)
    error = np.linalg.norm(np.asarray(y, np.float64) - want) / np.linalg.norm(want)
    assert y.shape == want.shape
    assert error <= EXACT


@pytest.mark.parametrize("scales_dtype", ["bfloat16", "float32"])
def test_bytes_with_wide_groups_and_float32_scales(scales_dtype, monkeypatch):
    monkeypatch.setattr(planning, "device_kind", lambda: KIND)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(5, 512)), jnp.bfloat16)
    values = jnp.asarray(rng.integers(-2, 2, (512, 128)), jnp.int8).astype(jnp.int2)
    scales = jnp.asarray(rng.normal(size=(2, 1, 128)), scales_dtype)
    y = quantized_matmul(
        x, values, scales, offset=0.5, scale_mode="after_group", out_dtype=jnp.float32,
        interpret=True,
    )  # fmt: skip
    want = reference_quantized_matmul(x, values, scales, offset=0.5)
    assert np.linalg.norm(np.asarray(y, np.float64) - want) <= EXACT * np.linalg.norm(want)


def plan_of(name: str, activation: str, kind: str, n: int = 512, **keywords):
    x, values, scales, arrays = abstract_operands(FORMATS[name], activation, 16, 2048, n)
    offset = FORMATS[name].offset
    return make_plan(x, values, scales, offset=offset, kind=kind, **arrays, **keywords)


def test_bytes_only_where_the_tiles_say_so():
    plan = plan_of("int2_g64", "bfloat16", KIND)
    assert plan.quarters
    assert plan.support.startswith("native: TPU v6 lite multiplies bfloat16 x float8_e5m2")
    assert plan_of("ternary_g128", "float8_e4m3fn", KIND).quarters
    assert not plan_of("int2", "bfloat16", KIND).quarters  # copies of x outweigh the bytes
    assert not plan_of("int2_g128", "bfloat16", "TPU7x").quarters
    assert not plan_of("int2_g128", "bfloat16", KIND, n=500).quarters
    assert not plan_of("int2_g128", "bfloat16", KIND, quarters=False).quarters
    assert plan_of("int2_g128", "int8", KIND).operands == ("int8", "int8")
