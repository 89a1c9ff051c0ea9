"""The Pallas TPU kernel: one block product per visit of an expert to a block of rows.

The grid is (N, visits, K), K innermost, with a dynamic number of visits (metadata.py). Each visit
multiplies a whole block of rows by one expert's weight and stores the rows of that expert; the
first visit to a block also zeroes its other rows. The block product is that of `quantized_matmul`,
so all formats decode in the same way and at the same speed.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from tpu_stack.kernels.grouped_matmul.metadata import visits
from tpu_stack.kernels.quantized_matmul import arguments
from tpu_stack.kernels.quantized_matmul.plan import ROWS, Plan
from tpu_stack.kernels.quantized_matmul.products import (
    block_product,
    finalize,
    scratch_shapes,
    split_refs,
    vmem_limit,
)


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

    scales: None in scale mode "input", where they are multiplied into x.
    row_scales: float32 [M, 1] when `plan.row_scaled`.
    """
    call = partial(_call, group_sizes=group_sizes, interpret=interpret)
    return arguments.run(call, x, values, scales, row_scales, plan, interpret)


def _call(operands: list[Array], plan: Plan, group_sizes: Array, interpret: Any) -> Array:
    experts = group_sizes.shape[0]
    *prefetched, count = visits(group_sizes, plan.m, plan.bm, interpret)
    return pl.pallas_call(
        partial(_kernel, plan=plan, experts=experts, compiled=interpret is False),
        out_shape=jax.ShapeDtypeStruct((plan.m, plan.n), jnp.dtype(plan.out_dtype)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(plan.grid[1], count, plan.grid[2]),
            in_specs=_in_specs(plan),
            out_specs=pl.BlockSpec(
                (plan.bm, plan.bn), lambda j, s, k, expert, block, *_: (block[s], j)
            ),
            scratch_shapes=scratch_shapes(plan),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_limit(plan),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * plan.m * plan.k * plan.n,
            bytes_accessed=experts * plan.k * plan.n * plan.storage.bits // 8,
            transcendentals=0,
        ),
        interpret=interpret,
        name=f"grouped_matmul_{plan.storage.name}_{plan.storage.dtype}_{plan.scale_mode}",
    )(*prefetched, *operands)


def _in_specs(plan: Plan) -> list[pl.BlockSpec]:
    """Blocks of x, the weight, then those of its scales, group sums and row scales that exist."""
    last = plan.grid[2] - 1

    def x_index(j, s, k, expert, block, *_):
        return block[s], k

    def w_index(j, s, k, expert, block, weight, *_):
        if last:  # padding rows keep the block that is in VMEM
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
    if plan.has_plane_offset:
        groups = plan.bk // plan.group
        index = lambda j, s, k, e, block, *_: (k, block[s], 0)  # noqa: E731
        specs.append(pl.BlockSpec((None, plan.bm, groups), index))
    if plan.row_scaled:
        specs.append(pl.BlockSpec((plan.bm, 1), lambda j, s, k, e, block, *_: (block[s], 0)))
    return specs


def _kernel(
    expert_ref, block_ref, weight_ref, bounds_ref, *refs, plan: Plan, experts: int, compiled: bool
):
    """One visit and block of K: acc[bm, bn] += x @ w; the last block of K stores the rows."""
    x_ref, w_ref, *rest = refs
    factors, o_ref, acc_ref, packed = split_refs(tuple(rest), plan)
    step, k = pl.program_id(1), pl.program_id(2)
    expert, block = expert_ref[step], block_ref[step]
    first = (step == 0) | (block_ref[jnp.maximum(step - 1, 0)] != block)
    has_expert = expert < experts

    def product() -> Array:
        k_left = plan.k - k * plan.bk
        return block_product(x_ref, w_ref, factors, packed, k_left, plan, compiled)

    def store(total: Array) -> None:
        y = finalize(total, factors, plan)
        row = block * plan.bm + jax.lax.broadcasted_iota(jnp.int32, o_ref.shape, 0)
        own = (row >= bounds_ref[expert]) & (row < bounds_ref[expert + 1])
        before = jnp.where(first, jnp.zeros_like(o_ref), o_ref[...])
        o_ref[...] = jnp.where(own, y.astype(o_ref.dtype), before)

    @pl.when(jnp.logical_not(has_expert) & first)
    def _():
        _clear(o_ref)

    if acc_ref is None:
        pl.when(has_expert)(lambda: store(product()))
        return

    @pl.when(has_expert & (k == 0))
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(has_expert)
    def _():
        acc_ref[...] += product()

    @pl.when(has_expert & (k == plan.grid[2] - 1))
    def _():
        store(acc_ref[...])


def _clear(ref: Any) -> None:
    """Zeros the ref in a loop: few instructions, since it rarely runs."""
    rows = ROWS if ref.shape[0] % ROWS == 0 else ref.shape[0]
    zeros = jnp.zeros((rows, ref.shape[1]), ref.dtype)

    def clear(i: Any, _: None) -> None:
        ref[pl.ds(pl.multiple_of(i * rows, rows), rows), :] = zeros

    jax.lax.fori_loop(0, ref.shape[0] // rows, clear, None)
