"""Small kernels that prepare x: permute its columns to the order of the decoded weight, or cast.

XLA permutes columns in strides of two or four in thousands of cycles. A product with a permutation
matrix on the MXU takes a few hundred and is exact.

>>> x = jnp.arange(512, dtype=jnp.bfloat16).reshape(1, 512)
>>> interleave_halves(x, interpret=True)[0, :4].astype(int).tolist()
[0, 128, 1, 129]
>>> permuted, sums = permute_to_planes(x, codes=4, group=64, bk=512, sums=True, interpret=True)
>>> permuted[0, :4].astype(int).tolist(), sums.shape
([0, 4, 8, 12], (1, 1, 8))
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, BFloat16, Float

from tpu_stack.kernels.quantized_matmul.blocks import LANES, ROWS, round_up
from tpu_stack.kernels.quantized_matmul.widen import WORD_ROWS

PLANE_ROWS = 32
"""Rows of bytes in one register: four bytes from each of its eight rows of 32-bit words."""
_PERMUTED_ROWS = 128
"""Most rows in a block of `permute_to_planes`."""
_BLOCK = (512, 2048)
"""Most rows and columns in a block of `interleave_halves` and `cast_to_bfloat16`."""


def plane_row(place: Any, codes: int) -> Any:
    """The row of the weight at each `place` of the plane order; numpy or jax integers.

    `e5m2_planes` turns a register of eight rows of words into one register of 32 rows of bytes for
    each of the `codes` weights in a byte: byte b of word row r comes out at row 4 r + b. In words
    of fewer than 32 weights neighbours are consecutive rows: weight j of byte b in word row r is
    row codes (4 r + b) + j. In words of 32 signs neighbours are eight rows apart: it is row
    64 b + 8 j + r.
    """
    span = codes * PLANE_ROWS
    first, at, within = place // span * span, place % span // PLANE_ROWS, place % PLANE_ROWS
    if codes == 8:
        return first + within % 4 * 64 + at * 8 + within // 4
    return first + within * codes + at


def permute_to_planes(
    x: Array, codes: int, group: int, bk: int, sums: bool, interpret: Any
) -> tuple[BFloat16[Array, "M K"], Float[Array, "blocks M groups"] | None]:
    """x with its columns in plane order and, when `sums`, its float32 sum over each group.

    Args:
      x: [M, K] of a dtype whose values bfloat16 holds; M at most 128, or a multiple of 32.
      codes: weights in a stored byte: 8, 4 or 2.
      group: columns of a sum; divides bk or is a multiple of it.
      bk: columns of a block; divides K.
      sums: whether to return sums.
      interpret: as in `quantized_matmul`.

    Returns: bfloat16 [M, K], and float32 [K / bk, M, bk / group] or None.
    """
    m, k = x.shape
    bm = m if m <= _PERMUTED_ROWS else math.gcd(m, _PERMUTED_ROWS)
    permuted = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
    added = jax.ShapeDtypeStruct((k // bk, m, bk // group), jnp.float32)
    outs = [
        (permuted, pl.BlockSpec((bm, bk), lambda i, j: (i, j))),
        (added, pl.BlockSpec((None, bm, bk // group), lambda i, j: (j, i, 0))),
    ][: 1 + sums]
    results = pl.pallas_call(
        partial(_permute_kernel, codes=codes, group=group),
        out_shape=tuple(shape for shape, _ in outs),
        grid=(m // bm, k // bk),
        in_specs=[pl.BlockSpec((bm, bk), lambda i, j: (i, j))],
        out_specs=tuple(spec for _, spec in outs),
        interpret=interpret,
        name="permute_to_planes",
    )(x)
    return results[0], results[1] if sums else None


def _permute_kernel(
    x_ref: Any, permuted_ref: Any, sums_ref: Any = None, *, codes: int, group: int
) -> None:
    """One product of all column tiles with the permutation and, beside it, the summing matrix."""
    bm, bk = x_ref.shape
    width = max(LANES, codes * PLANE_ROWS)
    tiles = [slice(first, first + width) for first in range(0, bk, width)]
    x = x_ref[...].astype(jnp.bfloat16)
    stacked = jnp.concatenate([x[:, columns] for columns in tiles], 0)
    row = jax.lax.broadcasted_iota(jnp.int32, (width, width), 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, (width, width), 1)
    ones = [row == plane_row(lane, codes)]
    per_tile = max(width // group, 1)
    if sums_ref is not None:
        ones.append(lane % per_tile == row * per_tile // width)
    right = jnp.concatenate([jnp.where(one, 1.0, 0.0).astype(jnp.bfloat16) for one in ones], 1)
    dims = (((1,), (0,)), ((), ()))
    y = jax.lax.dot_general(stacked, right, dims, preferred_element_type=jnp.float32)
    for t, columns in enumerate(tiles):
        permuted_ref[:, columns] = y[t * bm : (t + 1) * bm, :width].astype(jnp.bfloat16)
    if sums_ref is None:
        return
    lane = jax.lax.broadcasted_iota(jnp.int32, (bm, width), 1)
    sums = jnp.zeros((bm, width), jnp.float32)
    for t in range(len(tiles)):
        first = t * width // group
        here = (lane >= first) & (lane < first + per_tile)
        sums += jnp.where(here, y[t * bm : (t + 1) * bm, width:], 0.0)
    sums_ref[...] = sums[:, : sums_ref.shape[1]]


def interleave_halves(x: Array, interpret: Any) -> BFloat16[Array, "M K"]:
    """x with columns r and r + 128 of each 256 side by side, bfloat16 [M, K].

    x: [M, K], K a multiple of 256, of a dtype whose values bfloat16 holds.
    """
    return _by_blocks(_interleave_kernel, x, interpret, "interleave_halves")


def cast_to_bfloat16(x: Array, interpret: Any) -> BFloat16[Array, "M K"]:
    """x in bfloat16, [M, K], for narrower dtypes. XLA takes twenty times as long for float8."""
    return _by_blocks(_cast_kernel, x, interpret, "cast_to_bfloat16")


def _by_blocks(kernel: Any, x: Array, interpret: Any, name: str) -> BFloat16[Array, "M K"]:
    """Applies a block-wise kernel to x, [M, K] to bfloat16 [M, K]."""
    m, k = x.shape
    bm = m if m < ROWS else min(_BLOCK[0], round_up(m, ROWS))
    block = pl.BlockSpec((bm, min(_BLOCK[1], k)), lambda i, j: (i, j))
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((m, k), jnp.bfloat16),
        grid=(pl.cdiv(m, bm), pl.cdiv(k, _BLOCK[1])),
        in_specs=[block],
        out_specs=block,
        interpret=interpret,
        name=name,
    )(x)


def _cast_kernel(x_ref: Any, wide_ref: Any) -> None:
    wide_ref[...] = x_ref[...].astype(jnp.bfloat16)


def _interleave_kernel(x_ref: Any, interleaved_ref: Any) -> None:
    half = WORD_ROWS // 2
    row = jax.lax.broadcasted_iota(jnp.int32, (WORD_ROWS, WORD_ROWS), 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, (WORD_ROWS, WORD_ROWS), 1)
    ones = jnp.where(lane == row % half * 2 + row // half, 1.0, 0.0).astype(jnp.bfloat16)
    dims = (((1,), (0,)), ((), ()))
    for first in range(0, x_ref.shape[1], WORD_ROWS):
        columns = slice(first, first + WORD_ROWS)
        tile = x_ref[:, columns].astype(jnp.bfloat16)
        moved = jax.lax.dot_general(tile, ones, dims, preferred_element_type=jnp.float32)
        interleaved_ref[:, columns] = moved.astype(jnp.bfloat16)
