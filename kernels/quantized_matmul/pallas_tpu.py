"""The Pallas TPU kernel: one template over weight dtype, scale mode and orientation.

Grid (M, N, K), K innermost; the weight block is widened to x's dtype in VMEM, multiplied on the
MXU and accumulated in a float32 scratch. Blocks may reach past the arrays: rows of M and columns
of N out there are never stored, and along K both x and the scales are set to zero, so whatever the
weight's integers are out there (an integer is never NaN) they add nothing.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from tpu_stack.kernels.quantized_matmul.plan import ROWS, SUBLANES, Plan

_MIB = 2**20


def pallas_quantized_matmul(
    x: Array, values: Array, scales: Array, plan: Plan, interpret: Any
) -> Float[Array, "M N"]:
    """Runs the kernel that `plan` describes. Use `quantized_matmul`, which makes the plan."""
    if plan.k_edge and plan.m < ROWS:
        # Mosaic cannot mask a block taller than its array ("Sublane broadcast"). With no ragged K
        # nothing is masked, and so few rows cost little to copy. So too for the scales below.
        padded = replace(plan, m=ROWS, bm=ROWS)
        x = jnp.pad(x, ((0, ROWS - plan.m), (0, 0)))
        return pallas_quantized_matmul(x, values, scales, padded, interpret)[: plan.m]
    scaled = plan.scale_mode != "input"
    # Two axes: XLA:TPU stores [G, 1, N] compactly, as [G, N], and this reshape is free, while a
    # kernel that asks for three axes costs a relayout of the scales at every call.
    if plan.scale_mode == "after":
        scales = scales.reshape(1, -1)
    elif scaled:
        scales = scales.reshape(-1, values.shape[1])
        if plan.k_edge and scales.shape[0] < SUBLANES:
            scales = jnp.pad(scales, ((0, SUBLANES - scales.shape[0]), (0, 0)))
    specs = [
        pl.BlockSpec((plan.bm, plan.bk), lambda i, j, k: (i, k)),
        pl.BlockSpec(
            plan.weight_block,
            (lambda i, j, k: (j, k)) if plan.transpose else (lambda i, j, k: (k, j)),
        ),
    ]
    operands = [x, values]
    if scaled:
        specs.append(_scales_spec(plan))
        operands.append(scales)
    bits = 4 if plan.weight_dtype == "int4" else 8
    return pl.pallas_call(
        partial(_kernel, plan=plan),
        out_shape=jax.ShapeDtypeStruct((plan.m, plan.n), jnp.dtype(plan.out_dtype)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=plan.grid,
            in_specs=specs,
            out_specs=pl.BlockSpec((plan.bm, plan.bn), lambda i, j, k: (i, j)),
            scratch_shapes=[pltpu.VMEM((plan.bm, plan.bn), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_vmem_limit(plan, x.dtype.itemsize),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * plan.m * plan.k * plan.n,
            bytes_accessed=plan.k * plan.n * bits // 8
            + scales.size * scales.dtype.itemsize
            + x.size * x.dtype.itemsize
            + plan.m * plan.n * jnp.dtype(plan.out_dtype).itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name=f"quantized_matmul_{plan.weight_dtype}_{plan.scale_mode}",
    )(*operands)


def _scales_spec(plan: Plan) -> pl.BlockSpec:
    if plan.scale_mode == "after":
        return pl.BlockSpec((1, plan.bn), lambda i, j, k: (0, j))
    rows, columns = plan.weight_block
    block = (rows // plan.group, columns)
    if plan.transpose:
        return pl.BlockSpec(block, lambda i, j, k: (j, k))
    return pl.BlockSpec(block, lambda i, j, k: (k, j))


def _vmem_limit(plan: Plan, x_bytes: int) -> int:
    """Double-buffered blocks, the accumulator, and the widened weight as cast and as scaled."""
    weight = plan.bk * plan.bn
    blocks = 2 * (plan.bm * plan.bk * x_bytes + weight + weight // 8 + plan.bm * plan.bn * 4)
    return max(16 * _MIB, blocks + plan.bm * plan.bn * 8 + 3 * weight * x_bytes + 4 * _MIB)


def _kernel(x_ref, w_ref, *refs, plan: Plan):
    """One block: acc[bm, bn] += x[bm, bk] @ w, stored when K is done."""
    s_ref, o_ref, acc_ref = refs if len(refs) == 3 else (refs[0], *refs)  # "input": no scales
    k = pl.program_id(2)
    x = x_ref[...]
    left = plan.k - k * plan.bk  # elements of K from this block's first on
    if plan.k_edge:
        x = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) < left, x, jnp.zeros_like(x))

    @pl.when(k == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    if plan.scale_mode == "after_group":
        _accumulate_groups(x, w_ref, s_ref, acc_ref, left, plan)
    else:
        w = w_ref[...].astype(x.dtype)
        if plan.scale_mode == "before":
            w = _scaled(w, _edge_scales(s_ref, left, plan), plan.group)
        acc_ref[...] += _dot(x, w, plan.transpose)

    @pl.when(k == plan.grid[2] - 1)
    def _():
        y = acc_ref[...]
        if plan.scale_mode == "after":
            y = y * s_ref[...].astype(jnp.float32)
        o_ref[...] = y.astype(o_ref.dtype)


def _dot(x: Array, w: Array, transpose: bool) -> Array:
    dims = (((1,), (1 if transpose else 0,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, w, dims, precision, preferred_element_type=jnp.float32)


def _edge_scales(s_ref: Any, left: Array, plan: Plan) -> Array:
    """The block's scales [rows/g, columns], zero where K has ended."""
    scales = s_ref[...]
    if not plan.k_edge:
        return scales
    axis, unit = (1, 1) if plan.transpose else (0, plan.group)
    index = jax.lax.broadcasted_iota(jnp.int32, scales.shape, axis)
    return jnp.where(index * unit < left, scales, jnp.zeros_like(scales))


def _scaled(w: Array, scales: Array, group: int) -> Array:
    """Each group of rows times its scale. In bfloat16 that is one rounding: both factors fit it."""
    rows, columns = w.shape
    grouped = w.reshape(rows // group, group, columns) * scales.astype(w.dtype)[:, None, :]
    return grouped.reshape(rows, columns)


def _accumulate_groups(x, w_ref, s_ref, acc_ref, left, plan: Plan) -> None:
    """acc += the sum over groups of (x @ w of the group) times the group's scales."""
    scales = _edge_scales(s_ref, left, plan).astype(jnp.float32)
    total = acc_ref[...]
    for i in range(plan.bk // plan.group):
        rows = slice(i * plan.group, (i + 1) * plan.group)
        total += _dot(x[:, rows], w_ref[rows, :].astype(x.dtype), False) * scales[i : i + 1]
    acc_ref[...] = total
