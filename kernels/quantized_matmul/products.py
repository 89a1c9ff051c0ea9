"""What a kernel does with one block, x @ the block of the weight, and with the sum of them.

The weight is widened in VMEM to what the MXU multiplies, in the way that the plan names. Blocks may
reach past the arrays: rows of M and columns of N out there are never stored, and along K both x and
the scales are set to zero, so whatever the weight's integers are out there (an integer is never
NaN) they add nothing. Weights that can be NaN are set to zero there too. `quantized_matmul` and
`grouped_matmul` differ in which blocks meet, not in this.

>>> acc_ref[...] += block_product(x_ref, w_ref, factors, words, left, plan, compiled)
>>> o_ref[...] = finished(acc_ref[...], factors, plan).astype(o_ref.dtype)
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from tpu_stack.kernels.quantized_matmul import scaling
from tpu_stack.kernels.quantized_matmul.by_stripes import byte_product, mixed_product
from tpu_stack.kernels.quantized_matmul.plan import LANES, Plan
from tpu_stack.kernels.quantized_matmul.widen import WORD_ROWS, as_stored, widen

_MIB = 2**20


def block_product(
    x_ref: Any,
    w_ref: Any,
    factors: list[Any],
    words: list[Any],
    left: Any,
    plan: Plan,
    compiled: bool,
) -> Array:
    """x [bm, bk] times the block, [bm, bn] in `plan.accumulator`, in units of `plan.unit`.

    Args:
      x_ref: rows in the order of `arguments.run`.
      w_ref: the block as stored, `plan.weight_block`.
      factors: refs of what comes after the weight in `arguments.run`.
      words: refs of the scratch of scales as words.
      left: elements of K from this block's first on.
      compiled: whether it is compiled, rather than interpreted.
    """
    x = x_ref[...].astype(plan.operands[0])
    if plan.k_edge and not plan.as_bytes:
        # Paired K is padded to whole tiles of words, and in another order within each.
        tiles = plan.paired and not plan.transpose
        x = _zero_past(x, 1, pl.cdiv(left, WORD_ROWS) * WORD_ROWS if tiles else left)
    if plan.as_bytes:
        return byte_product(x, w_ref, factors, words[0], left, plan, compiled)
    if plan.ways:
        return mixed_product(x, w_ref, factors[0], words, left, plan, compiled)
    if plan.scale_mode == "before":
        w, unit = _scaled_weight(w_ref, factors[0], words, left, plan, compiled)
        y = _dot(x, w, plan)
        return y if unit is None else y * unit
    w = _weight(w_ref, left, plan, plan.operands[1])
    if plan.scale_mode != "after_group":
        return _dot(x, w, plan)
    scales = scaling.edge_scales(factors[0], left, plan)
    if not plan.group_sums:
        return _sum_of_groups(x, w, scales, plan)
    # In units of 1/2, and so all the rest.
    return _halves(x, scales, plan) + _sum_of_groups(x, w, 2 * scales, plan)


def finished(total: Array, factors: list[Any], plan: Plan) -> Float[Array, "bm bn"]:
    """The sum of all blocks' products times what is still to be applied, in float32."""
    y = total.astype(jnp.float32)
    if plan.unit != 1:
        y = y * plan.unit
    if plan.scale_mode == "after":
        y = y * factors[0][...].astype(jnp.float32)
    return y * factors[-1][...] if plan.row_scaled else y


def scratch_shapes(plan: Plan) -> list[Any]:
    """The accumulator, where a result is the sum of several blocks of K; then the scales as words,
    where they are used so."""
    accumulator = pltpu.VMEM((plan.bm, plan.bn), jnp.dtype(plan.accumulator))
    return [accumulator] * _accumulates(plan) + _words_shapes(plan)


def split_refs(refs: tuple[Any, ...], plan: Plan) -> tuple[list[Any], Any, Any, list[Any]]:
    """A kernel's refs after the weight's: factors, the output, the accumulator or None, words."""
    rest = list(refs)
    words = [rest.pop() for _ in _words_shapes(plan)][::-1]
    acc_ref = rest.pop() if _accumulates(plan) else None
    *factors, o_ref = rest
    return factors, o_ref, acc_ref, words


def _accumulates(plan: Plan) -> bool:
    return plan.grid[2] > 1


def _words_shapes(plan: Plan) -> list[Any]:
    if not plan.words:
        return []
    rows, columns = plan.words, plan.weight_block[1]
    if plan.as_bytes or plan.ways:
        kinds = 2 if "after" in plan.ways else 1
        return [pltpu.VMEM((columns // plan.stripe, rows, plan.stripe), jnp.uint32)] * kinds
    return [pltpu.VMEM((rows, columns), jnp.uint32)]


def vmem_limit(plan: Plan) -> int:
    """Double-buffered blocks, the accumulator, and the widened weight as cast and as scaled."""
    x_bytes, w_bytes = (jnp.dtype(name).itemsize for name in plan.operands)
    weight = plan.bk * plan.bn
    if plan.storage.name in ("signs", "codes4") and not plan.as_bytes:
        w_bytes = 4  # decoded in 32 bits
    stored = weight * max(8, plan.storage.bits) // 8
    blocks = 2 * (plan.bm * plan.bk * x_bytes + stored + weight // 8 + plan.bm * plan.bn * 4)
    return max(16 * _MIB, blocks + plan.bm * plan.bn * 8 + 3 * weight * w_bytes + 4 * _MIB)


def _weight(w_ref: Any, left: Array, plan: Plan, dtype: str) -> Array:
    """The block in `dtype`, without scales; zero past K where it could be NaN there."""
    # e2m1 is seen as int4 here and not outside, where XLA would copy the weight at every call.
    w = widen(as_stored(w_ref[...], plan.storage), plan.storage, dtype)
    if plan.k_edge and plan.storage.name == "float8":
        w = _zero_past(w, 1 if plan.transpose else 0, left)
    return w


def _scaled_weight(
    w_ref: Any, s_ref: Any, words: list[Any], left: Array, plan: Plan, compiled: bool
) -> tuple[Array, Array | None]:
    """The block times its scales in the operand's dtype, and the unit of each of its columns."""
    if not plan.words:
        dtype = "float32" if plan.operands[1] == "float32" else "bfloat16"
        w = _weight(w_ref, left, plan, dtype)
        w = scaling.scaled(w, scaling.edge_scales(s_ref, left, plan), plan.group)
        return w.astype(plan.operands[1]), None
    words_ref, unit = words[0], None
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


def _sum_of_groups(x: Array, w: Array, scales: Array, plan: Plan) -> Array:
    """The sum over groups of (x @ w of the group) times the group's scales."""
    total = jnp.zeros((plan.bm, plan.bn), jnp.float32)
    for i in range(plan.bk // plan.group):
        rows = slice(i * plan.group, (i + 1) * plan.group)
        product = _dot(x[:, rows], w[rows, :], plan).astype(jnp.float32)
        total += product * scales[i : i + 1]
    return total


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
