"""Lay out the caller's arrays as the kernel takes them, call it, and restore the result's layout.

Example:
    y = run(call, x, values, scales, row_scales, plan, interpret)  # call(operands, plan) -> [M, N]
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from tpu_stack.kernels.quantized_matmul import scaling
from tpu_stack.kernels.quantized_matmul.columns import (
    cast_to_bfloat16,
    interleave_halves,
    permute_to_planes,
)
from tpu_stack.kernels.quantized_matmul.plan import LANES, ROWS, SUBLANES, Plan
from tpu_stack.kernels.quantized_matmul.tiles import DECODE_M
from tpu_stack.kernels.quantized_matmul.widen import WORD_ROWS

Call = Callable[[list[Array], Plan], Array]
"""Calls the kernel on [x, weight], then the scales (unless they are multiplied into x), x's group
sums (when `plan.has_plane_offset`) and the row scales (when `plan.row_scaled`)."""


def run(
    call: Call,
    x: Array,
    values: Array,
    scales: Array | None,
    row_scales: Array | None,
    plan: Plan,
    interpret: Any,
) -> Array:
    """Runs `call` on padded, permuted and cast operands and returns its result as [M, N].

    Args:
      values, scales: of one weight, or of several with a leading axis of experts; scales is None
        where they are multiplied into x.
      row_scales: float32 [M, 1] when `plan.row_scaled`.
      interpret: as in `quantized_matmul`, for the kernels of columns.py.
    """
    if (plan.ragged_k or plan.uses_planes or "after_group" in plan.tile_schedule) and plan.m < ROWS:
        # Mosaic cannot mask a block that is taller than its array ("Sublane broadcast"), and so few
        # rows are cheap to pad. `_flat_scales` pads for the same reason.
        padded, rows = replace(plan, m=ROWS, bm=ROWS), ((0, ROWS - plan.m), (0, 0))
        row_scales = None if row_scales is None else jnp.pad(row_scales, rows)
        padded_x = jnp.pad(x, rows)
        return run(call, padded_x, values, scales, row_scales, padded, interpret)[: plan.m]
    sums = None
    if plan.uses_planes:
        # Pad x to whole blocks first: the permutation must not move elements past the array.
        rows = plan.bm if plan.m <= plan.bm else math.lcm(plan.bm, 32)
        x = jnp.pad(x, ((0, -plan.m % rows), (0, -plan.k % plan.bk)))
        x, sums = permute_to_planes(
            x, plan.codes_per_byte, plan.group, plan.bk, plan.has_plane_offset, interpret
        )
    elif plan.interleaves_halves and not plan.transpose:
        x = interleave_halves(jnp.pad(x, ((0, 0), (0, -plan.k % WORD_ROWS))), interpret)
    elif _casts_once(x, plan):
        x = cast_to_bfloat16(x, interpret)
    operands = [x if plan.casts_x else x.astype(plan.operands[0]), _whole_blocks(values, plan)]
    if scales is not None:
        operands.append(_flat_scales(scales, values.ndim - 2, plan))
    operands += [extra for extra in (sums, row_scales) if extra is not None]
    if not (plan.interleaves_halves and plan.transpose):
        return call(operands, plan)
    # The kernel computes the columns of a transposed 1-bit product in interleaved order.
    whole = replace(plan, n=values.shape[-2] * plan.storage.rows)
    return scaling.deinterleave_halves(call(operands, whole))[:, : plan.n]


def _casts_once(x: Array, plan: Plan) -> bool:
    """Whether to cast float8 activations that the MXU does not take before the kernel rather than
    in every block of columns.

    On v6e a cast in the kernel takes 1.2 bundles per 1024 elements, while writing and reading the
    cast x takes 4.4 cycles. With few rows HBM time of the weight hides the cast.
    """
    emulated = x.dtype == jnp.float8_e4m3fn and plan.operands[0] == "bfloat16"
    return emulated and plan.casts_x and plan.m > DECODE_M and plan.grid[1] > 5


def _whole_blocks(values: Array, plan: Plan) -> Array:
    """`values`; int2 padded to whole blocks of rows and whole lanes of columns.

    At some ragged shapes (384 rows in blocks of 512, 1000 columns) Mosaic aborts ("rank >= 2",
    "span_buffer"). The padding costs a copy, at ragged shapes only.
    """
    *lead, rows, columns = values.shape
    ends = [(0, -rows % plan.weight_block[0]), (0, -columns % LANES)]
    if plan.storage.dtype != "int2" or ends == [(0, 0), (0, 0)]:
        return values
    wide = values.astype(jnp.int8)  # XLA:TPU has no scalar of int2 to pad with
    return jnp.pad(wide, [(0, 0)] * len(lead) + ends).astype(values.dtype)


def _flat_scales(scales: Array, lead: int, plan: Plan) -> Array:
    """Scales as [..., G, N], with `lead` leading axes.

    XLA:TPU stores [G, 1, N] as [G, N], so the reshape is free; a kernel operand of rank 3 would
    cost a relayout of the scales at every call.
    """
    if plan.scale_mode == "after":
        return scales.reshape(*scales.shape[:lead], 1, -1)
    flat = scales.reshape(*scales.shape[:lead], -1, scales.shape[-1])
    lacking = SUBLANES - flat.shape[-2]
    if plan.ragged_k and lacking > 0:
        flat = jnp.pad(flat, [(0, 0)] * lead + [(0, lacking), (0, 0)])
    return flat
