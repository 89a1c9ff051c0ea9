"""x as a kernel wants it, by small kernels: columns in the order of the weight's rows, or widened.

XLA moves columns by two or four in thousands of cycles. The MXU moves them in a few hundred: a
product with ones where a column goes, which is exact.

>>> ordered, sums = order_rows(x, codes=4, group=64, bk=4096, sums=True, interpret=False)
>>> paired = pair_rows(x, interpret=False)
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

WORD_BYTES = 32
"""Rows of bytes in a register: four from each of a word's eight rows."""
_ORDERED_ROWS = 128
"""Rows of a block of `order_rows`, at most."""
_BLOCK = (512, 2048)
"""Rows and columns of a block of `pair_rows` and `widen_rows`, at most."""


def row_at(place: Any, codes: int) -> Any:
    """The row of the weight that is at each place in the order of bytes; of numpy or jax arrays.

    A register of eight rows of words becomes one of 32 rows of bytes, byte b of word row r at
    4 r + b, for each of the `codes` places in a byte. Words of fewer than 32 codes hold rows side
    by side: byte b's place j in word row r is row codes (4 r + b) + j. Words of 32 signs hold
    every eighth row: it is row 64 b + 8 j + r.
    """
    span = codes * WORD_BYTES
    first, at, within = place // span * span, place % span // WORD_BYTES, place % WORD_BYTES
    if codes == 8:
        return first + within % 4 * 64 + at * 8 + within // 4
    return first + within * codes + at


def order_rows(
    x: Array, codes: int, group: int, bk: int, sums: bool, interpret: Any
) -> tuple[BFloat16[Array, "M K"], Float[Array, "blocks M groups"] | None]:
    """x with its columns as bytes order rows, and its sums over each group of rows if asked.

    A kernel of its own, of a few hundred bundles: XLA takes thousands of cycles to move columns by
    four. bk divides K, `group` divides bk or the reverse.

    x: [M, K] of a type that bfloat16 holds; M at most 128 or a multiple of 32.
    codes: weights in a byte of the stored words: 8, 4 or 2.
    """
    m, k = x.shape
    bm = m if m <= _ORDERED_ROWS else math.gcd(m, _ORDERED_ROWS)
    ordered = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
    added = jax.ShapeDtypeStruct((k // bk, m, bk // group), jnp.float32)
    outs = [
        (ordered, pl.BlockSpec((bm, bk), lambda i, j: (i, j))),
        (added, pl.BlockSpec((None, bm, bk // group), lambda i, j: (j, i, 0))),
    ][: 1 + sums]
    results = pl.pallas_call(
        partial(_order_kernel, codes=codes, group=group),
        out_shape=tuple(shape for shape, _ in outs),
        grid=(m // bm, k // bk),
        in_specs=[pl.BlockSpec((bm, bk), lambda i, j: (i, j))],
        out_specs=tuple(spec for _, spec in outs),
        interpret=interpret,
        name="order_rows",
    )(x)
    return results[0], results[1] if sums else None


def _order_kernel(
    x_ref: Any, ordered_ref: Any, sums_ref: Any = None, *, codes: int, group: int
) -> None:
    """The results of all tiles of columns by one product: with ones that move and that add."""
    bm, bk = x_ref.shape
    width = max(LANES, codes * WORD_BYTES)
    tiles = [slice(first, first + width) for first in range(0, bk, width)]
    x = x_ref[...].astype(jnp.bfloat16)
    stacked = jnp.concatenate([x[:, columns] for columns in tiles], 0)
    row = jax.lax.broadcasted_iota(jnp.int32, (width, width), 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, (width, width), 1)
    ones = [row == row_at(lane, codes)]
    per_tile = max(width // group, 1)
    if sums_ref is not None:
        ones.append(lane % per_tile == row * per_tile // width)
    right = jnp.concatenate([jnp.where(one, 1.0, 0.0).astype(jnp.bfloat16) for one in ones], 1)
    dims = (((1,), (0,)), ((), ()))
    y = jax.lax.dot_general(stacked, right, dims, preferred_element_type=jnp.float32)
    for t, columns in enumerate(tiles):
        ordered_ref[:, columns] = y[t * bm : (t + 1) * bm, :width].astype(jnp.bfloat16)
    if sums_ref is None:
        return
    lane = jax.lax.broadcasted_iota(jnp.int32, (bm, width), 1)
    sums = jnp.zeros((bm, width), jnp.float32)
    for t in range(len(tiles)):
        first = t * width // group
        here = (lane >= first) & (lane < first + per_tile)
        sums += jnp.where(here, y[t * bm : (t + 1) * bm, width:], 0.0)
    sums_ref[...] = sums[:, : sums_ref.shape[1]]


def pair_rows(x: Array, interpret: Any) -> BFloat16[Array, "M K"]:
    """[M, K] with K a multiple of 256, columns r and r + 128 of each 256 side by side.

    x: of a type that bfloat16 holds.
    """
    return _by_blocks(_pair_kernel, x, interpret, "pair_rows")


def widen_rows(x: Array, interpret: Any) -> BFloat16[Array, "M K"]:
    """x, of a type that bfloat16 holds, in bfloat16. XLA takes twenty times as long for float8."""
    return _by_blocks(_widen_kernel, x, interpret, "widen_rows")


def _by_blocks(kernel: Any, x: Array, interpret: Any, name: str) -> BFloat16[Array, "M K"]:
    """The kernel's bfloat16 from each block of x."""
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


def _widen_kernel(x_ref: Any, wide_ref: Any) -> None:
    wide_ref[...] = x_ref[...].astype(jnp.bfloat16)


def _pair_kernel(x_ref: Any, paired_ref: Any) -> None:
    half = WORD_ROWS // 2
    row = jax.lax.broadcasted_iota(jnp.int32, (WORD_ROWS, WORD_ROWS), 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, (WORD_ROWS, WORD_ROWS), 1)
    ones = jnp.where(lane == row % half * 2 + row // half, 1.0, 0.0).astype(jnp.bfloat16)
    dims = (((1,), (0,)), ((), ()))
    for first in range(0, x_ref.shape[1], WORD_ROWS):
        columns = slice(first, first + WORD_ROWS)
        tile = x_ref[:, columns].astype(jnp.bfloat16)
        moved = jax.lax.dot_general(tile, ones, dims, preferred_element_type=jnp.float32)
        paired_ref[:, columns] = moved.astype(jnp.bfloat16)
