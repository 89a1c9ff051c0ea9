"""Matrix product with a weight of few bits: `x @ (values * scales)`, accumulated in float32.

The weight is read from memory packed and widened in VMEM, which is the point at decode, where the
time is the weight's bytes. Needs only jax.

>>> y = quantized_matmul(x, values, scales)  # x [M, K], values int4 [K, N], scales [K/32, 1, N]
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tpu_stack.kernels.quantized_matmul.pallas_tpu import pallas_quantized_matmul
from tpu_stack.kernels.quantized_matmul.plan import SCALE_MODES, Plan, make_plan
from tpu_stack.kernels.quantized_matmul.reference import reference_quantized_matmul

__all__ = ["SCALE_MODES", "Plan", "make_plan", "quantized_matmul", "reference_quantized_matmul"]


def quantized_matmul(
    x: Float[Array, "M K"],
    values: Int[Array, "K N"],
    scales: Array,
    *,
    transpose: bool = False,
    scale_mode: str | None = None,
    out_dtype: Any = None,
    tiles: tuple[int, int, int] | None = None,
    interpret: Any = None,
) -> Float[Array, "M N"]:
    """`x @ (values * scales)`, or `x @ (values * scales).T` when `transpose`.

    Args:
      x: [M, K] bfloat16 or float32, any M, K >= 1.
      values: int8 or int4 [K, N]; [N, K] when `transpose`.
      scales: bfloat16 or float32. Rank 3, [G, 1, columns]: the rows of `values` fall into G groups
        of equal size, each column with a scale per group (G = 1: per column). Rank 2, [rows, 1]:
        one scale per row of `values`.
      transpose: contract with the columns of `values`.
      scale_mode: where scales are applied. "after": on the result; "input": on x, outside the
        kernel; "before": on the widened weight; "after_group": on the product of each group.
        None takes the cheapest that is right for these shapes.
      out_dtype: bfloat16 or float32; x's dtype when None.
      tiles: (block of M, of the contraction, of the output columns); None reads `tiles.json`.
      interpret: True or a `pltpu.InterpretParams` to interpret, False to compile for TPU, None to
        decide when lowered: compiled for TPU, interpreted on CPU.

    Returns: [M, N].

    Raises: ValueError for shapes that do not fit, unsupported dtypes, groups or scale modes.
    """
    plan = make_plan(x, values, scales, transpose, scale_mode, out_dtype, tiles)
    if plan.scale_mode == "input":
        x = (x * scales.astype(jnp.float32).reshape(1, -1)).astype(x.dtype)
    if interpret is not None:
        return pallas_quantized_matmul(x, values, scales, plan, interpret)
    return jax.lax.platform_dependent(
        x,
        values,
        scales,
        cpu=partial(pallas_quantized_matmul, plan=plan, interpret=True),
        tpu=partial(pallas_quantized_matmul, plan=plan, interpret=False),
    )
