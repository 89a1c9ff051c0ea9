"""The grouped kernel, interpreted, against float64 of each expert's operands as stored."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from tpu_stack.kernels.grouped_matmul import (
    grouped_matmul,
    make_grouped_plan,
    reference_grouped_matmul,
    visits,
)
from tpu_stack.kernels.grouped_matmul import plan as grouped_planning
from tpu_stack.kernels.grouped_matmul import tiles as grouped_tiles
from tpu_stack.kernels.quantized_matmul import plan as planning
from tpu_stack.kernels.quantized_matmul.cases import FORMATS, random_operands

TOLERANCE = 3e-3
"""Relative Frobenius error in bfloat16: x or the scaled weight, and the result, are rounded once,
by 2**-9 / sqrt(3) rms of each."""


def operands(name, sizes, k=160, n=144, activation="bfloat16", spare=0):
    """x, values, scales, group_sizes and keywords; `spare` rows are padding."""
    m = sum(sizes) + spare
    if name == "bfloat16":
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(size=(m, k)), activation)
        values = jnp.asarray(rng.normal(size=(len(sizes), k, n)), jnp.bfloat16)
        return x, values, None, jnp.asarray(sizes, jnp.int32), {}
    parts: list[Any] = [
        random_operands(FORMATS[name], activation, m, k, n, seed=e) for e in range(len(sizes))
    ]
    keywords: dict[str, Any] = {
        key: parts[0][3][key] for key in ("offset", "x_scales") if key in parts[0][3]
    }
    if "tensor_scale" in parts[0][3]:
        keywords["tensor_scale"] = jnp.stack([part[3]["tensor_scale"] for part in parts])
    values, scales = (jnp.stack([part[i] for part in parts]) for i in (1, 2))
    return parts[0][0], values, scales, jnp.asarray(sizes, jnp.int32), keywords


def check(x, values, scales, sizes, keywords, tolerance=TOLERANCE, **options):
    """Within `tolerance` of float64, and exactly zero in padding rows."""
    got = grouped_matmul(x, values, scales, sizes, **keywords, **options)
    ours = {key: options[key] for key in ("transpose", "rows") if key in options}
    want = reference_grouped_matmul(x, values, scales, sizes, **keywords, **ours)
    got = np.asarray(got).astype(np.float64)
    assert got.shape == want.shape
    assert not got[int(sizes.sum()) :].any()
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


ONE_OF_EACH = [
    *("int8", "fp8_e4m3", "fp8_e5m2", "int4", "int4_channel", "mxfp4", "nvfp4"),
    *("int2", "ternary", "int1", "bfloat16"),
]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_format_with_ragged_and_empty_groups(name):
    check(*operands(name, [0, 17, 0, 1, 30, 0], spare=3))


@pytest.mark.parametrize("name", ["int8", "int4", "nvfp4", "int1", "bfloat16"])
def test_transposed(name):
    x, values, scales, sizes, keywords = operands(name, [5, 0, 20], k=160, n=144)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(x.shape[0], 144)), x.dtype)
    rows = {"rows": 160} if name == "int1" else {}
    check(x, values, scales, sizes, keywords, transpose=True, **rows)


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("int8", "int8"),
        ("int4_channel", "int8"),
        ("int4", "int8"),
        ("int2", "int8"),
        ("fp8_e4m3", "float8_e4m3fn"),
    ],
)
def test_quantized_rows(name, activation):
    check(*operands(name, [5, 0, 20], activation=activation))


@pytest.mark.parametrize("name", ["int4", "int8", "bfloat16"])
def test_float32_rows(name):
    # Sums of 160 float32 terms.
    check(*operands(name, [5, 0, 20], activation="float32"), tolerance=1e-6)


@pytest.mark.parametrize("sizes", [[0, 17, 0, 1, 30, 0], [16, 16, 0, 32], [0, 0, 50, 3]])
@pytest.mark.parametrize("name", ["int4", "int8"])
def test_race_free_over_many_blocks(name, sizes):
    arguments = operands(name, sizes, k=288, n=200, spare=40)
    pltpu.reset_tpu_interpret_mode_state()
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    tiles = (16, 256 if name == "int4" else 128, 128)
    check(*arguments, interpret=params, tiles=tiles)


V5E, V5P, V6E = "TPU v5 lite", "TPU v5", "TPU v6 lite"


@pytest.mark.parametrize(
    ("kind", "name", "activation", "k"),
    [
        *((V6E, name, "bfloat16", 512) for name in ("mxfp4", "nvfp4", "ternary_g64")),
        *((V5E, name, "bfloat16", 1472) for name in ("mxfp4", "int4_g64", "int2")),  # ragged K
        (V5P, "int4_g64", "float8_e4m3fn", 512),
        (V6E, "int2_g128", "float8_e4m3fn", 640),
        ("TPU7x", "int4", "bfloat16", 640),
        ("TPU7x", "mxfp4", "bfloat16", 1280),
    ],
)
def test_the_ways_of_each_chip(kind, name, activation, k, monkeypatch):
    """As e5m2 planes, or with interleaved tiles: blocks of 16 rows, some of them padding."""
    monkeypatch.setattr(planning, "device_kind", lambda: kind)
    monkeypatch.setattr(
        grouped_planning, "tile_overrides", lambda *_: {}
    )  # they avoid "after_group"
    arguments = operands(name, [0, 17, 0, 1, 30, 2], k=k, n=256, activation=activation, spare=30)
    plan = make_grouped_plan(*arguments[:4], **arguments[4])
    assert plan.uses_planes or plan.tile_schedule
    pltpu.reset_tpu_interpret_mode_state()
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    check(*arguments, interpret=params)


@settings(deadline=None, max_examples=6, derandomize=True)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=5),
    st.integers(0, 20),
    st.sampled_from(["int8", "int4_channel", "bfloat16"]),
    st.integers(1, 150),
)
def test_any_groups(sizes, spare, name, k):
    spare += not sum(sizes) + spare  # a row at least
    check(*operands(name, sizes, k=k, n=40, spare=spare), tiles=(16, 128, 128))


@pytest.mark.parametrize("block", [1, 16])
def test_visits_cover_every_row_once_in_order(block):
    rng = np.random.default_rng(block)
    for _ in range(6):
        sizes = rng.integers(0, 9, 6) * rng.integers(0, 2, 6)
        rows = max(1, int(sizes.sum()) + int(rng.integers(-2, 5)))
        expert, blocks, weight, bounds, count = map(
            np.asarray, visits(jnp.asarray(sizes, jnp.int32), rows, block)
        )
        assert 0 < count <= len(expert) == -(-rows // block) + 6
        assert (np.diff(blocks) >= 0).all()
        owner = np.full(rows, -1)
        for e, b in list(zip(expert, blocks, strict=True))[:count]:
            span = range(max(bounds[e], b * block), min(bounds[e + 1], (b + 1) * block))
            assert len(span)
            assert (owner[span] == -1).all()
            owner[span] = e
        want = np.append(np.repeat(np.arange(6), sizes), [6] * rows)[:rows]
        assert (owner == want).all()
        real = expert[:count] < 6
        assert (weight[:count][real] == expert[:count][real]).all()
        assert (weight < 6).all()


def test_a_sum_beyond_the_rows_is_cut():
    x, values, scales, _, keywords = operands("int8", [10, 10, 10])
    got = grouped_matmul(x, values, scales, jnp.asarray([10, 30, 10], jnp.int32), **keywords)
    want = grouped_matmul(x, values, scales, jnp.asarray([10, 20, 0], jnp.int32), **keywords)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_blocks_of_rows_fit_what_an_expert_gets():
    def blocks(m, experts):
        x = jax.ShapeDtypeStruct((m, 2048), jnp.bfloat16)
        values = jax.ShapeDtypeStruct((experts, 2048, 1024), jnp.int4)
        scales = jax.ShapeDtypeStruct((experts, 64, 1, 1024), jnp.bfloat16)
        sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
        plan = make_grouped_plan(x, values, scales, sizes)
        planes = make_grouped_plan(x, values, scales, sizes, kind=V5E)
        narrow = planes.scale_mode == "after_group"  # where rows cost as much as visits
        assert planes.bm == (min(m, 16) if narrow else plan.bm)
        return plan.m, plan.bm

    assert blocks(8, 64) == (8, 8)
    assert blocks(512, 64) == (512, 64)
    assert blocks(4096, 32) == (4096, 128)


def test_scales_come_first_where_experts_get_more_rows_than_tiles_say(monkeypatch):
    entry = {"decode": {"after_group_min": 32, "after_group_rows_max": 16}}  # 8 of groups of 32
    table = {"tuned": {"TPU v6 lite": {"int4": entry, "int4@int8": {}}}}
    monkeypatch.setattr(grouped_tiles, "read_tiles", lambda: table)
    experts = 4

    def planned(average, activation="bfloat16", scale_mode=None):
        x, values, scales, sizes, rest = operands("int4", [average] * experts, k=512, n=256)
        if activation == "int8":
            x = x.astype(jnp.int8)
        plan = make_grouped_plan(x, values, scales, sizes, kind=V6E, scale_mode=scale_mode, **rest)
        return plan.scale_mode, plan.bm

    assert planned(8) == ("after_group", 16)
    assert planned(9) == ("before", 48)  # all rows
    assert planned(20, scale_mode="after_group") == ("after_group", 32)
    assert planned(8, "int8")[0] == "before"  # its own entry, with quantized_matmul's bound


def test_experts_asked_to_scale_first_interleave_no_tiles():
    x, values, scales, sizes, rest = operands("int4", [4, 4], k=512, n=256)
    plans = [
        make_grouped_plan(x, values, scales, sizes, kind="TPU7x", scale_mode=mode, **rest)
        for mode in (None, "before")
    ]
    assert ["after_group" in plan.tile_schedule for plan in plans] == [True, False]


def test_jit_with_traced_sizes():
    x, values, scales, sizes, keywords = operands("int4", [7, 0, 9])
    compiled = jax.jit(lambda x, sizes: grouped_matmul(x, values, scales, sizes, **keywords))
    for change in (sizes, jnp.asarray([0, 16, 0], jnp.int32)):
        want = reference_grouped_matmul(x, values, scales, change, **keywords)
        assert np.linalg.norm(compiled(x, change) - want) <= TOLERANCE * np.linalg.norm(want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (4, 63)}, r"x \(4, 63\) does not fit values \(64, 8\)"),
        ({"values": (64, 8)}, r"need to be \[M, K\] and \[E, K, N\]"),
        ({"sizes": (3,)}, r"group_sizes is int32\(3,\); supported: int32\(2,\)"),
        ({"scales": None}, "values of int4 need scales"),
        ({"dtype": jnp.bfloat16}, "values of bfloat16 take no scales"),
        ({"dtype": jnp.bfloat16, "scales": None, "mode": "after"}, "bfloat16 values take no"),
        ({"scales": (2, 1, 8)}, r"2 experts need \[2, G, 1, N\]"),
        ({"scales": (2, 3, 1, 8)}, "neither as"),
        ({"scales": (2, 0, 1, 8)}, "neither as"),
        ({"tensor_scale": (1, 1, 1)}, r"supported: \(2, 1, 1, 1\)"),
        ({"x_scales": (3, 1)}, r"needs \(4, 1\)"),
        ({"tiles": (16, 128, 128)}, "not multiples of"),
    ],
)
def test_refusals_give_the_reason(change, message):
    def array(name, default, dtype):
        shape = change.get(name, default)
        return None if shape is None else jnp.ones(shape, dtype)

    scales = array("scales", (2, 2, 1, 8), jnp.bfloat16)
    # Unwrapped: the tests' checks of annotations would refuse some of these first.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(grouped_matmul)(
            jnp.ones(change.get("x", (4, 64)), jnp.bfloat16),
            jnp.ones(change.get("values", (2, 64, 8)), change.get("dtype", jnp.int4)),
            scales,
            jnp.ones(change.get("sizes", (2,)), jnp.int32),
            tensor_scale=array("tensor_scale", None, jnp.float32),
            x_scales=array("x_scales", None, jnp.float32),
            scale_mode=change.get("mode"),
            tiles=change.get("tiles"),
        )
