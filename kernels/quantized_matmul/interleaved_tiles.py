"""The product of one block, tile by tile: tiles as deep as the MXU, stripes of columns so narrow
that the sums stay in registers. The compiler overlaps the instructions of neighbouring tiles.

`planes_product` decodes every tile to e5m2 bit planes (e5m2_planes.py). `interleaved_product`
follows `Plan.tile_schedule`, which alternates between steps that saturate different units of the
chip:

- "before": scale the weight in bfloat16, then multiply. Loading weights into the MXU binds.
- "before_e5m2": scale by powers of two, multiply in float8_e5m2. The vector ALU binds.
- "after_group": multiply in float8 by one copy of x per group, then scale. Popping results binds.
"""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tpu_stack.kernels.quantized_matmul import e5m2_planes, scaling
from tpu_stack.kernels.quantized_matmul.plan import Plan
from tpu_stack.kernels.quantized_matmul.widen import widen

_FLOAT8 = jnp.float8_e4m3fn
"""Holds int4 exactly."""


def planes_product(
    x: Array, w_ref: Any, factors: Any, packed_ref: Any, k_left: Array, plan: Plan, compiled: bool
) -> Float[Array, "bm bn"]:
    """x @ block with the weight decoded to e5m2 planes; times `plan.multiplier` is the product.

    Args:
      x: [bm, bk], columns in plane order.
      w_ref: the block as stored.
      factors: refs of its scales, then of x's group sums when `plan.has_plane_offset`.
      packed_ref: scratch for the scales as 32-bit words, one slab per stripe.
      k_left: elements of K from the block's first to the end of K.
      compiled: False when interpreted.
    """
    scales = scaling.load_scales(factors[0], k_left, plan)
    words = jax.lax.bitcast_convert_type(scales, jnp.uint32)
    if plan.has_plane_offset:
        sums = factors[1][...] * e5m2_planes.plane_offset(plan.storage)
        if plan.scales_dtype == "bfloat16":
            scales = scales.astype(jnp.bfloat16) if plan.ragged_k else factors[0][...]
    tiles = _tiles(plan)
    codes = plan.codes_per_byte
    copies = [e5m2_planes.masked_copies(x, rows, codes, plan.group) for rows in tiles]
    totals = []
    for stripe, columns in enumerate(_stripes(plan)):
        packed_ref[stripe] = words[:, columns]  # a stride-0 load takes whole rows only
        total = jnp.zeros((plan.bm, plan.stripe), jnp.float32)
        for rows, left in zip(tiles, copies, strict=True):
            parts = [
                _dot(left if factor == 1 else factor * left, right)
                for factor, right in e5m2_planes.unpack_planes(w_ref, rows, columns, plan.storage)
            ]
            groups = e5m2_planes.groups_in(rows, codes, plan.group)
            y = reduce(jnp.add, parts)
            total = _add_scaled(total, y, groups, packed_ref.at[stripe], compiled)
        if plan.has_plane_offset:
            total -= e5m2_planes.offset_product(sums, scales[:, columns])
        totals.append(total)
    return jnp.concatenate(totals, 1)


def interleaved_product(
    x: Array, w_ref: Any, s_ref: Any, packed: list[Any], k_left: Array, plan: Plan, compiled: bool
) -> Float[Array, "bm bn"]:
    """x @ block, its tiles multiplied by the steps of `plan.tile_schedule` in turn.

    Arguments as in `planes_product`, but x keeps its column order, s_ref is the scales alone, and
    `packed` holds the scratch of bfloat16 pairs, then, where the schedule has "after_group", the
    scratch of float32 scales.
    """
    pairs_ref, *after = packed
    if plan.scales_in_e5m2:
        scales, column_scale = scaling.relative_scales(s_ref, k_left, plan)
    else:
        scales, column_scale = scaling.load_scales(s_ref, k_left, plan), None
    exact = plan.scales_in_e5m2 or plan.scales_dtype != "float32"
    pairs = scaling.duplicate_halves(scales, exact)
    steps = [plan.tile_schedule[i % len(plan.tile_schedule)] for i in range(len(_tiles(plan)))]
    totals = []
    for stripe, columns in enumerate(_stripes(plan)):
        pairs_ref[stripe] = pairs[:, columns]
        for packed_ref in after:
            packed_ref[stripe] = jax.lax.bitcast_convert_type(scales[:, columns], jnp.uint32)
        total = jnp.zeros((plan.bm, plan.stripe), jnp.float32)
        for rows, step in zip(_tiles(plan), steps, strict=True):
            block = w_ref[rows, columns]
            if step == "after_group":
                y = _dot(
                    e5m2_planes.masked_copies(x, rows, 1, plan.group),
                    widen(block, plan.storage, _FLOAT8),
                )
                groups = e5m2_planes.groups_in(rows, 1, plan.group)
                total = _add_scaled(total, y, groups, after[0].at[stripe], compiled)
            else:
                w = widen(block, plan.storage, jnp.bfloat16)
                first = rows.start // plan.group
                w = scaling.scale_by_packed(w, pairs_ref.at[stripe], plan.group, compiled, first)
                narrow = step == "before_e5m2"
                total += _dot(x[:, rows], w.astype(plan.operands[1]) if narrow else w)
        totals.append(total if column_scale is None else total * column_scale[:, columns])
    return jnp.concatenate(totals, 1)


def _tiles(plan: Plan) -> list[slice]:
    starts = range(0, plan.bk, plan.depth)
    return [slice(start, min(start + plan.depth, plan.bk)) for start in starts]


def _stripes(plan: Plan) -> list[slice]:
    return [slice(start, start + plan.stripe) for start in range(0, plan.bn, plan.stripe)]


def _add_scaled(
    total: Array, y: Array, groups: list[int], packed_ref: Any, compiled: bool
) -> Array:
    """total [M, columns] plus each group's product in y [groups * M, columns] times its scales."""
    m, columns = total.shape
    for i, group in enumerate(groups):
        words = scaling.broadcast_row(packed_ref, group, compiled)
        scale = jax.lax.bitcast_convert_type(words, jnp.float32)
        part = y[i * m : (i + 1) * m].reshape(-1, scaling.TILE, columns)
        total += (part * scale[None]).reshape(m, columns)
    return total


def _dot(left: Array, right: Array) -> Array:
    dims = (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)
