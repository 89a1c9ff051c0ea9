"""Row quantization higher on the ladder: lowered for TPU 8, compiled for older chips."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from tpu_stack.kernels import compiled
from tpu_stack.kernels.quantize_rows import bench, quantize_rows

DTYPES = ["float8_e4m3fn", "float8_e5m2", "int8"]


@pytest.mark.parametrize("kind", ["TPU8t", "TPU8i", "TPU7x", "TPU v6 lite"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lowers_to_mosaic_with_the_cast_of_the_chip(kind, dtype):
    x = jax.ShapeDtypeStruct((100, 1000), jnp.bfloat16)
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = jax.jit(lambda x: quantize_rows(x, jnp.dtype(dtype))).trace(x)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 1
    emulated = dtype != "int8" and kind == "TPU v6 lite"
    assert (f"quantize_rows_{dtype}_bits" in text) == emulated


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra [aot]")
@pytest.mark.parametrize("chip", list(compiled.TOPOLOGY))
def test_compiles(chip):
    rests = ("bfloat16,16,4096", "float32,33,77", "bfloat16,1,1", "bfloat16,100,65536")
    cases = [f"{dtype},{rest}" for dtype in DTYPES for rest in rests]
    assert compiled.refusals(bench.__name__, cases, chip) == {}
    row = compiled.compile_case(bench.__name__, cases[0], chip)
    assert row.get("bundles", 0) > 0, row


def test_a_dump_that_is_not_as_expected_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="no readable schedule of op among 0 dump files"):
        compiled.read_bundles(tmp_path, ["op"])
    file = tmp_path / "1-op.1-70-schedule-analysis_final_bundles.txt"
    file.write_text("something else")
    with pytest.raises(RuntimeError, match="among 1 dump files"):
        compiled.read_bundles(tmp_path, ["op"])
    file.write_text("Schedule analysis:\n\ttotal scheduled bundles:    1077\n")
    assert compiled.read_bundles(tmp_path, ["op"]) == {"op": 1077}


def test_a_program_that_does_not_compile_is_a_row_not_a_crash(monkeypatch):
    monkeypatch.setattr(compiled, "_child", lambda *_: {"bad": "exit -6: aborted", "good": ["op"]})
    assert compiled.refusals("m", ["bad", "good"], "v6e") == {"bad": "exit -6: aborted"}
    assert compiled.compile_case("m", "bad", "v6e") == {"error": "exit -6: aborted"}
