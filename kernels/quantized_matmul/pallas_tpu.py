"""The Pallas TPU kernel: one template over storage, activation, scale mode and orientation.

Grid (M, N, K), K innermost; the weight block is widened in VMEM to what the MXU multiplies and the
products are accumulated in a float32 (or int32) scratch. Blocks may reach past the arrays: rows of
M and columns of N out there are never stored, and along K both x and the scales are set to zero, so
whatever the weight's integers are out there (an integer is never NaN) they add nothing. Weights
that can be NaN are set to zero there too.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from tpu_stack.kernels.quantized_matmul import scaling
from tpu_stack.kernels.quantized_matmul.by_stripes import add_byte_products, add_mixed_products
from tpu_stack.kernels.quantized_matmul.columns import order_rows, pair_rows
from tpu_stack.kernels.quantized_matmul.plan import LANES, ROWS, SUBLANES, Plan
from tpu_stack.kernels.quantized_matmul.widen import WORD_ROWS, as_stored, widen

_MIB = 2**20


def pallas_quantized_matmul(
    x: Array, values: Array, scales: Array, row_scales: Array | None, plan: Plan, interpret: Any
) -> Float[Array, "M N"]:
    """Runs the kernel that `plan` describes. Use `quantized_matmul`, which makes the plan.

    row_scales: float32 [M, 1] when `plan.row_scaled`: x_scales times tensor_scale.
    """
    if (plan.k_edge or plan.as_bytes or "after" in plan.ways) and plan.m < ROWS:
        # Mosaic cannot mask a block taller than its array ("Sublane broadcast"). With no ragged K
        # nothing is masked, and so few rows cost little to copy. So too for the scales below.
        padded = replace(plan, m=ROWS, bm=ROWS)
        rows = ((0, ROWS - plan.m), (0, 0))
        x = jnp.pad(x, rows)
        row_scales = None if row_scales is None else jnp.pad(row_scales, rows)
        return pallas_quantized_matmul(x, values, scales, row_scales, padded, interpret)[: plan.m]
    if plan.as_bytes:
        return _ordered(x, values, scales, row_scales, plan, interpret)
    if plan.paired:
        return _paired(x, values, scales, row_scales, plan, interpret)
    return _call(x, values, scales, row_scales, plan, interpret)


def _paired(x: Array, values: Array, scales: Array, row_scales: Any, plan: Plan, interpret: Any):
    """`_call` with K, in x or in the result, in the order in which the kernel makes 1-bit rows."""
    if plan.transpose:
        whole = replace(plan, n=values.shape[0] * plan.storage.rows)
        y = _call(x, values, scales, row_scales, whole, interpret)
        return scaling.unpair_rows(y)[:, : plan.n]
    x = jnp.pad(x, ((0, 0), (0, -plan.k % WORD_ROWS)))
    return _call(pair_rows(x, interpret), values, scales, row_scales, plan, interpret)


def _ordered(x: Array, values: Array, scales: Array, row_scales: Any, plan: Plan, interpret: Any):
    """`_call` with x's columns in the order of `as_bytes`, and x's sums over groups if needed.

    x gets whole blocks first, of zeros: past the array there is no order to keep.
    """
    ends = ((0, -plan.m % plan.bm), (0, -plan.k % plan.bk))
    wide = jnp.pad(x.astype(jnp.bfloat16), ends)
    x, sums = order_rows(wide, plan.codes, plan.group, plan.bk, plan.bm, plan.centered, interpret)
    return _call(x, values, scales, row_scales, plan, interpret, sums)


def _call(
    x: Array,
    values: Array,
    scales: Array,
    row_scales: Any,
    plan: Plan,
    interpret: Any,
    sums: Array | None = None,
):
    """One `pallas_call`; sums [blocks of K, M, groups of a block] when `plan.centered`."""
    operands = [x if plan.widens_rows else x.astype(plan.operands[0]), _whole_blocks(values, plan)]
    if plan.scale_mode == "input":
        factor = scales.astype(jnp.float32).reshape(1, -1)
        operands[0] = (x.astype(jnp.float32) * factor).astype(plan.operands[0])
    else:
        operands.append(_flat_scales(scales, plan))
    if sums is not None:
        operands.append(sums)
    if row_scales is not None:
        operands.append(row_scales)
    return pl.pallas_call(
        partial(_kernel, plan=plan, compiled=interpret is False),
        out_shape=jax.ShapeDtypeStruct((plan.m, plan.n), jnp.dtype(plan.out_dtype)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=plan.grid,
            in_specs=_in_specs(plan),
            out_specs=pl.BlockSpec((plan.bm, plan.bn), lambda i, j, k: (i, j)),
            scratch_shapes=_scratch(plan),
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


def _whole_blocks(values: Array, plan: Plan) -> Array:
    """`values`, int2 padded to whole blocks of rows and whole lanes of columns: at some ragged
    ones (384 rows in blocks of 512, 1000 columns) Mosaic aborts, "rank >= 2" or "span_buffer". It
    costs a copy, at ragged shapes only."""
    ends = [(0, -values.shape[0] % plan.weight_block[0]), (0, -values.shape[1] % LANES)]
    if plan.storage.dtype != "int2" or ends == [(0, 0), (0, 0)]:
        return values
    wide = values.astype(jnp.int8)  # XLA:TPU has no scalar of int2 to pad with
    return jnp.pad(wide, ends).astype(values.dtype)


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
    if plan.centered:
        groups = plan.bk // plan.group
        specs.append(pl.BlockSpec((None, plan.bm, groups), lambda i, j, k: (k, i, 0)))
    if plan.row_scaled:
        specs.append(pl.BlockSpec((plan.bm, 1), lambda i, j, k: (i, 0)))
    return specs


def _scratch(plan: Plan) -> list[Any]:
    """The accumulator, then the scales as words where they are used so."""
    accumulator = pltpu.VMEM((plan.bm, plan.bn), jnp.dtype(plan.accumulator))
    if not plan.words:
        return [accumulator]
    rows, columns = plan.words, plan.weight_block[1]
    if plan.as_bytes or plan.ways:
        kinds = 2 if "after" in plan.ways else 1
        return [
            accumulator,
            *[pltpu.VMEM((columns // plan.stripe, rows, plan.stripe), jnp.uint32)] * kinds,
        ]
    return [accumulator, pltpu.VMEM((rows, columns), jnp.uint32)]


def _vmem_limit(plan: Plan) -> int:
    """Double-buffered blocks, the accumulator, and the widened weight as cast and as scaled."""
    x_bytes, w_bytes = (jnp.dtype(name).itemsize for name in plan.operands)
    weight = plan.bk * plan.bn
    if plan.storage.name in ("signs", "codes4") and not plan.as_bytes:
        w_bytes = 4  # decoded in 32 bits
    blocks = 2 * (plan.bm * plan.bk * x_bytes + weight + weight // 8 + plan.bm * plan.bn * 4)
    return max(16 * _MIB, blocks + plan.bm * plan.bn * 8 + 3 * weight * w_bytes + 4 * _MIB)


def _kernel(x_ref, w_ref, *refs, plan: Plan, compiled: bool):
    """One block: acc[bm, bn] += x[bm, bk] @ w, stored when K is done."""
    scratch = refs[len(refs) - len(_scratch(plan)) :]
    *factors, o_ref = refs[: len(refs) - len(scratch)]
    acc_ref = scratch[0]
    k = pl.program_id(2)
    x = x_ref[...].astype(plan.operands[0])
    left = plan.k - k * plan.bk  # elements of K from this block's first on
    if plan.k_edge and not plan.as_bytes:
        # Paired K is padded to whole tiles of words, and in another order within each.
        tiles = plan.paired and not plan.transpose
        x = _zero_past(x, 1, pl.cdiv(left, WORD_ROWS) * WORD_ROWS if tiles else left)

    @pl.when(k == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    if plan.as_bytes:
        add_byte_products(x, w_ref, factors, scratch, left, plan, compiled)
    elif plan.ways:
        add_mixed_products(x, w_ref, factors[0], scratch, left, plan, compiled)
    elif plan.scale_mode == "before":
        w, unit = _scaled_weight(w_ref, factors[0], scratch, left, plan, compiled)
        y = _dot(x, w, plan)
        acc_ref[...] += y if unit is None else y * unit
    elif plan.scale_mode == "after_group":
        w = _weight(w_ref, left, plan, plan.operands[1])
        scales = scaling.edge_scales(factors[0], left, plan)
        if plan.group_sums:  # in units of 1/2, and so all the rest
            acc_ref[...] += _halves(x, scales, plan)
            scales = 2 * scales
        _accumulate_groups(x, w, scales, acc_ref, plan)
    else:
        acc_ref[...] += _dot(x, _weight(w_ref, left, plan, plan.operands[1]), plan)

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


def _weight(w_ref: Any, left: Array, plan: Plan, dtype: str) -> Array:
    """The block in `dtype`, without scales; zero past K where it could be NaN there."""
    # e2m1 is seen as int4 here and not outside, where XLA would copy the weight at every call.
    w = widen(as_stored(w_ref[...], plan.storage), plan.storage, dtype)
    if plan.k_edge and plan.storage.name == "float8":
        w = _zero_past(w, 1 if plan.transpose else 0, left)
    return w


def _scaled_weight(
    w_ref: Any, s_ref: Any, scratch: Any, left: Array, plan: Plan, compiled: bool
) -> tuple[Array, Array | None]:
    """The block times its scales in the operand's dtype, and the unit of each of its columns."""
    if not plan.words:
        dtype = "float32" if plan.operands[1] == "float32" else "bfloat16"
        w = _weight(w_ref, left, plan, dtype)
        w = scaling.scaled(w, scaling.edge_scales(s_ref, left, plan), plan.group)
        return w.astype(plan.operands[1]), None
    words_ref, unit = scratch[1], None
    exact = plan.scales_dtype != "float32"
    if plan.shifted:
        scales, unit = scaling.shifts(s_ref, left, plan)
        words_ref[...] = scaling.pair_words(scales, exact=True)
    elif plan.paired:
        scales = scaling.edge_scales(s_ref, left, plan)
        scaling.write_sign_words(scales, words_ref, plan.group, exact)
        return scaling.signed_scales(w_ref[...], words_ref, plan.group, compiled), None
    else:
        words_ref[...] = scaling.pair_words(scaling.edge_scales(s_ref, left, plan), exact)
    w = _weight(w_ref, left, plan, "bfloat16")
    w = scaling.scaled_by_words(w, words_ref, plan.group, compiled)
    return w.astype(plan.operands[1]), unit


def _zero_past(block: Array, axis: int, left: Any) -> Array:
    """`block` with zeros from element `left` of `axis` on."""
    index = jax.lax.broadcasted_iota(jnp.int32, block.shape, axis)
    return jnp.where(index < left, block, jnp.zeros_like(block))


def _dot(x: Array, w: Array, plan: Plan) -> Array:
    """`x @ w`, in float32, or in int32 for integers; in units of `plan.unit`."""
    dims = (((1,), (1 if plan.transpose else 0,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    sums = jnp.int32 if plan.integer else jnp.float32
    y = jax.lax.dot_general(x, w, dims, precision, preferred_element_type=sums)
    if plan.scale_mode == "after_group" or not plan.storage.adds_ones(plan.operands[1]):
        return y
    ones = jnp.ones((x.shape[1], 128), x.dtype)
    sum_x = jax.lax.dot_general(x, ones, (((1,), (0,)), ((), ())), preferred_element_type=sums)
    return 2 * y + jnp.concatenate([sum_x] * (y.shape[1] // 128), 1)


def _accumulate_groups(x: Array, w: Array, scales: Array, acc_ref: Any, plan: Plan) -> None:
    """acc += the sum over groups of (x @ w of the group) times the group's scales."""
    total = acc_ref[...]
    for i in range(plan.bk // plan.group):
        rows = slice(i * plan.group, (i + 1) * plan.group)
        product = _dot(x[:, rows], w[rows, :], plan).astype(jnp.float32)
        total += product * scales[i : i + 1]
    acc_ref[...] = total


def _halves(x: Array, scales: Array, plan: Plan) -> Array:
    """What the halves of q + 1/2 add, in units of 1/2: x's sum over each group times its scale.

    The sums are a product with the groups' membership. In two parts each fits bfloat16, for groups
    of up to 512 rows.
    """
    groups = scales.shape[0]
    rows = math.gcd(plan.group, 32)
    lane = jax.lax.broadcasted_iota(jnp.int32, (rows, pl.cdiv(groups, LANES) * LANES), 1)
    members = [jnp.where(lane == i, 1, 0).astype(x.dtype) for i in range(groups)]
    member = jnp.concatenate([m for m in members for _ in range(plan.group // rows)], 0)
    dims = (((1,), (0,)), ((), ()))
    sums = jax.lax.dot_general(x, member, dims, preferred_element_type=jnp.int32)
    sums = sums[:, :groups].astype(jnp.float32)
    if plan.group > 512 or plan.scales_dtype == "float32":
        return _plain_dot(sums, scales)
    coarse = jnp.floor(sums / 256) * 256
    narrow = scales.astype(jnp.bfloat16)
    parts = [part.astype(jnp.bfloat16) for part in (coarse, sums - coarse)]
    return _plain_dot(parts[0], narrow) + _plain_dot(parts[1], narrow)


def _plain_dot(a: Array, b: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)
