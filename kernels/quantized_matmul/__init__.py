"""Matmul with a low-bit weight: `x @ (values * scales)`, accumulated in float32.

The kernel reads the packed weight from HBM and decodes it in VMEM: at decode, reading the weight is
what takes the time. Needs only jax.

>>> x, values = jnp.ones((4, 64), jnp.bfloat16), jnp.ones((64, 128), jnp.int4)
>>> scales = jnp.full((2, 1, 128), 0.5, jnp.bfloat16)  # groups of 32 rows
>>> y = quantized_matmul(x, values, scales)
>>> y.shape, y[0, 0].item()
((4, 128), 32.0)
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tpu_stack.kernels.quantized_matmul.pallas_tpu import pallas_quantized_matmul
from tpu_stack.kernels.quantized_matmul.plan import SCALE_MODES, Plan, make_plan
from tpu_stack.kernels.quantized_matmul.reference import reference_quantized_matmul

__all__ = ["SCALE_MODES", "Plan", "make_plan", "quantized_matmul", "reference_quantized_matmul"]


def quantized_matmul(
    x: Array,
    values: Array,
    scales: Array,
    *,
    tensor_scale: Float[Array, "1 1 1"] | None = None,
    x_scales: Float[Array, "M 1"] | None = None,
    offset: float = 0.0,
    transpose: bool = False,
    rows: int | None = None,
    scale_mode: str | None = None,
    out_dtype: Any = None,
    tiles: tuple[int, int, int] | None = None,
    interpret: Any = None,
) -> Float[Array, "M N"]:
    """`x_scales * (x @ W)` with W = `(values + offset) * scales * tensor_scale`, [K, N].

    Args:
      x: [M, K] bfloat16 or float32, or quantized per row: float8_e4m3fn or int8. Any M, K >= 1.
      values: [K, N] int8, int4, int2, float8_e4m3fn, float8_e5m2 or float4_e2m1fn; or int32
        [8 * ceil(K / 256), N], words of 32 signs: row k is bit (k % 256) // 8 of word row
        8 * (k // 256) + k % 8, 1 for +1 and 0 for -1.
      scales: bfloat16, float32, float8_e8m0fnu or float8_e4m3fn. Rank 3, [G, 1, N]: one
        scale per column and group, G groups of K / G rows (G = 1: per column). Rank 2, [K, 1]: one
        scale per row of `values`.
      tensor_scale: one more float32 factor of the weight (NVFP4).
      x_scales: float32, one per row of x.
      offset: 0.5 for half-offset int2, where code q means q + 1/2.
      transpose: `x @ W.T`, x [M, N] and the result [M, K], as the gradient with respect to x needs.
      rows: K of a 1-bit weight when `transpose`; None for all rows of the words.
      scale_mode: what the scales multiply. "after": the result; "input": x, outside the kernel;
        "before": the decoded weight; "after_group": the product of each group. None takes the
        cheapest that these shapes allow.
      out_dtype: bfloat16 or float32; None for x's dtype, or bfloat16 for quantized x.
      tiles: block sizes of (M, contracted dimension, output columns); None reads `tiles.json`.
      interpret: True or a `pltpu.InterpretParams` to interpret, False to compile for TPU; None
        compiles for TPU and interprets on CPU.

    Products of int8 activations with integer weights are exact before scaling: summed in int32, or
    in floats that represent every partial sum.

    Returns: [M, N].

    Raises: ValueError for shapes that do not fit, unsupported dtypes, groups or scale modes.
    """
    plan = make_plan(
        *(x, values, scales, transpose, scale_mode, out_dtype, tiles),
        tensor_scale=tensor_scale,
        x_scales=x_scales,
        offset=offset,
        rows=rows,
    )
    run = partial(pallas_quantized_matmul, plan=plan)
    operands = (x, values, scales, _row_scales(plan, tensor_scale, x_scales))
    if interpret is not None:
        return run(*operands, interpret=interpret)
    return jax.lax.platform_dependent(
        *operands, cpu=partial(run, interpret=True), tpu=partial(run, interpret=False)
    )


def _row_scales(plan: Plan, tensor_scale: Array | None, x_scales: Array | None) -> Array | None:
    """float32 [M, 1]: x_scales times tensor_scale; None when there are neither."""
    if not plan.row_scaled:
        return None
    factor = jnp.ones((plan.m, 1), jnp.float32) if x_scales is None else x_scales
    return factor if tensor_scale is None else factor * tensor_scale.reshape(1, 1)
