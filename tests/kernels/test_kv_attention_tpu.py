"""Decode attention higher on the ladder: lowered for TPU 8, compiled for older chips."""

import importlib.util

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from tpu_stack.kernels import compiled
from tpu_stack.kernels.kv_attention import bench, kv_attention
from tpu_stack.kernels.kv_attention.plan import read_tiles

CASES = [  # pages' dtype, q's dtype, N, K, H, tokens per page, window and soft-cap
    *(f"{dtype},bfloat16,32,8,128,64,-" for dtype in ("bfloat16", "float8_e4m3fn", "int8")),
    "int8,float32,8,8,64,16,capped",
    "bfloat16,bfloat16,1,1,256,128,capped",
]
ODD_CASES = [
    "float8_e4m3fn,bfloat16,6,2,80,48,-",
    "float8_e4m3fn,bfloat16,6,2,80,64,capped",
    "int8,bfloat16,40,8,128,16,-",
    "float8_e4m3fn,float32,4,1,192,32,capped",
    "int8,bfloat16,16,1,576,128,-",
]


@pytest.mark.parametrize("kind", ["TPU8t", "TPU8i", "TPU7x"])
@pytest.mark.parametrize("case", [*CASES, ODD_CASES[0]])
def test_lowers_to_mosaic(kind, case):
    call, arguments = bench.program(case)
    options = {k: v for k, v in call.keywords.items() if k != "interpret"}
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = jax.jit(lambda *a: kv_attention(*a, **options)).trace(*arguments)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra [aot]")
@pytest.mark.parametrize("chip", list(compiled.TOPOLOGY))
def test_compiles(chip):
    assert read_tiles()["libtpu"] == compiled.libtpu_version()
    assert compiled.refusals(bench.__name__, [*CASES, *ODD_CASES], chip) == {}
