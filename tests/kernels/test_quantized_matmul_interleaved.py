"""Interleaved tiles: steps of a schedule that take turns, interpreted as 7x runs them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from tpu_stack.kernels.quantized_matmul import (
    make_plan,
    quantized_matmul,
    reference_quantized_matmul,
)
from tpu_stack.kernels.quantized_matmul import plan as planning
from tpu_stack.kernels.quantized_matmul.cases import FORMATS, abstract_operands, random_operands
from tpu_stack.kernels.quantized_matmul.pallas_tpu import pallas_quantized_matmul

KIND, V6E = "TPU7x", "TPU v6 lite"
TOLERANCE = {"mxfp4": 1e-6, "int4": 3e-3}
"""Powers of two scale exactly. int4's scaled weights are rounded to bfloat16 in half the tiles."""


@pytest.mark.parametrize(
    ("name", "shape", "tiles"),
    [
        ("mxfp4", (16, 1280, 512), None),  # all five steps of the schedule
        ("mxfp4", (5, 1504, 640), (16, 768, 640)),  # ragged K, stripes of 128 columns
        ("int4", (3, 640, 128), None),  # ends with a product that is scaled after it
        ("int4", (16, 1504, 384), (16, 1024, 256)),
        ("int4", (1, 512, 130), None),
    ],
)
def test_tile_schedules_of_the_tuned_tiles_are_exact(name, shape, tiles, monkeypatch):
    monkeypatch.setattr(planning, "device_kind", lambda: KIND)
    x, values, scales, keywords = random_operands(FORMATS[name], "bfloat16", *shape)
    assert make_plan(x, values, scales, tiles=tiles, **keywords).tile_schedule
    y = quantized_matmul(
        x, values, scales, **keywords, tiles=tiles, out_dtype=jnp.float32, interpret=True
    )
    want = reference_quantized_matmul(x, values, scales, **keywords)
    error = np.linalg.norm(np.asarray(y, np.float64) - want) / np.linalg.norm(want)
    assert error <= TOLERANCE[name]


def test_any_tile_schedule_is_exact(monkeypatch):
    monkeypatch.setattr(planning, "device_kind", lambda: KIND)
    x, values, scales, _ = random_operands(FORMATS["int4"], "bfloat16", 16, 1280, 256)
    plan = make_plan(x, values, scales, out_dtype=jnp.float32)
    plan = dataclasses.replace(plan, tile_schedule=("after_group", "after_group", "before"))
    y = pallas_quantized_matmul(x, values, scales, None, plan, True)
    want = reference_quantized_matmul(x, values, scales)
    error = np.linalg.norm(np.asarray(y, np.float64) - want) / np.linalg.norm(want)
    assert error <= TOLERANCE["int4"]


@pytest.mark.parametrize(
    ("kind", "name"), [("TPU7x", "int4"), ("TPU7x", "mxfp4"), ("TPU v5", "int4"), (V6E, "nvfp4")]
)
def test_race_free_over_many_blocks(kind, name, monkeypatch):
    monkeypatch.setattr(planning, "device_kind", lambda: kind)
    x, values, scales, keywords = random_operands(FORMATS[name], "bfloat16", 16, 768, 256)
    tiles = (16, 512, 128)
    plan = make_plan(x, values, scales, tiles=tiles, **keywords)
    assert plan.tile_schedule or plan.uses_planes
    pltpu.reset_tpu_interpret_mode_state()
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    y = quantized_matmul(x, values, scales, **keywords, tiles=tiles, interpret=params)
    want = reference_quantized_matmul(x, values, scales, **keywords)
    error = np.linalg.norm(np.asarray(y, np.float64) - want) / np.linalg.norm(want)
    assert error <= 3e-3


def schedule(name: str, activation: str = "bfloat16", m: int = 16, kind: str = KIND, **keywords):
    x, values, scales, arrays = abstract_operands(FORMATS[name], activation, m, 2048, 512)
    return make_plan(x, values, scales, kind=kind, **arrays, **keywords).tile_schedule


def test_only_where_they_are_right_and_the_tiles_say_so():
    assert set(schedule("mxfp4")) == {"before", "before_e5m2"}
    assert set(schedule("int4")) == {"before", "after_group"}
    assert not schedule("int4", m=17)  # results of twice the rows would bind
    assert schedule("mxfp4", m=64)
    assert not schedule("mxfp4", m=65)  # prefill has none
    assert not schedule("nvfp4")  # scales that are no powers of two
    assert not schedule("int4_g64")  # scaled after the product throughout
    assert schedule("mxfp4", activation="float8_e4m3fn") == schedule("mxfp4")  # rows are widened
    assert schedule("int4", activation="int8") == schedule("int4")
    assert not schedule("int4", activation="float32")
    assert not schedule("int4", kind=V6E)
