"""The kernel higher on the ladder: lowered for TPU 8, compiled ahead of time for older chips."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from tpu_stack.kernels.compiled import read_bundles
from tpu_stack.kernels.quantized_matmul import bench, quantized_matmul
from tpu_stack.kernels.quantized_matmul.cases import ACTIVATIONS, FORMATS, abstract_operands
from tpu_stack.kernels.quantized_matmul.plan import make_plan, read_tiles

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


@pytest.mark.parametrize("activation", ["int8", "float8_e4m3fn"])
def test_rows_of_eight_bits_are_widened_in_the_kernel(activation):
    """XLA would write them out in bfloat16 first: four times their bytes moved, and many cycles."""
    x, values, scales, keywords = abstract_operands(FORMATS["int4"], activation, 256, 1024, 256)
    device = AbstractDevice(device_kind="TPU8i", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        plan = make_plan(x, values, scales, **keywords)
        traced = jax.jit(lambda x, v, s, k: quantized_matmul(x, v, s, **k)).trace(
            x, values, scales, keywords
        )
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert plan.operands[0] == "bfloat16"
    assert "stablehlo.convert" not in text


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra [aot]"
)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e", "v6e", "7x"])
def test_compiles_and_reports_bundles(chip):
    assert read_tiles()["libtpu"] == bench.libtpu_version()
    for case in bench.KERNEL_CASES:
        for shape in ([16, 2048, 1024], [512, 2048, 1024]):
            row = bench.compile_in_subprocess(case, chip, shape)
            assert "error" not in row, row
            assert row["bundles"] > 0


EVERY = """
import sys
from tpu_stack.kernels.quantized_matmul import bench
for case in sys.argv[2:]:
    for shape in ([16, 1024, 256], [3, 384, 130]):
        try:
            bench.compile_here(case, sys.argv[1], shape)
        except Exception as error:
            sys.exit(f"{case} {shape}: {error}")
"""
"""Compiles every case at a shape of whole blocks and a ragged one; stops at the first refused."""


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("chip", bench.TOPOLOGY)
def test_every_format_compiles(chip, activation):
    cases = [f"{name}@{activation}" for name in FORMATS]
    command = [sys.executable, "-c", EVERY, chip, *cases]
    env = os.environ | bench.ENVIRONMENT
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


ODD = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from tpu_stack.kernels.quantized_matmul import quantized_matmul
device = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices[0]
def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))
for case in sys.argv[2:]:
    m, k, n, weight, transpose, dtype = case.split(",")
    m, k, n = int(m), int(k), int(n)
    rows, columns = (n, k) if transpose == "t" else (k, n)
    scales = {
        "int8": array((1, 1, columns), jnp.float32),
        "int4": array((rows // 32, 1, columns), jnp.bfloat16),
        "row": array((rows, 1), jnp.float32),
    }[weight]
    values = array((rows, columns), jnp.int4 if weight == "int4" else jnp.int8)
    f = jax.jit(lambda x, v, s: quantized_matmul(x, v, s, transpose=transpose == "t"))
    try:
        f.lower(array((m, k), dtype), values, scales).compile()
    except Exception as error:
        sys.exit(f"{case}: {error}")
"""
"""Compiles each case M,K,N,weight,transpose,dtype for a topology; stops at the first refused."""

ODD_SHAPES = """
1,1,1,int8,-,bfloat16 1,1,1,row,t,bfloat16 1,32,1,int4,-,bfloat16 1,2048,1024,int4,-,bfloat16
2,300,1,int8,t,float32 2,544,200,int8,-,bfloat16 3,130,300,row,t,bfloat16 3,130,300,row,-,bfloat16
3,544,77,int4,-,bfloat16 3,2048,1024,int4,-,bfloat16 4,544,200,int8,t,bfloat16
4,96,1000,int4,-,bfloat16 1,160,3,int4,-,float32 5,544,96,int4,t,bfloat16 1,300,64,int4,t,float32
15,96,127,int4,-,bfloat16 17,77,33,int8,-,bfloat16 40,300,512,int4,t,bfloat16
20,1024,2100,int4,-,float32 600,2080,3000,int4,-,bfloat16
"""


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_odd_shapes_compile(topology):
    # Interpret mode accepts blocks that Mosaic does not: fewer rows than a tile, ragged K.
    command = [sys.executable, "-c", ODD, topology, *ODD_SHAPES.split()]
    env = os.environ | bench.ENVIRONMENT
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "case"),
    [
        ("v6e", "int8"),
        ("v6e", "int4"),
        ("7x", "fp8_e4m3"),
        ("7x", "int4_g128"),
        ("7x", "int4_channel"),
    ],
)
def test_a_decode_block_takes_no_longer_than_its_bytes(chip, case):
    shape = [16, 2048, 1024]
    row = bench.compile_in_subprocess(case, chip, shape)
    assert row["bundles"] <= bench.hbm_cycles(case, chip, shape)


def test_a_dump_that_is_not_as_expected_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="no readable schedule of quantized_matmul among 0"):
        read_bundles(tmp_path, ["quantized_matmul"])
    bad = tmp_path / "1-quantized_matmul_int4_before.1-70-schedule-analysis_final_bundles.txt"
    bad.write_text("something else")
    with pytest.raises(RuntimeError, match="among 1 dump files"):
        read_bundles(tmp_path, ["quantized_matmul"])
    bad.write_text("Schedule analysis:\n\ttotal scheduled bundles:    1077\n")
    assert read_bundles(tmp_path, ["quantized_matmul"]) == {"quantized_matmul": 1077}


@pytest.mark.parametrize(
    ("case", "message"),
    [("int5", "no format 'int5'"), ("int4@fp16", "no activation 'fp16'")],
)
def test_bench_refuses_what_does_not_exist(case, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--cases", case])
    with pytest.raises(SystemExit):
        bench.main()
    assert message in capsys.readouterr().err


def test_hbm_cycles_count_packed_bits_and_scales():
    # x and the result are a hundredth of the weight here.
    cycles = {name: bench.hbm_cycles(name, "v6e", [1, 4096, 4096]) for name in FORMATS}
    bits = {name: round(8 * cycles[name] / cycles["int8"], 1) for name in FORMATS}
    assert bits["int4"] == 4.5
    assert bits["mxfp4"] == pytest.approx(4.25, abs=0.051)
    assert bits["nvfp4"] == 4.5
    assert bits["int2"] == 2.5
    assert bits["ternary_g128"] == 2.1
    assert bits["int1"] == 1.5


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
