"""2-bit weights as bytes of float8_e5m2, made by shifts on whole words, with scales after the dot.

A cast of int2 goes through 32-bit floats, one weight to a lane. Here a register of 32-bit words, 16
weights to a lane, becomes four registers of bytes with three integer operations each: code q + 2,
in 0..3, set in as the mantissa of 2, is the float 2 + (q + 2) / 2 = q / 2 + 3. The MXU takes such
bytes in at twice the rate of bfloat16. Three things follow:

- q is 2 (V - 3), and q + 1/2 is 2 (V - 2.75), V being the byte's float: x's sum over each group,
  times `center`, is taken from the group's product.
- Bytes come out in another order of rows than the words' own; x's columns are put in it first.
- A group of less than the MXU's depth would leave most of it idle: a tile of 256 rows is multiplied
  by one copy of x per group, zero outside its group, in one product.

>>> ordered, sums = order_rows(x, plan, interpret=False)
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, BFloat16, Float

DEPTH = 256
"""Rows of weight in one product: the depth of the MXU."""
_LANES = 128
_BYTES = 4
"""Bytes of a word, each holding the codes of four rows."""


def center(half: bool) -> float:
    """What a byte's float is taken less, before doubling, to be q + 1/2 (`half`) or q."""
    return 2.75 if half else 3.0


def order_rows(
    x: BFloat16[Array, "M K"], group: int, bk: int, bm: int, interpret: Any
) -> tuple[BFloat16[Array, "M K"], Float[Array, "blocks M groups"]]:
    """x with its columns as `quarter_bytes` orders rows, and its sums over each group of rows.

    A kernel of its own, of a few hundred bundles: XLA takes thousands of cycles to move columns by
    four. bm divides M, bk divides K, `group` divides bk or the reverse.
    """
    m, k = x.shape
    groups = bk // group
    return pl.pallas_call(
        partial(_order_kernel, group=group),
        out_shape=(
            jax.ShapeDtypeStruct((m, k), jnp.bfloat16),
            jax.ShapeDtypeStruct((k // bk, m, groups), jnp.float32),
        ),
        grid=(m // bm, k // bk),
        in_specs=[pl.BlockSpec((bm, bk), lambda i, j: (i, j))],
        out_specs=(
            pl.BlockSpec((bm, bk), lambda i, j: (i, j)),
            pl.BlockSpec((None, bm, groups), lambda i, j: (j, i, 0)),
        ),
        interpret=interpret,
        name="order_rows",
    )(x)


def _order_kernel(x_ref: Any, ordered_ref: Any, sums_ref: Any, *, group: int) -> None:
    """Both results of all tiles of 128 columns by one product: with ones that move and that add."""
    bm, bk = x_ref.shape
    tiles = bk // _LANES
    stacked = jnp.concatenate([x_ref[:, _columns(t)] for t in range(tiles)], 0)
    row = jax.lax.broadcasted_iota(jnp.int32, (_LANES, _LANES), 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, (_LANES, _LANES), 1)
    move = lane == row % _BYTES * (_LANES // _BYTES) + row // _BYTES
    per_tile = max(_LANES // group, 1)
    add = lane % per_tile == row * per_tile // _LANES
    ones = [jnp.where(which, 1.0, 0.0).astype(jnp.bfloat16) for which in (move, add)]
    dims = (((1,), (0,)), ((), ()))
    y = jax.lax.dot_general(
        stacked, jnp.concatenate(ones, 1), dims, preferred_element_type=jnp.float32
    )
    lane = jax.lax.broadcasted_iota(jnp.int32, (bm, _LANES), 1)
    sums = jnp.zeros((bm, _LANES), jnp.float32)
    for t in range(tiles):
        tile = y[t * bm : (t + 1) * bm]
        ordered_ref[:, _columns(t)] = tile[:, :_LANES].astype(jnp.bfloat16)
        first = t * _LANES // group
        here = (lane >= first) & (lane < first + per_tile)
        sums += jnp.where(here, tile[:, _LANES:], 0.0)
    sums_ref[...] = sums[:, : sums_ref.shape[1]]


def _columns(tile: int) -> slice:
    return slice(tile * _LANES, (tile + 1) * _LANES)


def quarter_bytes(block: Array) -> Array:
    """int2 [R, N] -> float8_e5m2 [R, N] of q / 2 + 3, R a multiple of 128.

    Of each 128 rows, row 16 r + 4 b + j comes out at 32 j + 4 r + b: byte b of word r, code j.
    """
    rows = block.shape[0]
    words = pltpu.bitcast(block, jnp.int32)
    parts = []
    for tile in range(rows // _LANES):
        word = words[8 * tile : 8 * tile + 8]
        for j in range(_BYTES):
            moved = jax.lax.shift_right_logical(word, jnp.int32(2 * j)) if j else word
            # Two's complement with its upper bit turned is q + 2; 0x40 is e5m2's 2.
            byte = (moved & jnp.int32(0x03030303)) ^ jnp.int32(0x42424242)
            parts.append(pltpu.bitcast(byte, jnp.float8_e5m2))
    return jnp.concatenate(parts, 0)


def masked_copies(x: Array, group: int) -> Array:
    """[M, 256] in byte order -> [copies * M, 256], copy i zero but for the columns of group i."""
    copies = max(DEPTH // group, 1)
    if copies == 1:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    row = lane // _LANES * _LANES + lane % (_LANES // _BYTES) * _BYTES  # up to the order in a word
    parts = [jnp.where(row // group == i, x, jnp.zeros_like(x)) for i in range(copies)]
    return jnp.concatenate(parts, 0)


def group_products(x: Array, w_ref: Any, scale_of: Any, group: int) -> Float[Array, "M N"]:
    """The sum over groups of (x @ the group's bytes) times its scales.

    Args:
      x: [bm, bk] in byte order.
      w_ref: int2 [bk, bn].
      scale_of: group of the block -> float32 [8, bn], its scales in all sublanes.
    """
    (bm, bk), columns = x.shape, w_ref.shape[1]
    total = jnp.zeros((bm, columns), jnp.float32)
    dims = (((1,), (0,)), ((), ()))
    for start in range(0, bk, DEPTH):
        left = masked_copies(x[:, start : start + DEPTH], group)
        right = quarter_bytes(w_ref[start : start + DEPTH, :])
        y = jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)
        for i in range(left.shape[0] // bm):
            part = y[i * bm : (i + 1) * bm].reshape(bm // 8, 8, columns)
            total += (part * scale_of(start // group + i)[None]).reshape(bm, columns)
    return total


def group_offsets(sums: Array, scales: Array, exact: bool) -> Float[Array, "M N"]:
    """sums [M, G] @ scales [G, N] in float32. exact: the scales are bfloat16's."""
    dims = (((1,), (0,)), ((), ()))
    if not exact:
        highest = jax.lax.Precision.HIGHEST
        return jax.lax.dot_general(sums, scales, dims, highest, preferred_element_type=jnp.float32)
    parts = []
    for _ in range(3):  # three bfloat16 hold a float32's 24 bits
        parts.append(sums.astype(jnp.bfloat16))
        sums = sums - parts[-1].astype(jnp.float32)
    left, right = jnp.concatenate(parts, 0), scales.astype(jnp.bfloat16)
    y = jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)
    rows = sums.shape[0]
    return y[:rows] + y[rows : 2 * rows] + y[2 * rows :]
