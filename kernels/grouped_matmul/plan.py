"""What is static about one call of `grouped_matmul`: one expert's plan, stretched to all rows.

>>> plan = make_grouped_plan(x, values, scales, group_sizes)
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from tpu_stack.kernels.grouped_matmul.tiles import load_of, own_tiles
from tpu_stack.kernels.quantized_matmul.blocks import ROWS, round_up
from tpu_stack.kernels.quantized_matmul.plan import Plan, make_plan
from tpu_stack.kernels.quantized_matmul.tiles import DECODE_M
from tpu_stack.kernels.quantized_matmul.widen import Storage

WIDENING_ROWS = 128
"""Up to about so many rows widening the weight takes longer than the product: blocks of twice what
an expert gets are visited less often."""
MOST_ROWS = 512
"""Rows of a block at most: what is not the expert's in its first and last block is multiplied for
nothing, so that larger blocks, which widen the weight less often, lose more than they gain."""


def make_grouped_plan(
    x: Any,
    values: Any,
    scales: Any,
    group_sizes: Any,
    transpose: bool = False,
    scale_mode: str | None = None,
    out_dtype: Any = None,
    tiles: tuple[int, int, int] | None = None,
    *,
    tensor_scale: Any = None,
    x_scales: Any = None,
    offset: float = 0.0,
    rows: int | None = None,
    kind: str | None = None,
) -> Plan:
    """Validates one call and chooses its types and blocks; arguments as in `grouped_matmul`.

    Every expert that has a row in a block multiplies the whole block. Where each row's product is
    scaled group by group a block has the rows that an expert gets when all get as many; otherwise
    the widening of the weight outweighs them, and a block has 64 at least, or up to 128. Which of
    the two it is depends on how many rows an expert gets (tiles.py); scale mode "before" is always
    the latter. `plan.m` counts all rows, and scale mode "input" stands for bfloat16 weights too,
    which have no scales.
    """
    _check_shapes(x, values, scales, group_sizes, tensor_scale, x_scales)
    m, experts = x.shape[0], values.shape[0]

    def part(array: Any, shape: tuple[int, ...], dtype: Any = None) -> Any:
        return array if array is None else jax.ShapeDtypeStruct(shape, dtype or array.dtype)

    wide = values.dtype == jnp.bfloat16
    if wide and (offset or scale_mode or x.dtype not in (jnp.bfloat16, jnp.float32)):
        raise ValueError(
            f"bfloat16 values take no offset or scale_mode and x of bfloat16 or float32, "
            f"not offset {offset}, scale_mode {scale_mode}, x {x.dtype}"
        )
    if wide:
        ones = jax.ShapeDtypeStruct((1, 1, values.shape[2]), jnp.float32)

    average = -(-m // experts)
    group = x.shape[1] if wide else max(1, x.shape[1] // max(1, scales.shape[1]))

    def for_rows(expected: int) -> Plan:
        plan = make_plan(
            part(x, (expected, x.shape[1])),
            part(values, values.shape[1:], jnp.int8 if wide else None),
            ones if wide else part(scales, scales.shape[1:]),
            *(transpose, scale_mode, out_dtype, tiles),
            tensor_scale=part(tensor_scale, (1, 1, 1)),
            x_scales=part(x_scales, (expected, 1)),
            offset=offset,
            rows=rows,
            kind=kind,
            own=own_tiles(x.dtype, load_of(average, group)),
        )
        mixed = scale_mode == "before" and "after" in plan.ways
        return replace(plan, ways=()) if mixed else plan

    plan = for_rows(min(m, round_up(average, ROWS)))
    if plan.scale_mode != "after_group" and "after" not in plan.ways:  # rows cost next to nothing
        plan = for_rows(min(m, max(DECODE_M, min(2 * average, WIDENING_ROWS), average)))
    plan = replace(plan, m=m, bm=plan.bm if tiles else min(plan.bm, MOST_ROWS))
    if not wide:
        return plan
    dtype = jnp.dtype(x.dtype).name
    return replace(
        plan,
        storage=Storage("float8", "bfloat16"),  # floats that widen to themselves
        operands=(dtype, dtype),
        support=f"native: {dtype} x {dtype}",
        scale_mode="input",
    )


def _check_shapes(
    x: Any, values: Any, scales: Any, group_sizes: Any, tensor_scale: Any, x_scales: Any
) -> None:
    if x.ndim != 2 or values.ndim != 3 or min(*x.shape, *values.shape) < 1:
        raise ValueError(f"x {x.shape} and values {values.shape} need to be [M, K] and [E, K, N]")
    experts = values.shape[0]
    if group_sizes.shape != (experts,) or group_sizes.dtype != jnp.int32:
        raise ValueError(
            f"group_sizes is {group_sizes.dtype}{group_sizes.shape}; supported: int32({experts},)"
        )
    if (scales is None) != (values.dtype == jnp.bfloat16):
        raise ValueError(
            f"values of {values.dtype} {'need' if scales is None else 'take no'} scales"
        )
    if scales is not None and (scales.ndim != 4 or scales.shape[0] != experts):
        raise ValueError(f"scales is {scales.shape}; {experts} experts need [{experts}, G, 1, N]")
    if tensor_scale is not None and tensor_scale.shape != (experts, 1, 1, 1):
        raise ValueError(f"tensor_scale is {tensor_scale.shape}; supported: {(experts, 1, 1, 1)}")
    if x_scales is not None and x_scales.shape != (x.shape[0], 1):
        raise ValueError(f"x_scales is {x_scales.shape}; x {x.shape} needs {(x.shape[0], 1)}")
