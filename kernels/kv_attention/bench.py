"""Static cost of decode attention over each kind of page (rung 3, compiled).

python -m tpu_stack.kernels.kv_attention.bench --chips v6e 7x --json bench.json
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

from tpu_stack.kernels.compiled import bench_main
from tpu_stack.kernels.kv_attention import kv_attention

CASES = [f"{dtype},bfloat16,32,8,128,64,-" for dtype in ("bfloat16", "float8_e4m3fn", "int8")]
CASES += ["int8,bfloat16,32,8,128,64,capped", "int8,bfloat16,32,8,128,16,-"]
PEERS = ["bfloat16,bfloat16,32,8,128,64,peer"]
"""JAX's own paged_attention, which takes pages of bfloat16 as this kernel does."""
BATCH, PAGES = 8, 64


def program(case: str) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """The call and arguments of DTYPE,Q_DTYPE,N,K,H,PAGE,capped|peer|-; int8 comes with scales."""
    dtype, q_dtype, *sizes, extras = case.split(",")
    n, k, h, page = (int(size) for size in sizes)
    pages = jax.ShapeDtypeStruct((k, BATCH * PAGES, page, h), jnp.dtype(dtype))
    arguments = [
        jax.ShapeDtypeStruct((BATCH, n, h), jnp.dtype(q_dtype)),
        pages,
        pages,
        jax.ShapeDtypeStruct((BATCH, PAGES), jnp.int32),
        jax.ShapeDtypeStruct((BATCH,), jnp.int32),
    ]
    if dtype == "int8":
        arguments += [jax.ShapeDtypeStruct((k, BATCH * PAGES, 1, page), jnp.float32)] * 2
    if extras == "peer":
        q, k_pages, v_pages, table, lengths = arguments
        call = partial(paged_attention, pages_per_compute_block=8)
        return call, [q, k_pages, v_pages, lengths, table]
    options = {"window": 500, "softcap": 50.0} if extras == "capped" else {}
    return partial(kv_attention, interpret=False, **options), arguments


if __name__ == "__main__":
    bench_main(
        "tpu_stack.kernels.kv_attention.bench",
        __doc__,
        [*CASES, *PEERS],
        "DTYPE,Q_DTYPE,N,K,H,PAGE,EXTRAS",
    )
