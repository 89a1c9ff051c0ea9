"""The CPU's product with a quantized weight: a few rows at a time, never a float copy.

XLA:CPU either copies a whole weight to float first, or multiplies without using vectors of bytes.
This module walks the rows of the weight in the order they are stored. Up to four rows of x, one
loop widens eight rows of weight in registers; beyond, 64 rows are widened into the cache and
multiplied there. All in float32, which XLA:CPU multiplies fastest. 4096 x 14336 at M = 1 on
two cores: a third to a half of the time of the float32 product (`bench.py`).

>>> y = blocked_matmul(x, q_int4, transpose=False, out_dtype=jnp.float32, mode="before")
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tpu_stack.quant.qtensor import QTensor

BLOCK_ROWS = 64
"""Rows of the weight that are widened at a time: small enough to stay in L2."""
FUSED_ROWS = 8
"""Rows of the weight in one fused loop. Twice as many took 1.7 times as long, half 1.2."""
FUSED_M = 4
"""Up to this M the fused loop is as fast as the product of blocks, or faster."""


def blocked_matmul(
    x: Float[Array, "*B K"], w: QTensor, transpose: bool, out_dtype: Any, mode: str
) -> Float[Array, "*B N"]:
    """`x @ w`, or `x @ w.T` when `transpose`, of a weight that `select` found blockable.

    Walks rows that are the contraction, with scales per column ("after") or per group ("before");
    or, when `transpose`, rows that are the output, with a scale each.
    """
    *lead, k = x.shape
    x_MK = x.reshape(-1, k).astype(jnp.float32)
    if transpose:
        y_MN = _output_blocks(x_MK, w)
    elif x_MK.shape[0] <= FUSED_M:
        y_MN = _fused_rows(x_MK, w, mode == "before")
    else:
        y_MN = _contraction_blocks(x_MK, w, mode == "before")
    if mode == "after":
        y_MN = y_MN * w.full_scales().reshape(1, -1)
    return y_MN.astype(out_dtype).reshape(*lead, y_MN.shape[-1])


def _slice(array: Array, i: Array, count: int, axis: int = 0) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, i * count, count, axis)


def _block(w: QTensor, i: Array, count: int) -> Array:
    """Grid values of `count` rows of `w`, float32."""
    return _slice(w.values, i, count).astype(jnp.float32) + w.offset


def _fused_rows(x_MK: Array, w: QTensor, grouped: bool) -> Array:
    """FUSED_ROWS products and their sum as one elementwise loop over the columns."""
    k, n = w.shape
    scales = w.full_scales()

    def body(i: Array, y_MN: Array) -> Array:
        rows, x_rows = _slice(w.values, i, FUSED_ROWS), _slice(x_MK, i, FUSED_ROWS, 1)
        total = jnp.zeros_like(y_MN)
        for row in range(FUSED_ROWS):
            grid = rows[row : row + 1].astype(jnp.float32) + w.offset
            total = total + x_rows[:, row : row + 1] * grid
        if grouped:
            group = i // (w.group // FUSED_ROWS)
            total = total * jax.lax.dynamic_index_in_dim(scales, group, 0, keepdims=False)
        return y_MN + total

    start = jnp.zeros((x_MK.shape[0], n), jnp.float32)
    return jax.lax.fori_loop(0, k // FUSED_ROWS, body, start)


def _contraction_blocks(x_MK: Array, w: QTensor, grouped: bool) -> Array:
    """The sum over blocks of the contraction, each widened and scaled into the cache."""
    k, n = w.shape
    scales = w.full_scales()

    def body(i: Array, y_MN: Array) -> Array:
        block = _block(w, i, BLOCK_ROWS)
        if grouped:
            per_block = max(BLOCK_ROWS // w.group, 1)
            first = i * BLOCK_ROWS // w.group
            factors = jax.lax.dynamic_slice_in_dim(scales, first, per_block, 0)
            block = (block.reshape(per_block, -1, n) * factors).reshape(BLOCK_ROWS, n)
        return y_MN + _dot(_slice(x_MK, i, BLOCK_ROWS, 1), block, 0)

    start = jnp.zeros((x_MK.shape[0], n), jnp.float32)
    return jax.lax.fori_loop(0, k // BLOCK_ROWS, body, start)


def _output_blocks(x_MK: Array, w: QTensor) -> Array:
    """BLOCK_ROWS columns of the output at a time, from as many rows of the weight."""
    rows = w.shape[0]

    def body(i: Array, y_MN: Array) -> Array:
        y_block = _dot(x_MK, _block(w, i, BLOCK_ROWS), 1)
        return jax.lax.dynamic_update_slice_in_dim(y_MN, y_block, i * BLOCK_ROWS, 1)

    start = jnp.zeros((x_MK.shape[0], rows), jnp.float32)
    return jax.lax.fori_loop(0, rows // BLOCK_ROWS, body, start)


def _dot(x: Array, block: Array, contract: int) -> Array:
    dims = (((1,), (contract,)), ((), ()))
    return jax.lax.dot_general(x, block, dims, preferred_element_type=jnp.float32)
