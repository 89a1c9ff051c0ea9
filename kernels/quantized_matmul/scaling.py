"""Scales inside the kernel: load them, mask them past the end of K, multiply the weight by them.

The VPU needs a group's scale in every sublane. Broadcasting a value costs up to two operations per
register of weight, more than the multiply itself; a stride-0 load broadcasts one row of VMEM to all
sublanes for free. So the kernel first writes the scales to a scratch as *packed scales*, 32-bit
words that hold a bfloat16 scale in both halves, and then reads each row with a stride-0 load.
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
"""Sublanes of a register: 8 rows of 32-bit words or 16 of bfloat16."""


def load_scales(s_ref: Any, k_left: Array, plan: Plan) -> Array:
    """The block's scales, float32 [rows / group, columns], zero past the end of K.

    k_left: elements of K from the block's first to the end of K.
    """
    scales = s_ref[...]
    if scales.dtype == jnp.float8_e8m0fnu:
        # The byte is float32's exponent. 2^-127 becomes 0, as subnormals do in a TPU product.
        exponent = jax.lax.bitcast_convert_type(scales, jnp.uint8).astype(jnp.int32)
        scales = jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)
    elif scales.dtype.itemsize == 1:
        scales = scales.astype(jnp.bfloat16)  # exact: three mantissa bits
    scales = scales.astype(jnp.float32)
    if not plan.ragged_k:
        return scales
    axis, rows = (1, 1) if plan.transpose else (0, plan.group)
    index = jax.lax.broadcasted_iota(jnp.int32, scales.shape, axis)
    return jnp.where(index * rows < k_left, scales, jnp.zeros_like(scales))


def scaled(w: Array, scales: Array, group: int) -> Array:
    """w [rows, columns] times scales [rows / group, columns] by group, in w's dtype; any group."""
    rows, columns = w.shape
    grouped = w.reshape(rows // group, group, columns) * scales.astype(w.dtype)[:, None, :]
    return grouped.reshape(rows, columns)


def relative_scales(s_ref: Any, k_left: Array, plan: Plan) -> tuple[Array, Array]:
    """Splits power-of-two scales (E8M0) into 2^13 at most and one factor per column.

    e2m1 times such a relative scale fits float8_e5m2 (up to 6 * 2^13) and is exact down to 2^-28 of
    the column's largest scale. Smaller products round to subnormals, below what a float32 sum
    keeps beside the largest.

    Returns: relative scales, float32 [rows / group, columns], and float32 [1, columns] to multiply
      the product by.
    """
    exponent = jax.lax.bitcast_convert_type(s_ref[...], jnp.uint8).astype(jnp.int32)
    if plan.ragged_k:
        row = jax.lax.broadcasted_iota(jnp.int32, exponent.shape, 0)
        exponent = jnp.where(row * plan.group < k_left, exponent, 0)
    top = jnp.maximum(jnp.max(exponent, axis=0, keepdims=True), 14)
    scales = jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)
    # 2^13 over the largest, whose exponent is top - 127: 2^(140 - top), in float32's range.
    scales = scales * jax.lax.bitcast_convert_type((127 + 140 - top) << 23, jnp.float32)
    return scales, jax.lax.bitcast_convert_type((top - 13) << 23, jnp.float32)


def duplicate_halves(scales: Array, exact: bool) -> Array:
    """Packed scales, uint32 of the same shape: bfloat16 in both halves. exact: no scale rounds."""
    high = _high_half(scales, exact)
    return high | (high >> 16)


def scale_by_packed(
    w: Array, packed_ref: Any, group: int, stride_zero: bool, first: int = 0
) -> Array:
    """`scaled` for bfloat16 w and groups of a multiple of 16 rows, with one rounding.

    packed_ref: of `duplicate_halves`; row `first` belongs to w's first group.
    stride_zero: load with stride 0, which the interpreter lacks.
    """
    rows, columns = w.shape
    parts = []
    for i in range(rows // group):
        scale = pltpu.bitcast(broadcast_row(packed_ref, first + i, stride_zero), jnp.bfloat16)
        block = w[i * group : (i + 1) * group].reshape(group // 16, 16, columns)
        parts.append((block * scale[None]).reshape(group, columns))
    return jnp.concatenate(parts, 0)


def pack_sign_scales(scales: Array, packed_ref: Any, group: int, exact: bool) -> None:
    """Writes the packed scales of `apply_signs`: negated, row r low and row r + 128 high.

    scales: float32 [rows / group, columns]. packed_ref: uint32, max(128 / group, 1) rows per 256.
    """
    high = _high_half(-scales, exact)
    if group >= WORD_ROWS:
        packed_ref[...] = high | (high >> 16)
        return
    half = WORD_ROWS // 2 // group
    for tile in range(scales.shape[0] // (2 * half)):
        low = high[2 * half * tile : 2 * half * tile + half]
        upper = high[2 * half * tile + half : 2 * half * (tile + 1)]
        packed_ref[half * tile : half * (tile + 1), :] = upper | (low >> 16)


def apply_signs(words: Array, packed_ref: Any, group: int, stride_zero: bool) -> Array:
    """A 1-bit block as bfloat16 weights, sign times scale, rows ordered as `interleave_halves`
    does.

    Multiplying by a sign flips the scale's sign bit: three integer operations make 16 x 128
    weights, because bits j and j + 16 of a word move to the sign bits of another's two halves.
    """
    per_tile = max(WORD_ROWS // 2 // group, 1)
    parts = []
    for tile in range(words.shape[0] // TILE):
        block = words[TILE * tile : TILE * (tile + 1)]
        for j in range(16):
            row = tile * per_tile + TILE * j // group
            if group >= WORD_ROWS:
                row = tile * WORD_ROWS // group
            scale = broadcast_row(packed_ref, row, stride_zero)
            sign = jnp.left_shift(block, 15 - j) & jnp.int32(-(2**31) + 2**15)
            parts.append(pltpu.bitcast(pltpu.bitcast(sign, jnp.uint32) ^ scale, jnp.bfloat16))
    return jnp.concatenate(parts, 0)


def deinterleave_halves(y: Array) -> Array:
    """The inverse of `columns.interleave_halves`, [M, K]."""
    m, k = y.shape
    return y.reshape(m, k // WORD_ROWS, WORD_ROWS // 2, 2).swapaxes(2, 3).reshape(m, k)


def broadcast_row(packed_ref: Any, row: int, stride_zero: bool) -> Array:
    """One row of the ref in all sublanes, [TILE, columns]; stride_zero: by a stride-0 load."""
    if stride_zero:
        return packed_ref[pl.ds(row, TILE, stride=0), :]
    return jnp.broadcast_to(packed_ref[row : row + 1, :], (TILE, packed_ref.shape[1]))


def _high_half(scales: Array, exact: bool) -> Array:
    """float32 scales rounded to bfloat16, as uint32 with the low half zero."""
    rounded = scales if exact else scales.astype(jnp.bfloat16).astype(jnp.float32)
    return jax.lax.bitcast_convert_type(rounded, jnp.uint32)
