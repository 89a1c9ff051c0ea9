"""The product of rows sorted by expert with a stack of weights, in every storage.

On a CPU a loop walks blocks of rows that share an expert: experts without rows are not read, and
the work grows with the rows. Elsewhere plain arrays go to `jax.lax.ragged_dot`, and on a TPU packed
weights to the grouped kernel. A packed weight is frozen: gradients reach `x` only.

>>> w = jnp.ones((2, 256, 128), jnp.bfloat16)  # [E, K, N], an array or QTensor
>>> y = grouped_matmul(x, w, group_sizes=jnp.array([1, 3], jnp.int32))  # x [M, K], M = 4
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tpu_stack.errors import UserError
from tpu_stack.kernels.grouped_matmul import grouped_matmul as kernel
from tpu_stack.quant.matmul import matmul
from tpu_stack.quant.qtensor import QTensor
from tpu_stack.quant.rotation import rotate
from tpu_stack.sharding.constrain import current_platform

LEAST_BLOCK, LARGEST_BLOCK = 8, 128
"""Rows of a block on a CPU: XLA:CPU is ten times slower under eight, no faster beyond 128."""

_RAGGED_ROWS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([0], [0]), ([], [])),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def grouped_matmul(
    x: Float[Array, "M K"], w: Array | QTensor, group_sizes: Int[Array, " E"]
) -> Float[Array, "M N"]:
    """Row m of the result is row m of `x` times the weight of the expert that the row belongs to.

    Args:
      x: [M, K], rows sorted by expert; its dtype is the compute dtype and the result's.
      w: [E, K, N], an array or a QTensor with contract_axis -2.
      group_sizes: int32 [E], rows of each expert in order. Rows past their sum are zeros.

    Returns: [M, N]. A row of it depends on that row of `x` alone.

    Raises: UserError for shapes that do not fit.
    """
    if x.ndim != 2 or len(w.shape) != 3 or x.shape[1] != w.shape[1]:
        raise UserError(f"grouped_matmul: x {list(x.shape)} does not fit weights {list(w.shape)}")
    if not isinstance(w, QTensor):
        return _grouped(x, w.astype(x.dtype), group_sizes, False)
    with jax.named_scope(f"quant.grouped.{w.format}"):
        if w.rotation:
            x, w = rotate(x, w.rotation, -1).astype(x.dtype), replace(w, rotation=0)
        return _grouped(x, w, group_sizes, False)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped(x: Array, w: Any, sizes: Array, transpose: bool) -> Array:
    return jax.lax.platform_dependent(
        x,
        w,
        sizes,
        cpu=partial(_blocks, transpose=transpose),
        default=partial(_elsewhere, transpose=transpose),
    )


def _grouped_fwd(x, w, sizes, transpose):
    return _grouped(x, w, sizes, transpose), (x, w, sizes)


def _grouped_bwd(transpose, residuals, g):
    x, w, sizes = residuals
    dx = _grouped(g, w, sizes, not transpose)
    if isinstance(w, QTensor):
        return dx, None, None
    left, right = (g, x) if transpose else (x, g)
    dw = jax.lax.platform_dependent(left, right, sizes, cpu=_outer_blocks, default=_outer_elsewhere)
    return dx, dw.astype(w.dtype), None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


def _elsewhere(x: Array, w: Any, sizes: Array, transpose: bool) -> Array:
    if isinstance(w, QTensor) and current_platform() == "tpu":
        return kernel(
            x,
            w.values,
            w.scales,
            sizes,
            tensor_scale=w.tensor_scale,
            offset=w.offset,
            transpose=transpose,
            rows=w.shape[1] if w.packed_bits and transpose else None,
            out_dtype=x.dtype,
        )
    wide = w.dequantize(x.dtype) if isinstance(w, QTensor) else w
    return jax.lax.ragged_dot(x, wide.mT if transpose else wide, sizes)


def _outer_elsewhere(left: Array, right: Array, sizes: Array) -> Array:
    return jax.lax.ragged_dot_general(
        left, right, sizes, _RAGGED_ROWS, preferred_element_type=jnp.float32
    )


class _Walk:
    """Blocks of rows that belong to one expert each: `count` of them, in the order of the rows."""

    def __init__(self, rows: int, sizes: Array):
        share = rows // sizes.shape[0]
        self.size = min(max(LEAST_BLOCK, 1 << share.bit_length()), LARGEST_BLOCK)
        self.ends = jnp.cumsum(sizes)
        self.starts = self.ends - sizes
        blocks = -(-sizes // self.size)
        self.until = jnp.cumsum(blocks)
        self.begin = self.until - blocks
        self.count = self.until[-1]

    def at(self, i: Array) -> tuple[Array, Array]:
        """(expert, first row) of block i. The rows after the expert's last are the next one's."""
        expert = jnp.sum(self.until <= i)
        return expert, self.starts[expert] + (i - self.begin[expert]) * self.size


def _blocks(x: Array, w: Any, sizes: Array, transpose: bool) -> Array:
    """Rows that a block holds beyond its expert's are written again by the blocks that follow."""
    rows, walk = x.shape[0], _Walk(x.shape[0], sizes)
    padded = jnp.pad(x, ((0, walk.size), (0, 0)))
    columns = w.shape[1] if transpose else w.shape[2]

    def one_block(i: Array, out: Array) -> Array:
        expert, row = walk.at(i)
        take = partial(jax.lax.dynamic_index_in_dim, index=expert, keepdims=False)
        block = jax.lax.dynamic_slice_in_dim(padded, row, walk.size)
        product = matmul(block, jax.tree.map(take, w), transpose=transpose)
        return jax.lax.dynamic_update_slice_in_dim(out, product, row, 0)

    out = jnp.zeros((rows + walk.size, columns), x.dtype)
    out = jax.lax.fori_loop(0, walk.count, one_block, out)[:rows]
    return jnp.where(jnp.arange(rows)[:, None] < walk.ends[-1], out, 0)


def _outer_blocks(left: Array, right: Array, sizes: Array) -> Array:
    """Every expert's left.T @ right over its rows, [E, K, N] float32."""
    walk = _Walk(left.shape[0], sizes)
    left, right = (jnp.pad(a, ((0, walk.size), (0, 0))) for a in (left, right))

    def one_block(i: Array, out: Array) -> Array:
        expert, row = walk.at(i)
        own = row + jnp.arange(walk.size) < walk.ends[expert]
        a, b = (jax.lax.dynamic_slice_in_dim(array, row, walk.size) for array in (left, right))
        a = jnp.where(own[:, None], a, 0)
        product = jax.lax.dot_general(
            a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return out.at[expert].add(product)

    out = jnp.zeros((sizes.shape[0], left.shape[1], right.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, walk.count, one_block, out)
