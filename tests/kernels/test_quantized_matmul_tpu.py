"""The kernel higher on the ladder: lowered for TPU 8, compiled ahead of time for older chips."""

import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from tpu_stack.kernels.quantized_matmul import bench, quantized_matmul
from tpu_stack.kernels.quantized_matmul.plan import read_tiles

SHAPES = [(16, 2048, 1024), (5, 96, 130), (1024, 4096, 256)]


@pytest.mark.parametrize("kind", ["TPU8t", "TPU8i", "TPU7x"])
@pytest.mark.parametrize("weight", ["int8", "int4"])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_lowers_to_mosaic(kind, weight, transpose, shape):
    m, k, n = shape
    if transpose and weight == "int4":
        n = -(-n // 32) * 32
    x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
    rows, columns = (n, k) if transpose else (k, n)
    values = jax.ShapeDtypeStruct((rows, columns), jnp.dtype(weight))
    scales = jax.ShapeDtypeStruct(
        (rows // 32, 1, columns) if weight == "int4" else (1, 1, columns),
        jnp.bfloat16 if weight == "int4" else jnp.float32,
    )
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = jax.jit(lambda x, v, s: quantized_matmul(x, v, s, transpose=transpose)).trace(
            x, values, scales
        )
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra [aot]")
@pytest.mark.parametrize("chip", ["v5e", "v6e", "7x"])
def test_compiles_and_reports_bundles(chip):
    assert read_tiles()["libtpu"] == bench.libtpu_version()
    for case in bench.KERNEL_CASES:
        for shape in ([16, 2048, 1024], [5, 96, 130], [512, 2048, 1024]):
            row = bench.compile_in_subprocess(case, chip, shape)
            assert "error" not in row, row
            assert row["bundles"] > 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra [aot]")
def test_a_decode_block_takes_no_longer_than_its_bytes_on_v6e():
    shape = [16, 2048, 1024]
    for case in ("int8", "int4"):
        row = bench.compile_in_subprocess(case, "v6e", shape)
        assert row["bundles"] <= bench.hbm_cycles(case, "v6e", shape)


def test_a_dump_that_is_not_as_expected_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="left no readable schedule analysis among 0 dump files"):
        bench.read_bundles(tmp_path)
    bad = tmp_path / "1-quantized_matmul_int4_before.1-70-schedule-analysis_final_bundles.txt"
    bad.write_text("something else")
    with pytest.raises(RuntimeError, match="among 1 dump files"):
        bench.read_bundles(tmp_path)
    bad.write_text("Schedule analysis:\n\ttotal scheduled bundles:    1077\n")
    assert bench.read_bundles(tmp_path) == 1077


def test_bench_reports_a_failed_compile_as_a_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "compile_in_subprocess", lambda *_: {"error": "exit -6: aborted"})
    out = tmp_path / "bench.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--chips", "v6e", "--json", str(out)])
    bench.main()
    report = json.loads(out.read_text())
    assert report["rung"] == 3
    assert {row["error"] for row in report["rows"]} == {"exit -6: aborted"}
    assert "exit -6: aborted" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["bench.json"]
