"""Static cost of decode attention over each kind of page (rung 3, compiled).

python -m tpu_stack.kernels.kv_attention.bench --chips v6e 7x --json bench.json
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

from tpu_stack.kernels.compiled import bench_main
from tpu_stack.kernels.kv_attention import kv_attention, make_plan

CASES = [f"{dtype},bfloat16,32,8,128,64,-" for dtype in ("bfloat16", "float8_e4m3fn", "int8")]
CASES += ["int8,bfloat16,32,8,128,64,capped", "int8,bfloat16,32,8,128,16,-"]
PEERS = {
    "bfloat16,bfloat16,32,8,128,64,paged": CASES[0],
    "bfloat16,bfloat16,32,8,128,64,ragged": CASES[0],
}
"""JAX's own paged_attention and ragged_paged_attention, and our case over the same pages."""
BATCH, PAGES = 8, 64
PEER_PAGES = 8
"""Pages per step of a peer."""


def program(case: str) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """The call and abstract arguments of case DTYPE,Q_DTYPE,N,K,H,PAGE,capped|paged|ragged|-.

    paged and ragged are JAX's kernels. int8 pages have scales.
    """
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
    if extras == "paged":
        q, k_pages, v_pages, table, lengths = arguments
        call = partial(paged_attention, pages_per_compute_block=PEER_PAGES)
        return call, [q, k_pages, v_pages, lengths, table]
    if extras == "ragged":
        return _ragged(arguments)
    options = {"window": 500, "softcap": 50.0} if extras == "capped" else {}
    return partial(kv_attention, interpret=False, **options), arguments


def _ragged(arguments: list[jax.ShapeDtypeStruct]) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """JAX's ragged_paged_attention, whose pages interleave keys and values by head."""
    q, pages, _, table, lengths = arguments
    k, count, page, h = pages.shape
    both = jax.ShapeDtypeStruct((count, page, 2 * k, h), pages.dtype)
    starts, one = (jax.ShapeDtypeStruct((size,), jnp.int32) for size in (BATCH + 1, 1))
    call = partial(
        ragged_paged_attention, num_kv_pages_per_block=PEER_PAGES, num_queries_per_block=BATCH
    )
    return call, [q, both, lengths, table, starts, one]


def trips(case: str, chip: str) -> tuple[int, ...]:
    """Trip counts of the kernel's loops, on any chip, when every sequence fills its pages.

    The grid, and inside it, for paged_attention, the blocks of a sequence. ragged_paged_attention
    has one grid step with a loop over sequences and one over blocks.
    """
    del chip
    extras = case.split(",")[-1]
    if extras == "paged":
        return BATCH * int(case.split(",")[3]), PAGES // PEER_PAGES
    if extras == "ragged":
        return BATCH, PAGES // PEER_PAGES
    call, arguments = program(case)
    options = {key: value for key, value in call.keywords.items() if key != "interpret"}
    return (math.prod(make_plan(*arguments, **options).grid),)


if __name__ == "__main__":
    bench_main(
        "tpu_stack.kernels.kv_attention.bench",
        __doc__,
        [*CASES, *PEERS],
        "DTYPE,Q_DTYPE,N,K,H,PAGE,EXTRAS",
        trips,
        PEERS,
    )
