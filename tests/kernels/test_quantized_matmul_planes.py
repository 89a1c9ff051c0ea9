"""Weights decoded to float8_e5m2 bit planes, interpreted as v5e and v6e run them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from tpu_stack.kernels.quantized_matmul import (
    e5m2_planes,
    make_plan,
    quantized_matmul,
    reference_quantized_matmul,
)
from tpu_stack.kernels.quantized_matmul import plan as planning
from tpu_stack.kernels.quantized_matmul.cases import FORMATS, abstract_operands, random_operands
from tpu_stack.kernels.quantized_matmul.columns import plane_row
from tpu_stack.kernels.quantized_matmul.widen import as_stored, storage_of

V5E, V5P, V6E = "TPU v5 lite", "TPU v5", "TPU v6 lite"
EXACT = 1e-5
"""Relative Frobenius error: x, bytes and scales are exact in what is multiplied, so only float32
sums round, of terms up to seven times the result's (a byte is 2 to 3.5, a weight at least 0.5)."""


@pytest.mark.parametrize(
    ("dtype", "offset", "codes"),
    [
        ("int2", 0.0, range(-2, 2)),
        ("int2", 0.5, range(-2, 2)),
        ("int4", 0.0, range(-8, 8)),
        ("float4_e2m1fn", 0.0, (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)),
    ],
)
def test_every_code_in_every_place_is_a_normal_number_of_its_value(dtype, offset, codes):
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.permutation(np.repeat(codes, 128 * 128 // len(codes))), jnp.float32)
    values = values.reshape(128, 128).astype(dtype)
    storage = storage_of(values.dtype, offset)
    stored = as_stored(values, storage)
    places = len(e5m2_planes.plane_factors(storage))

    planes = planes_of(stored, storage, slice(0, 128), places)
    total = sum(
        factor * np.asarray(plane, np.float64)
        for factor, plane in zip(e5m2_planes.plane_factors(storage), planes, strict=True)
    )
    total = (total - e5m2_planes.plane_offset(storage)) * e5m2_planes.plane_multiplier(storage)
    span = 32 * (8 // storage.bits)
    order = np.arange(128).reshape(-1, span // (8 // storage.bits), 8 // storage.bits)
    order = order.swapaxes(1, 2).ravel()  # of each span: those in place 0, then in place 1 ...
    np.testing.assert_array_equal(total, np.asarray(values, np.float64)[order] + offset)
    no_subnormal(planes)


def planes_of(stored, storage, rows, places=1):
    """The planes of these rows of the block, [128, 128] each."""

    def kernel(w_ref, *outs):
        every = e5m2_planes.unpack_planes(w_ref, rows, slice(0, 128), storage)
        for out, (_, plane) in zip(outs, every, strict=True):
            out[...] = plane

    plane = jax.ShapeDtypeStruct((rows.stop - rows.start, 128), jnp.float8_e5m2)
    return pl.pallas_call(kernel, out_shape=[plane] * places, interpret=True)(stored)


def no_subnormal(planes):
    for plane in planes:
        bits = np.asarray(plane).view(np.uint8)
        assert np.all(((bits & 0x7C) != 0) | ((bits & 0x7F) == 0))


@pytest.mark.parametrize("depth", [128, 256])
def test_every_sign_in_every_place(depth):
    signs = np.random.default_rng(0).integers(0, 2, (512, 128)) * 2 - 1
    row = np.arange(512)
    words = np.zeros((16, 128), np.uint32)
    for k in row:  # the layout that `quantized_matmul` documents
        bit = np.uint32(1) << np.uint32(k % 256 // 8)
        words[8 * (k // 256) + k % 8] |= np.where(signs[k] > 0, bit, np.uint32(0))
    stored, storage = jnp.asarray(words.view(np.int32)), storage_of(jnp.int32)
    found = []
    for first in range(0, 512, depth):
        planes = planes_of(stored, storage, slice(first, first + depth))
        no_subnormal(planes)
        found.append(np.asarray(planes[0], np.float64))
    place = plane_row(row, 8)
    assert sorted(place) == list(row)
    np.testing.assert_array_equal(np.concatenate(found), signs[place])


@pytest.mark.parametrize(
    ("kind", "name", "shape", "tiles"),
    [
        (V6E, "int2_g64", (1, 512, 256), None),
        (V5E, "int2_g128", (3, 640, 128), None),
        (V5E, "ternary", (16, 96, 128), None),
        (V5E, "ternary_g64", (17, 1152, 384), (16, 1024, 256)),
        (V5E, "int2", (20, 544, 384), (16, 256, 256)),
        (V5P, "int4", (3, 544, 128), None),
        (V5E, "int4_g128", (17, 1152, 384), (16, 1024, 256)),
        (V6E, "mxfp4", (5, 544, 384), (16, 256, 256)),
        (V5E, "mxfp4", (1, 640, 128), None),
        (V6E, "nvfp4", (3, 592, 128), None),
        (V5E, "nvfp4", (17, 1152, 384), (16, 512, 256)),
        (V6E, "int1_g64", (16, 576, 128), None),
        (V5E, "int1_g128", (3, 640, 256), None),
        (V6E, "int1_g128", (32, 1408, 256), (16, 1024, 128)),
    ],
)
@pytest.mark.parametrize("activation", ["bfloat16", "int8"])
def test_planes_are_exact_at_ragged_shapes(kind, name, shape, tiles, activation, monkeypatch):
    monkeypatch.setattr(planning, "device_kind", lambda: kind)
    x, values, scales, keywords = random_operands(FORMATS[name], activation, *shape)
    how = {"scale_mode": "after_group", "tiles": tiles}
    if not make_plan(x, values, scales, **keywords, **how).uses_planes:
        assert (activation, name[:5]) in {("int8", "int2_"), ("int8", "int4_")}  # as int8 there
        return
    y = quantized_matmul(
        x, values, scales, **keywords, **how, out_dtype=jnp.float32, interpret=True
    )
    want = reference_quantized_matmul(x, values, scales, **keywords)
    error = np.linalg.norm(np.asarray(y, np.float64) - want) / np.linalg.norm(want)
    assert y.shape == want.shape
    assert error <= EXACT


@pytest.mark.parametrize("scales_dtype", ["bfloat16", "float32"])
def test_planes_with_wide_groups_and_float32_scales(scales_dtype, monkeypatch):
    monkeypatch.setattr(planning, "device_kind", lambda: V6E)
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


def plan_of(name: str, activation: str, kind: str, n: int = 512, m: int = 16, **keywords):
    x, values, scales, arrays = abstract_operands(FORMATS[name], activation, m, 2048, n)
    offset = FORMATS[name].offset
    return make_plan(x, values, scales, offset=offset, kind=kind, **arrays, **keywords)


def test_planes_only_where_the_tiles_say_so():
    plan = plan_of("int2_g64", "bfloat16", V6E)
    assert plan.uses_planes
    assert plan.support.startswith("native: TPU v6 lite multiplies bfloat16 x float8_e5m2")
    assert plan_of("ternary_g128", "float8_e4m3fn", V6E).uses_planes
    assert not plan_of("int2", "bfloat16", V6E).uses_planes  # copies of x outweigh the bytes
    assert plan_of("int2", "bfloat16", V5E).uses_planes
    assert not plan_of("int2_g64", "bfloat16", V6E, m=17).uses_planes
    assert plan_of("int2_g128", "bfloat16", V6E, m=17).uses_planes
    assert plan_of("int2_g128", "bfloat16", "TPU7x").uses_planes
    assert not plan_of("int2", "bfloat16", "TPU7x").uses_planes
    assert not plan_of("int2_g128", "bfloat16", V6E, n=500).uses_planes
    assert not plan_of("int4", "bfloat16", V6E).uses_planes  # a cast of int4 is cheap there
    assert plan_of("int2_g128", "int8", V6E).operands == ("int8", "int8")
    assert plan_of("int2_g64", "int8", V6E).uses_planes  # it would be scaled first, as bfloat16
    assert plan_of("int2_g128", "int8", "TPU7x").uses_planes  # which has no units for int8
    assert plan_of("int1_g64", "bfloat16", V6E).uses_planes
    assert plan_of("int1", "bfloat16", V6E).interleaves_halves


def test_a_product_is_as_deep_as_the_matrix_unit():
    assert plan_of("mxfp4", "bfloat16", V5E).depth == 128
    assert plan_of("mxfp4", "bfloat16", V6E).depth == 256
