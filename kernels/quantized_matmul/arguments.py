"""A kernel's arguments from what the caller has: rows and columns in the kernel's order and shape.

>>> y = run(call, x, values, scales, row_scales, plan, interpret)  # call(operands, plan) -> [M, N]
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from tpu_stack.kernels.quantized_matmul import scaling
from tpu_stack.kernels.quantized_matmul.columns import order_rows, pair_rows, widen_rows
from tpu_stack.kernels.quantized_matmul.plan import LANES, ROWS, SUBLANES, Plan
from tpu_stack.kernels.quantized_matmul.tiles import DECODE_M
from tpu_stack.kernels.quantized_matmul.widen import WORD_ROWS

Call = Callable[[list[Array], Plan], Array]
"""The kernel on x, the weight, then its scales (unless x holds them), x's sums over groups (when
`plan.centered`) and the rows' factors (when `plan.row_scaled`)."""


def run(
    call: Call,
    x: Array,
    values: Array,
    scales: Array | None,
    row_scales: Array | None,
    plan: Plan,
    interpret: Any,
) -> Array:
    """`call` on the arguments that it wants, its result as the caller wants it, [M, N].

    Args:
      values, scales: of one weight, or of many with an axis of experts before the others. scales:
        None where x already holds them.
      row_scales: float32 [M, 1] when `plan.row_scaled`.
      interpret: how the small kernels run that put columns in order.
    """
    if (plan.k_edge or plan.as_bytes or "after" in plan.ways) and plan.m < ROWS:
        # Mosaic cannot mask a block taller than its array ("Sublane broadcast"). With no ragged K
        # nothing is masked, and so few rows cost little to copy. So too for the scales below.
        padded, rows = replace(plan, m=ROWS, bm=ROWS), ((0, ROWS - plan.m), (0, 0))
        row_scales = None if row_scales is None else jnp.pad(row_scales, rows)
        padded_x = jnp.pad(x, rows)
        return run(call, padded_x, values, scales, row_scales, padded, interpret)[: plan.m]
    sums = None
    if plan.as_bytes:
        # x gets whole blocks first, of zeros: past the array there is no order to keep.
        rows = plan.bm if plan.m <= plan.bm else math.lcm(plan.bm, 32)
        x = jnp.pad(x, ((0, -plan.m % rows), (0, -plan.k % plan.bk)))
        x, sums = order_rows(x, plan.codes, plan.group, plan.bk, plan.centered, interpret)
    elif plan.paired and not plan.transpose:
        x = pair_rows(jnp.pad(x, ((0, 0), (0, -plan.k % WORD_ROWS))), interpret)
    elif _widened_once(x, plan):
        x = widen_rows(x, interpret)
    operands = [x if plan.widens_rows else x.astype(plan.operands[0]), _whole_blocks(values, plan)]
    if scales is not None:
        operands.append(_flat_scales(scales, values.ndim - 2, plan))
    operands += [extra for extra in (sums, row_scales) if extra is not None]
    if not (plan.paired and plan.transpose):
        return call(operands, plan)
    # The result has its columns in the order in which the kernel makes 1-bit rows.
    whole = replace(plan, n=values.shape[-2] * plan.storage.rows)
    return scaling.unpair_rows(call(operands, whole))[:, : plan.n]


def _widened_once(x: Array, plan: Plan) -> bool:
    """Whether float8 rows that the MXU does not take are widened before the kernel rather than at
    every block of columns: on v6e 1.2 bundles for 1024 elements, where writing them out and reading
    them takes 4.4 cycles. With few rows the weight's bytes bind and hide it."""
    emulated = x.dtype == jnp.float8_e4m3fn and plan.operands[0] == "bfloat16"
    return emulated and plan.widens_rows and plan.m > DECODE_M and plan.grid[1] > 5


def _whole_blocks(values: Array, plan: Plan) -> Array:
    """`values`, int2 padded to whole blocks of rows and whole lanes of columns: at some ragged
    ones (384 rows in blocks of 512, 1000 columns) Mosaic aborts, "rank >= 2" or "span_buffer". It
    costs a copy, at ragged shapes only."""
    *lead, rows, columns = values.shape
    ends = [(0, -rows % plan.weight_block[0]), (0, -columns % LANES)]
    if plan.storage.dtype != "int2" or ends == [(0, 0), (0, 0)]:
        return values
    wide = values.astype(jnp.int8)  # XLA:TPU has no scalar of int2 to pad with
    return jnp.pad(wide, [(0, 0)] * len(lead) + ends).astype(values.dtype)


def _flat_scales(scales: Array, lead: int, plan: Plan) -> Array:
    """Scales with one axis of groups after the `lead` first: XLA:TPU stores [G, 1, N] compactly, as
    [G, N], and this reshape is free, while a kernel that asks for three axes costs a relayout of
    the scales at every call."""
    if plan.scale_mode == "after":
        return scales.reshape(*scales.shape[:lead], 1, -1)
    flat = scales.reshape(*scales.shape[:lead], -1, scales.shape[-1])
    lacking = SUBLANES - flat.shape[-2]
    if plan.k_edge and lacking > 0:
        flat = jnp.pad(flat, [(0, 0)] * lead + [(0, lacking), (0, 0)])
    return flat
