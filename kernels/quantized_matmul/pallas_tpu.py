"""The Pallas TPU kernel: one template over storage, activation, scale mode and orientation.

Grid (M, N, K), K innermost; the weight block is widened in VMEM to what the MXU multiplies and the
products are accumulated in a float32 (or int32) scratch. Blocks may reach past the arrays: rows of
M and columns of N out there are never stored, and along K both x and the scales are set to zero, so
whatever the weight's integers are out there (an integer is never NaN) they add nothing. Weights
that can be NaN are set to zero there too.
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
from tpu_stack.kernels.quantized_matmul.widen import as_stored, widen

_MIB = 2**20


def pallas_quantized_matmul(
    x: Array, values: Array, scales: Array, row_scales: Array | None, plan: Plan, interpret: Any
) -> Float[Array, "M N"]:
    """Runs the kernel that `plan` describes. Use `quantized_matmul`, which makes the plan.

    row_scales: float32 [M, 1] when `plan.row_scaled`: x_scales times tensor_scale.
    """
    if plan.k_edge and plan.m < ROWS:
        # Mosaic cannot mask a block taller than its array ("Sublane broadcast"). With no ragged K
        # nothing is masked, and so few rows cost little to copy. So too for the scales below.
        padded = replace(plan, m=ROWS, bm=ROWS)
        rows = ((0, ROWS - plan.m), (0, 0))
        x = jnp.pad(x, rows)
        row_scales = None if row_scales is None else jnp.pad(row_scales, rows)
        return pallas_quantized_matmul(x, values, scales, row_scales, padded, interpret)[: plan.m]
    operands = [x.astype(plan.operands[0]), as_stored(values, plan.storage)]
    if plan.scale_mode == "input":
        factor = scales.astype(jnp.float32).reshape(1, -1)
        operands[0] = (x.astype(jnp.float32) * factor).astype(plan.operands[0])
    else:
        operands.append(_flat_scales(scales, plan))
    if row_scales is not None:
        operands.append(row_scales)
    return pl.pallas_call(
        partial(_kernel, plan=plan),
        out_shape=jax.ShapeDtypeStruct((plan.m, plan.n), jnp.dtype(plan.out_dtype)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=plan.grid,
            in_specs=_in_specs(plan),
            out_specs=pl.BlockSpec((plan.bm, plan.bn), lambda i, j, k: (i, j)),
            scratch_shapes=[pltpu.VMEM((plan.bm, plan.bn), jnp.dtype(plan.accumulator))],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_vmem_limit(plan),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * plan.m * plan.k * plan.n,
            bytes_accessed=plan.k * plan.n * plan.storage.bits // 8
            + scales.size * scales.dtype.itemsize
            + x.size * x.dtype.itemsize
            + plan.m * plan.n * jnp.dtype(plan.out_dtype).itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name=f"quantized_matmul_{plan.storage.name}_{plan.storage.dtype}_{plan.scale_mode}",
    )(*operands)


def _flat_scales(scales: Array, plan: Plan) -> Array:
    """Scales with two axes: XLA:TPU stores [G, 1, N] compactly, as [G, N], and this reshape is
    free, while a kernel that asks for three axes costs a relayout of the scales at every call."""
    if plan.scale_mode == "after":
        return scales.reshape(1, -1)
    flat = scales.reshape(-1, scales.shape[-1])
    if plan.k_edge and flat.shape[0] < SUBLANES:
        flat = jnp.pad(flat, ((0, SUBLANES - flat.shape[0]), (0, 0)))
    return flat


def _in_specs(plan: Plan) -> list[pl.BlockSpec]:
    """Blocks of x, the weight, then its scales and the row factors where there are any."""
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
    if plan.row_scaled:
        specs.append(pl.BlockSpec((plan.bm, 1), lambda i, j, k: (i, 0)))
    return specs


def _vmem_limit(plan: Plan) -> int:
    """Double-buffered blocks, the accumulator, and the widened weight as cast and as scaled."""
    x_bytes, w_bytes = (jnp.dtype(name).itemsize for name in plan.operands)
    weight = plan.bk * plan.bn
    if plan.storage.name in ("signs", "codes4"):
        w_bytes = 4  # decoded in 32 bits
    blocks = 2 * (plan.bm * plan.bk * x_bytes + weight + weight // 8 + plan.bm * plan.bn * 4)
    return max(16 * _MIB, blocks + plan.bm * plan.bn * 8 + 3 * weight * w_bytes + 4 * _MIB)


def _kernel(x_ref, w_ref, *refs, plan: Plan):
    """One block: acc[bm, bn] += x[bm, bk] @ w, stored when K is done."""
    *factors, o_ref, acc_ref = refs
    s_ref = None if plan.scale_mode == "input" else factors[0]
    k = pl.program_id(2)
    x = x_ref[...]
    left = plan.k - k * plan.bk  # elements of K from this block's first on
    if plan.k_edge:
        x = _zero_past(x, 1, left)

    @pl.when(k == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    w = widen(w_ref[...], plan.storage, plan.operands[1])
    if plan.k_edge and plan.storage.name == "float8":
        w = _zero_past(w, 1 if plan.transpose else 0, left)
    if plan.scale_mode == "after_group":
        _accumulate_groups(x, w, _edge_scales(s_ref, left, plan), acc_ref, plan)
    else:
        if plan.scale_mode == "before":
            w = _scaled(w, _edge_scales(s_ref, left, plan), plan.group)
        acc_ref[...] += _dot(x, w, plan.transpose)

    @pl.when(k == plan.grid[2] - 1)
    def _():
        y = acc_ref[...].astype(jnp.float32)
        if plan.unit != 1:
            y = y * plan.unit
        if plan.scale_mode == "after":
            y = y * factors[0][...].astype(jnp.float32)
        if plan.row_scaled:
            y = y * factors[-1][...]
        o_ref[...] = y.astype(o_ref.dtype)


def _zero_past(block: Array, axis: int, left: Array) -> Array:
    """`block` with zeros from element `left` of `axis` on."""
    index = jax.lax.broadcasted_iota(jnp.int32, block.shape, axis)
    return jnp.where(index < left, block, jnp.zeros_like(block))


def _dot(x: Array, w: Array, transpose: bool) -> Array:
    dims = (((1,), (1 if transpose else 0,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    sums = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    return jax.lax.dot_general(x, w, dims, precision, preferred_element_type=sums)


def _edge_scales(s_ref: Any, left: Array, plan: Plan) -> Array:
    """The block's scales [rows/g, columns] in float32 or bfloat16, zero where K has ended."""
    scales = s_ref[...]
    if scales.dtype.itemsize == 1:
        scales = scales.astype(jnp.bfloat16)  # exact: at most three bits after the point
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


def _accumulate_groups(x: Array, w: Array, scales: Array, acc_ref: Any, plan: Plan) -> None:
    """acc += the sum over groups of (x @ w of the group) times the group's scales."""
    scales = scales.astype(jnp.float32)
    total = acc_ref[...]
    for i in range(plan.bk // plan.group):
        rows = slice(i * plan.group, (i + 1) * plan.group)
        product = _dot(x[:, rows], w[rows, :], False).astype(jnp.float32)
        total += product * scales[i : i + 1]
    acc_ref[...] = total
