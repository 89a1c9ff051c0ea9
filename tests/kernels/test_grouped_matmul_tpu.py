"""The grouped kernel higher on the ladder: lowered for TPU 8, compiled for older chips."""

import importlib.util

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from tpu_stack.kernels import compiled
from tpu_stack.kernels.grouped_matmul import bench

SMALL = [  # format, x, experts, M, K, N, transposed
    *(f"{name},bfloat16,8,16,512,256,-" for name in bench.NAMES),
    *("int8,int8,8,300,512,256,-", "int2,int8,8,300,512,256,-"),
    *("fp8_e4m3,float8_e4m3fn,4,40,512,256,-", "int4_g128,bfloat16,4,40,512,256,-"),
    *("int4,bfloat16,4,40,512,256,t", "int8,bfloat16,4,40,512,256,t"),
    *("int1,bfloat16,4,40,512,256,t", "nvfp4,bfloat16,4,40,512,256,t"),
    *("bfloat16,float32,4,40,512,256,-", "fp8_e5m2,bfloat16,4,40,512,256,-"),
]
ODD = [
    *("int8,bfloat16,3,1,300,77,-", "int4,bfloat16,3,5,96,130,-", "int4,float32,3,17,160,33,-"),
    *("int1,bfloat16,3,9,320,77,-", "mxfp4,bfloat16,3,70,96,130,-", "int8,bfloat16,3,70,130,300,t"),
]


@pytest.mark.parametrize("kind", ["TPU8t", "TPU8i", "TPU7x"])
def test_lowers_to_mosaic(kind):
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        for case in [*SMALL, *ODD]:
            call, arguments = bench.program(case)
            text = jax.jit(call).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
            # The visits, the product, and for some 1-bit weights x's columns in their order.
            kernels = 3 if case.startswith("int1") and case.endswith("-") else 2
            assert text.count("tpu_custom_call") == kernels, case


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra [aot]")
@pytest.mark.parametrize("chip", list(compiled.TOPOLOGY))
def test_compiles(chip):
    assert compiled.refusals(bench.__name__, [*SMALL, *ODD, *bench.CASES[1::2]], chip) == {}
