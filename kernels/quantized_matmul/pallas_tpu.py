"""The Pallas TPU kernel: one template over encoding, activation dtype, scale mode and orientation.

The grid is (M, N, K), K innermost. Each step computes one block product (products.py); where K has
several blocks, a float32 or int32 scratch accumulates them.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from tpu_stack.kernels.quantized_matmul import arguments
from tpu_stack.kernels.quantized_matmul.plan import Plan
from tpu_stack.kernels.quantized_matmul.products import (
    block_product,
    finalize,
    scratch_shapes,
    split_refs,
    vmem_limit,
)


def pallas_quantized_matmul(
    x: Array, values: Array, scales: Array, row_scales: Array | None, plan: Plan, interpret: Any
) -> Float[Array, "M N"]:
    """Runs the kernel that `plan` describes. Use `quantized_matmul`, which makes the plan.

    row_scales: float32 [M, 1] when `plan.row_scaled`: x_scales times tensor_scale.
    """
    call = partial(_call, scales_bytes=scales.size * scales.dtype.itemsize, interpret=interpret)
    if plan.scale_mode != "input":
        return arguments.run(call, x, values, scales, row_scales, plan, interpret)
    x = x.astype(jnp.float32) * scales.astype(jnp.float32).reshape(1, -1)
    return arguments.run(call, x, values, None, row_scales, plan, interpret)


def _call(operands: list[Array], plan: Plan, scales_bytes: int, interpret: Any) -> Array:
    x = operands[0]
    return pl.pallas_call(
        partial(_kernel, plan=plan, compiled=interpret is False),
        out_shape=jax.ShapeDtypeStruct((plan.m, plan.n), jnp.dtype(plan.out_dtype)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=plan.grid,
            in_specs=_in_specs(plan),
            out_specs=pl.BlockSpec((plan.bm, plan.bn), lambda i, j, k: (i, j)),
            scratch_shapes=scratch_shapes(plan),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit(plan),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * plan.m * plan.k * plan.n,
            bytes_accessed=plan.k * plan.n * plan.storage.bits // 8
            + scales_bytes
            + x.size * x.dtype.itemsize
            + plan.m * plan.n * jnp.dtype(plan.out_dtype).itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name=f"quantized_matmul_{plan.storage.name}_{plan.storage.dtype}_{plan.scale_mode}",
    )(*operands)


def _in_specs(plan: Plan) -> list[pl.BlockSpec]:
    """Blocks of x, the weight, then those of its scales, group sums and row scales that exist."""
    w_index = (lambda i, j, k: (j, k)) if plan.transpose else (lambda i, j, k: (k, j))
    specs = [
        pl.BlockSpec((plan.bm, plan.bk), lambda i, j, k: (i, k)),
        pl.BlockSpec(plan.weight_block, w_index),
    ]
    if plan.scale_mode == "after":
        specs.append(pl.BlockSpec((1, plan.bn), lambda i, j, k: (0, j)))
    elif plan.scale_mode != "input":
        rows, columns = (plan.bn, plan.bk) if plan.transpose else (plan.bk, plan.bn)
        specs.append(pl.BlockSpec((rows // plan.group, columns), w_index))
    if plan.has_plane_offset:
        groups = plan.bk // plan.group
        specs.append(pl.BlockSpec((None, plan.bm, groups), lambda i, j, k: (k, i, 0)))
    if plan.row_scaled:
        specs.append(pl.BlockSpec((plan.bm, 1), lambda i, j, k: (i, 0)))
    return specs


def _kernel(x_ref, w_ref, *refs, plan: Plan, compiled: bool):
    """acc[bm, bn] += x[bm, bk] @ w; the last block of K scales and stores the sum."""
    factors, o_ref, acc_ref, packed = split_refs(refs, plan)
    k = pl.program_id(2)
    y = block_product(x_ref, w_ref, factors, packed, plan.k - k * plan.bk, plan, compiled)
    if acc_ref is None:
        o_ref[...] = finalize(y, factors, plan).astype(o_ref.dtype)
        return

    @pl.when(k == 0)
    def _():
        acc_ref[...] = y

    @pl.when(k > 0)
    def _():
        acc_ref[...] += y

    @pl.when(k == plan.grid[2] - 1)
    def _():
        o_ref[...] = finalize(acc_ref[...], factors, plan).astype(o_ref.dtype)
