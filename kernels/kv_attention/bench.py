"""Static cost of decode attention over each kind of page (rung 3, compiled).

python -m tpu_stack.kernels.kv_attention.bench --chips v6e 7x --json bench.json
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tpu_stack.kernels.compiled import TOPOLOGY, table
from tpu_stack.kernels.kv_attention import kv_attention

CASES = [f"{dtype},bfloat16,32,8,128,64,-" for dtype in ("bfloat16", "float8_e4m3fn", "int8")]
CASES += ["int8,bfloat16,32,8,128,64,capped", "int8,bfloat16,32,8,128,16,-"]
BATCH, PAGES = 8, 64


def program(case: str) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """The call and abstract arguments of DTYPE,Q_DTYPE,N,K,H,PAGE,capped|-, int8 with scales."""
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
    options = {"window": 500, "softcap": 50.0} if extras == "capped" else {}
    return partial(kv_attention, interpret=False, **options), arguments


def main() -> None:
    """Command line: see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", nargs="+", choices=sorted(TOPOLOGY), default=list(TOPOLOGY))
    parser.add_argument("--cases", nargs="+", default=CASES, help="DTYPE,Q_DTYPE,N,K,H,PAGE,EXTRAS")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    table("tpu_stack.kernels.kv_attention.bench", args.cases, args.chips, args.json)


if __name__ == "__main__":
    main()
