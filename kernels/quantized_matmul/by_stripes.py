"""A block's product tile by tile, in stripes of columns: as deep as the MXU, few enough to stay in
registers, so that a tile's instructions fill the slots that its neighbour's leave.

`byte_product` takes all tiles as bytes (as_bytes.py). `mixed_product` takes tiles in turn
in different ways, each of which another unit of the chip binds:

- "before": scaled in bfloat16 and multiplied so. Loading weights into the MXU binds.
- "narrow": scaled by powers of two and multiplied in float8_e5m2. The vector ALU binds.
- "after": multiplied in float8 by a copy of x for each group, scaled then. Results bind.
"""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tpu_stack.kernels.quantized_matmul import as_bytes, scaling
from tpu_stack.kernels.quantized_matmul.plan import Plan
from tpu_stack.kernels.quantized_matmul.widen import widen

_FLOAT8 = jnp.float8_e4m3fn
"""Holds int4 exactly."""


def byte_product(
    x: Array, w_ref: Any, factors: Any, words_ref: Any, left: Array, plan: Plan, compiled: bool
) -> Float[Array, "bm bn"]:
    """What the block gives when weights become bytes, in units of `plan.unit`.

    Args:
      x: [bm, bk] in byte order.
      w_ref: the block as stored.
      factors: its scales, then x's sums over groups when `plan.centered`.
      words_ref: scratch for the scales as words by stripes.
      left: elements of K from this block's first on.
      compiled: whether it is compiled, rather than interpreted.
    """
    scales = scaling.edge_scales(factors[0], left, plan)
    words = jax.lax.bitcast_convert_type(scales, jnp.uint32)
    if plan.centered:
        sums = factors[1][...] * as_bytes.center(plan.storage)
        if plan.scales_dtype == "bfloat16":
            scales = scales.astype(jnp.bfloat16) if plan.k_edge else factors[0][...]
    tiles = _tiles(plan)
    copies = [as_bytes.masked_copies(x, rows, plan.codes, plan.group) for rows in tiles]
    totals = []
    for stripe, columns in enumerate(_stripes(plan)):
        words_ref[stripe] = words[:, columns]  # a load of stride 0 takes whole rows alone
        total = jnp.zeros((plan.bm, plan.stripe), jnp.float32)
        for rows, left_side in zip(tiles, copies, strict=True):
            parts = [
                _dot(left_side if factor == 1 else factor * left_side, right)
                for factor, right in as_bytes.planes(w_ref, rows, columns, plan.storage)
            ]
            groups = as_bytes.groups_of(rows, plan.codes, plan.group)
            y = reduce(jnp.add, parts)
            total = _add_scaled(total, y, groups, words_ref.at[stripe], compiled)
        if plan.centered:
            total -= as_bytes.group_offsets(sums, scales[:, columns])
        totals.append(total)
    return jnp.concatenate(totals, 1)


def mixed_product(
    x: Array, w_ref: Any, s_ref: Any, words: list[Any], left: Array, plan: Plan, compiled: bool
) -> Float[Array, "bm bn"]:
    """The block's product with its tiles in turn in the ways of `plan.ways`.

    Arguments as in `byte_product`; x in its own order, s_ref the scales alone, and in words, where
    "after" is a way, the scales as float32 after those as pairs of bfloat16.
    """
    pairs_ref, *after = words
    if plan.shifted:
        scales, unit = scaling.shifts(s_ref, left, plan)
    else:
        scales, unit = scaling.edge_scales(s_ref, left, plan), None
    exact = plan.shifted or plan.scales_dtype != "float32"
    pairs = scaling.pair_words(scales, exact)
    ways = [plan.ways[i % len(plan.ways)] for i in range(len(_tiles(plan)))]
    totals = []
    for stripe, columns in enumerate(_stripes(plan)):
        pairs_ref[stripe] = pairs[:, columns]
        for words_ref in after:
            words_ref[stripe] = jax.lax.bitcast_convert_type(scales[:, columns], jnp.uint32)
        total = jnp.zeros((plan.bm, plan.stripe), jnp.float32)
        for rows, way in zip(_tiles(plan), ways, strict=True):
            block = w_ref[rows, columns]
            if way == "after":
                y = _dot(
                    as_bytes.masked_copies(x, rows, 1, plan.group),
                    widen(block, plan.storage, _FLOAT8),
                )
                groups = as_bytes.groups_of(rows, 1, plan.group)
                total = _add_scaled(total, y, groups, after[0].at[stripe], compiled)
            else:
                w = widen(block, plan.storage, jnp.bfloat16)
                first = rows.start // plan.group
                w = scaling.scaled_by_words(w, pairs_ref.at[stripe], plan.group, compiled, first)
                total += _dot(x[:, rows], w.astype(plan.operands[1]) if way == "narrow" else w)
        totals.append(total if unit is None else total * unit[:, columns])
    return jnp.concatenate(totals, 1)


def _tiles(plan: Plan) -> list[slice]:
    starts = range(0, plan.bk, plan.depth)
    return [slice(start, min(start + plan.depth, plan.bk)) for start in starts]


def _stripes(plan: Plan) -> list[slice]:
    return [slice(start, start + plan.stripe) for start in range(0, plan.bn, plan.stripe)]


def _add_scaled(total: Array, y: Array, groups: list[int], words_ref: Any, compiled: bool) -> Array:
    """total [M, columns] and each group's product in y [groups * M, columns] times its scales."""
    m, columns = total.shape
    for i, group in enumerate(groups):
        words = scaling.spread(words_ref, group, compiled)
        scale = jax.lax.bitcast_convert_type(words, jnp.float32)
        part = y[i * m : (i + 1) * m].reshape(-1, scaling.TILE, columns)
        total += (part * scale[None]).reshape(m, columns)
    return total


def _dot(left: Array, right: Array) -> Array:
    dims = (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)
