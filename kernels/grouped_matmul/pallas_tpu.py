"""The Pallas TPU kernel: one product at every visit of an expert to a block of rows.

Grid (N, visits, K), K innermost, as many visits as there are (metadata.py). Each visit multiplies
a whole block of rows with one expert's weight and stores the rows that are that expert's; the
first visit of a block sets its other rows to zero.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from tpu_stack.kernels.grouped_matmul.metadata import visits
from tpu_stack.kernels.grouped_matmul.product import block_product, scale_words
from tpu_stack.kernels.quantized_matmul.plan import ROWS, SUBLANES, Plan

_MIB = 2**20


def pallas_grouped_matmul(
    x: Array,
    values: Array,
    scales: Array | None,
    row_scales: Array | None,
    group_sizes: Array,
    plan: Plan,
    interpret: Any,
) -> Float[Array, "M N"]:
    """Runs the kernel that `plan` describes. Use `grouped_matmul`, which makes the plan.

    scales: None in scale mode "input", where x holds them already. row_scales: float32 [M, 1] when
    `plan.row_scaled`.
    """
    if plan.k_edge and plan.m < ROWS:  # as in `quantized_matmul`: Mosaic cannot mask such a block
        rows = ((0, ROWS - plan.m), (0, 0))
        row_scales = None if row_scales is None else jnp.pad(row_scales, rows)
        padded = replace(plan, m=ROWS, bm=ROWS)
        args = (jnp.pad(x, rows), values, scales, row_scales, group_sizes, padded, interpret)
        return pallas_grouped_matmul(*args)[: plan.m]
    operands = [x if plan.widens_rows else x.astype(plan.operands[0]), values]
    if scales is not None:
        operands.append(_flat_scales(scales, plan))
    if row_scales is not None:
        operands.append(row_scales)
    *prefetched, count = visits(group_sizes, plan.m, plan.bm)
    block, words = (plan.bm, plan.bn), scale_words(plan)
    return pl.pallas_call(
        partial(_kernel, plan=plan, experts=values.shape[0], compiled=interpret is False),
        out_shape=jax.ShapeDtypeStruct((plan.m, plan.n), jnp.dtype(plan.out_dtype)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(plan.grid[1], count, plan.grid[2]),
            in_specs=_in_specs(plan),
            out_specs=pl.BlockSpec(block, lambda j, s, k, e, rows, *_: (rows[s], j)),
            scratch_shapes=[
                *([pltpu.VMEM(block, jnp.dtype(plan.accumulator))] if _accumulates(plan) else []),
                *([pltpu.VMEM(words, jnp.uint32)] if words else []),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_vmem_limit(plan),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * plan.m * plan.k * plan.n,
            bytes_accessed=values.shape[0] * plan.k * plan.n * _weight_bits(plan) // 8,
            transcendentals=0,
        ),
        interpret=interpret,
        name=f"grouped_matmul_{plan.storage.name}_{plan.storage.dtype}_{plan.scale_mode}",
    )(*prefetched, *operands)


def _flat_scales(scales: Array, plan: Plan) -> Array:
    """Scales [E, G, N]: as XLA:TPU stores [E, G, 1, N] already."""
    flat = scales.reshape(scales.shape[0], -1, scales.shape[-1])
    if plan.scale_mode != "after" and plan.k_edge and flat.shape[1] < SUBLANES:
        flat = jnp.pad(flat, ((0, 0), (0, SUBLANES - flat.shape[1]), (0, 0)))
    return flat


def _in_specs(plan: Plan) -> list[pl.BlockSpec]:
    """Blocks of x, the weight, then its scales and the row factors where there are any."""
    last = plan.grid[2] - 1

    def x_index(j, s, k, expert, block, *_):
        return block[s], k

    def w_index(j, s, k, expert, block, weight, *_):
        if last:  # at the rows of nobody what is there stays
            k = jnp.where(expert[s] == weight[s], k, last)
        return (weight[s], j, k) if plan.transpose else (weight[s], k, j)

    specs = [
        pl.BlockSpec((plan.bm, plan.bk), x_index),
        pl.BlockSpec((None, *plan.weight_block), w_index),
    ]
    if plan.scale_mode == "after":
        specs.append(pl.BlockSpec((None, 1, plan.bn), lambda j, s, k, e, b, w, *_: (w[s], 0, j)))
    elif plan.scale_mode != "input":
        rows, columns = (plan.bn, plan.bk) if plan.transpose else (plan.bk, plan.bn)
        specs.append(pl.BlockSpec((None, rows // plan.group, columns), w_index))
    if plan.row_scaled:
        specs.append(pl.BlockSpec((plan.bm, 1), lambda j, s, k, e, block, *_: (block[s], 0)))
    return specs


def _accumulates(plan: Plan) -> bool:
    """Whether a result is the sum of several blocks of K, kept in VMEM meanwhile."""
    return plan.grid[2] > 1


def _weight_bits(plan: Plan) -> int:
    return 16 if plan.storage.dtype == "bfloat16" else plan.storage.bits


def _vmem_limit(plan: Plan) -> int:
    """Double-buffered blocks, the accumulator and product, and the widened weight."""
    x_bytes, w_bytes = (jnp.dtype(name).itemsize for name in plan.operands)
    if plan.storage.name in ("signs", "codes4"):
        w_bytes = 4  # decoded in 32 bits
    weight = plan.bk * plan.bn
    stored = weight * max(8, _weight_bits(plan)) // 8
    blocks = 2 * (plan.bm * plan.bk * x_bytes + stored + weight // 8 + plan.bm * plan.bn * 4)
    return max(16 * _MIB, blocks + plan.bm * plan.bn * 8 + 3 * weight * w_bytes + 4 * _MIB)


def _kernel(
    expert_ref, block_ref, weight_ref, bounds_ref, *refs, plan: Plan, experts: int, compiled: bool
):
    """One visit at one block of K: acc[bm, bn] += x @ w, and at the last its rows are stored."""
    *refs, words_ref = refs if scale_words(plan) else (*refs, None)
    *refs, acc_ref = refs if _accumulates(plan) else (*refs, None)
    x_ref, w_ref, *factors, o_ref = refs
    step, k = pl.program_id(1), pl.program_id(2)
    expert, block = expert_ref[step], block_ref[step]
    somebody = expert < experts

    def product() -> jax.Array:
        s_ref = None if plan.scale_mode in ("input", "after") else factors[0]
        left = plan.k - k * plan.bk
        x = x_ref[...].astype(plan.operands[0])
        return block_product(x, w_ref, s_ref, words_ref, left, plan, compiled)

    def store(total: jax.Array) -> None:
        y = total.astype(jnp.float32)
        if plan.unit != 1:
            y = y * plan.unit
        if plan.scale_mode == "after":
            y = y * factors[0][...].astype(jnp.float32)
        if plan.row_scaled:
            y = y * factors[-1][...]
        row = block * plan.bm + jax.lax.broadcasted_iota(jnp.int32, o_ref.shape, 0)
        own = (row >= bounds_ref[expert]) & (row < bounds_ref[expert + 1]) & somebody
        first = (step == 0) | (block_ref[jnp.maximum(step - 1, 0)] != block)
        before = jnp.where(first, jnp.zeros_like(o_ref), o_ref[...])
        o_ref[...] = jnp.where(own, y.astype(o_ref.dtype), before)

    if acc_ref is None:
        # One block of K: no sum to keep in VMEM between steps. The rows of nobody are multiplied
        # too, by the weight that is there, and not stored.
        store(product())
        return

    @pl.when(k == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(somebody)
    def _():
        acc_ref[...] += product()

    @pl.when(k == plan.grid[2] - 1)
    def _():
        store(acc_ref[...])
