"""Static cost of quantizing a block of activations on each chip (rung 3, compiled).

python -m tpu_stack.kernels.quantize_rows.bench --chips v6e 7x --json bench.json
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tpu_stack.kernels.compiled import bench_main
from tpu_stack.kernels.quantize_rows import quantize_rows

CASES = [
    f"{dtype},{x},{m},{k}"
    for dtype in ("float8_e4m3fn", "float8_e5m2", "int8")
    for x, m, k in (("bfloat16", 16, 4096), ("bfloat16", 2048, 4096), ("float32", 2048, 4096))
]


def program(case: str) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """The call and the abstract argument of one case: dtype, dtype of x, M, K."""
    dtype, x, m, k = case.split(",")
    call = partial(quantize_rows, dtype=jnp.dtype(dtype), interpret=False)
    return call, [jax.ShapeDtypeStruct((int(m), int(k)), jnp.dtype(x))]


if __name__ == "__main__":
    bench_main("tpu_stack.kernels.quantize_rows.bench", __doc__, CASES, "DTYPE,X_DTYPE,M,K")
