"""One block's product inside the grouped kernel: widen the weight, scale it, multiply.

It takes the weight through `quantized_matmul`'s `widen` and `scaling`, so that every storage means
the same here.

>>> acc_ref[...] += block_product(x_ref[...], w_ref, s_ref, None, left, plan, True)  # [bm, bn]
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tpu_stack.kernels.quantized_matmul import scaling
from tpu_stack.kernels.quantized_matmul.plan import Plan
from tpu_stack.kernels.quantized_matmul.widen import as_stored, widen


def scale_words(plan: Plan) -> tuple[int, int] | None:
    """The scratch that `block_product` wants for scales as words; None where it uses none."""
    rows, columns = (plan.bn, plan.bk) if plan.transpose else (plan.bk, plan.bn)
    spread = plan.scale_mode == "before" and plan.operands[1] == "bfloat16"
    return (rows // plan.group, columns) if spread and plan.group % 16 == 0 else None


def block_product(
    x: Array, w_ref: Any, s_ref: Any, words_ref: Any, left: Any, plan: Plan, compiled: bool
) -> Array:
    """x [bm, bk] times the widened block, in the accumulator's dtype and units of `plan.unit`.

    Args:
      w_ref: the block as stored, `plan.weight_block`.
      s_ref: its scales [rows / group, columns]; None where they are not applied in here.
      words_ref: uint32 scratch of `scale_words(plan)`, or None.
      compiled: whether it is compiled, rather than interpreted.
      left: elements of K from this block's first on. Past them x and the scales count as zero, so
        whatever the weight's integers are there adds nothing; floats, which may be NaN, are zero.
    """
    if plan.k_edge:
        x = _zero_past(x, 1, left)
    w = widen(as_stored(w_ref[...], plan.storage), plan.storage, plan.operands[1])
    if plan.k_edge and plan.storage.name == "float8":
        w = _zero_past(w, 1 if plan.transpose else 0, left)
    if s_ref is None:
        return _dot(x, w, plan.transpose)
    scales = scaling.edge_scales(s_ref, left, plan)
    if words_ref is not None:
        words_ref[...] = scaling.pair_words(scales, s_ref.dtype != jnp.float32)
        w = scaling.scaled_by_words(w, words_ref, plan.group, compiled)
        return _dot(x, w, plan.transpose)
    if plan.scale_mode == "before":
        return _dot(x, scaling.scaled(w, scales, plan.group), plan.transpose)
    total = jnp.zeros((plan.bm, plan.bn), jnp.float32)
    for i in range(plan.bk // plan.group):
        rows = slice(i * plan.group, (i + 1) * plan.group)
        product = _dot(x[:, rows], w[rows, :], False).astype(jnp.float32)
        total += product * scales[i : i + 1]
    return total


def _zero_past(block: Array, axis: int, left: Any) -> Array:
    """`block` with zeros from element `left` of `axis` on."""
    index = jax.lax.broadcasted_iota(jnp.int32, block.shape, axis)
    return jnp.where(index < left, block, jnp.zeros_like(block))


def _dot(x: Array, w: Array, transpose: bool) -> Array:
    dims = (((1,), (1 if transpose else 0,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    sums = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    return jax.lax.dot_general(x, w, dims, precision, preferred_element_type=sums)
