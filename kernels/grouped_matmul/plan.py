"""The static plan of one call of `grouped_matmul`: the plan of one expert's rows, applied to all.

Example:
    plan = make_grouped_plan(x, values, scales, group_sizes)
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from tpu_stack.kernels.grouped_matmul.tiles import normalized_rows, tile_overrides
from tpu_stack.kernels.quantized_matmul.blocks import ROWS, round_up
from tpu_stack.kernels.quantized_matmul.plan import Plan, make_plan
from tpu_stack.kernels.quantized_matmul.tiles import DECODE_M
from tpu_stack.kernels.quantized_matmul.widen import Storage

WIDENING_ROWS = 128
"""Up to about this many rows decoding the weight takes longer than the product. Blocks of twice an
expert's mean rows then cost less: the kernel decodes the weight in fewer visits."""
MOST_ROWS = 512
"""Most rows of a block. A visit multiplies the rows of other experts in its block in vain: above
this, larger blocks lose more by that than they gain by decoding the weight less often."""


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
    """Validates one call and chooses its dtypes, scale mode and blocks.

    Every expert with a row in a block multiplies the whole block. In scale mode "after_group" rows
    cost most, and a block has the mean rows per expert. Otherwise decoding the weight costs most,
    and a block has at least 64 rows and, for fewer than 128, twice the mean. The mean rows per
    expert decide between the two (tiles.py), unless the caller asks for "before".

    Arguments as in `grouped_matmul`, of which only shape and dtype are read, and:
      kind: device kind to plan for; None for the one that is traced for.

    Returns: the plan, `plan.m` all rows. bfloat16 weights, which have no scales, take scale mode
      "input".

    Raises: ValueError as `grouped_matmul` does.
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
            overrides=tile_overrides(x.dtype, normalized_rows(average, group)),
        )
        mixed = scale_mode == "before" and "after_group" in plan.tile_schedule
        return replace(plan, tile_schedule=()) if mixed else plan

    plan = for_rows(min(m, round_up(average, ROWS)))
    if (
        plan.scale_mode != "after_group" and "after_group" not in plan.tile_schedule
    ):  # decoding costs most
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
