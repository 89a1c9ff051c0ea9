"""Tiles multiplied in turn in different ways, interpreted as 7x runs them."""

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
        ("mxfp4", (16, 1280, 512), None),  # all five tiles of the turn
        ("mxfp4", (5, 1504, 640), (16, 768, 640)),  # ragged K, stripes of 128 columns
        ("int4", (3, 640, 128), None),  # ends with a product that waits to be scaled
        ("int4", (16, 1504, 384), (16, 1024, 256)),
        ("int4", (1, 512, 130), None),
    ],
)
def test_the_ways_add_up(name, shape, tiles, monkeypatch):
    monkeypatch.setattr(planning, "device_kind", lambda: KIND)
    x, values, scales, keywords = random_operands(FORMATS[name], "bfloat16", *shape)
    assert make_plan(x, values, scales, tiles=tiles, **keywords).ways
    y = quantized_matmul(
        x, values, scales, **keywords, tiles=tiles, out_dtype=jnp.float32, interpret=True
    )
    want = reference_quantized_matmul(x, values, scales, **keywords)
    error = np.linalg.norm(np.asarray(y, np.float64) - want) / np.linalg.norm(want)
    assert error <= TOLERANCE[name]


def test_any_turn_of_ways_adds_up(monkeypatch):
    monkeypatch.setattr(planning, "device_kind", lambda: KIND)
    x, values, scales, _ = random_operands(FORMATS["int4"], "bfloat16", 16, 1280, 256)
    plan = make_plan(x, values, scales, out_dtype=jnp.float32)
    plan = dataclasses.replace(plan, ways=("after", "after", "before"))
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
    assert plan.ways or plan.as_bytes
    pltpu.reset_tpu_interpret_mode_state()
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    y = quantized_matmul(x, values, scales, **keywords, tiles=tiles, interpret=params)
    want = reference_quantized_matmul(x, values, scales, **keywords)
    error = np.linalg.norm(np.asarray(y, np.float64) - want) / np.linalg.norm(want)
    assert error <= 3e-3


def ways(name: str, activation: str = "bfloat16", m: int = 16, kind: str = KIND, **keywords):
    x, values, scales, arrays = abstract_operands(FORMATS[name], activation, m, 2048, 512)
    return make_plan(x, values, scales, kind=kind, **arrays, **keywords).ways


def test_only_where_they_are_right_and_the_tiles_say_so():
    assert set(ways("mxfp4")) == {"before", "narrow"}
    assert set(ways("int4")) == {"before", "after"}
    assert not ways("int4", m=17)  # results of twice the rows would bind
    assert ways("mxfp4", m=64)
    assert not ways("mxfp4", m=65)  # prefill has none
    assert not ways("nvfp4")  # scales that are no powers of two
    assert not ways("int4_g64")  # scaled after the product throughout
    assert ways("mxfp4", activation="float8_e4m3fn") == ways("mxfp4")  # rows are widened
    assert ways("int4", activation="int8") == ways("int4")
    assert not ways("int4", activation="float32")
    assert not ways("int4", kind=V6E)
