"""Scales inside the kernel: cleared past the end of K, and laid over a widened weight.

On the VPU a group's scale has to stand in every sublane. Spreading values costs up to two
operations per register of weight, more than the product with the weight itself; reading one row of
VMEM into all sublanes (a load of stride 0) is free beside it. So scales are first written to a
scratch, each as a 32-bit word of two bfloat16 halves, and then read that way.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from tpu_stack.kernels.quantized_matmul.plan import Plan
from tpu_stack.kernels.quantized_matmul.widen import WORD_ROWS

TILE = 8
"""Rows of a register of 32-bit words, which hold 16 rows of bfloat16."""


def edge_scales(s_ref: Any, left: Array, plan: Plan) -> Array:
    """The block's scales [rows/g, columns] in float32, zero where K has ended.

    left: elements of K from the block's first on.
    """
    scales = s_ref[...]
    if scales.dtype == jnp.float8_e8m0fnu:
        # The byte is float32's exponent; 2^-127 becomes 0 here, as float32 does in any product.
        exponent = jax.lax.bitcast_convert_type(scales, jnp.uint8).astype(jnp.int32)
        scales = jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)
    elif scales.dtype.itemsize == 1:
        scales = scales.astype(jnp.bfloat16)  # exact: at most three bits after the point
    scales = scales.astype(jnp.float32)
    if not plan.k_edge:
        return scales
    axis, unit = (1, 1) if plan.transpose else (0, plan.group)
    index = jax.lax.broadcasted_iota(jnp.int32, scales.shape, axis)
    return jnp.where(index * unit < left, scales, jnp.zeros_like(scales))


def scaled(w: Array, scales: Array, group: int) -> Array:
    """Each group of rows times its scale, in w's dtype, without a scratch: any group."""
    rows, columns = w.shape
    grouped = w.reshape(rows // group, group, columns) * scales.astype(w.dtype)[:, None, :]
    return grouped.reshape(rows, columns)


def shifts(s_ref: Any, left: Array, plan: Plan) -> tuple[Array, Array]:
    """Powers of two (E8M0) in units of 2^-13 of their column's largest, and that unit.

    e2m1 times such a scale fits float8_e5m2 (up to 6 * 2^13) and is exact there down to 2^-28 of
    the column's largest scale; smaller ones round to its subnormals, under what float32 keeps of
    a sum beside the largest.

    Returns: the scales, float32 [rows/g, columns], and the unit, [1, columns].
    """
    exponent = jax.lax.bitcast_convert_type(s_ref[...], jnp.uint8).astype(jnp.int32)
    if plan.k_edge:
        row = jax.lax.broadcasted_iota(jnp.int32, exponent.shape, 0)
        exponent = jnp.where(row * plan.group < left, exponent, 0)
    top = jnp.maximum(jnp.max(exponent, axis=0, keepdims=True), 14)
    scales = jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)
    # 2^13 over the largest, whose exponent is top - 127: 2^(140 - top), in float32's range.
    scales = scales * jax.lax.bitcast_convert_type((127 + 140 - top) << 23, jnp.float32)
    return scales, jax.lax.bitcast_convert_type((top - 13) << 23, jnp.float32)


def pair_words(scales: Array, exact: bool) -> Array:
    """uint32 of the same shape: each scale's bfloat16 twice. exact: none needs rounding."""
    high = _high_half(scales, exact)
    return high | (high >> 16)


def scaled_by_words(
    w: Array, words_ref: Any, group: int, stride_zero: bool, first: int = 0
) -> Array:
    """`scaled` for bfloat16 and groups of a multiple of 16 rows; one rounding. w's first group has
    the words of row `first`."""
    rows, columns = w.shape
    parts = []
    for i in range(rows // group):
        scale = pltpu.bitcast(spread(words_ref, first + i, stride_zero), jnp.bfloat16)
        block = w[i * group : (i + 1) * group].reshape(group // 16, 16, columns)
        parts.append((block * scale[None]).reshape(group, columns))
    return jnp.concatenate(parts, 0)


def write_sign_words(scales: Array, words_ref: Any, group: int, exact: bool) -> None:
    """The words of `signed_scales`: scales negated, that of row r low and of row r + 128 high.

    scales: [rows/g, columns]; words_ref: [max(128/g, 1) per 256 rows, columns] uint32.
    """
    high = _high_half(-scales, exact)
    if group >= WORD_ROWS:
        words_ref[...] = high | (high >> 16)
        return
    half = WORD_ROWS // 2 // group
    for tile in range(scales.shape[0] // (2 * half)):
        low = high[2 * half * tile : 2 * half * tile + half]
        upper = high[2 * half * tile + half : 2 * half * (tile + 1)]
        words_ref[half * tile : half * (tile + 1), :] = upper | (low >> 16)


def signed_scales(words: Array, words_ref: Any, group: int, stride_zero: bool) -> Array:
    """The scaled weight of a 1-bit block in bfloat16, its rows in the order of `columns.pair_rows`.

    A scale times a sign is the scale with its sign bit flipped: three integer operations make
    16 x 128 weights, bits j and j + 16 of a word going to the two halves of another.
    """
    per_tile = max(WORD_ROWS // 2 // group, 1)
    parts = []
    for tile in range(words.shape[0] // TILE):
        block = words[TILE * tile : TILE * (tile + 1)]
        for j in range(16):
            row = tile * per_tile + TILE * j // group
            if group >= WORD_ROWS:
                row = tile * WORD_ROWS // group
            scale = spread(words_ref, row, stride_zero)
            sign = jnp.left_shift(block, 15 - j) & jnp.int32(-(2**31) + 2**15)
            parts.append(pltpu.bitcast(pltpu.bitcast(sign, jnp.uint32) ^ scale, jnp.bfloat16))
    return jnp.concatenate(parts, 0)


def unpair_rows(y: Array) -> Array:
    """The inverse of `columns.pair_rows`."""
    m, k = y.shape
    return y.reshape(m, k // WORD_ROWS, WORD_ROWS // 2, 2).swapaxes(2, 3).reshape(m, k)


def spread(words_ref: Any, row: int, stride_zero: bool) -> Array:
    """One row in all sublanes. The interpreter knows no stride of 0, and takes the other way."""
    if stride_zero:
        return words_ref[pl.ds(row, TILE, stride=0), :]
    return jnp.broadcast_to(words_ref[row : row + 1, :], (TILE, words_ref.shape[1]))


def _high_half(scales: Array, exact: bool) -> Array:
    """float32 scales rounded to bfloat16, as uint32 with the low half zero."""
    rounded = scales if exact else scales.astype(jnp.bfloat16).astype(jnp.float32)
    return jax.lax.bitcast_convert_type(rounded, jnp.uint32)
