"""Cases of `kernels.kv_attention`: decode attention over a paged cache in each page dtype.

Shapes are B, S, N: sequences, cached tokens per sequence, query heads. Heads have 128 elements,
four query heads share a key head, and pages have 128 tokens.

>>> next(cases()).name
'kv_attention bf16 bf16'
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpu_stack.kernels.kv_attention import kv_attention, reference_kv_attention
from tpu_stack.planner.kernels.cases import Case, Operands

PAGES = {"bf16": "bfloat16", "fp8_e4m3": "float8_e4m3fn", "int8": "int8"}
HEAD, GROUP, PAGE = 128, 4, 128


def cases() -> Iterator[Case]:
    """One case per page dtype."""
    for format in PAGES:
        yield make_case(format, "bf16")


def make_case(format: str, activation: str) -> Case:
    """The case of one page dtype, with bfloat16 queries."""
    return Case(
        op="kv_attention",
        format=format,
        activation=activation,
        axes=("B", "S", "N"),
        small=(3, 300, 8),
        large=(16, 4096, 32),
        operands=partial(_operands, format),
        abstract=partial(_abstract, format),
        call=_call,
        reference=lambda operands: reference_kv_attention(**operands),
        flops=lambda shape: 4.0 * shape[0] * shape[1] * shape[2] * HEAD,
        pair=("bfloat16", PAGES[format]),
        limit=5e-3,
        limit_reason="queries, softmax weights and the result are rounded to bfloat16",
    )


def _sizes(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Sequences, pages per sequence, query heads, key heads."""
    batch, tokens, heads = shape
    if heads % GROUP:
        raise ValueError(f"N = {heads} is not a multiple of the {GROUP} query heads per key head")
    return batch, -(-tokens // PAGE), heads, heads // GROUP


def _abstract(format: str, shape: tuple[int, ...]) -> Operands:
    batch, pages, heads, key_heads = _sizes(shape)
    kept = jax.ShapeDtypeStruct((key_heads, batch * pages, PAGE, HEAD), jnp.dtype(PAGES[format]))
    operands: Operands = {
        "q": jax.ShapeDtypeStruct((batch, heads, HEAD), jnp.bfloat16),
        "k_pages": kept,
        "v_pages": kept,
        "page_table": jax.ShapeDtypeStruct((batch, pages), jnp.int32),
        "lengths": jax.ShapeDtypeStruct((batch,), jnp.int32),
    }
    if format == "int8":
        scales = jax.ShapeDtypeStruct((key_heads, batch * pages, 1, PAGE), jnp.float32)
        operands |= {"k_scales": scales, "v_scales": scales}
    return operands


def _operands(format: str, shape: tuple[int, ...], seed: int) -> Operands:
    """Random operands: pages in shuffled order, one full sequence and one of length 0."""
    batch, pages, _, _ = _sizes(shape)
    rng = np.random.default_rng(seed)
    made: Operands = {}
    for name, like in _abstract(format, shape).items():
        if name == "page_table":
            made[name] = jnp.asarray(rng.permutation(batch * pages).reshape(like.shape), jnp.int32)
        elif name == "lengths":
            lengths = rng.integers(0, shape[1] + 1, batch)
            lengths[:2] = [shape[1], 0][: len(lengths[:2])]
            made[name] = jnp.asarray(lengths, jnp.int32)
        elif like.dtype == jnp.int8:
            made[name] = jnp.asarray(rng.integers(-127, 128, like.shape), jnp.int8)
        elif name.endswith("_scales"):
            made[name] = jnp.asarray(rng.uniform(0.005, 0.02, like.shape), jnp.float32)
        else:
            made[name] = jnp.asarray(rng.standard_normal(like.shape), jnp.float32).astype(
                like.dtype
            )
    return made


def _call(operands: Operands, *, exact: bool = False, **options: Any) -> Any:
    """`exact` has no effect: the result has the queries' dtype."""
    return kv_attention(**operands, **options)
