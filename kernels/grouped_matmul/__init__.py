"""Mixture-of-experts matmul: rows sorted by expert, each times its expert's low-bit weight.

One kernel serves all experts, however many rows each one got. At decode it reads no weight of an
expert without rows, and reads the packed weight once for an expert with one row. Needs only jax.

>>> x, values = jnp.ones((3, 128), jnp.bfloat16), jnp.ones((2, 128, 128), jnp.int8)
>>> scales = jnp.array([1.0, 2.0]).reshape(2, 1, 1, 1) * jnp.ones((2, 1, 1, 128))
>>> y = grouped_matmul(x, values, scales, group_sizes=jnp.array([1, 2], jnp.int32))
>>> y.shape, y[:, 0].tolist()
((3, 128), [128.0, 256.0, 256.0])
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tpu_stack.kernels.grouped_matmul.metadata import Visits, expert_of_rows, visits
from tpu_stack.kernels.grouped_matmul.pallas_tpu import pallas_grouped_matmul
from tpu_stack.kernels.grouped_matmul.plan import make_grouped_plan
from tpu_stack.kernels.grouped_matmul.reference import reference_grouped_matmul
from tpu_stack.kernels.quantized_matmul.plan import Plan

__all__ = [
    "Visits",
    "grouped_matmul",
    "make_grouped_plan",
    "reference_grouped_matmul",
    "visits",
]


def grouped_matmul(
    x: Array,
    values: Array,
    scales: Array | None,
    group_sizes: Int[Array, " E"],
    *,
    tensor_scale: Float[Array, "E 1 1 1"] | None = None,
    x_scales: Float[Array, "M 1"] | None = None,
    offset: float = 0.0,
    transpose: bool = False,
    rows: int | None = None,
    scale_mode: str | None = None,
    out_dtype: Any = None,
    tiles: tuple[int, int, int] | None = None,
    interpret: Any = None,
) -> Float[Array, "M N"]:
    """Row m of the result is row m of x times the weight of the expert that the row belongs to.

    Args:
      x: [M, K] bfloat16, float32, float8_e4m3fn or int8; rows sorted by expert.
      values: [E, K, N] in every dtype of `quantized_matmul` (int32 words of signs: [E, words, N]);
        or bfloat16.
      scales: [E, G, 1, N], as in `quantized_matmul`; None for bfloat16 values.
      group_sizes: int32 [E], rows of each expert in order; zeros are allowed. Rows past their sum
        are padding and give zeros; sizes that exceed M in sum are cut.
      tensor_scale: float32 [E, 1, 1, 1] beside the scales (NVFP4).
      x_scales: float32 [M, 1], one per row of x.
      transpose: multiply by the weight's transpose, x [M, N] and the result [M, K], as the gradient
        with respect to x needs.
      tiles: (block of rows, of the contraction, of the output columns); None takes
        those of `quantized_matmul` for the mean rows per expert.
      offset, rows, scale_mode, out_dtype, interpret: as in `quantized_matmul`.

    Returns: [M, N].

    Raises: ValueError for shapes that do not fit, unsupported dtypes, groups or scale modes.
    """
    plan = make_grouped_plan(
        *(x, values, scales, group_sizes, transpose, scale_mode, out_dtype, tiles),
        tensor_scale=tensor_scale,
        x_scales=x_scales,
        offset=offset,
        rows=rows,
    )
    row_scales = _row_scales(plan, group_sizes, tensor_scale, x_scales)
    if scales is not None and plan.scale_mode == "input":
        factor = _per_row(scales.astype(jnp.float32).reshape(values.shape[0], -1), group_sizes, x)
        x, scales = x.astype(jnp.float32) * factor, None
    run = partial(pallas_grouped_matmul, plan=plan)
    operands = (x, values, scales, row_scales, group_sizes)
    if interpret is not None:
        return run(*operands, interpret=interpret)
    return jax.lax.platform_dependent(
        *operands, cpu=partial(run, interpret=True), tpu=partial(run, interpret=False)
    )


def _per_row(per_expert: Array, group_sizes: Array, x: Array) -> Array:
    """[M, ...]: the entry of each row's expert; padding rows get the last expert's."""
    expert = expert_of_rows(group_sizes, x.shape[0])
    return per_expert[jnp.minimum(expert, per_expert.shape[0] - 1)]


def _row_scales(
    plan: Plan, group_sizes: Array, tensor_scale: Array | None, x_scales: Array | None
) -> Array | None:
    """float32 [M, 1]: x_scales times tensor_scale of each row; None when there are neither."""
    if not plan.row_scaled:
        return None
    factor = jnp.ones((plan.m, 1), jnp.float32) if x_scales is None else x_scales
    if tensor_scale is None:
        return factor
    return factor * _per_row(tensor_scale.reshape(-1, 1), group_sizes, factor)
