"""The Pallas TPU kernel: one product at every visit of an expert to a block of rows.

Grid (N, visits, K), K innermost, as many visits as there are (metadata.py). Each visit multiplies
a whole block of rows with one expert's weight and stores the rows that are that expert's; the
first visit of a block sets its other rows to zero. A block's product is `quantized_matmul`'s, so
that every storage means the same, and runs as fast, here.
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
    finished,
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

    scales: None in scale mode "input", where x holds them already. row_scales: float32 [M, 1] when
    `plan.row_scaled`.
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
    if plan.centered:
        groups = plan.bk // plan.group
        index = lambda j, s, k, e, block, *_: (k, block[s], 0)  # noqa: E731
        specs.append(pl.BlockSpec((None, plan.bm, groups), index))
    if plan.row_scaled:
        specs.append(pl.BlockSpec((plan.bm, 1), lambda j, s, k, e, block, *_: (block[s], 0)))
    return specs


def _kernel(
    expert_ref, block_ref, weight_ref, bounds_ref, *refs, plan: Plan, experts: int, compiled: bool
):
    """One visit at one block of K: acc[bm, bn] += x @ w, and at the last its rows are stored."""
    x_ref, w_ref, *rest = refs
    factors, o_ref, acc_ref, words = split_refs(tuple(rest), plan)
    step, k = pl.program_id(1), pl.program_id(2)
    expert, block = expert_ref[step], block_ref[step]
    first = (step == 0) | (block_ref[jnp.maximum(step - 1, 0)] != block)
    somebody = expert < experts

    def product() -> Array:
        left = plan.k - k * plan.bk
        return block_product(x_ref, w_ref, factors, words, left, plan, compiled)

    def store(total: Array) -> None:
        y = finished(total, factors, plan)
        row = block * plan.bm + jax.lax.broadcasted_iota(jnp.int32, o_ref.shape, 0)
        own = (row >= bounds_ref[expert]) & (row < bounds_ref[expert + 1])
        before = jnp.where(first, jnp.zeros_like(o_ref), o_ref[...])
        o_ref[...] = jnp.where(own, y.astype(o_ref.dtype), before)

    @pl.when(jnp.logical_not(somebody) & first)
    def _():
        _clear(o_ref)

    if acc_ref is None:
        pl.when(somebody)(lambda: store(product()))
        return

    @pl.when(somebody & (k == 0))
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(somebody)
    def _():
        acc_ref[...] += product()

    @pl.when(somebody & (k == plan.grid[2] - 1))
    def _():
        store(acc_ref[...])


def _clear(ref: Any) -> None:
    """Zeros in a few instructions, for what is seldom done."""
    rows = ROWS if ref.shape[0] % ROWS == 0 else ref.shape[0]
    zeros = jnp.zeros((rows, ref.shape[1]), ref.dtype)

    def clear(i: Any, _: None) -> None:
        ref[pl.ds(pl.multiple_of(i * rows, rows), rows), :] = zeros

    jax.lax.fori_loop(0, ref.shape[0] // rows, clear, None)
