"""The inner loop of both matmul kernels: the product of one block, and the scaling of their sum.

The kernel decodes the weight in VMEM to the dtype that the MXU multiplies, as the plan says. Blocks
may reach past the arrays. Rows of M and columns of N beyond them are never stored. Along K the
kernel masks x and the scales to zero, so integer weights beyond K, which cannot be NaN, add
nothing; float weights are masked too. `quantized_matmul` and `grouped_matmul` differ only in which
blocks they multiply.

    acc_ref[...] += block_product(x_ref, w_ref, factors, packed, k_left, plan, compiled)
    o_ref[...] = finalize(acc_ref[...], factors, plan).astype(o_ref.dtype)
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from tpu_stack.kernels.quantized_matmul import scaling
from tpu_stack.kernels.quantized_matmul.interleaved_tiles import interleaved_product, planes_product
from tpu_stack.kernels.quantized_matmul.plan import LANES, Plan
from tpu_stack.kernels.quantized_matmul.widen import WORD_ROWS, as_stored, widen

_MIB = 2**20


def block_product(
    x_ref: Any,
    w_ref: Any,
    factors: list[Any],
    packed: list[Any],
    k_left: Any,
    plan: Plan,
    compiled: bool,
) -> Array:
    """x [bm, bk] @ block, [bm, bn] in `plan.accumulator`; `finalize` applies `plan.multiplier`.

    Args:
      x_ref: columns in the order that `arguments.run` gives them.
      w_ref: the block as stored, `plan.weight_block`.
      factors: refs of the operands after the weight: scales, group sums, row scales.
      packed: refs of the scratch for packed scales.
      k_left: elements of K from this block's first to the end of K.
      compiled: False when interpreted.
    """
    x = x_ref[...].astype(plan.operands[0])
    if plan.ragged_k and not plan.uses_planes:
        # Interleaved K is padded to whole tiles of words and permuted within each.
        tiles = plan.interleaves_halves and not plan.transpose
        x = _mask_past(x, 1, pl.cdiv(k_left, WORD_ROWS) * WORD_ROWS if tiles else k_left)
    if plan.uses_planes:
        return planes_product(x, w_ref, factors, packed[0], k_left, plan, compiled)
    if plan.tile_schedule:
        return interleaved_product(x, w_ref, factors[0], packed, k_left, plan, compiled)
    if plan.scale_mode == "before":
        w, column_scale = _scaled_weight(w_ref, factors[0], packed, k_left, plan, compiled)
        y = _dot(x, w, plan)
        return y if column_scale is None else y * column_scale
    w = _weight(w_ref, k_left, plan, plan.operands[1])
    if plan.scale_mode != "after_group":
        return _dot(x, w, plan)
    scales = scaling.load_scales(factors[0], k_left, plan)
    if not plan.group_sums:
        return _sum_of_groups(x, w, scales, plan)
    # Twice the value, as `plan.multiplier` is 1/2.
    return _half_offset_product(x, scales, plan) + _sum_of_groups(x, w, 2 * scales, plan)


def finalize(total: Array, factors: list[Any], plan: Plan) -> Float[Array, "bm bn"]:
    """The result in float32: the sum of all blocks' products times the scales that remain."""
    y = total.astype(jnp.float32)
    if plan.multiplier != 1:
        y = y * plan.multiplier
    if plan.scale_mode == "after":
        y = y * factors[0][...].astype(jnp.float32)
    return y * factors[-1][...] if plan.row_scaled else y


def scratch_shapes(plan: Plan) -> list[Any]:
    """The accumulator, if K has several blocks, then the packed scales, if the plan uses them."""
    accumulator = pltpu.VMEM((plan.bm, plan.bn), jnp.dtype(plan.accumulator))
    return [accumulator] * _accumulates(plan) + _packed_shapes(plan)


def split_refs(refs: tuple[Any, ...], plan: Plan) -> tuple[list[Any], Any, Any, list[Any]]:
    """A kernel's refs after the weight: factors, output, accumulator or None, packed scales."""
    rest = list(refs)
    packed = [rest.pop() for _ in _packed_shapes(plan)][::-1]
    acc_ref = rest.pop() if _accumulates(plan) else None
    *factors, o_ref = rest
    return factors, o_ref, acc_ref, packed


def _accumulates(plan: Plan) -> bool:
    return plan.grid[2] > 1


def _packed_shapes(plan: Plan) -> list[Any]:
    if not plan.packed_scale_rows:
        return []
    rows, columns = plan.packed_scale_rows, plan.weight_block[1]
    if plan.uses_planes or plan.tile_schedule:
        kinds = 2 if "after_group" in plan.tile_schedule else 1
        return [pltpu.VMEM((columns // plan.stripe, rows, plan.stripe), jnp.uint32)] * kinds
    return [pltpu.VMEM((rows, columns), jnp.uint32)]


def vmem_limit(plan: Plan) -> int:
    """Bytes of VMEM: double-buffered blocks, the accumulator, the weight as cast and as scaled."""
    x_bytes, w_bytes = (jnp.dtype(name).itemsize for name in plan.operands)
    weight = plan.bk * plan.bn
    if plan.storage.name in ("signs", "codes4") and not plan.uses_planes:
        w_bytes = 4  # decoded in 32 bits
    stored = weight * max(8, plan.storage.bits) // 8
    blocks = 2 * (plan.bm * plan.bk * x_bytes + stored + weight // 8 + plan.bm * plan.bn * 4)
    return max(16 * _MIB, blocks + plan.bm * plan.bn * 8 + 3 * weight * w_bytes + 4 * _MIB)


def _weight(w_ref: Any, k_left: Array, plan: Plan, dtype: str) -> Array:
    """The block in `dtype` without scales; a float block is zero past K, where it could be NaN."""
    # Bitcasting e2m1 to int4 outside the kernel would make XLA copy the weight at every call.
    w = widen(as_stored(w_ref[...], plan.storage), plan.storage, dtype)
    if plan.ragged_k and plan.storage.name == "float8":
        w = _mask_past(w, 1 if plan.transpose else 0, k_left)
    return w


def _scaled_weight(
    w_ref: Any, s_ref: Any, packed: list[Any], k_left: Array, plan: Plan, compiled: bool
) -> tuple[Array, Array | None]:
    """The scaled block in the operand's dtype, and a factor per column of the product or None."""
    if not plan.packed_scale_rows:
        dtype = "float32" if plan.operands[1] == "float32" else "bfloat16"
        w = _weight(w_ref, k_left, plan, dtype)
        w = scaling.scaled(w, scaling.load_scales(s_ref, k_left, plan), plan.group)
        return w.astype(plan.operands[1]), None
    packed_ref, column_scale = packed[0], None
    exact = plan.scales_dtype != "float32"
    if plan.scales_in_e5m2:
        scales, column_scale = scaling.relative_scales(s_ref, k_left, plan)
        packed_ref[...] = scaling.duplicate_halves(scales, exact=True)
    elif plan.interleaves_halves:
        scales = scaling.load_scales(s_ref, k_left, plan)
        scaling.pack_sign_scales(scales, packed_ref, plan.group, exact)
        return scaling.apply_signs(w_ref[...], packed_ref, plan.group, compiled), None
    else:
        packed_ref[...] = scaling.duplicate_halves(scaling.load_scales(s_ref, k_left, plan), exact)
    w = _weight(w_ref, k_left, plan, "bfloat16")
    w = scaling.scale_by_packed(w, packed_ref, plan.group, compiled)
    return w.astype(plan.operands[1]), column_scale


def _mask_past(block: Array, axis: int, k_left: Any) -> Array:
    """`block` with zeros from index `k_left` of `axis` on."""
    index = jax.lax.broadcasted_iota(jnp.int32, block.shape, axis)
    return jnp.where(index < k_left, block, jnp.zeros_like(block))


def _dot(x: Array, w: Array, plan: Plan) -> Array:
    """`x @ w` in float32, or int32 for integers, before `plan.multiplier`."""
    dims = (((1,), (1 if plan.transpose else 0,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    sums = jnp.int32 if plan.integer else jnp.float32
    y = jax.lax.dot_general(x, w, dims, precision, preferred_element_type=sums)
    if plan.scale_mode == "after_group" or not plan.storage.adds_ones(plan.operands[1]):
        return y
    ones = jnp.ones((x.shape[1], 128), x.dtype)
    sum_x = jax.lax.dot_general(x, ones, (((1,), (0,)), ((), ())), preferred_element_type=sums)
    return 2 * y + jnp.concatenate([sum_x] * (y.shape[1] // 128), 1)


def _sum_of_groups(x: Array, w: Array, scales: Array, plan: Plan) -> Array:
    """Sum over groups of (x @ w over the group) * scales of the group, float32 [bm, bn]."""
    total = jnp.zeros((plan.bm, plan.bn), jnp.float32)
    for i in range(plan.bk // plan.group):
        rows = slice(i * plan.group, (i + 1) * plan.group)
        product = _dot(x[:, rows], w[rows, :], plan).astype(jnp.float32)
        total += product * scales[i : i + 1]
    return total


def _half_offset_product(x: Array, scales: Array, plan: Plan) -> Array:
    """Twice what the 1/2 of q + 1/2 adds: x's sum over each group times the group's scale.

    A product with the groups' one-hot membership computes the sums. Split into a coarse and a fine
    part they fit bfloat16 exactly, for groups of up to 512 rows.
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
